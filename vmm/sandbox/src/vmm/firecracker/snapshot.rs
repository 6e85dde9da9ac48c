//! Saving a machine and starting others from it.
//!
//! Two files: the devices' state and the memory, which a restored machine maps and reads as it
//! needs it: so the file must stay, unchanged, as long as any of them runs. Paths are part of the
//! state; those of sockets and taps can be exchanged when it is loaded, those of drives not: a
//! machine with disks beside its root is not saved, and empty drives have a path that is the same
//! everywhere.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::super::core::abandon;
use super::super::error::{Error, Result};
use super::super::files::{lend, length, take_over};
use super::super::process::text;
use super::super::spec::{Channel, Range, Root, VmSpec};
use super::super::{Feature, Vm};
use super::machine::{Machine, Private};
use super::slots::Slots;
use super::{Firecracker, api, tap_name};

const RECORD: (&str, u32) = ("firecracker snapshot", 1);
const DESCRIPTION: &str = "kuasar.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// What was saved.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    vmm_version: String,
    cpus: Range,
    memory_mib: Range,
    nics: Vec<String>,
    slots: Slots,
    /// Context id of the guest, when it has a vsock.
    cid: Option<u32>,
    /// Bytes of the two files.
    lengths: (u64, u64),
}

fn cid(channel: &Channel) -> Option<u32> {
    match channel {
        Channel::HybridVsock { cid, .. } => Some(*cid),
        _ => None,
    }
}

pub(super) async fn save(machine: &Machine, dir: &Path) -> Result<()> {
    let _turn = machine.core.change.lock().await;
    machine.core.alive()?;
    let (state, own) = machine.core.locked().clone();
    let plugged = own.slots.all().iter().filter(|slot| slot.disk.is_some()).count();
    if plugged + own.fixed.len() > 0 {
        return Err(Error::Unsupported {
            vmm: machine.name(),
            what: format!("save a machine with {} disks", plugged + own.fixed.len()),
            way_out: machine.way_out(Feature::Snapshot).into(),
        });
    }
    let version: api::Version = machine.http.get("/version").await?;
    machine.pause().await?;
    // Where the VMM may write.
    let work = state.dir.join("w");
    let (from_state, from_memory) = (work.join("saved-state"), work.join("saved-memory"));
    for stale in [&from_state, &from_memory] {
        super::super::core::remove(stale);
    }
    let create = api::SnapshotCreate {
        snapshot_type: "Full",
        snapshot_path: text(&from_state)?,
        mem_file_path: text(&from_memory)?,
    };
    let limit = machine.config.snapshot_timeout();
    let saved = machine.http.within(limit).put("/snapshot/create", &create).await;
    let saved = saved.and_then(|()| {
        let (state_file, memory_file) = (dir.join(STATE), dir.join(MEMORY));
        take_over(&from_state, &state_file)?;
        take_over(&from_memory, &memory_file)?;
        let description = Description {
            vmm_version: version.firecracker_version,
            cpus: state.cpus,
            memory_mib: state.memory_mib,
            nics: own.nics,
            slots: own.slots,
            cid: cid(&state.channel),
            lengths: (length(&state_file)?, length(&memory_file)?),
        };
        let (kind, version) = RECORD;
        kuasar_host::record::write(&dir.join(DESCRIPTION), kind, version, &description)?;
        Ok(())
    });
    if saved.is_err() {
        for left in [&from_state, &from_memory] {
            super::super::core::remove(left);
        }
    }
    saved
}

fn fits(spec: &VmSpec, was: &Description) -> Result<()> {
    if was.cpus != spec.cpus || was.memory_mib != spec.memory_mib {
        return Err(Error::State("the snapshot is of a machine of another size".into()));
    }
    if was.cid != cid(&spec.channel) {
        return Err(Error::State(
            "the snapshot's guest has another vsock context id, or none".into(),
        ));
    }
    let nics: Vec<&String> = spec.nics.iter().map(|nic| &nic.id).collect();
    if was.nics.iter().collect::<Vec<_>>() != nics {
        return Err(Error::State(format!(
            "the snapshot has the interfaces {:?}, and the machine wants {nics:?}",
            was.nics
        )));
    }
    Ok(())
}

pub(super) async fn restore(vmm: &Firecracker, spec: &VmSpec, dir: &Path) -> Result<Arc<dyn Vm>> {
    let (kind, version) = RECORD;
    let was: Description = kuasar_host::record::read(&dir.join(DESCRIPTION), kind, version)?;
    fits(spec, &was)?;
    let files = [dir.join(STATE), dir.join(MEMORY)];
    let [state, memory] = &files;
    if (length(state)?, length(memory)?) != was.lengths {
        return Err(Error::State(format!("{} is torn", dir.display())));
    }
    for path in &files {
        lend(path, vmm.launcher.owner())?;
    }
    let mut base = spec.clone();
    base.disks.clear();
    if let Root::Image { disk, .. } = &spec.boot.root {
        tracing::debug!(root = %disk.path.display(), "the root's path is the snapshot's");
    }
    let served = vmm.serve(&base, &files).await?;
    let machine = vmm
        .make(&base, served, async |served| {
            let version: api::Version = served.http.get("/version").await?;
            if version.firecracker_version != was.vmm_version {
                return Err(Error::State(format!(
                    "the snapshot is of firecracker {}, and this is {}",
                    was.vmm_version, version.firecracker_version
                )));
            }
            let mut network_overrides = Vec::new();
            for nic in &base.nics {
                let host_dev_name = tap_name(nic)?.to_owned();
                network_overrides
                    .push(api::NetworkOverride { iface_id: nic.id.clone(), host_dev_name });
            }
            let vsock_override = match &base.channel {
                Channel::HybridVsock { uds, .. } => {
                    Some(api::VsockOverride { uds_path: text(uds)? })
                }
                _ => None,
            };
            let load = api::SnapshotLoad {
                snapshot_path: text(state)?,
                mem_backend: api::MemoryBackend {
                    backend_type: "File",
                    backend_path: text(memory)?,
                },
                resume_vm: true,
                network_overrides,
                vsock_override,
            };
            let limit = vmm.config.snapshot_timeout();
            served.http.within(limit).put("/snapshot/load", &load).await?;
            let mut own = Private::new(&vmm.config, vmm.launcher.owner());
            own.nics.clone_from(&was.nics);
            own.slots = was.slots.clone();
            Ok(own)
        })
        .await?;
    for disk in &spec.disks {
        if let Err(error) = machine.attach_disk(disk).await {
            return Err(abandon(&machine, error).await);
        }
    }
    Ok(Arc::new(machine))
}
