//! Thin, checked wrappers over the system calls that this process makes.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use sandbox_parent::protocol::MAX_FDS;

/// `errno` of the last call.
pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Turns -1 into `errno`.
pub fn check(r: libc::c_int) -> Result<libc::c_int, i32> {
    if r < 0 { Err(errno()) } else { Ok(r) }
}

/// Takes ownership of a descriptor that a call has just returned.
pub fn own(r: libc::c_int) -> Result<OwnedFd, i32> {
    // SAFETY: `check` proves that the call returned a new descriptor, which nobody else owns.
    check(r).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Registers or changes `fd` in `epoll` with a token.
pub fn epoll_set(epoll: &OwnedFd, op: libc::c_int, fd: RawFd, events: u32, token: u64) {
    let mut ev = libc::epoll_event { events, u64: token };
    // SAFETY: `ev` lives across the call; both descriptors are open.
    unsafe { libc::epoll_ctl(epoll.as_raw_fd(), op, fd, &mut ev) };
}

/// Wall-clock time in nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    // SAFETY: a zeroed timespec is valid and the call fills it.
    let mut ts: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: `ts` is a valid out pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut ts) };
    (ts.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(ts.tv_nsec as u64)
}

/// Milliseconds of the monotonic clock.
pub fn now_ms() -> u64 {
    // SAFETY: a zeroed timespec is valid and the call fills it.
    let mut ts: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: `ts` is a valid out pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    (ts.tv_sec as u64).saturating_mul(1000).saturating_add(ts.tv_nsec as u64 / 1_000_000)
}

/// A pidfd for `pid`, close-on-exec.
pub fn pidfd_open(pid: libc::pid_t) -> Result<OwnedFd, i32> {
    // SAFETY: plain system call with integer arguments.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as libc::c_int)
}

/// Reads into `buf`; `Ok(0)` is the end.
pub fn read(fd: RawFd, buf: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: pointer and length describe `buf`.
    let n = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), buf.len()) };
    if n < 0 { Err(errno()) } else { Ok(n as usize) }
}

/// Sends without SIGPIPE and without blocking.
pub fn send(fd: RawFd, buf: &[u8]) -> Result<usize, i32> {
    // SAFETY: pointer and length describe `buf`.
    let n = unsafe {
        libc::send(fd, buf.as_ptr().cast(), buf.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    if n < 0 { Err(errno()) } else { Ok(n as usize) }
}

#[repr(C, align(8))]
struct Control([u8; 128]);

/// Sends one packet with descriptors, without blocking.
pub fn send_packet(fd: RawFd, data: &[u8], fds: &[RawFd]) -> Result<(), i32> {
    let mut control = Control([0; 128]);
    let mut iov = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = mem::size_of_val(fds) as u32;
        msg.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: pure computation; MAX_FDS descriptors (64 bytes + header) fit in 128.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: msg_control points to an aligned buffer that is large enough for one header
        // and `fds`, which are copied to its data part.
        unsafe {
            let c = libc::CMSG_FIRSTHDR(&msg);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(bytes) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(c).cast(), fds.len());
        }
    }
    // SAFETY: `msg` refers to live buffers.
    let n = unsafe { libc::sendmsg(fd, &msg, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if n < 0 { Err(errno()) } else { Ok(()) }
}

/// Receives one packet and its descriptors (close-on-exec).
pub fn receive_packet(fd: RawFd, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, i32> {
    let mut control = Control([0; 128]);
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len() as _;
    // SAFETY: `msg` refers to live buffers.
    let n = unsafe { libc::recvmsg(fd, &mut msg, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    if n < 0 {
        return Err(errno());
    }
    // SAFETY: walking the control messages that the kernel has written, within msg_controllen.
    unsafe {
        let mut c = libc::CMSG_FIRSTHDR(&msg);
        while !c.is_null() {
            if (*c).cmsg_level == libc::SOL_SOCKET && (*c).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*c).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for i in 0..(bytes / 4).min(MAX_FDS) {
                    let p = libc::CMSG_DATA(c).cast::<RawFd>().add(i);
                    fds.push(OwnedFd::from_raw_fd(p.read_unaligned()));
                }
            }
            c = libc::CMSG_NXTHDR(&msg, c);
        }
    }
    if msg.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(libc::EMSGSIZE);
    }
    Ok(n as usize)
}

/// A connected pair of stream sockets, close-on-exec; the first one does not block.
pub fn stream_pair() -> Result<(OwnedFd, OwnedFd), i32> {
    let mut sv = [0; 2];
    // SAFETY: `sv` has room for two descriptors.
    check(unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
            sv.as_mut_ptr(),
        )
    })?;
    let [a, b] = sv;
    Ok((own(a)?, own(b)?))
}

/// A zeroed buffer of its own mapping: pages count only once they are touched.
pub fn buffer(len: usize) -> &'static mut [u8] {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping of `len` bytes, used by the one caller and never unmapped.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0);
        if p == libc::MAP_FAILED {
            return &mut [];
        }
        std::slice::from_raw_parts_mut(p.cast(), len)
    }
}
