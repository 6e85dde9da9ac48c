use super::*;

/// A container, and where the guest sees its root file system.
const AT: (&str, &str) = ("c1", "/run/kuasar/share/c1/rootfs");

fn spec() -> Map<String, Value> {
    let spec = json!({
        "process": {"args": ["x"], "cwd": "/", "apparmorProfile": "p", "selinuxLabel": "l"},
        "root": {"path": "rootfs", "readonly": true},
        "unknown": {"kept": 1},
        "hooks": {"prestart": [{"path": "/usr/bin/x"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc", "type": "bind", "source": "/etc", "options": ["rbind", "ro"]},
            {"destination": "/p", "type": "bind", "source": "/etc/passwd", "options": ["bind"]},
            {"destination": "/n", "type": "bind", "source": "/dev/null", "options": ["bind"]}
        ],
        "linux": {
            "cgroupsPath": "/kubepods/x", "mountLabel": "m",
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
            "resources": {
                "cpu": {"shares": 2, "cpus": "0-3", "mems": "0"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "blockIO": {"weight": 5, "throttleReadBpsDevice": []}
            },
            "namespaces": [
                {"type": "network", "path": "/proc/77/ns/net"}, {"type": "mount"},
                {"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "user", "path": "/x"}
            ]
        }
    });
    spec.as_object().unwrap().clone()
}

#[test]
fn nothing_of_the_host_stays_and_nothing_unknown_goes() {
    let mut spec = spec();
    let needs = edit(&mut spec, AT, 77, None).unwrap();
    let spec = Value::Object(spec);
    assert_eq!(spec["root"], json!({"path": "/run/kuasar/share/c1/rootfs", "readonly": true}));
    assert_eq!(spec["unknown"]["kept"], 1);
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(spec["linux"]["resources"]["cpu"], json!({"shares": 2}));
    assert_eq!(spec["linux"]["resources"]["blockIO"], json!({"weight": 5}));
    assert_eq!(spec["linux"]["resources"]["hugepageLimits"][0]["pageSize"], "2MB");
    assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
    for gone in [
        "/hooks",
        "/linux/cgroupsPath",
        "/linux/mountLabel",
        "/process/selinuxLabel",
        "/process/apparmorProfile",
    ] {
        assert!(spec.pointer(gone).is_none(), "{gone}");
    }
    assert!(!spec.to_string().contains("/proc/77"));
    assert_eq!(spec["linux"]["namespaces"][2]["path"], "/proc/0/ns/pid");
    let kinds = spec["linux"]["namespaces"].as_array().unwrap();
    let kinds: Vec<_> = kinds.iter().map(|n| n["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["network", "mount", "pid", "ipc", "uts"]);
    assert_eq!(needs.dropped, ["hooks"]);
}

#[test]
fn bind_mounts_become_volumes_of_the_share() {
    let mut spec = spec();
    let needs = edit(&mut spec, AT, 0, None).unwrap();
    let sources: Vec<_> =
        spec["mounts"].as_array().unwrap().iter().map(|m| m["source"].as_str().unwrap()).collect();
    let share = "/run/kuasar/share/c1";
    assert_eq!(sources, ["proc", &format!("{share}/m0"), &format!("{share}/m1"), "/dev/null"]);
    let of = |i: usize| &needs.volumes[i];
    assert_eq!((of(0).kind, of(0).recursive, of(0).read_only), (Want::Directory, true, true));
    assert_eq!((of(1).kind, of(1).recursive, of(1).read_only), (Want::File, false, false));
}

#[test]
fn a_target_pid_namespace_is_the_guests() {
    let mut spec = spec();
    spec["linux"]["namespaces"][2]["path"] = json!("/proc/12/ns/pid");
    edit(&mut spec, AT, 77, None).unwrap();
    assert_eq!(spec["linux"]["namespaces"][2]["path"], "/proc/12/ns/pid");
}

#[test]
fn sockets_and_devices_of_the_host_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("docker.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut with_socket = spec();
    with_socket["mounts"][1]["source"] = json!(socket);
    let refused = edit(&mut with_socket, AT, 0, None).unwrap_err();
    assert!(matches!(refused, Refusal::Impossible(text) if text.contains("docker.sock")));
    let mut with_device = spec();
    let tape = json!({"path": "/dev/st0", "type": "c", "major": 9, "minor": 0});
    with_device["linux"]["devices"].as_array_mut().unwrap().push(tape);
    let refused = edit(&mut with_device, AT, 0, None).unwrap_err();
    assert!(matches!(refused, Refusal::Impossible(text) if text.contains("/dev/st0")));
    let mut with_device = spec();
    let disk = json!({"path": "/dev/sdb", "type": "b", "major": 8, "minor": 16});
    with_device["linux"]["devices"].as_array_mut().unwrap().push(disk);
    let all = json!([{"allow": true, "access": "rwm"}]);
    with_device["linux"]["resources"]["devices"] = all;
    let needs = edit(&mut with_device, AT, 0, None).unwrap();
    assert_eq!(needs.dropped.len(), 2);
    assert_eq!(needs.blocks, []);
    assert_eq!(with_device["linux"]["devices"].as_array().unwrap().len(), 1);
}

#[test]
fn wrong_specs_are_named() {
    let wrong = |change: fn(&mut Map<String, Value>)| {
        let mut spec = spec();
        change(&mut spec);
        edit(&mut spec, AT, 0, None).unwrap_err()
    };
    let refused = [
        wrong(|spec| drop(spec.remove("process"))),
        wrong(|spec| spec["process"]["cwd"] = json!("tmp")),
        wrong(|spec| spec["mounts"][1]["source"] = json!("relative")),
        wrong(|spec| spec["mounts"][1]["source"] = json!("/nowhere/at/all")),
        wrong(|spec| spec["linux"]["namespaces"][0]["type"] = json!("moon")),
        wrong(|spec| spec["mounts"] = json!({})),
    ];
    assert!(refused.iter().all(|one| matches!(one, Refusal::Invalid(_))), "{refused:?}");
}

#[test]
fn an_empty_dir_in_memory_is_the_guests_own() {
    kuasar_host::testing::apart(|dir| {
        let path = dir.join("volumes/kubernetes.io~empty-dir/cache");
        std::fs::create_dir_all(&path).unwrap();
        let mut on_disk = spec();
        on_disk["mounts"][1]["source"] = json!(path);
        assert!(edit(&mut on_disk, AT, 0, None).unwrap().storages.is_empty());
        kuasar_host::mount::mount_shm(&path, 1 << 20).unwrap();
        let mut spec = spec();
        spec["mounts"][1]["source"] = json!(path);
        let needs = edit(&mut spec, AT, 0, None).unwrap();
        let [storage] = needs.storages.as_slice() else { panic!() };
        assert_eq!(storage.kind, "tmpfs");
        assert!(storage.options.contains(&"size=1048576".to_owned()), "{storage:?}");
        assert_eq!(spec["mounts"][1]["source"], storage.target.as_str());
    });
}

#[test]
fn shared_memory_that_an_engine_has_made_is_the_guests_own() {
    kuasar_host::testing::apart(|dir| {
        let (shm, below) = (dir.join("shm"), dir.join("shm/below"));
        std::fs::create_dir(&shm).unwrap();
        kuasar_host::mount::mount_shm(&shm, 1 << 20).unwrap();
        std::fs::create_dir(&below).unwrap();
        let placed = |source: &Path, destination: &str| {
            let mut spec = spec();
            spec["mounts"][1]["source"] = json!(source);
            spec["mounts"][1]["destination"] = json!(destination);
            edit(&mut spec, AT, 0, None).unwrap();
            spec["mounts"][1]["source"].as_str().unwrap().to_owned()
        };
        assert_eq!(placed(&shm, "/dev/shm"), "/dev/shm");
        let volume = "/run/kuasar/share/c1/m0";
        let shm = shm.as_path();
        for (source, destination) in [(shm, "/cache"), (&below, "/dev/shm"), (dir, "/dev/shm")] {
            assert_eq!(placed(source, destination), volume, "{source:?} {destination}");
        }
    });
}

#[test]
fn a_block_device_is_a_disk_with_what_its_rules_allow() {
    let mut spec = spec();
    let disk = |path: &str, minor: u32| json!({"path": path, "type": "b", "major": 8, "minor": minor, "fileMode": 0o60660, "gid": 6});
    spec["linux"]["devices"] =
        json!([disk("/dev/xvda", 16), disk("/dev/xvdb", 32), disk("/x", 48)]);
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
        {"allow": true, "type": "b", "major": 8, "minor": 32, "access": "r"},
    ]);
    let needs = edit(&mut spec, AT, 0, None).unwrap();
    let found: Vec<_> =
        needs.blocks.iter().map(|b| (b.path.as_str(), b.minor, b.access.as_str())).collect();
    assert_eq!(found, [("/dev/xvda", 16, "rwm"), ("/dev/xvdb", 32, "r"), ("/x", 48, "")]);
    assert_eq!(needs.blocks[0].node, (0o660, 0, 6));
    // The host's numbers name other disks in the guest: neither entry nor rule of them stays.
    assert_eq!(spec["linux"]["devices"], json!([]));
    let rules = spec["linux"]["resources"]["devices"].as_array().unwrap();
    assert_eq!(rules.len(), 2, "{rules:?}");
    assert!(rules.iter().all(|rule| rule["type"] != "b"), "{rules:?}");
}

#[test]
fn block_devices_without_a_number_and_too_many_of_them_are_refused() {
    let mut none = spec();
    none["linux"]["devices"] = json!([{"path": "/dev/xvda", "type": "b", "major": 1_u64 << 40}]);
    assert!(matches!(edit(&mut none, AT, 0, None), Err(Refusal::Invalid(_))));
    let mut many = spec();
    let one = |n: usize| json!({"path": format!("/d{n}"), "type": "b", "major": 8, "minor": n});
    many["linux"]["devices"] = (0..=block::MAX_VOLUMES).map(one).collect();
    assert!(matches!(edit(&mut many, AT, 0, None), Err(Refusal::Impossible(_))));
}
