//! Pods without a share (`share = "none"`): root file systems are disks, small files are copied.

use crate::vmm::{HANDLER, Settings, log, machine, strangers};
use crate::vmm_debug;
use crate::vmm_pool::{Filled, number, pooled};
use crate::vmm_q35::q35_and;
use kuasar_tests::cri::*;
use kuasar_tests::{bed, skip, switch, wait_for};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The runtime whose root file systems are images.
const BLOCK: &str = "kuasar-vmm-block";
const PATIENCE: Duration = Duration::from_secs(60);

fn blockfile() -> bool {
    let config = std::fs::read_to_string(bed().join("etc/config.toml")).unwrap_or_default();
    if !config.contains(BLOCK) {
        skip("no blockfile snapshotter in the test bed: mkfs.ext4 is missing");
    }
    config.contains(BLOCK)
}

/// The daemon without shares; nothing, and a note, where that does not run.
fn without_share() -> Option<Settings> {
    if !blockfile() {
        return None;
    }
    q35_and("share = \"none\"\n", "[copy]\nmax_files = 16\ntermination_log_bytes = 20\n")
}

/// A volume as kubelet keeps it.
struct Volume(PathBuf);

impl Volume {
    fn new(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// As kubelet's AtomicWriter: a new directory, then the link, then the names, then the old one goes.
    fn write(&self, stamp: &str, keys: &[(&str, &str)]) {
        let at = |name: &str| self.0.join(name);
        let old = std::fs::read_link(at("..data")).ok();
        std::fs::create_dir(at(stamp)).unwrap();
        for (key, value) in keys {
            std::fs::write(at(stamp).join(key), value).unwrap();
        }
        symlink(stamp, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        for (key, _) in keys {
            let _ = symlink(format!("..data/{key}"), at(key));
        }
        if let Some(old) = old {
            std::fs::remove_dir_all(self.0.join(old)).unwrap();
        }
    }
}

fn mount(from: &Path, to: &str, readonly: bool) -> Mount {
    let host_path = from.to_string_lossy().into_owned();
    Mount { container_path: to.into(), host_path, readonly, ..Default::default() }
}

/// Directories of the daemon that are of this container.
fn left_of(id: &str) -> Vec<PathBuf> {
    let (mut left, mut dirs) = (Vec::new(), vec![bed().join("run/kuasar-vmm")]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(id) {
                left.push(entry.path());
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(entry.path());
            }
        }
    }
    left
}

#[test]
fn small_files_are_copied_renewed_and_brought_back_also_after_kill_9_of_the_daemon() {
    let Some(_settings) = without_share() else { return };
    let mut config = pod_config("noshare");
    config.dns_config =
        Some(DnsConfig { servers: vec!["192.0.2.53".into()], ..Default::default() });
    let dir = PathBuf::from(&config.log_directory);
    let pod = Pod::try_run(config, BLOCK).unwrap();
    assert!(machine(&pod).iter().all(|(_, name)| name != "virtiofsd"), "{:?}", machine(&pod));
    // As kubelet lays it out.
    let of_pod = dir.join("pods/uid");
    let volume = |kind: &str| of_pod.join("volumes").join(format!("kubernetes.io~{kind}/v"));
    let given = Volume::new(volume("configmap"));
    given.write("..1", &[("key", "one"), ("gone", "x")]);
    let scratch = volume("empty-dir");
    std::fs::create_dir_all(&scratch).unwrap();
    let log = of_pod.join("containers/c/1a2b");
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "").unwrap();
    let ends = "until [ \"$(cat /config/key)\" = three ]; do sleep 0.1; done; \
                echo 'not so much: the end of it' > /dev/termination-log; exit 7";
    let one = pod.start_with(&["sh", "-c", ends], |c| {
        c.mounts = vec![
            mount(&given.0, "/config", true),
            mount(&scratch, "/scratch", false),
            mount(&log, "/dev/termination-log", false),
        ];
    });
    let two = pod.start_with(&["sleep", "1000"], |c| {
        c.mounts = vec![mount(&given.0, "/config", true), mount(&scratch, "/scratch", false)];
    });
    for c in [&one, &two] {
        assert_eq!(c.sh("cat /etc/hostname"), "noshare");
        assert!(c.sh("cat /etc/resolv.conf").contains("nameserver 192.0.2.53"));
        assert!(c.sh("cat /etc/hosts").contains("localhost"));
        assert_eq!(
            c.sh("cat /config/key; readlink /config/key; readlink /config/..data"),
            "one..data/key\n..1"
        );
        assert_ne!(c.exec(&["sh", "-c", "echo no > /config/key"]).0, 0);
    }
    // A directory of the pod's, in the guest alone.
    one.sh("echo shared > /scratch/file");
    assert_eq!(two.sh("cat /scratch/file"), "shared");
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);

    given.write("..2", &[("key", "two"), ("new", "y")]);
    let is = |c: &Container, value: &str| c.sh("cat /config/key") == value;
    wait_for("the update is seen", PATIENCE, || is(&one, "two") && is(&two, "two"));
    assert_eq!(one.sh("cat /config/new; ls -A /config | sort | xargs"), "y..2 ..data gone key new");
    assert_eq!(one.exec(&["cat", "/config/gone"]).0, 1);

    switch(&["daemon", "kill"], &[("KIND", "vmm")]);
    switch(&["daemon", "start"], &[("KIND", "vmm")]);
    assert_eq!(std::fs::read(&log).unwrap(), b"");
    given.write("..3", &[("key", "three")]);
    assert_eq!(one.wait(), 7);
    // The end of it, as much as the configuration allows.
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "much: the end of it\n");
    wait_for("the update is seen", PATIENCE, || is(&two, "three"));
    one.remove().unwrap();

    // What is too much, or would be lost, is refused with the way out, and leaves nothing.
    let many = dir.join("many");
    std::fs::create_dir(&many).unwrap();
    (0..20).for_each(|n| std::fs::write(many.join(n.to_string()), "").unwrap());
    for (from, readonly, words) in
        [(&many, true, "copy.max_files"), (&dir, false, "volumeMode: Block")]
    {
        let refused = pod
            .create_with(&["true"], |c| c.mounts = vec![mount(from, "/volume", readonly)])
            .unwrap();
        let error = refused.start().unwrap_err();
        let said = error.message();
        assert!(said.contains(words) && said.contains(&*from.to_string_lossy()), "{said}");
        assert_eq!(left_of(&refused.id), Vec::<PathBuf>::new());
        refused.remove().unwrap();
    }
    assert_eq!(pod.start(&["true"]).wait(), 0);
    pod.remove().unwrap();
}

#[test]
fn a_root_file_system_of_directories_is_refused_without_a_share_with_the_way_out() {
    let Some(_settings) = without_share() else { return };
    let pod = Pod::try_run(pod_config("noshare-overlay"), HANDLER).unwrap();
    let c = pod.create_with(&["true"], |_| {}).unwrap();
    let error = c.start().unwrap_err();
    assert!(error.message().contains("snapshotter = \"blockfile\""), "{error:?}");
    assert_eq!(left_of(&c.id), Vec::<PathBuf>::new());
    pod.remove().unwrap();
}

#[test]
fn pods_of_a_template_and_of_the_pool_have_no_share_and_all_that_is_copied() {
    if !blockfile() {
        return;
    }
    let from = log().len();
    let (share, guest) = ("share = \"none\"\n", vmm_debug::console_on());
    let Some(filled) = Filled::on(share, &guest, "noshare-pool", 1, "") else { return };
    let helpers = pooled();
    assert!(helpers.iter().all(|(_, name)| name != "virtiofsd"), "{helpers:?}");
    let run = |name: &str| Pod::try_run(pod_config(name), BLOCK).unwrap();
    // One from the pool, and one that is copied for itself: the next of the pool takes longer.
    let taken = number("taken");
    let pods = [run("noshare-taken"), run("noshare-copied")];
    assert!(number("taken") > taken);
    assert!(!log()[from..].contains("boots cold"), "{}", &log()[from..]);
    drop(strangers([&pods[0], &pods[1]]));
    for pod in &pods {
        assert!(machine(pod).iter().all(|(_, name)| name != "virtiofsd"), "{:?}", machine(pod));
        let of_pod = PathBuf::from(&pod.config.log_directory).join("pods/uid/volumes");
        let given = Volume::new(of_pod.join("kubernetes.io~configmap/v"));
        given.write("..1", &[("key", "one")]);
        // More than one message to the guest.
        let large = of_pod.join("kubernetes.io~projected/large");
        std::fs::create_dir_all(&large).unwrap();
        std::fs::write(large.join("file"), vec![b'x'; 600_000]).unwrap();
        let c = pod.start_with(&["sleep", "1000"], |c| {
            c.mounts = vec![mount(&given.0, "/config", true), mount(&large, "/large", true)];
        });
        assert_eq!(c.sh("hostname; cat /config/key"), format!("{}\none", pod.config.hostname));
        assert_eq!(c.sh("wc -c < /large/file; tr -d x < /large/file | wc -c"), "600000\n0");
        given.write("..2", &[("key", "two")]);
        wait_for("the update is seen", PATIENCE, || c.sh("cat /config/key") == "two");
    }
    // Nor has the console a share.
    vmm_debug::works(&pods[1]);
    pods.into_iter().for_each(|pod| pod.remove().unwrap());
    drop(filled);
}
