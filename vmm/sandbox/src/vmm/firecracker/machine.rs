//! One Firecracker.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::super::core::{Core, need_raw, settle, stays};
use super::super::disks::Disks;
use super::super::error::{Error, Result};
use super::super::http::Http;
use super::super::process::{Exit, Process, text};
use super::super::spec::{Disk, VmSpec, check_device_id};
use super::super::{Event, Feature, Features, Kind, Processes, Vm, VmState, console};
use super::slots::{self, Slots};
use super::{FirecrackerConfig, api, drive_id};

/// How often the balloon is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What only this driver understands of [`VmState`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Private {
    balloon: bool,
    /// The jailed VMM's user.
    pub owner: Option<(u32, u32)>,
    /// Disks from the boot, with the serial numbers that the guest reads: they stay for good.
    pub fixed: BTreeMap<String, String>,
    /// NICs from the boot.
    pub nics: Vec<String>,
    pub slots: Slots,
}

impl Private {
    pub fn new(config: &FirecrackerConfig, owner: Option<(u32, u32)>) -> Self {
        Self {
            balloon: config.balloon,
            owner,
            fixed: BTreeMap::new(),
            nics: Vec::new(),
            slots: Slots::new(config.disk_slots, config.read_only_disk_slots),
        }
    }
}

/// One Firecracker.
pub(super) struct Machine {
    pub config: Arc<FirecrackerConfig>,
    pub core: Core<Private>,
    pub http: Http,
    disks: Disks,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine(firecracker {})", self.core.process.pid())
    }
}

pub(super) fn features(balloon: bool, slots: bool) -> Features {
    use Feature::*;
    let mut all = Features::of(&[Pause, Snapshot, HybridVsock]);
    if balloon {
        all = all.with(MemoryResize).with(FreePageReporting);
    }
    if slots {
        all = all.with(DiskHotplug);
    }
    all
}

pub(super) fn way_out(feature: Feature) -> &'static str {
    match feature {
        Feature::DiskHotplug => "set disk_slots, or declare the disk before the start",
        Feature::NicHotplug => "declare the interface before the start, or use another VMM",
        Feature::CpuResize => "start with as many as will be needed: the guest's cgroups limit",
        Feature::MemoryResize | Feature::FreePageReporting => "set balloon = true",
        Feature::Virtiofs | Feature::Ninep => {
            "use a snapshotter of block devices (devmapper, blockfile, erofs), or another VMM"
        }
        Feature::Serial => "use its own vsock: a hybrid vsock channel",
        Feature::Snapshot => "take the snapshot before disks are there",
        _ => "choose another VMM in the configuration",
    }
}

impl Machine {
    pub fn new(
        config: Arc<FirecrackerConfig>,
        spec: &VmSpec,
        own: Private,
        process: Process,
        http: Http,
        disks: Disks,
    ) -> Self {
        let core = Core::new(Kind::Firecracker, spec, own, process, Vec::new());
        core.tell_of_end();
        Self { config, core, http, disks }
    }

    pub async fn reattach(
        config: Arc<FirecrackerConfig>,
        state: VmState,
        processes: &Arc<dyn Processes>,
    ) -> Result<Self> {
        let socket = state.dir.join("w/api.sock");
        let (dir, id, console) = (state.dir.clone(), state.id.clone(), state.console.clone());
        let core = Core::<Private>::take_up(Kind::Firecracker, state, processes)?;
        let http = Http::new(Kind::Firecracker, socket, "", config.timeout());
        let disks = Disks::of(&dir, core.locked().1.owner);
        let machine = Self { config, core, http, disks };
        if !machine.core.process.is_alive() {
            return Ok(machine);
        }
        match machine.correct().await {
            // It ended between the two looks.
            Err(Error::Gone) if !machine.core.process.is_alive() => return Ok(machine),
            other => other?,
        }
        console::resume(&**processes, &id, &console).await;
        machine.core.tell_of_end();
        Ok(machine)
    }

    /// Takes over what the VMM itself says of its drives.
    async fn correct(&self) -> Result<()> {
        let config: api::FullConfig = self.http.get("/vm/config").await?;
        let mut state = self.core.locked();
        for drive in config.drives {
            let path = drive.path_on_host.unwrap_or_default();
            let disk = self.disks.id_of(&path).map(|id| {
                let serial = slots::serial(&self.disks.path(id)).unwrap_or_default();
                (id.to_owned(), serial)
            });
            state.1.slots.correct(&drive.drive_id, disk);
        }
        Ok(())
    }

    async fn set(&self, state: &'static str, event: Event) -> Result<()> {
        self.core.alive()?;
        self.http.patch("/vm", &api::VmUpdate { state }).await?;
        // Nobody may be listening.
        let _ = self.core.events.send(event);
        Ok(())
    }
}

#[async_trait]
impl Vm for Machine {
    fn name(&self) -> String {
        Kind::Firecracker.to_string()
    }

    fn features(&self) -> Features {
        let state = self.core.locked();
        features(state.1.balloon, !state.1.slots.all().is_empty())
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
        // It has no order for that, and as process 1 of its jail it heeds no SIGTERM.
        let ask = async { Err(Error::Invalid("firecracker has no order to end".into())) };
        self.core.stop(grace, ask).await
    }

    async fn release(&self) {
        self.core.release(&[self.http.socket().to_owned()]).await;
        self.disks.release();
    }

    async fn ping(&self) -> Result<()> {
        self.core.alive()?;
        self.http.get::<api::Version>("/version").await.map(drop)
    }

    fn disk_serial(&self, id: &str) -> String {
        let state = self.core.locked();
        let own = &state.1;
        let serial = own.fixed.get(id).map(String::as_str).or_else(|| own.slots.serial(id));
        serial.unwrap_or(id).to_owned()
    }

    async fn attach_disk(&self, disk: &Disk) -> Result<()> {
        self.require(Feature::DiskHotplug)?;
        check_device_id(&disk.id)?;
        need_raw(self.name(), disk)?;
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        let drive = {
            let mut state = self.core.locked();
            if state.1.fixed.contains_key(&disk.id) {
                return Err(Error::DeviceExists(disk.id.clone()));
            }
            state.1.slots.take(&disk.id, disk.read_only)?
        };
        let plugged = async {
            let placed = self.disks.place(disk)?;
            let serial = slots::serial(&placed.path)?;
            let update = api::DriveUpdate { drive_id: &drive, path_on_host: text(&placed.path)? };
            self.http.patch(&format!("/drives/{drive}"), &update).await?;
            Ok(serial)
        };
        match plugged.await {
            Ok(serial) => {
                self.core.locked().1.slots.set_serial(&disk.id, serial);
                Ok(())
            }
            Err(error) => {
                self.disks.remove(&disk.id);
                self.core.locked().1.slots.free(&disk.id);
                Err(error)
            }
        }
    }

    async fn detach(&self, id: &str) -> Result<()> {
        self.require(Feature::DiskHotplug)?;
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        let drive = {
            let state = self.core.locked();
            if state.1.fixed.contains_key(id) || state.1.nics.iter().any(|nic| nic == id) {
                return Err(stays(id));
            }
            let slot = state.1.slots.find(id).ok_or_else(|| Error::NoDevice(id.into()))?;
            slot.drive.clone()
        };
        // The drive stays; it is empty from now on, whatever the guest still holds of it.
        let update = api::DriveUpdate { drive_id: &drive, path_on_host: slots::EMPTY.to_owned() };
        self.http.patch(&format!("/drives/{}", drive_id(&drive)), &update).await?;
        self.disks.remove(id);
        self.core.locked().1.slots.free(id);
        let _ = self.core.events.send(Event::Detached { id: id.to_owned() });
        Ok(())
    }

    async fn resize_memory(&self, mib: u32) -> Result<u32> {
        self.require(Feature::MemoryResize)?;
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        let most = self.core.locked().0.memory_mib.most;
        if mib == 0 || mib > most {
            return Err(Error::Invalid(format!("{mib} MiB: this machine has 1 to {most}")));
        }
        self.http.patch("/balloon", &api::BalloonUpdate { amount_mib: most - mib }).await?;
        let limits = (self.config.memory_still(), self.config.snapshot_timeout());
        settle(mib, LOOK, limits, || self.memory()).await
    }

    async fn memory(&self) -> Result<u32> {
        self.require(Feature::MemoryResize)?;
        let most = self.core.locked().0.memory_mib.most;
        let balloon: api::BalloonStatistics = self.http.get("/balloon/statistics").await?;
        Ok(most.saturating_sub(balloon.actual_mib))
    }

    async fn pause(&self) -> Result<()> {
        self.set("Paused", Event::Paused).await
    }

    async fn resume(&self) -> Result<()> {
        self.set("Resumed", Event::Resumed).await
    }

    async fn snapshot(&self, dir: &Path) -> Result<()> {
        super::snapshot::save(self, dir).await
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        way_out(feature)
    }
}
