//! What a container cannot do, and what it has to itself.

use kuasar_tests::cri::*;
use kuasar_tests::wait_for;

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
