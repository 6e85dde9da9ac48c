//! The third duty: keep. All tables of this process, and the names in them.
//!
//! Names share their first part, up to the first `/`, which by convention is a pod's id: it is
//! stored once per pod, in [`Group`]. With three descriptors and a socket per pod that halves the
//! memory of this process.

use sandbox_parent::protocol::MAX_NAME;

use super::memory::{Arena, Row, Table, Text};
use super::sys::Fd;

/// First part of a name, counted; and the pod of that name, if there is one.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Group {
    text: Text,
    users: u32,
    /// Of the pod; none while it is drained.
    listener: Fd,
    is_pod: bool,
}

/// A kept descriptor.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Kept {
    fd: Fd,
    /// Rest of the name, behind the group. [`Text`] in two halves: together with `group` that is
    /// a quarter less than it would be otherwise.
    at: u32,
    len: u16,
    group: u16,
}

impl Kept {
    fn new(fd: Fd, group: u16, rest: Text) -> Self {
        let (at, len) = rest.parts();
        Self { fd, at, len, group }
    }

    fn rest(&self) -> Text {
        Text::new(self.at, self.len)
    }
}

/// A call that the client waits for.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Pending {
    pub stream: u32,
    /// The request's frame, if it can be parked.
    pub frame: Text,
    /// First data frame of a stream call.
    pub init: Text,
    /// Next pending call of the same connection, plus one.
    pub next: u16,
    pub flags: u16,
}

/// [`Pending::flags`]
pub mod pending {
    /// The row is in use.
    pub const USED: u16 = 1;
    /// It is a streaming call.
    pub const STREAMING: u16 = 2;
    pub const CLIENT_CLOSED: u16 = 4;
    pub const DAEMON_CLOSED: u16 = 8;
    /// The client has had the daemon's first data frame, its acknowledgement.
    pub const ACKNOWLEDGED: u16 = 16;
    /// Drop the daemon's next data frame: the client has had its acknowledgement.
    pub const SWALLOW: u16 = 32;
    /// An Unavailable answer is owed.
    pub const OWED: u16 = 64;
    /// It waits for a daemon, and has to be sent to the next one.
    pub const PARKED: u16 = 128;
    /// The request could be parked.
    pub const PARKABLE: u16 = 256;
    /// It is parked for as long as calls are held, and no longer.
    pub const READ: u16 = 512;
}

// SAFETY: plain integers and a bool, for which zero is `false`; a group without users is free.
unsafe impl Row for Group {
    fn is_free(&self) -> bool {
        self.users == 0
    }
}
// SAFETY: plain integers; a kept row without a descriptor is free.
unsafe impl Row for Kept {
    fn is_free(&self) -> bool {
        !self.fd.is_some()
    }
}
// SAFETY: plain integers.
unsafe impl Row for Pending {
    fn is_free(&self) -> bool {
        self.flags & pending::USED == 0
    }
}

/// Bounds of the tables.
#[derive(Clone, Copy)]
pub struct Limits {
    pub pods: usize,
    pub connections: usize,
    pub pending: usize,
    pub kept: usize,
    pub watched: usize,
    /// How long calls wait for the next daemon, in milliseconds.
    pub hold: usize,
}

/// Names, kept descriptors, pods and pending calls.
pub struct Store {
    arena: Arena,
    groups: Table<Group>,
    kept: Table<Kept>,
    pub pending: Table<Pending>,
    max_pods: usize,
    /// A daemon is there or expected: calls wait for it where they are.
    pub holding: bool,
}

fn split(name: &[u8]) -> (&[u8], &[u8]) {
    name.split_at(name.iter().position(|&b| b == b'/').unwrap_or(name.len()))
}

impl Store {
    pub fn new(limits: &Limits) -> Result<Self, i32> {
        // Names are short, and a parked request has some 200 bytes.
        let bytes = limits.pending.saturating_mul(512) + (limits.kept + limits.pods) * 64;
        Ok(Self {
            arena: Arena::new(bytes.max(1 << 20))?,
            groups: Table::new((limits.pods + limits.kept).min(60_000))?,
            kept: Table::new(limits.kept)?,
            pending: Table::new(limits.pending.min(60_000))?,
            max_pods: limits.pods,
            holding: false,
        })
    }

    /// Stores bytes that [`Store::release`] frees.
    pub fn text(&mut self, bytes: &[u8]) -> Option<Text> {
        self.arena.store(bytes)
    }

    /// The bytes of a text.
    pub fn get(&self, text: Text) -> &[u8] {
        self.arena.get(text)
    }

    /// Frees a text; all others follow.
    pub fn release(&mut self, text: Text) {
        if text.is_empty() {
            return;
        }
        self.arena.remove(text);
        self.groups.iter_mut().for_each(|(_, g)| g.text.shift(text));
        self.kept.iter_mut().for_each(|(_, k)| {
            let mut rest = k.rest();
            rest.shift(text);
            k.at = rest.parts().0;
        });
        self.pending.iter_mut().for_each(|(_, p)| {
            p.frame.shift(text);
            p.init.shift(text);
        });
    }

    fn find_group(&self, name: &[u8]) -> Option<usize> {
        self.groups.iter().find(|(_, g)| self.get(g.text) == name).map(|(i, _)| i)
    }

    fn hold_group(&mut self, name: &[u8]) -> Option<u16> {
        let i = match self.find_group(name) {
            Some(i) => {
                self.groups.get_mut(i)?.users += 1;
                i
            }
            None => {
                let text = self.arena.store(name)?;
                match self.groups.insert(Group {
                    text,
                    users: 1,
                    listener: Fd::NONE,
                    is_pod: false,
                }) {
                    Some(i) => i,
                    None => {
                        self.release(text);
                        return None;
                    }
                }
            }
        };
        u16::try_from(i).ok()
    }

    fn drop_group(&mut self, group: u16) {
        let i = usize::from(group);
        let Some(g) = self.groups.get_mut(i) else {
            return;
        };
        if g.users > 1 {
            g.users -= 1;
        } else {
            let text = g.text;
            self.groups.remove(i);
            self.release(text);
        }
    }

    fn group(&self, group: u16) -> &[u8] {
        self.groups.get(usize::from(group)).map_or(&[], |g| self.get(g.text))
    }

    /// Keeps a descriptor under a name, in place of an older one. Gives it back when full.
    pub fn keep(&mut self, name: &[u8], fd: Fd) -> Result<(), Fd> {
        if let Some(i) = self.find_kept(name) {
            if let Some(k) = self.kept.get_mut(i) {
                k.fd.close();
                k.fd = fd;
            }
            return Ok(());
        }
        let (first, rest) = split(name);
        let Some(group) = self.hold_group(first) else {
            return Err(fd);
        };
        let Some(rest) = self.arena.store(rest) else {
            self.drop_group(group);
            return Err(fd);
        };
        if self.kept.insert(Kept::new(fd, group, rest)).is_none() {
            self.release(rest);
            self.drop_group(group);
            return Err(fd);
        }
        Ok(())
    }

    fn find_kept(&self, name: &[u8]) -> Option<usize> {
        let (first, rest) = split(name);
        let group = self.find_group(first)?;
        let same = |k: &Kept| usize::from(k.group) == group && self.get(k.rest()) == rest;
        self.kept.iter().find(|(_, k)| same(k)).map(|(i, _)| i)
    }

    /// The descriptor kept under a name; it stays here.
    pub fn fetch(&self, name: &[u8]) -> Option<Fd> {
        self.kept.get(self.find_kept(name)?).map(|k| k.fd)
    }

    /// Closes every descriptor whose name begins with `prefix`.
    pub fn forget(&mut self, prefix: &[u8]) {
        let (first, rest) = split(prefix);
        for i in self.kept.indices().rev() {
            let Some(k) = self.kept.get(i) else { continue };
            let (group, tail) = (self.group(k.group), self.get(k.rest()));
            let hit = if rest.is_empty() {
                group.starts_with(first)
            } else {
                group == first && tail.starts_with(rest)
            };
            if hit && let Some(mut k) = self.kept.remove(i) {
                k.fd.close();
                self.release(k.rest());
                self.drop_group(k.group);
            }
        }
    }

    /// How many descriptors are kept.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Kept names from row `from` on: row, first part, rest.
    pub fn names(&self, from: usize) -> impl Iterator<Item = (usize, &[u8], &[u8])> {
        self.kept
            .iter()
            .skip_while(move |(i, _)| *i < from)
            .map(|(i, k)| (i, self.group(k.group), self.get(k.rest())))
    }

    /// Adds a pod, or answers the one that has this name.
    pub fn add_pod(&mut self, name: &[u8]) -> Option<usize> {
        if name.contains(&b'/') || name.len() > MAX_NAME {
            return None;
        }
        if let Some(i) = self.find_pod(name) {
            return Some(i);
        }
        if self.pods().count() >= self.max_pods {
            return None;
        }
        let i = usize::from(self.hold_group(name)?);
        self.groups.get_mut(i)?.is_pod = true;
        Some(i)
    }

    /// The pod with this name.
    pub fn find_pod(&self, name: &[u8]) -> Option<usize> {
        self.find_group(name).filter(|i| self.groups.get(*i).is_some_and(|g| g.is_pod))
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = usize> {
        self.groups.iter().filter(|(_, g)| g.is_pod).map(|(i, _)| i)
    }

    /// A pod's name.
    pub fn pod_name(&self, pod: usize) -> &[u8] {
        self.groups.get(pod).map_or(&[], |g| self.get(g.text))
    }

    /// A pod's listening socket, unless it is drained.
    pub fn listener(&self, pod: usize) -> Option<Fd> {
        self.groups.get(pod).map(|g| g.listener).filter(|f| f.is_some())
    }

    /// Gives a pod another listening socket, or none, and closes the one it had.
    pub fn set_listener(&mut self, pod: usize, listener: Fd) {
        if let Some(g) = self.groups.get_mut(pod).filter(|g| g.is_pod) {
            g.listener.close();
            g.listener = listener;
        }
    }

    /// Removes a pod and closes its listener.
    pub fn remove_pod(&mut self, pod: usize) {
        self.set_listener(pod, Fd::NONE);
        if let Some(g) = self.groups.get_mut(pod).filter(|g| g.is_pod) {
            g.is_pod = false;
            if let Ok(group) = u16::try_from(pod) {
                self.drop_group(group);
            }
        }
    }
}
