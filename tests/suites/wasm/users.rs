//! Pods with a user namespace: containerd offers one to handlers of the type `io.containerd.runc.v2`.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use kuasar_tests::cri::*;
use kuasar_tests::{leaks, on, switch, wait_for, wasm};

use crate::own_kernel::Configuration;

use super::*;

const USERS: &str = "kuasar-wasm-v2";
const ENGINE: &str = "io.kuasar.wasm.engine";
/// The pod's root on the host.
const ROOT: u32 = 100_000;
const USER: u32 = 1000;

fn map() -> Vec<IdMapping> {
    vec![IdMapping { host_id: ROOT, container_id: 0, length: 65536 }]
}

/// A pod with a user namespace, for an engine; its containers have a PID namespace each, or one.
fn pod(name: &str, engine: &str, pid: NamespaceMode) -> Pod {
    let mut config = pod_config(name);
    config.annotations = annotations(&[(ENGINE, engine)]);
    let linux = config.linux.as_mut().unwrap();
    let options = linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap();
    options.pid = pid as i32;
    let (uids, gids) = (map(), map());
    options.userns_options = Some(UserNamespace { mode: NamespaceMode::Pod as i32, uids, gids });
    Pod::try_run(config, USERS).unwrap()
}

fn user(config: &mut ContainerConfig, uid: u32) {
    let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.run_as_user = Some(Int64Value { value: i64::from(uid) });
}

/// A directory of the host's as `/data`: mapped, as kubelet asks for it, or as it is.
fn volume(config: &mut ContainerConfig, host: &Path, mapped: bool) {
    let mappings = || if mapped { map() } else { Vec::new() };
    config.mounts = vec![Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: "/data".into(),
        uid_mappings: mappings(),
        gid_mappings: mappings(),
        ..Default::default()
    }];
}

#[test]
fn a_user_namespace_maps_the_process_and_the_owners_of_files() {
    let Some(_on) = on(USERS) else { return };
    wasm::import();
    for pid in [NamespaceMode::Container, NamespaceMode::Pod] {
        maps_the_process_and_the_owners_of_files("wasmtime", pid);
    }
    if edge().is_some() {
        let _on = on(USERS);
        maps_the_process_and_the_owners_of_files("wasmedge", NamespaceMode::Container);
    }
}

fn maps_the_process_and_the_owners_of_files(engine: &str, pid: NamespaceMode) {
    let pod = pod("wasm-users", engine, pid);
    let c = pod.start_with(&["/sleep.wasm"], |config| {
        image(config);
        user(config, USER);
    });
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
    let proc = format!("/proc/{}", c.pid());
    let read = |name: &str| std::fs::read_to_string(format!("{proc}/{name}")).unwrap();
    assert!(read("uid_map").split_whitespace().eq(["0", "100000", "65536"]), "{engine}");
    assert!(read("gid_map").split_whitespace().eq(["0", "100000", "65536"]), "{engine}");
    let status = read("status");
    let uid = ROOT + USER;
    assert!(status.contains(&format!("\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")), "{status}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("\n{set}:\t0000000000000000\n")), "{status}");
    }
    assert!(status.contains("\nNoNewPrivs:\t1\n") && status.contains("\nSeccomp:\t2\n"));
    // The namespace that owns the pod's network, in which nobody of the host's has a name.
    let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/user")).unwrap();
    assert_ne!(namespace(&c.pid().to_string()), namespace("self"));

    let host = Path::new(&pod.config.log_directory).join("volume");
    std::fs::create_dir_all(&host).unwrap();
    std::fs::write(host.join("file"), "of the volume\n").unwrap();
    std::fs::set_permissions(host.join("file"), PermissionsExt::from_mode(0o600)).unwrap();
    for path in [host.clone(), host.join("file")] {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    let run = |program: &str, uid: u32, mapped: bool| {
        let c = pod.start_with(&[program], |config| {
            image(config);
            user(config, uid);
            volume(config, &host, mapped);
        });
        (c.wait(), text(&c, "stdout"), text(&c, "stderr"))
    };
    // On the host its files belong to the user that the container has.
    let (code, out, err) = run("/volume.wasm", USER, true);
    assert_eq!((code, out.as_str()), (0, "of the volume\n"), "{engine}: {err}");
    assert_eq!(run("/write.wasm", USER, true).0, 0, "{engine}");
    let made = host.join("new").metadata().unwrap();
    assert_eq!((made.uid(), made.len()), (USER, 7), "{engine}");
    // Without a mapping they belong to nobody whom the pod knows: ACCES of WASI, even for its root.
    assert_eq!(run("/volume.wasm", 0, false).0, 2, "{engine}");
    // A file of the image that is root's alone.
    assert_eq!(run("/shadow.wasm", 0, true).0, 0, "{engine}");
    assert_eq!(run("/shadow.wasm", USER, true).0, 2, "{engine}");
    // And one in its root file system, which root alone may make.
    assert_eq!(run("/scratch.wasm", 0, true).0, 0, "{engine}");
}

#[test]
fn what_is_made_for_a_mount_belongs_to_the_containers_root() {
    let Some(_on) = on(USERS) else { return };
    wasm::import();
    let pod = pod("wasm-users-mounts", "wasmtime", NamespaceMode::Container);
    let host = Path::new(&pod.config.log_directory).join("volume");
    std::fs::create_dir_all(&host).unwrap();
    let c = pod.start_with(&["/sleep.wasm"], |config| {
        image(config);
        user(config, USER);
        volume(config, &host, true);
        for mount in &mut config.mounts {
            mount.container_path = "/made/for/data".into();
        }
    });
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
    for made in ["made", "made/for"] {
        let meta = Path::new(&format!("/proc/{}/root/{made}", c.pid())).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (ROOT, ROOT), "{made}");
    }
}

#[test]
fn a_container_of_a_user_namespace_has_a_terminal() {
    let Some(_on) = on(USERS) else { return };
    wasm::import();
    let pod = pod("wasm-users-tty", "wasmtime", NamespaceMode::Container);
    let c = pod.start_with(&["/hello.wasm"], |config| {
        image(config);
        user(config, USER);
        config.tty = true;
    });
    assert_eq!(c.wait(), 0);
    wait_for("its output is there", SOON, || text(&c, "stdout").contains("hello from wasm"));
}

#[test]
fn a_native_container_stands_beside_modules_in_a_user_namespace() {
    let Some(_on) = on(USERS) else { return };
    wasm::import();
    let before = leaks::snapshot();
    let pod = pod("wasm-users-native", "wasmtime", NamespaceMode::Container);
    let module = pod.start_with(&["/sleep.wasm"], image);
    // An image of its own, whose files are mapped as the modules' are.
    let native = pod.start(&["sleep", "1000"]);
    assert_eq!(native.sh("id -u; stat -c %u /bin/busybox"), "0\n0");
    assert_eq!(native.sh("cut -c1-40 /proc/self/uid_map | tr -s ' '"), " 0 100000 65536");
    let meta = Path::new(&format!("/proc/{}", native.pid())).metadata().unwrap();
    assert_eq!(meta.uid(), ROOT);
    let same = |name: &str| {
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        assert_eq!(of(native.pid()), of(module.pid()), "{name}");
    };
    ["user", "net", "ipc", "uts"].into_iter().for_each(same);
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
    assert!(native.is_running() && module.is_running());
    assert_eq!(native.exec(&["sh", "-c", "exit 3"]).0, 3);
    // The pod's own engine has the words for what is missing.
    let message = pod.create_with(&["/no/such"], |_| {}).unwrap().start().unwrap_err();
    assert!(message.message().contains("/no/such"), "{message}");
    native.stop(0).unwrap();
    assert_eq!(native.wait(), 137);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_native_container_in_a_user_namespace_says_what_it_lacks() {
    let Some(_on) = on(USERS) else { return };
    let configuration = Configuration::read("wasm");
    let none = configuration.text.replace("/bin/runc13", "/bin/no-such-runc");
    configuration.set(&none);
    let pod = pod("wasm-users-none", "wasmtime", NamespaceMode::Container);
    let error = pod.create_with(&["sleep", "1000"], |_| {}).unwrap().start().unwrap_err();
    let message = error.message();
    assert!(message.contains("userns_engine") && message.contains("not installed"), "{message}");
    pod.remove().unwrap();
}
