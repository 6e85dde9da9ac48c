//! How QEMU is run: the keys of the configuration file's `[qemu]`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::spec::Way;

/// QEMU's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QemuConfig {
    /// The program: absolute path, or a name in `PATH`.
    pub path: PathBuf,
    /// Machine type.
    pub machine: Machine,
    /// Accelerator.
    pub accel: Accel,
    /// CPU model (`-cpu`); `host` with KVM and `max` with TCG when it is empty.
    pub cpu: String,
    /// TCG's cache of translated code in MiB; QEMU's own choice when it is 0. A small one saves
    /// memory (8 saved 12 MB of 95, measured) and costs speed.
    pub tcg_cache_mib: u32,
    /// PCIe root ports for devices that are plugged in while the machine runs; each takes a
    /// little of the guest's boot time. Not for microvm, which has none. At most 32.
    pub root_ports: u8,
    /// Who tells the guest of a plugged device.
    pub hotplug: Hotplug,
    /// A balloon: memory can be resized, and free pages are given back to the host by themselves.
    pub balloon: bool,
    /// How agents are reached.
    pub channel: Chosen,
    /// Deadline for QEMU's start and for each command, in milliseconds.
    pub timeout_ms: u64,
    /// How long a guest may take to let go of a device, in milliseconds.
    pub unplug_timeout_ms: u64,
    /// How long saving or loading a snapshot, and resizing memory, may take, in milliseconds.
    pub snapshot_timeout_ms: u64,
    /// Directories with QEMU's firmware (`-L`), in order. Shown in the jail, read-only.
    pub data_dirs: Vec<PathBuf>,
    /// Rate of the host's time stamp counter in kHz, for guests under TCG. Never configured: see
    /// [`vmm_common::clock`].
    #[serde(skip)]
    pub clock_khz: Option<u64>,
    /// Machines may be copies of a template. Set by the daemon, which is told so elsewhere.
    #[serde(skip)]
    pub copied: bool,
}

/// The ways that QEMU has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chosen {
    /// The serial port for machines that may be copies of a template, which has one already: its agent
    /// need not wait for another device. It is also for hosts without `vhost-device-vsock`. Else vsock.
    #[default]
    Auto,
    /// vsock by `vhost-device-vsock`.
    Hybrid,
    /// A virtio-serial port.
    Serial,
    /// The same as a console, which is what StratoVirt's microvm has.
    Console,
    /// vsock of the host's kernel.
    Vsock,
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            path: "qemu-system-x86_64".into(),
            machine: Machine::Microvm,
            accel: Accel::Kvm,
            cpu: String::new(),
            tcg_cache_mib: 0,
            root_ports: 8,
            hotplug: Hotplug::Acpi,
            balloon: true,
            channel: Chosen::Auto,
            timeout_ms: 10_000,
            unplug_timeout_ms: 15_000,
            snapshot_timeout_ms: 60_000,
            data_dirs: vec!["/usr/share/qemu".into(), "/usr/share/seabios".into()],
            clock_khz: None,
            copied: false,
        }
    }
}

impl QemuConfig {
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// By which way agents are reached, when `vsock` is the helper for it.
    pub(super) fn way(&self, vsock: &Path) -> Way {
        match self.channel {
            Chosen::Auto if self.copied && self.machine.pci() => Way::Serial,
            Chosen::Auto if kuasar_host::process::find_program(vsock).is_none() => Way::Serial,
            Chosen::Auto | Chosen::Hybrid => Way::Hybrid,
            Chosen::Serial => Way::Serial,
            Chosen::Console => Way::Console,
            Chosen::Vsock => Way::Vsock,
        }
    }

    pub(super) fn cpu(&self) -> &str {
        match (self.cpu.as_str(), self.accel) {
            ("", Accel::Kvm) => "host",
            ("", Accel::Tcg) => "max",
            (cpu, _) => cpu,
        }
    }
}

/// Machine types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// Smallest and fastest to boot (x86_64): virtio-mmio, no PCI, no ACPI, no hot-plug. With
    /// ACPI it stalls for 20 s under TCG (measured), so ACPI is off.
    Microvm,
    /// PCIe and hot-plug (x86_64).
    Q35,
    /// aarch64. Written from QEMU's documentation; not tried on such a machine yet.
    Virt,
}

impl Machine {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
            Self::Virt => "virt",
        }
    }

    pub(super) fn pci(self) -> bool {
        self != Self::Microvm
    }
}

/// Accelerators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The kernel's: `/dev/kvm`.
    Kvm,
    /// QEMU's own translator: works anywhere, about ten times slower.
    Tcg,
}

impl Accel {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Who tells a q35 guest of plugged devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hotplug {
    /// ACPI: the guest's kernel needs ACPI and `HOTPLUG_PCI_ACPI`. Unplugs at once.
    Acpi,
    /// The root ports themselves: needs `HOTPLUG_PCI_PCIE`. The guest waits 5 s before it lets go
    /// of a device, as for a person at an attention button.
    Native,
}
