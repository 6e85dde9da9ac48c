//! What a container's processes may do, seen from inside: users, capabilities, seccomp, devices,
//! paths, limits.

use kuasar_tests::cri::*;
use kuasar_tests::wire::Bundle;
use kuasar_tests::{leaks, ours, skip, wire};
use serde_json::json;

use crate::engines;

fn security(c: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    c.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

const SLEEP: &[&str] = &["sleep", "1000"];

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
    let caps = |l: &str| {
        u64::from_str_radix(&c.sh(&format!("grep {l} /proc/self/status | cut -f2")), 16).unwrap()
    };
    assert_ne!(caps("CapEff") & (1 << 12), 0, "NET_ADMIN");
    assert_eq!(caps("CapEff") & 1, 0, "CHOWN");
    assert_eq!(caps("CapAmb") | caps("CapInh"), 0);
    let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid())).unwrap();
    assert!(status.contains("Seccomp:\t2"));
    let free = pod.start_with(SLEEP, |c| {
        security(c).seccomp =
            Some(SecurityProfile { profile_type: 1, localhost_ref: String::new() });
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
    c.sh("for d in null zero full random urandom tty; do test -c /dev/$d || exit 1; done");
    c.sh("test -e /dev/ptmx && test -d /dev/pts && test -L /dev/stdin");
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
fn limits_of_processes_are_applied() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    for engine in engines::available() {
        let line = "{ ulimit -n; ulimit -Hn; ulimit -c; } > /out";
        let mut bundle = Bundle::new(&["sh", "-c", line]);
        bundle.spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]);
        let pod = wire::Direct::run_on("rlimits", engine);
        assert_eq!(pod.run_to_end(&bundle).unwrap(), 0, "{engine}");
        assert_eq!(bundle.out(), "123\n456\n0", "{engine}");
    }
    leaks::assert_none(&before);
}

#[test]
fn huge_pages_are_limited_where_the_kernel_counts_them() {
    let pod = Pod::run(pod_config("huge"));
    let c = pod.start_with(SLEEP, |c| {
        c.linux.as_mut().unwrap().resources.as_mut().unwrap().hugepage_limits =
            vec![HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }];
    });
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    let group = format!("{parent}/{}", c.id);
    let files = [
        format!("/sys/fs/cgroup/hugetlb{group}/hugetlb.2MB.limit_in_bytes"),
        format!("/sys/fs/cgroup{group}/hugetlb.2MB.max"),
    ];
    match files.iter().find_map(|file| std::fs::read_to_string(file).ok()) {
        Some(limit) => assert_eq!(limit.trim(), (4 << 20).to_string()),
        None => skip("huge pages are not counted by a cgroup controller that is used here"),
    }
}

#[test]
fn a_label_of_selinux_is_told_to_containerd() {
    if !ours() {
        return;
    }
    let pod = wire::Direct::run_with("selinux", |config| {
        let linux = config.linux.mut_or_insert_default();
        let options =
            linux.security_context.mut_or_insert_default().selinux_options.mut_or_insert_default();
        (options.user, options.role) = ("system_u".into(), "system_r".into());
        (options.type_, options.level) = ("container_t".into(), "s0:c1,c2".into());
    });
    assert_eq!(pod.labels["selinux_label"], "system_u:system_r:container_t:s0:c1,c2");
    if !std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        skip("no SELinux in this kernel: that labels are enforced is not seen");
    }
}

#[test]
fn an_exec_may_do_no_more_than_its_container() {
    engines::each("exec", |engine, pod| {
        let c = pod.start_with(SLEEP, |c| {
            let s = security(c);
            s.run_as_user = Some(Int64Value { value: 1234 });
            s.run_as_group = Some(Int64Value { value: 5678 });
            s.supplemental_groups = vec![4321];
            s.no_new_privs = true;
            s.readonly_rootfs = true;
            s.seccomp = Some(SecurityProfile { profile_type: 0, localhost_ref: String::new() });
        });
        // An exec's process has what its container's has.
        let lines = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):'";
        let status = |who: &str| c.sh(&format!("{lines} /proc/{who}/status"));
        assert_eq!(status("self"), status("1"), "{engine}");
        assert_eq!(c.sh("id -u; id -g; id -G"), "1234\n5678\n5678 4321", "{engine}");
        assert!(status("self").contains("NoNewPrivs:\t1"), "{engine}");
        assert!(status("self").contains("CapEff:\t0000000000000000"), "{engine}");
        assert_ne!(c.exec(&["touch", "/x"]).0, 0, "{engine}");
    });
}
