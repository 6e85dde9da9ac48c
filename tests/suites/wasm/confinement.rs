//! What a container cannot do, and what it has to itself.

use std::path::PathBuf;

use kuasar_tests::cri::*;
use kuasar_tests::wait_for;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

#[test]
fn a_module_sees_neither_the_host_nor_the_kernels_files_and_has_its_user() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-inside"));
    // NOENT: there is no /proc. PERM or NOTCAPABLE: out of the root.
    assert_eq!(start(&pod, &["/proc.wasm"]).wait(), 44);
    let code = start(&pod, &["/escape.wasm"]).wait();
    assert!(matches!(code, 63 | 76), "{code}");
    // /etc/secret of the image is root's, 0600.
    assert_eq!(start(&pod, &["/shadow.wasm"]).wait(), 0);
    let as_user = |config: &mut ContainerConfig| {
        image(config);
        let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.run_as_user = Some(Int64Value { value: 1000 });
    };
    let c = pod.start_with(&["/shadow.wasm"], as_user);
    // ACCES of WASI.
    assert_eq!(c.wait(), 2);
    let c = pod.start_with(&["/sleep.wasm"], as_user);
    let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_default().trim().to_owned()
    };
    assert!(field("Uid").starts_with("1000\t1000\t1000"), "{status}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".into(), "2".into()));
}

#[test]
fn nothing_of_the_worker_is_open_in_a_container() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-fds"));
    let c = start(&pod, &["/sleep.wasm"]);
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
    let dir = format!("/proc/{}/fd", c.pid());
    let links: Vec<(String, String)> = std::fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| {
            let to = std::fs::read_link(entry.path()).unwrap_or_default();
            (entry.file_name().into_string().unwrap(), to.to_string_lossy().into_owned())
        })
        .collect();
    let sockets = links.iter().filter(|(_, to)| to.starts_with("socket:")).count();
    for (fd, to) in &links {
        let streams = ["0", "1", "2"].contains(&fd.as_str());
        // Its own event loop, its compiled code, and its own root.
        let own = ["anon_inode:", "/memfd:"].iter().any(|kind| to.starts_with(kind))
            || to.ends_with(".cwasm")
            || to == "/"
            || to == "/dev/urandom"
            // The event loop's own pair, one end twice.
            || to.starts_with("socket:") && sockets <= 3;
        assert!(streams || own, "{links:?}");
    }
}

#[test]
fn a_container_has_no_copy_of_the_hosts_mounts() {
    let Some(_on) = handler() else { return };
    let (one, other) = (Pod::run(pod_config("wasm-mounts")), Pod::run(pod_config("wasm-mounts-2")));
    let first = start(&one, &["/sleep.wasm"]);
    let second = start(&other, &["/sleep.wasm"]);
    for c in [&first, &second] {
        let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", c.pid())).unwrap();
        let mut places: Vec<_> = table.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        places.sort_unstable();
        assert_eq!(places, ["/", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"], "{table}");
    }
    // Who makes them has not stayed in the empty namespace that theirs are made of.
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
    let worker = named("wasm-zygote").unwrap();
    assert_eq!(namespace(worker), namespace(parent(worker).unwrap()));
    assert_ne!(namespace(first.pid()), namespace(second.pid()));
}

#[test]
fn memory_is_bounded_by_the_container() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-memory"));
    // 64 MiB: 2 pages are there, and 63 times a mebibyte more; memory.grow says no, nothing is killed.
    let c = pod.start_with(&["/grow.wasm"], limited(64 << 20));
    assert_eq!(c.wait(), 63);
    // What it touches counts in the cgroup, too: either bound is an end.
    let c = pod.start_with(&["/eat.wasm"], limited(32 << 20));
    let code = c.wait();
    assert!(matches!(code, 5 | 137), "{code}");
    if code == 137 {
        assert_eq!(c.status().reason, "OOMKilled");
    }
    let message = {
        let c = pod.create_with(&["/four.wasm"], limited(64 << 20)).unwrap();
        c.start().unwrap_err().to_string()
    };
    assert!(message.contains("linear memory") && message.contains("67108864"), "{message}");
}

#[test]
fn containers_do_not_share_their_random_numbers() {
    with_engines(containers_do_not_share_their_random_numbers_with);
}

fn containers_do_not_share_their_random_numbers_with(_engine: &str) {
    let pod = Pod::run(pod_config("wasm-random"));
    let numbers = |_| {
        let c = start(&pod, &["/random.wasm"]);
        assert_eq!(c.wait(), 0);
        std::fs::read(&c.log).unwrap().splitn(4, |b| *b == b' ').nth(3).unwrap().to_vec()
    };
    let all: Vec<_> = (0..4).map(numbers).collect();
    for (i, one) in all.iter().enumerate() {
        assert!(one.len() > 8 && all[i + 1..].iter().all(|other| other != one));
    }
}

#[test]
fn one_programs_loop_and_trap_touch_no_other() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-alone"));
    let spin = start(&pod, &["/spin.wasm"]);
    let sleep = start(&pod, &["/sleep.wasm"]);
    assert_eq!(start(&pod, &["/trap.wasm"]).wait(), 134);
    assert_eq!(start(&pod, &["/recurse.wasm"]).wait(), 134);
    assert!(spin.is_running() && sleep.is_running());
}

/// A module that takes long to compile.
fn slow() -> Vec<u8> {
    let body =
        "(local.set 0 (i64.rotl (i64.mul (local.get 0) (i64.load (i32.wrap_i64 (local.get 1)))) \
                (i64.add (local.get 1) (local.get 0))))"
            .repeat(1000);
    let function = format!("(func (param i64 i64) (result i64) {body} (local.get 0))");
    let unique = unique();
    let text = format!(
        r#"(module (memory 1) (data (i32.const 0) "{unique}") {} (func (export "_start")))"#,
        function.repeat(150)
    );
    wat::parse_str(text).unwrap()
}

/// A compiler of this bed's that has given up what it had: its filter is the last step.
fn compiler() -> Option<u32> {
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let words = std::fs::read(entry.path().join("cmdline")).ok()?;
        let compiles = words.split(|byte| *byte == 0).nth(1) == Some(b"compile");
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        (compiles && status.contains("Seccomp:\t2") && parent_is_ours(pid)).then_some(pid)
    })
}

#[test]
fn a_compiler_at_work_has_the_module_its_code_and_nothing_else() {
    with_engines(a_compiler_at_work_has_the_module_its_code_and_nothing_else_with);
}

fn a_compiler_at_work_has_the_module_its_code_and_nothing_else_with(engine: &str) {
    let name = format!("localhost/wasm-slow:{}", unique());
    let dir = bed().join(format!("run/wasm-slow-{}", unique()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("slow.wasm"), slow()).unwrap();
    let archive = dir.join("image.tar");
    wasm::pack(&name, &dir, &archive);
    wasm::load(&archive, &[]);
    let pod = Pod::run(pod_config("wasm-slow"));
    std::thread::scope(|scope| {
        let container = scope.spawn(|| {
            let image = Some(ImageSpec { image: name.clone(), ..Default::default() });
            // containerd creates the task when it is started.
            let container = pod.create_with(&["/slow.wasm"], |config| config.image = image)?;
            container.start()
        });
        let mut found = None;
        wait_for("it compiles", SOON, || {
            found = compiler();
            let over = found.is_none() && container.is_finished();
            assert!(!over, "it was not seen: make it take longer");
            found.is_some()
        });
        let pid = found.unwrap();
        let signal = |signal| kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
        // It stays while we look.
        signal(Signal::SIGSTOP);
        assert_confined(engine, pid);
        signal(Signal::SIGCONT);
        // A slow machine may need longer than the bed allows.
        if let Err(error) = container.join().unwrap() {
            assert!(error.message().contains("compiler.timeout"), "{error}");
        }
    });
    pod.remove().unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    assert!(wasm::ctr(&["images", "rm", &name]).status.success());
}

fn assert_confined(engine: &str, pid: u32) {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let read = |name: &str| std::fs::read_to_string(proc.join(name)).unwrap();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_default().split_whitespace().collect::<Vec<_>>()
    };
    // `compiler.uid`.
    for id in ["Uid", "Gid"] {
        assert_eq!(field(id), ["65534"; 4], "{status}");
    }
    assert!(field("Groups").is_empty(), "{status}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), (vec!["1"], vec!["2"]));
    let limits = read("limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    // `compiler.memory` and `compiler.timeout` of the bed.
    assert_eq!(limit("Max address space"), ["4294967296"; 2]);
    assert_eq!(limit("Max file size"), ["4294967296"; 2]);
    assert_eq!(limit("Max cpu time"), ["20"; 2]);
    assert_eq!(limit("Max core file size"), ["0"; 2]);
    let namespace =
        |of: u32, kind: &str| std::fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap();
    for kind in ["mnt", "net", "ipc", "uts"] {
        assert_ne!(namespace(pid, kind), namespace(parent(pid).unwrap(), kind), "{kind}");
    }
    // There may be a heading.
    let routes = read("net/route");
    assert!(routes.lines().count() <= 1, "{routes}");
    let mounts = read("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let mount: Vec<&str> = mounts.split(' ').collect();
    assert_eq!(mount[4], "/", "{mounts}");
    for option in ["nosuid", "nodev", "noexec"] {
        assert!(mount[5].split(',').any(|word| word == option), "{mounts}");
    }
    let files = || std::fs::read_dir(proc.join("root")).unwrap().flatten();
    if engine == "wasmtime" {
        assert_eq!(limit("Max processes"), ["0"; 2]);
        assert!(mount[5].starts_with("ro,"), "{mounts}");
        assert_eq!(files().count(), 0);
        assert_eq!(field("Threads"), ["1"]);
    }
    // The module, the code (twice), the words; what it makes for itself is in its own root.
    for entry in std::fs::read_dir(proc.join("fd")).unwrap().flatten() {
        let to = std::fs::read_link(entry.path()).unwrap().to_string_lossy().into_owned();
        let fd: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let code = std::fs::read_link(proc.join("fd/1")).unwrap();
        let own = std::path::Path::new(&to) == code || engine == "wasmedge" && !to.contains(':');
        assert!(fd <= 2 || own, "{fd}: {to}");
    }
}
