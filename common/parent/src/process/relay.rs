//! The fourth duty: relay. containerd's connections to the pods' sockets end here.
//!
//! A dropped task connection turns every container of the pod into EXITED/255, and containerd's
//! client never dials again. So this process accepts the connection and gives the daemon one end
//! of a socket pair, on which it passes ttrpc frames in both directions. Of a frame it reads the
//! ten-byte header and, of a request, the method name.
//!
//! * **To the client** a frame goes only when it is complete (up to [`WHOLE`] bytes). Larger ones
//!   are passed on as they come; should the daemon die within one, it is filled up with zero
//!   bytes, which spoils that one answer and not the connection.
//! * **Pending calls** are remembered by stream number. Of `Wait`, `WaitSandbox` and `Stream` the
//!   request itself is kept: while the daemon is away these are *parked*, and replayed to the
//!   next one. Any other call is answered Unavailable at once. The first data frame that a
//!   replayed stream gets is the acknowledgement that its client has had already: it is dropped.
//! * **Is it dead, or did it hang up?** A daemon's death closes its sockets one by one. When its
//!   end of a connection closes, the decision waits for [`GRACE_MS`]: if the control socket is
//!   still there then, it hung up on purpose and the client is closed as well.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::sys;

const HEADER: usize = 10;
/// ttrpc's message limit; a longer length field means that this is no ttrpc peer.
const MAX_BODY: usize = 4 << 20;
/// Up to this size a frame is passed on only when it is complete.
pub const WHOLE: usize = 64 << 10;
/// Requests up to this size can be parked.
const PARKABLE: usize = 1024;
/// How long a closed connection waits for the control socket to close, too.
pub const GRACE_MS: u64 = 100;
/// Unsent bytes above which the other side is not read any more.
const HIGH_WATER: usize = 64 << 10;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 3;
const REMOTE_CLOSED: u8 = 1;
const NO_DATA: u8 = 4;

struct Pending {
    stream: u32,
    /// The request frame, when it can be parked.
    frame: Option<Box<[u8]>>,
    /// First data frame of a stream call (StreamInit).
    init: Option<Box<[u8]>>,
    streaming: bool,
    client_closed: bool,
    daemon_closed: bool,
    /// Drop the daemon's next data frame: the client has had its acknowledgement.
    swallow: bool,
}

/// One direction: bytes that make up the frame being read, and bytes that wait to be written.
#[derive(Default)]
struct Flow {
    partial: Vec<u8>,
    /// Bytes of a large frame still to pass on.
    passing: usize,
    /// Whether the passing frame is thrown away instead.
    discard: bool,
    out: Vec<u8>,
}

/// A client's connection.
pub struct Connection {
    pub pod: u32,
    client: OwnedFd,
    daemon: Option<OwnedFd>,
    to_daemon: Flow,
    to_client: Flow,
    pending: Vec<Pending>,
    /// When the daemon's end was found closed, and the decision is open.
    pub undecided: Option<u64>,
}

/// What became of a connection after an event.
#[derive(PartialEq, Eq)]
pub enum Fate {
    Lives,
    Ends,
}

fn header(frame: &[u8]) -> Option<(usize, u32, u8, u8)> {
    let len = u32::from_be_bytes(frame.get(0..4)?.try_into().ok()?) as usize;
    let stream = u32::from_be_bytes(frame.get(4..8)?.try_into().ok()?);
    Some((len, stream, *frame.get(8)?, *frame.get(9)?))
}

/// Field 2 (`method`) of a ttrpc Request.
fn method(mut body: &[u8]) -> Option<&[u8]> {
    fn varint(b: &mut &[u8]) -> Option<u64> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = b.split_first()?;
            *b = rest;
            v |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(v);
            }
        }
        None
    }
    loop {
        let key = varint(&mut body)?;
        match key & 7 {
            0 => {
                varint(&mut body)?;
            }
            2 => {
                let n = usize::try_from(varint(&mut body)?).ok()?;
                let (value, rest) = body.split_at_checked(n)?;
                if key >> 3 == 2 {
                    return Some(value);
                }
                body = rest;
            }
            _ => return None,
        }
    }
}

/// A Response frame with Status UNAVAILABLE (14).
fn unavailable(stream: u32, out: &mut Vec<u8>) {
    const TEXT: &[u8] = b"the sandboxer is restarting; try again";
    let status = 2 + 2 + TEXT.len();
    let body = 2 + status;
    out.extend_from_slice(&(body as u32).to_be_bytes());
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[RESPONSE, 0, 0x0a, status as u8, 0x08, 14, 0x12, TEXT.len() as u8]);
    out.extend_from_slice(TEXT);
}

impl Connection {
    /// A connection that no daemon serves yet.
    pub fn new(pod: u32, client: OwnedFd) -> Self {
        Self {
            pod,
            client,
            daemon: None,
            to_daemon: Flow::default(),
            to_client: Flow::default(),
            pending: Vec::new(),
            undecided: None,
        }
    }

    /// Descriptors to poll.
    pub fn fds(&self) -> (RawFd, Option<RawFd>) {
        (self.client.as_raw_fd(), self.daemon.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// Whether a daemon has its other end.
    pub fn attached(&self) -> bool {
        self.daemon.is_some()
    }

    /// Calls that wait for the next daemon.
    pub fn parked(&self) -> usize {
        if self.attached() { 0 } else { self.pending.len() }
    }

    /// epoll interest of both sides: read unless the other side is congested, write if needed.
    pub fn interest(&self) -> (u32, u32) {
        let (r, w) = (libc::EPOLLIN as u32, libc::EPOLLOUT as u32);
        let mut client = 0;
        // Without a daemon, data for a parked stream has to wait where it is.
        if self.to_daemon.out.len() < HIGH_WATER && !self.holds_data() {
            client |= r;
        }
        if !self.to_client.out.is_empty() {
            client |= w;
        }
        let mut daemon = 0;
        if self.to_client.out.len() < HIGH_WATER {
            daemon |= r;
        }
        if !self.to_daemon.out.is_empty() {
            daemon |= w;
        }
        (client, daemon)
    }

    /// A data frame has been begun while no daemon is there.
    fn holds_data(&self) -> bool {
        !self.attached()
            && header(&self.to_daemon.partial).is_some_and(|(_, _, kind, _)| kind == DATA)
    }

    /// A new daemon takes the connection; parked calls are replayed.
    pub fn attach(&mut self, end: OwnedFd) {
        self.daemon = Some(end);
        self.undecided = None;
        for p in &mut self.pending {
            if let Some(f) = &p.frame {
                self.to_daemon.out.extend_from_slice(f);
            }
            if let Some(f) = &p.init {
                self.to_daemon.out.extend_from_slice(f);
                p.swallow = true;
            }
        }
    }

    /// The daemon is dead: answers what cannot be parked, mends a frame that was cut off.
    pub fn orphan(&mut self) {
        self.daemon = None;
        self.undecided = None;
        self.to_daemon.out = Vec::new();
        if self.to_daemon.passing > 0 {
            self.to_daemon.discard = true;
        }
        let cut = std::mem::take(&mut self.to_client.passing);
        if cut > 0 && !self.to_client.discard {
            let filled = self.to_client.out.len() + cut;
            self.to_client.out.resize(filled, 0);
        }
        self.to_client.partial = Vec::new();
        let out = &mut self.to_client.out;
        self.pending.retain(|p| {
            let parked = p.frame.is_some() && !p.daemon_closed && (!p.streaming || p.init.is_some());
            if !parked && !p.streaming {
                unavailable(p.stream, out);
            }
            parked
        });
    }

    /// The client's side is ready.
    pub fn client_event(&mut self, events: u32, buf: &mut [u8]) -> Fate {
        if events & libc::EPOLLIN as u32 != 0 {
            match sys::read(self.client.as_raw_fd(), buf) {
                Ok(0) => return Fate::Ends,
                Ok(n) => {
                    if !self.take_client(buf.get(..n).unwrap_or_default()) {
                        return Fate::Ends;
                    }
                }
                Err(libc::EAGAIN | libc::EINTR) => {}
                Err(_) => return Fate::Ends,
            }
        } else if events & (libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0 {
            return Fate::Ends;
        }
        self.flush()
    }

    /// The daemon's side is ready.
    pub fn daemon_event(&mut self, events: u32, buf: &mut [u8]) -> Fate {
        let Some(fd) = self.daemon.as_ref().map(AsRawFd::as_raw_fd) else { return Fate::Lives };
        let mut closed = false;
        if events & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0 {
            match sys::read(fd, buf) {
                Ok(0) => closed = true,
                Ok(n) => self.take_daemon(buf.get(..n).unwrap_or_default()),
                Err(libc::EAGAIN | libc::EINTR) => {}
                Err(_) => closed = true,
            }
        }
        if closed {
            self.daemon = None;
            self.undecided = Some(sys::now_ms());
            return Fate::Lives;
        }
        self.flush()
    }

    /// Writes what can be written.
    pub fn flush(&mut self) -> Fate {
        if push(self.client.as_raw_fd(), &mut self.to_client.out).is_err() {
            return Fate::Ends;
        }
        if let Some(d) = &self.daemon {
            // An error shows as a closed end when it is read.
            let _ = push(d.as_raw_fd(), &mut self.to_daemon.out);
        }
        Fate::Lives
    }

    /// Goes on with a frame that was held while no daemon was there.
    pub fn resume(&mut self) -> bool {
        let held = std::mem::take(&mut self.to_daemon.partial);
        held.is_empty() || self.take_client(&held)
    }

    fn take_client(&mut self, mut data: &[u8]) -> bool {
        while !data.is_empty() {
            if self.to_daemon.passing > 0 {
                let n = self.to_daemon.passing.min(data.len());
                let (now, rest) = data.split_at(n);
                if !self.to_daemon.discard {
                    self.to_daemon.out.extend_from_slice(now);
                }
                self.to_daemon.passing -= n;
                if self.to_daemon.passing == 0 {
                    self.to_daemon.discard = false;
                }
                data = rest;
                continue;
            }
            data = gather(&mut self.to_daemon.partial, data, PARKABLE);
            let Some((len, stream, kind, flags)) = header(&self.to_daemon.partial) else { return true };
            if len > MAX_BODY {
                return false;
            }
            if !self.attached() && kind == DATA {
                // Keep it here until there is a daemon: it may be a container's input.
                self.to_daemon.partial.extend_from_slice(data);
                return true;
            }
            let have = self.to_daemon.partial.len();
            let small = len <= PARKABLE;
            if small && have < HEADER + len {
                return true;
            }
            let frame = std::mem::take(&mut self.to_daemon.partial);
            if !small {
                // Header and a first part are here; the rest is passed on as it comes.
                self.to_daemon.passing = HEADER + len - have;
            }
            let forwarded = self.client_frame(&frame, stream, kind, flags, small);
            if forwarded {
                self.to_daemon.out.extend_from_slice(&frame);
            } else {
                self.to_daemon.discard = self.to_daemon.passing > 0;
            }
        }
        true
    }

    /// Books a client's frame; says whether it goes to the daemon now.
    fn client_frame(&mut self, frame: &[u8], stream: u32, kind: u8, flags: u8, small: bool) -> bool {
        match kind {
            REQUEST => {
                let name = if small { method(frame.get(HEADER..).unwrap_or_default()) } else { None };
                let streaming = name == Some(b"Stream");
                let parkable = streaming || matches!(name, Some(b"Wait" | b"WaitSandbox"));
                if !self.attached() && !parkable {
                    unavailable(stream, &mut self.to_client.out);
                    return false;
                }
                self.pending.push(Pending {
                    stream,
                    frame: parkable.then(|| frame.into()),
                    init: None,
                    streaming,
                    client_closed: false,
                    daemon_closed: false,
                    swallow: false,
                });
                self.attached()
            }
            DATA => {
                if let Some(p) = self.pending.iter_mut().find(|p| p.stream == stream) {
                    if p.init.is_none() && small && flags & NO_DATA == 0 {
                        p.init = Some(frame.into());
                    }
                    p.client_closed |= flags & REMOTE_CLOSED != 0;
                }
                self.settle(stream);
                true
            }
            _ => true,
        }
    }

    fn settle(&mut self, stream: u32) {
        self.pending.retain(|p| p.stream != stream || !(p.client_closed && p.daemon_closed));
    }

    fn take_daemon(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.to_client.passing > 0 {
                let n = self.to_client.passing.min(data.len());
                let (now, rest) = data.split_at(n);
                self.to_client.out.extend_from_slice(now);
                self.to_client.passing -= n;
                data = rest;
                continue;
            }
            data = gather(&mut self.to_client.partial, data, WHOLE);
            let Some((len, stream, kind, flags)) = header(&self.to_client.partial) else { return };
            let have = self.to_client.partial.len();
            if len <= WHOLE && have < HEADER + len {
                return;
            }
            let frame = std::mem::take(&mut self.to_client.partial);
            if len > WHOLE {
                self.to_client.passing = HEADER + len - have;
            }
            let mut swallow = false;
            if kind == RESPONSE {
                self.pending.retain(|p| p.stream != stream);
            } else if let Some(p) = self.pending.iter_mut().find(|p| p.stream == stream) {
                swallow = std::mem::take(&mut p.swallow) && flags & REMOTE_CLOSED == 0;
                p.daemon_closed |= flags & REMOTE_CLOSED != 0;
                self.settle(stream);
            }
            if !swallow {
                self.to_client.out.extend_from_slice(&frame);
            }
        }
    }
}

/// Moves bytes of one frame from `data` to `partial`: the header first, then the body up to
/// `limit` bytes of it (a longer body only begins). Answers what is left of `data`.
fn gather<'a>(partial: &mut Vec<u8>, mut data: &'a [u8], limit: usize) -> &'a [u8] {
    let mut take = |want: usize, partial: &mut Vec<u8>| {
        let n = want.saturating_sub(partial.len()).min(data.len());
        let (now, rest) = data.split_at(n);
        partial.extend_from_slice(now);
        data = rest;
    };
    take(HEADER, partial);
    if let Some((len, ..)) = header(partial)
        && len <= limit
    {
        take(HEADER + len, partial);
    }
    data
}

fn push(fd: RawFd, out: &mut Vec<u8>) -> Result<(), i32> {
    let mut sent = 0;
    while let Some(rest) = out.get(sent..).filter(|r| !r.is_empty()) {
        match sys::send(fd, rest) {
            Ok(n) => sent += n,
            Err(libc::EAGAIN) => break,
            Err(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    if sent >= out.len() {
        *out = Vec::new();
    } else {
        out.drain(..sent);
    }
    Ok(())
}
