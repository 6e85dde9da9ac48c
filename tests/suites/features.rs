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
    let user = UserNamespace { mode: NamespaceMode::Pod as i32, uids: map(100_000), gids: map(100_000) };
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
    let c = pod.start_with(SLEEP, |c| c.mounts = vec![mount]);
    assert_eq!(c.sh("stat -c %u /volume/roots /bin/busybox"), "0\n0");
    c.sh("touch /volume/made /made");
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
fn seccomp_and_capabilities_are_applied() {
    let pod = Pod::run(pod_config("seccomp"));
    let c = pod.start_with(SLEEP, |c| {
        let s = security(c);
        s.seccomp = Some(SecurityProfile { profile_type: 0, localhost_ref: String::new() });
        s.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: vec!["CHOWN".into()],
            ..Default::default()
        });
    });
    assert_eq!(c.sh("grep Seccomp: /proc/self/status | tr -dc 0-9"), "2");
    let caps = |l: &str| u64::from_str_radix(&c.sh(&format!("grep {l} /proc/self/status | cut -f2")), 16).unwrap();
    assert_ne!(caps("CapEff") & (1 << 12), 0, "NET_ADMIN");
    assert_eq!(caps("CapEff") & 1, 0, "CHOWN");
    assert_eq!(caps("CapAmb") | caps("CapInh"), 0);
    let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    assert!(status.contains("Seccomp:\t2"));
    let free = pod.start_with(SLEEP, |c| {
        security(c).seccomp = Some(SecurityProfile { profile_type: 1, localhost_ref: String::new() });
    });
    assert_eq!(free.sh("grep Seccomp: /proc/self/status | tr -dc 0-9"), "0");
}

#[test]
fn paths_are_masked_and_read_only() {
    let pod = Pod::run(pod_config("masked"));
    let c = pod.start_with(SLEEP, |c| {
        security(c).masked_paths = vec!["/proc/kcore".into(), "/proc/timer_list".into()];
        security(c).readonly_paths = vec!["/proc/sys".into()];
        security(c).readonly_rootfs = true;
    });
    assert_eq!(c.sh("head -c 10 /proc/kcore | wc -c"), "0");
    assert_ne!(c.exec(&["sh", "-c", "echo x > /proc/sys/kernel/domainname"]).0, 0);
    assert_ne!(c.exec(&["touch", "/x"]).0, 0);
    c.sh("touch /dev/shm/x");
}

#[test]
fn devices_are_there_and_others_are_not() {
    let pod = Pod::run(pod_config("devices"));
    let device = |from: &str, to: &str| Device {
        host_path: from.into(),
        container_path: to.into(),
        permissions: "rwm".into(),
    };
    let c = pod.start_with(SLEEP, |c| c.devices = vec![device("/dev/null", "/dev/mine")]);
    c.sh("test -c /dev/mine && echo x > /dev/mine");
    assert_ne!(c.exec(&["sh", "-c", "mknod /tmp/m b 8 0 && head -c1 /tmp/m"]).0, 0);
}

#[test]
fn a_privileged_container_may_do_what_root_may() {
    let mut config = pod_config("privileged");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let pod = Pod::run(config);
    let c = pod.start_with(SLEEP, |c| security(c).privileged = true);
    c.sh("mount -t tmpfs none /mnt 2>/dev/null || mount -t tmpfs none /tmp");
    c.sh("test -c /dev/kmsg || test -c /dev/tty0 || test -c /dev/full");
}

#[test]
fn processes_run_as_the_user_that_was_asked_for() {
    let pod = Pod::run(pod_config("user"));
    let c = pod.start_with(SLEEP, |c| {
        let s = security(c);
        s.run_as_user = Some(Int64Value { value: 1234 });
        s.run_as_group = Some(Int64Value { value: 5678 });
        s.supplemental_groups = vec![4321];
        s.no_new_privs = true;
    });
    assert_eq!(c.sh("id -u; id -g"), "1234\n5678");
    assert!(c.sh("id -G").contains("4321"));
    assert_eq!(c.sh("grep NoNewPrivs /proc/self/status | tr -dc 0-9"), "1");
}

#[test]
fn an_out_of_memory_kill_is_reported() {
    let pod = Pod::run(pod_config("oom"));
    let c = pod.start_with(&["sh", "-c", "sleep 0.2; tail /dev/zero"], |c| {
        let r = c.linux.as_mut().unwrap().resources.as_mut().unwrap();
        r.memory_limit_in_bytes = 16 << 20;
        r.memory_swap_limit_in_bytes = 16 << 20;
    });
    assert_ne!(c.wait(), 0);
    assert_eq!(c.status().reason, "OOMKilled");
}

#[test]
fn volumes_keep_their_flags() {
    let pod = Pod::run(pod_config("volumes"));
    let dir = std::path::PathBuf::from(&pod.config.log_directory).join("volume");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("f"), "from the host").unwrap();
    let mount = |to: &str, readonly| Mount {
        host_path: dir.to_string_lossy().into_owned(),
        container_path: to.into(),
        readonly,
        ..Default::default()
    };
    let c = pod.start_with(SLEEP, |c| c.mounts = vec![mount("/ro", true), mount("/rw", false)]);
    assert_eq!(c.sh("cat /ro/f"), "from the host");
    assert_ne!(c.exec(&["touch", "/ro/x"]).0, 0);
    c.sh("echo back > /rw/g");
    assert_eq!(std::fs::read_to_string(dir.join("g")).unwrap(), "back\n");
}

#[test]
fn every_engine_runs_a_container() {
    if handler() != "kuasar-runc" {
        return skip("engines are a matter of kuasar-runc");
    }
    for engine in ["builtin", "runc", "crun"] {
        if engine != "builtin" {
            let program = if engine == "runc" { "runc13" } else { engine };
            let works = std::process::Command::new(kuasar_tests::bed().join("bin").join(program))
                .arg("--version")
                .output()
                .is_ok_and(|o| o.status.success());
            if !works {
                skip(&format!("engine {engine} is not packaged for this release"));
                continue;
            }
        }
        let mut config = pod_config("engine");
        config.annotations = annotations(&[("io.kuasar.runc.engine", engine)]);
        let pod = Pod::run(config);
        let c = pod.create_with(SLEEP, |_| {}).unwrap();
        match c.start() {
            Ok(()) => {}
            // crun 1.8 does not know every cgroup v1 set-up.
            Err(e) if engine == "crun" => {
                skip(&format!("crun: {}", e.message()));
                continue;
            }
            Err(e) => panic!("{engine}: {e}"),
        }
        assert_eq!(c.sh("hostname"), "engine", "{engine}");
        assert_eq!(c.exec(&["sh", "-c", "exit 5"]).0, 5, "{engine}");
        c.stop(0).unwrap();
    }
}

#[test]
fn a_port_of_the_pod_is_forwarded() {
    let pod = Pod::run(pod_config("forward"));
    pod.start(&["sh", "-c", "while :; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nhello' | nc -l -p 8080; done"]);
    let q = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
    assert!(cri!(port_forward, q).unwrap().url.starts_with("http"));
}

#[test]
fn checkpoint_without_support_is_refused_clearly() {
    if handler() == "runc" {
        return skip("a matter of kuasar-runc");
    }
    let pod = Pod::run(pod_config("checkpoint"));
    let c = pod.start(SLEEP);
    let location = format!("{}/cp.tar", pod.config.log_directory);
    let q = CheckpointContainerRequest { container_id: c.id.clone(), location, timeout: 10 };
    let e = cri!(checkpoint_container, q).unwrap_err();
    assert!(!e.message().is_empty());
    assert!(c.is_running());
}
