//! One Cloud Hypervisor.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::super::core::{Core, EVENT_PIPE, settle, stays};
use super::super::disks::Disks;
use super::super::error::{Error, Result};
use super::super::http::Http;
use super::super::process::{Exit, Process};
use super::super::spec::{Disk, Nic, VmSpec, check_device_id};
use super::super::{Event, Feature, Features, Kind, Processes, Vm, VmState, console};
use super::{CloudHypervisorConfig, add_nic, api, disk_config, monitor};

/// How often a machine is looked at while its guest lets go of a device or gives memory back.
const LOOK: Duration = Duration::from_millis(50);

/// What only this driver understands of [`VmState`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Private {
    balloon: bool,
    /// The jailed VMM's user.
    owner: Option<(u32, u32)>,
    /// Ids of disks and NICs from the boot: they stay for good.
    pub fixed: Vec<String>,
    /// Those that were plugged in.
    pub plugged: BTreeSet<String>,
    /// It has devices that processes beside the VMM serve.
    pub shares: bool,
}

impl Private {
    pub fn owner(&self) -> Option<(u32, u32)> {
        self.owner
    }

    pub fn of(spec: &VmSpec, balloon: bool, owner: Option<(u32, u32)>) -> Self {
        let disks = spec.disks.iter().map(|disk| disk.id.clone());
        let fixed = disks.chain(spec.nics.iter().map(|nic| nic.id.clone())).collect();
        let shares = !spec.shares.is_empty();
        Self { balloon, owner, fixed, plugged: BTreeSet::new(), shares }
    }
}

/// One Cloud Hypervisor.
pub(super) struct Machine {
    pub config: Arc<CloudHypervisorConfig>,
    pub core: Core<Private>,
    pub http: Http,
    pub disks: Disks,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine(cloud-hypervisor {})", self.core.process.pid())
    }
}

pub(super) fn features(balloon: bool) -> Features {
    use Feature::*;
    let all = Features::of(&[
        DiskHotplug,
        NicHotplug,
        CpuResize,
        MemoryResize,
        Pause,
        Snapshot,
        Virtiofs,
        HybridVsock,
    ]);
    if balloon { all.with(FreePageReporting) } else { all }
}

pub(super) fn way_out(feature: Feature) -> &'static str {
    match feature {
        Feature::FreePageReporting => "set balloon = true",
        Feature::Ninep => "share directories by virtiofs",
        Feature::Serial => "use its own vsock: a hybrid vsock channel",
        Feature::Snapshot => "take the snapshot of a machine without shares",
        _ => "choose another VMM in the configuration",
    }
}

impl Machine {
    pub fn new(
        config: Arc<CloudHypervisorConfig>,
        spec: &VmSpec,
        own: Private,
        process: Process,
        helpers: Vec<Process>,
        http: Http,
        disks: Disks,
    ) -> Self {
        let core = Core::new(Kind::CloudHypervisor, spec, own, process, helpers);
        Self { config, core, http, disks }
    }

    /// Reads the VMM's events from now on.
    pub fn follow(&self, events: OwnedFd) -> Result<()> {
        let (process, tell) = (self.core.process.clone(), self.core.events.clone());
        self.core.keep(monitor::follow(events, self.http.clone(), process, tell)?);
        Ok(())
    }

    pub async fn reattach(
        config: Arc<CloudHypervisorConfig>,
        state: VmState,
        processes: &Arc<dyn Processes>,
    ) -> Result<Self> {
        let (socket, dir, id) = (state.dir.join("api.sock"), state.dir.clone(), state.id.clone());
        let console = state.console.clone();
        let core = Core::<Private>::take_up(Kind::CloudHypervisor, state, processes)?;
        let http = Http::new(Kind::CloudHypervisor, socket, api::PREFIX, config.timeout());
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
        match processes.fetch(&format!("{id}/{EVENT_PIPE}")).await? {
            Some(events) => machine.follow(events)?,
            None => tracing::warn!(id, "the pipe of events was not kept: none from now on"),
        }
        Ok(machine)
    }

    /// Takes over what the VMM itself says of its devices.
    async fn correct(&self) -> Result<()> {
        let info: api::Info = self.http.get("/vm.info").await?;
        let named = info.config.disks.into_iter().chain(info.config.net).flatten();
        let there: BTreeSet<String> = named.filter_map(|device| device.id).collect();
        let mut state = self.core.locked();
        let own = &mut state.1;
        let gone: Vec<_> = own.plugged.difference(&there).cloned().collect();
        for id in gone {
            tracing::info!(device = id, "is not in the machine any more");
            own.plugged.remove(&id);
        }
        for id in there {
            if check_device_id(&id).is_ok() && id != "root" && !own.fixed.contains(&id) {
                own.plugged.insert(id);
            }
        }
        Ok(())
    }

    fn take(&self, id: &str) -> Result<()> {
        check_device_id(id)?;
        let mut state = self.core.locked();
        if id == "root" || state.1.fixed.iter().any(|fixed| fixed == id) {
            return Err(Error::DeviceExists(id.into()));
        }
        if state.1.plugged.insert(id.to_owned()) {
            Ok(())
        } else {
            Err(Error::DeviceExists(id.into()))
        }
    }

    fn forget(&self, id: &str) {
        self.core.locked().1.plugged.remove(id);
    }
}

#[async_trait]
impl Vm for Machine {
    fn name(&self) -> String {
        Kind::CloudHypervisor.to_string()
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
        self.core.stop(grace, self.http.order("/vmm.shutdown")).await
    }

    async fn release(&self) {
        self.core.release(&[self.http.socket().to_owned()]).await;
        self.disks.release();
    }

    async fn ping(&self) -> Result<()> {
        self.core.alive()?;
        self.http.get::<api::Ping>("/vmm.ping").await.map(drop)
    }

    async fn attach_disk(&self, disk: &Disk) -> Result<()> {
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        self.take(&disk.id)?;
        let plugged = async {
            let placed = self.disks.place(disk)?;
            self.http.put("/vm.add-disk", &disk_config(disk, &placed.path)?).await
        };
        let plugged = plugged.await;
        if plugged.is_err() {
            self.disks.remove(&disk.id);
            self.forget(&disk.id);
        }
        plugged
    }

    async fn attach_nic(&self, nic: &Nic) -> Result<()> {
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        self.take(&nic.id)?;
        let plugged = add_nic(&self.http, nic).await;
        if plugged.is_err() {
            self.forget(&nic.id);
        }
        plugged
    }

    async fn detach(&self, id: &str) -> Result<()> {
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        if self.core.locked().1.fixed.iter().any(|fixed| fixed == id) {
            return Err(stays(id));
        }
        if !self.core.locked().1.plugged.contains(id) {
            return Err(Error::NoDevice(id.into()));
        }
        let limit = Duration::from_millis(self.config.unplug_timeout_ms);
        let until = Instant::now() + limit;
        match self.http.put("/vm.remove-device", &api::RemoveDevice { id }).await {
            Ok(()) => {}
            // An earlier call had no patience left, and the device is on its way out, or gone.
            Err(error @ Error::Refused { .. }) if self.has(id).await? => {
                tracing::debug!(%error, device = id, "is asked for already");
            }
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        while self.has(id).await? {
            if Instant::now() >= until {
                let what = format!("the guest to let go of {id}");
                return Err(Error::Deadline { what, limit });
            }
            tokio::time::sleep(LOOK).await;
        }
        self.disks.remove(id);
        self.forget(id);
        Ok(())
    }

    async fn resize_cpus(&self, cpus: u32) -> Result<()> {
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        let most = self.core.locked().0.cpus.most;
        if cpus == 0 || cpus > most {
            return Err(Error::Invalid(format!("{cpus} CPUs: this machine has 1 to {most}")));
        }
        let resize = api::Resize { desired_vcpus: Some(cpus), ..api::Resize::default() };
        self.http.put("/vm.resize", &resize).await
    }

    async fn resize_memory(&self, mib: u32) -> Result<u32> {
        let _turn = self.core.change.lock().await;
        self.core.alive()?;
        let range = self.core.locked().0.memory_mib;
        if mib < range.at_boot || mib > range.most {
            return Err(Error::Invalid(format!(
                "{mib} MiB: this machine has {} to {}",
                range.at_boot, range.most
            )));
        }
        let bytes = u64::from(mib) << 20;
        // It refuses to be asked for what it was asked for.
        let asked = self.http.get::<api::Info>("/vm.info").await?.config.memory;
        let asked = asked.map(|was| was.size.saturating_add(was.hotplugged_size.unwrap_or(0)));
        if asked != Some(bytes) {
            let resize = api::Resize { desired_ram: Some(bytes), ..api::Resize::default() };
            self.http.put("/vm.resize", &resize).await?;
        }
        let limits = (self.config.memory_still(), self.config.snapshot_timeout());
        settle(mib, LOOK, limits, || self.memory()).await
    }

    async fn memory(&self) -> Result<u32> {
        let actual = self.http.get::<api::Info>("/vm.info").await?.memory_actual_size >> 20;
        Ok(u32::try_from(actual).unwrap_or(u32::MAX))
    }

    async fn pause(&self) -> Result<()> {
        self.core.alive()?;
        self.http.order("/vm.pause").await
    }

    async fn resume(&self) -> Result<()> {
        self.core.alive()?;
        self.http.order("/vm.resume").await
    }

    async fn snapshot(&self, dir: &Path) -> Result<()> {
        super::snapshot::save(self, dir).await
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        way_out(feature)
    }
}

impl Machine {
    /// Whether the machine has a device still.
    async fn has(&self, id: &str) -> Result<bool> {
        let info: api::Info = self.http.get("/vm.info").await?;
        let ours = [id.to_owned(), format!("_virtio-pci-{id}")];
        Ok(ours.iter().any(|name| info.device_tree.contains_key(name)))
    }
}
