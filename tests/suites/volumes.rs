//! Volumes, seen from inside and from the host.

use std::path::PathBuf;

use kuasar_tests::cri::*;
use kuasar_tests::{handler, inside, leaks, skip};

const SLEEP: &[&str] = &["sleep", "1000"];

/// A directory of the host with a file `f` and a tmpfs at `below`; unmounted when dropped.
struct Volume(PathBuf);

impl Volume {
    fn new(pod: &Pod) -> Self {
        let dir = PathBuf::from(&pod.config.log_directory).join("volume");
        std::fs::create_dir_all(dir.join("below")).unwrap();
        std::fs::write(dir.join("f"), "from the host").unwrap();
        let below = dir.join("below");
        let out =
            inside(&["mount", "-t", "tmpfs", "-o", "size=1m", "below", &below.to_string_lossy()]);
        assert!(out.status.success());
        Self(dir)
    }

    fn mount(&self, to: &str) -> Mount {
        Mount {
            host_path: self.0.to_string_lossy().into_owned(),
            container_path: to.into(),
            ..Default::default()
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        inside(&["umount", &self.0.join("below").to_string_lossy()]);
    }
}

#[test]
fn volumes_keep_their_flags() {
    let pod = Pod::run(pod_config("volumes"));
    let volume = Volume::new(&pod);
    let c = pod.start_with(SLEEP, |c| {
        let (mut ro, rw) = (volume.mount("/ro"), volume.mount("/deep/er/rw"));
        ro.readonly = true;
        let file = Mount {
            host_path: volume.0.join("f").to_string_lossy().into_owned(),
            container_path: "/one/file".into(),
            ..Default::default()
        };
        c.mounts = vec![ro, rw, file];
    });
    assert_eq!(c.sh("cat /ro/f"), "from the host");
    assert_eq!(c.sh("cat /one/file"), "from the host");
    assert_ne!(c.exec(&["touch", "/ro/x"]).0, 0);
    c.sh("echo back > /deep/er/rw/g");
    assert_eq!(std::fs::read_to_string(volume.0.join("g")).unwrap(), "back\n");
    // What is mounted below comes along; its own flags are its own, as Kubernetes has it.
    c.sh("echo deep > /deep/er/rw/below/f");
    assert_eq!(c.sh("cat /ro/below/f"), "deep");
}

#[test]
fn a_read_only_volume_may_be_so_all_the_way_down() {
    let before = leaks::snapshot();
    // containerd asks runtimes of runc's type alone whether they can.
    let name = if handler() == "kuasar-runc" { "kuasar-runc-v2".into() } else { handler() };
    {
        let pod = Pod::try_run(pod_config("rro"), &name).unwrap();
        let volume = Volume::new(&pod);
        let made = pod.create_with(SLEEP, |c| {
            let mut ro = volume.mount("/ro");
            (ro.readonly, ro.recursive_read_only) = (true, true);
            c.mounts = vec![ro];
        });
        match made {
            Err(e) => skip(&format!("recursive read-only mounts: {}", e.message())),
            Ok(c) => {
                c.start().unwrap();
                assert_eq!(c.sh("cat /ro/f"), "from the host");
                assert_ne!(c.exec(&["touch", "/ro/x"]).0, 0);
                assert_ne!(c.exec(&["touch", "/ro/below/x"]).0, 0);
            }
        }
    }
    leaks::assert_none(&before);
}

#[test]
fn a_volume_is_propagated_as_it_says() {
    let pod = Pod::run(pod_config("propagation"));
    let volume = Volume::new(&pod);
    let at = volume.0.to_string_lossy().into_owned();
    inside(&["mount", "--bind", &at, &at]);
    inside(&["mount", "--make-shared", &at]);
    std::fs::create_dir(volume.0.join("late")).unwrap();
    let late = format!("{at}/late");
    inside(&["mkdir", "-p", &late]);
    let c = pod.start_with(SLEEP, |c| {
        let (mut slave, private) = (volume.mount("/slave"), volume.mount("/private"));
        slave.propagation = MountPropagation::PropagationHostToContainer as i32;
        c.mounts = vec![slave, private];
    });
    inside(&["mount", "-t", "tmpfs", "late", &late]);
    inside(&["touch", &format!("{late}/here")]);
    let seen = |path: &str| c.exec(&["ls", path]).0 == 0;
    let (slave, private) = (seen("/slave/late/here"), seen("/private/late/here"));
    inside(&["umount", &late]);
    inside(&["umount", &at]);
    assert!(slave, "a mount of the host reaches a volume that asks for it");
    assert!(!private, "and no other");
}

#[test]
fn a_link_in_a_volume_as_a_mount_target_stays_inside() {
    let pod = Pod::run(pod_config("nested"));
    let volume = Volume::new(&pod);
    let outside = PathBuf::from(&pod.config.log_directory).join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, volume.0.join("link")).unwrap();
    let made = pod
        .create_with(SLEEP, |c| c.mounts = vec![volume.mount("/v"), volume.mount("/v/link/new")]);
    // It may be refused, too.
    if let Ok(c) = made {
        let _ = c.start();
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}
