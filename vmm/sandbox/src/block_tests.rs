use super::*;

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        kind: kind.into(),
        source: source.display().to_string(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

fn volume(major: u32, minor: u32) -> Volume {
    let (path, access) = ("/dev/xvda".to_owned(), "rwm".to_owned());
    Volume { major, minor, path, node: (0o660, 0, 6), access }
}

#[test]
fn one_mount_of_an_image_or_device_is_a_disk_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("image");
    std::fs::write(&file, [0; 512]).unwrap();
    let of = |mounts: &[Mount]| Image::of(mounts).unwrap();
    let image = of(&[mount("ext4", &file, &["loop", "rw", "noatime"])]).unwrap();
    assert_eq!((image.fstype.as_str(), image.read_only, image.file), ("ext4", false, true));
    assert_eq!(image.options, ["noatime"]);
    let image = of(&[mount("ext4", &file, &["ro", "loop"])]).unwrap();
    assert!(image.read_only && image.options == ["ro"]);
    // Whatever the mount says, there is no writable EROFS.
    assert!(of(&[mount("erofs", &file, &["loop"])]).unwrap().read_only);
    assert_eq!(of(&[]), None);
    assert_eq!(of(&[mount("bind", dir.path(), &["rbind"])]), None);
    assert_eq!(of(&[mount("ext4", &file, &["bind"])]), None);
    assert_eq!(of(&[mount("ext4", dir.path(), &[])]), None, "a directory");
    assert_eq!(of(&[mount("overlay", Path::new("overlay"), &["lowerdir=/a"])]), None);
    let one = mount("ext4", &file, &[]);
    assert_eq!(of(&[one.clone(), one.clone()]), None, "several mounts are the host's");
    assert_eq!(of(&[Mount { target: "/x".into(), ..one }]), None);
}

#[test]
fn a_link_in_place_of_an_image_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, link) = (dir.path().join("secret"), dir.path().join("image"));
    std::fs::write(&secret, "not yours").unwrap();
    std::os::unix::fs::symlink(&secret, &link).unwrap();
    let error = Image::of(&[mount("ext4", &link, &["loop"])]).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument(text) if text.contains("a link")), "{error}");
    // Planted between the two looks.
    let image = Image {
        source: link,
        fstype: "ext4".into(),
        options: Vec::new(),
        read_only: false,
        file: true,
    };
    let error = Opened::open("c", Some(image), Vec::new()).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument(text) if text.contains("a link")), "{error}");
    assert_eq!(std::fs::read(&secret).unwrap(), b"not yours");
    let missing = Image::of(&[mount("ext4", &dir.path().join("none"), &[])]);
    assert!(matches!(missing, Err(Error::InvalidArgument(_))));
}

#[test]
fn a_devices_name_is_followed_inside_of_dev_alone() {
    // Out of /dev; /dev/fd is a link into procfs.
    for path in ["/dev/fd/0", "/dev/../etc/passwd", "/dev/fd"] {
        let opened = open(Path::new(path), libc::O_RDONLY);
        assert!(opened.is_err(), "{path}");
    }
    assert!(open(Path::new("/dev/null"), libc::O_PATH).is_ok());
    // A character device is no disk.
    let file = open(Path::new("/dev/null"), libc::O_RDONLY).unwrap();
    let disk = Disk::from_file("d", Path::new("/dev/null"), file, DiskFormat::Raw, true);
    assert!(matches!(disk, Err(vmm::Error::Invalid(_))));
}

#[test]
fn a_number_that_no_device_has_is_an_error_that_names_it() {
    let error = open_number(&volume(4094, 77)).unwrap_err();
    assert!(error.chain().contains("4094:77"), "{}", error.chain());
}

#[test]
fn the_guest_is_told_serial_numbers_and_never_a_path_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, [0; 512]).unwrap();
    let image = Image::of(&[mount("ext4", &path, &["loop"])]).unwrap();
    let mut opened = Opened::open("container", image, Vec::new()).unwrap();
    let file = File::open(&path).unwrap();
    let disk = Disk::from_file("v8-1", &path, file, DiskFormat::Raw, true).unwrap();
    opened.volumes.push((disk, volume(8, 1)));
    let told = opened.tell("container", |id| format!("s-{id}"));
    assert_eq!(told.rootfs.as_deref(), Some("/run/kuasar/rootfs/container"));
    let [rootfs, raw] = told.storages.as_slice() else { panic!() };
    assert_eq!(rootfs.source, format!("serial:s-{}", rootfs_id("container")));
    assert_eq!((rootfs.kind.as_str(), rootfs.fstype.as_str()), ("block", "ext4"));
    assert_eq!((raw.source.as_str(), raw.fstype.as_str()), ("serial:s-v8-1", ""));
    let [device] = told.devices.as_slice() else { panic!() };
    assert_eq!((&device.node, device.path.as_str()), (&raw.target, "/dev/xvda"));
    assert!(!format!("{told:?}").contains(dir.path().to_str().unwrap()));
    // Names that each VMM takes.
    for used in opened.used() {
        assert!(used.id.len() <= 20 && used.id.starts_with(['r', 'v']), "{used:?}");
    }
}

/// A machine that takes disks, and keeps one that its guest does not let go of.
#[derive(Debug)]
struct Machine {
    has: std::sync::Mutex<BTreeSet<String>>,
    stubborn: bool,
    state: VmState,
}

fn vm_state() -> VmState {
    serde_json::from_value(serde_json::json!({
        "version": 1, "kind": "qemu", "id": "pod", "dir": "/run/vm",
        "vmm": {"name": "qemu", "pid": 2, "start": 3, "cookie": 4},
        "helpers": [], "channel": "none",
        "cpus": {"at_boot": 1, "most": 1}, "memory_mib": {"at_boot": 128, "most": 128},
        "console": ["/run/vm/log", 1], "driver": {"old": true}
    }))
    .unwrap()
}

#[async_trait::async_trait]
impl Vm for Machine {
    fn name(&self) -> String {
        "qemu q35".into()
    }
    fn features(&self) -> vmm::Features {
        vmm::Features::of(&[Feature::DiskHotplug])
    }
    fn pid(&self) -> u32 {
        2
    }
    fn state(&self) -> VmState {
        self.state.clone()
    }
    fn events(&self) -> tokio::sync::broadcast::Receiver<vmm::Event> {
        tokio::sync::broadcast::channel(1).1
    }
    async fn wait(&self) -> vmm::Result<vmm::Exit> {
        std::future::pending().await
    }
    async fn stop(&self, _: std::time::Duration) -> vmm::Result<vmm::Exit> {
        std::future::pending().await
    }
    async fn release(&self) {}
    async fn ping(&self) -> vmm::Result<()> {
        Ok(())
    }
    async fn attach_disk(&self, disk: &Disk) -> vmm::Result<()> {
        match self.has.lock().unwrap().insert(disk.id.clone()) {
            true => Ok(()),
            false => Err(vmm::Error::DeviceExists(disk.id.clone())),
        }
    }
    async fn detach(&self, id: &str) -> vmm::Result<()> {
        if self.stubborn {
            let limit = std::time::Duration::from_secs(1);
            return Err(vmm::Error::Deadline { what: "the guest".into(), limit });
        }
        match self.has.lock().unwrap().remove(id) {
            true => Ok(()),
            false => Err(vmm::Error::NoDevice(id.into())),
        }
    }
}

fn machine_with(stubborn: bool) -> Arc<Machine> {
    Arc::new(Machine { has: std::sync::Mutex::default(), stubborn, state: vm_state() })
}

fn opened(dir: &Path, read_only: bool) -> Opened {
    let path = dir.join("volume");
    std::fs::write(&path, [0; 512]).unwrap();
    let file = File::open(&path).unwrap();
    let disk = Disk::from_file("v8-1", &path, file, DiskFormat::Raw, read_only).unwrap();
    Opened { rootfs: None, volumes: vec![(disk, volume(8, 1))] }
}

#[tokio::test]
async fn a_volume_of_two_containers_is_one_disk_until_the_last_of_them_goes() {
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with(false);
    let disks = Disks::new(Some(vm.clone()), dir.path());
    let first = opened(dir.path(), false);
    let used = first.used();
    disks.plug("a", first, Vec::new).await.unwrap();
    disks.plug("b", opened(dir.path(), false), || used.clone()).await.unwrap();
    disks.unplug(&used, || used.clone()).await;
    assert!(vm.has.lock().unwrap().contains("v8-1"), "b has it still");
    disks.unplug(&used, Vec::new).await;
    assert!(vm.has.lock().unwrap().is_empty());
    disks.unplug(&used, Vec::new).await;

    // Read-only first: nobody writes behind that.
    let reader = opened(dir.path(), true);
    let used = reader.used();
    disks.plug("a", reader, Vec::new).await.unwrap();
    let error = disks.plug("b", opened(dir.path(), false), || used.clone()).await.unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
}

#[tokio::test]
async fn a_guest_that_keeps_a_disk_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with(true);
    let disks = Disks::new(Some(vm.clone()), dir.path());
    let first = opened(dir.path(), false);
    let used = first.used();
    disks.plug("a", first, Vec::new).await.unwrap();
    disks.unplug(&used, Vec::new).await;
    // The next container has it again.
    disks.plug("b", opened(dir.path(), false), Vec::new).await.unwrap();
}

#[tokio::test]
async fn what_the_machine_has_is_recorded_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine_with(false);
    Arc::get_mut(&mut machine).unwrap().state.driver = serde_json::json!({"new": true});
    let disks = Disks::new(Some(machine), dir.path());
    assert_eq!(newest(dir.path(), vm_state()).driver["old"], true, "nothing was recorded");
    disks.plug("a", opened(dir.path(), false), Vec::new).await.unwrap();
    assert_eq!(newest(dir.path(), vm_state()).driver["new"], true);
    let mut other = vm_state();
    other.vmm.cookie += 1;
    assert_eq!(newest(dir.path(), other).driver["old"], true, "of an earlier machine");
    std::fs::write(dir.path().join(RECORD), b"{\"torn").unwrap();
    assert_eq!(newest(dir.path(), vm_state()).driver["old"], true);
}
