//! Pods that are machines: QEMU boots a real guest for each of these.
//!
//! Skipped where the daemon, QEMU or a guest is missing (`make guest`, `tests/bed/vmm.sh`).

use kuasar_protos::controller as api;
use kuasar_tests::cri::*;
use kuasar_tests::{
    bed, cri, daemon_pid, inside, leaks, on, programs, skip, switch, top, wait_for, wire,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{own_kernel, terminal};

pub(crate) const HANDLER: &str = "kuasar-vmm";

/// Another configuration of the daemon; as it was before when dropped.
pub(crate) struct Settings {
    file: PathBuf,
    text: String,
    chosen: kuasar_tests::Chosen,
}

impl Settings {
    /// The bed's configuration changed; nothing, and a note, where pods in VMs do not run.
    pub(crate) fn with(change: impl FnOnce(&str) -> String) -> Option<Self> {
        if !able() {
            return None;
        }
        let chosen = on(HANDLER)?;
        let file = bed().join("etc/kuasar-vmm.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        let settings = Self { file, text, chosen };
        settings.reload(&change(&settings.text));
        Some(settings)
    }

    fn reload(&self, text: &str) {
        let from = log().len();
        std::fs::write(&self.file, text).unwrap();
        // SAFETY: the daemon of this bed.
        unsafe { libc::kill(daemon_pid() as i32, libc::SIGHUP) };
        let word = "configuration read again";
        wait_for(word, Duration::from_secs(10), || log()[from..].contains(word));
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        let _ = &self.chosen;
        if !std::thread::panicking() {
            // Whoever changes it next waits for the same word, and is not to take this one's for its own.
            return self.reload(&self.text);
        }
        let _ = std::fs::write(&self.file, &self.text);
        // SAFETY: the daemon of this bed.
        unsafe { libc::kill(daemon_pid() as i32, libc::SIGHUP) };
    }
}

/// What the daemon has logged.
pub(crate) fn log() -> String {
    let bytes = std::fs::read(bed().join("run/kuasar-vmm.log")).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether pods in VMs can run here.
pub(crate) fn able() -> bool {
    let config = std::fs::read_to_string(bed().join("etc/kuasar-vmm.toml")).unwrap_or_default();
    let guest = top().join("target/guest");
    let missing = if !programs().join("vmm-sandboxer").is_file() {
        Some("vmm-sandboxer is not built")
    } else if !bed().join("vmm/libexec/qemu-system-x86_64").is_file() {
        Some("no QEMU in the bed: tests/bed/vmm.sh")
    } else if !config.contains("kernel =") && !guest.join("vmlinux").is_file() {
        Some("no guest: make guest")
    } else {
        None
    };
    if let Some(reason) = missing {
        skip(reason);
    }
    missing.is_none()
}

pub(crate) fn pod(name: &str) -> Pod {
    Pod::try_run(pod_config(name), HANDLER).unwrap()
}

/// Two pods on machines that were copied from one have nothing in common by which they are known, and
/// the right time. Answers a container in each.
pub(crate) fn strangers(pods: [&Pod; 2]) -> [Container; 2] {
    let containers = pods.map(|pod| pod.start(&["sleep", "1000"]));
    let said = |line: &str| containers.each_ref().map(|c| c.sh(line));
    assert_eq!(said("hostname"), pods.map(|pod| pod.config.hostname.clone()));
    for line in [
        "head -c 16 /dev/urandom | od -An -tx1",
        "cat /sys/class/net/eth0/address",
        "ip -4 -o addr show eth0",
    ] {
        let [a, b] = said(line);
        assert!(!a.is_empty() && a != b, "{line}: {a}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    for seconds in said("date +%s") {
        let off = seconds.parse::<u64>().unwrap().abs_diff(now.as_secs());
        assert!(off < 30, "the clock is off by {off} s");
    }
    containers
}

/// Pids of the pod's machine and its helpers: whoever has the pod's id on its command line or in
/// its cgroup.
pub(crate) fn machine(pod: &Pod) -> Vec<(u32, String)> {
    machine_of(&pod.id)
}

fn machine_of(id: &str) -> Vec<(u32, String)> {
    let group = format!("machine-{id}");
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if cgroup.contains(&group) {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            all.push((pid, name.trim().to_owned()));
        }
    }
    all
}

pub(crate) fn vmm_pid(pod: &Pod) -> u32 {
    vmm_pid_of(&pod.id)
}

/// Pid of the VMM of a sandbox.
pub(crate) fn vmm_pid_of(id: &str) -> u32 {
    let all = machine_of(id);
    let vmm = all.iter().find(|(_, name)| name.starts_with("qemu"));
    vmm.unwrap_or_else(|| panic!("no QEMU among {all:?}")).0
}

/// What names a namespace of a process.
pub(crate) fn link(pid: u32, what: &str) -> String {
    let path = format!("/proc/{pid}/ns/{what}");
    std::fs::read_link(path).unwrap().to_string_lossy().into_owned()
}

/// A line of `/proc/PID/status`.
pub(crate) fn status(pid: u32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

pub(crate) fn kill(pid: u32) {
    // SAFETY: a pid that we have just found in the pod's own cgroup.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
}

pub(crate) fn machine_dirs() -> Vec<PathBuf> {
    let dir = bed().join("run/kuasar-vmm/vm");
    let dir = PathBuf::from(format!("{}{}", kuasar_tests::root().display(), dir.display()));
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[test]
fn a_container_runs_under_its_own_kernel_and_says_so() {
    if !able() {
        return;
    }
    let begun = log().len();
    let pod = pod("vm-hello");
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let c = pod.start(&["sh", "-c", "echo hello; uname -r; exit 7"]);
    assert_eq!(c.wait(), 7);
    let said = String::from_utf8(c.logged("stdout")).unwrap();
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("hello"), "{said:?}");
    assert_ne!(lines.next(), Some(host.trim()));
    // With the engine's default profile, which an exec is held by, too.
    let c = pod.start_with(&["sleep", "1000"], |c| {
        let security = c.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.seccomp = Some(SecurityProfile { profile_type: 0, localhost_ref: String::new() });
    });
    assert_eq!(
        c.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]),
        (3, "out\n".into(), "err\n".into())
    );
    assert_eq!(c.sh("grep Seccomp: /proc/self/status | tr -dc 0-9"), "2");
    assert_eq!(c.sh("hostname"), pod.config.hostname);
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    assert!(!machine(&pod).is_empty());
    pod.stop();
    assert_eq!(machine(&pod), []);
    pod.remove().unwrap();
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
    // Nothing of this is to trouble anybody.
    let log = log();
    let grave = |line: &&str| line.contains(" ERROR ") || line.contains(" WARN ");
    let grave = log[begun..].lines().filter(grave).filter(|line| line.contains(&pod.id));
    assert_eq!(grave.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn the_pod_has_its_address_and_is_reached_and_reaches_others() {
    if !able() {
        return;
    }
    let pod = pod("vm-net");
    let c = pod.start(&["sh", "-c", "while :; do echo pong | nc -l -p 7000; done"]);
    let ip = c.sh("ip -4 -o addr show eth0 | awk '{print $4}' | cut -d/ -f1");
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    assert_eq!(cri!(pod_sandbox_status, q).unwrap().status.unwrap().network.unwrap().ip, ip);
    let mut answer = String::new();
    wait_for("the pod answers", Duration::from_secs(20), || {
        let out = inside(&["sh", "-c", &format!("exec 3<>/dev/tcp/{ip}/7000; cat <&3")]);
        let out = if out.stdout.is_empty() {
            inside(&["bash", "-c", &format!("exec 3<>/dev/tcp/{ip}/7000; timeout 2 cat <&3")])
        } else {
            out
        };
        answer = String::from_utf8_lossy(&out.stdout).into_owned();
        answer.contains("pong")
    });
    let gateway = c.sh("ip route | awk '/default/ {print $3}'");
    assert_eq!(c.sh(&format!("ping -c 1 -w 5 {gateway} >/dev/null && echo yes")), "yes");
    pod.remove().unwrap();
}

#[test]
fn volumes_are_seen_with_their_updates_and_read_only_stays_read_only() {
    if !able() {
        return;
    }
    let pod = pod("vm-volumes");
    let dir = PathBuf::from(&pod.config.log_directory).join("volume");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("config"), "one").unwrap();
    let mount = |readonly| Mount {
        host_path: dir.to_string_lossy().into_owned(),
        container_path: "/v".into(),
        readonly,
        ..Default::default()
    };
    let ro = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount(true)]);
    let rw = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount(false)]);
    assert_eq!(ro.sh("cat /v/config"), "one");
    assert_ne!(ro.exec(&["sh", "-c", "echo no > /v/config"]).0, 0);
    assert_eq!(rw.sh("echo two > /v/config; cat /v/config"), "two");
    assert_eq!(std::fs::read_to_string(dir.join("config")).unwrap(), "two\n");
    std::fs::write(dir.join("config"), "three").unwrap();
    wait_for("an update is seen", Duration::from_secs(10), || ro.sh("cat /v/config") == "three");
    // Each container has its own root file system.
    rw.sh("touch /mine");
    assert_ne!(ro.exec(&["ls", "/mine"]).0, 0);
    pod.remove().unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("config")).unwrap(), "three");
}

#[test]
fn a_guest_boots_from_its_erofs_image_which_nobody_can_write() {
    let image = top().join("target/guest/guest.erofs");
    if !image.is_file() {
        return skip("no target/guest/guest.erofs: make guest");
    }
    let lines = format!("[guest]\nimage = \"{}\"", image.display());
    let Some(_settings) = Settings::with(|text| format!("{text}\n{lines}\n")) else { return };
    let before = std::fs::read(&image).unwrap();
    let pod = pod("vm-erofs");
    let c = pod.start(&["sleep", "1000"]);
    let said = c.exec(&["sh", "-c", "cat /proc/cmdline; exit 3"]);
    assert!(said.0 == 3 && said.1.contains("rootfstype=erofs"), "{said:?}");
    // The disk below the guest's root: no container has it, and the machine may only read it.
    assert_eq!(c.sh("cat /sys/block/vda/ro"), "1");
    assert_ne!(c.exec(&["ls", "/dev/vda"]).0, 0);
    pod.remove().unwrap();
    assert!(std::fs::read(&image).unwrap() == before, "the image has changed");
}

/// A volume as kubelet makes it for `emptyDir: {medium: HugePages}`.
struct HugeVolume(PathBuf);

impl HugeVolume {
    fn new(pod: &Pod) -> Self {
        let dir = Path::new(&pod.config.log_directory).join("kubernetes.io~empty-dir/huge");
        std::fs::create_dir_all(&dir).unwrap();
        let at = dir.to_str().unwrap();
        let made = inside(&["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "nodev", at]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self(dir)
    }
}

impl Drop for HugeVolume {
    fn drop(&mut self) {
        inside(&["umount", self.0.to_str().unwrap()]);
    }
}

#[test]
fn huge_pages_are_the_guests_one_volume_for_the_pod_and_go_with_the_files() {
    if !able() {
        return;
    }
    if !std::fs::read_to_string("/proc/filesystems").unwrap().contains("hugetlbfs") {
        return skip("this kernel has no huge pages");
    }
    let pod = pod("vm-huge");
    let volume = HugeVolume::new(&pod);
    let mount = || Mount {
        container_path: "/huge".into(),
        host_path: volume.0.display().to_string(),
        ..Default::default()
    };
    let c = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount()]);
    let pages = "awk '/^HugePages_Total/ {print $2}' /proc/meminfo";
    assert_eq!(c.sh("awk '$2 == \"/huge\" {print $3}' /proc/mounts"), "hugetlbfs");
    assert_eq!(c.sh(pages), "0");
    assert_eq!(c.sh("fallocate -l 8388608 /huge/file && echo ok"), "ok");
    assert_eq!(c.sh(pages), "4");
    let other = pod.start_with(&["sleep", "1000"], |c| c.mounts = vec![mount()]);
    assert_eq!(other.sh("stat -c %s /huge/file"), "8388608");
    other.sh("rm /huge/*");
    assert_eq!(c.sh(pages), "0");
    // More than the machine has is an error, and no end of it.
    assert_ne!(c.exec(&["fallocate", "-l", "1073741824", "/huge/file"]).0, 0);
    assert_eq!(c.sh("rm -f /huge/*; echo alive"), "alive");
    pod.remove().unwrap();
}

#[test]
fn a_killed_vmm_ends_all_containers_at_once_and_leaves_nothing() {
    let Some(_on) = able().then(|| on(HANDLER)).flatten() else { return };
    own_kernel::killed_ends_all_containers_at_once("vm-killed", vmm_pid);
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
}

#[test]
fn a_machine_that_ends_while_the_daemon_is_away_is_found_out() {
    let Some(_on) = able().then(|| on(HANDLER)).flatten() else { return };
    own_kernel::an_end_while_the_daemon_is_away_is_found_out("vm-away", vmm_pid);
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
}

#[test]
fn what_is_under_way_when_the_daemon_is_killed_goes_on() {
    let Some(_on) = able().then(|| on(HANDLER)).flatten() else { return };
    let before = leaks::snapshot();
    let pod = pod("vm-under-way");
    own_kernel::ends_while_the_daemon_is_away(&pod);
    own_kernel::created_and_started_by_the_next_daemon(&pod);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_client_attaches_leaves_and_another_attaches_also_over_a_stream() {
    let Some(_on) = able().then(|| on(HANDLER)).flatten() else { return };
    terminal::attach(HANDLER);
    terminal::attach("kuasar-vmm-streaming");
}

#[test]
fn a_machine_that_hangs_holds_up_no_pod() {
    let lines = "[guest_timeouts]\ncall = \"2s\"\ndrain = \"2s\"\nkill = \"3s\"";
    let Some(_settings) = Settings::with(|text| format!("{text}\n{lines}\n")) else { return };
    let (hung, other) = (pod("vm-hangs"), pod("vm-beside"));
    let (c, beside) = (hung.start(&["sleep", "1000"]), other.start(&["sleep", "1000"]));
    // SAFETY: a pid that we have just found in the pod's own cgroup.
    unsafe { libc::kill(vmm_pid(&hung) as i32, libc::SIGSTOP) };
    // The engine kills a pod's containers first, and goes on when they have ended.
    wait_for("the pod can be removed", Duration::from_secs(60), || hung.remove().is_ok());
    drop(c);
    assert_eq!(beside.sh("echo on"), "on");
    other.remove().unwrap();
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
}

/// Kills the helper of one of two pods whose program begins so: that pod ends, the other goes on.
fn killed(helper: &str) {
    if !able() {
        return;
    }
    let other = pod("vm-other");
    let c = other.start(&["sleep", "1000"]);
    let victim = pod(&format!("vm-victim-{helper}"));
    let helpers = machine(&victim);
    let (pid, _) = helpers.iter().find(|(_, name)| name.starts_with(helper)).unwrap();
    kill(*pid);
    wait_for("the pod is not ready", Duration::from_secs(10), || {
        victim.state() == PodSandboxState::SandboxNotready as i32
    });
    wait_for("its machine is gone", Duration::from_secs(10), || machine(&victim).is_empty());
    assert_eq!(other.state(), PodSandboxState::SandboxReady as i32);
    assert_eq!(c.sh("echo alive"), "alive");
    victim.remove().unwrap();
    other.remove().unwrap();
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
}

#[test]
fn a_killed_virtiofsd_ends_its_pod_and_no_other() {
    killed("virtiofsd");
}

#[test]
fn a_killed_vsock_helper_ends_its_pod_and_no_other() {
    killed("vhost-device-vs");
}

/// Bytes that the virtiofsd with this cache has read of the host's files for a pod.
fn read_for(pod: &Pod, cache: &str) -> u64 {
    let served = |(pid, _): &(u32, String)| {
        let words = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.contains(&format!("--cache={cache}\0"))
    };
    let all: Vec<_> = machine(pod).into_iter().filter(served).collect();
    let count = |(pid, _): &(u32, String)| {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
        line.unwrap().parse::<u64>().unwrap()
    };
    assert!(!all.is_empty(), "no virtiofsd with cache {cache}");
    all.iter().map(count).sum()
}

#[test]
fn a_program_is_read_once_however_often_it_is_executed_and_a_volumes_file_as_the_host_has_it() {
    if !able() {
        return;
    }
    let pod = pod("vm-cache");
    let volume = Path::new(&pod.config.log_directory).join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    std::fs::write(volume.join("file"), "first\n").unwrap();
    let mount = || Mount {
        host_path: volume.to_string_lossy().into_owned(),
        container_path: "/volume".into(),
        ..Default::default()
    };
    let c = pod.start_with(&["sleep", "1000"], |config| config.mounts = vec![mount()]);
    let run = "for i in 1 2 3 4 5; do /bin/busybox true; done; cat /volume/file";
    assert_eq!(c.sh(run), "first");
    let before = read_for(&pod, "always");
    assert_eq!(c.sh(run), "first");
    // The program has a megabyte, and the shell is the same file.
    let read = read_for(&pod, "always") - before;
    assert!(read < 64 << 10, "{read} bytes were read again");
    std::fs::write(volume.join("file"), "second\n").unwrap();
    wait_for("the guest sees the volume's file change", Duration::from_secs(10), || {
        c.sh("cat /volume/file") == "second"
    });
    // A container's file is its own: what it writes is on the host, and read by it at once.
    assert_eq!(c.sh("echo one > /file; echo two > /file; cat /file"), "two");
    pod.remove().unwrap();
}

#[test]
fn each_machine_has_a_user_of_its_own_also_after_kill_9_of_the_daemon() {
    if !able() {
        return;
    }
    let users = |pod: &Pod| {
        let all = machine(pod).into_iter().map(|(pid, name)| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let ids = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
                let mut all: Vec<u32> =
                    line.split_whitespace().map(|id| id.parse().unwrap()).collect();
                all.dedup();
                all
            };
            let (user, group) = (ids("Uid:"), ids("Gid:"));
            assert_eq!((user.len(), &user), (1, &group), "{name}");
            (name, user[0])
        });
        let (root, own): (Vec<_>, Vec<_>) = all.partition(|(name, _)| name == "virtiofsd");
        // It acts for every user of its guest, in a root that has nothing but its pod's tree.
        assert!(!root.is_empty() && root.iter().all(|(_, user)| *user == 0), "{root:?}");
        assert!(own.len() >= 2 && own.iter().all(|(_, user)| *user == own[0].1), "{own:?}");
        assert!((1_879_048_192..1_879_113_728).contains(&own[0].1), "{own:?}");
        own[0].1
    };
    let (one, two) = (pod("user-one"), pod("user-two"));
    let first = users(&one);
    assert_ne!(first, users(&two));
    switch(&["daemon", "kill"], &[("KIND", "vmm")]);
    switch(&["daemon", "start"], &[("KIND", "vmm")]);
    let three = pod("user-three");
    assert!(![first, users(&two)].contains(&users(&three)));
    assert_eq!(one.start(&["true"]).wait(), 0);
}

#[test]
fn kill_9_of_the_daemon_loses_neither_container_nor_output() {
    if !able() {
        return;
    }
    let pod = pod("vm-kill9");
    let c = pod.start(&["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"]);
    let vmm = vmm_pid(&pod);
    let lines = || c.logged("stdout").split(|byte| *byte == b'\n').count();
    wait_for("it writes", Duration::from_secs(60), || lines() > 3);
    switch(&["daemon", "kill"], &[("KIND", "vmm")]);
    assert!(Path::new(&format!("/proc/{vmm}")).exists());
    switch(&["daemon", "start"], &[("KIND", "vmm")]);
    assert_eq!(vmm_pid(&pod), vmm);
    assert!(c.is_running());
    let before = lines();
    wait_for("it goes on writing", Duration::from_secs(60), || lines() > before + 3);
    assert_eq!(c.sh("echo in"), "in");
    let second = pod.start(&["sh", "-c", "echo new; exit 5"]);
    assert_eq!(second.wait(), 5);
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    let text = String::from_utf8(c.logged("stdout")).unwrap();
    assert!(text.lines().count() > before, "{text:?}");
    for (i, line) in text.lines().enumerate() {
        assert_eq!(line, (i + 1).to_string());
    }
    pod.remove().unwrap();
}

#[test]
fn a_network_namespace_without_links_is_a_pod_without_network() {
    let Some(_settings) = Settings::with(str::to_owned) else { return };
    let id = format!("vm-no-links-{}", unique());
    let made = inside(&["ip", "netns", "add", &id]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let named = |id: &str| id.to_owned();
    let mut q = wire::create_with(&id, |config| {
        let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        let options = options.namespace_options.mut_or_insert_default();
        options.network = kuasar_protos::cri::NamespaceMode::POD.into();
    });
    q.netns_path = format!("/run/netns/{id}");
    let _: api::ControllerCreateResponse = wire::controller("Create", q).unwrap();
    let q = api::ControllerStartRequest { sandbox_id: named(&id), ..Default::default() };
    let started: Result<api::ControllerStartResponse, _> = wire::controller("Start", q);
    let q = api::ControllerStatusRequest { sandbox_id: named(&id), ..Default::default() };
    let status: Result<api::ControllerStatusResponse, _> = wire::controller("Status", q);
    let q = api::ControllerStopRequest { sandbox_id: named(&id), ..Default::default() };
    let stopped: Result<api::ControllerStopResponse, _> = wire::controller("Stop", q);
    let q = api::ControllerShutdownRequest { sandbox_id: named(&id), ..Default::default() };
    let gone: Result<api::ControllerShutdownResponse, _> = wire::controller("Shutdown", q);
    let deleted = inside(&["ip", "netns", "del", &id]);
    started.unwrap();
    assert_eq!(status.unwrap().state, "SANDBOX_READY");
    stopped.unwrap();
    gone.unwrap();
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
}

#[test]
fn files_come_by_9p_where_the_configuration_says_so_and_qemu_keeps_what_that_takes_alone() {
    let lines = |text: &str| format!("share = \"9p\"\n{text}");
    let Some(_settings) = Settings::with(lines) else { return };
    let pod = pod("vm-9p");
    let dir = PathBuf::from(&pod.config.log_directory).join("volume");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("file"), "of the host").unwrap();
    let volume = |readonly: bool, at: &str| Mount {
        container_path: at.into(),
        host_path: dir.display().to_string(),
        readonly,
        ..Default::default()
    };
    let c = pod.start_with(&["sleep", "1000"], |c| {
        c.mounts = vec![volume(false, "/rw"), volume(true, "/ro")];
    });
    assert!(machine(&pod).iter().all(|(_, name)| name != "virtiofsd"), "{:?}", machine(&pod));
    let at = "awk '$2 == \"/\" || $2 == \"/rw\" {print $3}' /proc/mounts | sort -u";
    assert_eq!(c.sh(at), "9p");
    assert_eq!(c.sh("cat /ro/file"), "of the host");
    // Owners and modes are the guest's to set, and are seen on the host as they are.
    let made = "echo new > /rw/new && chown 1234:56 /rw/new && chmod 640 /rw/new && stat -c %u:%g:%a /rw/new";
    assert_eq!(c.sh(made), "1234:56:640");
    let meta = std::fs::metadata(dir.join("new")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (1234, 56, 0o640));
    assert_ne!(c.exec(&["sh", "-c", "echo no > /ro/file"]).0, 0);
    assert_eq!(std::fs::read(dir.join("file")).unwrap(), b"of the host");
    // No device of the host's comes in by a file, and no link of the guest's leads anywhere.
    assert_ne!(c.exec(&["mknod", "/rw/device", "b", "7", "0"]).0, 0);
    c.sh("ln -s /etc/shadow /rw/link; true");
    assert_ne!(c.exec(&["grep", "-q", "root:", "/rw/link"]).0, 0);
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm_pid(&pod))).unwrap();
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, in all five sets, and not as root.
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
        assert_eq!(line.trim(), "000000000000001b", "{set}");
    }
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    assert!(uid.split_whitespace().all(|id| id.starts_with("18790")), "{uid}");
    pod.remove().unwrap();
}
