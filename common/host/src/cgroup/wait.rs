//! Waiting for a group to change state.
//!
//! v2's `cgroup.events` raises `POLLPRI` when it changes. v1 has no event for what is waited for
//! here (frozen, empty), so there the file is looked at again in growing steps.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// First and longest pause between two looks where the kernel tells nothing.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

pub(super) struct Wait {
    until: Instant,
    events: Option<File>,
    pause: Duration,
}

impl Wait {
    /// Waits on `file` if it is a `cgroup.events`. Make it before the first look at the state.
    pub(super) fn new(file: &Path, deadline: Duration) -> Self {
        let events = file.file_name().is_some_and(|n| n == "cgroup.events");
        let events = events.then(|| File::open(file).ok()).flatten();
        if let Some(mut f) = events.as_ref() {
            // kernfs raises the event against the last read of this descriptor; a failed read
            // only means that the first wait ends at once.
            let _ = std::io::Read::read_to_end(&mut f, &mut Vec::new());
        }
        Self { until: Instant::now() + deadline, events, pause: PAUSE.0 }
    }

    /// Returns `true` when it is time to look again, `false` after the deadline.
    pub(super) fn more(&mut self) -> bool {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        match &self.events {
            Some(file) => {
                // Never longer than a while: the event may lie between two reads.
                let step = left.min(Duration::from_millis(100));
                let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
                let timeout = PollTimeout::try_from(step).unwrap_or(PollTimeout::ZERO);
                // An interrupted wait is an early look.
                let _ = poll(&mut fds, timeout);
                let mut file: &File = file;
                use std::io::{Read, Seek};
                // The next event counts from this read; a failed one only makes us look earlier.
                let _ = file.rewind().and_then(|()| file.read_to_end(&mut Vec::new()));
                // A removed group stays readable with an error; do not spin on it.
                std::thread::sleep(PAUSE.0);
            }
            None => {
                std::thread::sleep(self.pause.min(left));
                self.pause = (self.pause * 2).min(PAUSE.1);
            }
        }
        true
    }
}
