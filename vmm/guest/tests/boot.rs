//! The guest kernel and an image really booted, in QEMU without hardware support.
//!
//! `cargo test -p guest-image --test boot -- --ignored --nocapture` after `make guest` and
//! `tests/bed/vmm.sh`, as root. Prints medians over `GUEST_BOOTS` boots (default 3). For comparisons:
//! `GUEST_KERNEL` (path), `GUEST_MACHINE` (`microvm` or `q35`), `GUEST_APPEND` (added to the kernel's command
//! line), `GUEST_CPUS`, `GUEST_GZIP=1` (compressed initramfs), `GUEST_CLOCK=0` (the guest finds out how fast its
//! clocks run), `GUEST_CONSOLE=1` (print what the kernel said).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

const DEADLINE: Duration = Duration::from_secs(60);
const TOP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn var(name: &str, default: &str) -> String {
    env::var(name).unwrap_or_else(|_| default.into())
}

/// A program that ends with the test, whatever becomes of that.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The probe as a static program.
fn probe() -> PathBuf {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let status = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--release",
            "-p",
            "guest-image",
            "--example",
            "probe",
            "--target",
            &target,
        ])
        .args(["--target-dir", "target/static"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
        .current_dir(TOP)
        .status()
        .unwrap();
    assert!(status.success());
    Path::new(TOP).join("target/static").join(target).join("release/examples/probe")
}

/// Waits for a path to appear: a helper that makes its socket is ready then.
fn appears(path: &Path) {
    let end = Instant::now() + DEADLINE;
    while !path.exists() {
        assert!(Instant::now() < end, "{} does not appear", path.display());
        thread::sleep(Duration::from_millis(2));
    }
}

/// What one boot showed; times in milliseconds.
struct Boot {
    init: f64,
    vsock: f64,
    report: String,
    rss_kb: f64,
    cpu: f64,
}

impl Boot {
    fn value(&self, key: &str) -> Option<&str> {
        self.report.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

fn boot(kernel: &Path, initramfs: &Path, tools: &Path) -> Boot {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("share")).unwrap();
    fs::write(at("share/hello"), "hello").unwrap();
    let helper = |program: &str, args: &[&str]| {
        let child = Command::new(tools.join(program))
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Guard(child.unwrap())
    };
    let text = |name: &str| at(name).to_str().unwrap().to_owned();
    let _vsock = helper(
        "vhost-device-vsock",
        &["--guest-cid", "3", "--socket", &text("vsock.vu"), "--uds-path", &text("vsock")],
    );
    let _fs =
        helper("virtiofsd", &["--socket-path", &text("fs.vu"), "--shared-dir", &text("share")]);
    let ready = UnixListener::bind(at("vsock_1023")).unwrap();
    appears(&at("vsock.vu"));
    appears(&at("fs.vu"));

    let (machine, bus, mut append) = match var("GUEST_MACHINE", "microvm").as_str() {
        "microvm" => {
            ("microvm,acpi=off,memory-backend=m0", "device", "reboot=t nolapic_timer".to_owned())
        }
        _ => ("q35,memory-backend=m0", "pci", "reboot=k".to_owned()),
    };
    append += " console=ttyS0 quiet panic=-1 ";
    if var("GUEST_CLOCK", "1") == "1" {
        append += &vmm_common::clock::parameters(vmm_common::clock::host_khz()).join(" ");
        append += " ";
    }
    append += &var("GUEST_APPEND", "");
    let start = Instant::now();
    let mut qemu = Guard(
        Command::new(tools.join("qemu-system-x86_64"))
            .args([
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "128",
                "-smp",
                &var("GUEST_CPUS", "1"),
                "-M",
                machine,
            ])
            .args(["-object", "memory-backend-memfd,id=m0,size=128M,share=on"])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &append])
            .arg("-chardev")
            .arg(format!("socket,id=v,path={}", text("vsock.vu")))
            .args(["-device", &format!("vhost-user-vsock-{bus},chardev=v")])
            .arg("-chardev")
            .arg(format!("socket,id=f,path={}", text("fs.vu")))
            .args(["-device", &format!("vhost-user-fs-{bus},chardev=f,tag=kuasar")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap(),
    );
    let console = BufReader::new(qemu.0.stdout.take().unwrap());
    let (send, init) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut all = String::new();
        for line in console.lines().map_while(Result::ok) {
            if line.contains("probe: init") {
                let _ = send.send(start.elapsed());
            }
            all += &line;
            all.push('\n');
        }
        all
    });
    let (send, dialled) = mpsc::channel();
    thread::spawn(move || send.send(ready.accept().map(|(stream, _)| (stream, start.elapsed()))));
    let Ok(dialled) = dialled.recv_timeout(DEADLINE) else {
        drop(qemu);
        panic!("the guest does not dial; console:\n{}", reader.join().unwrap());
    };
    let (mut stream, vsock): (UnixStream, _) = dialled.unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "hello");
    let report = lines.next().unwrap().unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.0.id())).unwrap();
    let ticks: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // utime and stime, in hundredths of a second
    let cpu = (ticks[11].parse::<f64>().unwrap() + ticks[12].parse::<f64>().unwrap()) * 10.0;
    let status = fs::read_to_string(format!("/proc/{}/status", qemu.0.id())).unwrap();
    let rss = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    stream.write_all(b"bye\n").unwrap();
    let end = Instant::now() + DEADLINE;
    while qemu.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "the guest does not end");
        thread::sleep(Duration::from_millis(5));
    }
    let console = reader.join().unwrap();
    if env::var_os("GUEST_CONSOLE").is_some() {
        println!("{console}");
    }
    let init: Duration =
        init.recv().unwrap_or_else(|_| panic!("no word of init; console:\n{console}"));
    Boot {
        init: init.as_secs_f64() * 1e3,
        vsock: vsock.as_secs_f64() * 1e3,
        report,
        rss_kb: rss.unwrap(),
        cpu,
    }
}

fn median(values: impl Iterator<Item = f64>) -> String {
    let mut v: Vec<f64> = values.collect();
    v.sort_by(f64::total_cmp);
    format!("{:.0} (min {:.0}, max {:.0})", v[v.len() / 2], v[0], v[v.len() - 1])
}

#[test]
#[ignore = "needs root, make guest and tests/bed/vmm.sh"]
fn a_guest_boots_dials_and_reads_its_share() {
    let tools = PathBuf::from(var("GUEST_TOOLS", &format!("{TOP}/target/bed/vmm/bin")));
    let kernel = PathBuf::from(var("GUEST_KERNEL", &format!("{TOP}/target/guest/vmlinux")));
    let missing = ["qemu-system-x86_64", "virtiofsd", "vhost-device-vsock"]
        .map(|p| tools.join(p))
        .into_iter()
        .find(|p| !p.exists());
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: not root");
    }
    if let Some(path) = missing.or((!kernel.exists()).then_some(kernel.clone())) {
        return println!("skipped: {} is not there", path.display());
    }
    let dir = tempfile::tempdir().unwrap();
    let mut initramfs = dir.path().join("initramfs.cpio");
    let init = guest_image::read_init(&probe()).unwrap();
    guest_image::write_initramfs(&guest_image::entries(&init, &[]), &initramfs).unwrap();
    if env::var_os("GUEST_GZIP").is_some() {
        assert!(Command::new("gzip").arg("-n9").arg(&initramfs).status().unwrap().success());
        initramfs.add_extension("gz");
    }
    let count: usize = var("GUEST_BOOTS", "3").parse().unwrap();
    let boots: Vec<Boot> = (0..count).map(|_| boot(&kernel, &initramfs, &tools)).collect();
    let first = &boots[0];
    println!("{}", first.report);
    println!("exec to init: {} ms", median(boots.iter().map(|b| b.init)));
    println!("exec to vsock: {} ms", median(boots.iter().map(|b| b.vsock)));
    println!("CPU of the VMM until the report: {} ms", median(boots.iter().map(|b| b.cpu)));
    println!("VMM resident: {} kB", median(boots.iter().map(|b| b.rss_kb)));
    for key in ["init_us", "connected_us", "share_us", "total_kb", "free_kb", "available_kb"] {
        println!(
            "guest {key}: {}",
            median(boots.iter().map(|b| b.value(key).unwrap().parse().unwrap()))
        );
    }
    for b in &boots {
        println!("clock of the guest: {}", b.value("clock").unwrap());
        assert_eq!(b.value("share"), Some("hello"));
        for controller in ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"] {
            assert!(
                b.value("controllers").unwrap().split(',').any(|c| c == controller),
                "no {controller}"
            );
        }
    }
}
