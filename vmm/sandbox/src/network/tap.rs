//! Tap devices in a pod's network namespace.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sched::CloneFlags;

use super::{Error, Result, host};

fn system(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let context = context.into();
    move |source| Error::Host {
        source: kuasar_host::Error::Io { context: context.clone(), source },
        context,
    }
}

/// How a VMM comes by its taps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taps {
    /// By descriptors, one for each pair of queues.
    Held {
        /// Pairs of queues of each tap.
        queues: u16,
    },
    /// By name: it opens them in the pod's namespace, as this user, and nobody else has them open.
    Named {
        /// User of the VMM.
        owner: u32,
    },
}

/// A network namespace of its own, with nothing in it.
///
/// # Errors
/// [`Error::Host`].
pub(super) fn empty() -> Result<OwnedFd> {
    let context = || "make a network namespace".to_owned();
    let made = std::thread::Builder::new().name("new-netns".into()).spawn(|| {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)?;
        kuasar_host::namespace::open(Path::new("/proc/thread-self/ns/net"))
            .map_err(std::io::Error::other)
    });
    // The thread ends with it, and takes no other along.
    let made = made.map_err(system(context()))?.join();
    let made = made.unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")));
    made.map_err(system(context()))
}

/// A network namespace with a tap of this name, and nothing else.
///
/// # Errors
/// [`Error::Host`].
pub fn alone(name: &str, taps: Taps) -> Result<(OwnedFd, Vec<OwnedFd>)> {
    let netns = empty()?;
    let held = open(netns.as_fd(), name, taps)?;
    Ok((netns, held))
}

/// Keeps the namespace's own IPv6 off the tap: its router solicitations would go to the guest.
pub(super) fn quiet(netns: BorrowedFd<'_>, tap: &str) {
    let name = format!("net/ipv6/conf/{tap}/disable_ipv6");
    let _ = kuasar_host::namespace::enter_on_thread(netns, CloneFlags::CLONE_NEWNET, || {
        // Fails where the kernel has no IPv6.
        kuasar_host::namespace::set_sysctl(&name, "1")
    });
}

/// `struct ifreq` as `TUNSETIFF` reads it.
#[repr(C)]
struct TapRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

mod tun {
    nix::ioctl_write_ptr_bad!(set_iff, libc::TUNSETIFF, super::TapRequest);
    nix::ioctl_write_int_bad!(set_persist, libc::TUNSETPERSIST);
    nix::ioctl_write_int_bad!(set_owner, libc::TUNSETOWNER);
}

/// Makes a persistent tap one that goes with its last descriptor, which is ours. One that somebody else
/// has open, or that has several queues, is of the other kind.
pub(super) fn remove(netns: BorrowedFd<'_>, name: &str) -> Result<()> {
    match open(netns, name, Taps::Held { queues: 1 }) {
        Ok(taps) => taps.iter().try_for_each(|tap| {
            // SAFETY: a plain number, of a descriptor that is open.
            let done = unsafe { tun::set_persist(tap.as_raw_fd(), 0) };
            done.map(drop).map_err(|error| system(format!("remove the tap {name}"))(error.into()))
        }),
        Err(Error::Host { source: kuasar_host::Error::Io { source, .. }, .. })
            if matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EINVAL)) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Makes a tap device in the namespace, or opens it.
pub(super) fn open(netns: BorrowedFd<'_>, name: &str, taps: Taps) -> Result<Vec<OwnedFd>> {
    use std::os::unix::fs::OpenOptionsExt;
    let (queues, owner) = match taps {
        Taps::Held { queues } => (queues, None),
        Taps::Named { owner } => (1, Some(owner)),
    };
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request =
        TapRequest { name: [0; libc::IFNAMSIZ], flags: flags as libc::c_short, rest: [0; 22] };
    // The last byte stays zero.
    for (to, from) in request.name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from;
    }
    let make = || {
        let mut files = Vec::new();
        for _ in 0..queues.max(1) {
            // The device belongs to the namespace of the thread that opens it.
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open("/dev/net/tun")?;
            // SAFETY: a valid `struct ifreq` that lives across the call.
            unsafe { tun::set_iff(file.as_raw_fd(), &request) }.map_err(std::io::Error::from)?;
            if let Some(owner) = owner {
                // The kernel takes the number's bits.
                let owner = owner.cast_signed();
                // SAFETY: plain numbers, of a descriptor that is open.
                unsafe {
                    tun::set_owner(file.as_raw_fd(), owner).map_err(std::io::Error::from)?;
                    tun::set_persist(file.as_raw_fd(), 1).map_err(std::io::Error::from)?;
                }
            } else {
                files.push(OwnedFd::from(file));
            }
        }
        Ok::<_, std::io::Error>(files)
    };
    let made =
        kuasar_host::namespace::enter_on_thread(netns, CloneFlags::CLONE_NEWNET, || Ok(make()));
    made.map_err(host("enter the pod's network namespace"))?
        .map_err(system(format!("make the tap device {name}")))
}
