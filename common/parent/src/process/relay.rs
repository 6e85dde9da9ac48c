//! The fourth duty: relay. containerd's connections to the pods' sockets end here.
//!
//! A dropped task connection turns every container of the pod into EXITED/255, and containerd's
//! client never dials again. So this process accepts the connection and gives the daemon one end
//! of a socket pair, on which it passes ttrpc frames in both directions. Of a frame it reads the
//! ten-byte header and, of a small request, the method name.
//!
//! **Nothing is stored on the way.** Bytes are looked at where they are, in the receive buffer of
//! the socket they came by (`MSG_PEEK`), sent on, and only then taken: exactly as many as the
//! other side has accepted. So a slow side holds up the fast one by the kernel's own buffers, and
//! a connection costs a row of 32 bytes. Sockets are polled edge-triggered, because an incomplete
//! frame stays where it is.
//!
//! * **To the client** a frame is begun only when all of it is in our hands (up to [`WHOLE`]
//!   bytes; the daemon's death does not take away what it has written). Larger ones are passed on
//!   as they come; should the daemon die within one, it is filled up with zero bytes, which
//!   spoils that one answer and not the connection.
//! * **Pending calls** are rows of [`Pending`], a list per connection. Of `Wait`, `WaitSandbox`,
//!   `Connect` and `Stream` the request itself is kept: while the daemon is away these are *parked*,
//!   and put to the next one. So are calls that only read, unless no daemon comes in time. Any
//!   other call that the dead daemon had taken and not answered is
//!   answered Unavailable: it may have been done. One that comes while no daemon is there waits
//!   in its socket for the next one ([`Store::holding`]), and with it whatever the client sends
//!   after it; only when none has come in time, it is answered Unavailable as well. (An engine
//!   that is refused does not clean up: what a failed Start has left it gives up for good.) If a
//!   stream's client has had the daemon's first data frame, its acknowledgement, the second one
//!   is dropped. What a client had sent on a stream and the dead daemon had not read is lost.
//! * **Is it dead, or did it hang up?** A daemon's death closes its sockets one by one. When its
//!   end of a connection closes, the decision waits for [`GRACE_MS`]: if the control socket is
//!   still there then, it hung up on purpose and the client is closed as well.

use sandbox_parent::frame::{self, Call, HEADER, Header, MAX_BODY};

use super::memory::Row;
use super::store::{Pending, Store, pending};
use super::sys::{self, Fd};

/// Up to this size a frame is passed on only when it is complete.
pub const WHOLE: usize = 64 << 10;
/// Requests up to this size can be parked.
const PARKABLE: usize = 1024;
/// How long a closed connection waits for the control socket to close, too.
pub const GRACE_MS: u32 = 200;
/// Bytes that are passed on at once.
pub const CHUNK: usize = 16 << 10;
/// Steps that one connection may take before others have their turn.
const TURN: usize = 64;

/// One direction: what is left of the frame that is being passed on.
#[derive(Clone, Copy)]
#[repr(C)]
struct Flow {
    left: u32,
}

/// A client's connection.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Connection {
    pub client: Fd,
    daemon: Fd,
    up: Flow,
    down: Flow,
    /// When the daemon's end was found closed.
    since: u32,
    pub pod: u16,
    /// First pending call, plus one.
    first: u16,
    pub flags: u16,
    /// Tells apart the connections that have used this row; part of the epoll token.
    pub generation: u16,
}

/// [`Connection::flags`]
pub mod flag {
    /// The rest of the client's frame is thrown away.
    pub const DISCARD_UP: u16 = 1;
    /// The rest of the daemon's frame is thrown away.
    pub const DISCARD_DOWN: u16 = 2;
    /// The daemon's end is closed, and it is not yet known why.
    pub const UNDECIDED: u16 = 4;
    /// The daemon is dead; what it has written still goes to the client.
    pub const ORPHANED: u16 = 8;
    /// Parked calls have to be put to the daemon before anything else.
    pub const REPLAY: u16 = 16;
    /// The client sends no more.
    pub const CLIENT_DONE: u16 = 32;
    /// It has not come to an end with its turn.
    pub const AGAIN: u16 = 64;
    /// It waits for a row in the table of pending calls.
    pub const STARVED: u16 = 128;
    /// Answers are owed.
    pub const OWED: u16 = 256;
    /// The client's frame is stream data that nothing else holds, and nothing of it is sent yet.
    pub const UNTOUCHED: u16 = 512;
    /// The daemon takes nothing more; why, shows when its end is read.
    pub const BROKEN: u16 = 1024;
}

// SAFETY: plain integers; a connection has a client.
unsafe impl Row for Connection {
    fn is_free(&self) -> bool {
        !self.client.is_some()
    }
}

/// What a step came to.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Step {
    /// Something has moved: go on.
    Moved,
    /// It waits for a socket.
    Waits,
    /// The connection is over.
    Ends,
}

/// What becomes of a client's frame.
enum Way {
    Forward,
    Discard,
    /// It stays where it is for now.
    Hold,
}

/// What became of a connection after its turn.
#[derive(PartialEq, Eq, Clone, Copy)]
pub enum Fate {
    Lives,
    Ends,
}

impl Connection {
    /// A connection that no daemon serves yet.
    pub fn new(client: Fd, pod: u16, generation: u16) -> Self {
        let none = Flow { left: 0 };
        let daemon = Fd::NONE;
        Self { client, daemon, up: none, down: none, since: 0, pod, first: 0, flags: 0, generation }
    }

    fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn set(&mut self, flag: u16, on: bool) {
        if on {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
    }

    /// Whether it can be offered to a daemon.
    pub fn is_free_for_daemon(&self) -> bool {
        !self.daemon.is_some()
    }

    /// Whether the daemon hung up on it at least [`GRACE_MS`] ago.
    pub fn hung_up(&self, now: u32) -> bool {
        self.is(flag::UNDECIDED) && now.wrapping_sub(self.since) >= GRACE_MS
    }

    /// A daemon takes the connection.
    pub fn attach(&mut self, end: Fd) {
        self.daemon = end;
        self.set(flag::REPLAY, true);
    }

    /// The daemon is dead or has been replaced.
    pub fn orphan(&mut self) {
        if self.daemon.is_some() {
            // An older daemon that still lives must not go on with it; what it has written stays.
            sys::shutdown(self.daemon, libc::SHUT_RDWR);
            self.set(flag::ORPHANED, true);
            self.set(flag::UNDECIDED, false);
        }
    }

    /// Closes everything.
    pub fn close(&mut self, store: &mut Store) {
        while let Some(i) = self.first.checked_sub(1) {
            self.drop_pending(store, usize::from(i));
        }
        self.client.close();
        self.daemon.close();
    }

    /// Passes on what can be passed on.
    pub fn turn(&mut self, store: &mut Store, buf: &mut [u8]) -> Fate {
        self.set(flag::AGAIN | flag::STARVED, false);
        for _ in 0..TURN {
            let mut moved = false;
            for step in [Self::down, Self::answer, Self::replay, Self::up] {
                match step(self, store, buf) {
                    Step::Moved => moved = true,
                    Step::Waits => {}
                    Step::Ends => return Fate::Ends,
                }
            }
            if !moved {
                return Fate::Lives;
            }
        }
        self.set(flag::AGAIN, true);
        Fate::Lives
    }

    /// Daemon to client.
    fn down(&mut self, store: &mut Store, buf: &mut [u8]) -> Step {
        if !self.daemon.is_some() {
            return self.fill_up(buf);
        }
        if self.is(flag::UNDECIDED) {
            return Step::Waits;
        }
        let want = if self.down.left == 0 { CHUNK } else { (self.down.left as usize).min(CHUNK) };
        let Some(buf) = buf.get_mut(..want) else {
            return Step::Ends;
        };
        let n = match sys::peek(self.daemon, buf) {
            Ok(0) => return self.daemon_closed(store),
            Ok(n) => n,
            Err(libc::EAGAIN | libc::EINTR) => return Step::Waits,
            Err(_) => return self.daemon_closed(store),
        };
        if self.down.left == 0 {
            let head = buf.get(..n).unwrap_or_default();
            let Some(h) = Header::parse(head) else {
                return self.incomplete_down(store);
            };
            let total = HEADER + h.len;
            if h.len > MAX_BODY {
                return Step::Ends;
            }
            if n < total && total <= WHOLE && sys::queued(self.daemon) < total {
                return self.incomplete_down(store);
            }
            let swallow = self.daemon_frame(store, &h);
            self.down.left = total as u32;
            self.set(flag::DISCARD_DOWN, swallow);
        }
        let n = n.min(self.down.left as usize);
        let sent = if self.is(flag::DISCARD_DOWN) {
            n
        } else {
            match sys::send(self.client, buf.get(..n).unwrap_or_default()) {
                Ok(sent) => sent,
                Err(libc::EAGAIN | libc::EINTR) => return Step::Waits,
                Err(_) => return Step::Ends,
            }
        };
        self.down.left -= sent as u32;
        consume(self.daemon, buf, sent)
    }

    /// The daemon has died within a long frame.
    fn fill_up(&mut self, buf: &mut [u8]) -> Step {
        if self.down.left == 0 {
            return Step::Waits;
        }
        let n = (self.down.left as usize).min(CHUNK);
        let Some(zeros) = buf.get_mut(..n) else {
            return Step::Ends;
        };
        zeros.fill(0);
        match sys::send(self.client, zeros) {
            Ok(sent) => {
                self.down.left -= sent as u32;
                Step::Moved
            }
            Err(libc::EAGAIN | libc::EINTR) => Step::Waits,
            Err(_) => Step::Ends,
        }
    }

    /// A frame's end is missing: will it come?
    fn incomplete_down(&mut self, store: &mut Store) -> Step {
        if self.is(flag::ORPHANED) || sys::peer_closed(self.daemon) {
            return self.daemon_closed(store);
        }
        Step::Waits
    }

    fn daemon_closed(&mut self, store: &mut Store) -> Step {
        if !self.is(flag::ORPHANED) {
            self.set(flag::UNDECIDED, true);
            self.since = sys::now_ms();
            return Step::Waits;
        }
        // All that it has written is with the client. Now what it owes is settled.
        self.daemon.close();
        self.set(flag::ORPHANED | flag::REPLAY | flag::BROKEN, false);
        if self.up.left > 0 {
            self.set(flag::DISCARD_UP, true);
        }
        if self.is(flag::DISCARD_DOWN) {
            self.down.left = 0;
            self.set(flag::DISCARD_DOWN, false);
        }
        let holding = store.holding;
        let mut at = self.first;
        while let Some(i) = at.checked_sub(1) {
            let i = usize::from(i);
            let Some(p) = store.pending.get_mut(i) else {
                break;
            };
            at = p.next;
            let streaming = p.flags & pending::STREAMING != 0;
            let parkable = p.flags & pending::PARKABLE != 0 && (!streaming || !p.init.is_empty());
            let late = p.flags & pending::READ != 0 && !holding;
            if p.flags & pending::DAEMON_CLOSED != 0 {
                self.drop_pending(store, i);
            } else if parkable && !late {
                p.flags = (p.flags | pending::PARKED) & !pending::SWALLOW;
            } else {
                p.flags |= pending::OWED;
                self.set(flag::OWED, true);
            }
        }
        Step::Moved
    }

    /// No daemon has come in time: what only reads is refused, as all that is held.
    pub fn give_up(&mut self, store: &mut Store) {
        let late = pending::READ | pending::PARKED;
        let mut at = self.first;
        while let Some(p) = at.checked_sub(1).and_then(|i| store.pending.get_mut(usize::from(i))) {
            at = p.next;
            if p.flags & late == late {
                p.flags = (p.flags & !pending::PARKED) | pending::OWED;
                self.set(flag::OWED, true);
            }
        }
    }

    /// Books a frame of the daemon; says whether it is dropped.
    fn daemon_frame(&mut self, store: &mut Store, h: &Header) -> bool {
        let Some(i) = self.find(store, h.stream) else {
            return false;
        };
        let Some(p) = store.pending.get_mut(i) else {
            return false;
        };
        if h.kind == frame::RESPONSE {
            self.drop_pending(store, i);
            return false;
        }
        let closes = h.flags & frame::REMOTE_CLOSED != 0;
        let swallow = p.flags & pending::SWALLOW != 0 && !closes;
        p.flags = (p.flags | pending::ACKNOWLEDGED) & !pending::SWALLOW;
        if closes {
            p.flags |= pending::DAEMON_CLOSED;
            if p.flags & pending::CLIENT_CLOSED != 0 {
                self.drop_pending(store, i);
            }
        }
        swallow
    }

    /// Answers Unavailable where it is owed.
    fn answer(&mut self, store: &mut Store, buf: &mut [u8]) -> Step {
        // Never into the middle of another frame.
        if !self.is(flag::OWED) || self.down.left > 0 {
            return Step::Waits;
        }
        let mut at = self.first;
        while let Some(i) = at.checked_sub(1) {
            let i = usize::from(i);
            let Some(p) = store.pending.get(i) else { break };
            at = p.next;
            if p.flags & pending::OWED == 0 {
                continue;
            }
            let n = frame::unavailable(p.stream, buf);
            match sys::send(self.client, buf.get(..n).unwrap_or_default()) {
                // So small a message is taken whole or not at all (one socket buffer).
                Ok(_) => self.drop_pending(store, i),
                Err(libc::EAGAIN | libc::EINTR) => return Step::Waits,
                Err(_) => return Step::Ends,
            }
        }
        self.set(flag::OWED, false);
        Step::Moved
    }

    /// Puts parked calls to the daemon.
    fn replay(&mut self, store: &mut Store, buf: &mut [u8]) -> Step {
        if !self.is(flag::REPLAY) || !self.daemon.is_some() {
            return Step::Waits;
        }
        let mut at = self.first;
        while let Some(i) = at.checked_sub(1) {
            let Some(p) = store.pending.get(usize::from(i)) else {
                break;
            };
            at = p.next;
            if p.flags & pending::PARKED == 0 {
                continue;
            }
            let (request, init) = (store.get(p.frame), store.get(p.init));
            // The client has closed its side, and its first data frame did not say so.
            let closed = init.get(9).is_some_and(|f| f & frame::REMOTE_CLOSED == 0)
                && p.flags & pending::CLIENT_CLOSED != 0;
            let closing = frame::closing(p.stream);
            let closing: &[u8] = if closed { &closing } else { &[] };
            let n = request.len() + init.len() + closing.len();
            let Some(out) = buf.get_mut(..n) else {
                return Step::Ends;
            };
            for (to, from) in out.iter_mut().zip(request.iter().chain(init).chain(closing)) {
                *to = *from;
            }
            match sys::send(self.daemon, out) {
                Ok(_) => {}
                // A closed end shows when it is read.
                Err(_) => return Step::Waits,
            }
            if let Some(p) = store.pending.get_mut(usize::from(i)) {
                p.flags &= !pending::PARKED;
                if p.flags & pending::ACKNOWLEDGED != 0 {
                    p.flags |= pending::SWALLOW;
                }
            }
        }
        self.set(flag::REPLAY, false);
        if self.is(flag::CLIENT_DONE) {
            sys::shutdown(self.daemon, libc::SHUT_WR);
        }
        Step::Moved
    }

    /// Client to daemon.
    fn up(&mut self, store: &mut Store, buf: &mut [u8]) -> Step {
        if self.is(flag::CLIENT_DONE) {
            return if sys::peer_gone(self.client) { Step::Ends } else { Step::Waits };
        }
        let discard = self.up.left > 0 && self.is(flag::DISCARD_UP);
        let busy = self.is(flag::UNDECIDED | flag::ORPHANED | flag::REPLAY | flag::BROKEN);
        if busy && !discard {
            // A client that is gone altogether ends its connection all the same.
            return if sys::peer_gone(self.client) { Step::Ends } else { Step::Waits };
        }
        let want = if self.up.left == 0 { CHUNK } else { (self.up.left as usize).min(CHUNK) };
        let Some(buf) = buf.get_mut(..want) else {
            return Step::Ends;
        };
        let n = match sys::peek(self.client, buf) {
            Ok(0) => return self.client_done(),
            Ok(n) => n,
            Err(libc::EAGAIN | libc::EINTR) => return Step::Waits,
            Err(_) => return Step::Ends,
        };
        if self.up.left == 0 {
            let head = buf.get(..n).unwrap_or_default();
            let Some(h) = Header::parse(head) else {
                return self.incomplete_up();
            };
            if h.len > MAX_BODY {
                return Step::Ends;
            }
            let small = h.len <= PARKABLE;
            let whole = head.get(..HEADER + h.len);
            if small && whole.is_none() {
                return self.incomplete_up();
            }
            self.set(flag::UNTOUCHED, false);
            let way = self.client_frame(store, &h, whole.filter(|_| small));
            match way {
                Way::Forward => self.set(flag::DISCARD_UP, false),
                Way::Discard => self.set(flag::DISCARD_UP, true),
                Way::Hold => {
                    return if sys::peer_gone(self.client) { Step::Ends } else { Step::Waits };
                }
            }
            self.up.left = (HEADER + h.len) as u32;
        }
        let n = n.min(self.up.left as usize);
        let sent = if self.is(flag::DISCARD_UP) {
            n
        } else {
            match sys::send(self.daemon, buf.get(..n).unwrap_or_default()) {
                Ok(sent) => sent,
                Err(libc::EAGAIN | libc::EINTR) => return Step::Waits,
                Err(_) => {
                    self.broken_up(store, buf);
                    return Step::Moved;
                }
            }
        };
        self.set(flag::UNTOUCHED, false);
        self.up.left -= sent as u32;
        consume(self.client, buf, sent)
    }

    /// The daemon's end is closed. Calls are settled when it is known why; of them all that has
    /// to be known is known. Stream data goes back to where it was, for the next daemon.
    fn broken_up(&mut self, store: &mut Store, frame: &[u8]) {
        self.set(flag::BROKEN, true);
        if !self.is(flag::UNTOUCHED) {
            self.set(flag::DISCARD_UP, true);
            return;
        }
        self.up.left = 0;
        self.set(flag::UNTOUCHED, false);
        let found = Header::parse(frame).and_then(|h| self.find(store, h.stream));
        if let Some(p) = found.and_then(|i| store.pending.get_mut(i)) {
            p.flags &= !pending::CLIENT_CLOSED;
        }
    }

    fn incomplete_up(&self) -> Step {
        if sys::peer_closed(self.client) { Step::Ends } else { Step::Waits }
    }

    fn client_done(&mut self) -> Step {
        if sys::peer_gone(self.client) {
            return Step::Ends;
        }
        self.set(flag::CLIENT_DONE, true);
        if self.daemon.is_some() {
            sys::shutdown(self.daemon, libc::SHUT_WR);
        }
        Step::Waits
    }

    /// Books a frame of the client, whole if it is small; says where it goes.
    fn client_frame(&mut self, store: &mut Store, h: &Header, whole: Option<&[u8]>) -> Way {
        let attached = self.daemon.is_some();
        match h.kind {
            frame::REQUEST => {
                let body = whole.and_then(|w| w.get(HEADER..)).unwrap_or_default();
                let call = Call::of(body, h.flags);
                let mut flags = pending::USED;
                if h.flags & frame::REMOTE_OPEN != 0 {
                    flags |= pending::STREAMING;
                }
                let parked = if call == Call::Other { None } else { whole };
                if parked.is_some() {
                    flags |= pending::PARKABLE;
                }
                let read = call == Call::Read;
                if read {
                    flags |= pending::READ;
                }
                let parks = parked.is_some() && !read;
                if !attached && !parks && store.holding {
                    return Way::Hold;
                }
                if !attached {
                    flags |= if parks { pending::PARKED } else { pending::OWED };
                }
                if !self.add_pending(store, h.stream, flags, parked) {
                    self.set(flag::STARVED, true);
                    return Way::Hold;
                }
                if flags & pending::OWED != 0 {
                    self.set(flag::OWED, true);
                }
            }
            frame::DATA => {
                let found = self.find(store, h.stream);
                let Some((i, p)) = found.and_then(|i| Some((i, *store.pending.get(i)?))) else {
                    return if attached { Way::Forward } else { Way::Discard };
                };
                if p.flags & pending::OWED != 0 {
                    return Way::Discard;
                }
                let first = p.init.is_empty() && p.flags & pending::PARKABLE != 0;
                let init = whole.filter(|_| first && h.flags & frame::NO_DATA == 0);
                if init.is_none() && !attached {
                    // It may be a container's input: it stays here until there is a daemon.
                    return Way::Hold;
                }
                self.set(flag::UNTOUCHED, init.is_none());
                let mut text = None;
                if let Some(init) = init {
                    text = store.text(init);
                    if text.is_none() && !attached {
                        return Way::Hold;
                    }
                }
                if let Some(p) = store.pending.get_mut(i) {
                    p.init = text.unwrap_or(p.init);
                    if h.flags & frame::REMOTE_CLOSED != 0 {
                        p.flags |= pending::CLIENT_CLOSED;
                        if p.flags & pending::DAEMON_CLOSED != 0 {
                            self.drop_pending(store, i);
                        }
                    }
                }
            }
            _ => {}
        }
        if attached { Way::Forward } else { Way::Discard }
    }

    fn add_pending(
        &mut self,
        store: &mut Store,
        stream: u32,
        flags: u16,
        frame: Option<&[u8]>,
    ) -> bool {
        if let Some(old) = self.find(store, stream) {
            // A client does not use a number twice; if it does, the newer call counts.
            self.drop_pending(store, old);
        }
        let Some(frame) = store.text(frame.unwrap_or_default()) else {
            return false;
        };
        let (init, next) = (Default::default(), self.first);
        match store.pending.insert(Pending { stream, frame, init, next, flags }) {
            Some(i) => {
                self.first = i as u16 + 1;
                true
            }
            None => {
                store.release(frame);
                false
            }
        }
    }

    fn drop_pending(&mut self, store: &mut Store, i: usize) {
        let Some(mut p) = store.pending.remove(i) else {
            self.first = 0;
            return;
        };
        let this = i as u16 + 1;
        if self.first == this {
            self.first = p.next;
        } else {
            let mut at = self.first;
            while let Some(before) = at.checked_sub(1) {
                let Some(q) = store.pending.get_mut(usize::from(before)) else {
                    break;
                };
                at = q.next;
                if q.next == this {
                    q.next = p.next;
                    break;
                }
            }
        }
        store.release(p.frame);
        p.init.shift(p.frame);
        store.release(p.init);
    }

    fn find(&self, store: &Store, stream: u32) -> Option<usize> {
        let mut at = self.first;
        while let Some(i) = at.checked_sub(1) {
            let p = store.pending.get(usize::from(i))?;
            if p.stream == stream {
                return Some(usize::from(i));
            }
            at = p.next;
        }
        None
    }

    /// Pending calls with a flag.
    pub fn count(&self, store: &Store, flag: u16) -> usize {
        let (mut at, mut n) = (self.first, 0);
        while let Some(p) = at.checked_sub(1).and_then(|i| store.pending.get(usize::from(i))) {
            n += usize::from(p.flags & flag != 0);
            at = p.next;
        }
        n
    }
}

/// Takes `n` bytes that have been looked at and sent on.
fn consume(fd: Fd, buf: &mut [u8], mut n: usize) -> Step {
    while n > 0 {
        let Some(part) = buf.get_mut(..n) else {
            return Step::Ends;
        };
        match sys::take(fd, part) {
            Ok(0) => return Step::Ends,
            Ok(got) => n -= got.min(n),
            Err(libc::EINTR) => {}
            Err(_) => return Step::Ends,
        }
    }
    Step::Moved
}
