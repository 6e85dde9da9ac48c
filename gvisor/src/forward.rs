//! Port-forwarding into a sandbox with a network stack of its own.
//!
//! containerd forwards a port by entering the pod's network namespace and dialling `localhost`
//! there. gVisor's stack has taken the addresses off that namespace, and nobody listens in it. So
//! one socket listens there, and a program at the kernel's socket lookup (`BPF_SK_LOOKUP`, Linux
//! 5.9) gives it every connection on the loopback device, whatever its port. The port that was
//! dialled is the connection's local one; the sentry connects it inside and gets one end of a
//! socket pair.
//!
//! sandbox-parent keeps listener and program, so that connections wait while no daemon runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, accept4, bind,
    getsockname, listen, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;

use crate::sentry::Sentry;

/// Connections that wait to be taken.
const BACKLOG: i32 = 64;

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Index of the loopback device in every network namespace.
const LOOPBACK: i32 = 1;

fn bpf(command: libc::c_int, attributes: &[u64]) -> io::Result<i32> {
    // SAFETY: pointer and size describe `attributes`; what it points to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            std::mem::size_of_val(attributes) as libc::c_uint,
        )
    };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: bpf(2) has just answered this descriptor, close-on-exec.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Two numbers of 32 bits as they follow each other in memory.
const fn two(first: u32, second: u32) -> u64 {
    let (a, b) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]])
}

/// An instruction.
fn op(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> [u8; 8] {
    let registers = if cfg!(target_endian = "little") { dst | src << 4 } else { dst << 4 | src };
    let (o, v) = (offset.to_ne_bytes(), value.to_ne_bytes());
    [code, registers, o[0], o[1], v[0], v[1], v[2], v[3]]
}

/// TCP on the loopback device goes to the one socket of `map`, if there is one.
fn program(map: RawFd) -> Vec<[u8; 8]> {
    const LDX_W: u8 = 0x61;
    const JNE: u8 = 0x55;
    const JEQ: u8 = 0x15;
    const MOV: u8 = 0xbf;
    const MOV_K: u8 = 0xb7;
    const CALL: u8 = 0x85;
    vec![
        op(MOV, 6, 1, 0, 0),
        op(LDX_W, 2, 6, 12, 0), // protocol
        op(JNE, 2, 0, 16, libc::IPPROTO_TCP),
        op(LDX_W, 2, 6, 64, 0), // ingress_ifindex
        op(JNE, 2, 0, 14, LOOPBACK),
        op(0x62, 10, 0, -4, 0), // key 0 on the stack
        op(0x18, 1, 1, 0, map), // r1 = map, two instructions long
        op(0, 0, 0, 0, 0),
        op(MOV, 2, 10, 0, 0),
        op(0x07, 2, 0, 0, -4),
        op(CALL, 0, 0, 0, 1), // bpf_map_lookup_elem
        op(JEQ, 0, 0, 7, 0),
        op(MOV, 7, 0, 0, 0),
        op(MOV, 1, 6, 0, 0),
        op(MOV, 2, 0, 0, 0),
        op(MOV_K, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, 124), // bpf_sk_assign
        op(MOV, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, 86), // bpf_sk_release
        op(MOV_K, 0, 0, 0, 1), // SK_PASS
        op(0x95, 0, 0, 0, 0),
    ]
}

/// Steers connections on the loopback device of the network namespace `netns` to `listener`, as
/// long as what it answers is open.
fn steer(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = owned(bpf(BPF_MAP_CREATE, &[two(BPF_MAP_TYPE_SOCKMAP, 4), two(8, 1), 0])?);
    let (key, value) = (0u32, listener.as_raw_fd() as u64);
    let (key, value) = (&raw const key as u64, &raw const value as u64);
    bpf(BPF_MAP_UPDATE_ELEM, &[two(map.as_raw_fd() as u32, 0), key, value, 0])?;
    let code = program(map.as_raw_fd());
    let licence = c"Dual MIT/GPL";
    let mut load = [0u64; 9];
    load[0] = two(BPF_PROG_TYPE_SK_LOOKUP, code.len() as u32);
    load[1] = code.as_ptr() as u64;
    load[2] = licence.as_ptr() as u64;
    // At byte 68: expected_attach_type.
    load[8] = two(0, BPF_SK_LOOKUP);
    let program = owned(bpf(BPF_PROG_LOAD, &load)?);
    let link = [two(program.as_raw_fd() as u32, netns.as_raw_fd() as u32), two(BPF_SK_LOOKUP, 0)];
    bpf(BPF_LINK_CREATE, &link).map(owned)
}

/// A listener on a port of the kernel's choice, for both families where there are both.
fn listener() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = match socket(AddressFamily::Inet6, SockType::Stream, flags, None) {
        Ok(fd) => {
            nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::Ipv6V6Only, &false)?;
            let any = SockaddrIn6::from(std::net::SocketAddrV6::new(
                std::net::Ipv6Addr::UNSPECIFIED,
                0,
                0,
                0,
            ));
            bind(fd.as_raw_fd(), &any)?;
            fd
        }
        Err(_) => {
            let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
            bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
            fd
        }
    };
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd)
}

/// What takes a pod's forwarded connections, to be kept as long as the pod runs.
#[derive(Debug)]
pub struct Gate {
    /// The listener.
    pub listener: OwnedFd,
    /// The program at the namespace.
    pub link: OwnedFd,
}

impl Gate {
    /// Makes one in a network namespace. Blocks for a moment.
    ///
    /// # Errors
    /// When the kernel has no `BPF_SK_LOOKUP`, for example.
    pub fn open(netns: &OwnedFd) -> io::Result<Self> {
        let inside = || {
            listener().map_err(|source| kuasar_host::Error::Io {
                context: "listen in the pod's network namespace".into(),
                source,
            })
        };
        let kind = nix::sched::CloneFlags::CLONE_NEWNET;
        let listener = kuasar_host::namespace::enter_on_thread(netns.as_fd(), kind, inside)
            .map_err(io::Error::other)?;
        let link = steer(netns.as_fd(), listener.as_fd())?;
        Ok(Self { listener, link })
    }
}

/// Serves forwarded connections until it is aborted; `limit` at the same time.
pub async fn serve(listener: OwnedFd, sentry: Sentry, container: String, limit: usize) {
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    let Ok(listener) = (unsafe { AsyncFd::register(listener) }) else { return };
    let places = Arc::new(Semaphore::new(limit));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accept = |fd: &OwnedFd| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            accept4(fd.as_raw_fd(), flags).map_err(io::Error::from)
        };
        let fd = match listener.async_io(Interest::READABLE, accept).await {
            // SAFETY: accept4(2) has just answered this descriptor.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => continue,
            Err(error) => {
                tracing::warn!(%error, "forwarded connections are not accepted");
                return;
            }
        };
        let (sentry, container) = (sentry.clone(), container.clone());
        tokio::spawn(async move {
            if let Err(error) = forward(fd, &sentry, &container).await {
                tracing::debug!(%error, "a forwarded connection ended");
            }
            drop(place);
        });
    }
}

fn port_of(fd: &OwnedFd) -> io::Result<u16> {
    if let Ok(address) = getsockname::<SockaddrIn6>(fd.as_raw_fd()) {
        return Ok(address.port());
    }
    Ok(getsockname::<SockaddrIn>(fd.as_raw_fd())?.port())
}

async fn forward(fd: OwnedFd, sentry: &Sentry, container: &str) -> io::Result<()> {
    let port = port_of(&fd)?;
    let mut outside = TcpStream::from_std(std::net::TcpStream::from(fd))?;
    let (mut ours, theirs) = UnixStream::pair()?;
    // The sentry gets a descriptor of its own and waits on it in its own way.
    let theirs = OwnedFd::from(theirs.into_std()?);
    sentry.forward(container, port, theirs.as_fd()).await.map_err(io::Error::other)?;
    drop(theirs);
    tokio::io::copy_bidirectional(&mut outside, &mut ours).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpStream as Stream};

    use super::*;

    #[test]
    fn a_gate_takes_any_port_of_the_loopback_device_until_it_is_closed() {
        // Its own network namespace, on a thread of its own.
        let test = std::thread::spawn(|| {
            if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
                eprintln!("skipped: no network namespace here: {error}");
                return;
            }
            kuasar_host::netlink::Netlink::open().unwrap().set_lo_up().unwrap();
            let netns = std::fs::File::open("/proc/thread-self/ns/net").unwrap().into();
            let gate = match Gate::open(&netns) {
                Ok(gate) => gate,
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    eprintln!("skipped: bpf is not allowed here: {error}");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let dial = |port| {
                [
                    Stream::connect((Ipv4Addr::LOCALHOST, port)),
                    Stream::connect((Ipv6Addr::LOCALHOST, port)),
                ]
            };
            for port in [80, 8080, 65535] {
                for stream in dial(port) {
                    let stream = stream.unwrap();
                    let fd = accept4(gate.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
                    // SAFETY: just accepted.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    assert_eq!(port_of(&fd).unwrap(), port);
                    drop(stream);
                }
            }
            drop(gate);
            assert!(dial(80).iter().all(Result::is_err));
        });
        test.join().unwrap();
    }
}
