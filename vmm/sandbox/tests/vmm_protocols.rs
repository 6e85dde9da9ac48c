//! The drivers of VMMs that are not packaged, against a fake of their protocols (`tests/fake`):
//! what is asked, in which order, and what becomes of refusals, deaths and silence. No guest runs,
//! no root is needed. What the real ones do is the matter of `vmm_conformance`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // a test

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use vmm_sandboxer::template::{self, Templates};
use vmm_sandboxer::vmm::cloud_hypervisor::{CloudHypervisor, CloudHypervisorConfig};
use vmm_sandboxer::vmm::firecracker::{Firecracker, FirecrackerConfig};
use vmm_sandboxer::vmm::helpers::HelpersConfig;
use vmm_sandboxer::vmm::process::Local;
use vmm_sandboxer::vmm::stratovirt::{StratoVirt, StratoVirtConfig};
use vmm_sandboxer::vmm::{
    Boot, Channel, Console, Disk, DiskFormat, Error, Event, Kind, Launcher, Nic, Range, Root, Vm,
    VmSpec, Vmm, vsock,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// The fake, built once for each run of the tests.
fn fake() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let program = dir.join(format!("fake-vmm-{}", std::process::id()));
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/main.rs");
        let built = Command::new(rustc)
            .args(["--edition", "2024", "-C", "strip=symbols", "-o"])
            .args([program.as_path(), source.as_path()])
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        program
    })
}

struct Bench {
    dir: tempfile::TempDir,
    program: PathBuf,
    vmm: Arc<dyn Vmm>,
}

impl Bench {
    /// A driver with a fake that heeds `rules`; nothing without KVM, which the drivers ask for.
    fn new(kind: Kind, rules: &str) -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            println!("skipped: no /dev/kvm");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("kvmf").tempdir().unwrap();
        let program = dir.path().join("fake");
        fs::copy(fake(), &program).unwrap();
        fs::write(dir.path().join("fake.conf"), rules).unwrap();
        for name in ["kernel", "initrd"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let launcher = Launcher::new(Arc::new(Local::new().unwrap()), None);
        let path = program.clone();
        let timeout_ms = if rules.contains("hang") { 300 } else { 10_000 };
        let helpers = HelpersConfig::default();
        let vmm: Arc<dyn Vmm> = match kind {
            Kind::CloudHypervisor => {
                let config =
                    CloudHypervisorConfig { path, timeout_ms, ..CloudHypervisorConfig::default() };
                Arc::new(CloudHypervisor::new(config, helpers, launcher))
            }
            Kind::Firecracker => {
                let config = FirecrackerConfig { path, timeout_ms, ..FirecrackerConfig::default() };
                Arc::new(Firecracker::new(config, launcher))
            }
            Kind::StratoVirt => {
                let config = StratoVirtConfig { path, timeout_ms, ..StratoVirtConfig::default() };
                Arc::new(StratoVirt::new(config, helpers, launcher))
            }
            Kind::Qemu => panic!("QEMU is tested for real"),
        };
        Some(Self { dir, program, vmm })
    }

    fn spec(&self) -> VmSpec {
        let dir = self.dir.path().join("vm");
        VmSpec {
            id: "one".into(),
            cpus: Range::fixed(1),
            memory_mib: Range::fixed(256),
            hugepages: false,
            boot: Boot {
                kernel: self.dir.path().join("kernel"),
                root: Root::Initrd(self.dir.path().join("initrd")),
                params: vec!["quiet".into()],
            },
            shares: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            channel: if self.vmm.kind() == Kind::StratoVirt {
                Channel::Serial { socket: dir.join("agent.sock"), console: true, uds: None }
            } else {
                Channel::HybridVsock { cid: 3, uds: self.dir.path().join("v/s") }
            },
            entropy: true,
            console: Console { log: dir.join("console.log"), limit: 4096 },
            netns: None,
            cgroups: Vec::new(),
            dir,
        }
    }

    fn disk(&self, id: &str, read_only: bool) -> Disk {
        let path = self.dir.path().join(format!("{id}.img"));
        fs::write(&path, [0; 4096]).unwrap();
        Disk::open(id, &path, DiskFormat::Raw, read_only).unwrap()
    }

    async fn spawn(&self, spec: &VmSpec) -> Arc<dyn Vm> {
        let vm = self.vmm.spawn(spec).await;
        vm.unwrap_or_else(|error| panic!("{}\n{:#?}", error.chain(), self.log()))
    }

    fn log(&self) -> Vec<String> {
        let path = format!("{}.log", self.program.display());
        fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Methods and paths, or commands, that came since `from` lines, without their bodies.
    fn asked(&self, from: usize) -> Vec<String> {
        let short = |line: &String| match line.split_once("\"execute\":\"") {
            Some((_, rest)) => rest.split('"').next().unwrap().to_owned(),
            None => line.split(' ').take(2).collect::<Vec<_>>().join(" "),
        };
        self.log().iter().skip(from).map(short).collect()
    }

    fn body(&self, of: &str) -> String {
        let log = self.log();
        log.iter().rfind(|line| line.contains(of)).unwrap_or_else(|| panic!("{log:#?}")).clone()
    }

    /// Nothing of a machine is left but its console log.
    fn nothing_is_left(&self) {
        let mut left: Vec<_> = walk(&self.dir.path().join("vm"));
        left.extend(walk(&self.dir.path().join("v")));
        left.retain(|path| !path.ends_with("console.log"));
        assert!(left.is_empty(), "{left:?}");
        self.nothing_runs();
    }

    fn nothing_runs(&self) {
        let proc = fs::read_dir("/proc").unwrap().flatten();
        let running = proc.filter(|entry| {
            fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == self.program)
        });
        assert_eq!(running.count(), 0, "a process is left");
    }

    async fn end(&self, vm: &Arc<dyn Vm>) {
        vm.stop(Duration::ZERO).await.unwrap();
        vm.release().await;
        self.nothing_is_left();
    }

    /// What a failed start has made is undone in the background.
    async fn undone(&self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let proc = fs::read_dir("/proc").unwrap().flatten();
            let mut exes = proc.filter_map(|entry| fs::read_link(entry.path().join("exe")).ok());
            if !exes.any(|exe| exe == self.program) {
                break;
            }
            assert!(Instant::now() < until, "a process is left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let disks = self.dir.path().join("vm/disks");
        assert!(!disks.exists(), "{} is left", disks.display());
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() { walk(&path) } else { vec![path] }
        })
        .collect()
}

const ALL: [Kind; 3] = [Kind::CloudHypervisor, Kind::Firecracker, Kind::StratoVirt];

/// The request by which each starts its guest.
fn boot_request(kind: Kind) -> &'static str {
    match kind {
        Kind::CloudHypervisor => "/vm.boot",
        Kind::Firecracker => "/actions",
        _ => "qmp_capabilities",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_made_in_the_order_that_each_protocol_wants() {
    for kind in ALL {
        let Some(bench) = Bench::new(kind, "") else { return };
        let mut spec = bench.spec();
        spec.disks.push(bench.disk("cold-1", true));
        let vm = bench.spawn(&spec).await;
        let asked = bench.asked(1);
        let wanted: &[&str] = match kind {
            Kind::CloudHypervisor => {
                &["GET /api/v1/vmm.ping", "PUT /api/v1/vm.create", "PUT /api/v1/vm.boot"]
            }
            Kind::Firecracker => &[
                "PUT /machine-config",
                "PUT /boot-source",
                "PUT /drives/cold_m1",
                "PUT /drives/rw0",
                "PUT /drives/rw1",
                "PUT /drives/rw2",
                "PUT /drives/rw3",
                "PUT /drives/ro0",
                "PUT /drives/ro1",
                "PUT /vsock",
                "PUT /entropy",
                "PUT /balloon",
                "PUT /actions",
            ],
            _ => &[],
        };
        assert_eq!(asked, wanted, "{kind}");
        let argv = bench.log()[0].clone();
        match kind {
            Kind::CloudHypervisor => {
                assert!(argv.contains("--seccomp true"), "{argv}");
                let create = bench.body("/vm.create");
                for part in [
                    "\"image_type\":\"Raw\"",
                    "\"backing_files\":false",
                    "\"readonly\":true",
                    "\"serial\":\"cold-1\"",
                    "\"shared\":false",
                    "\"cid\":3",
                    "panic=-1 quiet",
                ] {
                    assert!(create.contains(part), "{part} in {create}");
                }
            }
            Kind::Firecracker => {
                assert!(!argv.contains("--no-seccomp"), "{argv}");
                assert!(bench.body("/drives/cold_m1").contains("\"is_read_only\":true"));
                assert!(bench.body("/machine-config").contains("\"mem_size_mib\":256"));
                assert_ne!(vm.disk_serial("cold-1"), "cold-1");
            }
            _ => {
                assert!(!argv.contains("-disable-seccomp"), "{argv}");
                assert!(argv.contains("id=cold-1,readonly=on"), "{argv}");
            }
        }
        vm.ping().await.unwrap();
        assert!(matches!(vm.detach("cold-1").await, Err(Error::Invalid(_))), "{kind}");
        bench.end(&vm).await;
        assert!(matches!(vm.ping().await, Err(Error::Gone)), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_come_and_go_and_places_run_out() {
    for kind in ALL {
        let Some(bench) = Bench::new(kind, "") else { return };
        let vm = bench.spawn(&bench.spec()).await;
        let disk = bench.disk("hot", false);
        for _ in 0..6 {
            vm.attach_disk(&disk).await.unwrap_or_else(|error| panic!("{}", error.chain()));
            assert!(matches!(vm.attach_disk(&disk).await, Err(Error::DeviceExists(_))));
            vm.detach("hot").await.unwrap_or_else(|error| panic!("{}", error.chain()));
        }
        assert!(matches!(vm.detach("hot").await, Err(Error::NoDevice(_))), "{kind}");
        if kind != Kind::CloudHypervisor {
            for id in ["d0", "d1", "d2", "d3"] {
                vm.attach_disk(&bench.disk(id, false)).await.unwrap();
            }
            let error = vm.attach_disk(&bench.disk("d4", false)).await.unwrap_err();
            assert!(matches!(error, Error::Exhausted(_)), "{kind}: {error}");
            assert!(!bench.dir.path().join("vm/disks/d4").exists());
        }
        // A file that is gone is an error, and takes no place.
        let gone = bench.disk("gone", true);
        if kind != Kind::StratoVirt {
            fs::remove_file(&gone.path).unwrap();
            let error = vm.attach_disk(&gone).await.unwrap_err();
            assert!(matches!(error, Error::Refused { .. } | Error::Io { .. }), "{kind}: {error}");
            assert!(matches!(vm.detach("gone").await, Err(Error::NoDevice(_))), "{kind}");
            fs::write(&gone.path, [0; 4096]).unwrap();
            vm.attach_disk(&gone).await.unwrap();
        }
        bench.end(&vm).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_daemon_finds_what_was_plugged_although_the_record_lacks_it() {
    for kind in ALL {
        let Some(bench) = Bench::new(kind, "") else { return };
        let vm = bench.spawn(&bench.spec()).await;
        let before = vm.state();
        let disk = bench.disk("kept", false);
        vm.attach_disk(&disk).await.unwrap();
        drop(vm);
        let state = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
        let vm = bench.vmm.reattach(state).await.unwrap();
        vm.ping().await.unwrap();
        let again = vm.attach_disk(&disk).await;
        assert!(matches!(again, Err(Error::DeviceExists(_))), "{kind}: {again:?}");
        vm.detach("kept").await.unwrap_or_else(|error| panic!("{kind}: {}", error.chain()));
        vm.attach_disk(&disk).await.unwrap_or_else(|error| panic!("{kind}: {}", error.chain()));
        // One that ended while nobody looked.
        let state = vm.state();
        drop(vm);
        let pid = nix::unistd::Pid::from_raw(state.vmm.identity.pid as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let vm = timeout(PATIENCE, async {
            loop {
                if state.vmm.identity.open().is_none() {
                    break bench.vmm.reattach(state.clone()).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let vm = vm.await.unwrap();
        assert_eq!(vm.wait().await.unwrap().status, 137);
        bench.end(&vm).await;
        // A record of another driver is none of this one's.
        let mut other = state;
        other.kind = Kind::Qemu;
        assert!(matches!(bench.vmm.reattach(other).await, Err(Error::State(_))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_pauses_is_saved_and_others_start_from_it() {
    for kind in ALL {
        let Some(bench) = Bench::new(kind, "") else { return };
        let spec = bench.spec();
        let vm = bench.spawn(&spec).await;
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
        vm.attach_disk(&bench.disk("hot", false)).await.unwrap();
        let dir = bench.dir.path().join("snapshot");
        fs::create_dir(&dir).unwrap();
        let error = vm.snapshot(&dir).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{kind}: {error}");
        vm.detach("hot").await.unwrap();
        vm.snapshot(&dir).await.unwrap_or_else(|error| panic!("{kind}: {}", error.chain()));
        for file in walk(&dir) {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o077, 0, "{file:?}");
        }
        bench.end(&vm).await;
        for _ in 0..2 {
            let mut spec = spec.clone();
            spec.disks.push(bench.disk("more", false));
            let vm = bench.vmm.restore(&spec, &dir).await;
            let vm = vm.unwrap_or_else(|error| panic!("{kind}: {}", error.chain()));
            vm.ping().await.unwrap();
            vm.detach("more").await.unwrap();
            bench.end(&vm).await;
        }
        // Of another size, and torn.
        let mut larger = spec.clone();
        larger.memory_mib = Range::fixed(512);
        assert!(matches!(bench.vmm.restore(&larger, &dir).await, Err(Error::State(_))), "{kind}");
        let torn = dir.join(if kind == Kind::CloudHypervisor { "memory-ranges" } else { "memory" });
        fs::File::options().write(true).open(torn).unwrap().set_len(100).unwrap();
        assert!(matches!(bench.vmm.restore(&spec, &dir).await, Err(Error::State(_))), "{kind}");
        bench.nothing_is_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_firecracker_gets_the_tap_of_its_pod_for_the_nic_that_was_saved() {
    let Some(bench) = Bench::new(Kind::Firecracker, "") else { return };
    let nic = |id: &str, last, tap: &str| Nic {
        id: id.into(),
        mac: [2, 0, 0, 0, 0, last],
        mtu: 1500,
        tap: Vec::new(),
        tap_name: Some((tap.into(), None)),
    };
    let spec = VmSpec { nics: vec![nic("net0", 1, "nowhere")], ..bench.spec() };
    let dir = bench.dir.path().join("snapshot");
    fs::create_dir(&dir).unwrap();
    let vm = bench.spawn(&spec).await;
    vm.snapshot(&dir).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    bench.end(&vm).await;
    let from = bench.log().len();
    let pod = VmSpec { nics: vec![nic("net0", 2, "kuasar5")], ..spec.clone() };
    let vm = bench.vmm.restore(&pod, &dir).await.unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!(bench.asked(from + 1), ["GET /version", "PUT /snapshot/load"]);
    let load = bench.body("/snapshot/load");
    let tap = "\"network_overrides\":[{\"iface_id\":\"net0\",\"host_dev_name\":\"kuasar5\"}]";
    let socket = format!("\"uds_path\":\"{}\"", bench.dir.path().join("v/s").display());
    assert!(load.contains(tap) && load.contains(&socket), "{load}");
    // It stays, as if it had been there from a boot.
    assert!(matches!(vm.detach("net0").await, Err(Error::Invalid(_))));
    // A copy of a copy has it still.
    let again = bench.dir.path().join("again");
    fs::create_dir(&again).unwrap();
    vm.snapshot(&again).await.unwrap();
    bench.end(&vm).await;
    let vm = bench.vmm.restore(&spec, &again).await.unwrap();
    bench.end(&vm).await;
    // One that is refused has let go of everything, so that a boot with the same names may follow.
    fs::write(bench.program.with_extension("conf"), "refuse /snapshot/load").unwrap();
    assert!(matches!(bench.vmm.restore(&pod, &dir).await, Err(Error::Refused { .. })));
    bench.nothing_runs();
    let vm = bench.spawn(&pod).await;
    bench.end(&vm).await;
    // Nobody else's, none too many and none too few.
    let others =
        [vec![], vec![nic("net1", 2, "a")], vec![nic("net0", 2, "a"), nic("net1", 3, "b")]];
    for nics in others {
        let pod = VmSpec { nics, ..spec.clone() };
        assert!(matches!(bench.vmm.restore(&pod, &dir).await, Err(Error::State(_))));
    }
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_without_a_serial_port_is_saved_while_its_agent_waits_for_an_answer() {
    use tokio::io::AsyncReadExt;
    use vmm_common::handshake::{PROTOCOL, Ready, write_json};
    let Some(bench) = Bench::new(Kind::Firecracker, "") else { return };
    let templates = Templates::new(bench.dir.path().join("templates"));
    let pod = bench.spec();
    let key = templates.key(&*bench.vmm, &pod).unwrap();
    let own = bench.dir.path().join("t");
    let spec = template::machine(&pod, &key, &own, Vec::new(), bench.vmm.features());
    let uds = spec.channel.uds().unwrap().to_owned();
    assert!(uds.starts_with(&spec.dir), "its own: {uds:?}");
    let ready = vsock::bind(&uds, 1023, None).unwrap().into();
    let log = bench.program.with_extension("log");
    let agent = tokio::spawn(async move {
        let mut stream =
            tokio::net::UnixStream::connect(vsock::port_path(&uds, 1023)).await.unwrap();
        let ready = Ready {
            protocol: PROTOCOL,
            agent_version: "x".into(),
            kernel_release: "x".into(),
            boot_id: "x".into(),
        };
        write_json(&mut stream, &ready).await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        (heard, fs::read_to_string(log).unwrap())
    });
    let made = templates.make(&*bench.vmm, &spec, Some(&ready), &key, PATIENCE, 1).await;
    made.unwrap_or_else(|error| panic!("{}", error.chain()));
    let (heard, log) = agent.await.unwrap();
    assert_eq!(heard, b"", "no secret is in a template");
    assert!(log.contains("/snapshot/create"), "it was hung up on before it was saved: {log}");
    let saved = templates.find(&key).unwrap();
    // Of the same machine with huge pages there is none.
    assert!(bench.vmm.copies(false).is_ok() && bench.vmm.copies(true).is_err());
    let vm = bench.vmm.restore(&pod, &saved).await.unwrap_or_else(|e| panic!("{}", e.chain()));
    bench.end(&vm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_follows_and_what_is_missing_says_the_way_out() {
    for kind in [Kind::CloudHypervisor, Kind::Firecracker] {
        let Some(bench) = Bench::new(kind, "") else { return };
        let mut spec = bench.spec();
        spec.memory_mib = Range { at_boot: 256, most: 512 };
        let vm = bench.spawn(&spec).await;
        assert_eq!(vm.resize_memory(512).await.unwrap(), 512);
        // Once more is no error.
        assert_eq!(vm.resize_memory(512).await.unwrap(), 512);
        assert_eq!(vm.resize_memory(256).await.unwrap(), 256);
        assert!(matches!(vm.resize_memory(1024).await, Err(Error::Invalid(_))));
        bench.end(&vm).await;
    }
    let Some(bench) = Bench::new(Kind::Firecracker, "") else { return };
    let vm = bench.spawn(&bench.spec()).await;
    let error = vm.resize_cpus(2).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { .. }), "{error}");
    bench.end(&vm).await;
    let mut spec = bench.spec();
    spec.channel =
        Channel::Serial { socket: bench.dir.path().join("s"), console: false, uds: None };
    let error = bench.vmm.spawn(&spec).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { way_out, .. } if way_out.contains("vsock")));
    let Some(bench) = Bench::new(Kind::StratoVirt, "") else { return };
    let mut spec = bench.spec();
    spec.channel = Channel::HybridVsock { cid: 3, uds: bench.dir.path().join("v/s") };
    let error = bench.vmm.spawn(&spec).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { way_out, .. } if way_out.contains("serial")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_hypervisor_whose_guest_resets_itself_ends() {
    let Some(bench) = Bench::new(Kind::CloudHypervisor, "reset") else { return };
    let vm = bench.spawn(&bench.spec()).await;
    let exit = timeout(PATIENCE, vm.wait()).await.expect("an end").unwrap();
    assert_eq!(exit.status, 0);
    assert_eq!(bench.asked(1).last().unwrap(), "PUT /api/v1/vmm.shutdown");
    bench.end(&vm).await;
    // Also when it did so while no daemon ran: the event waits in the pipe.
    let vm = bench.spawn(&bench.spec()).await;
    let mut events = vm.events();
    let event = timeout(PATIENCE, events.recv()).await;
    assert!(
        !matches!(&event, Ok(Ok(event)) if !matches!(event, Event::Shutdown { .. })),
        "{event:?}"
    );
    bench.end(&vm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_dying_or_silent_start_is_a_clear_error_and_leaves_nothing() {
    for kind in ALL {
        for rule in ["refuse", "die", "hang"] {
            let rules = format!("{rule} {}", boot_request(kind));
            let Some(bench) = Bench::new(kind, &rules) else { return };
            let begun = Instant::now();
            let error = bench.vmm.spawn(&bench.spec()).await.unwrap_err();
            match (rule, &error) {
                ("refuse", Error::Refused { reason, .. }) => {
                    assert!(reason.contains("the fake refuses"), "{kind}: {reason}");
                }
                ("die", Error::Ended { status: 1, said, .. }) => {
                    assert!(said.contains("cannot go on"), "{kind}: {said}");
                }
                ("hang", Error::Deadline { .. }) => {}
                _ => panic!("{kind}: {rule}: {}", error.chain()),
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "{kind}: {rule}");
            bench.undone().await;
        }
        // It ends before it serves at all.
        let Some(bench) = Bench::new(kind, "die start") else { return };
        let error = bench.vmm.spawn(&bench.spec()).await.unwrap_err();
        assert!(matches!(&error, Error::Ended { status: 1, .. }), "{kind}: {}", error.chain());
        bench.undone().await;
    }
}
