//! Saving a machine and starting others from it.
//!
//! Cloud Hypervisor writes three files: what the machine was made of (`config.json`, with the paths
//! of its sockets and disks), the state of its devices, and its memory. For another machine the
//! paths in the first are exchanged for its own; a snapshot of something else than what is wanted
//! is refused by our own record beside them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::core::abandon;
use super::super::error::{Doing, Error, Result};
use super::super::files::{fresh_dir, lend, length, take_over};
use super::super::process::text;
use super::super::spec::{Channel, Range, VmSpec};
use super::super::{Feature, Vm, Vmm};
use super::machine::Machine;
use super::{CloudHypervisor, api};

const RECORD: (&str, u32) = ("cloud-hypervisor snapshot", 1);
const DESCRIPTION: &str = "kuasar.json";
const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";
/// Largest `config.json` or `state.json` that is read.
const MAX_JSON: u64 = 16 << 20;

/// What was saved.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    vmm_version: String,
    cpus: Range,
    memory_mib: Range,
    fixed: Vec<String>,
    /// Bytes of the memory file.
    length: u64,
}

pub(super) async fn save(machine: &Machine, dir: &Path) -> Result<()> {
    let _turn = machine.core.change.lock().await;
    machine.core.alive()?;
    let (state, own) = machine.core.locked().clone();
    let hindrance = match own.plugged.len() {
        _ if own.shares => Some("a virtiofs share".to_owned()),
        0 => None,
        n => Some(format!("{n} plugged devices")),
    };
    if let Some(hindrance) = hindrance {
        return Err(Error::Unsupported {
            vmm: machine.name(),
            what: format!("save a machine with {hindrance}"),
            way_out: machine.way_out(Feature::Snapshot).into(),
        });
    }
    let version = machine.http.get::<api::Ping>("/vmm.ping").await?.version;
    machine.http.order("/vm.pause").await?;
    // Where the VMM may write.
    let own_dir = state.dir.join("w/saved");
    fresh_dir(&own_dir, own.owner())?;
    let url = api::Snapshot { destination_url: format!("file://{}", text(&own_dir)?) };
    let limit = machine.config.snapshot_timeout();
    let saved = machine.http.within(limit).put("/vm.snapshot", &url).await;
    let saved = saved.and_then(|()| {
        for name in [CONFIG, STATE, MEMORY] {
            take_over(&own_dir.join(name), &dir.join(name))?;
        }
        let memory = dir.join(MEMORY);
        let length = length(&memory)?;
        let description = Description {
            vmm_version: version,
            cpus: state.cpus,
            memory_mib: state.memory_mib,
            fixed: own.fixed,
            length,
        };
        let (kind, version) = RECORD;
        kuasar_host::record::write(&dir.join(DESCRIPTION), kind, version, &description)?;
        Ok(())
    });
    let _ = fs::remove_dir_all(&own_dir);
    saved
}

/// Reads a file of bounded size.
fn read(path: &Path) -> Result<Vec<u8>> {
    if length(path)? > MAX_JSON {
        return Err(Error::State(format!("{} is not part of a snapshot", path.display())));
    }
    fs::read(path).doing(|| format!("read {}", path.display()))
}

/// The machine's description in the snapshot, with the paths of another machine.
fn exchange(config: &mut Value, spec: &VmSpec) -> Result<()> {
    let bad = || Error::State("the snapshot's description is not one of ours".into());
    let map = config.as_object_mut().ok_or_else(bad)?;
    match (map.get_mut("vsock").and_then(Value::as_object_mut), &spec.channel) {
        (Some(vsock), Channel::HybridVsock { cid, uds }) => {
            if vsock.get("cid").and_then(Value::as_u64) != Some(u64::from(*cid)) {
                return Err(Error::State(format!(
                    "the snapshot's guest has another vsock context id than {cid}"
                )));
            }
            vsock.insert("socket".into(), text(uds)?.into());
        }
        (None, Channel::None) => {}
        _ => return Err(Error::State("the snapshot has another channel".into())),
    }
    Ok(())
}

pub(super) async fn restore(
    vmm: &CloudHypervisor,
    spec: &VmSpec,
    dir: &Path,
) -> Result<Arc<dyn Vm>> {
    let (kind, version) = RECORD;
    let was: Description = kuasar_host::record::read(&dir.join(DESCRIPTION), kind, version)?;
    if was.cpus != spec.cpus || was.memory_mib != spec.memory_mib {
        return Err(Error::State("the snapshot is of a machine of another size".into()));
    }
    let memory = dir.join(MEMORY);
    let length = length(&memory)?;
    if length != was.length {
        return Err(Error::State(format!(
            "{} is torn: {length} bytes of {}",
            memory.display(),
            was.length
        )));
    }
    // A share's process is another's; disks and NICs that the snapshot lacks come afterwards.
    if !spec.shares.is_empty() {
        return Err(Error::Unsupported {
            vmm: vmm.name(),
            what: "restore a machine with shares".into(),
            way_out: "start it without a snapshot".into(),
        });
    }
    let there = |id: &String| was.fixed.contains(id);
    if was.fixed.iter().any(|id| !spec.nics.iter().any(|nic| &nic.id == id)) {
        return Err(Error::Unsupported {
            vmm: vmm.name(),
            what: "restore a machine that had disks from its boot".into(),
            way_out: "plug disks in after the restore".into(),
        });
    }
    let mut config: Value = serde_json::from_slice(&read(&dir.join(CONFIG))?)
        .map_err(|error| Error::State(format!("{CONFIG}: {error}")))?;
    exchange(&mut config, spec)?;
    let devices = read(&dir.join(STATE))?;
    lend(&memory, vmm.launcher.owner())?;
    // What it has when it starts.
    let mut base = spec.clone();
    base.disks.clear();
    base.nics.retain(|nic| there(&nic.id));
    let served = vmm.serve(&base, std::slice::from_ref(&memory)).await?;
    let own_dir = spec.dir.join("w/saved");
    let prepare = || -> Result<()> {
        let owner = vmm.launcher.owner();
        fresh_dir(&own_dir, owner)?;
        for (name, content) in [(CONFIG, config.to_string().as_bytes()), (STATE, &devices)] {
            let path = own_dir.join(name);
            fs::write(&path, content).doing(|| format!("write {}", path.display()))?;
            lend(&path, owner)?;
        }
        std::os::unix::fs::symlink(&memory, own_dir.join(MEMORY)).doing(|| "link a snapshot")?;
        Ok(())
    };
    let machine = vmm
        .make(&base, served, async |served| {
            prepare()?;
            let nics = &base.nics;
            let net_fds = nics
                .iter()
                .map(|nic| api::RestoredNet { id: nic.id.clone(), num_fds: nic.tap.len() })
                .collect();
            let fds = nics.iter().flat_map(|nic| nic.tap.iter().cloned()).collect();
            let source_url = format!("file://{}", text(&own_dir)?);
            let limit = vmm.config.snapshot_timeout();
            let restore = api::Restore { source_url, net_fds };
            served.http.within(limit).put_with("/vm.restore", &restore, fds).await?;
            served.http.order("/vm.resume").await
        })
        .await?;
    let _ = fs::remove_dir_all(&own_dir);
    let more = async {
        for disk in &spec.disks {
            machine.attach_disk(disk).await?;
        }
        for nic in spec.nics.iter().filter(|nic| !there(&nic.id)) {
            machine.attach_nic(nic).await?;
        }
        Ok(())
    };
    match more.await {
        Ok(()) => Ok(Arc::new(machine)),
        Err(error) => Err(abandon(&machine, error).await),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_machines_sockets_take_the_place_of_the_saved_ones() {
        let mut config = serde_json::json!({ "vsock": { "cid": 3, "socket": "/old" }, "cpus": {} });
        let spec = crate::vmm::spec::tests::spec();
        exchange(&mut config, &spec).unwrap();
        let Channel::HybridVsock { uds, .. } = &spec.channel else { panic!() };
        assert_eq!(config["vsock"]["socket"], uds.to_str().unwrap());
        config["vsock"]["cid"] = 4.into();
        assert!(matches!(exchange(&mut config, &spec), Err(Error::State(_))));
        assert!(matches!(exchange(&mut Value::Null, &spec), Err(Error::State(_))));
    }
}
