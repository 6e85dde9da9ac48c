//! The built-in OCI engine: `PROGRAM oci create|exec|start|kill|delete|state`.
//!
//! The program is run for every container and every exec, so it starts like a
//! small C program: `main` comes here before any runtime, logger or argument parser exists, the
//! arguments are read by hand, and there is one thread from beginning to end (joining user and
//! mount namespaces demands it).
//!
//! * **create** is ours (`direct`) where a spec has nothing that it does not know, and
//!   libcontainer's otherwise, with our own `payload::Payload` at the very end. The new process
//!   is made as a sibling (`CLONE_PARENT`): its parent is the process that started us, which is
//!   the one that must reap it.
//! * **exec** is ours (`exec`), because libcontainer 0.7 builds the joining process from a spec
//!   without the container's seccomp section: its execs run unfiltered.
//!
//! [`serve`] is exec for one container's process after another, without a program for each.
//!
//! Command line and files are runc's as far as they go: `--root`, `--log`, `--bundle`,
//! `--pid-file`, `--console-socket`. Errors are one JSON line in the log file, as runc and crun
//! write it, and one plain line on standard error; the exit status is 1.
//!
//! # Our own executable
//!
//! A process that is inside the container but has not yet exec'd its payload still has this
//! program as `/proc/PID/exe`, and an image can ask for `/proc/self/exe` as its command
//! (CVE-2019-5736). The runtime therefore never has the installed file run: see
//! [`crate::selfexe`].

mod args;
mod console;
mod create;
mod direct;
mod exec;
mod manage;
mod payload;
pub mod serve;
pub mod workload;

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::Path;

use args::{Args, Command};
use nix::sched::CloneFlags;

pub use direct::{Entered, make_group, make_room};
use workload::Workload;

/// What went wrong, in words for the person who reads `kubectl describe pod`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// The container's own process cannot be run as its spec asks.
    #[error("unable to start container process: {0}")]
    Process(String),
    /// Everything else.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// An operation that failed, with the operating system's reason.
    fn os(what: impl std::fmt::Display) -> Self {
        Self::Other(format!("{what}: {}", std::io::Error::last_os_error()))
    }

    /// An operation that failed, with its reason.
    fn io(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Self {
        Self::Other(format!("{what}: {error}"))
    }
}

type Result<T> = std::result::Result<T, Error>;

/// Runs the engine with the arguments after `program`, such as `runc-sandboxer oci`; the result is
/// the exit status. To be called before there is a second thread.
pub fn main(program: &str, arguments: Vec<String>) -> u8 {
    main_as(program, arguments, None)
}

/// For a process that forks others to call [`main_as`]: what each of them would do once is done.
pub fn warm() {
    // The C library reads the host's time zone before its first date.
    let _ = direct::now();
    // Who needs it is told what is wrong.
    let _ = kuasar_host::cgroup::Layout::detect_usual();
}

/// For a process that waits to become a container: touches what that will take, so that memory that
/// it shares with who has forked it is its own by then.
pub fn rehearse() {
    direct::rehearse();
}

/// A sibling of this process, which has one thread: in new namespaces and (cgroup v2) in a group from
/// its first moment. Answers 0 in it.
///
/// # Errors
/// The kernel's.
pub fn clone_sibling(
    namespaces: CloneFlags,
    group: Option<BorrowedFd<'_>>,
) -> std::io::Result<i32> {
    direct::clone_sibling(namespaces.bits(), group)
}

/// The pid of this process in the procfs that is mounted on `/proc`; in a new PID namespace it is
/// another one than the process itself sees.
///
/// # Errors
/// When there is no procfs.
pub fn own_pid() -> Result<i32> {
    direct::own_pid()
}

/// Becomes the container that `arguments` describe, whose process this one is already. Comes back
/// only when that cannot be, with an exit status; whoever waits has been told then.
pub fn enter(
    program: &str,
    arguments: Vec<String>,
    workload: Box<dyn Workload>,
    entered: Entered,
) -> u8 {
    let args = match Args::parse(arguments) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{program}: {error}");
            return 1;
        }
    };
    let log = args.log.as_deref().and_then(open_log);
    let (mut log, mut answer, error) = direct::run_entered(&args, log, workload, entered);
    report(log.as_mut(), &error.to_string());
    // Nobody waits any more when it cannot be written.
    let _ = answer.write_all(&[1]);
    1
}

/// The same for containers whose process becomes no program of their image, but `workload`.
pub fn main_as(program: &str, arguments: Vec<String>, workload: Option<Box<dyn Workload>>) -> u8 {
    let args = match Args::parse(arguments) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{program}: {error}");
            return 1;
        }
    };
    // Opened first: after an exec has joined the container's mount namespace the path would name
    // a file of the container.
    let mut log = args.log.as_deref().and_then(open_log);
    let result = match &args.command {
        Command::Create(create) => create::run(&args, create, log.as_mut(), workload),
        Command::Exec(exec) => exec::run(&args, exec),
        Command::Start => manage::start(&args),
        Command::Kill { signal, all } => manage::kill(&args, *signal, *all),
        Command::Delete { force } => manage::delete(&args, *force),
        Command::State => manage::state(&args),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            report(log.as_mut(), &error.to_string());
            1
        }
    }
}

fn open_log(path: &Path) -> Option<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).ok()
}

fn report(log: Option<&mut std::fs::File>, message: &str) {
    if let Some(file) = log {
        let line = serde_json::json!({ "level": "error", "msg": message });
        // Nobody is left to tell when the log cannot be written.
        let _ = writeln!(file, "{line}");
    }
    let _ = writeln!(std::io::stderr(), "{message}");
}
