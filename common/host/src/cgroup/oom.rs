//! Being told when the kernel kills for want of memory.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::{Cgroup, Layout};
use crate::{Context, Result};

/// Watches one group for out-of-memory kills: poll its descriptor for reading, then call
/// [`OomWatch::read`].
#[derive(Debug)]
pub struct OomWatch {
    fd: OwnedFd,
    group: Cgroup,
    seen: u64,
}

impl OomWatch {
    /// Takes the notification and answers how many kills there were since the last call. Spurious
    /// notifications (the group was removed, a limit was touched without a kill) answer 0.
    pub fn read(&mut self) -> u64 {
        let mut buf = [0u8; 4096];
        // Non-blocking; an empty queue is no error. inotify may hold several events.
        while nix::unistd::read(&self.fd, &mut buf).is_ok_and(|n| n == buf.len()) {}
        let now = self.group.oom_kills();
        let new = now.saturating_sub(self.seen);
        self.seen = self.seen.max(now);
        new
    }

    /// The group no longer exists: give the watch up. (v1 signals a removal like a kill.)
    pub fn is_over(&self) -> bool {
        !self.group.exists()
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OomWatch> for OwnedFd {
    fn from(watch: OomWatch) -> Self {
        watch.fd
    }
}

impl Cgroup {
    /// Starts watching for out-of-memory kills: an eventfd on `memory.oom_control` (v1), inotify
    /// on `memory.events` (v2).
    ///
    /// # Errors
    /// [`crate::Error::Io`]; [`crate::Error::Invalid`] without the memory controller.
    pub fn watch_oom(&self) -> Result<OomWatch> {
        let dir = self.need("memory")?;
        let what = || format!("cannot watch {} for memory kills", self.path().display());
        let seen = self.oom_kills();
        let fd = match self.layout() {
            Layout::V1(_) => {
                let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                let event = EventFd::from_value_and_flags(0, flags).context(what)?;
                let control = fs::File::open(dir.join("memory.oom_control")).context(what)?;
                let line = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
                fs::write(dir.join("cgroup.event_control"), line).context(what)?;
                event.into()
            }
            Layout::V2(_) => {
                let i =
                    Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(what)?;
                i.add_watch(&dir.join("memory.events"), AddWatchFlags::IN_MODIFY).context(what)?;
                i.into()
            }
        };
        Ok(OomWatch { fd, group: self.clone(), seen })
    }

    /// The descriptor of [`Self::watch_oom`] alone; `None` without the memory controller.
    pub fn oom_watch(&self) -> Option<OwnedFd> {
        self.watch_oom().ok().map(OwnedFd::from)
    }
}
