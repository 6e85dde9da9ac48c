//! Saving and restoring: QEMU's migration into a file, which reaches it as a descriptor.
//!
//! A vhost-user device (vsock beside QEMU, virtiofs) keeps state outside QEMU, which refuses to
//! save it. So a machine is saved without them, its agent on the serial channel; what a restored
//! one needs besides (share, vsock, NICs, disks) is plugged in afterwards, on machine types that
//! can. On a microvm a snapshot and a share exclude each other.
//!
//! Beside the state stands a description of the machine, because QEMU wants to be started again
//! exactly as it was. It holds the length of the state, too: a torn file is found before QEMU
//! runs. That the bytes are the right ones is for whoever keeps templates to know, by digest.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use qapi::qmp::{self as commands, Event as QmpEvent, MigrationStatus};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::super::core::abandon;
use super::super::error::{Doing, Error, Result};
use super::super::qmp::Qmp;
use super::super::spec::{Channel, Range, ShareKind, VmSpec};
use super::super::{Feature, Kind, Vm, Vmm};
use super::config::Machine as MachineType;
use super::machine::Machine;
use super::{Qemu, Served, argv};

/// The guest's memory and the devices' state, in QEMU's format.
const STATE: &str = "state";
/// [`Description`].
const DESCRIPTION: &str = "machine";
/// Kind of the description's record, and its version.
const RECORD: (&str, u32) = ("qemu-snapshot", 1);
/// Descriptor set of the state file; plugged disks have lower ones.
const FDSET: i64 = 2000;

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    machine: MachineType,
    balloon: bool,
    root_ports: u8,
    cpus: Range,
    memory_mib: Range,
    serial: bool,
    /// Disks and NICs that it had.
    fixed: Vec<String>,
    /// Bytes of the state.
    length: u64,
    /// Whether each page has its own place in the file.
    #[serde(default)]
    mapped: bool,
}

async fn enable(qmp: &Qmp, capability: &str) -> Result<()> {
    let on = json!({ "capabilities": [{ "capability": capability, "state": true }] });
    qmp.call("migrate-set-capabilities", on, None).await.map(drop)
}

/// Runs `command`, which starts a migration, and waits for its end.
async fn migrate(qmp: &Qmp, command: &str, file: &File, limit: Duration) -> Result<()> {
    enable(qmp, "events").await?;
    // The guest stands still: nothing is gained by going easy on the disk.
    qmp.call("migrate-set-parameters", json!({ "max-bandwidth": 0 }), None).await?;
    let mut events = qmp.events();
    let set = commands::add_fd { fdset_id: Some(FDSET), opaque: None };
    qmp.execute_with(&set, Some(file.as_fd())).await?;
    let uri = format!("file:/dev/fdset/{FDSET}");
    let done = async {
        qmp.call(command, json!({ "uri": uri }), None).await?;
        loop {
            let status = match events.recv().await {
                Ok(QmpEvent::MIGRATION { data, .. }) => data.status,
                Ok(_) | Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return Err(Error::Gone),
            };
            match status {
                MigrationStatus::completed => return Ok(()),
                MigrationStatus::failed | MigrationStatus::cancelled => {
                    let why = qmp.call("query-migrate", json!({}), None).await?;
                    let why = why.get("error-desc").and_then(|text| text.as_str());
                    return Err(Error::Refused {
                        vmm: Kind::Qemu,
                        command: command.into(),
                        reason: why.unwrap_or("no reason given").chars().take(400).collect(),
                    });
                }
                _ => {}
            }
        }
    };
    let done = tokio::time::timeout(limit, done).await.unwrap_or_else(|_| {
        Err(Error::Deadline { what: format!("the end of qemu's {command}"), limit })
    });
    // When QEMU is gone there is no set either.
    let _ = qmp.call("remove-fd", json!({ "fdset-id": FDSET }), None).await;
    done
}

pub(super) async fn save(machine: &Machine, dir: &Path) -> Result<()> {
    let _turn = machine.core.change.lock().await;
    let (state, private) = machine.core.locked().clone();
    let hindrance = match private.slots.len() {
        0 => private.unsaveable.clone(),
        n => Some(format!("{n} plugged devices")),
    };
    if let Some(hindrance) = hindrance {
        return Err(Error::Unsupported {
            vmm: machine.name(),
            what: format!("save a machine with {hindrance}"),
            way_out: machine.way_out(Feature::Snapshot).into(),
        });
    }
    let qmp = machine.qmp()?;
    qmp.execute(&commands::stop {}).await?;
    let path = dir.join(STATE);
    let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.doing(|| format!("make {}", path.display()))?;
    let saved = async {
        let limit = Duration::from_millis(machine.config.snapshot_timeout_ms);
        // Pages are read straight to where they belong then; the file has holes. Since QEMU 9.0.
        let mapped = match enable(qmp, "mapped-ram").await {
            Ok(()) => true,
            Err(Error::Refused { .. }) => false,
            Err(error) => return Err(error),
        };
        migrate(qmp, "migrate", &file, limit).await?;
        let length = file.metadata().doing(|| "look at the snapshot")?.len();
        let description = Description {
            machine: private.machine,
            balloon: private.balloon,
            root_ports: private.slots.ports(),
            cpus: state.cpus,
            memory_mib: state.memory_mib,
            serial: private.serial,
            fixed: private.fixed,
            length,
            mapped,
        };
        let (kind, version) = RECORD;
        kuasar_host::record::write(&dir.join(DESCRIPTION), kind, version, &description)?;
        Ok(())
    };
    let saved = saved.await;
    if saved.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    saved
}

/// What of `spec` the machine has when it starts, and is it one that fits?
fn base(qemu: &Qemu, spec: &VmSpec, was: &Description) -> Result<VmSpec> {
    let config = &qemu.config;
    let ports = if config.machine.pci() { config.root_ports } else { 0 };
    let fits = was.machine == config.machine
        && was.balloon == config.balloon
        && was.root_ports == ports
        && was.cpus == spec.cpus
        && was.memory_mib == spec.memory_mib;
    if !fits {
        return Err(Error::State(
            "the snapshot is of a machine of another kind or size, or of another configuration"
                .into(),
        ));
    }
    let mut base = spec.clone();
    let there = |id: &String| was.fixed.contains(id);
    base.disks.retain(|disk| there(&disk.id));
    base.nics.retain(|nic| there(&nic.id));
    if base.disks.len() + base.nics.len() < was.fixed.len() {
        return Err(Error::State(format!(
            "the snapshot has the devices {}, and not all of them are in the machine's description",
            was.fixed.join(", ")
        )));
    }
    base.shares.clear();
    base.channel = match (&spec.channel, was.serial) {
        (Channel::Serial { console: true, .. }, _) => {
            return Err(Error::State("the snapshot has a port and no console".into()));
        }
        (Channel::Serial { .. }, true) => spec.channel.clone(),
        (Channel::Serial { .. }, false) => {
            return Err(Error::State("the snapshot has no serial channel".into()));
        }
        (_, true) => {
            let socket = spec.dir.join("serial.sock");
            Channel::Serial { socket, console: false, uds: None }
        }
        (_, false) => Channel::None,
    };
    let ninep = spec.shares.iter().any(|share| share.kind == ShareKind::Ninep);
    let more = !spec.shares.is_empty()
        || matches!(spec.channel, Channel::HybridVsock { .. } | Channel::KernelVsock { .. })
        || base.disks.len() < spec.disks.len()
        || base.nics.len() < spec.nics.len();
    let unsupported = |what: &str, way_out: &str| Error::Unsupported {
        vmm: qemu.name(),
        what: what.into(),
        way_out: way_out.into(),
    };
    if ninep || matches!(spec.channel, Channel::KernelVsock { .. }) {
        return Err(unsupported(
            "restore a machine with 9p or the kernel's vsock",
            "use virtiofs, and vhost-device-vsock or the serial channel",
        ));
    }
    if more && !config.machine.pci() {
        return Err(unsupported(
            "plug in what the snapshot does not have",
            "use machine q35, or start without a snapshot",
        ));
    }
    Ok(base)
}

pub(super) async fn restore(qemu: &Qemu, spec: &VmSpec, dir: &Path) -> Result<Arc<dyn Vm>> {
    qemu.check(spec)?;
    let (kind, version) = RECORD;
    let was: Description = kuasar_host::record::read(&dir.join(DESCRIPTION), kind, version)?;
    let path = dir.join(STATE);
    let file = File::open(&path).doing(|| format!("open {}", path.display()))?;
    let length = file.metadata().doing(|| format!("look at {}", path.display()))?.len();
    if length != was.length {
        return Err(Error::State(format!(
            "{} is torn: {length} bytes of {}",
            path.display(),
            was.length
        )));
    }
    let base = base(qemu, spec, &was)?;
    // QEMU reads its state while the helpers start.
    let loaded = async {
        let vm = qemu.start(&base, true).await?;
        match load(&vm, &file, was.mapped).await {
            Ok(()) => Ok(vm),
            Err(error) => Err(abandon(&vm, error).await),
        }
    };
    let (vm, served) = futures::join!(loaded, qemu.serve(spec));
    let (vm, served) = match (vm, served) {
        (Ok(vm), Ok(served)) => (vm, served),
        (Ok(vm), Err(error)) => return Err(abandon(&vm, error).await),
        (Err(error), _) => return Err(error),
    };
    match take_over(&vm, spec, &base, served).await {
        Ok(()) => Ok(Arc::new(vm)),
        Err(error) => Err(abandon(&vm, error).await),
    }
}

/// Has QEMU read the state; the machine does not run yet.
async fn load(vm: &Machine, file: &File, mapped: bool) -> Result<()> {
    let limit = Duration::from_millis(vm.config.snapshot_timeout_ms);
    let qmp = vm.qmp()?;
    if mapped {
        enable(qmp, "mapped-ram").await?;
    }
    match migrate(qmp, "migrate-incoming", file, limit).await {
        // It ends when it cannot make sense of the state, and says why as it goes.
        Err(error @ (Error::Gone | Error::Refused { .. })) => {
            let exit = vm.core.process.wait_for(Duration::from_secs(1)).await?;
            Err(exit.map_or(error, |exit| vm.core.process.ended(exit)))
        }
        other => other,
    }
}

/// Lets the machine run, and plugs in what its snapshot does not have.
async fn take_over(vm: &Machine, spec: &VmSpec, base: &VmSpec, served: Served) -> Result<()> {
    let Served { mut started, shares, vsock } = served;
    std::mem::take(&mut started.processes)
        .into_iter()
        .for_each(|helper| vm.core.add_helper(helper));
    vm.qmp()?.execute(&commands::cont {}).await?;
    let machine = vm.config.machine;
    // The channel first: the agent dials while the guest finds the rest.
    if let Some(socket) = vsock {
        let device = |id: &str, chardev: &str| argv::vsock_device(machine, id, chardev);
        vm.plug_vhost_user("vsock", socket.as_fd(), device).await?;
        vm.core.locked().0.channel = spec.channel.clone();
    }
    for (n, (share, socket)) in spec.shares.iter().zip(&shares).enumerate() {
        let id = format!("fs{n}");
        let device = |id: &str, chardev: &str| argv::share_device(machine, &share.tag, id, chardev);
        vm.plug_vhost_user(&id, socket.as_fd(), device).await?;
    }
    let new = |id: &String| {
        !base.disks.iter().any(|disk| &disk.id == id) && !base.nics.iter().any(|nic| &nic.id == id)
    };
    for disk in spec.disks.iter().filter(|disk| new(&disk.id)) {
        vm.plug_disk(disk).await?;
    }
    for nic in spec.nics.iter().filter(|nic| new(&nic.id)) {
        vm.plug_nic(nic).await?;
    }
    Ok(())
}
