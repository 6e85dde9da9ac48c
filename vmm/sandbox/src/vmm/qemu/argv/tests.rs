//! Command lines as they should be. Small on purpose: each says what a kind of machine adds.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::super::super::spec::{Boot, Console, Range, Share};
use super::*;

fn spec() -> VmSpec {
    VmSpec {
        id: "pod".into(),
        dir: "/run/k/pod".into(),
        cpus: Range::fixed(1),
        memory_mib: Range::fixed(128),
        hugepages: false,
        boot: Boot {
            kernel: "/k/vmlinux".into(),
            root: Root::Initrd("/k/initrd".into()),
            params: vec!["quiet".into()],
        },
        shares: Vec::new(),
        nics: Vec::new(),
        disks: Vec::new(),
        channel: Channel::None,
        entropy: false,
        console: Console { log: PathBuf::new(), limit: 0 },
        netns: None,
        cgroups: Vec::new(),
    }
}

fn config(machine: Machine) -> QemuConfig {
    QemuConfig {
        path: "qemu".into(),
        machine,
        accel: Accel::Tcg,
        balloon: false,
        root_ports: 2,
        data_dirs: vec!["/fw".into()],
        ..QemuConfig::default()
    }
}

fn line(config: &QemuConfig, spec: &VmSpec, sockets: &Sockets) -> String {
    let mut fds = Fds::default();
    build(config, spec, &mut fds, sockets, false).unwrap().join(" ")
}

fn disk(id: &str, format: DiskFormat) -> (tempfile::NamedTempFile, Disk) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let disk = Disk::open(id, file.path(), format, true).unwrap();
    (file, disk)
}

#[test]
fn the_smallest_microvm() {
    let line = line(&config(Machine::Microvm), &spec(), &Sockets { qmp: 3, ..Sockets::default() });
    assert_eq!(
        line,
        "qemu -name pod -no-user-config -nodefaults -L /fw -display none -no-reboot \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
         -machine microvm,acpi=off,memory-backend=ram -global virtio-mmio.force-legacy=false \
         -accel tcg -cpu max -smp cpus=1 -m size=128M \
         -object memory-backend-memfd,id=ram,size=128M,share=on \
         -chardev stdio,id=console,signal=off -serial chardev:console \
         -chardev socket,id=qmp,fd=3,server=on,wait=off -qmp chardev:qmp \
         -kernel /k/vmlinux -initrd /k/initrd \
         -append console=ttyS0 panic=-1 reboot=t nolapic_timer init_on_alloc=1 quiet"
    );
}

#[test]
fn q35_has_its_root_ports_and_can_grow() {
    let mut spec = spec();
    spec.cpus = Range { at_boot: 1, most: 4 };
    spec.hugepages = true;
    let line = line(&config(Machine::Q35), &spec, &Sockets::default());
    assert!(line.contains("-smp cpus=1,maxcpus=4,sockets=4,cores=1,threads=1 "));
    assert!(line.contains("share=on,hugetlb=on,hugetlbsize=2M "));
    assert!(!line.contains("nolapic_timer"));
    assert!(line.ends_with(
        "-device pcie-root-port,id=rp0,bus=pcie.0,chassis=1,slot=1,port=0,addr=0x10.0,multifunction=on \
         -device pcie-root-port,id=rp1,bus=pcie.0,chassis=2,slot=2,port=1,addr=0x10.1"
    ));
}

#[test]
fn an_image_has_its_format_is_reached_by_descriptor_and_follows_no_backing_file() {
    let (_raw, raw) = disk("data", DiskFormat::Raw);
    let (_qcow, qcow) = disk("cow", DiskFormat::Qcow2);
    let mut spec = spec();
    spec.disks = vec![raw, qcow];
    let line = line(&config(Machine::Q35), &spec, &Sockets::default());
    assert!(line.contains("-add-fd fd=3,set=1 ") && line.contains("-add-fd fd=4,set=2 "));
    assert!(line.contains(r#""driver":"raw""#) && line.contains(r#""driver":"qcow2""#));
    assert!(line.contains(r#""backing":null"#));
    assert!(!line.contains("-drive") && !line.contains("/tmp"));
    assert!(line.contains("-device virtio-blk-pci,id=data,drive=blk-data,serial=data,"));
}

#[test]
fn shares_channels_and_nics_are_descriptors() {
    let null = || Arc::new(std::fs::File::open("/dev/null").unwrap().into());
    let mut spec = spec();
    let share = |tag: &str, kind| Share {
        tag: tag.into(),
        dir: "/a,b".into(),
        kind,
        read_only: true,
        cache: crate::vmm::Cache::default(),
    };
    spec.shares = vec![share("kuasar", ShareKind::Virtiofs), share("p9", ShareKind::Ninep)];
    spec.nics = vec![Nic {
        id: "eth0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1450,
        tap: vec![null(), null()],
        tap_name: None,
    }];
    spec.channel = Channel::HybridVsock { cid: 3, uds: "/run/k/v".into() };
    let sockets = Sockets { qmp: 9, shares: vec![5], vsock: Some(6), ..Sockets::default() };
    let all = line(&config(Machine::Microvm), &spec, &sockets);
    for part in [
        "-netdev tap,id=net-eth0,fds=3:4 -device virtio-net-device,id=eth0,netdev=net-eth0,\
         mac=02:00:00:00:00:01,host_mtu=1450,mq=on ",
        "-chardev socket,id=fs-kuasar,fd=5 -device vhost-user-fs-device,id=fs-kuasar-dev,\
         chardev=fs-kuasar,tag=kuasar ",
        "-fsdev local,id=ninep-p9,path=/a,,b,security_model=passthrough,multidevs=remap,readonly=on ",
        "-chardev socket,id=vsock,fd=6 -device vhost-user-vsock-device,id=vsock-dev,chardev=vsock",
    ] {
        assert!(all.contains(part), "{part}\nis not in\n{all}");
    }
    spec.shares.clear();
    spec.channel = Channel::Serial { socket: "/run/k/s".into(), console: false, uds: None };
    let sockets = Sockets { serial: Some(7), ..Sockets::default() };
    let all = line(&config(Machine::Q35), &spec, &sockets);
    assert!(all.contains(
        "-chardev socket,id=agent,fd=7,server=on,wait=off -device virtio-serial-pci,max_ports=2 \
         -device virtserialport,chardev=agent,name=org.kuasar.agent.0"
    ));
    assert!(all.contains("romfile=,mq=on,vectors=6"));
    spec.channel = Channel::Serial { socket: "/run/k/s".into(), console: true, uds: None };
    let all = line(&config(Machine::Microvm), &spec, &sockets);
    assert!(
        all.contains("-device virtconsole,nr=0,chardev=agent,name=org.kuasar.agent.0"),
        "{all}"
    );
    // The device that has the id is handed over: QEMU opens none.
    spec.channel = Channel::KernelVsock { cid: 77 };
    let sockets = Sockets { vhost: Some(8), ..Sockets::default() };
    let all = line(&config(Machine::Microvm), &spec, &sockets);
    assert!(all.contains("-device vhost-vsock-device,guest-cid=77,vhostfd=8"), "{all}");
}

#[test]
fn more_devices_than_a_microvm_has_places_is_an_error_that_says_so() {
    let disks: Vec<_> = (0..9).map(|n| disk(&format!("d{n}"), DiskFormat::Raw)).collect();
    let mut spec = spec();
    spec.disks = disks.iter().map(|(_, disk)| disk.clone()).collect();
    let build = |spec: &VmSpec| {
        build(&config(Machine::Microvm), spec, &mut Fds::default(), &Sockets::default(), false)
    };
    let error = build(&spec).unwrap_err();
    assert!(matches!(&error, Error::Exhausted(text) if text.contains("8 places")));
    spec.disks.pop();
    build(&spec).unwrap();
}

#[test]
fn nothing_can_smuggle_an_option_in() {
    // Ids are checked; paths of 9p are escaped; the kernel's line is one argument.
    let mut spec = spec();
    spec.boot.params = vec!["-device".into(), "evil".into()];
    let argv = build(&config(Machine::Q35), &spec, &mut Fds::default(), &Sockets::default(), false)
        .unwrap();
    let devices: BTreeSet<_> = argv.iter().filter(|word| *word == "-device").collect();
    assert!(devices.len() <= 1 && !argv.contains(&"evil".to_owned()));
    spec.id = "a,b".into();
    assert!(spec.check().is_err());
}
