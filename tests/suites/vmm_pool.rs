//! The pool of `vmm-sandboxer`: machines that are ready before a pod asks, on QEMU's q35 with
//! Debian's kernel, as the other tests of templates.

use crate::ctl::{ctl_on, out};
use crate::vmm::{
    HANDLER, Settings, kill, link, log, machine, machine_dirs, status, strangers, vmm_pid,
};
use crate::vmm_debug;
use crate::vmm_q35::{netns, pod, template, with_templates_by};
use kuasar_tests::cri::*;
use kuasar_tests::{bed, daemon_pid, inside, switch, wait_for};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const VMM: [(&str, &str); 1] = [("KIND", "vmm")];
/// Processes of a machine: the VMM, two virtiofsd, the relay of the serial port.
const MACHINE: usize = 4;
/// A template is made by a boot, and a copy for the pool comes from it.
const FILLED: Duration = Duration::from_secs(240);
/// For so long a machine stands still in the middle of a pod's start: less than `ready`.
const LATE: Duration = Duration::from_secs(4);

/// A daemon with a pool of `size`, which is full; `lines` come below `[template]`.
pub(crate) struct Filled {
    dir: PathBuf,
    settings: Option<Settings>,
}

impl Filled {
    fn with(name: &str, size: usize, lines: &str) -> Option<Self> {
        Self::on("", "", name, size, lines)
    }

    /// The same, with lines above all tables and below `[guest]`, too.
    pub(crate) fn on(top: &str, guest: &str, name: &str, size: usize, lines: &str) -> Option<Self> {
        // The refill of a test is that of the next one.
        let lines = format!("pool = {size}\nrefill = \"200ms\"\n{lines}");
        let (dir, settings) = with_templates_by(top, "", guest, name, &lines)?;
        let filled = Self { dir, settings: Some(settings) };
        wait_for("the pool is full", FILLED, || number("ready") == size as u64);
        Some(filled)
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        // Without a pool again: the daemon ends the machines when it has read that.
        drop(self.settings.take());
        if !std::thread::panicking() {
            wait_for("the pool is gone", Duration::from_secs(30), || pooled().is_empty());
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub(crate) fn number(key: &str) -> u64 {
    template(&["list"]).0["pool"][key].as_u64().unwrap_or_default()
}

/// Pids of the pool's programs, by the cgroup that they are in until a pod has them.
pub(crate) fn pooled() -> BTreeSet<(u32, String)> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let ours = bed().to_string_lossy().replace('/', "_");
        if cgroup.lines().any(|line| line.contains("/kuasar-vmm/pool") && line.contains(&ours)) {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            all.insert((pid, name.trim().to_owned()));
        }
    }
    all
}

fn pooled_vmm() -> u32 {
    pooled().iter().find(|(_, name)| name.starts_with("qemu")).unwrap().0
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: a pid that we have just found in the pool's own cgroup.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Directories of machines that are the pool's.
fn pooled_dirs() -> usize {
    machine_dirs().iter().filter(|dir| dir.join("pooled").exists()).count()
}

/// What holds of a pod's VMM wherever it came from, and what is different when it was pooled.
fn is_jailed(pod: &Pod) {
    let pid = vmm_pid(pod);
    for (key, wanted) in [("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapEff", "0000000000000000")] {
        assert_eq!(status(pid, key), wanted, "{key}");
    }
    let uid = status(pid, "Uid").split_whitespace().next().unwrap().parse::<u32>().unwrap();
    assert!((1_879_048_192..1_879_113_728).contains(&uid), "{uid}");
    // A network namespace of its own, which is neither the host's nor the pod's, and has nothing in
    // it: only the descriptors of its taps reach the pod's.
    assert_ne!(link(pid, "net"), link(std::process::id(), "net"));
    let out = inside(&["stat", "-L", "-c", "%i", &netns(pod)]);
    let pods = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    assert!(!link(pid, "net").contains(&pods), "{pods}");
    let devices = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let names: Vec<&str> =
        devices.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
    assert_eq!(names, ["lo"]);
    for what in ["mnt", "pid", "ipc", "uts"] {
        assert_ne!(link(pid, what), link(std::process::id(), what), "{what}");
    }
    // VMM and all helpers are in the pod's cgroup: in each hierarchy that has one.
    let group = format!("machine-{}", pod.id);
    let all = machine(pod);
    assert_eq!(all.len(), MACHINE, "{all:?}");
    for (pid, name) in all {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(!text.contains("/kuasar-vmm/pool"), "{name}: {text}");
        assert!(text.matches(&group).count() >= 1, "{name}: {text}");
    }
}

#[test]
fn pods_take_ready_machines_and_share_no_identity() {
    let guest = vmm_debug::console_on();
    let Some(_filled) = Filled::on("", &guest, "pool-take", 2, "") else { return };
    let ready = pooled();
    assert_eq!(ready.len(), 2 * MACHINE, "{ready:?}");
    let from = log().len();
    let begun = Instant::now();
    let one = pod("pool-one");
    let took = begun.elapsed();
    // On a busy host a machine answers late, and is no worse.
    let late = ready.iter().find(|(pid, name)| name.starts_with("qemu") && *pid != vmm_pid(&one));
    let late = late.unwrap().0;
    signal(late, libc::SIGSTOP);
    let two = std::thread::scope(|scope| {
        let two = scope.spawn(|| pod("pool-two"));
        std::thread::sleep(LATE);
        signal(late, libc::SIGCONT);
        two.join().unwrap()
    });
    println!("figure: pod of the pool {took:?}");
    assert_eq!(number("taken"), 2, "{}", &log()[from..]);
    assert_eq!(vmm_pid(&two), late);
    for one in [&one, &two] {
        assert!(ready.iter().any(|(pid, _)| *pid == vmm_pid(one)), "{ready:?}");
        is_jailed(one);
    }
    let containers = strangers([&one, &two]);
    // The taps work although the VMM is in another namespace: the pods reach each other.
    let address = containers[1].sh("ip -4 -o addr show eth0 | awk '{print $4}' | cut -d/ -f1");
    let ping = format!("ping -c 1 -w 10 {address} >/dev/null && echo yes");
    assert_eq!(containers[0].sh(&ping), "yes");
    // What their guests were told at the template's boot holds in them.
    vmm_debug::works(&one);
    wait_for("the pool is full again", FILLED, || number("ready") == 2);
    assert!(one.remove().is_ok() && two.remove().is_ok());
    // Nothing is left of them but the pool's own.
    assert_eq!(machine_dirs().len(), 2, "{:?}", machine_dirs());
    assert_eq!(pooled_dirs(), 2);
}

#[test]
fn a_dead_machine_of_the_pool_is_replaced_and_never_a_pods() {
    let Some(_filled) = Filled::with("pool-dead", 1, "") else { return };
    let first = pooled_vmm();
    kill(first);
    wait_for("it is noticed", Duration::from_secs(30), || number("lost") == 1);
    wait_for("it is replaced", FILLED, || number("ready") == 1);
    assert_ne!(pooled_vmm(), first);
    // A helper's end is the machine's.
    kill(pooled().iter().find(|(_, name)| name == "virtiofsd").unwrap().0);
    wait_for("it is noticed", Duration::from_secs(30), || number("lost") == 2);
    wait_for("it is replaced", FILLED, || number("ready") == 1);
    // One that stands still looks well until a pod takes it: then the pod gets another.
    let frozen = pooled_vmm();
    signal(frozen, libc::SIGSTOP);
    let pod = pod("pool-frozen");
    assert_ne!(vmm_pid(&pod), frozen);
    assert_eq!(pod.start(&["echo", "alive"]).wait(), 0);
    wait_for("it is ended", Duration::from_secs(30), || {
        !Path::new(&format!("/proc/{frozen}")).exists()
    });
    pod.remove().unwrap();
}

#[test]
fn more_pods_than_machines_start_all_the_same() {
    let Some(_filled) = Filled::with("pool-few", 1, "") else { return };
    let names = ["pool-few-a", "pool-few-b", "pool-few-c"];
    let pods: Vec<Pod> = std::thread::scope(|scope| {
        let started = names.map(|name| scope.spawn(move || pod(name)));
        started.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let vmms: BTreeSet<u32> = pods.iter().map(vmm_pid).collect();
    assert_eq!(vmms.len(), 3, "a machine is one pod's");
    let (taken, missed) = (number("taken"), number("missed"));
    assert!(taken >= 1 && missed >= 1 && taken + missed == 3, "{taken} {missed}");
    let said = ctl_on(&["vmm"], &["-o", "json", "metrics"]);
    let metrics: serde_json::Value = serde_json::from_str(&out(&said)).unwrap();
    let all = metrics.as_array().unwrap();
    for name in ["kuasar_pool_machines_total", "kuasar_pool_ready", "kuasar_pool_wanted"] {
        assert!(all.iter().any(|metric| metric["name"] == name), "{name}: {metrics}");
    }
    for pod in &pods {
        assert_eq!(pod.start(&["true"]).wait(), 0);
    }
}

#[test]
fn kill_9_of_the_daemon_leaves_no_machine_of_the_pool_and_loses_no_pod() {
    let Some(filled) = Filled::with("pool-kill9", 1, "") else { return };
    let pod = pod("pool-kill9");
    let c = pod.start(&["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"]);
    let vmm = vmm_pid(&pod);
    let mut before = BTreeSet::new();
    // Twice: what is kept for the machine under its own name is known to the second one, too.
    for _ in 0..2 {
        wait_for("the pool is full", FILLED, || number("ready") == 1);
        before.extend(pooled().into_iter().map(|(pid, _)| pid));
        switch(&["daemon", "kill"], &VMM);
        switch(&["daemon", "start"], &VMM);
        let still: Vec<&u32> =
            before.iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect();
        assert!(still.is_empty(), "{still:?}");
        assert_eq!(vmm_pid(&pod), vmm);
        assert_eq!(c.sh("echo in"), "in");
        // The console's pipe has a reader still: nobody else may close it.
        let console = format!("/proc/{vmm}/fd/1");
        let pipe = std::fs::read_link(&console).unwrap();
        let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon_pid())).unwrap().flatten();
        let mut read = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        assert!(read.any(|path| path == pipe), "{pipe:?}");
    }
    let lines = || c.logged("stdout").split(|byte| *byte == b'\n').count();
    let seen = lines();
    wait_for("it goes on writing", Duration::from_secs(60), || lines() > seen + 3);
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    pod.remove().unwrap();
    // In order, too: a daemon that is stopped takes its pool along.
    wait_for("the pool is full", FILLED, || number("ready") == 1);
    assert_eq!(pooled_dirs(), 1);
    switch(&["daemon", "stop"], &VMM);
    assert_eq!((pooled(), machine_dirs()), (BTreeSet::new(), Vec::new()));
    switch(&["daemon", "start"], &VMM);
    drop(filled);
}

#[test]
fn a_pod_of_another_size_gets_a_machine_that_can_be_made_so_or_its_own() {
    // A machine of the pool has 384 MiB, and may have 512.
    let size = "[size]\nmemory_mib = 384\ngrow_memory_mib = 128\nmax_memory_mib = 512\n";
    let Some(_filled) = Filled::with("pool-size", 1, size) else { return };
    let of = |name: &str, mib: i64| {
        let mut config = pod_config(name);
        let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
        resources.memory_limit_in_bytes = mib << 20;
        Pod::try_run(config, HANDLER).unwrap()
    };
    let available = |pod: &Pod| {
        let c = pod.start(&["sleep", "1000"]);
        c.sh("awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo").parse::<u64>().unwrap()
    };
    let usual = pod("pool-usual");
    let memory = available(&usual);
    usual.remove().unwrap();
    wait_for("the pool is full", FILLED, || number("ready") == 1);
    // 48 MiB more are the machine's own.
    let (taken, large) = (number("taken"), of("pool-large", 512 - 48));
    assert_eq!(number("taken"), taken + 1);
    let grown = available(&large);
    assert!(grown > memory + 64, "{grown} {memory}");
    large.remove().unwrap();
    wait_for("the pool is full", FILLED, || number("ready") == 1);
    // Two CPUs a machine with one is not given under TCG: the pod boots its own.
    let (taken, missed) = (number("taken"), number("missed"));
    let mut config = pod_config("pool-cpus");
    let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
    (resources.cpu_period, resources.cpu_quota) = (100_000, 200_000);
    let two = Pod::try_run(config, HANDLER).unwrap();
    assert_eq!((number("taken"), number("missed")), (taken, missed + 1));
    assert_eq!(two.start(&["sleep", "1000"]).sh("nproc"), "2");
}

#[test]
fn a_machine_without_hot_plug_has_no_pool_and_the_daemon_says_so() {
    let from = log_length();
    let lines = "[template]\nenabled = true\npool = 1\n";
    let Some(_settings) = Settings::with(|text| format!("{text}\n{lines}")) else { return };
    wait_for("it is said", Duration::from_secs(10), || log()[from..].contains("no pool is kept"));
    assert!(log()[from..].contains("use machine q35"), "{}", &log()[from..]);
    let pool = template(&["list"]).0["pool"].clone();
    assert_eq!((&pool["wanted"], &pool["ready"]), (&1.into(), &0.into()));
    assert!(pool["hindrance"].as_str().unwrap().contains("microvm"), "{pool}");
    let pod = pod("pool-none");
    assert_eq!(pod.start(&["true"]).wait(), 0);
    pod.remove().unwrap();
}

fn log_length() -> usize {
    std::fs::metadata(bed().join("run/kuasar-vmm.log")).map_or(0, |meta| meta.len() as usize)
}
