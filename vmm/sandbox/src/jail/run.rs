//! The jailer's course, from its arguments to the program's `execve`.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{ForkResult, execve, fork, pipe2};

use super::{Plan, privileges, root, seccomp};

/// Largest plan that is read.
const MAX_PLAN: u64 = 1 << 20;
/// Longest report of a failed step.
const MAX_REPORT: u64 = 4096;

/// A step that failed.
#[derive(Debug)]
pub(super) struct Failed(pub String);

/// Names the step in a failure.
pub(super) trait Step<T> {
    /// `step` completes "cannot …".
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Failed>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Failed> {
        self.map_err(|error| Failed(format!("cannot {}: {}", step().into(), error.into())))
    }
}

#[derive(Debug)]
struct Arguments {
    plan: Source,
    pid: Source,
    netns: Option<RawFd>,
    program: Vec<CString>,
}

/// A descriptor, or for people a file.
#[derive(Debug)]
enum Source {
    Fd(RawFd),
    File(PathBuf),
}

impl Source {
    fn of(word: OsString) -> Self {
        match word.to_str().and_then(|word| word.parse().ok()) {
            Some(fd) => Self::Fd(fd),
            None => Self::File(word.into()),
        }
    }

    fn open(&self, write: bool) -> io::Result<File> {
        match self {
            // SAFETY: the number was given to this process for this purpose, and is opened once.
            Self::Fd(fd) => Ok(unsafe { File::from_raw_fd(*fd) }),
            Self::File(path) => File::options().read(!write).write(write).create(write).open(path),
        }
    }
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Arguments, Failed> {
    let usage = || {
        Failed(
            "usage: jail --config FD|FILE --pid FD|FILE [--netns FD] -- program [argument]…".into(),
        )
    };
    let mut args = args.into_iter();
    let (mut plan, mut pid, mut netns) = (None, None, None);
    loop {
        let word = args.next().ok_or_else(usage)?;
        match word.to_str() {
            Some("--config") => plan = args.next().map(Source::of),
            Some("--pid") => pid = args.next().map(Source::of),
            Some("--netns") => match args.next().map(Source::of) {
                Some(Source::Fd(fd)) => netns = Some(fd),
                _ => return Err(usage()),
            },
            Some("--") => break,
            _ => return Err(usage()),
        }
    }
    let program: Result<Vec<_>, _> = args.map(|word| CString::new(word.into_vec())).collect();
    let program = program.map_err(|_| usage())?;
    match (plan, pid) {
        (Some(plan), Some(pid))
            if program.first().is_some_and(|p| p.as_bytes().starts_with(b"/")) =>
        {
            Ok(Arguments { plan, pid, netns, program })
        }
        _ => Err(usage()),
    }
}

/// Runs a program in a jail; `args` come behind the subcommand's name. Answers the exit status.
/// Call it before the process has a second thread.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    match parse(args).and_then(jail) {
        Ok(()) => 0,
        Err(Failed(text)) => {
            let _ = writeln!(io::stderr(), "jail: {text}");
            1
        }
    }
}

fn jail(arguments: Arguments) -> Result<(), Failed> {
    let mut text = Vec::new();
    let file = arguments.plan.open(false).step(|| "open the plan")?;
    // The writer's offset is at the end, and the file description is shared.
    match &arguments.plan {
        Source::Fd(_) => {
            let size = file.metadata().step(|| "read the plan")?.len().min(MAX_PLAN);
            text.resize(size as usize, 0);
            file.read_exact_at(&mut text, 0).step(|| "read the plan")?;
        }
        Source::File(_) => {
            file.take(MAX_PLAN).read_to_end(&mut text).step(|| "read the plan")?;
        }
    }
    let plan: Plan =
        serde_json::from_slice(&text).map_err(io::Error::from).step(|| "read the plan")?;
    plan.config.check().map_err(Failed)?;
    for cgroup in &plan.cgroups {
        std::fs::write(cgroup, "0").step(|| format!("enter the cgroup of {}", cgroup.display()))?;
    }
    badness(plan.config.oom_score_adj)?;
    network(arguments.netns)?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWPID;
    unshare(namespaces).step(|| "make namespaces")?;
    let name = b"jail";
    // SAFETY: pointer and length describe `name`.
    let r = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    nix::errno::Errno::result(r).step(|| "set the hostname")?;
    root::enter(&plan, arguments.program.first())?;

    let (report, tell) = pipe2(OFlag::O_CLOEXEC).step(|| "make a pipe")?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.step(|| "fork")? {
        ForkResult::Child => {
            drop(report);
            let Err(Failed(text)) = become_program(&plan, &arguments.program);
            let _ = File::from(tell).write_all(text.as_bytes());
            // SAFETY: ends the child without running the jailer's exit handlers.
            unsafe { libc::_exit(1) }
        }
        ForkResult::Parent { child } => {
            drop(tell);
            let mut text = String::new();
            let told = File::from(report).take(MAX_REPORT).read_to_string(&mut text);
            told.step(|| "wait for the program's start")?;
            if !text.is_empty() {
                let _ = nix::sys::wait::waitpid(child, None);
                return Err(Failed(text));
            }
            let pid = arguments.pid.open(true).step(|| "open the pid file")?;
            pid.write_all_at(child.to_string().as_bytes(), 0).step(|| "write the pid file")
        }
    }
}

/// How readily the kernel kills it. Making that less likely is a privilege that a daemon may lack.
fn badness(adjustment: i32) -> Result<(), Failed> {
    match std::fs::write("/proc/self/oom_score_adj", adjustment.to_string()) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other.step(|| "set oom_score_adj"),
    }
}

/// The network namespace that was given, or an empty one.
fn network(netns: Option<RawFd>) -> Result<(), Failed> {
    match netns {
        Some(fd) => {
            // SAFETY: the number was given to this process for this purpose, and is opened once.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            setns(fd.as_fd(), CloneFlags::CLONE_NEWNET).step(|| "enter the network namespace")
        }
        None => unshare(CloneFlags::CLONE_NEWNET).step(|| "make an empty network namespace"),
    }
}

/// In the child, which is PID 1 of its namespace: the rest, up to `execve`.
fn become_program(plan: &Plan, program: &[CString]) -> Result<Infallible, Failed> {
    // Whoever kills a jailer that takes too long means its child, too.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .step(|| "follow the jailer's end")?;
    root::finish()?;
    let files = plan.config.files;
    setrlimit(Resource::RLIMIT_NOFILE, files, files)
        .step(|| format!("limit open files to {files}"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).step(|| "forbid core dumps")?;
    // All that is not the program's closes with execve; until then the report's pipe stays open.
    // SAFETY: integer arguments.
    let r = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            plan.fds as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_uint,
        )
    };
    nix::errno::Errno::result(r).step(|| "close descriptors")?;
    privileges::give_up(plan)?;
    // After the change of user, which clears it, and as late as can be: from here on only
    // sandbox-parent can end it.
    nix::sys::prctl::set_pdeathsig(None).step(|| "live on after the jailer's end")?;
    if plan.config.seccomp {
        seccomp::load(plan.view.role)?;
    }
    let environment = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), c"LC_ALL=C".to_owned()];
    let path = program.first().ok_or_else(|| Failed("no program".into()))?;
    execve(path, program, &environment).step(|| format!("run {}", path.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Arguments, Failed> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_command_line_is_read_strictly() {
        let good = words("--config 5 --pid 6 --netns 7 -- /bin/true --config 9").unwrap();
        assert!(matches!(good.plan, Source::Fd(5)));
        assert!(matches!(good.netns, Some(7)));
        assert_eq!(good.program.len(), 3);
        for bad in [
            "",
            "--config 5 --pid 6",
            "--config 5 --pid 6 --",
            "--config 5 --pid 6 -- true",
            "--config 5 -- /bin/true",
            "--config 5 --pid 6 --netns x -- /bin/true",
            "--what 5 --pid 6 -- /bin/true",
        ] {
            assert!(words(bad).is_err(), "{bad}");
        }
    }
}
