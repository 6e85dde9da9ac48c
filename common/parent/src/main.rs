//! `sandbox-parent`: forks, reaps, keeps and relays for one sandboxer, and outlives it.
//!
//! ```text
//! sandbox-parent DIR [MAX_CONNECTIONS] [PADDING]
//! ```
//!
//! `DIR` is the sandboxer's state directory; the control socket is `DIR/parent.sock`, and a lock
//! on `DIR/parent.lock` makes this process the only one there. It is started by the daemon, forks
//! into the background, and ends when it is told to ([`sandbox_parent::protocol::op::SHUTDOWN`])
//! or on SIGTERM when nothing depends on it. `PADDING` only makes room for a longer title.
//! Exit status: 0 when the background process serves, 1 with a message otherwise.
#![no_main]

mod process;

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use process::{control::Parent, sys};

/// Entry point, without the standard library's runtime in front of it.
///
/// # Safety
/// Called by the C runtime with a valid argument vector.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(argc: libc::c_int, argv: *const *const libc::c_char) -> libc::c_int {
    let arg = |i: i32| -> Option<String> {
        // SAFETY: `argv` has `argc` valid strings.
        (i < argc).then(|| unsafe { CStr::from_ptr(*argv.add(i as usize)) }.to_string_lossy().into())
    };
    let Some(dir) = arg(1).filter(|d| d.starts_with('/')) else {
        eprintln!("usage: sandbox-parent DIR [MAX_CONNECTIONS]; it is started by a sandboxer");
        return 1;
    };
    let max = arg(2).and_then(|s| s.parse().ok()).unwrap_or(16_384);
    match start(&dir) {
        Ok(Some(listener)) => {
            // SAFETY: the C runtime's own arguments.
            unsafe { process::remember_title(argc, argv) };
            process::set_title("[sandbox-parent]");
            match Parent::new(listener, max) {
                Ok(mut parent) => {
                    parent.run();
                    0
                }
                Err(_) => 1,
            }
        }
        Ok(None) => 0,
        Err((what, errno)) => {
            let e = std::io::Error::from_raw_os_error(errno);
            eprintln!("sandbox-parent: {what} in {dir}: {e}");
            1
        }
    }
}

/// Takes the lock, binds the socket and goes into the background. `None` in the foreground half.
fn start(dir: &str) -> Result<Option<OwnedFd>, (&'static str, i32)> {
    let c = |s: String| CString::new(OsStr::new(&s).as_bytes()).map_err(|_| ("path", libc::EINVAL));
    let (lock, socket) = (c(format!("{dir}/parent.lock"))?, c(format!("{dir}/parent.sock"))?);
    // SAFETY: plain system calls with valid paths and initialised structures.
    unsafe {
        libc::umask(0o077);
        let lock = sys::own(libc::open(lock.as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC, 0o600))
            .map_err(|e| ("opening parent.lock", e))?;
        sys::check(libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB))
            .map_err(|e| ("another sandbox-parent serves", e))?;
        libc::unlink(socket.as_ptr());
        let mut addr: libc::sockaddr_un = std::mem::zeroed();
        addr.sun_family = libc::AF_UNIX as _;
        let bytes = socket.as_bytes();
        if bytes.len() >= addr.sun_path.len() {
            return Err(("the path of parent.sock is longer than 107 bytes", libc::ENAMETOOLONG));
        }
        for (to, from) in addr.sun_path.iter_mut().zip(bytes) {
            *to = *from as _;
        }
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let listener =
            sys::own(libc::socket(libc::AF_UNIX, kind, 0)).map_err(|e| ("making a socket", e))?;
        let len = std::mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
        sys::check(libc::bind(listener.as_raw_fd(), (&raw const addr).cast(), len))
            .map_err(|e| ("binding parent.sock", e))?;
        sys::check(libc::listen(listener.as_raw_fd(), 8)).map_err(|e| ("listening", e))?;
        // Into the background: the daemon waits for our foreground half, and the socket is there.
        let pid = sys::check(libc::fork()).map_err(|e| ("forking", e))?;
        if pid > 0 {
            return Ok(None);
        }
        libc::setsid();
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        if libc::chdir(c"/".as_ptr()) < 0 {
            return Err(("chdir", sys::errno()));
        }
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        for fd in 0..3 {
            libc::dup2(null, fd);
        }
        // Keep the lock and the socket; close whatever else was inherited.
        let (a, b) = (lock.as_raw_fd(), listener.as_raw_fd());
        for fd in 3..1024 {
            if fd != a && fd != b {
                libc::close(fd);
            }
        }
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        // The lock is held as long as this process lives.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(lock);
        Ok(Some(listener))
    }
}
