//! Virtual machine monitors behind one trait.
//!
//! ```text
//! let launcher = Launcher::new(processes, jail);             // who forks, and in which jail
//! let vmm: Arc<dyn Vmm> = Arc::new(Qemu::new(config, helpers, launcher));
//! let vm = vmm.spawn(&spec).await?;                          // the machine runs, or nothing is left
//! journal(vm.state());                                       // again after each change of devices
//! … the guest dials out when it is ready: see [`vsock`] …
//! vm.attach_disk(&disk).await?; journal(vm.state());
//! let exit = vm.wait().await?;                               // any number of times, by anyone
//! vm.stop(grace).await?; vm.release().await;                 // processes gone; nothing is left
//! // after a restart of the daemon:
//! let vm = vmm.reattach(state).await?;                       // also for one that ended meanwhile
//! ```
//!
//! **Two traits.** [`Vmm`] is a program with its configuration and makes machines; [`Vm`] is one
//! machine. The core (spawn, wait, stop, state, reattach) every VMM has. The rest are
//! capabilities: [`Vm::features`] says which; the method of one that is missing answers
//! [`Error::Unsupported`], which names the VMM and the way out.
//!
//! **Who owns what.** A driver starts the VMM and its helpers (virtiofsd, `vhost-device-vsock`),
//! and ends them all, in one unit: `spawn` either gives a running machine or undoes everything.
//! It does not make taps, network namespaces, mounts or the agent's handshake; those come in by
//! descriptor or path in [`VmSpec`].
//!
//! **What survives the daemon.** Processes are children of sandbox-parent; [`VmState`] names them
//! by start time and by the cookie of their exit, never by pid alone. What devices a machine has
//! is asked from the VMM itself when it is taken up again, so that a crash between a hot-plug and
//! its journal entry loses no slot.
//!
//! **What may not happen.** A VMM is as hostile as its guest: whatever it says is bounded in
//! size and time before anything is done with it; its answers change nothing but this machine.

pub mod cloud_hypervisor;
pub mod console;
mod core;
mod disks;
pub mod error;
mod files;
pub mod firecracker;
pub mod helpers;
pub mod http;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod spec;
mod started;
pub mod stratovirt;
mod vhost;
pub mod vsock;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

pub use error::{Error, Result};
pub use helpers::Cache;
pub use process::{Exit, Launcher, Processes};
pub use spec::{
    Boot, Channel, Console, Disk, DiskFormat, Nic, Range, Root, SERIAL_PORT, Share, ShareKind,
    VmSpec, Way,
};

/// Whether the host's kernel has vsock for guests; `vmm` is who wants it.
///
/// # Errors
/// [`Error::Unsupported`], which says what to do.
pub fn vhost_vsock(vmm: &str) -> Result<()> {
    vhost::there(vmm)
}

/// The VMMs that there are drivers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// StratoVirt.
    StratoVirt,
    /// Firecracker.
    Firecracker,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::StratoVirt => "stratovirt",
            Self::Firecracker => "firecracker",
        })
    }
}

/// Something that a VMM may be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Feature {
    /// [`Vm::attach_disk`], and [`Vm::detach`] of a disk.
    DiskHotplug,
    /// [`Vm::attach_nic`], and [`Vm::detach`] of a NIC.
    NicHotplug,
    /// [`Vm::resize_cpus`].
    CpuResize,
    /// [`Vm::resize_memory`].
    MemoryResize,
    /// [`Vm::pause`] and [`Vm::resume`].
    Pause,
    /// [`Vm::snapshot`] and [`Vmm::restore`].
    Snapshot,
    /// Free pages of the guest go back to the host by themselves.
    FreePageReporting,
    /// [`ShareKind::Virtiofs`].
    Virtiofs,
    /// [`ShareKind::Ninep`].
    Ninep,
    /// [`Channel::HybridVsock`].
    HybridVsock,
    /// [`Channel::Serial`].
    Serial,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::DiskHotplug,
        Self::NicHotplug,
        Self::CpuResize,
        Self::MemoryResize,
        Self::Pause,
        Self::Snapshot,
        Self::FreePageReporting,
        Self::Virtiofs,
        Self::Ninep,
        Self::HybridVsock,
        Self::Serial,
    ];

    /// Completes "cannot …".
    pub fn describe(self) -> &'static str {
        match self {
            Self::DiskHotplug => "plug or unplug a disk while it runs",
            Self::NicHotplug => "plug or unplug a network interface while it runs",
            Self::CpuResize => "change the number of CPUs while it runs",
            Self::MemoryResize => "change the memory while it runs",
            Self::Pause => "pause",
            Self::Snapshot => "be saved and restored",
            Self::FreePageReporting => "give back free pages by itself",
            Self::Virtiofs => "share directories by virtiofs",
            Self::Ninep => "share directories by 9p",
            Self::HybridVsock => "offer vsock through a unix socket",
            Self::Serial => "offer a virtio-serial channel",
        }
    }
}

/// A set of [`Feature`]s.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u32);

impl Features {
    /// The set of these.
    pub fn of(all: &[Feature]) -> Self {
        all.iter().fold(Self(0), |set, one| set.with(*one))
    }

    /// This set and one more.
    #[must_use]
    pub const fn with(self, one: Feature) -> Self {
        Self(self.0 | 1 << one as u32)
    }

    /// This set without one.
    #[must_use]
    pub const fn without(self, one: Feature) -> Self {
        Self(self.0 & !(1 << one as u32))
    }

    /// Whether it is in.
    pub const fn has(self, one: Feature) -> bool {
        self.0 & (1 << one as u32) != 0
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(Feature::ALL.iter().filter(|one| self.has(**one))).finish()
    }
}

/// How a copy of a saved machine comes by its NICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyNics {
    /// They are plugged in.
    Plugged,
    /// The saved machine has one. Its copy gets another tap, and its guest another MAC address.
    Declared,
}

/// A VMM with its configuration: makes machines.
#[async_trait]
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Which one.
    fn kind(&self) -> Kind;

    /// For people, with the machine type: `qemu microvm`.
    fn name(&self) -> String;

    /// By which way pods' agents are to be reached.
    fn way(&self) -> Way {
        Way::Hybrid
    }

    /// What its machines can do at best; [`Vm::features`] is what one can.
    fn features(&self) -> Features;

    /// Whether it opens its taps itself, by name: then nobody else may have them open.
    fn opens_taps(&self) -> bool {
        false
    }

    /// What a snapshot depends on, of the program and its configuration: as text, which changes
    /// when a snapshot of before must not be used.
    ///
    /// # Errors
    /// When the program cannot be looked at.
    fn identity(&self) -> Result<String> {
        Err(self.cannot(Feature::Snapshot))
    }

    /// How copies of its machines come by their NICs; `hugepages` as in [`VmSpec::hugepages`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] where pods start from no copies.
    fn copies(&self, hugepages: bool) -> Result<CopyNics> {
        let _ = hugepages;
        Err(Error::Unsupported {
            vmm: self.name(),
            what: "start pods from templates".into(),
            way_out: "use qemu with machine q35, or firecracker".into(),
        })
    }

    /// Starts a machine. When it answers the VMM has taken its configuration and the CPUs run;
    /// the guest says itself when it is ready. On failure nothing is left.
    ///
    /// # Errors
    /// [`Error::Unsupported`] and [`Error::Invalid`] before anything was started;
    /// [`Error::Ended`] with the VMM's words when it did not like something.
    async fn spawn(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>>;

    /// Starts a machine from a snapshot that [`Vm::snapshot`] of a machine with an equal `spec`
    /// (paths, taps, MAC addresses and context id may differ) has made. What the guest sees of a NIC that
    /// was saved is as it was. It runs when this answers.
    ///
    /// # Errors
    /// As [`Vmm::spawn`]; a damaged snapshot is [`Error::Ended`] or [`Error::Refused`].
    async fn restore(&self, spec: &VmSpec, snapshot: &Path) -> Result<Arc<dyn Vm>> {
        let _ = (spec, snapshot);
        Err(self.cannot(Feature::Snapshot))
    }

    /// Takes up a machine that an earlier daemon has started. One that has ended meanwhile is
    /// taken up as well: its [`Vm::wait`] answers at once.
    ///
    /// # Errors
    /// [`Error::State`] when the record is of another VMM; [`Error::Deadline`] when the VMM does
    /// not answer: [`process::Process::kill`] what the record names.
    async fn reattach(&self, state: VmState) -> Result<Arc<dyn Vm>>;

    /// The error for a capability that is missing here.
    fn cannot(&self, feature: Feature) -> Error {
        Error::Unsupported {
            vmm: self.name(),
            what: feature.describe().into(),
            way_out: self.way_out(feature).into(),
        }
    }

    /// What to do instead.
    fn way_out(&self, feature: Feature) -> &'static str {
        let _ = feature;
        "choose another VMM in the configuration"
    }
}

/// One machine.
#[async_trait]
pub trait Vm: fmt::Debug + Send + Sync {
    /// For people, with the machine type.
    fn name(&self) -> String;

    /// What this machine can do.
    fn features(&self) -> Features;

    /// Pid of the VMM.
    fn pid(&self) -> u32;

    /// What [`Vmm::reattach`] needs; journal it after `spawn` and after each change of devices.
    fn state(&self) -> VmState;

    /// What happens to it, from now on. A receiver that is too slow misses the oldest.
    fn events(&self) -> broadcast::Receiver<Event>;

    /// Waits for the end of the VMM. Answers at once after it has come.
    ///
    /// # Errors
    /// [`Error::Parent`] when sandbox-parent is gone: then nobody knows.
    async fn wait(&self) -> Result<Exit>;

    /// Ends it and its helpers: waits up to `grace` for the guest to go by itself (the caller
    /// has asked its agent), asks the VMM, kills it. Idempotent.
    ///
    /// # Errors
    /// As [`Vm::wait`]; [`Error::Deadline`] when the kernel does not end a killed process.
    async fn stop(&self, grace: Duration) -> Result<Exit>;

    /// Forgets a machine that has ended: exits, kept descriptors, sockets. The console log stays
    /// for whoever removes the directory.
    async fn release(&self);

    /// Whether the VMM still answers, within its own deadline.
    ///
    /// # Errors
    /// [`Error::Deadline`], [`Error::Gone`].
    async fn ping(&self) -> Result<()>;

    /// Plugs in a disk. The guest finds it by its serial number, see [`Vm::disk_serial`].
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::DeviceExists`], [`Error::Exhausted`] without free slot.
    async fn attach_disk(&self, disk: &Disk) -> Result<()> {
        let _ = disk;
        Err(self.cannot(Feature::DiskHotplug))
    }

    /// What the guest reads as serial number of a disk that the machine has: [`Disk::id`], except
    /// where a VMM gives numbers of its own (Firecracker).
    fn disk_serial(&self, id: &str) -> String {
        id.to_owned()
    }

    /// Plugs in a network interface. The guest finds it by its MAC address.
    ///
    /// # Errors
    /// As [`Vm::attach_disk`].
    async fn attach_nic(&self, nic: &Nic) -> Result<()> {
        let _ = nic;
        Err(self.cannot(Feature::NicHotplug))
    }

    /// Unplugs a device that was plugged in. Answers when the guest has let go of it and the host
    /// may close what is behind it.
    ///
    /// # Errors
    /// [`Error::NoDevice`]; [`Error::Deadline`] when the guest does not let go: the device, its
    /// slot and its descriptors stay, and the call may be made again.
    async fn detach(&self, id: &str) -> Result<()> {
        let _ = id;
        Err(self.cannot(Feature::DiskHotplug))
    }

    /// Changes the number of CPUs. The guest may have to bring them online.
    ///
    /// # Errors
    /// [`Error::Unsupported`]; [`Error::Invalid`] beyond [`Range::most`].
    async fn resize_cpus(&self, cpus: u32) -> Result<()> {
        let _ = cpus;
        Err(self.cannot(Feature::CpuResize))
    }

    /// Changes the guest's memory, in MiB. A guest gives memory back as it can: answers what it
    /// had at the end of the deadline.
    ///
    /// # Errors
    /// As [`Vm::resize_cpus`].
    async fn resize_memory(&self, mib: u32) -> Result<u32> {
        let _ = mib;
        Err(self.cannot(Feature::MemoryResize))
    }

    /// MiB of memory that it has now.
    ///
    /// # Errors
    /// As [`Vm::resize_cpus`].
    async fn memory(&self) -> Result<u32> {
        Err(self.cannot(Feature::MemoryResize))
    }

    /// Stops the CPUs.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    async fn pause(&self) -> Result<()> {
        Err(self.cannot(Feature::Pause))
    }

    /// Lets the CPUs run again.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    async fn resume(&self) -> Result<()> {
        Err(self.cannot(Feature::Pause))
    }

    /// Writes the machine into files below `dir`, which is private and empty. It is paused then,
    /// and stays so. The files hold the guest's memory: 0600.
    ///
    /// # Errors
    /// [`Error::Unsupported`], also for a machine with devices that cannot be saved.
    async fn snapshot(&self, dir: &Path) -> Result<()> {
        let _ = dir;
        Err(self.cannot(Feature::Snapshot))
    }

    /// The error for a capability that is missing here.
    fn cannot(&self, feature: Feature) -> Error {
        Error::Unsupported {
            vmm: self.name(),
            what: feature.describe().into(),
            way_out: self.way_out(feature).into(),
        }
    }

    /// [`Vm::cannot`] without the capability.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    fn require(&self, feature: Feature) -> Result<()> {
        if self.features().has(feature) { Ok(()) } else { Err(self.cannot(feature)) }
    }

    /// What to do instead.
    fn way_out(&self, feature: Feature) -> &'static str {
        let _ = feature;
        "choose another VMM in the configuration"
    }
}

/// What happens to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest powered off or reset itself; the VMM ends next.
    Shutdown {
        /// Why, in the VMM's words.
        reason: String,
    },
    /// The guest's kernel said that it panicked.
    Panicked,
    /// A disk cannot be read or written.
    DiskError {
        /// The disk.
        disk: String,
        /// It was a write.
        write: bool,
        /// Its backing store is full.
        no_space: bool,
    },
    /// The guest has let go of a device.
    Detached {
        /// The device.
        id: String,
    },
    /// A helper ended while the machine ran: what it served is gone for this guest.
    HelperEnded {
        /// Which helper.
        name: String,
        /// How.
        status: u32,
    },
    /// The CPUs were stopped.
    Paused,
    /// The CPUs run again.
    Resumed,
}

/// Newest version of [`VmState`] that this program writes and reads.
pub const STATE_VERSION: u32 = 1;

/// What has to be known of a machine to take it up again. Kept by the caller in its journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// [`STATE_VERSION`] of the writer.
    pub version: u32,
    /// Which driver.
    pub kind: Kind,
    /// [`VmSpec::id`].
    pub id: String,
    /// [`VmSpec::dir`].
    pub dir: PathBuf,
    /// The VMM's process.
    pub vmm: process::Record,
    /// Its helpers' processes.
    pub helpers: Vec<process::Record>,
    /// The agent's channel.
    pub channel: Channel,
    /// CPUs.
    pub cpus: Range,
    /// Memory in MiB.
    pub memory_mib: Range,
    /// Console log and its limit.
    pub console: (PathBuf, u64),
    /// What only the driver understands.
    pub driver: serde_json::Value,
}
