//! The configuration file of `vmm-sandboxer`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use kuasar_daemon::common::{CommonConfig, duration};
use serde::{Deserialize, Serialize};

use crate::block::StorageConfig;
use crate::copy::CopyConfig;
use crate::images::{GuestConfig, Images};
use crate::jail::JailConfig;
use crate::template::TemplateConfig;
use crate::vmm::cloud_hypervisor::CloudHypervisorConfig;
use crate::vmm::firecracker::FirecrackerConfig;
use crate::vmm::helpers::HelpersConfig;
use crate::vmm::qemu::{Chosen, Machine, QemuConfig};
use crate::vmm::stratovirt::StratoVirtConfig;
use crate::vmm::{Kind, Range, ShareKind};

/// Annotation by which a pod chooses its VMM, where the configuration allows it.
pub const VMM_ANNOTATION: &str = "io.kuasar.vmm";

/// Most machines of the pool.
const MOST_POOLED: u32 = 64;

/// What `vmm-sandboxer.toml` has beside [`CommonConfig`]. Every key has a default; unknown keys
/// are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// VMM of pods that choose none.
    pub vmm: Vmm,
    /// VMM by `runtime_type` of the runtime handler.
    pub runtimes: BTreeMap<String, Vmm>,
    /// What guests boot.
    pub guest: GuestConfig,
    /// How large machines are.
    pub size: SizeConfig,
    /// How long a guest may take.
    pub guest_timeouts: GuestTimeouts,
    /// Whether VMMs and their helpers are jailed. Only for debugging: without a jail they run as
    /// root.
    pub jailed: Jailed,
    /// The jail.
    pub jail: JailConfig,
    /// virtiofsd and the vsock helper.
    pub helpers: HelpersConfig,
    /// QEMU.
    pub qemu: QemuConfig,
    /// Block storage of containers.
    pub storage: StorageConfig,
    /// Files that are copied into guests without a share.
    pub copy: CopyConfig,
    /// Templates.
    pub template: TemplateConfig,
    /// Cloud Hypervisor.
    pub cloud_hypervisor: CloudHypervisorConfig,
    /// StratoVirt.
    pub stratovirt: StratoVirtConfig,
    /// Firecracker.
    pub firecracker: FirecrackerConfig,
    /// How pods' files reach their guests.
    pub share: ShareBy,
    /// What a pod on the host's network gets.
    pub host_network: HostNetwork,
    /// Whom engines that announce their containers call.
    pub task_endpoint: TaskEndpoint,
    /// From [`CommonConfig::allowed_annotations`]: whether [`VMM_ANNOTATION`] counts.
    #[serde(skip)]
    pub heeds_annotation: bool,
}

/// How the files of a pod reach its guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareBy {
    /// By a virtiofsd beside the VMM.
    #[default]
    Virtiofs,
    /// By the VMM itself (QEMU), for hosts without virtiofsd.
    #[serde(rename = "9p")]
    Ninep,
    /// Not at all: root file systems are disks, and small files are copied ([`crate::copy`]).
    None,
    /// By two virtiofsd: one for root file systems, which nobody changes but the guest, and one for
    /// volumes. Follows from the caches of both ([`HelpersConfig::root_cache`]).
    #[serde(rename = "virtiofs-roots")]
    Roots,
}

/// How the files of a container reach its guest.
#[derive(Debug, Clone, Default)]
pub struct Sharing {
    /// Limits of what is copied, in a pod without a share.
    pub copying: Option<CopyConfig>,
    /// Whether root file systems have a share of their own.
    pub roots: bool,
}

impl ShareBy {
    /// As drivers name it.
    pub fn kind(self) -> Option<ShareKind> {
        match self {
            Self::Virtiofs | Self::Roots => Some(ShareKind::Virtiofs),
            Self::Ninep => Some(ShareKind::Ninep),
            Self::None => None,
        }
    }

    /// The shares that a pod has then: tag, and where its guest mounts it.
    pub fn shares(self) -> &'static [(&'static str, &'static str)] {
        const VOLUMES: (&str, &str) = (vmm_common::SHARE_TAG, vmm_common::SHARE_PATH);
        const ROOTS: (&str, &str) = (vmm_common::ROOTS_TAG, vmm_common::ROOTS_PATH);
        match self {
            Self::None => &[],
            Self::Virtiofs | Self::Ninep => &[VOLUMES],
            Self::Roots => &[VOLUMES, ROOTS],
        }
    }

    /// What that means for a container's files.
    pub fn sharing(self, config: &Config) -> Sharing {
        let copying = (self == Self::None).then(|| config.copy.clone());
        Sharing { copying, roots: self == Self::Roots }
    }

    /// Options of the guest's mount.
    pub fn options(self) -> Vec<String> {
        match self {
            Self::Virtiofs | Self::Roots | Self::None => Vec::new(),
            // Without it no file can be mapped that is shared and written to
            // (Linux, filesystems/9p).
            Self::Ninep => vec!["cache=mmap".into()],
        }
    }

    /// As the guest's agent names the file system.
    pub fn file_system(self) -> &'static str {
        match self {
            Self::Virtiofs | Self::Roots => "virtiofs",
            Self::Ninep => "9p",
            Self::None => "",
        }
    }
}

/// A VMM by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// QEMU.
    #[default]
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// StratoVirt.
    #[serde(rename = "stratovirt")]
    StratoVirt,
    /// Firecracker.
    Firecracker,
}

impl Vmm {
    /// As the drivers name it.
    pub fn kind(self) -> Kind {
        match self {
            Self::Qemu => Kind::Qemu,
            Self::CloudHypervisor => Kind::CloudHypervisor,
            Self::StratoVirt => Kind::StratoVirt,
            Self::Firecracker => Kind::Firecracker,
        }
    }

    fn of(name: &str) -> Option<Self> {
        let all = [Self::Qemu, Self::CloudHypervisor, Self::StratoVirt, Self::Firecracker];
        all.into_iter().find(|vmm| vmm.kind().to_string() == name)
    }
}

/// Whether there is a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Jailed(pub bool);

impl Default for Jailed {
    fn default() -> Self {
        Self(true)
    }
}

/// What to do with a pod on the host's network: a guest cannot have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostNetwork {
    /// Refuse it.
    #[default]
    Refuse,
    /// Run it without any network but its own loopback.
    None,
}

/// Whom an engine calls that announces its containers before it makes them (iSulad). containerd
/// announces nothing, and always calls the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskEndpoint {
    /// The daemon.
    #[default]
    Host,
    /// The agent in the guest.
    Guest,
}

/// How large machines are: `[size]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SizeConfig {
    /// CPUs of a pod without a CPU limit.
    pub cpus: u32,
    /// CPUs at most.
    pub max_cpus: u32,
    /// Memory in MiB of a pod without a memory limit.
    pub memory_mib: u32,
    /// Memory in MiB that a machine gets beyond its pod's limit, for its kernel and agent.
    pub overhead_mib: u32,
    /// Memory in MiB at least.
    pub min_memory_mib: u32,
    /// Memory in MiB at most.
    pub max_memory_mib: u32,
    /// CPUs that a running machine may be given beyond those of its boot, where the VMM can.
    pub grow_cpus: u32,
    /// Memory in MiB that a running machine may be given beyond that of its boot, where the VMM
    /// can. The guest's kernel keeps 1.6 % of it for its tables from the boot on.
    pub grow_memory_mib: u32,
    /// Back guest memory with huge pages of 2 MiB.
    pub hugepages: bool,
}

impl Default for SizeConfig {
    fn default() -> Self {
        Self {
            cpus: 1,
            max_cpus: 32,
            memory_mib: 256,
            overhead_mib: 48,
            min_memory_mib: 96,
            max_memory_mib: 64 << 10,
            grow_cpus: 0,
            grow_memory_mib: 0,
            hugepages: false,
        }
    }
}

impl SizeConfig {
    /// What a machine that boots with these CPUs and this memory (MiB) may grow to.
    pub fn growth(&self, cpus: u32, memory: u32) -> (Range, Range) {
        let range = |at_boot: u32, more: u32, most: u32| Range {
            at_boot,
            most: at_boot.saturating_add(more).min(most).max(at_boot),
        };
        (
            range(cpus, self.grow_cpus, self.max_cpus),
            range(memory, self.grow_memory_mib, self.max_memory_mib),
        )
    }

    /// CPUs and memory (MiB) of a pod with these limits: CPU quota and period in microseconds,
    /// memory in bytes; 0 or less is none.
    pub fn of(&self, quota: i64, period: i64, memory: i64) -> (u32, u32) {
        let cpus = match (quota, period) {
            (1.., 1..) => {
                u32::try_from(quota.saturating_add(period - 1) / period).unwrap_or(self.max_cpus)
            }
            _ => self.cpus,
        };
        let memory = match memory {
            1.. => u32::try_from(memory.saturating_add((1 << 20) - 1) >> 20)
                .unwrap_or(self.max_memory_mib)
                .saturating_add(self.overhead_mib),
            _ => self.memory_mib,
        };
        (cpus.clamp(1, self.max_cpus), memory.clamp(self.min_memory_mib, self.max_memory_mib))
    }
}

/// How long a guest may take: `[guest_timeouts]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestTimeouts {
    /// From the start of the VMM until the agent says that it serves.
    #[serde(with = "duration")]
    pub boot: Duration,
    /// A connection and its greeting.
    #[serde(with = "duration")]
    pub connect: Duration,
    /// A call.
    #[serde(with = "duration")]
    pub call: Duration,
    /// Making or starting a container or an exec.
    #[serde(with = "duration")]
    pub create: Duration,
    /// How long an exit waits for the output before it.
    #[serde(with = "duration")]
    pub drain: Duration,
    /// How long a guest may take to power off before its VMM is killed.
    #[serde(with = "duration")]
    pub shutdown: Duration,
    /// How long a container may outlive its SIGKILL before its machine is killed; longer than
    /// `drain`.
    #[serde(with = "duration")]
    pub kill: Duration,
    /// Between two looks at a guest's health, at which its clock is set, too; `0s`: none.
    #[serde(with = "duration")]
    pub health: Duration,
    /// So many looks in a row have to fail for a guest to be unwell; then its VMM is killed. 0:
    /// it is only logged.
    pub unwell: u32,
}

impl Default for GuestTimeouts {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            boot: s(60),
            connect: s(10),
            call: s(10),
            create: s(60),
            drain: s(10),
            shutdown: s(3),
            kill: s(30),
            health: s(30),
            unwell: 0,
        }
    }
}

impl Config {
    /// Reads and checks a file with its drop-ins; without one the defaults.
    ///
    /// # Errors
    /// A text that names file, line and key.
    pub fn load(file: Option<&Path>) -> Result<(CommonConfig, Self), String> {
        let adopt = |common: &CommonConfig, own: &mut Self| {
            own.heeds_annotation = common.heeds(VMM_ANNOTATION);
        };
        kuasar_daemon::config::load_checked(file, adopt, Self::check)
    }

    /// What a guest of this VMM boots: as configured, else as installed in `/usr/share/kuasar` or
    /// `/usr/local/share/kuasar`, else, for a program that runs in a checkout's `target/…`, as
    /// `make guest` has left it in `target/guest`. For a machine whose devices are all on PCI that is the
    /// kernel with PCI, where there is one.
    ///
    /// # Errors
    /// A text that says what is missing and what to do.
    pub fn images(&self, kind: Kind) -> Result<Images, String> {
        self.guest.find(self.kernels(kind))
    }

    /// Names of kernels for this VMM, the best first.
    fn kernels(&self, kind: Kind) -> &'static [&'static str] {
        match kind {
            Kind::Qemu if self.qemu.machine != Machine::Q35 => &["vmlinux"],
            Kind::StratoVirt | Kind::Firecracker => &["vmlinux"],
            Kind::Qemu | Kind::CloudHypervisor => &["vmlinux-pci", "vmlinux"],
        }
    }

    /// What is wrong with it, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check(&self) -> Result<(), String> {
        let s = &self.size;
        for (key, value) in [("cpus", s.cpus), ("max_cpus", s.max_cpus)] {
            if value == 0 || value > 255 {
                return Err(format!("size.{key} = {value}: 1 to 255"));
            }
        }
        if s.min_memory_mib < 32 || s.min_memory_mib > s.max_memory_mib {
            return Err(format!(
                "size.min_memory_mib = {}: at least 32 and at most size.max_memory_mib",
                s.min_memory_mib
            ));
        }
        if s.memory_mib < s.min_memory_mib || s.memory_mib > s.max_memory_mib {
            return Err(format!(
                "size.memory_mib = {}: between size.min_memory_mib and size.max_memory_mib",
                s.memory_mib
            ));
        }
        if self.guest.shm_size < 4096 {
            return Err(format!("guest.shm_size = {}: at least 4096", self.guest.shm_size));
        }
        self.guest.check_debug()?;
        let t = &self.guest_timeouts;
        for (key, value) in [
            ("boot", t.boot),
            ("connect", t.connect),
            ("call", t.call),
            ("create", t.create),
            ("drain", t.drain),
            ("shutdown", t.shutdown),
            ("kill", t.kill),
        ] {
            if value.is_zero() || value > Duration::from_secs(3600) {
                return Err(format!("guest_timeouts.{key}: more than nothing and at most 1h"));
            }
        }
        let ready = self.template.ready;
        if ready.is_zero() || ready > Duration::from_secs(3600) {
            return Err("template.ready: more than nothing and at most 1h".into());
        }
        if self.template.most == 0 || self.template.most > 64 {
            return Err(format!("template.most = {}: 1 to 64", self.template.most));
        }
        if self.share == ShareBy::Roots {
            return Err(
                "share = \"virtiofs-roots\": it follows from share = \"virtiofs\" and another \
                        helpers.root_cache than helpers.cache"
                    .into(),
            );
        }
        let t = &self.template;
        if t.pool > MOST_POOLED {
            return Err(format!("template.pool = {}: at most {MOST_POOLED}", t.pool));
        }
        if t.pool > 0 && !t.enabled {
            return Err(format!(
                "template.pool = {}: machines of the pool are copies of a template: set \
                 template.enabled = true",
                t.pool
            ));
        }
        if t.enabled && self.share == ShareBy::Ninep {
            return Err("template.enabled = true: QEMU restores no machine with 9p: set share = \
                        \"virtiofs\", or template.enabled = false"
                .into());
        }
        if t.enabled && matches!(self.qemu.channel, Chosen::Console | Chosen::Vsock) {
            return Err(format!(
                "template.enabled = true: QEMU copies no machine with qemu.channel = \"{}\": set \
                 channel to \"auto\", \"hybrid\" or \"serial\" below [qemu], or template.enabled = \
                 false",
                if self.qemu.channel == Chosen::Vsock { "vsock" } else { "console" }
            ));
        }
        if t.refill > Duration::from_secs(3600) {
            return Err("template.refill: at most 1h".into());
        }
        self.copy.check()?;
        self.jail.check()
    }

    /// The VMM of a pod: by annotation where allowed, by runtime type, or the default.
    ///
    /// # Errors
    /// A text for an annotation that names none.
    pub fn vmm_of(
        &self,
        runtime: &str,
        annotations: &HashMap<String, String>,
    ) -> Result<Vmm, String> {
        match annotations.get(VMM_ANNOTATION).filter(|_| self.heeds_annotation) {
            Some(name) => Vmm::of(name)
                .ok_or_else(|| format!("annotation {VMM_ANNOTATION}: there is no VMM {name:.40?}")),
            None => Ok(*self.runtimes.get(runtime).unwrap_or(&self.vmm)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_as_large_as_their_pods() {
        let size = SizeConfig::default();
        assert_eq!(size.of(0, 0, 0), (1, 256));
        assert_eq!(size.of(150_000, 100_000, 512 << 20), (2, 512 + 48));
        assert_eq!(size.of(100_000, 100_000, 1), (1, 96));
        assert_eq!(size.of(i64::MAX, 1, i64::MAX), (32, 64 << 10));
        assert_eq!(size.of(-1, 100_000, -1), (1, 256));
        assert_eq!(size.growth(1, 256), (Range::fixed(1), Range::fixed(256)));
        let size = SizeConfig { grow_cpus: 3, grow_memory_mib: u32::MAX, ..size };
        let to = |at_boot, most| Range { at_boot, most };
        assert_eq!(size.growth(1, 256), (to(1, 4), to(256, 64 << 10)));
        assert_eq!(size.growth(32, 64 << 10), (Range::fixed(32), Range::fixed(64 << 10)));
    }

    #[test]
    fn mistakes_are_named() {
        let check = |text: &str| toml::from_str::<Config>(text).unwrap().check().unwrap_err();
        assert!(check("size = { cpus = 0 }").contains("size.cpus"));
        assert!(check("size = { memory_mib = 1 }").contains("size.memory_mib"));
        assert!(check("guest_timeouts = { boot = '0s' }").contains("guest_timeouts.boot"));
        assert!(check("template = { pool = 1 }").contains("template.enabled = true"));
        assert!(check("template = { enabled = true, pool = 65 }").contains("template.pool = 65"));
        let ninep = "share = '9p'\ntemplate = { enabled = true }";
        assert!(check(ninep).contains("share = \"virtiofs\""));
        for channel in ["console", "vsock"] {
            let text =
                format!("qemu = {{ channel = '{channel}' }}\ntemplate = {{ enabled = true }}");
            let said = check(&text);
            assert!(said.contains(channel) && said.contains("\"serial\" below [qemu]"), "{said}");
        }
        assert!(toml::from_str::<Config>("stratovirt = { channel = 'hybrid' }").is_err());
        assert!(check("template = { refill = '2h' }").contains("template.refill"));
        assert!(toml::from_str::<Config>("vmm = 'bochs'").is_err());
        assert!(toml::from_str::<Config>("nonsense = 1").is_err());
        Config::default().check().unwrap();
    }

    #[test]
    fn an_annotation_counts_only_where_it_is_allowed() {
        let annotations = HashMap::from([(VMM_ANNOTATION.to_owned(), "bochs".to_owned())]);
        let mut config = Config::default();
        assert_eq!(config.vmm_of("", &annotations), Ok(Vmm::Qemu));
        config.heeds_annotation = true;
        assert!(config.vmm_of("", &annotations).is_err());
    }

    #[test]
    fn a_vmm_has_the_same_name_in_the_file_in_an_annotation_and_in_messages() {
        let config = Config { heeds_annotation: true, ..Config::default() };
        for name in ["qemu", "cloud-hypervisor", "stratovirt", "firecracker"] {
            let annotations = HashMap::from([(VMM_ANNOTATION.to_owned(), name.to_owned())]);
            let chosen = config.vmm_of("", &annotations).unwrap();
            assert_eq!(chosen.kind().to_string(), name);
            let file: Config = toml::from_str(&format!("vmm = '{name}'")).unwrap();
            assert_eq!(file.vmm, chosen);
        }
    }

    #[test]
    fn the_packaged_file_has_every_key_at_its_default() {
        let packaged = include_str!("../../../packaging/vmm-sandboxer.toml");
        let is_key = |line: &&str| {
            line.strip_prefix('#').is_some_and(|rest| {
                rest.split_once(" = ").is_some_and(|(key, _)| {
                    key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                })
            })
        };
        let on: Vec<&str> = packaged
            .lines()
            .map(|line| if is_key(&line) { &line[1..] } else { line })
            // Paths that have no fixed default.
            .filter(|line| {
                !["kernel", "initrd", "image", "dir = \"/run/kuasar-vmm/templates"]
                    .iter()
                    .any(|key| line.starts_with(key))
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmm-sandboxer.toml");
        std::fs::write(&file, on.join("\n")).unwrap();
        let (_, config) = Config::load(Some(&file)).unwrap();
        assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn a_machine_with_pci_boots_the_kernel_with_pci_where_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(dir.path().join(name), b"\x7fELF").unwrap();
        write("initramfs.cpio");
        write("vmlinux");
        let dirs = [dir.path().to_owned()];
        let found = |kernels: &[&str]| {
            let images = GuestConfig::default().find_in(&dirs, kernels).unwrap();
            images.kernel.file_name().unwrap().to_owned()
        };
        let mut config = Config::default();
        assert_eq!(config.kernels(Kind::Qemu), ["vmlinux"]);
        config.qemu.machine = Machine::Q35;
        assert_eq!(found(config.kernels(Kind::Qemu)), "vmlinux");
        write("vmlinux-pci");
        assert_eq!(found(config.kernels(Kind::Qemu)), "vmlinux-pci");
        assert_eq!(found(config.kernels(Kind::CloudHypervisor)), "vmlinux-pci");
        assert_eq!(found(config.kernels(Kind::Firecracker)), "vmlinux");
    }
}
