//! One suite for every VMM: what a machine of [`Vmm`] does with a real guest.
//!
//! Programs come from the environment, or from `PATH`; without one the tests that need it print
//! `skipped: …`. A missing capability must be a typed `Unsupported`.
//!
//! | variable | |
//! |---|---|
//! | `KUASAR_TEST_QEMU`, `KUASAR_TEST_QEMU_DATA` | QEMU, and the directory of its firmware |
//! | `KUASAR_TEST_VIRTIOFSD`, `KUASAR_TEST_VSOCK` | virtiofsd, `vhost-device-vsock` |
//! | `KUASAR_TEST_KERNEL` | guest kernel with virtio-mmio, virtiofs and vsock built in |
//! | `KUASAR_TEST_KERNEL_PCI` | the same with PCI, ACPI and hot-plug |
//! | `KUASAR_TEST_MKFS_EROFS` | makes the guest's root an EROFS disk instead of an initramfs |
//! | `KUASAR_TEST_LIBRARIES` | further directories (`:` between) that a jail must show |
//! | `KUASAR_TEST_ACCEL` | `tcg` (default) or `kvm`, of QEMU |
//! | `KUASAR_TEST_CLOUD_HYPERVISOR`, `KUASAR_TEST_FIRECRACKER`, `KUASAR_TEST_STRATOVIRT` | the others, which need KVM |
//! | `KUASAR_TEST_KERNEL_KVM` | guest kernel for the first two (ELF with PVH, PCI, ACPI, virtio-mmio) |
//! | `KUASAR_TEST_KERNEL_FLAT` | guest kernel for StratoVirt: a bzImage, or a flat binary |
//! | `KUASAR_TEST_PARAMS` | further parameters of these kernels |
//! | `KUASAR_TEST_PATIENCE` | seconds that a guest may take for anything; 120 |
//! | `KUASAR_TEST_NO_SMP` | these kernels know one CPU |
//! | `KUASAR_TEST_STRATOVIRT_SECCOMP` | `off` where its filter does not fit the host's C library |
//!
//! As root the machines run jailed. Boots are one at a time: with TCG each takes a whole CPU, and
//! under a KVM that is itself nested a boot takes half a minute.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // a test

#[macro_use]
#[path = "support/bench.rs"]
mod bench;
#[path = "support/guest.rs"]
mod guest;

use std::fs;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use tokio::io::AsyncBufReadExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

use bench::{Probe, Target, bench, image, named, nic, nic_alone, patience, save, tap};
use vmm_sandboxer::vmm::qemu::Machine;
use vmm_sandboxer::vmm::{
    Cache, Disk, DiskFormat, Error, Event, Feature, Kind, Range, Share, ShareKind, VmSpec, console,
};

async fn boots_talks_shares_and_its_exit_is_seen(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let share = bench.dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("hello"), "from the host\n").unwrap();
    let mut spec = bench.spec(bench.channel());
    let shares = bench.vmm.features().has(Feature::Virtiofs);
    if shares {
        spec.shares.push(Share {
            tag: "kuasar".into(),
            dir: share.clone(),
            kind: ShareKind::Virtiofs,
            read_only: false,
            cache: Cache::default(),
        });
    }
    let image = image(bench.dir.path(), "disk", "cold");
    spec.disks.push(Disk::open("cold", &image, DiskFormat::Raw, true).unwrap());
    let vm = bench.boot(&spec).await;
    vm.ping().await.unwrap();

    let mut probe = bench.probe(&spec, true).await;
    assert_eq!(probe.ask("echo hello").await, "hello");
    if bench.channel() == "vsock" {
        let mut second = Probe::dial(&bench).await;
        assert_eq!(second.ask("echo again").await, "again");
    }
    if shares {
        assert_eq!(probe.ask("mount kuasar virtiofs").await, "ok");
        assert_eq!(probe.ask("read /run/kuasar/hello").await, "from the host");
        assert_eq!(probe.ask("write /run/kuasar/back guest").await, "ok");
        assert_eq!(fs::read_to_string(share.join("back")).unwrap(), "guest");
    } else {
        let mut spec = spec.clone();
        let kind = ShareKind::Virtiofs;
        spec.shares.push(Share {
            tag: "kuasar".into(),
            dir: share,
            kind,
            read_only: false,
            cache: Cache::default(),
        });
        assert!(matches!(bench.vmm.spawn(&spec).await, Err(Error::Unsupported { .. })));
    }
    let disks = probe.ask("disks").await;
    let name = named(&disks, &vm.disk_serial("cold")).expect(&disks);
    assert_eq!(probe.ask(&format!("read /dev/{name}")).await, "cold");

    let mut events = vm.events();
    probe.tell("poweroff").await;
    let exit = timeout(patience(), vm.wait()).await.expect("an exit").unwrap();
    assert_eq!(exit.status, 0);
    let told = timeout(patience(), async {
        while !matches!(events.recv().await.unwrap(), Event::Shutdown { .. }) {}
    });
    told.await.expect("word of the end");
    assert!(matches!(vm.ping().await, Err(Error::Gone)));
    bench.end(&vm).await;
    assert!(console::tail(&bench.log(), 10_000).contains("probe: "));
    Some(())
}

async fn a_killed_one_is_seen_within_100_ms_and_helpers_go_with_it(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let spec = bench.spec(bench.channel());
    let vm = bench.boot(&spec).await;
    let waiting = {
        let vm = vm.clone();
        tokio::spawn(async move { (vm.wait().await, Instant::now()) })
    };
    let killed = Instant::now();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vm.pid() as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let (exit, seen) = timeout(patience(), waiting).await.unwrap().unwrap();
    assert_eq!(exit.unwrap().status, 137);
    let took = seen - killed;
    assert!(took < Duration::from_millis(100), "{took:?}");
    let helped = !vm.state().helpers.is_empty();
    bench.end(&vm).await;
    if !helped {
        return Some(());
    }
    // And again, with a helper instead.
    let vm = bench.boot(&spec).await;
    let mut events = vm.events();
    let helper = vm.state().helpers[0].identity.pid;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(helper as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let event = timeout(patience(), events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, Event::HelperEnded { status: 137, .. }), "{event:?}");
    bench.end(&vm).await;
    Some(())
}

async fn another_daemon_takes_it_up_again(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let spec = bench.spec(bench.channel());
    let vm = bench.boot(&spec).await;
    drop(bench.probe(&spec, true).await);
    // As written to a journal before the plugging, and read from it.
    let before = serde_json::to_string(&vm.state()).unwrap();
    if vm.features().has(Feature::DiskHotplug) {
        let image = image(bench.dir.path(), "disk", "kept");
        vm.attach_disk(&Disk::open("kept", &image, DiskFormat::Raw, true).unwrap()).await.unwrap();
    }
    drop(vm);
    let vm = bench.vmm.reattach(serde_json::from_str(&before).unwrap()).await.unwrap();
    vm.ping().await.unwrap();
    let mut probe = bench.probe(&spec, false).await;
    assert_eq!(probe.ask("echo still").await, "still");
    if vm.features().has(Feature::DiskHotplug) {
        // The crash came before the journal's entry; the VMM knows better.
        let image = image(bench.dir.path(), "disk", "kept");
        let again = Disk::open("kept", &image, DiskFormat::Raw, true).unwrap();
        assert!(matches!(vm.attach_disk(&again).await, Err(Error::DeviceExists(_))));
        vm.detach("kept").await.unwrap();
    }
    // The console goes on.
    assert_eq!(probe.ask("log after-the-restart").await, "ok");
    let until = Instant::now() + patience();
    while !console::tail(&bench.log(), 60_000).contains("after-the-restart") {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // One that ended while nobody looked has its real status.
    let state = vm.state();
    drop(vm);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(state.vmm.identity.pid as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    bench.processes.exit_of(state.vmm.cookie).await.unwrap();
    let vm = bench.vmm.reattach(state).await.unwrap();
    assert_eq!(vm.wait().await.unwrap().status, 137);
    bench.end(&vm).await;
    Some(())
}

async fn disks_and_nics_come_and_go(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let spec = bench.spec(bench.channel());
    let vm = bench.boot(&spec).await;
    let image = image(bench.dir.path(), "disk", "plugged");
    let disk = Disk::open("hot", &image, DiskFormat::Raw, false).unwrap();
    if !vm.features().has(Feature::DiskHotplug) {
        let error = vm.attach_disk(&disk).await.unwrap_err();
        assert!(matches!(&error, Error::Unsupported { way_out, .. } if !way_out.is_empty()));
        assert!(matches!(vm.detach("hot").await, Err(Error::Unsupported { .. })));
        bench.end(&vm).await;
        return Some(());
    }
    let mut probe = bench.probe(&spec, true).await;
    // More often than there are ports: each comes back.
    for round in 0..6 {
        let started = Instant::now();
        vm.attach_disk(&disk).await.unwrap_or_else(|error| panic!("{round}: {}", error.chain()));
        let serial = vm.disk_serial("hot");
        let disks = probe.until("disks", |answer| named(answer, &serial).is_some()).await;
        println!("round {round}: seen by the guest after {:?}", started.elapsed());
        let name = named(&disks, &serial).unwrap();
        // The size of a drive whose file was changed comes a moment later.
        let read = format!("read /dev/{name}");
        assert_eq!(probe.until(&read, |answer| !answer.is_empty()).await, "plugged");
        assert!(matches!(vm.attach_disk(&disk).await, Err(Error::DeviceExists(_))));
        vm.detach("hot").await.unwrap_or_else(|error| panic!("{round}: {}", error.chain()));
        assert!(named(&probe.ask("disks").await, &serial).is_none());
    }
    assert!(matches!(vm.detach("hot").await, Err(Error::NoDevice(_))));
    let own = |id: &str| {
        let path = self::image(bench.dir.path(), id, "x");
        Disk::open(id, &path, DiskFormat::Raw, false).unwrap()
    };
    for id in ["d0", "d1", "d2"] {
        vm.attach_disk(&own(id)).await.unwrap_or_else(|error| panic!("{id}: {}", error.chain()));
    }
    if bench.vmm.kind() == Kind::Qemu {
        // An image is locked against a second writer: a failure that takes no port.
        let second = Disk::open("clash", &bench.dir.path().join("d0"), DiskFormat::Raw, false);
        let error = vm.attach_disk(&second.unwrap()).await.unwrap_err();
        assert!(matches!(&error, Error::Refused { .. }), "{}", error.chain());
    }
    vm.attach_disk(&own("d3")).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    if bench.vmm.kind() != Kind::CloudHypervisor {
        assert!(matches!(vm.attach_disk(&own("d4")).await, Err(Error::Exhausted(_))));
    }
    vm.detach("d3").await.unwrap();

    let plugs = vm.features().has(Feature::NicHotplug);
    match tap() {
        Some(tap) if !plugs => {
            let error = vm.attach_nic(&nic("eth0", 7, tap)).await.unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        }
        None => println!("skipped the NIC: no tap device can be made"),
        Some(tap) => {
            vm.attach_nic(&nic("eth0", 7, tap)).await.unwrap_or_else(|e| panic!("{}", e.chain()));
            probe.until("nics", |answer| answer.contains("02:00:00:00:00:07")).await;
            vm.detach("eth0").await.unwrap();
            assert!(!probe.ask("nics").await.contains("02:00:00:00:00:07"));
        }
    }
    bench.end(&vm).await;
    Some(())
}

async fn it_pauses_and_changes_size(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let mut spec = bench.spec(bench.channel());
    let qemu = bench.vmm.kind() == Kind::Qemu;
    let smp = qemu || std::env::var_os("KUASAR_TEST_NO_SMP").is_none();
    if bench.vmm.features().has(Feature::MemoryResize) {
        spec.memory_mib = Range { at_boot: 128, most: 256 };
    }
    if qemu || smp && bench.vmm.features().has(Feature::CpuResize) {
        spec.cpus = Range { at_boot: 1, most: 2 };
    }
    let vm = bench.boot(&spec).await;
    let mut probe = bench.probe(&spec, true).await;

    if vm.features().has(Feature::Pause) {
        vm.pause().await.unwrap();
        probe.tell("echo paused").await;
        let mut line = String::new();
        let silence = timeout(Duration::from_millis(300), probe.0.read_line(&mut line)).await;
        assert!(silence.is_err(), "a paused guest spoke: {line}");
        vm.resume().await.unwrap();
        assert_eq!(probe.line().await, "paused");
    } else {
        assert!(matches!(vm.pause().await, Err(Error::Unsupported { .. })));
    }

    let memory =
        async |probe: &mut Probe<UnixStream>| -> u32 { probe.ask("memory").await.parse().unwrap() };
    if vm.features().has(Feature::MemoryResize) {
        let small = vm.resize_memory(128).await.unwrap();
        assert_eq!(small, 128);
        let had = memory(&mut probe).await;
        let large = vm.resize_memory(256).await.unwrap();
        assert_eq!(large, 256);
        let more = |answer: &str| answer.parse::<u32>().is_ok_and(|has| has >= had + 100);
        probe.until("memory", more).await;
        assert!(matches!(vm.resize_memory(512).await, Err(Error::Invalid(_))));
    } else {
        assert!(matches!(vm.resize_memory(128).await, Err(Error::Unsupported { .. })));
    }

    if vm.features().has(Feature::CpuResize) && !smp {
        println!("skipped the CPUs: KUASAR_TEST_NO_SMP");
    } else if vm.features().has(Feature::CpuResize) {
        assert_eq!(probe.ask("cpus").await, "0");
        vm.resize_cpus(2).await.unwrap_or_else(|e| panic!("{}", e.chain()));
        probe.until("online", |answer| answer == "0-1").await;
        assert!(matches!(vm.resize_cpus(3).await, Err(Error::Invalid(_))));
        vm.resize_cpus(1).await.unwrap_or_else(|e| panic!("{}", e.chain()));
        assert_eq!(probe.ask("cpus").await, "0");
    } else {
        assert!(matches!(vm.resize_cpus(2).await, Err(Error::Unsupported { .. })));
    }
    bench.end(&vm).await;
    Some(())
}

async fn a_snapshot_is_restored(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let dir = bench.dir.path().join("snapshot");
    fs::create_dir(&dir).unwrap();
    if bench.vmm.kind() == Kind::Qemu {
        let vm = bench.boot(&bench.spec("vsock")).await;
        assert!(matches!(vm.snapshot(&dir).await, Err(Error::Unsupported { .. })));
        bench.end(&vm).await;
    }

    let spec = bench.spec(bench.saved_channel());
    let vm = bench.boot(&spec).await;
    let mut probe = bench.probe(&spec, true).await;
    assert_eq!(probe.ask("write /run/mark template").await, "ok");
    drop(probe);
    let started = Instant::now();
    save(&bench, &vm, &dir).await?;
    println!("saved after {:?}", started.elapsed());
    bench.end(&vm).await;
    for n in 0..2 {
        let mut spec = bench.spec(bench.saved_channel());
        spec.id = format!("restored-{n}");
        let started = Instant::now();
        let vm = bench.vmm.restore(&spec, &dir).await;
        let vm = vm.unwrap_or_else(|error| panic!("{}", error.chain()));
        let mut probe = bench.probe(&spec, false).await;
        assert_eq!(probe.ask("read /run/mark").await, "template");
        println!("restored and answering after {:?}", started.elapsed());
        drop(probe);
        bench.end(&vm).await;
    }
    // A torn file is an error, and nothing is left.
    let torn = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len());
    let torn = fs::File::options().write(true).open(torn.unwrap()).unwrap();
    torn.set_len(100_000).unwrap();
    let error = bench.vmm.restore(&bench.spec(bench.saved_channel()), &dir).await.unwrap_err();
    println!("{}", error.chain());
    Some(())
}

async fn a_copy_has_the_nic_that_was_saved_with_another_tap_and_mac_address(
    target: Target,
) -> Option<()> {
    let bench = bench(target).await?;
    if !bench.vmm.features().has(Feature::Snapshot) {
        return Some(());
    }
    let dir = bench.dir.path().join("snapshot");
    fs::create_dir(&dir).unwrap();
    let (netns, nic) = need!(nic_alone(&bench, 1, "kuasar0"), "no tap device can be made");
    let mut spec = bench.spec(bench.saved_channel());
    (spec.netns, spec.nics) = (Some(netns), vec![nic]);
    let vm = bench.boot(&spec).await;
    let saved = "02:00:00:00:00:01";
    let mut probe = bench.probe(&spec, true).await;
    probe.until("nics", |answer| answer.contains(saved)).await;
    drop(probe);
    save(&bench, &vm, &dir).await?;
    bench.end(&vm).await;
    for last in [7, 8] {
        let tap = format!("kuasar{last}");
        let (netns, nic) = nic_alone(&bench, last, &tap).unwrap();
        let mac = nic.mac_text();
        let id = format!("copy-{last}");
        let copy = VmSpec { id, netns: Some(netns.clone()), nics: vec![nic], ..spec.clone() };
        let vm = bench.vmm.restore(&copy, &dir).await;
        let vm = vm.unwrap_or_else(|error| panic!("{}", error.chain()));
        let mut probe = bench.probe(&copy, false).await;
        assert!(probe.ask("nics").await.contains(saved), "a guest sees what it saw");
        assert_eq!(probe.ask(&format!("net {saved} {mac} 10.9.0.2")).await, "ok");
        let nics = probe.ask("nics").await;
        assert!(nics.contains(&mac) && !nics.contains(saved), "{nics}");
        // There and back: whoever asks for its address gets the new MAC address.
        let answered = tokio::task::block_in_place(|| talk(&netns, &tap));
        assert_eq!(answered, copy.nics[0].mac);
        drop(probe);
        bench.end(&vm).await;
    }
    Some(())
}

/// Has 10.9.0.2 echo a packet over a tap; answers its MAC address.
fn talk(netns: &OwnedFd, tap: &str) -> Vec<u8> {
    use kuasar_host::netlink::{Address, Netlink};
    let netlink = Netlink::open_in(netns.as_fd()).unwrap();
    let link = netlink.link(tap).unwrap().index;
    let address = "10.9.0.1".parse().unwrap();
    netlink.add_address(&Address { link, address, prefix: 8, scope: 0 }, true).unwrap();
    netlink.set_up(link).unwrap();
    let network = nix::sched::CloneFlags::CLONE_NEWNET;
    kuasar_host::namespace::enter_on_thread(netns.as_fd(), network, || {
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let until = Instant::now() + patience();
        let mut answer = [0; 16];
        loop {
            // The first ones may come before the link is up.
            let _ = socket.send_to(b"hello", "10.9.0.2:7");
            match socket.recv(&mut answer) {
                Ok(n) => break assert_eq!(&answer[..n], b"hello"),
                Err(error) => assert!(Instant::now() < until, "no answer: {error}"),
            }
        }
        Ok(())
    })
    .unwrap();
    let known = netlink.neighbours().unwrap();
    known.into_iter().find(|one| one.address.to_string() == "10.9.0.2").unwrap().mac
}

async fn bad_kernels_and_images_are_clear_errors(target: Target) -> Option<()> {
    let bench = bench(target).await?;
    let mut spec = bench.spec("none");
    let text = bench.dir.path().join("text");
    fs::write(&text, "no kernel\n").unwrap();
    spec.boot.kernel = text.clone();
    let started = Instant::now();
    match bench.vmm.spawn(&spec).await {
        Err(error) => {
            let text = error.chain();
            match bench.vmm.kind() {
                Kind::Qemu => assert!(text.contains("has ended with status 1"), "{text}"),
                _ => {
                    assert!(matches!(error, Error::Ended { .. } | Error::Refused { .. }), "{text}")
                }
            }
        }
        // It took it, and the guest does nothing; that is the caller's deadline.
        Ok(vm) => bench.end(&vm).await,
    }
    assert!(started.elapsed() < Duration::from_secs(10));

    let mut spec = bench.spec("none");
    spec.disks.push(Disk::open("bad", &text, DiskFormat::Qcow2, true).unwrap());
    let error = bench.vmm.spawn(&spec).await.unwrap_err();
    let text = error.chain();
    match bench.vmm.kind() {
        Kind::Qemu => assert!(text.contains("not in qcow2 format"), "{text}"),
        Kind::CloudHypervisor => assert!(matches!(error, Error::Refused { .. }), "{text}"),
        _ => assert!(matches!(error, Error::Unsupported { .. }), "{text}"),
    }

    let mut spec = bench.spec("none");
    spec.boot.params.push("init=/none rdinit=/none".into());
    let vm = bench.spawn(&spec).await;
    // The kernel panics, resets, and that is the end.
    let exit = timeout(patience(), vm.wait()).await.expect("an end").unwrap();
    assert_eq!(exit.status, 0);
    assert!(console::tail(&bench.log(), 60_000).contains("Kernel panic"));
    bench.end(&vm).await;
    Some(())
}

suite! {
    boots_talks_shares_and_its_exit_is_seen,
    a_killed_one_is_seen_within_100_ms_and_helpers_go_with_it,
    another_daemon_takes_it_up_again,
    disks_and_nics_come_and_go,
    it_pauses_and_changes_size,
    a_snapshot_is_restored,
    a_copy_has_the_nic_that_was_saved_with_another_tap_and_mac_address,
    bad_kernels_and_images_are_clear_errors,
}
