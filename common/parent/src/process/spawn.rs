//! The first duty: fork. Engines and helpers, and the namespaces of a pod.
//!
//! This process has one thread and a few dozen pages, so a plain `fork` is cheap and everything
//! is allowed in the child before `execve`.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use sandbox_parent::protocol::{Reader, ns, stage};

use super::sys;
use super::{set_title, sys::check};

/// `errno` and the step that failed.
pub type Failure = (i32, u8);

fn bad<T>() -> Result<T, Failure> {
    Err((libc::EINVAL, stage::REQUEST))
}

/// Back to the state that a program expects: no blocked signals, default dispositions.
fn default_signals() {
    // SAFETY: async-signal-safe calls on local data in a freshly forked, single-threaded child.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut());
        for s in [libc::SIGPIPE, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::signal(s, libc::SIG_DFL);
        }
    }
}

/// A pipe by which a child reports `stage` and `errno`; both ends close on exec.
fn report_pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    let mut p = [0; 2];
    // SAFETY: `p` has room for two descriptors.
    check(unsafe { libc::pipe2(p.as_mut_ptr(), libc::O_CLOEXEC) })
        .map_err(|e| (e, stage::FORK))?;
    let [r, w] = p;
    Ok((sys::own(r).map_err(|e| (e, stage::FORK))?, sys::own(w).map_err(|e| (e, stage::FORK))?))
}

/// Reads a child's report: `Ok(true)` for a word of success, `Ok(false)` for the end (exec).
fn read_report(r: &OwnedFd) -> Result<Option<u32>, Failure> {
    let mut buf = [0u8; 9];
    let mut have = 0;
    while let Some(rest) = buf.get_mut(have..).filter(|b| !b.is_empty()) {
        match sys::read(r.as_raw_fd(), rest) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(libc::EINTR) => {}
            Err(e) => return Err((e, stage::FORK)),
        }
    }
    if have == 0 {
        return Ok(None);
    }
    let mut m = Reader(&buf);
    match (m.u8(), m.u32(), m.u32()) {
        (Some(0), _, Some(value)) => Ok(Some(value)),
        (Some(s), Some(e), _) => Err((e as i32, s)),
        _ => Err((libc::EIO, stage::FORK)),
    }
}

fn report(w: RawFd, stage: u8, errno: i32, value: u32) {
    let mut b = [stage; 9];
    b[1..5].copy_from_slice(&errno.to_le_bytes());
    b[5..9].copy_from_slice(&value.to_le_bytes());
    // SAFETY: nine bytes from a local array.
    unsafe { libc::write(w, b.as_ptr().cast(), b.len()) };
}

fn exit_child() -> ! {
    // SAFETY: ends the child without running this process's exit handlers.
    unsafe { libc::_exit(127) }
}

fn strings(m: &mut Reader<'_>) -> Option<Vec<CString>> {
    let n = m.u16()?;
    (0..n).map(|_| CString::new(m.bytes()?).ok()).collect()
}

/// Runs a program; answers its pid.
pub fn spawn(m: &mut Reader<'_>, fds: &[OwnedFd]) -> Result<libc::pid_t, Failure> {
    let (Some(argv), Some(env), Some(n)) = (strings(m), strings(m), m.u8()) else { return bad() };
    let Some(program) = argv.first() else { return bad() };
    let mut targets = Vec::with_capacity(usize::from(n));
    for _ in 0..n {
        match m.u8() {
            Some(255) => targets.push(-1),
            Some(i) => match fds.get(usize::from(i)) {
                Some(fd) => targets.push(fd.as_raw_fd()),
                None => return bad(),
            },
            None => return bad(),
        }
    }
    let pointers = |v: &[CString]| -> Vec<*const libc::c_char> {
        v.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, envs) = (pointers(&argv), pointers(&env));
    let (r, w) = report_pipe()?;
    // SAFETY: single-threaded, so the child may do anything that this process may.
    let pid = check(unsafe { libc::fork() }).map_err(|e| (e, stage::FORK))?;
    if pid == 0 {
        let e = place(&targets, &w);
        if e != 0 {
            report(w.as_raw_fd(), stage::FDS, e, 0);
            exit_child();
        }
        // `place` has moved the pipe behind the targets.
        let w = targets.len() as RawFd;
        default_signals();
        // SAFETY: both arrays are null-terminated and live; `setsid` and `execve` keep no rules.
        unsafe {
            libc::setsid();
            libc::execve(program.as_ptr(), args.as_ptr(), envs.as_ptr());
        }
        report(w, stage::EXEC, sys::errno(), 0);
        exit_child();
    }
    drop(w);
    match read_report(&r) {
        Ok(_) => Ok(pid),
        Err(e) => {
            // SAFETY: reaps the child that has just failed.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            Err(e)
        }
    }
}

/// In the child: puts descriptor `i` of `targets` at number `i`, the report pipe right behind
/// them, and closes all others.
fn place(targets: &[RawFd], w: &OwnedFd) -> i32 {
    let n = targets.len() as RawFd;
    let high = |fd: RawFd| {
        // SAFETY: duplicates to a number that no target uses.
        check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, n + 64) })
    };
    let mut lifted = Vec::with_capacity(targets.len());
    for &fd in targets {
        let source = if fd >= 0 {
            high(fd)
        } else {
            // SAFETY: opens a constant path.
            check(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })
                .and_then(high)
        };
        match source {
            Ok(fd) => lifted.push(fd),
            Err(e) => return e,
        }
    }
    let pipe = match high(w.as_raw_fd()) {
        Ok(fd) => fd,
        Err(e) => return e,
    };
    for (i, fd) in lifted.iter().enumerate() {
        // SAFETY: moves a descriptor of ours; the copy is inherited on purpose.
        if let Err(e) = check(unsafe { libc::dup2(*fd, i as RawFd) }) {
            return e;
        }
    }
    // SAFETY: the pipe goes right behind the targets and closes on exec; everything above goes.
    unsafe {
        if let Err(e) = check(libc::dup3(pipe, n, libc::O_CLOEXEC)) {
            return e;
        }
        if libc::syscall(libc::SYS_close_range, n + 1, u32::MAX, 0) < 0 {
            return sys::errno();
        }
    }
    0
}

/// What [`namespaces`] has made: ipc, uts, user (if not ours), and the init of a PID namespace.
pub struct Made {
    pub fds: Vec<OwnedFd>,
    pub init: libc::pid_t,
}

struct Request<'a> {
    flags: u8,
    id: &'a str,
    hostname: &'a [u8],
    sysctls: Vec<(&'a str, &'a [u8])>,
    netns: Option<RawFd>,
    userns: Option<OwnedFd>,
}

/// Makes a pod's namespaces. Without a PID namespace no process stays.
pub fn namespaces(m: &mut Reader<'_>, fds: &[OwnedFd]) -> Result<Made, Failure> {
    let (Some(flags), Some(id), Some(hostname), Some(n)) = (m.u8(), m.str(), m.bytes(), m.u16())
    else {
        return bad();
    };
    let mut sysctls = Vec::new();
    for _ in 0..n {
        match (m.str(), m.bytes()) {
            (Some(k), Some(v)) => sysctls.push((k, v)),
            _ => return bad(),
        }
    }
    let netns = if flags & ns::NETNS != 0 {
        match fds.first() {
            Some(fd) => Some(fd.as_raw_fd()),
            None => return bad(),
        }
    } else {
        None
    };
    let userns = netns.map(foreign_userns).transpose()?.flatten();
    let request = Request { flags, id, hostname, sysctls, netns, userns };
    let (r, w) = report_pipe()?;
    let (hold_r, hold_w) = report_pipe()?;
    // SAFETY: single-threaded, so the child may do anything that this process may.
    let pid = check(unsafe { libc::fork() }).map_err(|e| (e, stage::FORK))?;
    if pid == 0 {
        drop(hold_w);
        match unshare(&request, &w) {
            Ok(init) => report(w.as_raw_fd(), 0, 0, init as u32),
            Err((e, s)) => report(w.as_raw_fd(), s, e, 0),
        }
        // Stay until our namespaces have been opened.
        let _ = sys::read(hold_r.as_raw_fd(), &mut [0u8; 1]);
        exit_child();
    }
    drop(w);
    drop(hold_r);
    let outcome = read_report(&r).and_then(|init| {
        let init = init.ok_or((libc::EIO, stage::FORK))? as libc::pid_t;
        let mut made = Made { fds: Vec::new(), init };
        let kinds = [(ns::IPC, "ipc"), (ns::UTS, "uts")];
        for (flag, name) in kinds {
            if flags & flag != 0 {
                made.fds.push(open_ns(pid, name)?);
            }
        }
        if let Some(fd) = request.userns {
            made.fds.push(fd);
        }
        Ok(made)
    });
    drop(hold_w);
    // SAFETY: reaps our own child, which ends now that the pipe is closed.
    unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
    outcome
}

fn open_ns(pid: libc::pid_t, name: &str) -> Result<OwnedFd, Failure> {
    let path = CString::new(format!("/proc/{pid}/ns/{name}")).map_err(|_| (libc::EINVAL, 1))?;
    // SAFETY: a valid path.
    sys::own(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) })
        .map_err(|e| (e, stage::OPEN))
}

/// The user namespace that owns a network namespace, when it is not ours: containerd makes a
/// pod's netns inside the pod's user namespace, and it is the only thing that holds it.
fn foreign_userns(netns: RawFd) -> Result<Option<OwnedFd>, Failure> {
    const NS_GET_USERNS: libc::c_ulong = 0xb701; // linux/nsfs.h, _IO(0xb7, 1)
    // SAFETY: the ioctl takes no argument and answers a new descriptor.
    let fd = sys::own(unsafe { libc::ioctl(netns, NS_GET_USERNS as _) })
        .map_err(|e| (e, stage::USERNS))?;
    // SAFETY: zeroed stat buffers are filled by the calls.
    let same = unsafe {
        let mut a: libc::stat = std::mem::zeroed();
        let mut b: libc::stat = std::mem::zeroed();
        libc::fstat(fd.as_raw_fd(), &mut a) == 0
            && libc::stat(c"/proc/self/ns/user".as_ptr(), &mut b) == 0
            && (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
    };
    Ok((!same).then_some(fd))
}

/// In the child: enters and makes namespaces; answers the pid of the new init, or 0.
fn unshare(q: &Request<'_>, report: &OwnedFd) -> Result<libc::pid_t, Failure> {
    // SAFETY: integer arguments and descriptors that are open; single-threaded child.
    unsafe {
        if let Some(u) = &q.userns {
            check(libc::setns(u.as_raw_fd(), libc::CLONE_NEWUSER))
                .map_err(|e| (e, stage::USERNS))?;
            // Root of the pod's user namespace, so that the new namespaces' files are its own.
            check(libc::setresgid(0, 0, 0)).map_err(|e| (e, stage::USERNS))?;
            check(libc::setresuid(0, 0, 0)).map_err(|e| (e, stage::USERNS))?;
            // Changing ids has made us undumpable, and /proc/<pid>/ns unreadable.
            libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
        }
        if let Some(n) = q.netns {
            check(libc::setns(n, libc::CLONE_NEWNET)).map_err(|e| (e, stage::NETNS))?;
        }
        let mut flags = 0;
        for (bit, clone) in [
            (ns::IPC, libc::CLONE_NEWIPC),
            (ns::UTS, libc::CLONE_NEWUTS),
            (ns::PID, libc::CLONE_NEWPID),
        ] {
            if q.flags & bit != 0 {
                flags |= clone;
            }
        }
        check(libc::unshare(flags)).map_err(|e| (e, stage::UNSHARE))?;
        if q.flags & ns::UTS != 0 && !q.hostname.is_empty() {
            check(libc::sethostname(q.hostname.as_ptr().cast(), q.hostname.len()))
                .map_err(|e| (e, stage::HOSTNAME))?;
        }
    }
    for (i, (key, value)) in q.sysctls.iter().enumerate() {
        write_sysctl(key, value)
            .map_err(|e| (e, stage::SYSCTL.saturating_add(i.min(190) as u8)))?;
    }
    if q.flags & ns::PID == 0 {
        return Ok(0);
    }
    // SAFETY: single-threaded child.
    let pid = check(unsafe { libc::fork() }).map_err(|e| (e, stage::FORK))?;
    if pid == 0 {
        let _ = report;
        pod_init(q.id);
    }
    Ok(pid)
}

/// The key comes from the pod's configuration: only plain names below /proc/sys.
fn write_sysctl(key: &str, value: &[u8]) -> Result<(), i32> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    if key.is_empty() || !key.chars().all(plain) || key.contains("..") || key.starts_with('/') {
        return Err(libc::EINVAL);
    }
    let path = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    let path = CString::new(format!("/proc/sys/{path}")).map_err(|_| libc::EINVAL)?;
    let flags = libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    // SAFETY: a valid path; then pointer and length of `value`.
    unsafe {
        let fd = sys::own(libc::open(path.as_ptr(), flags))?;
        let n = libc::write(fd.as_raw_fd(), value.as_ptr().cast(), value.len());
        if n < 0 { Err(sys::errno()) } else { Ok(()) }
    }
}

/// PID 1 of a pod with a shared PID namespace: reaps, and ends on SIGTERM.
fn pod_init(id: &str) -> ! {
    // SAFETY: a freshly forked, single-threaded process sets itself up and then only waits.
    unsafe {
        libc::setsid();
        libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut());
        set_title(&format!("[sandbox-{id}]"));
        loop {
            while libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) > 0 {}
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let s = libc::sigwaitinfo(&set, &mut info);
            if s == libc::SIGTERM || s == libc::SIGINT {
                libc::_exit(0);
            }
        }
    }
}

/// Duplicates a descriptor, close-on-exec.
pub fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, i32> {
    // SAFETY: answers a new descriptor.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: `check` proves that it is new and ours.
    check(r).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}
