//! The namespaces of a pod.
//!
//! A short-lived child enters the pod's network namespace (and the user namespace that owns it),
//! makes the others, sets hostname and sysctls, and waits until they have been opened through
//! `/proc`. Without a shared PID namespace nothing of it stays: descriptors pin what was made.
//! With one, a further child is its PID 1: it reaps, ends on SIGTERM, and holds nothing of ours.

use std::ffi::CString;
use std::ptr;

use sandbox_parent::protocol::{Reader, ns, stage};

use super::set_title;
use super::spawn::{Failure, at, collect, fork, read_report};
use super::sys::{self, Fd, Passed, check};

/// What was made: ipc, uts and the foreign user namespace, those of them that there are.
pub struct Made {
    pub fds: [Fd; 3],
    pub init: libc::pid_t,
}

#[derive(Clone, Copy)]
struct Request<'a> {
    flags: u8,
    id: &'a str,
    hostname: &'a [u8],
    /// `n:u16 {key, value}…`, checked.
    sysctls: Reader<'a>,
    netns: Option<Fd>,
    userns: Option<Fd>,
}

impl<'a> Request<'a> {
    fn parse(m: &mut Reader<'a>, fds: &Passed) -> Option<Self> {
        let (flags, id, hostname) = (m.u8()?, m.str()?, m.bytes()?);
        let sysctls = *m;
        for _ in 0..m.u16()? {
            m.str()?;
            m.bytes()?;
        }
        let netns = if flags & ns::NETNS == 0 { None } else { Some(fds.get(0)?) };
        Some(Self { flags, id, hostname, sysctls, netns, userns: None })
    }
}

/// Makes a pod's namespaces.
pub fn make(m: &mut Reader<'_>, fds: &Passed) -> Result<Made, Failure> {
    let mut request = Request::parse(m, fds).ok_or((libc::EINVAL, stage::REQUEST))?;
    if let Some(netns) = request.netns {
        request.userns = foreign_userns(netns)?;
    }
    let (mut hold_r, mut hold_w) = match sys::pipe() {
        Ok(pipe) => pipe,
        Err(e) => {
            request.userns.unwrap_or_default().close();
            return Err((e, stage::FORK));
        }
    };
    let forked = fork(move |report| {
        hold_w.close();
        match unshare(&request) {
            Ok(init) => report.send(0, 0, init as u32),
            Err((errno, stage)) => report.send(stage, errno, 0),
        }
        // Stay until our namespaces have been opened.
        let _ = sys::read(hold_r, &mut [0u8; 1]);
    });
    hold_r.close();
    let outcome = forked.and_then(|(pid, mut r)| {
        let outcome = read_report(r)
            .and_then(|init| init.ok_or((libc::EIO, stage::FORK)))
            .and_then(|init| open(pid, &request, init as libc::pid_t));
        r.close();
        hold_w.close();
        collect(pid);
        outcome
    });
    hold_w.close();
    if outcome.is_err() {
        request.userns.unwrap_or_default().close();
    }
    outcome
}

fn open(pid: libc::pid_t, request: &Request<'_>, init: libc::pid_t) -> Result<Made, Failure> {
    let mut made = Made { fds: [Fd::NONE; 3], init };
    let [ipc, uts, user] = &mut made.fds;
    let opened = (|| {
        if request.flags & ns::IPC != 0 {
            *ipc = open_ns(pid, b"ipc")?;
        }
        if request.flags & ns::UTS != 0 {
            *uts = open_ns(pid, b"uts")?;
        }
        Ok(())
    })();
    if let Err(e) = opened {
        made.fds.iter_mut().for_each(Fd::close);
        if init > 0 {
            // SAFETY: a child of ours that nobody knows of yet.
            unsafe { libc::kill(init, libc::SIGKILL) };
        }
        return Err((e, stage::OPEN));
    }
    *user = request.userns.unwrap_or_default();
    Ok(made)
}

/// Opens `/proc/<pid>/ns/<name>` without allocating.
pub fn open_ns(pid: libc::pid_t, name: &[u8; 3]) -> Result<Fd, i32> {
    let mut digits = [0u8; 10];
    let mut n = pid.unsigned_abs();
    let mut count = 0;
    for d in digits.iter_mut().rev() {
        *d = b'0' + (n % 10) as u8;
        n /= 10;
        count += 1;
        if n == 0 {
            break;
        }
    }
    let mut path = [0u8; 32];
    let digits = digits.iter().skip(10 - count);
    let parts = b"/proc/".iter().chain(digits).chain(b"/ns/").chain(name);
    path.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
    // SAFETY: at most 6 + 10 + 4 + 3 bytes and a zero behind them.
    sys::own(unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) })
}

/// The user namespace that owns a network namespace, when it is not ours: containerd makes a
/// pod's netns inside the pod's user namespace, and it is the only thing that holds it.
fn foreign_userns(netns: Fd) -> Result<Option<Fd>, Failure> {
    const NS_GET_USERNS: libc::c_ulong = 0xb701; // linux/nsfs.h, _IO(0xb7, 1)
    // SAFETY: the ioctl takes no argument and answers a new descriptor.
    let mut fd = sys::own(unsafe { libc::ioctl(netns.get(), NS_GET_USERNS as _) })
        .map_err(at(stage::USERNS))?;
    // SAFETY: zeroed stat buffers are filled by the calls.
    let same = unsafe {
        let mut a: libc::stat = std::mem::zeroed();
        let mut b: libc::stat = std::mem::zeroed();
        libc::fstat(fd.get(), &mut a) == 0
            && libc::stat(c"/proc/self/ns/user".as_ptr(), &mut b) == 0
            && (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
    };
    if same {
        fd.close();
        return Ok(None);
    }
    Ok(Some(fd))
}

/// In the child: enters and makes namespaces; answers the pid of the new init, or 0.
fn unshare(q: &Request<'_>) -> Result<libc::pid_t, Failure> {
    // SAFETY: integer arguments and descriptors that are open; single-threaded child.
    unsafe {
        if let Some(u) = q.userns {
            check(libc::setns(u.get(), libc::CLONE_NEWUSER)).map_err(at(stage::USERNS))?;
            // Root of the pod's user namespace, so that the new namespaces' files are its own.
            check(libc::setresgid(0, 0, 0)).map_err(at(stage::USERNS))?;
            check(libc::setresuid(0, 0, 0)).map_err(at(stage::USERNS))?;
            // Changing ids has made us undumpable, and /proc/<pid>/ns unreadable.
            libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
        }
        if let Some(n) = q.netns {
            check(libc::setns(n.get(), libc::CLONE_NEWNET)).map_err(at(stage::NETNS))?;
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
        check(libc::unshare(flags)).map_err(at(stage::UNSHARE))?;
        if q.flags & ns::UTS != 0 && !q.hostname.is_empty() {
            check(libc::sethostname(q.hostname.as_ptr().cast(), q.hostname.len()))
                .map_err(at(stage::HOSTNAME))?;
        }
    }
    let mut m = q.sysctls;
    for i in 0..m.u16().unwrap_or_default() {
        let (Some(key), Some(value)) = (m.str(), m.bytes()) else {
            break;
        };
        let stage = stage::SYSCTL.saturating_add(i.min(190) as u8);
        write_sysctl(key, value, q.flags).map_err(at(stage))?;
    }
    if q.flags & ns::PID == 0 {
        return Ok(0);
    }
    // SAFETY: single-threaded child.
    let pid = check(unsafe { libc::fork() }).map_err(at(stage::FORK))?;
    if pid == 0 {
        pod_init(q.id);
    }
    Ok(pid)
}

/// The file below `/proc/sys` of a sysctl that belongs to one of the namespaces made or entered;
/// `Err` when the key is not plain, or would change the host.
///
/// As in sysctl(8) the first separator decides: after a dot, dots and slashes are exchanged.
fn sysctl_path(key: &str, flags: u8) -> Result<String, i32> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    if key.len() > 200 || !key.chars().all(plain) {
        return Err(libc::EINVAL);
    }
    let path = match key.find(['.', '/']) {
        Some(i) if key.get(i..=i) == Some(".") => key
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => key.to_owned(),
    };
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(libc::EINVAL);
    }
    let owner = [
        ("net/", ns::NETNS),
        ("kernel/shm", ns::IPC),
        ("kernel/msg", ns::IPC),
        ("kernel/sem", ns::IPC),
        ("fs/mqueue/", ns::IPC),
        ("kernel/domainname", ns::UTS),
    ];
    let owner = owner.iter().find(|(prefix, _)| path.starts_with(prefix));
    match owner {
        Some((_, flag)) if flags & flag != 0 => Ok(path),
        Some(_) => Err(libc::EPERM),
        None => Err(libc::EINVAL),
    }
}

fn write_sysctl(key: &str, value: &[u8], flags: u8) -> Result<(), i32> {
    let path = CString::new(format!("/proc/sys/{}", sysctl_path(key, flags)?));
    let path = path.map_err(|_| libc::EINVAL)?;
    let flags = libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    // SAFETY: a valid path; then pointer and length of `value`.
    unsafe {
        let mut fd = sys::own(libc::open(path.as_ptr(), flags))?;
        let n = libc::write(fd.get(), value.as_ptr().cast(), value.len());
        let outcome = if n < 0 { Err(sys::errno()) } else { Ok(()) };
        fd.close();
        outcome
    }
}

/// PID 1 of a pod with a shared PID namespace: reaps, and ends on SIGTERM.
fn pod_init(id: &str) -> ! {
    // SAFETY: a freshly forked, single-threaded process sets itself up and then only waits.
    unsafe {
        libc::setsid();
        // It had the signals of sandbox-parent blocked from the start, so none is lost.
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&mut set, s);
        }
        libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut());
        set_title(&[b"[sandbox-", id.as_bytes(), b"]"]);
        libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
        super::memory::give_up();
        super::memory::trim_stack();
        loop {
            while libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) > 0 {}
            let s = libc::sigwaitinfo(&set, ptr::null_mut());
            if s == libc::SIGTERM || s == libc::SIGINT {
                libc::_exit(0);
            }
        }
    }
}
