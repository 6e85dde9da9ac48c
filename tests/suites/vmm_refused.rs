//! Pods that cannot be machines: what is wrong is said in words that help, in time, and nothing is left.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kuasar_tests::cri::*;
use kuasar_tests::{inside, skip};

use crate::vmm::{HANDLER, Settings, able, machine, machine_dirs, pod};

/// A guest that cannot start: the error says why, within its deadline, nothing is left, and a pod that
/// runs already hears nothing of it.
fn refused(name: &str, lines: &str, words: &[&str]) {
    refused_with(name, |text| format!("{text}\n{lines}\n"), words);
}

/// As [`refused`], with the whole configuration to be changed.
fn refused_with(name: &str, change: impl FnOnce(&str) -> String, words: &[&str]) {
    if !able() {
        return;
    }
    let bystander = pod("vm-bystander");
    let c = bystander.start(&["sleep", "1000"]);
    let (dirs, pids) = (machine_dirs(), machine(&bystander));
    {
        let settings = Settings::with(change);
        let _settings = settings.unwrap();
        let begun = Instant::now();
        let error = Pod::try_run(pod_config(name), HANDLER).map(|pod| pod.id.clone()).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        for word in words {
            assert!(error.message().contains(word), "{word}: {}", error.message());
        }
        assert_eq!(machine_dirs(), dirs);
        assert_eq!((c.sh("echo here"), machine(&bystander)), ("here".to_owned(), pids));
    }
    bystander.remove().unwrap();
    assert_eq!(machine_dirs(), Vec::<PathBuf>::new());
}

#[test]
fn a_pod_on_the_hosts_network_is_refused_with_a_way_out() {
    if !able() {
        return;
    }
    let mut config = pod_config("vm-host");
    let options = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    options.namespace_options.get_or_insert_default().network = NamespaceMode::Node as i32;
    let error = Pod::try_run(config, HANDLER).map(|pod| pod.id.clone()).unwrap_err();
    assert!(error.message().contains("hostNetwork"), "{error:?}");
}

#[test]
fn a_kernel_that_is_none_is_refused_and_leaves_nothing() {
    let junk = std::env::temp_dir().join("kuasar-junk-kernel");
    let lines = format!("[guest]\nkernel = \"{}\"", junk.display());
    std::fs::write(&junk, vec![0x5a; 1 << 20]).unwrap();
    refused("vm-junk-kernel", &lines, &["guest.kernel"]);
    // What looks like one is for the VMM to refuse.
    let mut bytes = vec![0x5a; 1 << 20];
    bytes[..4].copy_from_slice(b"\x7fELF");
    std::fs::write(&junk, bytes).unwrap();
    refused("vm-torn-kernel", &lines, &["qemu"]);
    std::fs::remove_file(&junk).unwrap();
}

#[test]
fn an_image_that_is_none_ends_the_machine_whose_console_is_quoted() {
    let junk = std::env::temp_dir().join("kuasar-junk-image");
    std::fs::write(&junk, vec![0x5a; 1 << 20]).unwrap();
    let lines = format!("[guest]\ninitrd = \"{}\"", junk.display());
    let words = ["the machine ended before its guest was ready", "Kernel panic"];
    refused("vm-junk-image", &lines, &words);
    std::fs::remove_file(&junk).unwrap();
}

#[test]
fn an_erofs_image_that_is_none_is_refused_before_a_pod_or_ends_its_machine() {
    let missing = "[guest]\nimage = \"/nowhere/guest.erofs\"";
    refused("vm-no-image", missing, &["guest.image", "/nowhere/guest.erofs"]);
    let junk = std::env::temp_dir().join("kuasar-junk-erofs");
    std::fs::write(&junk, vec![0x5a; 1 << 20]).unwrap();
    let lines = format!("[guest]\nimage = \"{}\"", junk.display());
    let words = ["the machine ended before its guest was ready", "Unable to mount root fs"];
    refused("vm-junk-erofs", &lines, &words);
    std::fs::remove_file(&junk).unwrap();
}

#[test]
fn a_machine_with_too_little_memory_is_an_error_in_time_and_leaves_nothing() {
    let lines = "[size]\nmemory_mib = 32\nmin_memory_mib = 32\n[guest_timeouts]\nboot = \"20s\"";
    refused("vm-no-memory", lines, &[]);
}

#[test]
fn a_guest_that_never_answers_is_ended_at_its_deadline() {
    // It serves, and nobody listens where it does.
    let lines = "[guest]\nparams = [\"quiet\", \"kuasar.channel=serial\"]\n\
                 [guest_timeouts]\nboot = \"5s\"";
    refused("vm-silent", lines, &["did not answer after its boot within 5s"]);
}

#[test]
fn a_machine_without_hot_plug_says_what_to_do_about_a_block_volume() {
    if !able() {
        return;
    }
    let pod = pod("vm-no-disks");
    let device = Device {
        container_path: "/dev/xvda".into(),
        host_path: "/dev/loop0".into(),
        permissions: "rwm".into(),
    };
    if !Path::new("/dev/loop0").exists() {
        return skip("no /dev/loop0");
    }
    let error = pod
        .create_with(&["true"], |c| c.devices = vec![device])
        .and_then(|c| c.start())
        .unwrap_err();
    let said = error.message();
    assert!(said.contains("microvm") && said.contains("q35"), "{said}");
    assert_eq!(pod.start(&["echo", "still"]).wait(), 0);
    pod.remove().unwrap();
}

#[test]
fn what_is_no_kvm_is_an_error_that_names_it_and_leaves_nothing() {
    if !able() || !Path::new("/dev/kvm").exists() {
        return skip("no /dev/kvm to be covered");
    }
    // Something else stands where KVM should: as far as a machine can tell there is none.
    let covered = inside(&["mount", "--bind", "/dev/null", "/dev/kvm"]);
    assert!(covered.status.success(), "{}", String::from_utf8_lossy(&covered.stderr));
    struct Uncover;
    impl Drop for Uncover {
        fn drop(&mut self) {
            inside(&["umount", "/dev/kvm"]);
        }
    }
    let _uncover = Uncover;
    let with_kvm = |text: &str| text.replace("accel = \"tcg\"", "accel = \"kvm\"");
    refused_with("vm-no-kvm", with_kvm, &["kvm"]);
}
