//! The warm process that containers are forked from.
//!
//! It has one thread, and no other descriptor than its socket and standard error. For each request
//! it makes one process, as a sibling: its parent, sandbox-parent, is to reap that one, and this
//! process has nothing to wait for. Memory is shared copy-on-write: an engine that is set up, and
//! links to everything that WASI offers, cost a container nothing.
//!
//! Where it can, it makes the next process before that is asked for: the *spare*, which waits for the
//! request itself, at the same socket. What a fork costs is over then. The request may want what the
//! spare is not (other namespaces, a cgroup from its first moment): then the spare hands it on, and ends.
//! One of the two reads the socket at a time: this process waits until the spare has had its request,
//! and makes another when no request has come for a moment (`spare_after`): not while one container's
//! process is about to be ready and another is asked for.
//!
//! The new process has the layout of memory that all of them have. It is the price of not starting
//! a program: addresses learned in one container are those of all. What holds a container is the
//! kernel (namespaces, seccomp, no privileges), not that they are secret.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use kuasar_oci::builtin::workload::{Container, Filter, Workload};
use kuasar_oci::builtin::{self, Entered};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};
use wasm_common::wire::{self, Hello, Request};

use crate::profile;

/// An engine that is set up: every container has it in its memory.
pub trait Engine {
    /// What it says of itself. Touches what the first container would touch.
    fn hello(&self) -> Hello;

    /// What runs in one container.
    fn workload(&'static self) -> Box<dyn Workload>;
}

/// The socket's number.
const SOCKET: RawFd = 3;
/// What the process of a container may be made in.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);
/// What a spare may be made for.
const SPARE: CloneFlags = CloneFlags::CLONE_NEWNS.union(CloneFlags::CLONE_NEWPID);
/// Above every number that a new process's descriptors get.
const ASIDE: RawFd = 128;

/// Sets the engine up by `make`, and serves requests until the sandboxer's end is closed. `program`
/// is what messages call it. [`wire::SPARE_AFTER`] in the environment is for how many milliseconds no request
/// has come when a spare is made; none is for 0.
///
/// # Errors
/// When the engine cannot be set up (the sandboxer is told, too), or the sandboxer not be told.
pub fn run<E: Engine + 'static>(
    program: &'static str,
    make: impl FnOnce() -> Result<E, String>,
) -> Result<(), String> {
    let quiet = std::env::var(wire::SPARE_AFTER).ok().and_then(|ms| ms.parse().ok());
    let quiet: u16 = quiet.unwrap_or(wire::SPARE_AFTER_MS);
    // SAFETY: sandbox-parent has put the socket there; it is open as long as this process.
    let socket = unsafe { BorrowedFd::borrow_raw(SOCKET) };
    name("wasm-zygote");
    let send = |error: wire::Error| error.to_string();
    // Never dropped: it is in every container until its end.
    let engine: &'static E = match make() {
        Ok(engine) => Box::leak(Box::new(engine)),
        Err(reason) => {
            wire::send(socket, &wire::Greeting::Err(reason.clone()), &[]).map_err(send)?;
            return Err(reason);
        }
    };
    let hello = engine.hello();
    let filter: &'static Filter = match profile::filter() {
        Ok(filter) => Box::leak(Box::new(filter)),
        Err(reason) => {
            wire::send(socket, &wire::Greeting::Err(reason.clone()), &[]).map_err(send)?;
            return Err(reason);
        }
    };
    let room = builtin::make_room().map_err(std::io::Error::other).and_then(|fd| aside(&fd));
    // Without it mount namespaces are copies of the host's.
    let room = room.map_err(|error| eprintln!("{program}: {error}")).ok();
    let warm = Warm { program, engine, filter, room };
    builtin::warm();
    wire::send(socket, &wire::Greeting::Ok(hello), &[]).map_err(send)?;
    let buffer = vec![0; wire::MAX];
    let mut zygote = Zygote { warm, socket, buffer, quiet, spare: None, wanted: None };
    while zygote.turn() {}
    Ok(())
}

/// What a spare says to who has made it.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    /// It is becoming what was asked for.
    Taken,
    /// It is not what was asked for, and ends.
    Other(Request),
}

/// The warm process itself.
struct Zygote<E: 'static> {
    warm: Warm<E>,
    socket: BorrowedFd<'static>,
    buffer: Vec<u8>,
    /// Milliseconds without a request before a spare is made; 0 for none.
    quiet: u16,
    /// The connection to the spare.
    spare: Option<OwnedFd>,
    /// New namespaces of the next spare.
    wanted: Option<CloneFlags>,
}

impl<E: Engine> Zygote<E> {
    /// Waits for one thing and does it; `false` when the sandboxer's end is closed.
    fn turn(&mut self) -> bool {
        if let Some(spare) = &self.spare {
            let word = wire::receive::<Word>(spare.as_fd(), &mut self.buffer);
            self.spare = None;
            match word {
                Ok((Word::Taken, _)) => {}
                Ok((Word::Other(request), fds)) => self.make(request, fds),
                // It has ended, and another one might, too.
                Err(_) => self.wanted = None,
            }
            return true;
        }
        if let Some(namespaces) = self.wanted.filter(|_| self.is_quiet()) {
            self.make_spare(namespaces);
            return true;
        }
        match wire::receive::<Request>(self.socket, &mut self.buffer) {
            Ok((request, fds)) => self.make(request, fds),
            Err(wire::Error::Closed | wire::Error::Unread) => return false,
            // The caller sees its pipe end.
            Err(error) => eprintln!("{}: a request: {error}", self.warm.program),
        }
        true
    }

    fn is_quiet(&self) -> bool {
        poll(&mut [PollFd::new(self.socket, PollFlags::POLLIN)], PollTimeout::from(self.quiet))
            == Ok(0)
    }

    fn make(&mut self, request: Request, fds: Vec<OwnedFd>) {
        self.wanted = spare_for(&request).filter(|_| self.quiet > 0);
        match fork(&request, &fds) {
            Ok(0) => child(&self.warm, request, fds),
            Ok(_) => {}
            // The pipe closes with the descriptors: that tells.
            Err(error) => eprintln!("{}: a process: {error}", self.warm.program),
        }
    }

    /// Without one the next request is served all the same.
    fn make_spare(&mut self, namespaces: CloneFlags) {
        let made =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(std::io::Error::from)
                .and_then(|(ours, theirs)| {
                    let pid = builtin::clone_sibling(at_fork(namespaces), None)?;
                    Ok((pid, ours, theirs))
                });
        match made {
            Ok((0, ours, theirs)) => {
                drop(ours);
                self.be_spare(theirs, namespaces)
            }
            Ok((_, ours, _)) => self.spare = Some(ours),
            Err(error) => {
                self.wanted = None;
                eprintln!("{}: a spare process: {error}", self.warm.program);
            }
        }
    }

    /// Waits for a request, and becomes what it asks for; never returns.
    fn be_spare(&mut self, zygote: OwnedFd, namespaces: CloneFlags) -> ! {
        name("wasm-spare");
        builtin::rehearse();
        if let Ok((request, fds)) = wire::receive::<Request>(self.socket, &mut self.buffer) {
            // Nobody makes the next one if it cannot be told; the process for this one is there.
            if spare_for(&request) != Some(namespaces) {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                if let Err(error) = wire::send(zygote.as_fd(), &Word::Other(request), &fds) {
                    eprintln!("{}: hand a request on: {error}", self.warm.program);
                }
                exit(0)
            }
            let _ = wire::send(zygote.as_fd(), &Word::Taken, &[]);
            drop(zygote);
            child(&self.warm, request, fds)
        }
        exit(1)
    }
}

/// The new namespaces for which a spare would be what was asked for.
fn spare_for(request: &Request) -> Option<CloneFlags> {
    let entry = request.entry.filter(|entry| !entry.grouped)?;
    CloneFlags::from_bits(entry.namespaces).filter(|flags| SPARE.contains(*flags))
}

/// What every process finds that is forked.
struct Warm<E: 'static> {
    program: &'static str,
    engine: &'static E,
    filter: &'static Filter,
    /// What mount namespaces are made of.
    room: Option<OwnedFd>,
}

/// A workload of the engine's, with the filter that all of them have.
struct Filtered {
    workload: Box<dyn Workload>,
    filter: &'static Filter,
}

impl Workload for Filtered {
    fn filter(&self) -> Option<&Filter> {
        Some(self.filter)
    }

    fn prepare(&mut self, container: &Container<'_>) -> Result<(), String> {
        self.workload.prepare(container)
    }

    fn run(self: Box<Self>) -> String {
        self.workload.run()
    }
}

/// What `ps` and `top` call this process; at most 15 bytes of it.
pub fn name(name: &str) {
    let bytes: Vec<u8> = name.bytes().filter(|byte| *byte != 0).take(15).collect();
    if let Ok(text) = std::ffi::CString::new(bytes) {
        // SAFETY: a valid string, which the kernel copies.
        unsafe { libc::prctl(libc::PR_SET_NAME, text.as_ptr()) };
    }
}

/// A sibling of this process, where it is to be; 0 in it.
fn fork(request: &Request, fds: &[OwnedFd]) -> std::io::Result<i32> {
    let Some(entry) = request.entry else {
        return builtin::clone_sibling(CloneFlags::empty(), None);
    };
    let namespaces = CloneFlags::from_bits(entry.namespaces)
        .filter(|flags| NAMESPACES.contains(*flags))
        .ok_or(std::io::ErrorKind::InvalidInput)?;
    let group = fds.iter().rev().nth(1).filter(|_| entry.grouped).map(AsFd::as_fd);
    builtin::clone_sibling(at_fork(namespaces), group)
}

/// Which of these namespaces a process is made in. Its mount namespace it makes itself, when it has from
/// the host's what it needs.
fn at_fork(namespaces: CloneFlags) -> CloneFlags {
    namespaces - CloneFlags::CLONE_NEWNS
}

/// Becomes what was asked for; never returns.
fn child<E: Engine>(warm: &Warm<E>, request: Request, mut fds: Vec<OwnedFd>) -> ! {
    let status = match fds.pop() {
        Some(answer) => serve(warm, request, fds, answer),
        None => 1,
    };
    exit(i32::from(status))
}

fn exit(status: i32) -> ! {
    // SAFETY: ends this process without running anything of the zygote's.
    unsafe { libc::_exit(status) }
}

fn serve<E: Engine>(
    warm: &Warm<E>,
    request: Request,
    mut fds: Vec<OwnedFd>,
    answer: OwnedFd,
) -> u8 {
    let go = if request.entry.is_some() { fds.pop() } else { None };
    let mut aside = vec![answer];
    aside.extend(go.filter(|_| request.entry.is_some_and(|entry| !entry.grouped)));
    let Ok(mut aside) = place(&request, fds, aside) else { return 1 };
    let go = if aside.len() > 1 { aside.pop() } else { None };
    let (Some(answer), Ok(pid)) = (aside.pop(), builtin::own_pid()) else { return 1 };
    let tell = |bytes: &[u8]| nix::unistd::write(&answer, bytes).is_ok();
    // Nobody waits any more when it cannot be told.
    if !tell(&pid.to_le_bytes()) {
        return 1;
    }
    let workload = Box::new(Filtered { workload: warm.engine.workload(), filter: warm.filter });
    // SAFETY: a plain call.
    unsafe { libc::umask(0o022) };
    if let Some(entry) = request.entry {
        let entered = Entered {
            namespaces: CloneFlags::from_bits_truncate(entry.namespaces),
            room: warm.room.as_ref().and_then(|room| room.try_clone().ok()),
            answer: answer.into(),
            go: go.map(Into::into),
        };
        return builtin::enter(warm.program, request.argv, workload, entered);
    }
    // SAFETY: a plain call.
    unsafe { libc::setsid() };
    let status = builtin::main_as(warm.program, request.argv, Some(workload));
    tell(&[status]);
    status
}

/// Puts descriptors where the request has them, `others` where they are in nobody's way, and closes
/// all that are neither.
fn place(
    request: &Request,
    fds: Vec<OwnedFd>,
    others: Vec<OwnedFd>,
) -> std::io::Result<Vec<OwnedFd>> {
    let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null")?.into();
    let mut given = fds.into_iter();
    // First out of the way, so that no one is overwritten before it is used.
    let mut moved = Vec::new();
    for wanted in &request.given {
        let fd = if *wanted { given.next() } else { None };
        moved.push(aside(fd.as_ref().unwrap_or(&null))?);
    }
    let kept = others.iter().map(aside).collect::<std::io::Result<Vec<_>>>()?;
    // Their first numbers may be among those that are closed below.
    drop((given, null, others));
    for (number, fd) in (0..).zip(&moved) {
        // SAFETY: what has this number is the socket or one of the received descriptors; none of
        // them is used any more. The owners of the latter have been dropped above.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    // SAFETY: closes what nobody uses: behind those that were placed, and before those aside.
    unsafe {
        let first = libc::c_uint::try_from(moved.len()).unwrap_or(3).max(3);
        libc::syscall(libc::SYS_close_range, first, ASIDE - 1, 0);
    }
    Ok(kept)
}

/// A duplicate with a high number.
fn aside(fd: &OwnedFd) -> std::io::Result<OwnedFd> {
    // SAFETY: duplicates a valid descriptor.
    let new = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, ASIDE) };
    if new < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
