//! The built-in engine as a process that stays: one exec after another, without a program to start for
//! each.
//!
//! A program's start is the larger part of an exec where the processor is slow, in a guest above all.
//! This process has one thread and waits for nobody but who asks: it makes an exec's process as a
//! sibling, answers its pid and the pipe that tells what became of it, and goes on. Who asks is its
//! parent, which reaps both. When the other end of its socket is closed, it ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use kuasar_host::packet::{self, receive, send};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::args::{Args, Command};
use super::exec::{self, Given, Home, Made};
use super::{Error, Result};

/// The socket's number.
pub const SOCKET: RawFd = 3;

/// Most bytes of an answer.
pub const ANSWER: usize = 16 << 10;
/// Most bytes of a reason in it.
const REASON: usize = 2000;

/// An exec is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its command line, without the program and `oci`.
    pub argv: Vec<String>,
    /// Which of its standard streams come with the packet; the others are `/dev/null`. Behind them comes
    /// the reading end of a pipe: the process becomes its program when a byte comes out of that, and ends
    /// when it is closed. By then it is known to who reaps it.
    pub given: [bool; 3],
}

/// The process's pid, with which a pipe comes that ends when it has become its program, or says why it
/// cannot; or why there is no process.
pub type Answer = std::result::Result<i32, String>;

/// Serves requests that come over [`SOCKET`] until its other end is closed, or none has come for as many
/// seconds as the first of the arguments says; the result is the exit status. To be called before there is
/// a second thread.
pub fn main(program: &str, mut arguments: impl Iterator<Item = String>) -> u8 {
    let idle = arguments.next().and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    match serve(idle) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{program}: {error}");
            1
        }
    }
}

fn serve(idle: Option<Duration>) -> Result<()> {
    // SAFETY: who has started us has put the socket there; it is open as long as this process.
    let socket = unsafe { BorrowedFd::borrow_raw(SOCKET) };
    exec::hide()?;
    let home = Home::open()?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    let null: OwnedFd = null.map_err(|error| Error::io("/dev/null", error))?.into();
    let mut buffer = vec![0; packet::MAX];
    while comes(socket, idle)? {
        let (request, fds) = match receive::<Request>(socket, &mut buffer) {
            Ok(received) => received,
            Err(packet::Error::Closed | packet::Error::Unread) => return Ok(()),
            Err(error) => return Err(Error::io("a request", error)),
        };
        let made = make(request, fds, &null, &home);
        // Also when it has failed: perhaps that was after the container's had been joined.
        home.back()?;
        let (answer, pipe) = match made {
            Ok(Made { pid, answer }) => (Answer::Ok(pid), Some(answer)),
            Err(error) => (Answer::Err(error.to_string().chars().take(REASON).collect()), None),
        };
        let fds: Vec<_> = pipe.iter().map(AsFd::as_fd).collect();
        send(socket, &answer, &fds).map_err(|error| Error::io("an answer", error))?;
    }
    Ok(())
}

/// Waits for a request; `false` when none comes for so long. One that crosses that is not read, which who
/// asks can tell.
fn comes(socket: BorrowedFd<'_>, idle: Option<Duration>) -> Result<bool> {
    let timeout = match idle {
        Some(idle) => PollTimeout::try_from(idle).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    match poll(&mut [PollFd::new(socket, PollFlags::POLLIN)], timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::Error::EINTR) => Ok(true),
        Err(error) => Err(Error::io("wait for a request", error)),
    }
}

fn make(request: Request, fds: Vec<OwnedFd>, null: &OwnedFd, home: &Home) -> Result<Made> {
    let args = Args::parse(request.argv)?;
    let Command::Exec(exec) = &args.command else {
        return Err(Error::Usage("only execs are served".into()));
    };
    let mut fds = fds.into_iter();
    let mut stream = |given: bool| match if given { fds.next() } else { None } {
        Some(fd) => Ok(fd),
        None => null.try_clone().map_err(|error| Error::io("/dev/null", error)),
    };
    let [stdin, stdout, stderr] = request.given;
    let streams = [stream(stdin)?, stream(stdout)?, stream(stderr)?];
    let go = fds.next().ok_or_else(|| Error::Usage("a request without its pipe".into()))?;
    exec::make(&args, exec, Some(Given { streams, go }), home)
}
