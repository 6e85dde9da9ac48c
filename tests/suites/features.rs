//! One test per feature, seen from inside the container.

use kuasar_tests::cri::*;
use kuasar_tests::{cri, handler, skip};

fn security(c: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    c.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

const SLEEP: &[&str] = &["sleep", "1000"];

#[test]
fn hostname_hosts_and_resolv_conf_are_the_pods() {
    let mut config = pod_config("dns");
    config.hostname = "the-host".into();
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.10.10.10".into()],
        searches: vec!["a.example".into(), "b.example".into()],
        options: vec!["ndots:3".into()],
    });
    let pod = Pod::run(config);
    let c = pod.start(SLEEP);
    assert_eq!(c.sh("hostname; cat /etc/hostname"), "the-host\nthe-host");
    assert_eq!(
        c.sh("cat /etc/resolv.conf"),
        "search a.example b.example\nnameserver 10.10.10.10\noptions ndots:3"
    );
    assert!(c.sh("cat /etc/hosts").contains("localhost"));
}

#[test]
fn containers_of_a_pod_share_dev_shm_and_other_pods_do_not() {
    let (one, two) = (Pod::run(pod_config("shm1")), Pod::run(pod_config("shm2")));
    let (a, b, other) = (one.start(SLEEP), one.start(SLEEP), two.start(SLEEP));
    a.sh("echo shared > /dev/shm/f");
    assert_eq!(b.sh("cat /dev/shm/f"), "shared");
    assert_ne!(other.exec(&["cat", "/dev/shm/f"]).0, 0);
    assert!(a.sh("df -k /dev/shm | tail -1").contains("65536"));
}

#[test]
fn sysctls_are_set_in_the_pod_and_not_on_the_host() {
    let mut config = pod_config("sysctl");
    let sysctls = [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_local_port_range", "1024 65000")];
    config.linux.as_mut().unwrap().sysctls = annotations(&sysctls);
    let host = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let pod = Pod::run(config);
    let c = pod.start(SLEEP);
    assert_eq!(c.sh("cat /proc/sys/kernel/shm_rmid_forced"), "1");
    assert_eq!(c.sh("cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '"), "1024 65000");
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap(), host);
    let mut bad = pod_config("sysctl-bad");
    bad.linux.as_mut().unwrap().sysctls = annotations(&[("vm.swappiness", "1")]);
    assert!(Pod::try_run(bad, &handler()).is_err());
}

#[test]
fn host_network_ipc_and_pid_are_the_hosts() {
    let link = |c: &Container, ns: &str| c.sh(&format!("readlink /proc/self/ns/{ns}"));
    let host = |ns: &str| {
        let out = kuasar_tests::inside(&["readlink", &format!("/proc/self/ns/{ns}")]).stdout;
        String::from_utf8(out).unwrap().trim().to_owned()
    };
    let node = NamespaceMode::Node as i32;
    let pod = Pod::with("host", |n| (n.network, n.ipc, n.pid) = (node, node, node));
    let c = pod.start(SLEEP);
    for ns in ["net", "ipc", "pid"] {
        assert_eq!(link(&c, ns), host(ns), "{ns}");
    }
    let pod = Pod::run(pod_config("own"));
    let (a, b) = (pod.start(SLEEP), pod.start(SLEEP));
    for ns in ["net", "ipc", "uts"] {
        assert_ne!(link(&a, ns), host(ns), "{ns}");
        assert_eq!(link(&a, ns), link(&b, ns), "{ns}");
    }
    assert_ne!(link(&a, "pid"), link(&b, "pid"));
}

#[test]
fn a_shared_pid_namespace_has_an_init_that_reaps() {
    let pod = Pod::with("shared", |n| n.pid = NamespaceMode::Pod as i32);
    let a = pod.start(&["sleep", "1111"]);
    let b = pod.start(&["sleep", "2222"]);
    let ps = a.sh("ps -o args");
    assert!(ps.contains("sleep 1111") && ps.contains("sleep 2222"), "{ps}");
    b.sh("(sleep 0.05 &) ; true");
    kuasar_tests::wait_for("orphans are reaped", std::time::Duration::from_secs(5), || {
        !a.sh("ps -o stat,args").contains("sleep 0.05")
    });
    let state = a.sh("ps -o stat | grep -c Z || true");
    assert_eq!(state, "0");
}

#[test]
fn a_target_pid_namespace_is_joined() {
    let pod = Pod::run(pod_config("target"));
    let target = pod.start(&["sleep", "3333"]);
    let c = pod.start_with(SLEEP, |c| {
        let n = security(c).namespace_options.as_mut().unwrap();
        n.pid = NamespaceMode::Target as i32;
        n.target_id.clone_from(&target.id);
    });
    assert!(c.sh("ps -o args").contains("sleep 3333"));
}

#[test]
fn a_user_namespace_maps_root_away() {
    let map = |host| vec![IdMapping { host_id: host, container_id: 0, length: 65536 }];
    let mut config = pod_config("userns");
    let user =
        UserNamespace { mode: NamespaceMode::Pod as i32, uids: map(100_000), gids: map(100_000) };
    let linux = config.linux.as_mut().unwrap();
    let n = linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap();
    n.userns_options = Some(user);
    let name = if handler() == "kuasar-runc" { "kuasar-runc-v2".into() } else { handler() };
    let pod = match Pod::try_run(config, &name) {
        Ok(pod) => pod,
        Err(e) if e.message().contains("not support") => return skip(e.message()),
        Err(e) => panic!("{e}"),
    };
    // A volume of the pod's root, mapped as kubelet asks for it.
    let volume = std::path::PathBuf::from(&pod.config.log_directory).join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    std::fs::write(volume.join("roots"), "").unwrap();
    let mount = Mount {
        host_path: volume.to_string_lossy().into_owned(),
        container_path: "/volume".into(),
        uid_mappings: map(100_000),
        gid_mappings: map(100_000),
        ..Default::default()
    };
    let c = pod.start_with(SLEEP, |c| {
        c.mounts = vec![mount];
        // No image has it.
        c.working_dir = "/new/dir".into();
    });
    assert_eq!(c.sh("stat -c %u /volume/roots /bin/busybox /new /new/dir"), "0\n0\n0\n0");
    c.sh("touch /volume/made /made made");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&volume.join("made").metadata().unwrap()), 0);
    assert!(c.sh("cat /proc/self/uid_map").split_whitespace().eq(["0", "100000", "65536"]));
    assert_eq!(c.sh("id -u"), "0");
}

#[test]
fn containers_are_in_the_pods_cgroup() {
    let pod = Pod::run(pod_config("cgroup"));
    let c = pod.start(SLEEP);
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", c.pid())).unwrap();
    assert!(text.contains(&format!("{parent}/{}", c.id)), "{text}");
}

#[test]
fn a_port_of_the_pod_is_forwarded() {
    let pod = Pod::run(pod_config("forward"));
    pod.start(&[
        "sh",
        "-c",
        "while :; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nhello' | nc -l -p 8080; done",
    ]);
    let q = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
    assert!(cri!(port_forward, q).unwrap().url.starts_with("http"));
}
