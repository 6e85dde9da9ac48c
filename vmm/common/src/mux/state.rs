//! What a side knows of the session and its streams: no input or output, and never waits.
//!
//! What has to be sent is noted at the stream, and not kept in a queue: however much the other
//! side asks for, what is owed to it is a few flags and what of its own bytes it is to get.

use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;

use super::frame::{Frame, Kind, PAYLOAD};
use super::{Role, VERSION};

/// Bytes that may be on their way in one direction of a stream.
pub const WINDOW: usize = 64 * 1024;
/// Bytes that were read before they are granted anew: each time costs a guest an interrupt.
const GRANT: usize = WINDOW / 2;
/// Bytes of a stream that wait to be sent.
pub const WAITING: usize = 32 * 1024;
/// Streams at the same time.
pub const STREAMS: usize = 4096;
/// Streams that wait to be accepted.
pub const ARRIVED: usize = 128;
/// Refusals that wait to be sent; whoever asks for more is not told.
pub const REFUSED: usize = 1024;
/// Bytes that are put together for one write.
const WRITE: usize = 2 * PAYLOAD;

/// The end of what we send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// Behind what waits.
    Due,
    Sent,
}

/// One stream.
#[derive(Debug, Default)]
struct Entry {
    received: VecDeque<u8>,
    /// Bytes that have come, and that were sent, modulo 2^32: one that gets lost is missed.
    got: u32,
    sent: u32,
    /// Bytes that the other side may still send.
    window: usize,
    /// Bytes that were read, and not granted anew.
    read: usize,
    /// The other side sends no more.
    ended: bool,
    waiting: VecDeque<u8>,
    /// Bytes that we may still send.
    credit: usize,
    end: End,
    /// The other side reads no more.
    stopped: bool,
    /// It is no more.
    broken: bool,
    /// Ours, with the port, until it is told.
    open: Option<u32>,
    /// Both sides have it.
    accepted: bool,
    /// To be told that we have accepted it.
    accept: bool,
    /// To be told that we read no more; and whether it was.
    stop: bool,
    stop_sent: bool,
    reset: bool,
    /// Somebody holds it here.
    held: bool,
    /// It is among those that have something to send.
    queued: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Waits for it to be accepted, or for the other side to read no more.
    watcher: Option<Waker>,
}

impl Entry {
    fn new(open: Option<u32>) -> Self {
        Self { window: WINDOW, credit: WINDOW, held: true, open, ..Self::default() }
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take(), self.watcher.take()] {
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// It is no more, on either side.
    fn fail(&mut self) {
        self.silence();
        (self.broken, self.reset) = (true, true);
        self.wake();
    }

    /// Nothing of it goes out any more.
    fn silence(&mut self) {
        self.stopped = true;
        self.waiting = VecDeque::new();
        self.end = End::Sent;
    }

    fn has_data(&self) -> bool {
        self.accepted && !self.waiting.is_empty() && self.credit > 0
    }

    /// Whether there is anything to send.
    fn is_due(&self) -> bool {
        self.reset
            || self.open.is_some()
            || self.accept
            || (self.stop && self.accepted)
            || (self.read >= GRANT && !self.stop_sent)
            || self.has_data()
            || (self.end == End::Due && self.waiting.is_empty() && self.accepted)
    }

    /// Whether nobody needs it any more, on either side.
    fn is_over(&self) -> bool {
        !self.held
            && !self.reset
            && (self.broken || (self.end == End::Sent && (self.stop_sent || self.ended)))
    }
}

/// Removes up to `n` bytes from the front.
fn take(from: &mut VecDeque<u8>, n: usize, to: &mut impl FnMut(&[u8])) -> usize {
    let n = n.min(from.len());
    let (a, b) = from.as_slices();
    let first = a.get(..n).unwrap_or(a);
    to(first);
    to(b.get(..n - first.len()).unwrap_or_default());
    from.drain(..n);
    if from.is_empty() {
        // An idle stream costs no buffer.
        *from = VecDeque::new();
    }
    n
}

/// What a reader or writer is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes; 0 for a reader is the end.
    Done(usize),
    /// The waker is kept.
    Wait,
    /// It is no more, or takes no more.
    Broken,
}

/// A session's number and a stream's: never twice the same.
pub type Key = (u64, u32);

/// One side.
#[derive(Debug)]
pub struct State {
    role: Role,
    /// 0: none has begun.
    session: u64,
    /// Both sides are in it.
    up: bool,
    next: u32,
    streams: BTreeMap<u32, Entry>,
    /// Those that have something to send, in the order of their turns.
    queue: VecDeque<u32>,
    arrived: VecDeque<(Key, u32)>,
    refused: VecDeque<u32>,
    hello: bool,
    sync: bool,
    begun: bool,
    /// Whatever a former side left behind is ended by the first zero.
    first: bool,
}

impl State {
    /// A host with its session's number, which nobody has used before, or a guest.
    pub fn new(role: Role, session: u64) -> Self {
        let mut state = Self {
            role,
            session: 0,
            up: false,
            next: 0,
            streams: BTreeMap::new(),
            queue: VecDeque::new(),
            arrived: VecDeque::new(),
            refused: VecDeque::new(),
            hello: role == Role::Guest,
            sync: false,
            begun: false,
            first: true,
        };
        if role == Role::Host {
            state.begin(session.max(1));
            state.sync = true;
        }
        state
    }

    /// Drops everything of the former session.
    fn begin(&mut self, session: u64) {
        self.session = session;
        self.up = false;
        self.next = if self.role == Role::Host { 1 } else { 2 };
        for entry in std::mem::take(&mut self.streams).values_mut() {
            entry.wake();
        }
        self.queue.clear();
        self.arrived.clear();
        self.refused.clear();
    }

    /// The other side is not there any more.
    pub fn close(&mut self) {
        self.begin(0);
    }

    /// The session that both sides are in.
    pub fn session(&self) -> Option<u64> {
        self.up.then_some(self.session)
    }

    /// Whether it is a host that has no answer yet.
    pub fn asks(&self) -> bool {
        self.role == Role::Host && !self.up
    }

    /// Such a one asks again.
    pub fn ask(&mut self) {
        self.sync = self.asks();
    }

    /// What is kept: streams, bytes of the stream that has most, and streams that wait.
    pub fn held(&self) -> (usize, usize, usize) {
        let longest = self.streams.values().map(|entry| entry.received.len()).max();
        (self.streams.len(), longest.unwrap_or_default(), self.refused.len() + self.arrived.len())
    }

    /// What the next bytes of a stream have as their place.
    pub fn place(&self, id: u32) -> u32 {
        self.streams.get(&id).map_or(0, |entry| entry.got)
    }

    fn entry(&mut self, (session, id): Key) -> Option<&mut Entry> {
        if session != self.session { None } else { self.streams.get_mut(&id) }
    }

    /// Notes that a stream may have something to send, or is over.
    fn look(&mut self, id: u32) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        if entry.is_due() && !entry.queued {
            entry.queued = true;
            self.queue.push_back(id);
        } else if entry.is_over() {
            self.streams.remove(&id);
        }
    }

    /// Whether there is anything to send.
    pub fn is_due(&self) -> bool {
        self.hello || self.sync || self.begun || !self.refused.is_empty() || !self.queue.is_empty()
    }

    /// A new stream to a port of the other side.
    pub fn open(&mut self, port: u32) -> Option<Key> {
        if !self.up || self.streams.len() >= STREAMS {
            return None;
        }
        while self.next == 0 || self.streams.contains_key(&self.next) {
            self.next = self.next.wrapping_add(2);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(2);
        self.streams.insert(id, Entry::new(Some(port)));
        self.look(id);
        Some((self.session, id))
    }

    /// Whether the other side has accepted it.
    pub fn opened(&mut self, key: Key, waker: &Waker) -> Progress {
        match self.entry(key) {
            None => Progress::Broken,
            Some(entry) if entry.broken => Progress::Broken,
            Some(entry) if entry.accepted => Progress::Done(0),
            Some(entry) => {
                entry.watcher = Some(waker.clone());
                Progress::Wait
            }
        }
    }

    /// A stream that the other side has opened, and its port.
    pub fn arrived(&mut self) -> Option<(Key, u32)> {
        self.arrived.pop_front()
    }

    /// Accepts it.
    pub fn accept(&mut self, key: Key) {
        if let Some(entry) = self.entry(key) {
            entry.accept = true;
            entry.accepted = true;
        }
        self.look(key.1);
    }

    /// Whether it broke, and not with its session.
    pub fn lost(&mut self, key: Key) -> bool {
        self.up && self.entry(key).is_some_and(|entry| entry.broken)
    }

    /// Whether the other side reads no more.
    pub fn stopped(&mut self, key: Key, waker: &Waker) -> Progress {
        match self.entry(key) {
            Some(entry) if !entry.stopped => {
                entry.watcher = Some(waker.clone());
                Progress::Wait
            }
            _ => Progress::Broken,
        }
    }

    /// Reads up to `most` bytes.
    pub fn read(
        &mut self,
        key: Key,
        most: usize,
        to: &mut impl FnMut(&[u8]),
        waker: &Waker,
    ) -> Progress {
        let Some(entry) = self.entry(key) else { return Progress::Broken };
        if !entry.received.is_empty() {
            let n = take(&mut entry.received, most, to);
            entry.read += n;
            self.look(key.1);
            return Progress::Done(n);
        }
        if entry.ended {
            return Progress::Done(0);
        }
        if entry.broken {
            return Progress::Broken;
        }
        entry.reader = Some(waker.clone());
        Progress::Wait
    }

    /// Writes what there is room for.
    pub fn write(&mut self, key: Key, bytes: &[u8], waker: &Waker) -> Progress {
        let Some(entry) = self.entry(key) else { return Progress::Broken };
        if entry.broken || entry.stopped || entry.end != End::Open {
            return Progress::Broken;
        }
        let room = WAITING.saturating_sub(entry.waiting.len());
        if room == 0 {
            entry.writer = Some(waker.clone());
            return Progress::Wait;
        }
        let piece = bytes.get(..room).unwrap_or(bytes);
        entry.waiting.extend(piece);
        self.look(key.1);
        Progress::Done(piece.len())
    }

    /// No more is written.
    pub fn end(&mut self, key: Key) {
        if let Some(entry) = self.entry(key)
            && entry.end == End::Open
        {
            entry.end = End::Due;
        }
        self.look(key.1);
    }

    /// Nobody holds it any more: what waits is sent still.
    pub fn drop_stream(&mut self, key: Key) {
        if let Some(entry) = self.entry(key) {
            entry.held = false;
            entry.received = VecDeque::new();
            if !entry.accepted && !entry.broken {
                entry.silence();
                // One of which the other side was never told needs no end either.
                entry.reset = entry.open.take().is_none();
                entry.broken = true;
            } else {
                entry.stop = !entry.ended && !entry.stop_sent && !entry.broken;
                if entry.end == End::Open {
                    entry.end = End::Due;
                }
            }
            self.arrived.retain(|(arrived, _)| *arrived != key);
            self.look(key.1);
        }
    }

    /// What the other side has said. Answers whether a session has begun.
    pub fn hear(&mut self, frame: Frame) -> bool {
        match (frame.kind, self.role) {
            (Kind::Hello, Role::Host) => {
                if self.up {
                    // Another guest than the one that we were in a session with.
                    self.begin(self.session.wrapping_add(1).max(1));
                }
                self.sync = true;
                return false;
            }
            (Kind::Sync, Role::Guest) if frame.session != 0 => {
                let new = frame.session != self.session;
                if new {
                    self.begin(frame.session);
                    self.up = true;
                }
                self.begun = true;
                return new;
            }
            (Kind::Begun, Role::Host) if frame.session == self.session && !self.up => {
                self.up = true;
                self.sync = false;
                return true;
            }
            _ => {}
        }
        if self.up && frame.session == self.session {
            self.hear_stream(frame);
        }
        false
    }

    fn hear_stream(&mut self, frame: Frame) {
        let id = frame.stream;
        if frame.kind == Kind::Open {
            return self.hear_open(id, frame.argument);
        }
        // What is said of a stream that is no more was said before the other side knew.
        let Some(entry) = self.streams.get_mut(&id) else { return };
        match frame.kind {
            Kind::Accept => {
                if entry.open.is_none() {
                    entry.accepted = true;
                }
                entry.watcher.take().into_iter().for_each(Waker::wake);
            }
            Kind::Data if entry.broken || entry.ended => {}
            // More than it was granted, or not what follows.
            Kind::Data
                if frame.payload.len() > entry.window
                    || !entry.accepted
                    || frame.argument != entry.got =>
            {
                entry.fail();
            }
            Kind::Data if !entry.held || entry.stop || entry.stop_sent => {
                entry.got = entry.got.wrapping_add(frame.payload.len() as u32);
            }
            Kind::Data => {
                entry.got = entry.got.wrapping_add(frame.payload.len() as u32);
                entry.window -= frame.payload.len();
                entry.received.extend(frame.payload);
                entry.reader.take().into_iter().for_each(Waker::wake);
            }
            Kind::Window => entry.credit = entry.credit.saturating_add(frame.argument as usize),
            Kind::End if entry.broken => {}
            Kind::End if frame.argument != entry.got => entry.fail(),
            Kind::End => {
                entry.ended = true;
                entry.stop = false;
                entry.reader.take().into_iter().for_each(Waker::wake);
            }
            Kind::Stop => {
                entry.silence();
                entry.writer.take().into_iter().for_each(Waker::wake);
                entry.watcher.take().into_iter().for_each(Waker::wake);
            }
            Kind::Reset => {
                entry.silence();
                (entry.broken, entry.reset, entry.stop) = (true, false, false);
                entry.wake();
            }
            Kind::Open | Kind::Hello | Kind::Sync | Kind::Begun => {}
        }
        self.look(id);
    }

    fn hear_open(&mut self, id: u32, port: u32) {
        let theirs = if self.role == Role::Host { 0 } else { 1 };
        if id == 0 || id % 2 != theirs || self.streams.contains_key(&id) {
            return;
        }
        if self.streams.len() >= STREAMS || self.arrived.len() >= ARRIVED {
            if self.refused.len() < REFUSED {
                self.refused.push_back(id);
            }
            return;
        }
        self.streams.insert(id, Entry::new(None));
        self.arrived.push_back(((self.session, id), port));
    }

    /// Appends what is to be sent next: each stream has one piece in a turn.
    pub fn fill(&mut self, to: &mut Vec<u8>) {
        if std::mem::take(&mut self.first) {
            to.push(0);
        }
        let session = self.session;
        let say = |to: &mut Vec<u8>, session, stream, kind, argument| {
            Frame { session, stream, kind, argument, payload: Vec::new() }.write(to);
        };
        if std::mem::take(&mut self.hello) {
            say(to, 0, 0, Kind::Hello, u32::from(VERSION));
        }
        if std::mem::take(&mut self.sync) {
            say(to, session, 0, Kind::Sync, u32::from(VERSION));
        }
        if std::mem::take(&mut self.begun) {
            say(to, session, 0, Kind::Begun, u32::from(VERSION));
        }
        while to.len() < WRITE {
            if let Some(id) = self.refused.pop_front() {
                say(to, session, id, Kind::Reset, 0);
                continue;
            }
            let Some(id) = self.queue.pop_front() else { return };
            let Some(entry) = self.streams.get_mut(&id) else { continue };
            entry.queued = false;
            if std::mem::take(&mut entry.reset) {
                say(to, session, id, Kind::Reset, 0);
                self.look(id);
                continue;
            }
            if let Some(port) = entry.open.take() {
                say(to, session, id, Kind::Open, port);
            }
            if std::mem::take(&mut entry.accept) {
                say(to, session, id, Kind::Accept, 0);
            }
            if entry.read >= GRANT && !entry.stop_sent {
                say(to, session, id, Kind::Window, entry.read as u32);
                entry.window += std::mem::take(&mut entry.read);
            }
            if entry.has_data() {
                let mut payload = Vec::new();
                let most = entry.credit.min(PAYLOAD);
                let mut add = |bytes: &[u8]| payload.extend_from_slice(bytes);
                entry.credit -= take(&mut entry.waiting, most, &mut add);
                let argument = entry.sent;
                entry.sent = argument.wrapping_add(payload.len() as u32);
                Frame { session, stream: id, kind: Kind::Data, argument, payload }.write(to);
                entry.writer.take().into_iter().for_each(Waker::wake);
            }
            if entry.end == End::Due && entry.waiting.is_empty() && entry.accepted {
                entry.end = End::Sent;
                say(to, session, id, Kind::End, entry.sent);
            }
            if entry.accepted && std::mem::take(&mut entry.stop) {
                entry.stop_sent = true;
                say(to, session, id, Kind::Stop, 0);
            }
            self.look(id);
        }
    }
}
