//! What of a VMM's driver needs no guest, tried with the real program: every request of the driver
//! must be one that the program takes, and every answer one that the driver understands.
//!
//! The guest is a kernel of four instructions that sleeps for ever, so this runs in seconds, and on
//! hosts whose KVM boots no Linux. Programs and variables are those of `vmm_conformance`; without a
//! program a test prints `skipped: …`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // a test

#[path = "support/bench.rs"]
#[allow(dead_code)] // conversations with a guest
#[macro_use]
mod bench;
#[path = "support/guest.rs"]
mod guest;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use bench::{Bench, Target, bench_with, image, nic, nic_alone, patience, save, tap};
use vmm_sandboxer::vmm::qemu::Machine;
use vmm_sandboxer::vmm::{
    Cache, Channel, Disk, DiskFormat, Error, Event, Feature, Kind, Range, Root, Share, ShareKind,
    VmSpec, vsock,
};

/// Where the kernel lies in memory, and begins.
const ENTRY: u32 = 0x10_0000;
/// `cli`, `hlt`, and a jump back to the second: the same in 32 and 64 bits.
const SLEEP: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// An ELF file with a PVH note (elf(5); XEN_ELFNOTE_PHYS32_ENTRY is 18).
fn elf() -> Vec<u8> {
    const NOTE: u64 = 64 + 2 * 56;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [u64::from(ENTRY), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, address: u64, bytes: u64, align: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset, address, address, bytes, bytes, align] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(4, NOTE, 0, 20, 4);
    segment(1, 4096, u64::from(ENTRY), 4096, 4096);
    for word in [4_u32, 4, 18] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(ENTRY.to_le_bytes());
    file.resize(4096, 0);
    file.extend(SLEEP);
    file.resize(8192, 0xf4);
    file
}

/// A kernel that sleeps, in the form that this VMM takes.
fn kernel(target: Target, dir: &Path) -> PathBuf {
    let path = dir.join("kernel");
    let bytes = match target {
        Target::StratoVirt => {
            let mut flat = SLEEP.to_vec();
            flat.resize(64 << 10, 0xf4);
            flat
        }
        _ => elf(),
    };
    fs::write(&path, bytes).unwrap();
    path
}

async fn sleeping(target: Target, dir: &Path) -> Option<(Bench, VmSpec)> {
    // The jail's user reads it.
    let _ = fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755));
    let bench = bench_with(target, Some(kernel(target, dir))).await?;
    let mut spec = bench.spec(bench.channel());
    spec.boot.root = Root::Initrd(bench.initrd.clone());
    Some((bench, spec))
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

async fn it_takes_devices_pauses_and_is_taken_up_again(target: Target) -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    let (bench, mut spec) = sleeping(target, dir.path()).await?;
    if bench.vmm.features().has(Feature::Virtiofs) {
        let share = bench.dir.path().join("share");
        fs::create_dir(&share).unwrap();
        let kind = ShareKind::Virtiofs;
        spec.shares.push(Share {
            tag: "kuasar".into(),
            dir: share,
            kind,
            read_only: false,
            cache: Cache::default(),
        });
    }
    let cold = image(bench.dir.path(), "cold", "cold");
    spec.disks.push(Disk::open("cold", &cold, DiskFormat::Raw, true).unwrap());
    if bench.vmm.features().has(Feature::MemoryResize) {
        spec.memory_mib = Range { at_boot: 128, most: 256 };
    }
    // A serial port's relay has the VMM's end of it, and serves, though no agent is there.
    let relayed = match &mut spec.channel {
        Channel::Serial { uds, .. } => uds.insert(bench.uds()).clone().into(),
        _ => None,
    };
    let vm = bench.spawn(&spec).await;
    vm.ping().await.unwrap_or_else(|error| panic!("{}", error.chain()));
    if let Some(uds) = relayed {
        let helpers = vm.state().helpers;
        assert!(helpers.iter().any(|helper| helper.name.contains("relay")), "{helpers:?}");
        let dialled = vsock::dial(&uds, 1024, patience()).await;
        assert!(matches!(dialled, Err(Error::Io { .. })), "{dialled:?}");
        println!("the relay serves");
    }

    let image = image(bench.dir.path(), "hot", "hot");
    let hot = Disk::open("hot", &image, DiskFormat::Raw, false).unwrap();
    let plugs = vm.features().has(Feature::DiskHotplug);
    if plugs {
        vm.attach_disk(&hot).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        assert!(matches!(vm.attach_disk(&hot).await, Err(Error::DeviceExists(_))));
    } else {
        assert!(matches!(vm.attach_disk(&hot).await, Err(Error::Unsupported { .. })));
    }
    match tap() {
        None => println!("skipped the NIC: no tap device can be made"),
        Some(tap) if vm.features().has(Feature::NicHotplug) => {
            vm.attach_nic(&nic("eth0", 7, tap)).await.unwrap_or_else(|e| panic!("{}", e.chain()));
        }
        Some(tap) => {
            let error = vm.attach_nic(&nic("eth0", 7, tap)).await.unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        }
    }

    // A daemon that comes later knows what is there.
    let state = serde_json::to_string(&vm.state()).unwrap();
    drop(vm);
    let vm = bench.vmm.reattach(serde_json::from_str(&state).unwrap()).await;
    let vm = vm.unwrap_or_else(|error| panic!("{}", error.chain()));
    vm.ping().await.unwrap();
    if plugs {
        assert!(matches!(vm.attach_disk(&hot).await, Err(Error::DeviceExists(_))));
        match vm.detach("hot").await {
            Ok(()) => println!("it lets go of a disk without its guest"),
            // This guest does nothing, so it does not let go either.
            Err(Error::Deadline { .. } | Error::Refused { .. }) => {}
            Err(error) => panic!("{}", error.chain()),
        }
        assert!(matches!(vm.detach("other").await, Err(Error::NoDevice(_))));
    }
    for _ in (0..2).filter(|_| vm.features().has(Feature::Pause)) {
        vm.pause().await.unwrap_or_else(|error| panic!("{}", error.chain()));
        vm.ping().await.unwrap_or_else(|error| panic!("{}", error.chain()));
        vm.resume().await.unwrap_or_else(|error| panic!("{}", error.chain()));
    }
    let error = vm.resize_memory(1 << 20).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. } | Error::Invalid(_)), "{error}");
    vm.ping().await.unwrap();
    bench.end(&vm).await;
    Some(())
}

async fn its_end_is_seen_at_once_and_helpers_go_with_it(target: Target) -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    let (bench, spec) = sleeping(target, dir.path()).await?;
    let vm = bench.spawn(&spec).await;
    let waiting = {
        let vm = vm.clone();
        tokio::spawn(async move { (vm.wait().await, Instant::now()) })
    };
    let killed = Instant::now();
    kill(vm.pid());
    let (exit, seen) = timeout(patience(), waiting).await.unwrap().unwrap();
    assert_eq!(exit.unwrap().status, 137);
    println!("seen after {:?}", seen - killed);
    assert!(matches!(vm.ping().await, Err(Error::Gone)));
    let state = vm.state();
    bench.end(&vm).await;
    // One that nobody watched has its real status, too.
    let vm = bench.spawn(&spec).await;
    let again = vm.state();
    assert_ne!(state.vmm, again.vmm);
    drop(vm);
    kill(again.vmm.identity.pid);
    bench.processes.exit_of(again.vmm.cookie).await.unwrap();
    let vm = bench.vmm.reattach(again).await.unwrap();
    assert_eq!(vm.wait().await.unwrap().status, 137);
    bench.end(&vm).await;
    // And one that is asked to go, goes.
    let vm = bench.spawn(&spec).await;
    let begun = Instant::now();
    vm.stop(Duration::ZERO).await.unwrap();
    println!("stopped after {:?}", begun.elapsed());
    bench.end(&vm).await;
    Some(())
}

async fn it_is_saved_and_starts_again(target: Target) -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    let (bench, mut spec) = sleeping(target, dir.path()).await?;
    spec.channel = bench.spec(bench.saved_channel()).channel;
    let saved = bench.dir.path().join("saved");
    fs::create_dir(&saved).unwrap();
    let vm = bench.spawn(&spec).await;
    if !vm.features().has(Feature::Snapshot) {
        let error = vm.snapshot(&saved).await.unwrap_err();
        assert!(matches!(&error, Error::Unsupported { way_out, .. } if !way_out.is_empty()));
        bench.end(&vm).await;
        return Some(());
    }
    let mut events = vm.events();
    save(&bench, &vm, &saved).await?;
    if matches!(bench.vmm.kind(), Kind::Qemu | Kind::StratoVirt) {
        let paused = timeout(patience(), async {
            while !matches!(events.recv().await.unwrap(), Event::Paused) {}
        });
        paused.await.expect("word of the pause");
    }
    bench.end(&vm).await;
    let mut spec = spec.clone();
    spec.id = "restored".into();
    let begun = Instant::now();
    let vm = bench.vmm.restore(&spec, &saved).await;
    let vm = vm.unwrap_or_else(|error| panic!("{}", error.chain()));
    println!("{}: restored after {:?}", bench.vmm.name(), begun.elapsed());
    vm.ping().await.unwrap();
    vm.pause().await.unwrap_or_else(|error| panic!("{}", error.chain()));
    vm.resume().await.unwrap_or_else(|error| panic!("{}", error.chain()));
    bench.end(&vm).await;
    Some(())
}

async fn a_nic_that_was_saved_gets_another_tap(target: Target) -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    let (bench, spec) = sleeping(target, dir.path()).await?;
    if !bench.vmm.features().has(Feature::Snapshot) {
        return Some(());
    }
    let channel = bench.spec(bench.saved_channel()).channel;
    let with = |nic: Option<_>| nic.map(|(netns, nic)| (Some(netns), vec![nic]));
    let nic = with(nic_alone(&bench, 1, "kuasar0"));
    let (netns, nics) = need!(nic, "no tap device can be made");
    let spec = VmSpec { channel, netns, nics, ..spec };
    let saved = bench.dir.path().join("saved");
    fs::create_dir(&saved).unwrap();
    let vm = bench.spawn(&spec).await;
    save(&bench, &vm, &saved).await?;
    bench.end(&vm).await;
    let (netns, nics) = with(nic_alone(&bench, 7, "another")).unwrap();
    let copy = VmSpec { id: "copy".into(), netns, nics, ..spec };
    let vm = bench.vmm.restore(&copy, &saved).await;
    let vm = vm.unwrap_or_else(|error| panic!("{}", error.chain()));
    vm.ping().await.unwrap();
    if bench.vmm.opens_taps() {
        assert!(in_use(copy.netns.as_ref().unwrap(), "another"));
    }
    bench.end(&vm).await;
    Some(())
}

/// Whether a tap is open somewhere.
fn in_use(netns: &OwnedFd, name: &str) -> bool {
    kuasar_host::netlink::Netlink::open_in(netns.as_fd())
        .and_then(|netlink| {
            let index = netlink.link(name)?.index;
            netlink.set_up(index)?;
            netlink.link(name)
        })
        // Without one who has it open there is no carrier.
        .is_ok_and(|link| link.flags & libc::IFF_RUNNING as u32 != 0)
}

suite! {
    a_nic_that_was_saved_gets_another_tap,
    it_takes_devices_pauses_and_is_taken_up_again,
    its_end_is_seen_at_once_and_helpers_go_with_it,
    it_is_saved_and_starts_again,
}
