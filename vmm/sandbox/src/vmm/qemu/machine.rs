//! One QEMU.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use qapi::qmp::{self as commands, Event as QmpEvent};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::{Mutex as AsyncMutex, broadcast};
use tokio::task::JoinHandle;

use super::super::error::{Error, Result};
use super::super::process::{Exit, Process};
use super::super::qmp::Qmp;
use super::super::spec::{Channel, Disk, Nic, ShareKind, VmSpec};
use super::super::{
    Event, Feature, Features, Kind, Processes, STATE_VERSION, Vm, VmState, console,
};
use super::config::{Accel, Machine as MachineType, QemuConfig};
use super::slots::{self, Plugged, Slots};

/// Events that a slow receiver may be behind.
const EVENTS: usize = 32;
/// How long QEMU may take to end after `quit`, before it is killed.
const QUIT: Duration = Duration::from_secs(2);

/// What only this driver understands of [`VmState`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Private {
    /// Machine type that it was started with: the configuration may have changed since.
    pub machine: MachineType,
    pub balloon: bool,
    /// As the machine type. Records of older daemons have none: their machines keep their CPUs.
    #[serde(default = "tcg")]
    pub accel: Accel,
    pub slots: Slots,
    /// Devices that cannot be saved, or nothing.
    pub unsaveable: Option<String>,
    /// It has the port of the serial channel, also when that is not the channel in use.
    pub serial: bool,
    /// Ids of disks and NICs from the boot: they stay for good.
    pub fixed: Vec<String>,
}

/// One QEMU.
pub(super) struct Machine {
    pub config: Arc<QemuConfig>,
    pub state: Mutex<(VmState, Private)>,
    pub process: Arc<Process>,
    helpers: Mutex<Vec<Arc<Process>>>,
    /// `None` when it had ended before it was taken up again.
    qmp: Option<Qmp>,
    pub events: broadcast::Sender<Event>,
    /// One change of devices or of state at a time.
    pub change: AsyncMutex<()>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine(qemu {})", self.process.pid())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The processes go on: another daemon may take them up.
        held(&self.tasks).iter().for_each(JoinHandle::abort);
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn features(config: &QemuConfig) -> Features {
    of_machine(config.machine, config.balloon, config.accel)
}

fn tcg() -> Accel {
    Accel::Tcg
}

fn of_machine(machine: MachineType, balloon: bool, accel: Accel) -> Features {
    use Feature::*;
    let mut all = Features::of(&[Pause, Snapshot, Virtiofs, Ninep, HybridVsock, Serial]);
    if machine.pci() {
        all = all.with(DiskHotplug).with(NicHotplug);
    }
    // Linux takes a CPU that is absent at boot only where it knows its hypervisor, and TCG is none to
    // it (acpi_is_processor_usable, since 6.12.6x and 6.18).
    if machine == MachineType::Q35 && accel == Accel::Kvm {
        all = all.with(CpuResize);
    }
    if balloon {
        all = all.with(MemoryResize).with(FreePageReporting);
    }
    all
}

pub(super) fn way_out(feature: Feature) -> &'static str {
    match feature {
        Feature::DiskHotplug | Feature::NicHotplug => {
            "use machine q35, or declare the device before the start"
        }
        Feature::CpuResize => {
            "use machine q35 with KVM; within the CPUs of the boot the guest's cgroups limit"
        }
        Feature::MemoryResize | Feature::FreePageReporting => "set balloon = true",
        Feature::Snapshot => {
            "use a serial channel, and shares and vsock only after the restore (machine q35)"
        }
        _ => "choose another VMM in the configuration",
    }
}

impl Machine {
    pub fn new(
        config: Arc<QemuConfig>,
        spec: &VmSpec,
        process: Process,
        helpers: Vec<Process>,
        qmp: Qmp,
    ) -> Self {
        let ports = if config.machine.pci() { config.root_ports } else { 0 };
        let vsock = matches!(spec.channel, Channel::HybridVsock { .. }).then_some("vsock");
        let shared = spec.shares.first().map(|share| match share.kind {
            ShareKind::Virtiofs => "a virtiofs share",
            ShareKind::Ninep => "a 9p share",
        });
        let fixed = spec.disks.iter().map(|disk| disk.id.clone());
        let private = Private {
            machine: config.machine,
            balloon: config.balloon,
            accel: config.accel,
            slots: Slots::new(ports),
            unsaveable: vsock.or(shared).map(str::to_owned),
            serial: matches!(spec.channel, Channel::Serial { console: false, .. }),
            fixed: fixed.chain(spec.nics.iter().map(|nic| nic.id.clone())).collect(),
        };
        let state = VmState {
            version: STATE_VERSION,
            kind: Kind::Qemu,
            id: spec.id.clone(),
            dir: spec.dir.clone(),
            vmm: process.record().clone(),
            helpers: helpers.iter().map(|helper| helper.record().clone()).collect(),
            channel: spec.channel.clone(),
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            console: (spec.console.log.clone(), spec.console.limit),
            driver: serde_json::Value::Null,
        };
        Self::assemble(config, state, private, process, helpers, Some(qmp))
    }

    fn assemble(
        config: Arc<QemuConfig>,
        state: VmState,
        private: Private,
        process: Process,
        helpers: Vec<Process>,
        qmp: Option<Qmp>,
    ) -> Self {
        let (events, _) = broadcast::channel(EVENTS);
        let process = Arc::new(process);
        let helpers: Vec<_> = helpers.into_iter().map(Arc::new).collect();
        let mut tasks = Vec::new();
        if let Some(qmp) = &qmp {
            tasks.push(tokio::spawn(translate(qmp.events(), events.clone())));
            for helper in &helpers {
                tasks.push(tokio::spawn(watch_helper(helper.clone(), events.clone())));
            }
        }
        let state = Mutex::new((state, private));
        let (helpers, tasks) = (Mutex::new(helpers), Mutex::new(tasks));
        let change = AsyncMutex::default();
        Self { config, state, process, helpers, qmp, events, change, tasks }
    }

    pub async fn reattach(
        config: Arc<QemuConfig>,
        state: VmState,
        processes: &Arc<dyn Processes>,
    ) -> Result<Self> {
        if state.kind != Kind::Qemu || state.version > STATE_VERSION {
            return Err(Error::State(format!(
                "{} version {} is not one of qemu, version {STATE_VERSION} or older",
                state.kind, state.version
            )));
        }
        let mut private: Private = serde_json::from_value(state.driver.clone())
            .map_err(|error| Error::State(error.to_string()))?;
        let take = |record: &super::super::process::Record| {
            Process::take_up(record.clone(), processes.clone())
        };
        let process = take(&state.vmm);
        let helpers = state.helpers.iter().map(take).collect();
        if !process.is_alive() {
            return Ok(Self::assemble(config, state, private, process, helpers, None));
        }
        let limit = config.timeout();
        let monitor = state.dir.join("qmp.sock");
        let what = || Error::Deadline { what: "qemu's monitor to be free".into(), limit };
        // QEMU serves one connection; that of the dead daemon ends when QEMU reads its end.
        let stream = tokio::time::timeout(limit, UnixStream::connect(&monitor));
        let stream = stream.await.map_err(|_| what())?;
        let qmp = match stream {
            Ok(stream) => Qmp::new(Kind::Qemu, stream, limit).await,
            Err(_) => Err(Error::Gone),
        };
        let qmp = match qmp {
            Ok(qmp) => Some(qmp),
            // It ended between the two looks.
            Err(Error::Gone) if !process.is_alive() => None,
            Err(error) => return Err(error),
        };
        if let Some(qmp) = &qmp {
            console::resume(&**processes, &state.id, &state.console).await;
            for device in private.slots.correct(plugged(qmp, &private.slots).await?) {
                tracing::info!(id = state.id, device = device.id, "is not in the machine any more");
            }
        }
        Ok(Self::assemble(config, state, private, process, helpers, qmp))
    }

    pub fn locked(&self) -> MutexGuard<'_, (VmState, Private)> {
        held(&self.state)
    }

    /// A helper of a device that was plugged in.
    pub fn add_helper(&self, process: Process) {
        let process = Arc::new(process);
        self.locked().0.helpers.push(process.record().clone());
        let watch = watch_helper(process.clone(), self.events.clone());
        held(&self.tasks).push(tokio::spawn(watch));
        held(&self.helpers).push(process);
    }

    fn helpers(&self) -> Vec<Arc<Process>> {
        held(&self.helpers).clone()
    }

    pub fn qmp(&self) -> Result<&Qmp> {
        self.qmp.as_ref().ok_or(Error::Gone)
    }

    pub fn require(&self, feature: Feature) -> Result<()> {
        if self.features().has(feature) { Ok(()) } else { Err(self.cannot(feature)) }
    }

    /// Lets the balloon hold what is more than the memory at boot. The guest's driver takes it
    /// when it starts.
    pub async fn settle_memory(&self) -> Result<()> {
        let (memory, balloon) = {
            let state = self.locked();
            (state.0.memory_mib, state.1.balloon)
        };
        if balloon && memory.most > memory.at_boot {
            let value = i64::from(memory.at_boot) << 20;
            self.qmp()?.execute(&commands::balloon { value }).await?;
        }
        Ok(())
    }
}

async fn translate(mut from: broadcast::Receiver<QmpEvent>, to: broadcast::Sender<Event>) {
    loop {
        let event = match from.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let event = match event {
            QmpEvent::SHUTDOWN { data, .. } => {
                let reason = serde_json::to_value(data.reason).ok();
                let reason = reason.and_then(|r| r.as_str().map(str::to_owned));
                Event::Shutdown { reason: reason.unwrap_or_default() }
            }
            QmpEvent::GUEST_PANICKED { .. } => Event::Panicked,
            QmpEvent::STOP { .. } => Event::Paused,
            QmpEvent::RESUME { .. } => Event::Resumed,
            QmpEvent::BLOCK_IO_ERROR { data, .. } => {
                let node = data.node_name.unwrap_or(data.device);
                let node = node.trim_end_matches("-file");
                let disk = node.strip_prefix("blk-").unwrap_or(node);
                let disk = slots::from_qemu_id(disk).map_or(disk, |(_, id)| id);
                Event::DiskError {
                    disk: disk.to_owned(),
                    write: matches!(data.operation, commands::IoOperationType::write),
                    no_space: data.nospace.unwrap_or(false),
                }
            }
            QmpEvent::DEVICE_DELETED { data, .. } => {
                match data.device.as_deref().and_then(slots::from_qemu_id) {
                    Some((_, id)) => Event::Detached { id: id.to_owned() },
                    None => continue,
                }
            }
            _ => continue,
        };
        // Nobody may be listening.
        let _ = to.send(event);
    }
}

async fn watch_helper(helper: Arc<Process>, events: broadcast::Sender<Event>) {
    if let Ok(exit) = helper.wait().await {
        let name = helper.record().name.clone();
        let _ = events.send(Event::HelperEnded { name, status: exit.status });
    }
}

/// What is plugged into the root ports, by QEMU's own account.
async fn plugged(qmp: &Qmp, slots: &Slots) -> Result<BTreeMap<u8, Plugged>> {
    let mut found = BTreeMap::new();
    if slots.ports() == 0 {
        return Ok(found);
    }
    let list = commands::qom_list { path: "/machine/peripheral".into() };
    for entry in qmp.execute(&list).await? {
        let Some((kind, id)) = slots::from_qemu_id(&entry.name) else { continue };
        let path = format!("/machine/peripheral/{}", entry.name);
        let question = json!({ "path": path, "property": "parent_bus" });
        let bus = qmp.call("qom-get", question, None).await?;
        let port = bus.as_str().and_then(|bus| bus.rsplit('/').next()?.strip_prefix("rp"));
        if let Some(port) = port.and_then(|port| port.parse().ok()) {
            found.insert(port, Plugged { id: id.to_owned(), kind });
        }
    }
    Ok(found)
}

#[async_trait]
impl Vm for Machine {
    fn name(&self) -> String {
        format!("qemu {}", self.locked().1.machine.as_str())
    }

    fn features(&self) -> Features {
        let state = self.locked();
        of_machine(state.1.machine, state.1.balloon, state.1.accel)
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn state(&self) -> VmState {
        let (state, private) = &*self.locked();
        let driver = serde_json::to_value(private).unwrap_or_default();
        VmState { driver, ..state.clone() }
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    async fn wait(&self) -> Result<Exit> {
        self.process.wait().await
    }

    async fn stop(&self, grace: Duration) -> Result<Exit> {
        let mut exit = self.process.wait_for(grace).await?;
        if exit.is_none()
            && let Ok(qmp) = self.qmp()
            && !qmp.is_closed()
        {
            // A stopped or busy QEMU must not hold this up.
            let quit = tokio::time::timeout(QUIT, qmp.execute(&commands::quit {})).await;
            if matches!(quit, Ok(Ok(_) | Err(Error::Gone))) {
                exit = self.process.wait_for(QUIT).await?;
            }
        }
        let exit = match exit {
            Some(exit) => exit,
            None => self.process.kill().await?,
        };
        for helper in self.helpers() {
            helper.kill().await?;
        }
        Ok(exit)
    }

    async fn release(&self) {
        let (id, dir, channel, processes) = {
            let state = self.locked();
            let state = &state.0;
            (state.id.clone(), state.dir.clone(), state.channel.clone(), self.process.processes())
        };
        console::forget(&*processes, &id).await;
        for process in self.helpers().iter().chain([&self.process]) {
            process.acknowledge().await;
        }
        for socket in channel.sockets().into_iter().chain([dir.join("qmp.sock")]) {
            // It may be gone already.
            let _ = std::fs::remove_file(socket);
        }
    }

    async fn ping(&self) -> Result<()> {
        self.qmp()?.execute(&commands::query_status {}).await.map(drop)
    }

    async fn attach_disk(&self, disk: &Disk) -> Result<()> {
        self.require(Feature::DiskHotplug)?;
        self.plug_disk(disk).await
    }

    async fn attach_nic(&self, nic: &Nic) -> Result<()> {
        self.require(Feature::NicHotplug)?;
        self.plug_nic(nic).await
    }

    async fn detach(&self, id: &str) -> Result<()> {
        self.require(Feature::DiskHotplug)?;
        self.unplug(id).await
    }

    async fn resize_cpus(&self, cpus: u32) -> Result<()> {
        self.require(Feature::CpuResize)?;
        self.set_cpus(cpus).await
    }

    async fn resize_memory(&self, mib: u32) -> Result<u32> {
        self.require(Feature::MemoryResize)?;
        self.set_memory(mib).await
    }

    async fn pause(&self) -> Result<()> {
        self.qmp()?.execute(&commands::stop {}).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        self.qmp()?.execute(&commands::cont {}).await.map(drop)
    }

    async fn snapshot(&self, dir: &Path) -> Result<()> {
        super::snapshot::save(self, dir).await
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        way_out(feature)
    }
}
