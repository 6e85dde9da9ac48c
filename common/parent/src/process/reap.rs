//! The second duty: reap, and keep each watched exit until the daemon has recorded it.
//!
//! A container's init is made by an engine that this process spawned; it becomes our child when
//! the engine exits. The daemon learns its pid from the engine and asks to watch it, and by then
//! it may have ended. So exits of pids that nobody watches (yet) go into a ring with a growing
//! number; a Watch carries the number as it was before the engine ran, and looks there first. A
//! pid that was reused in between has an older number and is not mistaken.

use sandbox_parent::protocol::{Writer, op};

use super::sys;

const RING: usize = 512;

/// A watched process.
pub struct Watched {
    pub cookie: u64,
    pub pid: i32,
    /// Wait status and time, once it has ended.
    pub exit: Option<(i32, u64)>,
    /// Whether the present daemon has been told.
    pub told: bool,
}

/// All that is known of children.
#[derive(Default)]
pub struct Reaper {
    pub watched: Vec<Watched>,
    ring: Vec<(u64, i32, i32, u64)>,
    /// Number of the next unwatched exit.
    pub next: u64,
}

impl Reaper {
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
            let entry = self.watched.iter_mut().find(|w| w.pid == pid && w.exit.is_none());
            if let Some(w) = entry {
                w.exit = Some((status, at));
            } else {
                if self.ring.len() >= RING {
                    self.ring.remove(0);
                }
                self.ring.push((self.next, pid, status, at));
                self.next += 1;
            }
        }
    }

    /// Starts to watch; finds an exit that came before.
    pub fn watch(&mut self, cookie: u64, pid: i32, since: u64) {
        self.forget(cookie);
        let at = self.ring.iter().position(|e| e.1 == pid && e.0 >= since);
        let mut exit = at.map(|i| self.ring.remove(i)).map(|(_, _, status, at)| (status, at));
        // SAFETY: signal 0 only asks whether the process exists.
        if exit.is_none() && unsafe { libc::kill(pid, 0) } < 0 {
            // Gone, and not through us: its status cannot be known.
            exit = Some((-1, sys::now_ns()));
        }
        self.watched.push(Watched { cookie, pid, exit, told: false });
    }

    /// Drops an entry.
    pub fn forget(&mut self, cookie: u64) {
        self.watched.retain(|w| w.cookie != cookie);
    }

    /// The next exit that the daemon has not been told, as an event.
    pub fn untold(&mut self) -> Option<(&mut Watched, Writer)> {
        let w = self.watched.iter_mut().find(|w| w.exit.is_some() && !w.told)?;
        let (status, at) = w.exit?;
        let mut m = Writer::new(op::EXIT, 0);
        m.u64(w.cookie).u32(w.pid as u32).u32(status as u32).u64(at);
        Some((w, m))
    }
}
