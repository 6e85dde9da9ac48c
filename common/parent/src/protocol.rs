//! The messages between a daemon and its sandbox-parent.
//!
//! They travel over a `SOCK_SEQPACKET` unix socket, one message per packet, descriptors beside
//! them as `SCM_RIGHTS`. A request is `op: u8, seq: u32, fields…`; its reply carries the same
//! `seq`. Integers are little-endian; a byte string is a `u16` length and the bytes. An upgraded
//! daemon may talk to an older parent: [`VERSION`] is exchanged in [`op::HELLO`] and a message is
//! only ever extended at its end.

/// Version of the protocol; a parent answers its own in HELLO's reply.
pub const VERSION: u32 = 1;
/// What this parent can do, beyond the first version; no bit has a meaning yet.
pub const CAPABILITIES: u32 = 0;
/// Largest packet, in bytes (argv and environment of a spawn have to fit).
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors in one packet.
pub const MAX_FDS: usize = 32;
/// Longest name of a kept descriptor or pod, in bytes: three ids of the longest kind (pod,
/// container, exec: 128 bytes each) and the words between them.
pub const MAX_NAME: usize = 448;

/// Operation codes. Up to HELLO a connection may only ask for HELLO, STATUS and the lists.
pub mod op {
    /// `version:u32` → `version:u32, pid:u32, idle:u8, capabilities:u32`. The sender is the
    /// daemon from now on; the connection of an older one is closed.
    pub const HELLO: u8 = 1;
    /// `cookie:u64, n:u16 argv…, n:u16 env…, n:u8 {index:u8}…` + fds → `pid:u32, seq:u64` + pidfd.
    /// Target descriptor `i` is the passed descriptor `index`, or `/dev/null` for 255. May go on
    /// with `flags:u8, umask:u16, cwd, n:u8 {index:u8}… (cgroup.procs files to enter),
    /// n:u8 {resource:u8, soft:u64, hard:u64}…`; see [`super::spawn`].
    pub const SPAWN: u8 = 2;
    /// `flags:u8, id, hostname, n:u16 {key, value}…` + netns fd if flag NETNS →
    /// `init:u32, seq:u64` + ipc, uts [, user] [, pidfd of init].
    pub const NAMESPACES: u8 = 3;
    /// `cookie:u64, pid:u32, since:u64` → nothing.
    pub const WATCH: u8 = 4;
    /// `cookie:u64`: forget the exit, or do not watch any more; no reply.
    pub const ACK: u8 = 5;
    /// `name` + fd → nothing.
    pub const KEEP: u8 = 6;
    /// `name` → fd, or `ENOENT`.
    pub const FETCH: u8 = 7;
    /// `prefix` → nothing.
    pub const FORGET: u8 = 8;
    /// `from:u32` → `next:u32 (0 at the end), n:u16 name…`.
    pub const LIST_KEPT: u8 = 9;
    /// `pod` + listening fd → nothing. A pod that has one gets the new one and keeps its
    /// connections.
    pub const LISTEN: u8 = 10;
    /// `pod [, drain:u8]` → nothing; closes its connections too unless `drain` is 1.
    pub const UNLISTEN: u8 = 11;
    /// The daemon takes connections now; → nothing.
    pub const READY: u8 = 12;
    /// → `kept:u32, watched:u32, pods:u32, connections:u32, parked:u32, refused:u64`.
    pub const STATUS: u8 = 13;
    /// `force:u8` → nothing, then the parent ends; `EBUSY` when it keeps something.
    pub const SHUTDOWN: u8 = 14;
    /// `[from:u32]` → `n:u16 cookie:u64…, next:u32 (0 at the end)`.
    pub const LIST_WATCHED: u8 = 15;
    /// `from:u32` → `next:u32 (0 at the end), n:u16 pod…`.
    pub const LIST_PODS: u8 = 16;

    /// Reply: `seq:u32, errno:u32, stage:u8, fields…`.
    pub const REPLY: u8 = 100;
    /// Event: `cookie:u64, pid:u32, status:i32 (as wait(2) gives it, or -1), at_ns:u64`.
    pub const EXIT: u8 = 101;
    /// Event: `replay:u8, pod` + connected stream fd.
    pub const CONNECTION: u8 = 102;

    /// A request in words, for traces.
    #[cfg(feature = "client")]
    pub fn title(code: u8) -> &'static str {
        match code {
            HELLO => "sandbox-parent hello",
            SPAWN => "sandbox-parent spawn",
            NAMESPACES => "sandbox-parent namespaces",
            WATCH => "sandbox-parent watch",
            KEEP => "sandbox-parent keep",
            FETCH => "sandbox-parent fetch",
            FORGET => "sandbox-parent forget",
            LIST_KEPT => "sandbox-parent list_kept",
            LISTEN => "sandbox-parent listen",
            UNLISTEN => "sandbox-parent unlisten",
            READY => "sandbox-parent ready",
            STATUS => "sandbox-parent status",
            SHUTDOWN => "sandbox-parent shutdown",
            LIST_WATCHED => "sandbox-parent list_watched",
            LIST_PODS => "sandbox-parent list_pods",
            _ => "sandbox-parent",
        }
    }
}

/// Optional fields of [`op::SPAWN`].
pub mod spawn {
    /// Flag: stay in the parent's session instead of starting a new one.
    pub const SAME_SESSION: u8 = 1;
    /// Leave the umask as it is (022).
    pub const NO_UMASK: u16 = 0xffff;
}

/// Flags of [`op::NAMESPACES`].
pub mod ns {
    /// Make an IPC namespace.
    pub const IPC: u8 = 1;
    /// Make a UTS namespace.
    pub const UTS: u8 = 2;
    /// Make a PID namespace with a reaping init.
    pub const PID: u8 = 4;
    /// A network namespace descriptor is passed: enter it, and the user namespace that owns it.
    pub const NETNS: u8 = 8;
    /// Keep them, too: as `<id>/ns/ipc`, `uts`, `user`, `pid` and `init` (a pidfd), those that there
    /// are. The reply ends with a byte 1 when that was done; an older parent does not know it.
    pub const KEEP: u8 = 16;
}

/// At which step a request failed; numbers are part of the protocol.
pub mod stage {
    /// The request could not be read.
    pub const REQUEST: u8 = 1;
    /// `fork(2)`.
    pub const FORK: u8 = 2;
    /// `execve(2)`.
    pub const EXEC: u8 = 3;
    /// Entering the user namespace.
    pub const USERNS: u8 = 4;
    /// Entering the network namespace.
    pub const NETNS: u8 = 5;
    /// `unshare(2)`.
    pub const UNSHARE: u8 = 6;
    /// `sethostname(2)`.
    pub const HOSTNAME: u8 = 7;
    /// Opening the new namespaces.
    pub const OPEN: u8 = 8;
    /// Preparing descriptors.
    pub const FDS: u8 = 9;
    /// Entering a cgroup.
    pub const CGROUP: u8 = 10;
    /// Setting a resource limit.
    pub const RLIMIT: u8 = 11;
    /// Changing to the working directory.
    pub const CWD: u8 = 12;
    /// A table of sandbox-parent is full.
    pub const FULL: u8 = 13;
    /// Writing sysctl number `stage - SYSCTL`.
    pub const SYSCTL: u8 = 64;

    /// What the stage means, for people.
    pub fn describe(stage: u8) -> &'static str {
        match stage {
            REQUEST => "reading the request",
            FORK => "fork",
            EXEC => "execve",
            USERNS => "entering the user namespace",
            NETNS => "entering the network namespace",
            UNSHARE => "unshare",
            HOSTNAME => "setting the hostname",
            OPEN => "opening the namespaces",
            FDS => "preparing descriptors",
            CGROUP => "entering the cgroup",
            RLIMIT => "setting a resource limit",
            CWD => "changing to the working directory",
            FULL => "finding room: forget what is not needed, or raise its limits",
            SYSCTL.. => "writing a sysctl",
            _ => "request",
        }
    }
}

/// Where a [`Writer`] writes to.
pub trait Sink {
    /// Appends all bytes or none; says which.
    fn append(&mut self, bytes: &[u8]) -> bool;
    /// What has been written.
    fn written(&self) -> &[u8];
}

impl Sink for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> bool {
        let fits = self.len() + bytes.len() <= MAX_MESSAGE;
        if fits {
            self.extend_from_slice(bytes);
        }
        fits
    }
    fn written(&self) -> &[u8] {
        self
    }
}

/// A buffer that does not grow.
#[derive(Debug)]
pub struct Fixed<'a> {
    buf: &'a mut [u8],
    len: usize,
}

impl Sink for Fixed<'_> {
    fn append(&mut self, bytes: &[u8]) -> bool {
        match self.buf.get_mut(self.len..self.len + bytes.len()) {
            Some(to) => {
                to.copy_from_slice(bytes);
                self.len += bytes.len();
                true
            }
            None => false,
        }
    }
    fn written(&self) -> &[u8] {
        self.buf.get(..self.len).unwrap_or_default()
    }
}

/// Writes fields; remembers an overflow instead of failing at each step.
#[derive(Debug)]
pub struct Writer<S = Vec<u8>> {
    sink: S,
    overflow: bool,
}

impl Writer {
    /// A message with this operation and sequence number.
    pub fn new(op: u8, seq: u32) -> Self {
        let mut w = Self { sink: Vec::with_capacity(64), overflow: false };
        w.u8(op).u32(seq);
        w
    }
}

impl<'a> Writer<Fixed<'a>> {
    /// A message in `buf`, without allocation.
    pub fn fixed(buf: &'a mut [u8], op: u8, seq: u32) -> Self {
        let mut w = Self { sink: Fixed { buf, len: 0 }, overflow: false };
        w.u8(op).u32(seq);
        w
    }

    /// Goes back to the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.sink.len = self.sink.len.min(len);
        self.overflow = false;
    }

    /// Overwrites bytes that have been written.
    pub fn patch(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if end <= self.sink.len
            && let Some(to) = self.sink.buf.get_mut(at..end)
        {
            to.copy_from_slice(bytes);
        }
    }
}

impl<S: Sink> Writer<S> {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.overflow |= !self.sink.append(bytes);
        self
    }
    /// One byte.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.put(&[v])
    }
    /// Two bytes.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.put(&v.to_le_bytes())
    }
    /// Four bytes.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.put(&v.to_le_bytes())
    }
    /// Eight bytes.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.put(&v.to_le_bytes())
    }
    /// A byte string.
    pub fn bytes(&mut self, v: &[u8]) -> &mut Self {
        self.parts(v, &[])
    }
    /// A byte string in two pieces.
    pub fn parts(&mut self, a: &[u8], b: &[u8]) -> &mut Self {
        match u16::try_from(a.len() + b.len()) {
            Ok(n) => self.u16(n).put(a).put(b),
            Err(_) => {
                self.overflow = true;
                self
            }
        }
    }
    /// The message, or `None` if it outgrew its room.
    pub fn finish(&self) -> Option<&[u8]> {
        (!self.overflow).then_some(self.sink.written())
    }
    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.sink.written().len()
    }
    /// Never: a message starts with its operation.
    pub fn is_empty(&self) -> bool {
        self.sink.written().is_empty()
    }
}

/// Reads fields; every getter answers `None` past the end.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    /// One byte.
    pub fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }
    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }
    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
    /// A byte string.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = self.u16()?;
        self.take(usize::from(n))
    }
    /// A byte string that must be UTF-8.
    pub fn str(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_as_they_were_written() {
        let mut w = Writer::new(op::KEEP, 7);
        w.u16(3).u64(u64::MAX).bytes(b"name");
        let mut r = Reader(w.finish().unwrap());
        assert_eq!((r.u8(), r.u32()), (Some(op::KEEP), Some(7)));
        assert_eq!((r.u16(), r.u64(), r.str()), (Some(3), Some(u64::MAX), Some("name")));
        assert_eq!(r.u8(), None);
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_not_cut() {
        let mut w = Writer::new(op::KEEP, 0);
        for _ in 0..3 {
            w.bytes(&[0; 30_000]);
        }
        assert!(w.finish().is_none());
    }
}
