//! One listener for every loopback port of a network namespace.
//!
//! For a port-forward containerd enters the pod's network namespace and dials `localhost:<port>`.
//! Where the pod has a network stack of its own, in a machine or in a sentry, nobody listens in
//! that namespace, and its addresses may have been taken off it. A listener for every port there
//! is not is made of one: a BPF program of type `sk_lookup` (Linux 5.9), attached to the
//! namespace, gives every TCP connection to 127.0.0.0/8 or ::1 to one listening socket, whatever
//! its port. The accepted socket's local port is the one that was dialled. Nothing of the
//! namespace is changed that a CNI plugin could trip over: no rules, no routes, no addresses.
//!
//! The program lives as long as its link's descriptor.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sched::CloneFlags;

// linux/bpf.h
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
const CALL_MAP_LOOKUP: i32 = 1;
const CALL_SK_RELEASE: i32 = 86;
const CALL_SK_ASSIGN: i32 = 124;
const PSEUDO_MAP_FD: u8 = 1;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u8,
    /// Destination in the low, source in the high half, on a little-endian machine.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn insn(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Insn {
    let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
    Insn { code, registers, offset, immediate }
}

/// The program; see the module's text. `map` holds the listener.
fn program(map: i32) -> [Insn; 28] {
    const LDX_W: u8 = 0x61;
    const ST_W: u8 = 0x62;
    const MOV_X: u8 = 0xbf;
    const MOV_K: u8 = 0xb7;
    const ADD_K: u8 = 0x07;
    const AND_K: u8 = 0x57;
    const JEQ: u8 = 0x15;
    const JNE: u8 = 0x55;
    const JNE32: u8 = 0x56;
    const JA: u8 = 0x05;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const LD_IMM64: u8 = 0x18;
    // Offsets in struct bpf_sk_lookup.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6_END: i16 = 56;
    let loopback6 = i32::from_ne_bytes([0, 0, 0, 1]);
    // The first byte of an address in network order, as a word of this machine.
    let first_byte = i32::from_ne_bytes([0xff, 0, 0, 0]);
    let net127 = i32::from_ne_bytes([127, 0, 0, 0]);
    [
        insn(MOV_X, 6, 1, 0, 0),
        insn(LDX_W, 0, 6, PROTOCOL, 0),
        insn(JNE, 0, 0, 23, libc::IPPROTO_TCP),
        insn(LDX_W, 0, 6, FAMILY, 0),
        insn(JEQ, 0, 0, 4, libc::AF_INET),
        insn(JNE, 0, 0, 20, libc::AF_INET6),
        insn(LDX_W, 0, 6, LOCAL_IP6_END, 0),
        insn(JNE32, 0, 0, 18, loopback6),
        insn(JA, 0, 0, 3, 0),
        insn(LDX_W, 0, 6, LOCAL_IP4, 0),
        insn(AND_K, 0, 0, 0, first_byte),
        insn(JNE32, 0, 0, 14, net127),
        insn(ST_W, 10, 0, -4, 0),
        insn(MOV_X, 2, 10, 0, 0),
        insn(ADD_K, 2, 0, 0, -4),
        insn(LD_IMM64, 1, PSEUDO_MAP_FD, 0, map),
        insn(0, 0, 0, 0, 0),
        insn(CALL, 0, 0, 0, CALL_MAP_LOOKUP),
        insn(JEQ, 0, 0, 7, 0),
        insn(MOV_X, 7, 0, 0, 0),
        insn(MOV_X, 1, 6, 0, 0),
        insn(MOV_X, 2, 7, 0, 0),
        insn(MOV_K, 3, 0, 0, 0),
        insn(CALL, 0, 0, 0, CALL_SK_ASSIGN),
        insn(MOV_X, 1, 7, 0, 0),
        insn(CALL, 0, 0, 0, CALL_SK_RELEASE),
        // SK_PASS: whoever was assigned, or else the ordinary lookup.
        insn(MOV_K, 0, 0, 0, 1),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

fn bpf(command: libc::c_int, attr: &[u64]) -> io::Result<i32> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` of this size; what it points to lives across
    // the call.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

fn bpf_fd(command: libc::c_int, attr: &[u64]) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just given us this descriptor (close-on-exec).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Two words of 32 bits in one of 64, in the order in which they lie in memory.
fn words(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    let (a, b) = bytes.split_at_mut(4);
    a.copy_from_slice(&first.to_ne_bytes());
    b.copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Gives the namespace's loopback connections to `listener`, as long as the answer lives.
fn attach(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // map_type, key_size, value_size, max_entries
    let map = bpf_fd(MAP_CREATE, &[words(MAP_TYPE_SOCKMAP, 4), words(8, 1)])?;
    let (key, value) = (0_u32, listener.as_raw_fd() as u64);
    let fd = map.as_raw_fd() as u32;
    let update = [words(fd, 0), &raw const key as u64, &raw const value as u64, 0];
    bpf(MAP_UPDATE_ELEM, &update)?;
    let code = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    // prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags,
    // prog_name (16 bytes), prog_ifindex, expected_attach_type
    let load = [
        words(PROG_TYPE_SK_LOOKUP, code.len() as u32),
        code.as_ptr() as u64,
        license.as_ptr() as u64,
        0,
        0,
        0,
        0,
        0,
        words(0, ATTACH_SK_LOOKUP),
    ];
    let program = bpf_fd(PROG_LOAD, &load)?;
    // prog_fd, target_fd, attach_type, flags
    let link =
        [words(program.as_raw_fd() as u32, netns.as_raw_fd() as u32), words(ATTACH_SK_LOOKUP, 0)];
    bpf_fd(LINK_CREATE, &link)
}

fn listen(netns: BorrowedFd<'_>) -> io::Result<TcpListener> {
    let inside = crate::namespace::enter_on_thread(netns, CloneFlags::CLONE_NEWNET, || {
        // Where there is no IPv6 the first fails. Only the program leads here: the port is any.
        Ok(TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("127.0.0.1:0")))
    });
    let listener = inside.map_err(io::Error::other)??;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What takes the connections of a namespace, as long as both are open.
#[derive(Debug)]
pub struct Gate {
    /// The listener, non-blocking.
    pub listener: OwnedFd,
    /// The program at the namespace.
    pub link: OwnedFd,
}

impl Gate {
    /// Makes one in a network namespace. Blocks for a moment.
    ///
    /// # Errors
    /// On a kernel without `sk_lookup` programs, or without the right to load them.
    pub fn open(netns: BorrowedFd<'_>) -> io::Result<Self> {
        let listener = OwnedFd::from(listen(netns)?);
        let link = attach(netns, listener.as_fd())?;
        Ok(Self { listener, link })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loopback_port_of_a_namespace_leads_to_one_listener() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let netns = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            crate::namespace::open(std::path::Path::new("/proc/thread-self/ns/net")).unwrap()
        });
        let netns = netns.join().unwrap();
        crate::netlink::Netlink::open_in(netns.as_fd()).unwrap().set_lo_up().unwrap();
        let listener = listen(netns.as_fd()).unwrap();
        listener.set_nonblocking(false).unwrap();
        let dial = |address: &'static str| {
            crate::namespace::enter_on_thread(netns.as_fd(), CloneFlags::CLONE_NEWNET, || {
                Ok(std::net::TcpStream::connect(address))
            })
            .unwrap()
        };
        assert!(dial("127.0.0.1:80").is_err());
        let link = match attach(netns.as_fd(), listener.as_fd()) {
            Ok(link) => link,
            Err(error) => {
                eprintln!("skipped: no sk_lookup programs here: {error}");
                return;
            }
        };
        for (address, port) in [
            ("127.0.0.1:80", 80),
            ("127.0.0.1:65535", 65535),
            ("127.9.9.9:1", 1),
            ("[::1]:443", 443),
        ] {
            let ours = match dial(address) {
                Ok(ours) => ours,
                Err(error) if address.starts_with('[') => {
                    eprintln!("skipped: no IPv6 here: {error}");
                    continue;
                }
                Err(error) => panic!("{address}: {error}"),
            };
            let (accepted, from) = listener.accept().unwrap();
            assert_eq!(accepted.local_addr().unwrap().port(), port);
            assert_eq!(from.port(), ours.local_addr().unwrap().port());
        }
        drop(link);
        assert!(dial("127.0.0.1:80").is_err());
    }
}
