//! One QEMU.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use qapi::qmp::{self as commands, Event as QmpEvent};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::broadcast;

use super::super::core::Core;
use super::super::error::{Error, Result};
use super::super::process::{Exit, Process};
use super::super::qmp::Qmp;
use super::super::spec::{Channel, Disk, Nic, ShareKind, VmSpec};
use super::super::{Event, Feature, Features, Kind, Processes, Vm, VmState, console};
use super::config::{Accel, Machine as MachineType, QemuConfig};
use super::slots::{self, Plugged, Slots};

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
    pub core: Core<Private>,
    /// `None` when it had ended before it was taken up again.
    qmp: Option<Qmp>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine(qemu {})", self.core.process.pid())
    }
}

pub(super) fn features(config: &QemuConfig) -> Features {
    of_machine(config.machine, config.balloon, config.accel)
}

/// What a machine with a vsock device cannot be saved for, nor paused.
const VSOCK: &str = "vsock";

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
        Feature::Pause => "use a serial channel",
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
        let vsock = matches!(spec.channel, Channel::HybridVsock { .. }).then_some(VSOCK);
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
        let core = Core::new(Kind::Qemu, spec, private, process, helpers);
        core.keep(tokio::spawn(translate(qmp.events(), core.events.clone())));
        Self { config, core, qmp: Some(qmp) }
    }

    pub async fn reattach(
        config: Arc<QemuConfig>,
        state: VmState,
        processes: &Arc<dyn Processes>,
    ) -> Result<Self> {
        let (dir, id, console) = (state.dir.clone(), state.id.clone(), state.console.clone());
        let core = Core::<Private>::take_up(Kind::Qemu, state, processes)?;
        let mut machine = Self { config, core, qmp: None };
        if !machine.core.process.is_alive() {
            return Ok(machine);
        }
        let limit = machine.config.timeout();
        let qmp = match Qmp::connect(Kind::Qemu, &dir.join("qmp.sock"), limit).await {
            Ok(qmp) => qmp,
            // It ended between the two looks.
            Err(Error::Gone) if !machine.core.process.is_alive() => return Ok(machine),
            Err(error) => return Err(error),
        };
        console::resume(&**processes, &id, &console).await;
        let ports = machine.core.locked().1.slots.ports();
        let there = plugged(&qmp, ports).await?;
        for device in machine.core.locked().1.slots.correct(there) {
            tracing::info!(id, device = device.id, "is not in the machine any more");
        }
        let translated = translate(qmp.events(), machine.core.events.clone());
        machine.core.keep(tokio::spawn(translated));
        machine.qmp = Some(qmp);
        Ok(machine)
    }

    pub fn qmp(&self) -> Result<&Qmp> {
        self.qmp.as_ref().ok_or(Error::Gone)
    }

    /// Lets the balloon hold what is more than the memory at boot. The guest's driver takes it
    /// when it starts.
    pub async fn settle_memory(&self) -> Result<()> {
        let (memory, balloon) = {
            let state = self.core.locked();
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

/// What is plugged into the root ports, by QEMU's own account.
async fn plugged(qmp: &Qmp, ports: u8) -> Result<BTreeMap<u8, Plugged>> {
    let mut found = BTreeMap::new();
    if ports == 0 {
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
        format!("qemu {}", self.core.locked().1.machine.as_str())
    }

    fn features(&self) -> Features {
        let state = self.core.locked();
        let all = of_machine(state.1.machine, state.1.balloon, state.1.accel);
        match state.1.unsaveable.as_deref() {
            // What the host has sent meanwhile is never answered afterwards.
            Some(VSOCK) => all.without(Feature::Pause),
            _ => all,
        }
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
        let ask = async {
            let qmp = self.qmp()?;
            if qmp.is_closed() {
                return Err(Error::State("the monitor's connection is closed".into()));
            }
            qmp.execute(&commands::quit {}).await.map(drop)
        };
        self.core.stop(grace, ask).await
    }

    async fn release(&self) {
        let monitor = self.core.locked().0.dir.join("qmp.sock");
        self.core.release(&[monitor]).await;
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

    async fn memory(&self) -> Result<u32> {
        self.require(Feature::MemoryResize)?;
        self.memory_now().await
    }

    async fn pause(&self) -> Result<()> {
        self.require(Feature::Pause)?;
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
