//! How Firecracker is run: the keys of the configuration file's `[firecracker]`.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Firecracker's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FirecrackerConfig {
    /// The program: absolute path, or a name in `PATH`.
    pub path: PathBuf,
    /// Its own system call filter. Only for debugging: without it a broken-out guest has every
    /// call that the jail leaves.
    pub seccomp: bool,
    /// A balloon: memory can be resized, and free pages are given back to the host by themselves.
    pub balloon: bool,
    /// Places for writable disks that come while the machine runs: empty drives from the boot, of
    /// which each takes a place among the guest's devices. With those below at most 16.
    pub disk_slots: u8,
    /// The same for read-only disks: Firecracker wants to know before the boot.
    pub read_only_disk_slots: u8,
    /// Deadline for its start and for each request, in milliseconds.
    pub timeout_ms: u64,
    /// How long saving or loading a snapshot, and resizing memory, may take, in milliseconds.
    pub snapshot_timeout_ms: u64,
    /// How long a guest's memory may stay the same, before the size that was asked for is reached,
    /// until that counts for all that it can give or take, in milliseconds. Firecracker's numbers
    /// are as old as a second.
    pub memory_still_ms: u64,
}

impl Default for FirecrackerConfig {
    fn default() -> Self {
        Self {
            path: "firecracker".into(),
            seccomp: true,
            balloon: true,
            disk_slots: 4,
            read_only_disk_slots: 2,
            timeout_ms: 10_000,
            snapshot_timeout_ms: 60_000,
            memory_still_ms: 2_500,
        }
    }
}

impl FirecrackerConfig {
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    pub(super) fn snapshot_timeout(&self) -> Duration {
        Duration::from_millis(self.snapshot_timeout_ms)
    }

    pub(super) fn memory_still(&self) -> Duration {
        Duration::from_millis(self.memory_still_ms)
    }
}
