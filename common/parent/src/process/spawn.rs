//! The first duty: fork. Engines, VMMs and helpers; [`super::namespaces`] does those of a pod.
//!
//! This process has one thread and a few dozen pages, so a plain `fork` is cheap and the child
//! may do anything before `execve`. It may even allocate: its heap is its own, and if that fails
//! only the child ends. The parent waits until the child has called `execve`, so a failure is the
//! request's answer and not an exit to be explained later.

use std::ffi::{CStr, CString};
use std::ptr;

use sandbox_parent::protocol::{Reader, spawn, stage};

use super::sys::{self, Fd, Passed, check};

/// `errno` and the step that failed.
pub type Failure = (i32, u8);

/// Shorthand for `map_err`.
pub fn at(stage: u8) -> impl Fn(i32) -> Failure {
    move |e| (e, stage)
}

/// How a child reports failure, or a value.
pub struct Report(Fd);

impl Report {
    /// Writes stage and `errno`; stage 0 is success with a value.
    pub fn send(&self, stage: u8, errno: i32, value: u32) {
        let mut b = [0u8; 9];
        let fields = [stage].into_iter().chain(errno.to_le_bytes()).chain(value.to_le_bytes());
        b.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        // SAFETY: nine bytes of a local array.
        unsafe { libc::write(self.0.get(), b.as_ptr().cast(), b.len()) };
    }
}

/// Reads a child's report: a value, or `None` when the pipe closed without one.
pub fn read_report(r: Fd) -> Result<Option<u32>, Failure> {
    let mut buf = [0u8; 9];
    let mut have = 0;
    while let Some(rest) = buf.get_mut(have..).filter(|b| !b.is_empty()) {
        match sys::read(r, rest) {
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

/// Forks; `child` runs in the child with its end of the report pipe and never returns.
pub fn fork(child: impl FnOnce(Report)) -> Result<(libc::pid_t, Fd), Failure> {
    let (mut r, mut w) = sys::pipe().map_err(at(stage::FORK))?;
    // SAFETY: single-threaded, so the child may do anything that this process may.
    let pid = match check(unsafe { libc::fork() }) {
        Ok(pid) => pid,
        Err(e) => {
            r.close();
            w.close();
            return Err((e, stage::FORK));
        }
    };
    if pid == 0 {
        child(Report(w));
        // SAFETY: ends the child without running this process's exit handlers.
        unsafe { libc::_exit(127) };
    }
    w.close();
    Ok((pid, r))
}

/// Waits for a child of ours that ends at once.
pub fn collect(pid: libc::pid_t) {
    // SAFETY: a null status pointer is allowed.
    while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } < 0 && sys::errno() == libc::EINTR {}
}

/// Runs a program; answers its pid.
pub fn spawn(m: Reader<'_>, fds: &Passed, nofile: &libc::rlimit) -> Result<libc::pid_t, Failure> {
    let (pid, mut r) = fork(|report| {
        if let Err((errno, stage)) = become_program(m, fds, nofile, &report) {
            report.send(stage, errno, 0);
        }
    })?;
    let outcome = read_report(r);
    r.close();
    match outcome {
        Ok(_) => Ok(pid),
        Err(e) => {
            collect(pid);
            Err(e)
        }
    }
}

fn strings(m: &mut Reader<'_>) -> Option<Vec<CString>> {
    let n = m.u16()?;
    (0..n).map(|_| CString::new(m.bytes()?).ok()).collect()
}

/// The descriptors that a counted list of indices names; 255 is `/dev/null`.
fn indices(m: &mut Reader<'_>, fds: &Passed) -> Option<Vec<i32>> {
    let n = m.u8()?;
    let fd = |i: u8| {
        if i == 255 { Some(-1) } else { fds.get(i.into()).map(Fd::get) }
    };
    (0..n).map(|_| m.u8().and_then(fd)).collect()
}

/// In the child: everything up to `execve`. Returns only on failure.
fn become_program(
    mut m: Reader<'_>,
    fds: &Passed,
    nofile: &libc::rlimit,
    report: &Report,
) -> Result<(), Failure> {
    let bad = (libc::EINVAL, stage::REQUEST);
    let m = &mut m;
    let (argv, env) = (strings(m).ok_or(bad)?, strings(m).ok_or(bad)?);
    let program = argv.first().ok_or(bad)?;
    let targets = indices(m, fds).ok_or(bad)?;
    // All that follows may be missing: an older daemon does not send it.
    let flags = m.u8().unwrap_or_default();
    let umask = m.u16().unwrap_or(spawn::NO_UMASK);
    let cwd = CString::new(m.bytes().unwrap_or_default()).map_err(|_| bad)?;
    for cgroup in indices(m, fds).unwrap_or_default() {
        // SAFETY: one byte of a constant; 0 means the writing process.
        check(unsafe { libc::write(cgroup, c"0".as_ptr().cast(), 1) } as i32)
            .map_err(at(stage::CGROUP))?;
    }
    // The descriptor limit was raised for this process alone.
    set_limit(libc::RLIMIT_NOFILE, nofile.rlim_cur, nofile.rlim_max)?;
    for _ in 0..m.u8().unwrap_or_default() {
        let (Some(resource), Some(soft), Some(hard)) = (m.u8(), m.u64(), m.u64()) else {
            return Err(bad);
        };
        set_limit(resource.into(), soft, hard)?;
    }
    let arguments = pointers(&argv);
    let environment = pointers(&env);
    let report_at = place(&targets, report.0).map_err(at(stage::FDS))?;
    default_signals();
    // SAFETY: integer arguments, valid strings and null-terminated arrays of them.
    unsafe {
        if flags & spawn::SAME_SESSION == 0 {
            libc::setsid();
        }
        libc::umask(if umask == spawn::NO_UMASK { 0o022 } else { umask.into() });
        if !cwd.is_empty()
            && let Err(e) = check(libc::chdir(cwd.as_ptr()))
        {
            Report(report_at).send(stage::CWD, e, 0);
            libc::_exit(127);
        }
        libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
    }
    // `place` has moved the pipe.
    Report(report_at).send(stage::EXEC, sys::errno(), 0);
    // SAFETY: ends the child.
    unsafe { libc::_exit(127) }
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<(), Failure> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: a valid structure.
    check(unsafe { libc::setrlimit(resource as _, &limit) }).map_err(at(stage::RLIMIT)).map(drop)
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    let end: [*const libc::c_char; 1] = [ptr::null()];
    strings.iter().map(|s: &CString| -> &CStr { s }).map(CStr::as_ptr).chain(end).collect()
}

/// Back to the state that a program expects: no blocked signals, default dispositions.
fn default_signals() {
    // SAFETY: async-signal-safe calls on local data in a single-threaded child. The kernel's own
    // interface, because the C library does not touch the two signals that it keeps for itself
    // (32 and 33), and whoever started us may have ignored them. All-zero is the default
    // disposition; four words are the kernel's `struct sigaction`.
    unsafe {
        let default = [0u64; 4];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
        }
        let none = 0u64;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, 8);
    }
}

/// In the child: puts descriptor `i` of `targets` at number `i`, the report pipe right behind
/// them, and closes all others. Answers the pipe's new place.
fn place(targets: &[i32], report: Fd) -> Result<Fd, i32> {
    let n = targets.len() as i32;
    // First out of the way of all targets.
    // SAFETY: duplicates to a number that no target uses.
    let high = |fd: i32| check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, n + 1) });
    let pipe = high(report.get())?;
    let mut lifted = Vec::with_capacity(targets.len());
    for &fd in targets {
        // SAFETY: opens a constant path.
        let null = || unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        lifted.push(if fd >= 0 { high(fd)? } else { high(check(null())?)? });
    }
    for (i, &fd) in (0..).zip(&lifted) {
        // SAFETY: moves a descriptor of ours; the copy is inherited on purpose.
        check(unsafe { libc::dup2(fd, i) })?;
    }
    // SAFETY: the pipe goes right behind the targets and closes on exec; everything above goes.
    unsafe {
        let pipe = sys::own(libc::dup3(pipe, n, libc::O_CLOEXEC))?;
        check(libc::syscall(libc::SYS_close_range, n + 1, u32::MAX, 0) as i32)?;
        Ok(pipe)
    }
}
