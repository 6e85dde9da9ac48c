//! Networks that change after the pod has started.
//!
//! Some engines (iSulad) call their CNI plugins only after Start, and a plugin may change
//! addresses and routes at any time. The kernel tells of each change in the pod's network
//! namespace (rtnetlink(7)). What is there is read again then; interfaces without a tap get one and a
//! NIC of the machine, where that can be plugged into; and the guest is told the whole of its network,
//! which it makes so.
//!
//! Nothing is recorded: an interface beside which our tap stands has been joined, and the machine
//! knows its own devices.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sched::CloneFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;
use vmm_common::guest as wire;

use crate::errors::chain;
use crate::guest::{Guest, GuestError, service};
use crate::network::{self, Interface, Plan, Taps};
use crate::vmm::{Feature, Nic, Vm};
use crate::watch::is_ending;

/// `RTMGRP_LINK`, `RTMGRP_NEIGH`, and addresses and routes of IPv4 and IPv6 (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;
/// A plugin makes many changes, one after the other: they are looked at when it has been quiet
/// for so long.
const QUIET: Duration = Duration::from_millis(50);
/// Changes that never end are looked at all the same.
const LOUD: Duration = Duration::from_secs(1);

/// The changes of a namespace.
struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    fn of(netns: BorrowedFd<'_>) -> network::Result<Self> {
        let made = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let protocol = SockProtocol::NetlinkRoute;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
            Ok::<_, nix::Error>(fd)
        };
        let context = || "listen to the pod's network".to_owned();
        let io = |source: std::io::Error| network::Error::Host {
            context: context(),
            source: kuasar_host::Error::Io { context: context(), source },
        };
        let fd =
            kuasar_host::namespace::enter_on_thread(netns, CloneFlags::CLONE_NEWNET, || Ok(made()));
        let fd = fd
            .map_err(|source| network::Error::Host { context: context(), source })?
            .map_err(|error| io(error.into()))?;
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(|error| io(error.into()))?;
        Ok(Self(fd))
    }

    /// Waits for a change; which one does not matter, nor whether the kernel dropped some.
    async fn next(&self) -> std::io::Result<()> {
        let mut guard = self.0.readable().await?;
        let mut sink = [0_u8; 64];
        loop {
            match recv(self.0.as_raw_fd(), &mut sink, MsgFlags::empty()) {
                Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        Ok(())
    }

    /// Waits for a change, and then for the end of those that follow it.
    async fn settled(&self) -> std::io::Result<()> {
        self.next().await?;
        let quiet = async { while tokio::time::timeout(QUIET, self.next()).await.is_ok() {} };
        let _ = tokio::time::timeout(LOUD, quiet).await;
        Ok(())
    }
}

/// MAC address of the NIC of a machine that becomes a template, where copies have that NIC: locally
/// administered, and no pod's. Each copy's guest exchanges it for its pod's.
const SAVED_MAC: [u8; 6] = [0x02, b'k', b'u', b'a', b's', 0];
/// Name of its tap.
const SAVED_TAP: &str = "kuasar0";

/// Name of a pod's NIC from its start.
pub(crate) fn id(number: usize) -> String {
    format!("net{number}")
}

/// The NIC of a machine that becomes a template, and the network namespace of its VMM: with the tap, and
/// nothing to which that leads. Blocks.
pub(crate) fn to_save(taps: Taps) -> network::Result<(OwnedFd, Nic)> {
    let (netns, held) = network::alone(SAVED_TAP, taps)?;
    let tap = held.into_iter().map(Arc::new).collect();
    let tap_name = Some((SAVED_TAP.to_owned(), None));
    Ok((netns, Nic { id: id(0), mac: SAVED_MAC, mtu: 1500, tap, tap_name }))
}

/// Tells the guest of a copy which of its NICs is the pod's interface.
pub(crate) fn was_saved(network: &mut wire::Network) {
    for interface in &mut network.interfaces {
        interface.saved_mac = network::mac_text(&SAVED_MAC);
    }
}

/// The NIC for an interface that was joined with its tap.
pub(crate) fn nic(id: String, joined: network::Joined) -> Nic {
    let network::Joined { interface, tap } = joined;
    Nic {
        id,
        mac: interface.mac,
        mtu: u16::try_from(interface.mtu).unwrap_or(u16::MAX),
        tap: tap.into_iter().map(Arc::new).collect(),
        tap_name: Some((interface.tap, None)),
    }
}

/// Follows the network of a pod for as long as its machine runs. `told` is what the guest knows
/// already.
pub(crate) async fn follow(
    id: String,
    netns: OwnedFd,
    vm: Arc<dyn Vm>,
    guest: Arc<Guest>,
    mut told: Option<wire::Network>,
) {
    let netns = Arc::new(netns);
    let changes = match Changes::of(netns.as_fd()) {
        Ok(changes) => changes,
        Err(error) => {
            tracing::warn!(
                sandbox = id,
                error = chain(&error),
                "changes of its network are not seen"
            );
            return;
        }
    };
    // What changed before this began is seen as well.
    loop {
        match look(&netns, &vm, &guest, &mut told).await {
            Ok(()) => {}
            Err(Failure::Guest(GuestError::Gone)) => return,
            Err(_) if is_ending(&*vm).await => return,
            Err(Failure::Guest(error)) => {
                tracing::warn!(sandbox = id, %error, "the guest does not take its network");
            }
            Err(Failure::Host(error)) => {
                tracing::warn!(
                    sandbox = id,
                    error,
                    "a change of the pod's network is not for its guest"
                );
            }
        }
        if changes.settled().await.is_err() {
            return;
        }
    }
}

enum Failure {
    Guest(GuestError),
    Host(String),
}

async fn look(
    netns: &Arc<OwnedFd>,
    vm: &Arc<dyn Vm>,
    guest: &Arc<Guest>,
    told: &mut Option<wire::Network>,
) -> Result<(), Failure> {
    let of = netns.clone();
    let (plan, new) = blocking(move || {
        let plan = network::plan(of.as_fd())?;
        let new = network::unjoined(of.as_fd(), &plan)?;
        Ok((plan, new))
    })
    .await?;
    let Plan { mut network, .. } = plan;
    if !new.is_empty() && !vm.features().has(Feature::NicHotplug) {
        if is_ending(&**vm).await {
            // An interface has lost its tap with it.
            return Err(Failure::Guest(GuestError::Gone));
        }
        let names: Vec<&str> = new.iter().map(|one| one.name.as_str()).collect();
        let error = vm.cannot(Feature::NicHotplug);
        tracing::warn!("interface {} comes too late: {error}", names.join(", "));
        network.interfaces.retain(|one| !names.contains(&one.name.as_str()));
        network.routes.retain(|one| !names.contains(&one.device.as_str()));
        network.neighbours.retain(|one| !names.contains(&one.device.as_str()));
    } else {
        for interface in new {
            plug(netns, vm, interface).await?;
        }
    }
    if told.as_ref() == Some(&network) {
        return Ok(());
    }
    let question = wire::SetNetworkRequest {
        network: protobuf::MessageField::some(network.clone()),
        ..wire::SetNetworkRequest::default()
    };
    let _: wire::SetNetworkResponse =
        guest.call_again(service::GUEST, "SetNetwork", &question).await.map_err(Failure::Guest)?;
    *told = Some(network);
    Ok(())
}

async fn plug(netns: &Arc<OwnedFd>, vm: &Arc<dyn Vm>, interface: Interface) -> Result<(), Failure> {
    let (of, one) = (netns.clone(), interface.clone());
    let joined = blocking(move || {
        let plan = Plan { interfaces: vec![one], ..Plan::default() };
        network::join(of.as_fd(), &plan, Taps::Held { queues: 1 })
    })
    .await?;
    for joined in joined {
        // Those from the start are numbered from 0 and stay below this.
        let nic = nic(format!("late{}", interface.index), joined);
        if let Err(error) = vm.attach_nic(&nic).await {
            let (of, text) = (netns.clone(), chain(&error));
            drop(nic);
            let _ = blocking(move || network::part(of.as_fd(), &[interface])).await;
            return Err(Failure::Host(text));
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> network::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| Failure::Host(chain(&error))),
        Err(error) => Err(Failure::Host(error.to_string())),
    }
}
