//! Pods in machines with hot-plug: QEMU's q35, a kernel with PCI and ACPI.
//!
//! The kernel is that of a distribution (`vmm/guest/build.sh distribution`), or what
//! `KUASAR_PCI_KERNEL` names, such as `target/guest/vmlinux-pci`; the initramfs that goes with it is
//! `KUASAR_PCI_INITRD`.

use crate::ctl::{code, ctl_on, err, out};
use crate::vmm::{HANDLER, Settings, log, machine, strangers, vmm_pid};
use crate::vmm_debug;
use kuasar_protos::controller as api;
use kuasar_tests::cri::*;
use kuasar_tests::{bed, cri, inside, skip, switch, top, wait_for, wire};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::Status;

fn path(variable: &str, name: &str) -> Option<PathBuf> {
    let given = std::env::var_os(variable).map(PathBuf::from);
    given.or_else(|| Some(top().join("target/guest").join(name))).filter(|path| path.is_file())
}

/// The daemon with q35 and these lines more; nothing, and a note, where that does not run.
pub(crate) fn q35(lines: &str) -> Option<Settings> {
    q35_and("", lines)
}

/// The same, with these lines above all tables.
pub(crate) fn q35_and(top: &str, lines: &str) -> Option<Settings> {
    q35_with(top, "", "", lines)
}

/// The same, with lines below `[qemu]` and `[guest]`, too.
fn q35_with(top: &str, qemu: &str, guest: &str, lines: &str) -> Option<Settings> {
    let kernel = path("KUASAR_PCI_KERNEL", "vmlinux-distribution");
    let initrd = path("KUASAR_PCI_INITRD", "initramfs-distribution.cpio");
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        skip("no kernel with PCI: vmm/guest/build.sh distribution target/release/vmm-task");
        return None;
    };
    let (kernel, initrd) = (kernel.display(), initrd.display());
    let guest = format!("[guest]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\n{guest}");
    let below = format!("[qemu]\nmachine = \"q35\"\n{qemu}");
    Settings::with(|text| format!("{top}{}\n{guest}{lines}\n", text.replace("[qemu]", &below)))
}

pub(crate) fn pod(name: &str) -> Pod {
    Pod::try_run(pod_config(name), HANDLER).unwrap()
}

/// The pod's network namespace.
pub(crate) fn netns(pod: &Pod) -> String {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = kuasar_tests::cri!(pod_sandbox_status, q).unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    info.pointer("/cniResult/Interfaces/eth0/Sandbox").unwrap().as_str().unwrap().to_owned()
}

#[test]
fn a_pod_runs_in_a_machine_with_pci() {
    let Some(_settings) = q35_with("", "", &vmm_debug::console_on(), "") else { return };
    let pod = pod("q35-hello");
    let c = pod.start(&["sleep", "1000"]);
    assert_eq!(c.sh("hostname"), pod.config.hostname);
    assert_eq!(c.exec(&["sh", "-c", "echo out; exit 3"]), (3, "out\n".into(), String::new()));
    vmm_debug::works(&pod);
    pod.remove().unwrap();
}

#[test]
fn an_interface_that_comes_after_the_start_is_the_pods_too() {
    let Some(_settings) = q35("") else { return };
    let pod = pod("q35-late");
    let c = pod.start(&["sleep", "1000"]);
    let netns = netns(&pod);
    let name = netns.rsplit('/').next().unwrap().to_owned();
    let ip = |args: &str| {
        let args: Vec<&str> = ["ip"].into_iter().chain(args.split(' ')).collect();
        let out = inside(&args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    ip(&format!("link add late0 type veth peer name late1 netns {name}"));
    ip("addr add 192.0.2.1/24 dev late0");
    ip("link set late0 up");
    ip(&format!("-n {name} link set late1 up"));
    ip(&format!("-n {name} addr add 192.0.2.2/24 dev late1"));
    wait_for("the guest has the address", Duration::from_secs(30), || {
        c.sh("ip -4 -o addr show 2>/dev/null").contains("192.0.2.2/24")
    });
    assert_eq!(c.sh("ping -c 1 -w 10 192.0.2.1 >/dev/null && echo yes"), "yes");
    pod.remove().unwrap();
}

/// A block device of the host over an image file; gone when dropped.
struct Loop(String);

impl Loop {
    fn over(image: &std::path::Path) -> Self {
        let out = inside(&["losetup", "--find", "--show", &image.to_string_lossy()]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Self(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        inside(&["losetup", "--detach", &self.0]);
    }
}

#[test]
fn an_image_of_a_block_snapshotter_is_the_containers_root_on_a_disk_of_its_own() {
    let Some(_settings) = q35("") else { return };
    let config = std::fs::read_to_string(bed().join("etc/config.toml")).unwrap();
    if !config.contains("kuasar-vmm-block") {
        return skip("no blockfile snapshotter in the test bed: mkfs.ext4 is missing");
    }
    let pod = Pod::try_run(pod_config("q35-blockfile"), "kuasar-vmm-block").unwrap();
    let root = "awk '$2 == \"/\" {print $1, $3}' /proc/mounts";
    let one = pod.start(&["sleep", "1000"]);
    assert!(one.sh(root).ends_with(" ext4"), "{}", one.sh(root));
    let other = pod.start(&["sleep", "1000"]);
    assert_ne!(one.sh("mountpoint -d /"), other.sh("mountpoint -d /"));
    assert_eq!(one.sh("echo mine > /mine && cat /mine"), "mine");
    assert_ne!(other.exec(&["ls", "/mine"]).0, 0);
    // The ports come back: more containers, one after the other, than the machine has.
    one.stop(0).unwrap();
    one.remove().unwrap();
    for _ in 0..3 {
        let c = pod.start(&["true"]);
        assert_eq!(c.wait(), 0);
        c.remove().unwrap();
    }
    assert_eq!(other.sh("echo alive"), "alive");
    pod.remove().unwrap();
}

#[test]
fn a_raw_block_volume_is_the_containers_device_and_read_only_where_it_is_so() {
    let Some(_settings) = q35("") else { return };
    let pod = pod("q35-volume");
    let image = PathBuf::from(&pod.config.log_directory).join("volume.img");
    let mut bytes = vec![0_u8; 1 << 20];
    bytes[..5].copy_from_slice(b"hello");
    std::fs::write(&image, bytes).unwrap();
    let disk = Loop::over(&image);
    let device = |permissions: &str| Device {
        container_path: "/dev/xvda".into(),
        host_path: disk.0.clone(),
        permissions: permissions.into(),
    };
    let c = pod.start_with(&["sleep", "1000"], |c| c.devices = vec![device("rwm")]);
    assert_eq!(c.sh("head -c 5 /dev/xvda"), "hello");
    assert_eq!(
        c.sh("printf world | dd of=/dev/xvda conv=notrunc,fsync 2>/dev/null && echo ok"),
        "ok"
    );
    // Another container of the pod has the same disk, and a third one no access to it.
    let second = pod.start_with(&["sleep", "1000"], |c| c.devices = vec![device("r")]);
    assert_eq!(second.sh("head -c 5 /dev/xvda"), "world");
    assert_ne!(second.exec(&["sh", "-c", "echo no > /dev/xvda"]).0, 0);
    let stranger = pod.start(&["sleep", "1000"]);
    assert_ne!(stranger.exec(&["ls", "/dev/xvda"]).0, 0);
    for c in [&c, &second] {
        c.stop(0).unwrap();
        c.remove().unwrap();
    }
    // Out of the machine: the host may do with it what it likes.
    let read_only = pod.start_with(&["sleep", "1000"], |c| c.devices = vec![device("r")]);
    assert_eq!(read_only.sh("head -c 5 /dev/xvda"), "world");
    assert_eq!(read_only.sh("cat /sys/block/*/ro | sort -u | tail -n 1"), "1");
    pod.remove().unwrap();
    assert_eq!(&std::fs::read(&image).unwrap()[..5], b"world");
}

#[test]
fn a_machine_grows_with_its_pod_and_says_where_it_ends() {
    // No CPUs: a guest under TCG takes none that come later, so this machine is made without them.
    let grow = "[size]\nmemory_mib = 384\ngrow_cpus = 1\ngrow_memory_mib = 256\n";
    let Some(_settings) = q35(grow) else { return };
    let pod = pod("q35-grow");
    let c = pod.start(&["sleep", "1000"]);
    let number = |line: &str| c.sh(line).parse::<u64>().unwrap();
    // Of what the balloon does not hold.
    let memory = "awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo";
    let cpus = "grep -c ^processor /proc/cpuinfo";
    assert_eq!(number(cpus), 1);
    // On a busy host the balloon takes a while after the boot: it has all when the memory stands still.
    let (mut before, mut stood) = (u64::MAX, 0);
    wait_for("the balloon holds the rest", Duration::from_secs(60), || {
        let now = number(memory);
        stood = if now.abs_diff(before) < 2 { stood + 1 } else { 0 };
        before = now;
        now < 384 && stood >= 3
    });
    // As containerd passes kubelet's UpdatePodSandboxResources on.
    let update = |quota: i64, mib: i64| -> Result<api::ControllerUpdateResponse, Status> {
        let resources = serde_json::json!({ "resources": {
            "cpu_period": 100_000, "cpu_quota": quota, "memory_limit_in_bytes": mib << 20,
        }});
        const KEY: &str = "podsandbox.UpdatedResourcesKey";
        let value = Any { value: resources.to_string().into_bytes(), ..Any::default() };
        let sandbox = kuasar_protos::types::Sandbox {
            sandbox_id: pod.id.clone(),
            extensions: [(KEY.to_owned(), value)].into(),
            ..Default::default()
        };
        let q = api::ControllerUpdateRequest {
            sandbox_id: pod.id.clone(),
            sandbox: MessageField::some(sandbox),
            fields: vec![format!("extensions.{KEY}")],
            ..Default::default()
        };
        wire::controller("Update", q)
    };
    let memory_at_boot = 384 - 48;
    // A container's own limit is one more reason to grow; it is no reason to shrink.
    let limit = |mib: i64| {
        let linux = LinuxContainerResources {
            memory_limit_in_bytes: mib << 20,
            ..LinuxContainerResources::default()
        };
        let q = UpdateContainerResourcesRequest {
            container_id: c.id.clone(),
            linux: Some(linux),
            ..Default::default()
        };
        cri!(update_container_resources, q).unwrap();
    };
    limit(memory_at_boot + 64);
    wait_for("memory", Duration::from_secs(60), || number(memory) > before + 32);
    limit(64);
    assert!(number(memory) > before + 32);
    // So is what another one begins with, beside it.
    let second = pod.start_with(&["sleep", "1000"], |c| {
        let resources = c.linux.get_or_insert_default().resources.get_or_insert_default();
        resources.memory_limit_in_bytes = (memory_at_boot + 64) << 20;
    });
    wait_for("memory", Duration::from_secs(60), || number(memory) > before + 84);
    second.stop(0).unwrap();
    second.remove().unwrap();
    limit(memory_at_boot + 4096);
    wait_for("all memory", Duration::from_secs(60), || number(memory) > before + 128);
    update(200_000, memory_at_boot).unwrap();
    wait_for("less memory", Duration::from_secs(60), || number(memory) < before + 64);
    update(200_000, memory_at_boot + 256).unwrap();
    wait_for("memory", Duration::from_secs(60), || number(memory) > before + 128);
    assert_eq!(number(cpus), 1);
    let error = update(0, memory_at_boot + 257).unwrap_err().message().to_owned();
    assert!(error.contains("size.grow_memory_mib"), "{error}");
    assert_eq!(c.sh("echo alive"), "alive");
    pod.remove().unwrap();
}

/// A daemon with q35 that makes templates, in this empty directory.
fn with_templates(name: &str) -> Option<(PathBuf, Settings)> {
    with_templates_by("", "", "", name, "")
}

/// The same, with lines above all tables, below `[qemu]`, `[guest]`, and `[template]` (and behind it).
pub(crate) fn with_templates_by(
    top: &str,
    qemu: &str,
    guest: &str,
    name: &str,
    lines: &str,
) -> Option<(PathBuf, Settings)> {
    let dir = bed().join("run").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    let below = format!("[template]\nenabled = true\ndir = \"{}\"\n{lines}\n", dir.display());
    let settings = q35_with(top, qemu, guest, &below)?;
    // Where templates are counts from a daemon's start.
    let vmm = [("KIND", "vmm")];
    switch(&["daemon", "stop"], &vmm);
    switch(&["daemon", "start"], &vmm);
    Some((dir, settings))
}

#[test]
fn pods_of_a_template_start_sooner_and_share_no_identity() {
    let Some((dir, settings)) = with_templates("templates") else { return };
    let from = log().len();
    let begun = Instant::now();
    let first = pod("template-cold");
    let cold = begun.elapsed();
    wait_for("a template", Duration::from_secs(120), || {
        log()[from..].contains("a template is ready")
    });
    let begun = Instant::now();
    let (one, two) = (pod("template-one"), pod("template-two"));
    let copied = begun.elapsed() / 2;
    println!("figure: pod cold {cold:?}, of a template {copied:?}");
    assert!(!log()[from..].contains("boots cold"), "{}", &log()[from..]);
    strangers([&one, &two]);
    assert!(copied < cold, "{copied:?} {cold:?}");
    // Their agents are reached by the port that the template has.
    assert_eq!([&first, &one, &two].map(channel), ["serial"; 3]);
    drop((first, one, two));

    // A damaged one: the pod starts all the same.
    let template = std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
    let state = template.join("state");
    let mut bytes = std::fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let from = log().len();
    let pod = pod("template-damaged");
    assert_eq!(pod.start(&["sleep", "1000"]).sh("echo alive"), "alive");
    assert!(log()[from..].contains("a template is damaged"), "{}", &log()[from..]);
    assert!(!template.exists());
    drop(pod);
    drop(settings);
    let _ = std::fs::remove_dir_all(&dir);
}

/// What a pod's machine has for its agent, by its processes and QEMU's command line.
pub(crate) fn channel(pod: &Pod) -> &'static str {
    let line = std::fs::read(format!("/proc/{}/cmdline", vmm_pid(pod))).unwrap();
    let port = String::from_utf8_lossy(&line).contains("virtserialport");
    let has = |name: &str| machine(pod).iter().any(|(_, comm)| comm.starts_with(name));
    match (port, has("vmm-sandboxer"), has("vhost-device-v")) {
        (true, true, false) => "serial",
        (_, false, true) => "vsock",
        other => panic!("port, relay, vsock helper: {other:?}"),
    }
}

#[test]
fn a_copy_on_its_templates_port_and_one_whose_vsock_is_plugged_in_go_on_after_kill_9() {
    let vmm = [("KIND", "vmm")];
    for (chosen, wanted) in [("auto", "serial"), ("hybrid", "vsock")] {
        let (below, name) = (format!("channel = \"{chosen}\""), format!("templates-{chosen}"));
        let with = with_templates_by("", &below, &vmm_debug::console_on(), &name, "");
        let Some((dir, settings)) = with else { return };
        assert_eq!(template(&["make", "--limit", "300"]).1, 0);
        let from = log().len();
        let pod = pod(&name);
        assert!(!log()[from..].contains("boots cold"), "{}", &log()[from..]);
        assert_eq!(channel(&pod), wanted);
        let c = pod.start(&["sh", "-c", "sleep 2; seq 1 20000; sleep 1000"]);
        switch(&["daemon", "kill"], &vmm);
        switch(&["daemon", "start"], &vmm);
        assert_eq!(c.sh("hostname"), pod.config.hostname);
        let numbers: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
        wait_for("all output", Duration::from_secs(60), || {
            c.logged("stdout").len() >= numbers.len()
        });
        assert!(c.logged("stdout") == numbers.as_bytes(), "bytes differ");
        vmm_debug::works(&pod);
        c.stop(0).unwrap();
        assert_eq!(c.wait(), 137);
        pod.remove().unwrap();
        assert!(machine(&pod).is_empty());
        drop(settings);
        let _ = std::fs::remove_dir_all(&dir);
    }
}

/// `kuasar-ctl template` on the running daemon: what it answers as JSON, and its exit code.
pub(crate) fn template(args: &[&str]) -> (serde_json::Value, i32) {
    let said = ctl_on(&["vmm"], &[&["-o", "json", "template"], args].concat());
    let value = serde_json::from_str(&out(&said));
    (value.unwrap_or_else(|e| panic!("{args:?}: {e}: {}", err(&said))), code(&said))
}

#[test]
fn ctl_makes_verifies_and_removes_templates_of_a_running_daemon() {
    let Some((dir, settings)) = with_templates("ctl-templates") else { return };
    assert_eq!(template(&["list"]).0["templates"].as_array().unwrap().len(), 0);
    let (made, exit) = template(&["make", "--limit", "300"]);
    let all = made["templates"].as_array().unwrap();
    assert_eq!((all.len(), &all[0]["finished"], exit), (1, &true.into(), 0), "{made:#}");
    let key = all[0]["key"].as_str().unwrap().to_owned();
    // The pod that it was made by is gone, and one of that size starts from it.
    let pods = out(&ctl_on(&["vmm"], &["-o", "json", "ps"]));
    assert_eq!(pods.trim(), "[]");
    let from = log().len();
    let pod = pod("ctl-template");
    assert!(!log()[from..].contains("boots cold"), "{}", &log()[from..]);
    let c = pod.start(&["sleep", "1000"]);
    // A second one of the size is not made, and that is said.
    let again = ctl_on(&["vmm"], &["template", "make", "--limit", "40"]);
    assert_eq!(code(&again), 1, "{}", out(&again));
    assert!(err(&again).contains("there is one of this size already"), "{}", err(&again));
    // By the beginning of its key, under the pod that has come from it.
    let (whole, exit) = template(&["verify", &key[..8]]);
    assert_eq!((&whole["templates"][0]["verified"], exit), (&true.into(), 0), "{whole:#}");
    let none = ctl_on(&["vmm"], &["template", "remove", "zzzz"]);
    assert_eq!(code(&none), 4, "{}", err(&none));
    // A damaged one is told from a whole one, stays until it is removed, and the pod goes on.
    let state = dir.join(&key).join("state");
    let copy = std::fs::read(&state).unwrap();
    std::fs::remove_file(&state).unwrap();
    std::fs::write(&state, &copy[..copy.len() - 1]).unwrap();
    let (torn, exit) = template(&["verify"]);
    assert_eq!((&torn["templates"][0]["verified"], exit), (&false.into(), 5), "{torn:#}");
    let (left, exit) = template(&["remove", &key[..8]]);
    assert_eq!((left["templates"].as_array().unwrap().len(), exit), (0, 0), "{left:#}");
    assert!(!dir.join(&key).exists());
    assert_eq!(c.sh("echo alive"), "alive");
    pod.remove().unwrap();
    drop(settings);
    let _ = std::fs::remove_dir_all(&dir);
}
