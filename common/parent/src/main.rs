//! `sandbox-parent`: forks, reaps, keeps and relays for one sandboxer, and outlives it.
//!
//! ```text
//! sandbox-parent DIR [connections=16384] [pending=8192] [pods=4096] [kept=32768] [watched=16384]
//!                [hold=10000]
//!                    [cgroup=/sys/fs/cgroup/…]… [title=-----…]
//! ```
//!
//! `DIR` is the sandboxer's state directory; the control socket is `DIR/parent.sock`, and a lock
//! on `DIR/parent.lock` makes this process the only one there. It is started by the daemon, moves
//! to the `cgroup`s, forks into the background, and ends when it is told to
//! ([`sandbox_parent::protocol::op::SHUTDOWN`]) or on SIGTERM and SIGINT when nothing depends on
//! it; otherwise it ignores them. The numbers bound its tables, which cost memory only as far as
//! they are used. `title` only makes room for a longer title.
//! Exit status: 0 when the background process serves, 1 with a message otherwise. Afterwards it
//! has no log: what it refuses is counted ([`sandbox_parent::protocol::op::STATUS`]), and every
//! failure is the answer to a request.
#![no_main]

mod process;

use std::ffi::CStr;

use process::{
    control::Parent,
    store::Limits,
    sys::{self, Fd},
};

/// Where the lock and the control socket are in the background process.
const LOCK: i32 = 3;
const SOCKET: i32 = 4;

/// What went wrong before the background process, and `errno`.
type Failed = (&'static str, i32);

/// Entry point, without the standard library's runtime in front of it.
///
/// # Safety
/// Called by the C runtime with a valid argument vector.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(argc: libc::c_int, argv: *const *const libc::c_char) -> libc::c_int {
    let arg = |i: i32| -> Option<&'static [u8]> {
        // SAFETY: `argv` has `argc` valid strings, which stay where they are.
        (i < argc).then(|| unsafe { CStr::from_ptr(*argv.add(i as usize)) }.to_bytes())
    };
    let Some(dir) = arg(1).filter(|d| d.starts_with(b"/")) else {
        say(&[b"usage: sandbox-parent DIR [NAME=VALUE]...; it is started by a sandboxer\n"]);
        return 1;
    };
    let mut limits = Limits {
        pods: 4096,
        connections: 16_384,
        pending: 8192,
        kept: 32_768,
        watched: 16_384,
        hold: 10_000,
    };
    for option in (2..argc).filter_map(arg) {
        let Some(eq) = option.iter().position(|&b| b == b'=') else {
            continue;
        };
        let (key, value) =
            (option.get(..eq).unwrap_or_default(), option.get(eq + 1..).unwrap_or_default());
        let number = || std::str::from_utf8(value).ok()?.parse::<usize>().ok().filter(|n| *n > 0);
        let limit = match key {
            b"pods" => &mut limits.pods,
            b"connections" => &mut limits.connections,
            b"pending" => &mut limits.pending,
            b"kept" => &mut limits.kept,
            b"watched" => &mut limits.watched,
            b"hold" => {
                // Milliseconds; none at all is allowed.
                limits.hold = std::str::from_utf8(value)
                    .ok()
                    .and_then(|v| v.parse().ok())
                    .unwrap_or(limits.hold);
                continue;
            }
            b"cgroup" => {
                if let Err(e) = enter_cgroup(value) {
                    return failed(("entering the cgroup", e), value);
                }
                continue;
            }
            // A newer daemon may know more than this program.
            _ => continue,
        };
        // Rows are numbered with 16 bits.
        *limit = number().unwrap_or(*limit).min(60_000);
    }
    match start(dir) {
        Ok(None) => 0,
        Ok(Some(nofile)) => {
            // SAFETY: the C runtime's own arguments.
            unsafe { process::remember_title(argc, argv) };
            process::set_title(&[b"[sandbox-parent]"]);
            let Ok(listener) = sys::own(SOCKET) else {
                return 1;
            };
            match Parent::new(listener, limits, nofile) {
                Ok(mut parent) => {
                    parent.run();
                    0
                }
                Err(_) => 1,
            }
        }
        Err(e) => failed(e, dir),
    }
}

fn failed((what, errno): Failed, place: &[u8]) -> libc::c_int {
    // SAFETY: strerror answers a valid string.
    let text = unsafe { CStr::from_ptr(libc::strerror(errno)) }.to_bytes();
    say(&[b"sandbox-parent: ", what.as_bytes(), b": ", place, b": ", text, b"\n"]);
    1
}

fn say(parts: &[&[u8]]) {
    for p in parts {
        // SAFETY: pointer and length describe `p`.
        unsafe { libc::write(2, p.as_ptr().cast(), p.len()) };
    }
}

/// `dir` and `name` as a C string.
fn path(dir: &[u8], name: &[u8]) -> Result<[u8; 256], i32> {
    let mut path = [0u8; 256];
    if dir.len() + name.len() >= path.len() {
        return Err(libc::ENAMETOOLONG);
    }
    path.iter_mut().zip(dir.iter().chain(name)).for_each(|(to, from)| *to = *from);
    Ok(path)
}

fn enter_cgroup(dir: &[u8]) -> Result<(), i32> {
    let path = path(dir, b"/cgroup.procs")?;
    // SAFETY: a valid path; one byte of a constant.
    unsafe {
        let mut fd = sys::own(libc::open(path.as_ptr().cast(), libc::O_WRONLY | libc::O_CLOEXEC))?;
        let n = libc::write(fd.get(), c"0".as_ptr().cast(), 1);
        let outcome = if n < 0 { Err(sys::errno()) } else { Ok(()) };
        fd.close();
        outcome
    }
}

/// Takes the lock, binds the socket and goes into the background, where the two are at [`LOCK`]
/// and [`SOCKET`]. `None` in the foreground half; in the other, the descriptor limit as it was.
fn start(dir: &[u8]) -> Result<Option<libc::rlimit>, Failed> {
    let say = |what: &'static str| move |e: i32| (what, e);
    let lock = path(dir, b"/parent.lock").map_err(say("the path"))?;
    let socket = path(dir, b"/parent.sock").map_err(say("the path"))?;
    // SAFETY: plain system calls with valid paths and initialised structures.
    unsafe {
        // Whatever is made here is ours alone from the first moment.
        libc::umask(0o077);
        // 0, 1 and 2 may be closed, and then nothing else may get these numbers.
        while sys::check(libc::open(c"/dev/null".as_ptr(), libc::O_RDWR)).is_ok_and(|fd| fd < 3) {}
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC | libc::O_NOFOLLOW;
        let lock = sys::own(libc::open(lock.as_ptr().cast(), flags, 0o600))
            .map_err(say("opening parent.lock"))?;
        sys::check(libc::flock(lock.get(), libc::LOCK_EX | libc::LOCK_NB))
            .map_err(say("locking: another sandbox-parent serves"))?;
        libc::unlink(socket.as_ptr().cast());
        let mut addr: libc::sockaddr_un = std::mem::zeroed();
        addr.sun_family = libc::AF_UNIX as _;
        if socket.get(addr.sun_path.len() - 1).is_none_or(|b| *b != 0) {
            return Err(("the path of parent.sock is longer than 107 bytes", libc::ENAMETOOLONG));
        }
        addr.sun_path.iter_mut().zip(socket).for_each(|(to, from)| *to = from as _);
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let listener =
            sys::own(libc::socket(libc::AF_UNIX, kind, 0)).map_err(say("making a socket"))?;
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        sys::check(libc::bind(listener.get(), (&raw const addr).cast(), len))
            .map_err(say("binding parent.sock"))?;
        sys::check(libc::listen(listener.get(), 64)).map_err(say("listening"))?;
        // The daemon waits for our foreground half, and then the socket is there.
        if sys::check(libc::fork()).map_err(say("forking"))? > 0 {
            return Ok(None);
        }
        settle(lock, listener).map_err(say("going into the background")).map(Some)
    }
}

/// In the background half: a session of its own, and no descriptor but ours.
///
/// # Safety
/// There must be no other thread, and nobody else who uses any descriptor.
unsafe fn settle(lock: Fd, listener: Fd) -> Result<libc::rlimit, i32> {
    // SAFETY: plain system calls; every other descriptor is given up on purpose.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        sys::check(libc::chdir(c"/".as_ptr()))?;
        let null = sys::check(libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))?;
        for fd in 0..3 {
            libc::dup2(null, fd);
        }
        // Out of each other's way, then to their places.
        let lock = sys::check(libc::fcntl(lock.get(), libc::F_DUPFD_CLOEXEC, SOCKET + 1))?;
        let listener = sys::check(libc::fcntl(listener.get(), libc::F_DUPFD_CLOEXEC, SOCKET + 1))?;
        sys::check(libc::dup3(lock, LOCK, libc::O_CLOEXEC))?;
        sys::check(libc::dup3(listener, SOCKET, libc::O_CLOEXEC))?;
        sys::check(libc::syscall(libc::SYS_close_range, SOCKET + 1, u32::MAX, 0) as i32)?;
        let mut nofile: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut nofile);
        let raised = libc::rlimit { rlim_cur: nofile.rlim_max, ..nofile };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raised);
        Ok(nofile)
    }
}
