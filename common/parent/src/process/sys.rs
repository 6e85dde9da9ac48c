//! Thin, checked wrappers over the system calls that this process makes.

use std::mem;

use sandbox_parent::protocol::MAX_FDS;

/// A descriptor in a table. 0 means none: 0, 1 and 2 are `/dev/null` in this process for good.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(transparent)]
pub struct Fd(i32);

impl Fd {
    pub const NONE: Self = Self(0);

    pub fn get(self) -> i32 {
        self.0
    }

    pub fn is_some(self) -> bool {
        self.0 > 2
    }

    /// Closes it, and is none from now on.
    pub fn close(&mut self) {
        if self.is_some() {
            // SAFETY: a descriptor of ours; every table row owns its own.
            unsafe { libc::close(self.0) };
        }
        *self = Self::NONE;
    }
}

/// `errno` of the last call.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Turns -1 into `errno`.
pub fn check(r: libc::c_int) -> Result<libc::c_int, i32> {
    if r < 0 { Err(errno()) } else { Ok(r) }
}

/// Takes a descriptor that a call has just returned.
pub fn own(r: libc::c_int) -> Result<Fd, i32> {
    check(r).map(Fd)
}

/// Adds `fd` to `epoll` with a token.
pub fn epoll_add(epoll: Fd, fd: Fd, events: libc::c_int, token: u64) {
    epoll_control(epoll, libc::EPOLL_CTL_ADD, fd, events, token);
}

/// Changes what `epoll` looks for.
pub fn epoll_change(epoll: Fd, fd: Fd, events: libc::c_int, token: u64) {
    epoll_control(epoll, libc::EPOLL_CTL_MOD, fd, events, token);
}

fn epoll_control(epoll: Fd, op: libc::c_int, fd: Fd, events: libc::c_int, token: u64) {
    let mut ev = libc::epoll_event { events: events as u32, u64: token };
    // SAFETY: `ev` lives across the call; both descriptors are open.
    unsafe { libc::epoll_ctl(epoll.get(), op, fd.get(), &mut ev) };
}

fn clock(id: libc::clockid_t) -> libc::timespec {
    // SAFETY: a zeroed timespec is valid and the call fills it.
    let mut ts: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: `ts` is a valid out pointer.
    unsafe { libc::clock_gettime(id, &mut ts) };
    ts
}

/// Wall-clock time in nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    let ts = clock(libc::CLOCK_REALTIME);
    (ts.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(ts.tv_nsec as u64)
}

/// Milliseconds of the monotonic clock; wraps after 49 days.
pub fn now_ms() -> u32 {
    let ts = clock(libc::CLOCK_MONOTONIC);
    (ts.tv_sec as u64).wrapping_mul(1000).wrapping_add(ts.tv_nsec as u64 / 1_000_000) as u32
}

/// A pidfd for `pid`, close-on-exec.
pub fn pidfd_open(pid: libc::pid_t) -> Result<Fd, i32> {
    // SAFETY: plain system call with integer arguments.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as libc::c_int)
}

/// Kills the process of a pidfd.
pub fn pidfd_kill(pidfd: Fd) -> Result<(), i32> {
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: an open descriptor, and no information about the signal.
    let r =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.get(), libc::SIGKILL, none, 0) };
    check(r as libc::c_int).map(drop)
}

/// Another descriptor for the same, close-on-exec.
pub fn duplicate(fd: Fd) -> Result<Fd, i32> {
    // SAFETY: an open descriptor; the new one is above those of standard streams.
    own(unsafe { libc::fcntl(fd.get(), libc::F_DUPFD_CLOEXEC, 3) })
}

/// Whether a pid still names a process, be it a zombie.
pub fn exists(pid: libc::pid_t) -> bool {
    // SAFETY: signal 0 only asks.
    pid > 0 && unsafe { libc::kill(pid, 0) == 0 || errno() == libc::EPERM }
}

/// Reads into `buf`; `Ok(0)` is the end.
pub fn read(fd: Fd, buf: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: pointer and length describe `buf`.
    let n = unsafe { libc::read(fd.get(), buf.as_mut_ptr().cast(), buf.len()) };
    if n < 0 { Err(errno()) } else { Ok(n as usize) }
}

fn receive(fd: Fd, buf: &mut [u8], flags: libc::c_int) -> Result<usize, i32> {
    // SAFETY: pointer and length describe `buf`.
    let n = unsafe {
        let flags = flags | libc::MSG_DONTWAIT;
        libc::recv(fd.get(), buf.as_mut_ptr().cast(), buf.len(), flags)
    };
    if n < 0 { Err(errno()) } else { Ok(n as usize) }
}

/// Looks at what a socket holds without taking it.
pub fn peek(fd: Fd, buf: &mut [u8]) -> Result<usize, i32> {
    receive(fd, buf, libc::MSG_PEEK)
}

/// Takes from a socket.
pub fn take(fd: Fd, buf: &mut [u8]) -> Result<usize, i32> {
    receive(fd, buf, 0)
}

/// Sends without SIGPIPE and without blocking.
pub fn send(fd: Fd, buf: &[u8]) -> Result<usize, i32> {
    // SAFETY: pointer and length describe `buf`.
    let n = unsafe {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        libc::send(fd.get(), buf.as_ptr().cast(), buf.len(), flags)
    };
    if n < 0 { Err(errno()) } else { Ok(n as usize) }
}

/// Bytes that a stream socket holds.
pub fn queued(fd: Fd) -> usize {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let r = unsafe { libc::ioctl(fd.get(), libc::FIONREAD, &mut n) };
    if r < 0 { 0 } else { n.max(0) as usize }
}

/// Whether the peer will send no more: only what is queued is left.
pub fn peer_closed(fd: Fd) -> bool {
    let mut p = libc::pollfd { fd: fd.get(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one valid pollfd, and no waiting.
    unsafe { libc::poll(&mut p, 1, 0) };
    p.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Whether the peer is gone in both directions.
pub fn peer_gone(fd: Fd) -> bool {
    let mut p = libc::pollfd { fd: fd.get(), events: 0, revents: 0 };
    // SAFETY: one valid pollfd, and no waiting.
    unsafe { libc::poll(&mut p, 1, 0) };
    p.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// `shutdown(2)`.
pub fn shutdown(fd: Fd, how: libc::c_int) {
    // SAFETY: integer arguments.
    unsafe { libc::shutdown(fd.get(), how) };
}

/// `accept4(2)`, close-on-exec and non-blocking.
pub fn accept(listener: Fd) -> Result<Fd, i32> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null address pointers are allowed.
    own(unsafe { libc::accept4(listener.get(), std::ptr::null_mut(), std::ptr::null_mut(), flags) })
}

/// Whether a connection comes from our own user or root.
pub fn same_user(fd: Fd) -> bool {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` and `len` describe a valid out buffer; geteuid cannot fail.
    unsafe {
        let r = libc::getsockopt(
            fd.get(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        );
        r == 0 && (cred.uid == 0 || cred.uid == libc::geteuid())
    }
}

/// Room for one header and [`MAX_FDS`] descriptors.
#[repr(C, align(8))]
struct Control([u8; 160]);

/// Sends one packet with descriptors, without blocking.
pub fn send_packet(fd: Fd, data: &[u8], fds: &[Fd]) -> Result<(), i32> {
    if fds.len() > MAX_FDS {
        return Err(libc::EINVAL);
    }
    let mut control = Control([0; 160]);
    let mut iov = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = mem::size_of_val(fds) as u32;
        msg.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: pure computation; 16 + 4 * MAX_FDS = 144 bytes fit in `control`.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: msg_control points to an aligned buffer with room for one header and `fds`,
        // which are copied to its data part; `Fd` is a transparent i32.
        unsafe {
            let c = libc::CMSG_FIRSTHDR(&msg);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(bytes) as _;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<i32>(),
                libc::CMSG_DATA(c).cast(),
                fds.len(),
            );
        }
    }
    // SAFETY: `msg` refers to live buffers.
    let n = unsafe { libc::sendmsg(fd.get(), &msg, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if n < 0 { Err(errno()) } else { Ok(()) }
}

/// Descriptors that came with a packet; those that nobody has taken are closed when dropped.
#[derive(Default)]
pub struct Passed {
    fds: [Fd; MAX_FDS],
    /// How many came.
    pub len: usize,
    /// Some were lost: the packet or its descriptors did not fit, or this process has too many.
    pub cut: bool,
}

impl Passed {
    /// The descriptor `i`, still owned by `self`.
    pub fn get(&self, i: usize) -> Option<Fd> {
        self.fds.get(i).copied().filter(|f| f.is_some())
    }

    /// Takes the descriptor `i` over.
    pub fn take(&mut self, i: usize) -> Option<Fd> {
        let slot = self.fds.get_mut(i)?;
        let fd = mem::take(slot);
        fd.is_some().then_some(fd)
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        for fd in &mut self.fds {
            fd.close();
        }
    }
}

/// Receives one packet and its descriptors (close-on-exec).
pub fn receive_packet(fd: Fd, buf: &mut [u8], passed: &mut Passed) -> Result<usize, i32> {
    let mut control = Control([0; 160]);
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len() as _;
    // SAFETY: `msg` refers to live buffers.
    let n =
        unsafe { libc::recvmsg(fd.get(), &mut msg, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    if n < 0 {
        return Err(errno());
    }
    // SAFETY: walks the control messages that the kernel has written, within msg_controllen.
    unsafe {
        let mut c = libc::CMSG_FIRSTHDR(&msg);
        while !c.is_null() {
            if (*c).cmsg_level == libc::SOL_SOCKET && (*c).cmsg_type == libc::SCM_RIGHTS {
                let bytes = ((*c).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                for i in 0..bytes / 4 {
                    let raw = libc::CMSG_DATA(c).cast::<i32>().add(i).read_unaligned();
                    match passed.fds.get_mut(passed.len) {
                        Some(slot) => {
                            *slot = Fd(raw);
                            passed.len += 1;
                        }
                        None => {
                            Fd(raw).close();
                            passed.cut = true;
                        }
                    }
                }
            }
            c = libc::CMSG_NXTHDR(&msg, c);
        }
    }
    passed.cut |= msg.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok(n as usize)
}

/// A connected pair of stream sockets, close-on-exec and non-blocking, with room for a whole
/// frame of 64 KiB however the system's default is set.
pub fn stream_pair() -> Result<(Fd, Fd), i32> {
    let mut sv = [0; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: `sv` has room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, sv.as_mut_ptr()) })?;
    let room: libc::c_int = 256 << 10;
    for fd in sv {
        // SAFETY: the option is one int.
        unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_SNDBUF,
                (&raw const room).cast(),
                size_of::<libc::c_int>() as u32,
            )
        };
    }
    let [a, b] = sv;
    Ok((Fd(a), Fd(b)))
}

/// A pipe, close-on-exec.
pub fn pipe() -> Result<(Fd, Fd), i32> {
    let mut p = [0; 2];
    // SAFETY: `p` has room for two descriptors.
    check(unsafe { libc::pipe2(p.as_mut_ptr(), libc::O_CLOEXEC) })?;
    let [r, w] = p;
    Ok((Fd(r), Fd(w)))
}
