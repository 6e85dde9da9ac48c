//! One StratoVirt.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use qapi::qmp::{self as commands, Event as QmpEvent};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::super::core::{Core, need_raw, settle, stays};
use super::super::disks::Disks;
use super::super::error::{Error, Result};
use super::super::files::{fresh_dir, length, take_over};
use super::super::process::{Exit, Process};
use super::super::qmp::Qmp;
use super::super::spec::{Channel, Disk, Range, Root, VmSpec, check_device_id};
use super::super::{Event, Feature, Features, Kind, Processes, Vm, VmState, console};
use super::{DISKS, StratoVirtConfig, monitor_of, qmp_text};

/// How often a migration or a balloon is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What only this driver understands of [`VmState`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Private {
    balloon: bool,
    owner: Option<(u32, u32)>,
    /// Ids of disks and NICs from the boot: they stay for good.
    fixed: Vec<String>,
    /// What is in each place for disks.
    places: Vec<Option<String>>,
    /// Something that cannot be saved, or nothing.
    unsaveable: Option<String>,
}

impl Private {
    pub fn new(spec: &VmSpec, balloon: bool, owner: Option<(u32, u32)>) -> Self {
        let root = matches!(spec.boot.root, Root::Image { .. }).then(|| "root".to_owned());
        let disks = spec.disks.iter().map(|disk| disk.id.clone());
        let mut places: Vec<_> = root.into_iter().chain(disks.clone()).map(Some).collect();
        places.resize(DISKS, None);
        let unsaveable = if !spec.shares.is_empty() {
            Some("a virtiofs share")
        } else if balloon {
            Some("a balloon")
        } else if matches!(spec.channel, Channel::KernelVsock { .. }) {
            Some("the kernel's vsock")
        } else {
            None
        };
        let fixed = disks.chain(spec.nics.iter().map(|nic| nic.id.clone())).collect();
        Self { balloon, owner, fixed, places, unsaveable: unsaveable.map(str::to_owned) }
    }
}

/// What was saved: a record of ours beside StratoVirt's two files.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Description {
    cpus: Range,
    memory_mib: Range,
    fixed: Vec<String>,
    serial: bool,
    /// Bytes of each of [`Description::FILES`].
    pub lengths: [u64; 2],
}

impl Description {
    pub const FILES: [&'static str; 2] = ["state", "memory"];
    const RECORD: (&'static str, u32) = ("stratovirt snapshot", 1);
    const NAME: &'static str = "kuasar.json";

    pub fn read(dir: &Path) -> Result<Self> {
        let (kind, version) = Self::RECORD;
        Ok(kuasar_host::record::read(&dir.join(Self::NAME), kind, version)?)
    }

    /// Whether a machine can start from it.
    pub fn fits(&self, spec: &VmSpec) -> Result<()> {
        let nics: Vec<&String> = spec.nics.iter().map(|nic| &nic.id).collect();
        let same = self.cpus == spec.cpus
            && self.memory_mib == spec.memory_mib
            && self.serial == matches!(spec.channel, Channel::Serial { .. })
            && self.fixed.iter().collect::<Vec<_>>() == nics;
        if same && spec.shares.is_empty() {
            return Ok(());
        }
        Err(Error::State(
            "the snapshot is of a machine of another size, or with other devices".into(),
        ))
    }
}

/// One StratoVirt.
pub(super) struct Machine {
    config: Arc<StratoVirtConfig>,
    core: Core<Private>,
    /// `None` when it had ended before it was taken up again.
    qmp: Option<Qmp>,
    disks: Disks,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine(stratovirt {})", self.core.process.pid())
    }
}

pub(super) fn features(balloon: bool) -> Features {
    use Feature::*;
    let all = Features::of(&[DiskHotplug, Pause, Virtiofs, Serial]);
    if balloon { all.with(MemoryResize).with(FreePageReporting) } else { all.with(Snapshot) }
}

pub(super) fn way_out(feature: Feature) -> &'static str {
    match feature {
        Feature::NicHotplug => "declare the interface before the start, or use another VMM",
        Feature::CpuResize => "start with as many as will be needed: the guest's cgroups limit",
        Feature::MemoryResize | Feature::FreePageReporting => "set balloon = true",
        Feature::Snapshot => {
            "set balloon = false, and use the serial channel and no shares until it is saved"
        }
        Feature::HybridVsock => "use the kernel's vsock or the serial channel",
        Feature::Ninep => "share directories by virtiofs",
        _ => "choose another VMM in the configuration",
    }
}

async fn translate(mut from: broadcast::Receiver<QmpEvent>, to: broadcast::Sender<Event>) {
    loop {
        let event = match from.recv().await {
            Ok(QmpEvent::SHUTDOWN { .. }) => Event::Shutdown { reason: "the guest".into() },
            Ok(QmpEvent::STOP { .. }) => Event::Paused,
            Ok(QmpEvent::RESUME { .. }) => Event::Resumed,
            Ok(QmpEvent::DEVICE_DELETED { data, .. }) => match data.device {
                Some(id) => Event::Detached { id },
                None => continue,
            },
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        // Nobody may be listening.
        let _ = to.send(event);
    }
}

impl Machine {
    pub fn new(
        config: Arc<StratoVirtConfig>,
        spec: &VmSpec,
        own: Private,
        process: Process,
        helpers: Vec<Process>,
        qmp: Qmp,
        disks: Disks,
    ) -> Self {
        let core = Core::new(Kind::StratoVirt, spec, own, process, helpers);
        core.keep(tokio::spawn(translate(qmp.events(), core.events.clone())));
        Self { config, core, qmp: Some(qmp), disks }
    }

    pub async fn reattach(
        config: Arc<StratoVirtConfig>,
        state: VmState,
        processes: &Arc<dyn Processes>,
    ) -> Result<Self> {
        let (dir, id, console) = (state.dir.clone(), state.id.clone(), state.console.clone());
        let core = Core::<Private>::take_up(Kind::StratoVirt, state, processes)?;
        let disks = Disks::of(&dir, core.locked().1.owner);
        let mut machine = Self { config, core, qmp: None, disks };
        if !machine.core.process.is_alive() {
            return Ok(machine);
        }
        let limit = machine.config.timeout();
        match Qmp::connect(Kind::StratoVirt, &monitor_of(&dir), limit).await {
            Ok(qmp) => {
                let translated = translate(qmp.events(), machine.core.events.clone());
                machine.core.keep(tokio::spawn(translated));
                console::resume(&**processes, &id, &console).await;
                machine.qmp = Some(qmp);
                Ok(machine)
            }
            // It ended between the two looks.
            Err(Error::Gone) if !machine.core.process.is_alive() => Ok(machine),
            Err(error) => Err(error),
        }
    }

    fn qmp(&self) -> Result<&Qmp> {
        self.qmp.as_ref().ok_or(Error::Gone)
    }

    /// Lets the balloon hold what is more than the memory at boot.
    pub async fn settle_memory(&self) -> Result<()> {
        let memory = self.core.locked().0.memory_mib;
        if memory.most > memory.at_boot {
            let value = i64::from(memory.at_boot) << 20;
            self.qmp()?.execute(&commands::balloon { value }).await?;
        }
        Ok(())
    }

    /// Lets a restored machine run.
    pub async fn go_on(&self) -> Result<()> {
        let qmp = self.qmp()?;
        if !qmp.execute(&commands::query_status {}).await?.running {
            qmp.execute(&commands::cont {}).await?;
        }
        Ok(())
    }

    /// Puts a disk at `path` into place `place`.
    async fn plug(&self, qmp: &Qmp, disk: &Disk, path: &Path, place: usize) -> Result<()> {
        let file = json!({ "driver": "file", "filename": qmp_text(path)? });
        let node = json!({
            "node-name": disk.id,
            "file": file,
            "read-only": disk.read_only,
            "cache": { "direct": false },
        });
        qmp.call("blockdev-add", node, None).await?;
        let device = json!({
            "id": disk.id,
            "driver": "virtio-blk-device",
            "drive": disk.id,
            "serial": disk.id,
            "addr": format!("{place:#x}"),
        });
        let plugged = qmp.call("device_add", device, None).await.map(drop);
        if plugged.is_err() {
            // Also what blockdev-add has made.
            let _ = qmp.execute(&commands::device_del { id: disk.id.clone() }).await;
        }
        plugged
    }
}

#[async_trait]
impl Vm for Machine {
    fn name(&self) -> String {
        "stratovirt microvm".into()
    }

    fn features(&self) -> Features {
        features(self.core.locked().1.balloon)
    }

    fn pid(&self) -> u32 {
        self.core.process.pid()
    }

    fn state(&self) -> VmState {
        self.core.vm_state()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.core.events.subscribe()
    }

    async fn wait(&self) -> Result<Exit> {
        self.core.process.wait().await
    }

    async fn stop(&self, grace: Duration) -> Result<Exit> {
        let ask = async { self.qmp()?.execute(&commands::quit {}).await.map(drop) };
        self.core.stop(grace, ask).await
    }

    async fn release(&self) {
        let dir = self.core.locked().0.dir.clone();
        self.core.release(&[monitor_of(&dir), dir.join("w/agent.sock")]).await;
        self.disks.release();
    }

    async fn ping(&self) -> Result<()> {
        self.core.alive()?;
        self.qmp()?.execute(&commands::query_status {}).await.map(drop)
    }

    async fn attach_disk(&self, disk: &Disk) -> Result<()> {
        self.require(Feature::DiskHotplug)?;
        check_device_id(&disk.id)?;
        need_raw(self.name(), disk)?;
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        let free: Vec<usize> = {
            let state = self.core.locked();
            let own = &state.1;
            if own.fixed.contains(&disk.id) || own.places.iter().flatten().any(|id| id == &disk.id)
            {
                return Err(Error::DeviceExists(disk.id.clone()));
            }
            let places = own.places.iter().enumerate();
            places.filter(|(_, id)| id.is_none()).map(|(n, _)| n).collect()
        };
        let placed = self.disks.place(disk)?;
        let mut failed =
            Error::Exhausted(format!("a stratovirt microvm has places for {DISKS} disks"));
        for place in free {
            match self.plug(qmp, disk, &placed.path, place).await {
                Ok(()) => {
                    if let Some(free) = self.core.locked().1.places.get_mut(place) {
                        *free = Some(disk.id.clone());
                    }
                    return Ok(());
                }
                // A daemon was killed between a plug and its record.
                Err(Error::Refused { reason, .. }) if reason.contains("occupied") => {}
                Err(Error::Refused { reason, .. }) if reason.contains("already registered") => {
                    failed = Error::DeviceExists(disk.id.clone());
                    break;
                }
                Err(error) => {
                    failed = error;
                    break;
                }
            }
        }
        self.disks.remove(&disk.id);
        Err(failed)
    }

    async fn detach(&self, id: &str) -> Result<()> {
        self.require(Feature::DiskHotplug)?;
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        {
            let state = self.core.locked();
            if id == "root" || state.1.fixed.iter().any(|fixed| fixed == id) {
                return Err(stays(id));
            }
        }
        match qmp.execute(&commands::device_del { id: id.to_owned() }).await {
            Ok(_) => {}
            Err(Error::Refused { reason, .. }) if reason.contains("not found") => {
                let mut state = self.core.locked();
                let there = state.1.places.iter_mut().find(|place| place.as_deref() == Some(id));
                return match there {
                    Some(place) => {
                        *place = None;
                        Ok(())
                    }
                    None => Err(Error::NoDevice(id.into())),
                };
            }
            Err(error) => return Err(error),
        }
        self.disks.remove(id);
        let mut state = self.core.locked();
        for place in state.1.places.iter_mut().filter(|place| place.as_deref() == Some(id)) {
            *place = None;
        }
        Ok(())
    }

    async fn resize_memory(&self, mib: u32) -> Result<u32> {
        self.require(Feature::MemoryResize)?;
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        let most = self.core.locked().0.memory_mib.most;
        if mib == 0 || mib > most {
            return Err(Error::Invalid(format!("{mib} MiB: this machine has 1 to {most}")));
        }
        qmp.execute(&commands::balloon { value: i64::from(mib) << 20 }).await?;
        let limits = (self.config.memory_still(), self.config.snapshot_timeout());
        settle(mib, LOOK, limits, || self.memory()).await
    }

    async fn memory(&self) -> Result<u32> {
        self.require(Feature::MemoryResize)?;
        let actual = self.qmp()?.execute(&commands::query_balloon {}).await?.actual >> 20;
        Ok(u32::try_from(actual).unwrap_or(u32::MAX))
    }

    async fn pause(&self) -> Result<()> {
        self.qmp()?.execute(&commands::stop {}).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        self.qmp()?.execute(&commands::cont {}).await.map(drop)
    }

    async fn snapshot(&self, dir: &Path) -> Result<()> {
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        let (state, own) = self.core.locked().clone();
        let disks = own.places.iter().flatten().filter(|id| *id != "root").count();
        let hindrance = match (own.unsaveable, disks) {
            (Some(what), _) => Some(what),
            (None, 0) => None,
            (None, n) => Some(format!("{n} disks")),
        };
        if let Some(hindrance) = hindrance {
            return Err(Error::Unsupported {
                vmm: self.name(),
                what: format!("save a machine with {hindrance}"),
                way_out: self.way_out(Feature::Snapshot).into(),
            });
        }
        qmp.execute(&commands::stop {}).await?;
        let saved = state.dir.join("w/saved");
        fresh_dir(&saved, own.owner)?;
        let uri = format!("file:{}", qmp_text(&saved)?);
        let limit = self.config.snapshot_timeout();
        let written = async {
            qmp.call("migrate", json!({ "uri": uri }), None).await?;
            let until = Instant::now() + limit;
            loop {
                let answer = qmp.call("query-migrate", json!({}), None).await?;
                match answer.get("status").and_then(serde_json::Value::as_str) {
                    Some(status) if status.eq_ignore_ascii_case("completed") => return Ok(()),
                    Some(status) if status.eq_ignore_ascii_case("failed") => {
                        return Err(Error::Refused {
                            vmm: Kind::StratoVirt,
                            command: "migrate".into(),
                            reason: "the snapshot failed".into(),
                        });
                    }
                    _ if Instant::now() >= until => {
                        return Err(Error::Deadline { what: "the snapshot".into(), limit });
                    }
                    _ => tokio::time::sleep(LOOK).await,
                }
            }
        };
        let written = written.await.and_then(|()| {
            let mut lengths = [0; 2];
            for (name, bytes) in Description::FILES.iter().zip(&mut lengths) {
                take_over(&saved.join(name), &dir.join(name))?;
                *bytes = length(&dir.join(name))?;
            }
            let description = Description {
                cpus: state.cpus,
                memory_mib: state.memory_mib,
                fixed: own.fixed,
                serial: matches!(state.channel, Channel::Serial { .. }),
                lengths,
            };
            let (kind, version) = Description::RECORD;
            let path = dir.join(Description::NAME);
            Ok(kuasar_host::record::write(&path, kind, version, &description)?)
        });
        let _ = std::fs::remove_dir_all(&saved);
        written
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        way_out(feature)
    }
}
