//! The event loop: who may talk to this process, and when everybody has their turn.

use std::ops::Range;

use sandbox_parent::protocol::{MAX_MESSAGE, MAX_NAME, Reader, Writer, op};

use super::memory::{self, Buffer, Table};
use super::reap::Reaper;
use super::relay::{CHUNK, Connection, Fate, GRACE_MS, flag};
use super::store::{Limits, Store};
use super::sys::{self, Fd, Passed};

// Epoll tokens: kind << 48 | generation << 32 | row.
const LISTENER: u64 = 1;
const SIGNALS: u64 = 2;
const CONTROL: u64 = 3;
const POD: u64 = 4;
const CLIENT: u64 = 5;
const PIDFD: u64 = 6;

/// A request; a reply; bytes that are being passed on. All in one mapping, which an idle process
/// gives back with one call.
const INPUT: Range<usize> = 0..MAX_MESSAGE;
const OUTPUT: Range<usize> = INPUT.end..INPUT.end + MAX_MESSAGE;
const PASSING: Range<usize> = OUTPUT.end..OUTPUT.end + CHUNK;

/// Control connections at the same time: the daemon and some that only look.
const CONTROLS: usize = 4;
/// Edge-triggered, both directions: see [`super::relay`].
const RELAYED: i32 = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
/// How often zombies of other parents are looked at.
const ZOMBIES_MS: i32 = 1000;

pub fn token(kind: u64, generation: u16, row: usize) -> u64 {
    kind << 48 | u64::from(generation) << 32 | row as u64
}

/// Everything that this process holds.
pub struct Parent {
    pub epoll: Fd,
    listener: Fd,
    signals: Fd,
    /// Closed for a moment when there are no more descriptors, to refuse a connection.
    spare: Fd,
    controls: [Fd; CONTROLS],
    /// Which control connection is the daemon's.
    daemon: Option<usize>,
    /// A reply that the daemon's socket had no room for: its length in `output`, and whether its
    /// descriptors are in `outgoing`.
    stuck: Option<usize>,
    pub outgoing: Outgoing,
    pub ready: bool,
    pub reaper: Reaper,
    pub store: Store,
    pub connections: Table<Connection>,
    pub limits: Limits,
    pub nofile: libc::rlimit,
    pub refused: u64,
    pub done: bool,
    generation: u16,
    /// There may be connections that no daemon has.
    pub offer: bool,
    /// The daemon's queue was full; it is told when there is room.
    crowded: bool,
    undecided: bool,
    again: bool,
    starved: bool,
    used: bool,
    /// When calls began to wait for a daemon.
    held_since: u32,
    /// [`INPUT`], [`OUTPUT`] and [`PASSING`].
    scratch: Buffer,
}

/// Descriptors that go with a reply.
#[derive(Default)]
pub struct Outgoing {
    pub fds: [Fd; 4],
    pub len: usize,
    /// They stay ours: they are kept and only duplicated by sending.
    pub borrowed: bool,
}

impl Outgoing {
    pub fn push(&mut self, fd: Fd) {
        if let Some(slot) = self.fds.get_mut(self.len) {
            *slot = fd;
            self.len += 1;
        }
    }

    fn list(&self) -> &[Fd] {
        self.fds.get(..self.len).unwrap_or_default()
    }

    pub fn clear(&mut self) {
        if !self.borrowed {
            self.fds.iter_mut().for_each(Fd::close);
        }
        *self = Self::default();
    }
}

impl Parent {
    /// `listener` is the control socket, listening and non-blocking; `nofile` the descriptor
    /// limit that programs get.
    pub fn new(listener: Fd, limits: Limits, nofile: libc::rlimit) -> Result<Self, i32> {
        // SAFETY: plain system calls; the signal set is initialised before use.
        let (epoll, signals, spare) = unsafe {
            let epoll = sys::own(libc::epoll_create1(libc::EPOLL_CLOEXEC))?;
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for s in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, s);
            }
            libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
            let signals = sys::own(libc::signalfd(-1, &set, flags))?;
            let spare =
                sys::own(libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC));
            (epoll, signals, spare?)
        };
        sys::epoll_add(epoll, listener, libc::EPOLLIN, token(LISTENER, 0, 0));
        sys::epoll_add(epoll, signals, libc::EPOLLIN, token(SIGNALS, 0, 0));
        Ok(Self {
            epoll,
            listener,
            signals,
            spare,
            controls: [Fd::NONE; CONTROLS],
            daemon: None,
            stuck: None,
            outgoing: Outgoing::default(),
            ready: false,
            reaper: Reaper::new(limits.watched)?,
            store: Store::new(&limits)?,
            connections: Table::new(limits.connections)?,
            limits,
            nofile,
            refused: 0,
            done: false,
            generation: 0,
            offer: false,
            crowded: false,
            undecided: false,
            again: false,
            starved: false,
            // The start has left its traces on the stack.
            used: true,
            held_since: 0,
            scratch: Buffer::new(PASSING.end)?,
        })
    }

    /// Serves until it is told to end.
    pub fn run(&mut self) {
        while !self.done {
            let timeout = if self.again || self.used {
                0
            } else if self.undecided {
                GRACE_MS as i32 / 2
            } else {
                let zombies = self.reaper.zombies.then_some(ZOMBIES_MS);
                // -1, for ever, when neither is due.
                [zombies, self.hold_left()].into_iter().flatten().min().unwrap_or(-1)
            };
            // SAFETY: zeroed events are valid and the array lives across the call.
            let mut events: [libc::epoll_event; 16] = unsafe { std::mem::zeroed() };
            // SAFETY: pointer and length describe `events`.
            let n = unsafe { libc::epoll_wait(self.epoll.get(), events.as_mut_ptr(), 16, timeout) };
            if n <= 0 && self.used && !self.again {
                // Nothing to do: an idle process keeps no buffers.
                self.used = false;
                if self.stuck.is_none() {
                    self.scratch.trim(0..PASSING.end);
                }
                memory::trim_stack();
                memory::trim_text();
            }
            for ev in events.iter().take(n.max(0) as usize) {
                let (kind, generation) = (ev.u64 >> 48, (ev.u64 >> 32) as u16);
                let row = (ev.u64 & 0xffff_ffff) as usize;
                match kind {
                    LISTENER => self.accept_control(),
                    SIGNALS => self.signal(),
                    CONTROL => self.control_event(row, ev.events),
                    POD => self.accept_client(row),
                    CLIENT => self.client_event(row, generation),
                    PIDFD => self.reaper.ended(row),
                    _ => {}
                }
            }
            self.catch_up();
            self.tell();
        }
    }

    fn signal(&mut self) {
        // One signal is 128 bytes (struct signalfd_siginfo); only that something came matters.
        let mut info = [0u8; 128];
        let mut terminate = false;
        while let Ok(128) = sys::read(self.signals, &mut info) {
            let signo = info.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b) as i32);
            terminate |= matches!(signo, Some(libc::SIGTERM | libc::SIGINT));
        }
        self.reaper.reap();
        // It outlives its daemon, so it ends on a signal only when nothing depends on it.
        self.done |= terminate && self.idle();
    }

    /// No new daemon: whoever connects from now on is refused and starts another process.
    pub fn end_listening(&mut self) {
        self.listener.close();
    }

    /// Whether nothing depends on this process.
    pub fn idle(&self) -> bool {
        self.store.kept() == 0 && self.store.pods().next().is_none() && !self.reaper.busy()
    }

    /// Accepts a connection of our own user; anything else is refused and counted.
    fn accept(&mut self, listener: Fd) -> Option<Fd> {
        match sys::accept(listener) {
            Ok(fd) if sys::same_user(fd) => return Some(fd),
            Ok(mut fd) => {
                fd.close();
                self.refused += 1;
            }
            Err(libc::EMFILE | libc::ENFILE) => {
                // The newest one is refused; otherwise it would be reported over and over.
                self.spare.close();
                if let Ok(mut fd) = sys::accept(listener) {
                    fd.close();
                }
                // SAFETY: opens a constant path.
                let fd =
                    unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
                self.spare = sys::own(fd).unwrap_or_default();
                self.refused += 1;
            }
            Err(_) => {}
        }
        None
    }

    fn accept_control(&mut self) {
        let Some(mut fd) = self.accept(self.listener) else {
            return;
        };
        let free = self.controls.iter().position(|c| !c.is_some());
        // When all are taken, the first that is not the daemon's makes room.
        let row = free.or_else(|| (0..CONTROLS).find(|i| Some(*i) != self.daemon));
        match row.and_then(|i| Some((i, self.controls.get_mut(i)?))) {
            Some((i, slot)) => {
                slot.close();
                *slot = fd;
                sys::epoll_add(self.epoll, fd, libc::EPOLLIN, token(CONTROL, 0, i));
            }
            None => fd.close(),
        }
    }

    /// The newest daemon wins: an older one is dead or about to be.
    pub fn take_over(&mut self, control: usize) {
        if self.daemon != Some(control) {
            self.lose_daemon();
            self.daemon = Some(control);
        }
        self.hold();
    }

    /// From now on calls wait for a daemon that serves, for as long as is allowed.
    fn hold(&mut self) {
        self.store.holding = self.limits.hold > 0;
        self.held_since = sys::now_ms();
    }

    /// Milliseconds until calls that wait for a daemon are refused; none when it serves.
    fn hold_left(&self) -> Option<i32> {
        let gone = sys::now_ms().wrapping_sub(self.held_since) as usize;
        let waits = self.store.holding && !self.ready;
        waits.then(|| self.limits.hold.saturating_sub(gone).min(1 << 30) as i32)
    }

    /// Whether this control connection is the daemon's.
    pub fn is_daemon(&self, control: usize) -> bool {
        self.daemon == Some(control)
    }

    fn lose_daemon(&mut self) {
        if let Some(fd) = self.daemon.take().and_then(|i| self.controls.get_mut(i)) {
            fd.close();
        }
        if self.stuck.take().is_some() {
            self.outgoing.clear();
        }
        self.ready = false;
        self.crowded = false;
        self.hold();
        self.reaper.untell();
        for i in self.connections.indices() {
            if let Some(c) = self.connections.get_mut(i) {
                c.orphan();
                self.turn(i);
            }
        }
    }

    fn close_control(&mut self, i: usize) {
        if self.daemon == Some(i) {
            self.lose_daemon();
        } else if let Some(fd) = self.controls.get_mut(i) {
            fd.close();
        }
    }

    fn control_event(&mut self, i: usize, events: u32) {
        let Some(fd) = self.controls.get(i).copied().filter(|f| f.is_some()) else {
            return;
        };
        if self.daemon == Some(i) && events & libc::EPOLLOUT as u32 != 0 {
            self.crowded = false;
            self.send_stuck();
            self.daemon_interest();
        }
        if self.daemon == Some(i) && self.stuck.is_some() {
            if events & (libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0 {
                self.lose_daemon();
            }
            return;
        }
        if events & !(libc::EPOLLOUT as u32) == 0 {
            return;
        }
        self.used = true;
        // SAFETY: the only slice of this buffer; it is not kept beyond this call.
        let buf = unsafe { self.scratch.part(&INPUT) };
        let mut passed = Passed::default();
        match sys::receive_packet(fd, buf, &mut passed) {
            Ok(0) => self.close_control(i),
            Ok(n) => {
                let mut m = Reader(buf.get(..n).unwrap_or_default());
                if let (Some(code), Some(seq)) = (m.u8(), m.u32()) {
                    self.request(i, code, seq, m, passed);
                }
            }
            Err(libc::EAGAIN | libc::EINTR) => {}
            Err(_) => self.close_control(i),
        }
    }

    fn request(&mut self, i: usize, code: u8, seq: u32, m: Reader<'_>, passed: Passed) {
        if self.stuck.is_some() {
            // The output buffer is taken; one that only looks comes again later.
            return self.close_control(i);
        }
        // SAFETY: the only slice of this buffer; nothing is stuck in it.
        let out = unsafe { self.scratch.part(&OUTPUT) };
        let mut w = Writer::fixed(out, op::REPLY, seq);
        let outcome = self.perform(i, code, m, passed, &mut w);
        if code == op::ACK {
            return;
        }
        let outcome = outcome.and_then(|()| match w.finish() {
            Some(_) => Ok(()),
            None => Err((libc::EMSGSIZE, sandbox_parent::protocol::stage::REQUEST)),
        });
        if let Err((errno, stage)) = outcome {
            self.outgoing.clear();
            w.truncate(5);
            w.u32(errno as u32).u8(stage);
        }
        let n = w.len();
        let Some(fd) = self.controls.get(i).copied() else {
            return;
        };
        match sys::send_packet(fd, w.finish().unwrap_or_default(), self.outgoing.list()) {
            Err(libc::EAGAIN) if self.daemon == Some(i) => {
                // Nothing more is read from it until this is sent.
                self.stuck = Some(n);
                self.daemon_interest();
            }
            Err(_) => {
                self.outgoing.clear();
                self.close_control(i);
            }
            Ok(()) => self.outgoing.clear(),
        }
    }

    fn send_stuck(&mut self) {
        let (Some(n), Some(fd)) = (self.stuck, self.daemon_fd()) else {
            return;
        };
        // SAFETY: the only slice of this buffer.
        let out = unsafe { self.scratch.part(&OUTPUT) };
        let sent = sys::send_packet(fd, out.get(..n).unwrap_or_default(), self.outgoing.list());
        if sent != Err(libc::EAGAIN) {
            self.stuck = None;
            self.outgoing.clear();
        }
    }

    fn daemon_fd(&self) -> Option<Fd> {
        self.daemon.and_then(|i| self.controls.get(i)).copied().filter(|f| f.is_some())
    }

    fn daemon_interest(&self) {
        let (Some(i), Some(fd)) = (self.daemon, self.daemon_fd()) else {
            return;
        };
        let events = match (self.stuck.is_some(), self.crowded) {
            (true, _) => libc::EPOLLOUT,
            (false, true) => libc::EPOLLIN | libc::EPOLLOUT,
            (false, false) => libc::EPOLLIN,
        };
        sys::epoll_change(self.epoll, fd, events, token(CONTROL, 0, i));
    }

    /// Listens for a pod's clients.
    pub fn listen(&mut self, pod: usize, listener: Fd) {
        // SAFETY: sets O_NONBLOCK on a descriptor of ours.
        unsafe { libc::fcntl(listener.get(), libc::F_SETFL, libc::O_NONBLOCK) };
        self.store.set_listener(pod, listener);
        sys::epoll_add(self.epoll, listener, libc::EPOLLIN, token(POD, 0, pod));
    }

    /// Stops listening; closes the pod's connections too, unless they may come to their end.
    pub fn unlisten(&mut self, pod: usize, drain: bool) {
        self.store.set_listener(pod, Fd::NONE);
        if !drain {
            for i in self.connections.indices() {
                if self.connections.get(i).is_some_and(|c| usize::from(c.pod) == pod) {
                    self.end(i);
                }
            }
        }
        self.drop_if_unused(pod);
    }

    fn drop_if_unused(&mut self, pod: usize) {
        let listens = self.store.listener(pod).is_some();
        if !listens && !self.connections.iter().any(|(_, c)| usize::from(c.pod) == pod) {
            self.store.remove_pod(pod);
        }
    }

    /// Polls a watched process that is not our child.
    pub fn follow(&self, row: usize, pidfd: Fd) {
        if pidfd.is_some() {
            sys::epoll_add(self.epoll, pidfd, libc::EPOLLIN | libc::EPOLLET, token(PIDFD, 0, row));
        }
    }

    fn accept_client(&mut self, pod: usize) {
        let Some(listener) = self.store.listener(pod) else {
            return;
        };
        let Some(mut fd) = self.accept(listener) else {
            return;
        };
        self.generation = self.generation.wrapping_add(1);
        let row = Connection::new(fd, pod as u16, self.generation);
        match self.connections.insert(row) {
            Some(i) => {
                let token = token(CLIENT, self.generation, i);
                sys::epoll_add(self.epoll, fd, RELAYED, token);
                self.offer = true;
            }
            None => {
                fd.close();
                self.refused += 1;
            }
        }
    }

    /// An event of a connection, unless its row has been taken by another one since.
    fn client_event(&mut self, i: usize, generation: u16) {
        if self.connections.get(i).is_some_and(|c| c.generation == generation) {
            self.turn(i);
        }
    }

    /// Gives a connection its turn.
    fn turn(&mut self, i: usize) {
        // SAFETY: the only slice of this buffer; it is not kept beyond this call.
        let buf = unsafe { self.scratch.part(&PASSING) };
        self.used = true;
        let Some(c) = self.connections.get_mut(i) else {
            return;
        };
        let fate = c.turn(&mut self.store, buf);
        let flags = c.flags;
        self.again |= flags & flag::AGAIN != 0;
        self.undecided |= flags & flag::UNDECIDED != 0;
        self.starved |= flags & flag::STARVED != 0;
        self.offer |= c.is_free_for_daemon();
        if fate == Fate::Ends {
            self.end(i);
        }
    }

    fn end(&mut self, i: usize) {
        let Some(mut c) = self.connections.remove(i) else {
            return;
        };
        c.close(&mut self.store);
        let pod = usize::from(c.pod);
        if self.store.listener(pod).is_none() {
            self.drop_if_unused(pod);
        }
    }

    /// What no event reports: turns that were cut short, calls that waited for a row, decisions
    /// that are due, zombies of other parents.
    fn catch_up(&mut self) {
        let room = self.store.pending.len() < self.limits.pending;
        if self.again || (self.starved && room) {
            let mask = if room { flag::AGAIN | flag::STARVED } else { flag::AGAIN };
            self.again = false;
            self.starved &= !room;
            for i in self.connections.indices() {
                if self.connections.get(i).is_some_and(|c| c.flags & mask != 0) {
                    self.turn(i);
                }
            }
        }
        if self.undecided {
            self.undecided = false;
            let now = sys::now_ms();
            for i in self.connections.indices() {
                let Some(c) = self.connections.get(i) else {
                    continue;
                };
                if c.hung_up(now) {
                    // The daemon is there: it closed this connection on purpose.
                    self.end(i);
                } else {
                    self.undecided |= c.flags & flag::UNDECIDED != 0;
                }
            }
        }
        if self.hold_left() == Some(0) {
            self.store.holding = false;
            for i in self.connections.indices() {
                if let Some(c) = self.connections.get_mut(i) {
                    c.give_up(&mut self.store);
                }
                self.turn(i);
            }
        }
        if self.reaper.zombies {
            self.reaper.look_again();
        }
    }

    /// Tells the daemon what it does not know yet: exits, and connections to take.
    fn tell(&mut self) {
        let Some(fd) = self.daemon_fd().filter(|_| !self.crowded && self.stuck.is_none()) else {
            return;
        };
        while self.reaper.news {
            let mut buf = [0u8; 64];
            let mut m = Reaper::event(&mut buf);
            let Some(i) = self.reaper.untold(&mut m) else {
                self.reaper.news = false;
                break;
            };
            if sys::send_packet(fd, m.finish().unwrap_or_default(), &[]).is_err() {
                return self.crowd();
            }
            self.reaper.told(i);
        }
        if !self.ready || !self.offer {
            return;
        }
        self.offer = false;
        for i in self.connections.indices() {
            let Some(c) = self.connections.get_mut(i).filter(|c| c.is_free_for_daemon()) else {
                continue;
            };
            let Ok((mut ours, mut theirs)) = sys::stream_pair() else {
                // Out of descriptors: the next event brings us back here.
                self.offer = true;
                return;
            };
            let parked = c.count(&self.store, super::store::pending::PARKED) > 0;
            let mut buf = [0u8; MAX_NAME + 16];
            let mut m = Writer::fixed(&mut buf, op::CONNECTION, 0);
            m.u8(u8::from(parked)).bytes(self.store.pod_name(c.pod.into()));
            let sent = sys::send_packet(fd, m.finish().unwrap_or_default(), &[theirs]);
            theirs.close();
            if sent.is_err() {
                ours.close();
                self.offer = true;
                return self.crowd();
            }
            c.attach(ours);
            let generation = c.generation;
            sys::epoll_add(self.epoll, ours, RELAYED, token(CLIENT, generation, i));
            self.turn(i);
        }
    }

    /// The daemon's queue is full: come back when it has room.
    fn crowd(&mut self) {
        self.crowded = true;
        self.daemon_interest();
    }
}
