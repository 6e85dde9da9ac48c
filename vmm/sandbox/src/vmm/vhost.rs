//! vsock of the host's kernel, and the context ids of its guests.
//!
//! A context id belongs to whoever has told it to an open `/dev/vhost-vsock`, for as long as that is
//! open: the kernel gives none away twice (`EADDRINUSE`), whichever program asks. So it is taken here,
//! and the VMM gets the open device. Between the choice and the VMM's start nobody else
//! can take it, a daemon that ends takes nothing away, and nothing has to be given back.
//!
//! Not tried on a host that has the device: ours have none.

use std::borrow::Cow;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use super::error::{Doing, Error, Result};
use super::spec::{Channel, VmSpec};

/// The device.
const DEVICE: &str = "/dev/vhost-vsock";
/// Lowest id that is chosen. Those from 3 on are what people give their own machines.
const LOWEST: u32 = 1 << 16;
/// Highest one: with the first bit set some programs print negative numbers.
const HIGHEST: u32 = i32::MAX as u32;
/// Attempts to find one that is free.
const ATTEMPTS: usize = 64;

nix::ioctl_write_ptr!(
    /// `VHOST_VSOCK_SET_GUEST_CID` of `linux/vhost.h`.
    set_guest_cid,
    0xaf,
    0x60,
    u64
);

/// Whether the host's kernel has it.
pub(super) fn is_there() -> bool {
    Path::new(DEVICE).exists()
}

/// The error where it has not; `vmm` wanted it.
pub(super) fn there(vmm: &str) -> Result<()> {
    if is_there() {
        return Ok(());
    }
    Err(Error::Unsupported {
        vmm: vmm.into(),
        what: "use the kernel's vsock".into(),
        way_out: format!(
            "this host has no {DEVICE}: load the module vhost_vsock, or set another channel"
        ),
    })
}

/// Takes an id with `set`: the one that is wanted, or with 0 any that is free.
fn choose(wanted: u32, mut set: impl FnMut(u32) -> nix::Result<()>) -> Result<u32> {
    let attempts = if wanted == 0 { ATTEMPTS } else { 1 };
    for _ in 0..attempts {
        let cid = match wanted {
            0 => {
                let random = crate::guest::random_hex(4).doing(|| "choose a context id")?;
                let random = u32::from_str_radix(&random, 16).unwrap_or_default();
                LOWEST + random % (HIGHEST - LOWEST)
            }
            cid => cid,
        };
        match set(cid) {
            Ok(()) => return Ok(cid),
            Err(Errno::EADDRINUSE) => {}
            Err(error) => {
                return Err(std::io::Error::from(error))
                    .doing(|| format!("give {DEVICE} the context id {cid}"));
            }
        }
    }
    Err(Error::Exhausted(match wanted {
        0 => format!("no free vsock context id in {ATTEMPTS} attempts: end machines on this host"),
        cid => format!("the vsock context id {cid} belongs to another machine of this host"),
    }))
}

/// For a machine with the kernel's vsock: an id that is its own from now on, and the open device.
pub(super) fn reserve(spec: &VmSpec) -> Result<(Cow<'_, VmSpec>, Option<OwnedFd>)> {
    let Channel::KernelVsock { cid } = spec.channel else { return Ok((Cow::Borrowed(spec), None)) };
    let device = File::options().read(true).write(true).open(DEVICE);
    let device = OwnedFd::from(device.doing(|| format!("open {DEVICE}"))?);
    let cid = choose(cid, |cid| {
        // SAFETY: the kernel reads one u64.
        unsafe { set_guest_cid(device.as_raw_fd(), &u64::from(cid)) }.map(drop)
    })?;
    let spec = VmSpec { channel: Channel::KernelVsock { cid }, ..spec.clone() };
    Ok((Cow::Owned(spec), Some(device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_is_taken_is_another_machines_and_the_next_is_tried() {
        let mut asked = Vec::new();
        let chosen = choose(0, |cid| {
            asked.push(cid);
            if asked.len() < 5 { Err(Errno::EADDRINUSE) } else { Ok(()) }
        });
        assert_eq!(chosen.unwrap(), asked[4]);
        assert!(asked.iter().all(|cid| (LOWEST..HIGHEST).contains(cid)), "{asked:?}");
        let different: std::collections::BTreeSet<&u32> = asked.iter().collect();
        assert!(different.len() > 1);

        // One that was named is taken or refused.
        assert_eq!(choose(7, |_| Ok(())).unwrap(), 7);
        let refused = choose(7, |_| Err(Errno::EADDRINUSE));
        assert!(matches!(refused, Err(Error::Exhausted(text)) if text.contains("id 7 belongs")));
        let mut n = 0;
        let full = choose(0, |_| {
            n += 1;
            Err(Errno::EADDRINUSE)
        });
        assert!(matches!(full, Err(Error::Exhausted(_))) && n == ATTEMPTS);
        assert!(matches!(choose(0, |_| Err(Errno::EINVAL)), Err(Error::Io { .. })));
    }

    #[test]
    fn only_the_kernels_vsock_takes_one() {
        let spec = super::super::spec::tests::spec();
        let (same, device) = reserve(&spec).unwrap();
        assert!(matches!(same, Cow::Borrowed(_)) && device.is_none());
        if is_there() {
            let spec = VmSpec { channel: Channel::KernelVsock { cid: 0 }, ..spec };
            let (one, _held) = reserve(&spec).unwrap();
            let Channel::KernelVsock { cid } = one.channel else { panic!() };
            let again = VmSpec { channel: Channel::KernelVsock { cid }, ..spec };
            assert!(matches!(reserve(&again), Err(Error::Exhausted(_))));
        } else {
            assert!(matches!(there("qemu"), Err(Error::Unsupported { .. })));
        }
    }
}
