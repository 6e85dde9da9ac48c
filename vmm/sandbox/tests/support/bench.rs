//! The bench of the conformance suite: a VMM under test with its jail and guest, and conversations
//! with the program in the guest.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use vmm_sandboxer::jail::JailConfig;
use vmm_sandboxer::network::{self, Taps};
use vmm_sandboxer::vmm::cloud_hypervisor::{CloudHypervisor, CloudHypervisorConfig};
use vmm_sandboxer::vmm::firecracker::{Firecracker, FirecrackerConfig};
use vmm_sandboxer::vmm::helpers::HelpersConfig;
use vmm_sandboxer::vmm::process::Local;
use vmm_sandboxer::vmm::qemu::{Accel, Machine, Qemu, QemuConfig};
use vmm_sandboxer::vmm::stratovirt::{StratoVirt, StratoVirtConfig};
use vmm_sandboxer::vmm::{
    Boot, Channel, Console, Disk, DiskFormat, Feature, Kind, Launcher, Nic, Processes, Range, Root,
    Vm, VmSpec, Vmm, console, vsock,
};

use super::guest;

/// How long a guest may take for anything: `KUASAR_TEST_PATIENCE` in seconds, or two minutes.
pub fn patience() -> Duration {
    let given = std::env::var("KUASAR_TEST_PATIENCE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(given.unwrap_or(120))
}

pub const READY: u32 = 1023;
pub const CONTROL: u32 = 1024;

/// One machine after the other, in all tests of this file.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from);
    kuasar_host::process::find_program(&path)
}

/// A VMM under test, and what it takes.
pub struct Bench {
    pub vmm: Arc<dyn Vmm>,
    pub processes: Arc<dyn Processes>,
    pub owner: Option<(u32, u32)>,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub dir: tempfile::TempDir,
    _turn: tokio::sync::MutexGuard<'static, ()>,
}

impl Drop for Bench {
    /// A test that fails in the midst of a machine's life has not removed it.
    fn drop(&mut self) {
        let _ = kuasar_host::mount::unmount_below(self.dir.path());
    }
}

macro_rules! need {
    ($what:expr, $($reason:tt)*) => {
        match $what {
            Some(there) => there,
            None => {
                println!("skipped: {}", format!($($reason)*));
                return None;
            }
        }
    };
}

/// A VMM, with the machine type where it has several.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    Qemu(Machine),
    CloudHypervisor,
    Firecracker,
    StratoVirt,
}

/// A VMM with the guest kernel that the environment names.
#[allow(dead_code)] // each of the two suites uses one of these
pub async fn bench(target: Target) -> Option<Bench> {
    bench_with(target, None).await
}

/// A VMM with this guest kernel.
pub async fn bench_with(target: Target, kernel_file: Option<PathBuf>) -> Option<Bench> {
    let turn = TURN.lock().await;
    let (program, kernel) = match target {
        Target::Qemu(Machine::Microvm) => {
            (program("KUASAR_TEST_QEMU", "qemu-system-x86_64"), "KUASAR_TEST_KERNEL")
        }
        Target::Qemu(_) => {
            (program("KUASAR_TEST_QEMU", "qemu-system-x86_64"), "KUASAR_TEST_KERNEL_PCI")
        }
        Target::CloudHypervisor => {
            let found = program("KUASAR_TEST_CLOUD_HYPERVISOR", "cloud-hypervisor");
            (found, "KUASAR_TEST_KERNEL_KVM")
        }
        Target::Firecracker => {
            (program("KUASAR_TEST_FIRECRACKER", "firecracker"), "KUASAR_TEST_KERNEL_KVM")
        }
        Target::StratoVirt => {
            (program("KUASAR_TEST_STRATOVIRT", "stratovirt"), "KUASAR_TEST_KERNEL_FLAT")
        }
    };
    let path = need!(program, "no binary of {target:?}");
    let virtiofsd = self::program("KUASAR_TEST_VIRTIOFSD", "virtiofsd");
    let virtiofsd = need!(virtiofsd, "no virtiofsd");
    let vsock = self::program("KUASAR_TEST_VSOCK", "vhost-device-vsock");
    let vsock = match target {
        Target::Qemu(_) => need!(vsock, "no vhost-device-vsock"),
        _ => PathBuf::new(),
    };
    if !matches!(target, Target::Qemu(_)) {
        need!(Path::new("/dev/kvm").exists().then_some(()), "no /dev/kvm");
    }
    let found = kernel_file.or_else(|| std::env::var_os(kernel).map(PathBuf::from));
    let found = found.filter(|path| path.is_file());
    let kernel = need!(found, "no guest kernel in {kernel}");
    let initrd = guest::initramfs().unwrap();
    let processes: Arc<dyn Processes> = Arc::new(Local::new().unwrap());
    let jail = nix::unistd::geteuid().is_root().then(|| {
        let mut jail = JailConfig {
            jailer: vec![env!("CARGO_BIN_EXE_vmm-sandboxer").into(), "jail".into()],
            ..JailConfig::default()
        };
        let more = std::env::var("KUASAR_TEST_LIBRARIES").unwrap_or_default();
        jail.libraries.extend(more.split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from));
        jail
    });
    let launcher = Launcher::new(processes.clone(), jail);
    let owner = launcher.owner();
    let own = env!("CARGO_BIN_EXE_vmm-sandboxer").into();
    let helpers = HelpersConfig { virtiofsd, vsock, own, ..HelpersConfig::default() };
    // A guest whose kernel is interpreted moves its balloon by a few MiB a second.
    let slow = patience().as_millis() as u64;
    let vmm: Arc<dyn Vmm> = match target {
        Target::Qemu(machine) => {
            let accel = match std::env::var("KUASAR_TEST_ACCEL").as_deref() {
                Ok("kvm") => Accel::Kvm,
                _ => Accel::Tcg,
            };
            let mut config =
                QemuConfig { path, machine, accel, root_ports: 4, ..QemuConfig::default() };
            config.data_dirs.extend(std::env::var_os("KUASAR_TEST_QEMU_DATA").map(PathBuf::from));
            Arc::new(Qemu::new(config, helpers, launcher))
        }
        Target::CloudHypervisor => {
            let config = CloudHypervisorConfig {
                path,
                snapshot_timeout_ms: slow,
                memory_still_ms: 20_000,
                ..CloudHypervisorConfig::default()
            };
            Arc::new(CloudHypervisor::new(config, helpers, launcher))
        }
        Target::Firecracker => {
            let config = FirecrackerConfig {
                path,
                snapshot_timeout_ms: slow,
                memory_still_ms: 20_000,
                ..FirecrackerConfig::default()
            };
            Arc::new(Firecracker::new(config, launcher))
        }
        Target::StratoVirt => {
            let off = std::env::var("KUASAR_TEST_STRATOVIRT_SECCOMP").is_ok_and(|is| is == "off");
            let config = StratoVirtConfig {
                path,
                seccomp: !off,
                snapshot_timeout_ms: slow,
                memory_still_ms: 20_000,
                ..StratoVirtConfig::default()
            };
            Arc::new(StratoVirt::new(config, helpers, launcher))
        }
    };
    // Below /tmp: socket paths are short, and the jail's user may pass.
    let dir = tempfile::Builder::new().prefix("kvm").tempdir().unwrap();
    Some(Bench { vmm, processes, owner, kernel, initrd, dir, _turn: turn })
}

impl Bench {
    pub fn uds(&self) -> PathBuf {
        self.dir.path().join("v/s")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.path().join("vm/console.log")
    }

    pub fn root(&self) -> Root {
        if self.initrd.extension().is_some_and(|kind| kind == "erofs") {
            let disk = Disk::open("root", &self.initrd, DiskFormat::Raw, true).unwrap();
            return Root::Image { disk, fstype: "erofs".into() };
        }
        Root::Initrd(self.initrd.clone())
    }

    pub fn params(&self, channel: &str) -> Vec<String> {
        let mut params = vec![format!("probe.channel={channel}")];
        if self.vmm.kind() != Kind::Qemu {
            let more = std::env::var("KUASAR_TEST_PARAMS").unwrap_or_default();
            params.extend(more.split_whitespace().map(str::to_owned));
        }
        params
    }

    /// The channel that this VMM is used with.
    pub fn channel(&self) -> &'static str {
        if self.vmm.features().has(Feature::HybridVsock) { "vsock" } else { "serial" }
    }

    /// The one with which it can be saved.
    pub fn saved_channel(&self) -> &'static str {
        match self.vmm.kind() {
            Kind::Qemu | Kind::StratoVirt => "serial",
            _ => "vsock",
        }
    }

    /// Talks to the probe of a machine that has just been booted or restored.
    pub async fn probe(&self, spec: &VmSpec, fresh: bool) -> Probe<UnixStream> {
        if let Channel::HybridVsock { .. } = spec.channel {
            return Probe::dial(self).await;
        }
        let mut probe = Probe::serial(spec).await;
        if fresh {
            assert!(probe.line().await.contains("\"version\":1"));
        }
        probe
    }

    pub fn spec(&self, channel: &str) -> VmSpec {
        let dir = self.dir.path().join("vm");
        VmSpec {
            id: "test".into(),
            cpus: Range::fixed(1),
            memory_mib: Range::fixed(128),
            hugepages: false,
            boot: Boot {
                kernel: self.kernel.clone(),
                root: self.root(),
                params: self.params(channel),
            },
            shares: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            channel: match channel {
                "vsock" => Channel::HybridVsock { cid: 3, uds: self.uds() },
                "serial" => Channel::Serial {
                    socket: dir.join("agent.sock"),
                    console: self.vmm.kind() == Kind::StratoVirt,
                    uds: None,
                },
                _ => Channel::None,
            },
            entropy: true,
            console: Console { log: self.log(), limit: 64 << 10 },
            netns: None,
            cgroups: Vec::new(),
            dir,
        }
    }

    /// Starts a machine and waits until its guest says that it is ready.
    pub async fn boot(&self, spec: &VmSpec) -> Arc<dyn Vm> {
        match &spec.channel {
            Channel::HybridVsock { uds, .. } => {
                let listener = vsock::bind(uds, READY, self.owner).unwrap();
                let vm = self.spawn(spec).await;
                self.welcome(&vm, listener).await;
                vm
            }
            _ => self.spawn(spec).await,
        }
    }

    pub async fn spawn(&self, spec: &VmSpec) -> Arc<dyn Vm> {
        let started = Instant::now();
        let vm = self.vmm.spawn(spec).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        println!("{}: spawned after {:?}", self.vmm.name(), started.elapsed());
        vm
    }

    pub async fn welcome(&self, vm: &Arc<dyn Vm>, listener: UnixListener) {
        let started = Instant::now();
        let ready = timeout(patience(), async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            assert!(line.contains("\"version\":1"), "{line}");
            stream.write_all(b"{\"token\":\"\"}\n").await.unwrap();
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            assert_eq!(line, "{\"ok\":true}\n");
        });
        let ready = tokio::select! {
            ready = ready => ready.is_ok(),
            exit = vm.wait() => panic!("ended: {exit:?}\n{}", console::tail(&self.log(), 4000)),
        };
        assert!(ready, "not ready:\n{}", console::tail(&self.log(), 4000));
        println!("{}: ready after {:?}", self.vmm.name(), started.elapsed());
    }

    pub async fn end(&self, vm: &Arc<dyn Vm>) {
        let state = vm.state();
        vm.stop(Duration::ZERO).await.unwrap();
        vm.release().await;
        let records = state.helpers.iter().chain([&state.vmm]);
        for record in records {
            assert!(record.identity.open().is_none(), "{} is left", record.name);
        }
        assert!(!self.dir.path().join("vm/qmp.sock").exists());
    }
}

/// A conversation with the probe.
pub struct Probe<S>(pub BufReader<S>);

impl Probe<UnixStream> {
    pub async fn dial(bench: &Bench) -> Self {
        let stream = vsock::dial(&bench.uds(), CONTROL, patience()).await;
        Self(BufReader::new(stream.unwrap_or_else(|error| {
            panic!("{}\n{}", error.chain(), console::tail(&bench.log(), 4000))
        })))
    }

    pub async fn serial(spec: &VmSpec) -> Self {
        let Channel::Serial { socket, .. } = &spec.channel else { panic!() };
        Self(BufReader::new(UnixStream::connect(socket).await.unwrap()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Probe<S> {
    pub async fn line(&mut self) -> String {
        let mut line = String::new();
        timeout(patience(), self.0.read_line(&mut line)).await.expect("an answer").unwrap();
        assert!(line.ends_with('\n'), "the guest hung up");
        line.trim_end().into()
    }

    pub async fn ask(&mut self, line: &str) -> String {
        self.tell(line).await;
        self.line().await
    }

    pub async fn tell(&mut self, line: &str) {
        self.0.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// Asks until the answer is right: the guest learns of a plugged device a little later.
    pub async fn until(&mut self, question: &str, right: impl Fn(&str) -> bool) -> String {
        let until = Instant::now() + patience();
        loop {
            let answer = self.ask(question).await;
            if right(&answer) {
                return answer;
            }
            assert!(Instant::now() < until, "{question}: {answer}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Name of the disk with a serial number, of the probe's list.
pub fn named(disks: &str, serial: &str) -> Option<String> {
    let mut all = disks.split(' ').filter_map(|disk| disk.split_once(':'));
    all.find(|(number, _)| *number == serial).map(|(_, name)| name.to_owned())
}

pub fn image(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    let mut file = fs::File::create(&path).unwrap();
    writeln!(file, "{content}").unwrap();
    file.set_len(4 << 20).unwrap();
    path
}

/// A tap device in a network namespace of its own.
pub fn tap() -> Option<Arc<std::os::fd::OwnedFd>> {
    use std::os::fd::{AsRawFd, OwnedFd};
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
        let file = fs::File::options().read(true).write(true).open("/dev/net/tun").ok()?;
        // `struct ifreq`: name, then flags IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tap0");
        request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which has 40 bytes.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
        (r == 0).then(|| Arc::new(OwnedFd::from(file)))
    })
    .join()
    .unwrap()
}

pub fn nic(id: &str, last: u8, tap: Arc<std::os::fd::OwnedFd>) -> Nic {
    Nic { id: id.into(), mac: [2, 0, 0, 0, 0, last], mtu: 1500, tap: vec![tap], tap_name: None }
}

/// A NIC with a tap of this name, and the network namespace that has nothing else: as root.
#[allow(dead_code)] // each suite uses its own of these
pub fn nic_alone(bench: &Bench, last: u8, name: &str) -> Option<(Arc<std::os::fd::OwnedFd>, Nic)> {
    let taps = match bench.vmm.opens_taps() {
        true => Taps::Named { owner: bench.owner.map_or(0, |(uid, _)| uid) },
        false => Taps::Held { queues: 1 },
    };
    let (netns, tap) = network::alone(name, taps).ok()?;
    let tap = tap.into_iter().map(Arc::new).collect();
    let (mac, tap_name) = ([2, 0, 0, 0, 0, last], Some((name.into(), None)));
    Some((Arc::new(netns), Nic { id: "net0".into(), mac, mtu: 1500, tap, tap_name }))
}

/// Saves a machine, where this host's KVM can.
#[allow(dead_code)]
pub async fn save(bench: &Bench, vm: &Arc<dyn Vm>, dir: &Path) -> Option<()> {
    match vm.snapshot(dir).await {
        Ok(()) => Some(()),
        // A nested KVM does not give everything away.
        Err(error) if error.chain().contains("GetNestedState") => {
            println!("skipped: this host's KVM cannot save a machine: {}", error.chain());
            bench.end(vm).await;
            None
        }
        Err(error) => panic!("{}", error.chain()),
    }
}

/// Each test with each VMM, in a module of its name.
macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        suite!(@ qemu_microvm, Target::Qemu(Machine::Microvm), $($test)*);
        suite!(@ qemu_q35, Target::Qemu(Machine::Q35), $($test)*);
        suite!(@ cloud_hypervisor, Target::CloudHypervisor, $($test)*);
        suite!(@ firecracker, Target::Firecracker, $($test)*);
        suite!(@ stratovirt, Target::StratoVirt, $($test)*);
    };
    (@ $name:ident, $target:expr, $($test:ident)*) => {
        mod $name {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let _ = super::$test($target).await;
            })*
        }
    };
}
