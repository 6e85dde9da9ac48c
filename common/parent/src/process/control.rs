//! The event loop and the daemon's requests; the third duty, keep, is a list of names here.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use sandbox_parent::protocol::{MAX_MESSAGE, MAX_NAME, Reader, VERSION, Writer, op, stage};

use super::reap::Reaper;
use super::relay::{Connection, Fate, GRACE_MS};
use super::spawn::{self, Failure};
use super::sys;

// Kinds of epoll tokens: kind << 32 | index.
const LISTENER: u64 = 1;
const SIGNALS: u64 = 2;
const DAEMON: u64 = 3;
const POD: u64 = 4;
const CLIENT: u64 = 5;
const SERVER: u64 = 6;

struct Pod {
    name: Box<str>,
    listener: OwnedFd,
}

/// Everything that this process holds.
pub struct Parent {
    epoll: OwnedFd,
    listener: OwnedFd,
    signals: OwnedFd,
    daemon: Option<OwnedFd>,
    ready: bool,
    reaper: Reaper,
    kept: Vec<(Box<str>, OwnedFd)>,
    pods: Vec<Option<Pod>>,
    connections: Vec<Option<Box<Connection>>>,
    max_connections: usize,
    refused: u64,
    done: bool,
}

impl Parent {
    /// `listener` is the control socket, listening and non-blocking.
    pub fn new(listener: OwnedFd, max_connections: usize) -> Result<Self, i32> {
        // SAFETY: plain system calls; the signal set is initialised before use.
        let (epoll, signals) = unsafe {
            let epoll = sys::own(libc::epoll_create1(libc::EPOLL_CLOEXEC))?;
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for s in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, s);
            }
            libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
            (epoll, sys::own(libc::signalfd(-1, &set, flags))?)
        };
        let r = libc::EPOLLIN as u32;
        sys::epoll_set(&epoll, libc::EPOLL_CTL_ADD, listener.as_raw_fd(), r, LISTENER << 32);
        sys::epoll_set(&epoll, libc::EPOLL_CTL_ADD, signals.as_raw_fd(), r, SIGNALS << 32);
        Ok(Self {
            epoll,
            listener,
            signals,
            daemon: None,
            ready: false,
            reaper: Reaper::default(),
            kept: Vec::new(),
            pods: Vec::new(),
            connections: Vec::new(),
            max_connections,
            refused: 0,
            done: false,
        })
    }

    /// Serves until it is told to end.
    pub fn run(&mut self) {
        let buf = sys::buffer(MAX_MESSAGE);
        while !self.done {
            let undecided = self.connections.iter().flatten().any(|c| c.undecided.is_some());
            let timeout = if undecided { GRACE_MS as i32 / 2 } else { -1 };
            // SAFETY: zeroed events are valid and the array lives across the call.
            let mut events: [libc::epoll_event; 32] = unsafe { std::mem::zeroed() };
            // SAFETY: pointer and length describe `events`.
            let n = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), 32, timeout)
            };
            for ev in events.iter().take(n.max(0) as usize) {
                let (kind, index) = (ev.u64 >> 32, (ev.u64 & 0xffff_ffff) as usize);
                match kind {
                    LISTENER => self.accept_daemon(),
                    SIGNALS => self.signal(),
                    DAEMON => self.daemon_event(buf),
                    POD => self.accept_client(index),
                    CLIENT | SERVER => self.connection_event(index, kind, ev.events, buf),
                    _ => {}
                }
            }
            if undecided {
                self.decide();
            }
            self.tell();
        }
    }

    fn signal(&mut self) {
        // One signal is 128 bytes (struct signalfd_siginfo); only that something came matters.
        let mut info = [0u8; 128];
        let mut terminate = false;
        while let Ok(128) = sys::read(self.signals.as_raw_fd(), &mut info) {
            let signo = info.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b) as i32);
            terminate |= matches!(signo, Some(libc::SIGTERM | libc::SIGINT));
        }
        self.reaper.reap();
        // It outlives its daemon, so it ends on a signal only when nothing depends on it.
        if terminate && self.idle() {
            self.done = true;
        }
    }

    fn idle(&self) -> bool {
        self.kept.is_empty()
            && self.pods.iter().flatten().next().is_none()
            && self.reaper.watched.iter().all(|w| w.exit.is_some())
    }

    fn accept_daemon(&mut self) {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: null address pointers are allowed.
        let fd = unsafe {
            libc::accept4(self.listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
        };
        let Ok(fd) = sys::own(fd) else { return };
        if !same_user(&fd) {
            self.refused += 1;
            return;
        }
        // The newest daemon wins: the older one is dead or about to be.
        self.lose_daemon();
        let r = libc::EPOLLIN as u32;
        sys::epoll_set(&self.epoll, libc::EPOLL_CTL_ADD, fd.as_raw_fd(), r, DAEMON << 32);
        self.daemon = Some(fd);
    }

    fn lose_daemon(&mut self) {
        self.daemon = None;
        self.ready = false;
        for w in &mut self.reaper.watched {
            w.told = false;
        }
        for i in 0..self.connections.len() {
            if let Some(Some(c)) = self.connections.get_mut(i) {
                c.orphan();
                let fate = c.flush();
                self.settle(i, fate);
            }
        }
    }

    fn daemon_event(&mut self, buf: &mut [u8]) {
        let Some(fd) = self.daemon.as_ref().map(AsRawFd::as_raw_fd) else { return };
        let mut fds = Vec::new();
        match sys::receive_packet(fd, buf, &mut fds) {
            Ok(0) => self.lose_daemon(),
            Ok(n) => {
                let mut m = Reader(buf.get(..n).unwrap_or_default());
                if let (Some(code), Some(seq)) = (m.u8(), m.u32()) {
                    self.request(code, seq, &mut m, fds);
                }
            }
            Err(libc::EAGAIN | libc::EINTR) => {}
            Err(libc::EMSGSIZE) => self.refused += 1,
            Err(_) => self.lose_daemon(),
        }
    }

    fn reply(&self, seq: u32, outcome: Result<(Writer, Vec<RawFd>), Failure>) {
        let Some(d) = &self.daemon else { return };
        let failed = |errno: i32, stage: u8| {
            let mut w = Writer::new(op::REPLY, seq);
            w.u32(errno as u32).u8(stage);
            w
        };
        let (mut w, fds) = match outcome {
            Ok(ok) => ok,
            Err((errno, stage)) => (failed(errno, stage), Vec::new()),
        };
        if w.finish().is_none() {
            w = failed(libc::EMSGSIZE, stage::REQUEST);
        }
        let Some(data) = w.finish() else { return };
        // The daemon bounds its open requests, so its queue has room; wait rather than lose one.
        for _ in 0..100 {
            match sys::send_packet(d.as_raw_fd(), data, &fds) {
                Err(libc::EAGAIN) => {
                    let mut p =
                        libc::pollfd { fd: d.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
                    // SAFETY: one valid pollfd.
                    unsafe { libc::poll(&mut p, 1, 50) };
                }
                _ => return,
            }
        }
    }

    fn request(&mut self, code: u8, seq: u32, m: &mut Reader<'_>, mut fds: Vec<OwnedFd>) {
        let mut w = Writer::new(op::REPLY, seq);
        w.u32(0).u8(0);
        let bad = (libc::EINVAL, stage::REQUEST);
        let mut give: Vec<OwnedFd> = Vec::new();
        let outcome = (|| -> Result<(), Failure> {
            match code {
                op::HELLO => {
                    w.u32(VERSION).u32(std::process::id()).u8(u8::from(self.idle()));
                }
                op::SPAWN => {
                    let cookie = m.u64().ok_or(bad)?;
                    let pid = spawn::spawn(m, &fds)?;
                    w.u32(pid as u32).u64(self.reaper.next);
                    self.reaper.watch(cookie, pid, self.reaper.next);
                    give.push(sys::pidfd_open(pid).map_err(|e| (e, stage::FORK))?);
                }
                op::NAMESPACES => {
                    let made = spawn::namespaces(m, &fds)?;
                    w.u32(made.init as u32);
                    give.extend(made.fds);
                    if made.init > 0 {
                        give.push(sys::pidfd_open(made.init).map_err(|e| (e, stage::OPEN))?);
                    }
                }
                op::WATCH => {
                    let (Some(cookie), Some(pid), Some(since)) = (m.u64(), m.u32(), m.u64()) else {
                        return Err(bad);
                    };
                    self.reaper.reap();
                    self.reaper.watch(cookie, pid as i32, since);
                }
                op::ACK => self.reaper.forget(m.u64().ok_or(bad)?),
                op::KEEP => {
                    let name = name(m).ok_or(bad)?;
                    let fd = fds.pop().ok_or(bad)?;
                    match self.kept.iter_mut().find(|k| *k.0 == *name) {
                        Some(k) => k.1 = fd,
                        None => self.kept.push((name.into(), fd)),
                    }
                }
                op::FETCH => {
                    let name = name(m).ok_or(bad)?;
                    let kept = self.kept.iter().find(|k| *k.0 == *name);
                    let fd = &kept.ok_or((libc::ENOENT, stage::REQUEST))?.1;
                    give.push(spawn::duplicate(fd).map_err(|e| (e, stage::FDS))?);
                }
                op::FORGET => {
                    let prefix = name(m).ok_or(bad)?;
                    self.kept.retain(|k| !k.0.starts_with(prefix));
                }
                op::LIST_KEPT => {
                    let from = m.u32().ok_or(bad)? as usize;
                    let mut names = Writer::new(0, 0);
                    let mut n = 0u16;
                    for k in self.kept.iter().skip(from) {
                        if names.len() + k.0.len() > MAX_MESSAGE / 2 {
                            break;
                        }
                        names.bytes(k.0.as_bytes());
                        n += 1;
                    }
                    let next = from + usize::from(n);
                    let end = next >= self.kept.len();
                    w.u32(if end { 0 } else { next as u32 }).u16(n);
                    for k in self.kept.iter().skip(from).take(usize::from(n)) {
                        w.bytes(k.0.as_bytes());
                    }
                }
                op::LISTEN => {
                    let name = name(m).ok_or(bad)?;
                    self.unlisten(name);
                    self.listen(name, fds.pop().ok_or(bad)?);
                }
                op::UNLISTEN => self.unlisten(name(m).ok_or(bad)?),
                op::READY => self.ready = true,
                op::STATUS => {
                    let live = || self.connections.iter().flatten();
                    w.u32(self.kept.len() as u32)
                        .u32(self.reaper.watched.len() as u32)
                        .u32(self.pods.iter().flatten().count() as u32)
                        .u32(live().count() as u32)
                        .u32(live().map(|c| c.parked()).sum::<usize>() as u32)
                        .u64(self.refused);
                }
                op::SHUTDOWN => {
                    let force = m.u8().ok_or(bad)? != 0;
                    if !force && !self.idle() {
                        return Err((libc::EBUSY, stage::REQUEST));
                    }
                    self.done = true;
                }
                op::LIST_WATCHED => {
                    w.u16(self.reaper.watched.len().min(8000) as u16);
                    for x in self.reaper.watched.iter().take(8000) {
                        w.u64(x.cookie);
                    }
                }
                _ => return Err((libc::ENOSYS, stage::REQUEST)),
            }
            Ok(())
        })();
        if code != op::ACK {
            let raw = give.iter().map(AsRawFd::as_raw_fd).collect();
            self.reply(seq, outcome.map(|()| (w, raw)));
        }
    }

    fn listen(&mut self, name: &str, listener: OwnedFd) {
        let pod = Pod { name: name.into(), listener };
        let i = self.pods.iter().position(Option::is_none).unwrap_or(self.pods.len());
        let fd = pod.listener.as_raw_fd();
        // SAFETY: sets O_NONBLOCK on a descriptor of ours.
        unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) };
        match self.pods.get_mut(i) {
            Some(slot) => *slot = Some(pod),
            None => self.pods.push(Some(pod)),
        }
        let token = POD << 32 | i as u64;
        sys::epoll_set(&self.epoll, libc::EPOLL_CTL_ADD, fd, libc::EPOLLIN as u32, token);
    }

    fn unlisten(&mut self, name: &str) {
        let found = self.pods.iter().position(|p| p.as_ref().is_some_and(|p| *p.name == *name));
        let Some(i) = found else { return };
        if let Some(slot) = self.pods.get_mut(i) {
            *slot = None;
        }
        for c in &mut self.connections {
            if c.as_ref().is_some_and(|c| c.pod as usize == i) {
                *c = None;
            }
        }
    }

    fn accept_client(&mut self, pod: usize) {
        let Some(Some(p)) = self.pods.get(pod) else { return };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: null address pointers are allowed.
        let fd = unsafe {
            libc::accept4(p.listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
        };
        let Ok(fd) = sys::own(fd) else { return };
        let i = self
            .connections
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.connections.len());
        if i >= self.max_connections || !same_user(&fd) {
            self.refused += 1;
            return;
        }
        let token = CLIENT << 32 | i as u64;
        let raw = fd.as_raw_fd();
        let c = Some(Box::new(Connection::new(pod as u32, fd)));
        match self.connections.get_mut(i) {
            Some(slot) => *slot = c,
            None => self.connections.push(c),
        }
        sys::epoll_set(&self.epoll, libc::EPOLL_CTL_ADD, raw, libc::EPOLLIN as u32, token);
    }

    fn connection_event(&mut self, i: usize, kind: u64, events: u32, buf: &mut [u8]) {
        let Some(Some(c)) = self.connections.get_mut(i) else { return };
        // Small reads keep this process's memory small.
        let buf = buf.get_mut(..16 << 10).unwrap_or_default();
        let fate =
            if kind == CLIENT { c.client_event(events, buf) } else { c.daemon_event(events, buf) };
        self.settle(i, fate);
    }

    /// After any work on a connection: drop it, or poll for what it waits for now.
    fn settle(&mut self, i: usize, fate: Fate) {
        let Some(slot) = self.connections.get_mut(i) else { return };
        if fate == Fate::Ends {
            *slot = None;
            return;
        }
        let Some(c) = slot else { return };
        let (client, daemon) = c.interest();
        let (cfd, dfd) = c.fds();
        let token = |kind: u64| kind << 32 | i as u64;
        sys::epoll_set(&self.epoll, libc::EPOLL_CTL_MOD, cfd, client, token(CLIENT));
        if let Some(d) = dfd {
            sys::epoll_set(&self.epoll, libc::EPOLL_CTL_MOD, d, daemon, token(SERVER));
        }
    }

    /// Connections whose daemon end closed: is the daemon still there?
    fn decide(&mut self) {
        let now = sys::now_ms();
        for i in 0..self.connections.len() {
            let Some(Some(c)) = self.connections.get_mut(i) else { continue };
            let due = c.undecided.is_some_and(|t| now.saturating_sub(t) >= GRACE_MS);
            if due {
                // It is: it closed this connection on purpose.
                let _ = c.flush();
                self.settle(i, Fate::Ends);
            }
        }
    }

    /// Tells the daemon what it does not know yet: exits, and connections to take.
    fn tell(&mut self) {
        if self.daemon.is_none() {
            return;
        }
        while let Some((w, m)) = self.reaper.untold() {
            let (Some(d), Some(data)) = (&self.daemon, m.finish()) else { return };
            match sys::send_packet(d.as_raw_fd(), data, &[]) {
                Ok(()) => w.told = true,
                Err(_) => return self.retry_later(),
            }
        }
        if !self.ready {
            return;
        }
        for i in 0..self.connections.len() {
            let Some(Some(c)) = self.connections.get_mut(i) else { continue };
            if c.attached() || c.undecided.is_some() {
                continue;
            }
            let Some(Some(pod)) = self.pods.get(c.pod as usize) else { continue };
            let Ok((ours, theirs)) = sys::stream_pair() else { return };
            let mut m = Writer::new(op::CONNECTION, 0);
            m.u8(u8::from(c.parked() > 0)).bytes(pod.name.as_bytes());
            let (Some(d), Some(data)) = (&self.daemon, m.finish()) else { return };
            if sys::send_packet(d.as_raw_fd(), data, &[theirs.as_raw_fd()]).is_err() {
                return self.retry_later();
            }
            let token = SERVER << 32 | i as u64;
            sys::epoll_set(&self.epoll, libc::EPOLL_CTL_ADD, ours.as_raw_fd(), 0, token);
            c.attach(ours);
            let fate = if c.resume() { c.flush() } else { Fate::Ends };
            self.settle(i, fate);
        }
        self.daemon_interest(libc::EPOLLIN as u32);
    }

    /// The daemon's queue is full: come back when it has room.
    fn retry_later(&self) {
        self.daemon_interest((libc::EPOLLIN | libc::EPOLLOUT) as u32);
    }

    fn daemon_interest(&self, events: u32) {
        if let Some(d) = &self.daemon {
            sys::epoll_set(&self.epoll, libc::EPOLL_CTL_MOD, d.as_raw_fd(), events, DAEMON << 32);
        }
    }
}

fn name<'a>(m: &mut Reader<'a>) -> Option<&'a str> {
    m.str().filter(|s| !s.is_empty() && s.len() <= MAX_NAME)
}

/// Only our own user (and root) may talk to us.
fn same_user(fd: &OwnedFd) -> bool {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: 0 };
    let mut len = std::mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` and `len` describe a valid out buffer; geteuid cannot fail.
    unsafe {
        let r = libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        );
        r == 0 && (cred.uid == 0 || cred.uid == libc::geteuid())
    }
}
