//! One suite for every VMM: what a machine of [`Vmm`] does with a real guest.
//!
//! Programs come from the environment, or from `PATH`; without one the tests that need it print
//! `skipped: …`. A missing capability must be a typed `Unsupported`.
//!
//! | variable | |
//! |---|---|
//! | `KUASAR_TEST_QEMU`, `KUASAR_TEST_QEMU_DATA` | QEMU, and the directory of its firmware |
//! | `KUASAR_TEST_VIRTIOFSD`, `KUASAR_TEST_VSOCK` | virtiofsd, `vhost-device-vsock` |
//! | `KUASAR_TEST_KERNEL` | guest kernel with virtio-mmio, virtiofs and vsock built in |
//! | `KUASAR_TEST_KERNEL_PCI` | the same with PCI, ACPI and hot-plug |
//! | `KUASAR_TEST_MKFS_EROFS` | makes the guest's root an EROFS disk instead of an initramfs |
//! | `KUASAR_TEST_LIBRARIES` | further directories (`:` between) that a jail must show |
//! | `KUASAR_TEST_ACCEL` | `tcg` (default) or `kvm` |
//!
//! As root the machines run jailed. Boots are one at a time: with TCG each takes a whole CPU.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // a test

#[path = "support/guest.rs"]
mod guest;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use vmm_sandboxer::jail::JailConfig;
use vmm_sandboxer::vmm::helpers::HelpersConfig;
use vmm_sandboxer::vmm::process::Local;
use vmm_sandboxer::vmm::qemu::{Accel, Machine, Qemu, QemuConfig};
use vmm_sandboxer::vmm::{
    Boot, Channel, Console, Disk, DiskFormat, Error, Event, Feature, Launcher, Nic, Processes,
    Range, Root, Share, ShareKind, Vm, VmSpec, Vmm, console, vsock,
};

const PATIENCE: Duration = Duration::from_secs(60);
const READY: u32 = 1023;
const CONTROL: u32 = 1024;

/// One machine after the other, in all tests of this file.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from);
    kuasar_host::process::find_program(&path)
}

/// A VMM under test, and what it takes.
struct Bench {
    vmm: Arc<dyn Vmm>,
    processes: Arc<dyn Processes>,
    owner: Option<(u32, u32)>,
    kernel: PathBuf,
    initrd: PathBuf,
    dir: tempfile::TempDir,
    _turn: tokio::sync::MutexGuard<'static, ()>,
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

async fn bench(machine: Machine) -> Option<Bench> {
    let turn = TURN.lock().await;
    let qemu = need!(program("KUASAR_TEST_QEMU", "qemu-system-x86_64"), "no qemu-system-x86_64");
    let virtiofsd = need!(program("KUASAR_TEST_VIRTIOFSD", "virtiofsd"), "no virtiofsd");
    let vsock = need!(program("KUASAR_TEST_VSOCK", "vhost-device-vsock"), "no vhost-device-vsock");
    let variable = match machine {
        Machine::Microvm => "KUASAR_TEST_KERNEL",
        _ => "KUASAR_TEST_KERNEL_PCI",
    };
    let kernel = std::env::var_os(variable).map(PathBuf::from);
    let kernel = need!(kernel.filter(|path| path.is_file()), "no guest kernel in {variable}");
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
    let accel = match std::env::var("KUASAR_TEST_ACCEL").as_deref() {
        Ok("kvm") => Accel::Kvm,
        _ => Accel::Tcg,
    };
    let mut config =
        QemuConfig { path: qemu, machine, accel, root_ports: 4, ..QemuConfig::default() };
    config.data_dirs.extend(std::env::var_os("KUASAR_TEST_QEMU_DATA").map(PathBuf::from));
    let helpers = HelpersConfig { virtiofsd, vsock, ..HelpersConfig::default() };
    let vmm = Arc::new(Qemu::new(config, helpers, launcher));
    // Below /tmp: socket paths are short, and the jail's user may pass.
    let dir = tempfile::Builder::new().prefix("kvm").tempdir().unwrap();
    Some(Bench { vmm, processes, owner, kernel, initrd, dir, _turn: turn })
}

impl Bench {
    fn uds(&self) -> PathBuf {
        self.dir.path().join("v/s")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("vm/console.log")
    }

    fn root(&self) -> Root {
        if self.initrd.extension().is_some_and(|kind| kind == "erofs") {
            let disk = Disk::open("root", &self.initrd, DiskFormat::Raw, true).unwrap();
            return Root::Image { disk, fstype: "erofs".into() };
        }
        Root::Initrd(self.initrd.clone())
    }

    fn spec(&self, channel: &str) -> VmSpec {
        let dir = self.dir.path().join("vm");
        VmSpec {
            id: "test".into(),
            cpus: Range::fixed(1),
            memory_mib: Range::fixed(128),
            hugepages: false,
            boot: Boot {
                kernel: self.kernel.clone(),
                root: self.root(),
                params: vec!["init=/init".into(), format!("probe.channel={channel}")],
            },
            shares: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            channel: match channel {
                "vsock" => Channel::HybridVsock { cid: 3, uds: self.uds() },
                "serial" => Channel::Serial { socket: dir.join("agent.sock") },
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
    async fn boot(&self, spec: &VmSpec) -> Arc<dyn Vm> {
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

    async fn spawn(&self, spec: &VmSpec) -> Arc<dyn Vm> {
        let started = Instant::now();
        let vm = self.vmm.spawn(spec).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        println!("{}: spawned after {:?}", self.vmm.name(), started.elapsed());
        vm
    }

    async fn welcome(&self, vm: &Arc<dyn Vm>, listener: UnixListener) {
        let started = Instant::now();
        let ready = timeout(PATIENCE, async {
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

    async fn end(&self, vm: &Arc<dyn Vm>) {
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
struct Probe<S>(BufReader<S>);

impl Probe<UnixStream> {
    async fn dial(bench: &Bench) -> Self {
        let stream = vsock::dial(&bench.uds(), CONTROL, PATIENCE).await;
        Self(BufReader::new(stream.unwrap_or_else(|error| {
            panic!("{}\n{}", error.chain(), console::tail(&bench.log(), 4000))
        })))
    }

    async fn serial(spec: &VmSpec) -> Self {
        let Channel::Serial { socket } = &spec.channel else { panic!() };
        Self(BufReader::new(UnixStream::connect(socket).await.unwrap()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Probe<S> {
    async fn line(&mut self) -> String {
        let mut line = String::new();
        timeout(PATIENCE, self.0.read_line(&mut line)).await.expect("an answer").unwrap();
        assert!(line.ends_with('\n'), "the guest hung up");
        line.trim_end().into()
    }

    async fn ask(&mut self, line: &str) -> String {
        self.tell(line).await;
        self.line().await
    }

    async fn tell(&mut self, line: &str) {
        self.0.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// Asks until the answer is right: the guest learns of a plugged device a little later.
    async fn until(&mut self, question: &str, right: impl Fn(&str) -> bool) -> String {
        let until = Instant::now() + PATIENCE;
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

fn image(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    let mut file = fs::File::create(&path).unwrap();
    writeln!(file, "{content}").unwrap();
    file.set_len(4 << 20).unwrap();
    path
}

/// A tap device in a network namespace of its own.
fn tap() -> Option<Arc<std::os::fd::OwnedFd>> {
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

fn nic(id: &str, last: u8, tap: Arc<std::os::fd::OwnedFd>) -> Nic {
    Nic { id: id.into(), mac: [2, 0, 0, 0, 0, last], mtu: 1500, tap: vec![tap], tap_name: None }
}

async fn boots_talks_shares_and_its_exit_is_seen(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let share = bench.dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("hello"), "from the host\n").unwrap();
    let mut spec = bench.spec("vsock");
    spec.shares.push(Share {
        tag: "kuasar".into(),
        dir: share.clone(),
        kind: ShareKind::Virtiofs,
        read_only: false,
    });
    let image = image(bench.dir.path(), "disk", "cold");
    spec.disks.push(Disk::open("cold", &image, DiskFormat::Raw, true).unwrap());
    let vm = bench.boot(&spec).await;
    vm.ping().await.unwrap();

    let mut probe = Probe::dial(&bench).await;
    assert_eq!(probe.ask("echo hello").await, "hello");
    let mut second = Probe::dial(&bench).await;
    assert_eq!(second.ask("echo again").await, "again");
    assert_eq!(probe.ask("mount kuasar virtiofs").await, "ok");
    assert_eq!(probe.ask("read /run/kuasar/hello").await, "from the host");
    assert_eq!(probe.ask("write /run/kuasar/back guest").await, "ok");
    assert_eq!(fs::read_to_string(share.join("back")).unwrap(), "guest");
    let disks = probe.ask("disks").await;
    let name = disks.split(' ').find_map(|disk| disk.strip_prefix("cold:")).expect(&disks);
    assert_eq!(probe.ask(&format!("read /dev/{name}")).await, "cold");

    let mut events = vm.events();
    probe.tell("poweroff").await;
    let exit = timeout(PATIENCE, vm.wait()).await.expect("an exit").unwrap();
    assert_eq!(exit.status, 0);
    let told = std::iter::from_fn(|| events.try_recv().ok()).collect::<Vec<_>>();
    assert!(told.iter().any(|event| matches!(event, Event::Shutdown { .. })), "{told:?}");
    assert!(matches!(vm.ping().await, Err(Error::Gone)));
    bench.end(&vm).await;
    assert!(console::tail(&bench.log(), 10_000).contains("probe: "));
    Some(())
}

async fn a_killed_one_is_seen_within_100_ms_and_helpers_go_with_it(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let spec = bench.spec("vsock");
    let vm = bench.boot(&spec).await;
    let waiting = {
        let vm = vm.clone();
        tokio::spawn(async move { (vm.wait().await, Instant::now()) })
    };
    let killed = Instant::now();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vm.pid() as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let (exit, seen) = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(exit.unwrap().status, 137);
    let took = seen - killed;
    assert!(took < Duration::from_millis(100), "{took:?}");
    bench.end(&vm).await;
    // And again, with a helper instead.
    let vm = bench.boot(&spec).await;
    let mut events = vm.events();
    let helper = vm.state().helpers[0].identity.pid;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(helper as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let event = timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, Event::HelperEnded { status: 137, .. }), "{event:?}");
    bench.end(&vm).await;
    Some(())
}

async fn another_daemon_takes_it_up_again(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let vm = bench.boot(&bench.spec("vsock")).await;
    if vm.features().has(Feature::DiskHotplug) {
        let image = image(bench.dir.path(), "disk", "kept");
        vm.attach_disk(&Disk::open("kept", &image, DiskFormat::Raw, true).unwrap()).await.unwrap();
    }
    // As written to a journal and read from it.
    let before_plugging = {
        let mut state = vm.state();
        if let Some(slots) = state.driver.get_mut("slots") {
            slots["taken"] = serde_json::json!({});
        }
        serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap()
    };
    drop(vm);
    let vm = bench.vmm.reattach(before_plugging).await.unwrap();
    vm.ping().await.unwrap();
    assert_eq!(Probe::dial(&bench).await.ask("echo still").await, "still");
    if vm.features().has(Feature::DiskHotplug) {
        // The crash came before the journal's entry; QEMU knows better.
        let image = image(bench.dir.path(), "disk", "kept");
        let again = Disk::open("kept", &image, DiskFormat::Raw, true).unwrap();
        assert!(matches!(vm.attach_disk(&again).await, Err(Error::DeviceExists(_))));
        vm.detach("kept").await.unwrap();
    }
    // The console goes on.
    let mut probe = Probe::dial(&bench).await;
    probe.ask("write /dev/console after-the-restart").await;
    let until = Instant::now() + PATIENCE;
    while !console::tail(&bench.log(), 60_000).contains("after-the-restart") {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // One that ended while nobody looked has its real status.
    let state = vm.state();
    drop(vm);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(state.vmm.identity.pid as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    bench.processes.exit_of(state.vmm.cookie).await.unwrap();
    let vm = bench.vmm.reattach(state).await.unwrap();
    assert_eq!(vm.wait().await.unwrap().status, 137);
    bench.end(&vm).await;
    Some(())
}

async fn disks_and_nics_come_and_go(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let vm = bench.boot(&bench.spec("vsock")).await;
    let image = image(bench.dir.path(), "disk", "plugged");
    let disk = Disk::open("hot", &image, DiskFormat::Raw, false).unwrap();
    if !vm.features().has(Feature::DiskHotplug) {
        let error = vm.attach_disk(&disk).await.unwrap_err();
        assert!(matches!(&error, Error::Unsupported { way_out, .. } if way_out.contains("q35")));
        assert!(matches!(vm.detach("hot").await, Err(Error::Unsupported { .. })));
        bench.end(&vm).await;
        return Some(());
    }
    let mut probe = Probe::dial(&bench).await;
    // More often than there are ports: each comes back.
    for round in 0..6 {
        let started = Instant::now();
        vm.attach_disk(&disk).await.unwrap_or_else(|error| panic!("{round}: {}", error.chain()));
        let disks = probe.until("disks", |answer| answer.contains("hot:")).await;
        println!("round {round}: seen by the guest after {:?}", started.elapsed());
        let name = disks.split(' ').find_map(|disk| disk.strip_prefix("hot:")).unwrap();
        assert_eq!(probe.ask(&format!("read /dev/{name}")).await, "plugged");
        assert!(matches!(vm.attach_disk(&disk).await, Err(Error::DeviceExists(_))));
        vm.detach("hot").await.unwrap_or_else(|error| panic!("{round}: {}", error.chain()));
        assert!(!probe.ask("disks").await.contains("hot:"));
    }
    assert!(matches!(vm.detach("hot").await, Err(Error::NoDevice(_))));
    let own = |id: &str| {
        let path = self::image(bench.dir.path(), id, "x");
        Disk::open(id, &path, DiskFormat::Raw, false).unwrap()
    };
    for id in ["d0", "d1", "d2"] {
        vm.attach_disk(&own(id)).await.unwrap_or_else(|error| panic!("{id}: {}", error.chain()));
    }
    // An image is locked against a second writer: a failure that takes no port.
    let second = Disk::open("clash", &bench.dir.path().join("d0"), DiskFormat::Raw, false);
    let error = vm.attach_disk(&second.unwrap()).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }), "{}", error.chain());
    vm.attach_disk(&own("d3")).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(matches!(vm.attach_disk(&own("d4")).await, Err(Error::Exhausted(_))));
    vm.detach("d3").await.unwrap();

    match tap() {
        None => println!("skipped the NIC: no tap device can be made"),
        Some(tap) => {
            vm.attach_nic(&nic("eth0", 7, tap)).await.unwrap_or_else(|e| panic!("{}", e.chain()));
            probe.until("nics", |answer| answer.contains("02:00:00:00:00:07")).await;
            vm.detach("eth0").await.unwrap();
            assert!(!probe.ask("nics").await.contains("02:00:00:00:00:07"));
        }
    }
    bench.end(&vm).await;
    Some(())
}

async fn it_pauses_and_changes_size(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let mut spec = bench.spec("vsock");
    spec.memory_mib = Range { at_boot: 128, most: 256 };
    spec.cpus = Range { at_boot: 1, most: 2 };
    let vm = bench.boot(&spec).await;
    let mut probe = Probe::dial(&bench).await;

    vm.pause().await.unwrap();
    probe.tell("echo paused").await;
    let mut line = String::new();
    let silence = timeout(Duration::from_millis(300), probe.0.read_line(&mut line)).await;
    assert!(silence.is_err(), "a paused guest spoke: {line}");
    vm.resume().await.unwrap();
    assert_eq!(probe.line().await, "paused");

    assert!(vm.features().has(Feature::MemoryResize));
    let memory =
        async |probe: &mut Probe<UnixStream>| -> u32 { probe.ask("memory").await.parse().unwrap() };
    let small = vm.resize_memory(128).await.unwrap();
    assert_eq!(small, 128);
    let had = memory(&mut probe).await;
    let large = vm.resize_memory(256).await.unwrap();
    assert_eq!(large, 256);
    let has = memory(&mut probe).await;
    assert!(has >= had + 100, "{had} MiB, then {has} MiB");
    assert!(matches!(vm.resize_memory(512).await, Err(Error::Invalid(_))));

    if vm.features().has(Feature::CpuResize) {
        assert_eq!(probe.ask("cpus").await, "0");
        vm.resize_cpus(2).await.unwrap_or_else(|e| panic!("{}", e.chain()));
        probe.until("online", |answer| answer == "0-1").await;
        assert!(matches!(vm.resize_cpus(3).await, Err(Error::Invalid(_))));
        vm.resize_cpus(1).await.unwrap_or_else(|e| panic!("{}", e.chain()));
        assert_eq!(probe.ask("cpus").await, "0");
    } else {
        assert!(matches!(vm.resize_cpus(2).await, Err(Error::Unsupported { .. })));
    }
    bench.end(&vm).await;
    Some(())
}

async fn a_snapshot_is_restored(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let vm = bench.boot(&bench.spec("vsock")).await;
    let dir = bench.dir.path().join("snapshot");
    fs::create_dir(&dir).unwrap();
    assert!(matches!(vm.snapshot(&dir).await, Err(Error::Unsupported { .. })));
    bench.end(&vm).await;

    let spec = bench.spec("serial");
    let vm = bench.boot(&spec).await;
    let mut probe = Probe::serial(&spec).await;
    assert!(probe.line().await.contains("\"version\":1"));
    assert_eq!(probe.ask("write /run/mark template").await, "ok");
    drop(probe);
    let started = Instant::now();
    vm.snapshot(&dir).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    println!("saved after {:?}", started.elapsed());
    bench.end(&vm).await;
    for n in 0..2 {
        let mut spec = bench.spec("serial");
        spec.id = format!("restored-{n}");
        let started = Instant::now();
        let vm = bench.vmm.restore(&spec, &dir).await;
        let vm = vm.unwrap_or_else(|error| panic!("{}", error.chain()));
        let mut probe = Probe::serial(&spec).await;
        assert_eq!(probe.ask("read /run/mark").await, "template");
        println!("restored and answering after {:?}", started.elapsed());
        drop(probe);
        bench.end(&vm).await;
    }
    // A torn file is an error, and nothing is left.
    let torn = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len());
    let torn = fs::File::options().write(true).open(torn.unwrap()).unwrap();
    torn.set_len(100_000).unwrap();
    let error = bench.vmm.restore(&bench.spec("serial"), &dir).await.unwrap_err();
    println!("{}", error.chain());
    Some(())
}

async fn bad_kernels_and_images_are_clear_errors(machine: Machine) -> Option<()> {
    let bench = bench(machine).await?;
    let mut spec = bench.spec("none");
    let text = bench.dir.path().join("text");
    fs::write(&text, "no kernel\n").unwrap();
    spec.boot.kernel = text.clone();
    let started = Instant::now();
    match bench.vmm.spawn(&spec).await {
        Err(error) => {
            let error = error.chain();
            assert!(error.contains("has ended with status 1"), "{error}");
        }
        // It took it, and the guest does nothing; that is the caller's deadline.
        Ok(vm) => bench.end(&vm).await,
    }
    assert!(started.elapsed() < Duration::from_secs(10));

    let mut spec = bench.spec("none");
    spec.disks.push(Disk::open("bad", &text, DiskFormat::Qcow2, true).unwrap());
    let error = bench.vmm.spawn(&spec).await.unwrap_err().chain();
    assert!(error.contains("not in qcow2 format"), "{error}");

    let mut spec = bench.spec("none");
    spec.boot.params.push("init=/none rdinit=/none".into());
    let vm = bench.spawn(&spec).await;
    // The kernel panics, resets, and that is the end.
    let exit = timeout(PATIENCE, vm.wait()).await.expect("an end").unwrap();
    assert_eq!(exit.status, 0);
    assert!(console::tail(&bench.log(), 60_000).contains("Kernel panic"));
    bench.end(&vm).await;
    Some(())
}

macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        mod qemu_microvm {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let _ = super::$test(Machine::Microvm).await;
            })*
        }
        mod qemu_q35 {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let _ = super::$test(Machine::Q35).await;
            })*
        }
    };
}

suite! {
    boots_talks_shares_and_its_exit_is_seen,
    a_killed_one_is_seen_within_100_ms_and_helpers_go_with_it,
    another_daemon_takes_it_up_again,
    disks_and_nics_come_and_go,
    it_pauses_and_changes_size,
    a_snapshot_is_restored,
    bad_kernels_and_images_are_clear_errors,
}
