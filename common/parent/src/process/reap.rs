//! The second duty: reap, and keep each watched exit until the daemon has recorded it.
//!
//! A container's init is made by an engine that this process spawned; it becomes our child when
//! the engine exits. The daemon learns its pid from the engine and asks to watch it, and by then
//! it may have ended. So exits of pids that nobody watches (yet) go into a ring with a growing
//! number; a Watch carries the number as it was before the engine ran, and looks there first. A
//! pid that was reused in between has an older number and is not mistaken.
//!
//! A process that is not our child, or not yet, is watched through a pidfd. When that reports the
//! end and the process never becomes ours, its status is unknown, which is reported as such.

use sandbox_parent::protocol::{Fixed, Writer, op};

use super::memory::{Row, Table};
use super::sys::{self, Fd};

const RING: usize = 256;
/// A status that nobody knows.
const UNKNOWN: i32 = -1;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum State {
    // Never constructed: it is what an untouched row reads as.
    #[allow(dead_code)]
    Free = 0,
    Runs,
    /// Ended, but its present parent has not reaped it.
    Zombie,
    Ended,
    Told,
}

/// A watched process.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Watched {
    pub cookie: u64,
    at: u64,
    pid: i32,
    status: i32,
    /// Only while it is not our child.
    pidfd: Fd,
    state: State,
}

#[derive(Clone, Copy)]
struct Exit {
    number: u64,
    at: u64,
    pid: i32,
    status: i32,
}

// SAFETY: plain integers and a fieldless enum with a zero variant.
unsafe impl Row for Watched {
    fn is_free(&self) -> bool {
        self.state == State::Free
    }
}
// SAFETY: plain integers; no exit has pid 0.
unsafe impl Row for Exit {
    fn is_free(&self) -> bool {
        self.pid == 0
    }
}

impl Watched {
    fn end(&mut self, status: i32, at: u64) {
        self.status = status;
        self.at = at;
        self.state = State::Ended;
        self.pidfd.close();
    }

    fn runs(&self) -> bool {
        matches!(self.state, State::Runs | State::Zombie)
    }
}

/// All that is known of children.
pub struct Reaper {
    pub watched: Table<Watched>,
    ring: Table<Exit>,
    /// Number of the next unwatched exit.
    pub next: u64,
    /// There may be exits that the daemon has not been told.
    pub news: bool,
    /// There are zombies of other parents, to be looked at again.
    pub zombies: bool,
}

impl Reaper {
    pub fn new(watched: usize) -> Result<Self, i32> {
        let (watched, ring) = (Table::new(watched)?, Table::new(RING)?);
        Ok(Self { watched, ring, next: 1, news: false, zombies: false })
    }

    /// Reaps everything that has ended.
    pub fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: `status` is a valid out pointer.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let at = sys::now_ns();
            let found = self.watched.iter().find(|(_, w)| w.pid == pid && w.runs()).map(|(i, _)| i);
            match found.and_then(|i| self.watched.get_mut(i)) {
                Some(w) => {
                    w.end(status, at);
                    self.news = true;
                }
                None => self.note(Exit { number: self.next, at, pid, status }),
            }
        }
    }

    /// Puts an exit that nobody watches into the ring, in place of the oldest.
    fn note(&mut self, exit: Exit) {
        self.next += 1;
        if self.ring.len() >= RING {
            let oldest = self.ring.iter().min_by_key(|(_, e)| e.number).map(|(i, _)| i);
            if let Some(i) = oldest {
                self.ring.remove(i);
            }
        }
        self.ring.insert(exit);
    }

    /// Whether there is room for another process.
    pub fn has_room(&self, limit: usize) -> bool {
        self.watched.len() < limit
    }

    /// Watches a child that has just been forked.
    pub fn adopt(&mut self, cookie: u64, pid: i32) {
        self.forget(cookie);
        let state = State::Runs;
        self.watched.insert(Watched { cookie, at: 0, pid, status: 0, pidfd: Fd::NONE, state });
    }

    /// Starts to watch a process; finds an exit that came before. Answers the row, and a pidfd to
    /// poll when it is not our child.
    pub fn watch(&mut self, cookie: u64, pid: i32, since: u64) -> Result<(usize, Fd), i32> {
        self.forget(cookie);
        let mut row =
            Watched { cookie, at: 0, pid, status: 0, pidfd: Fd::NONE, state: State::Runs };
        let found = self.ring.iter().find(|(_, e)| e.pid == pid && e.number >= since);
        if let Some((i, exit)) = found.map(|(i, e)| (i, *e)) {
            self.ring.remove(i);
            row.end(exit.status, exit.at);
        } else {
            match sys::pidfd_open(pid) {
                Ok(mut fd) if is_child(fd) => fd.close(),
                Ok(fd) => row.pidfd = fd,
                Err(libc::ESRCH | libc::EINVAL) => row.end(UNKNOWN, sys::now_ns()),
                Err(e) => return Err(e),
            }
        }
        self.news |= row.state == State::Ended;
        let fd = row.pidfd;
        match self.watched.insert(row) {
            Some(i) => Ok((i, fd)),
            None => {
                row.pidfd.close();
                Err(libc::ENOSPC)
            }
        }
    }

    /// A pidfd has reported the end of the process in row `i`.
    pub fn ended(&mut self, i: usize) {
        self.reap();
        let Some(w) = self.watched.get_mut(i).filter(|w| w.runs() && w.pidfd.is_some()) else {
            return;
        };
        if sys::exists(w.pid) && !is_child(w.pidfd) {
            // Its parent has not reaped it; if that dies first, it becomes ours with its status.
            w.state = State::Zombie;
            self.zombies = true;
        } else if !sys::exists(w.pid) {
            w.end(UNKNOWN, sys::now_ns());
            self.news = true;
        }
    }

    /// Looks again at those whose parents have not reaped them.
    pub fn look_again(&mut self) {
        self.reap();
        self.zombies = false;
        for (_, w) in self.watched.iter_mut().filter(|(_, w)| w.state == State::Zombie) {
            if sys::exists(w.pid) {
                self.zombies = true;
            } else {
                w.end(UNKNOWN, sys::now_ns());
                self.news = true;
            }
        }
    }

    /// Drops an entry.
    pub fn forget(&mut self, cookie: u64) {
        let found = self.watched.iter().find(|(_, w)| w.cookie == cookie).map(|(i, _)| i);
        if let Some(mut w) = found.and_then(|i| self.watched.remove(i)) {
            w.pidfd.close();
        }
    }

    /// Whether a watched process has not ended.
    pub fn busy(&self) -> bool {
        self.watched.iter().any(|(_, w)| w.runs())
    }

    /// A new daemon knows of nothing.
    pub fn untell(&mut self) {
        for (_, w) in self.watched.iter_mut().filter(|(_, w)| w.state == State::Told) {
            w.state = State::Ended;
        }
        self.news = true;
    }

    /// The next exit that the daemon has not been told, written as an event; its row.
    pub fn untold(&self, m: &mut Writer<Fixed<'_>>) -> Option<usize> {
        let (i, w) = self.watched.iter().find(|(_, w)| w.state == State::Ended)?;
        m.u64(w.cookie).u32(w.pid as u32).u32(w.status as u32).u64(w.at);
        Some(i)
    }

    /// The daemon has been told of row `i`.
    pub fn told(&mut self, i: usize) {
        if let Some(w) = self.watched.get_mut(i) {
            w.state = State::Told;
        }
    }

    /// Empty message for [`Reaper::untold`].
    pub fn event(buf: &mut [u8]) -> Writer<Fixed<'_>> {
        Writer::fixed(buf, op::EXIT, 0)
    }
}

/// Whether a process is a child of ours, without reaping it.
fn is_child(pidfd: Fd) -> bool {
    // SAFETY: `info` is a valid out buffer; WNOWAIT leaves the child as it is.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_PIDFD, pidfd.get() as libc::id_t, &mut info, flags) == 0
    }
}
