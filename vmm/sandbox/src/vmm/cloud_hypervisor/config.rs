//! How Cloud Hypervisor is run: the keys of the configuration file's `[cloud_hypervisor]`.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Cloud Hypervisor's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudHypervisorConfig {
    /// The program: absolute path, or a name in `PATH`.
    pub path: PathBuf,
    /// Its own system call filter. Only for debugging: without it a broken-out guest has every
    /// call that the jail leaves.
    pub seccomp: bool,
    /// A balloon that gives free pages back to the host by itself.
    pub balloon: bool,
    /// Deadline for its start and for each request, in milliseconds.
    pub timeout_ms: u64,
    /// How long a guest may take to let go of a device, in milliseconds.
    pub unplug_timeout_ms: u64,
    /// How long saving or loading a snapshot, and resizing memory, may take, in milliseconds.
    pub snapshot_timeout_ms: u64,
    /// How long a guest's memory may stay the same, before the size that was asked for is reached,
    /// until that counts for all that it can give or take, in milliseconds.
    pub memory_still_ms: u64,
}

impl Default for CloudHypervisorConfig {
    fn default() -> Self {
        Self {
            path: "cloud-hypervisor".into(),
            seccomp: true,
            balloon: true,
            timeout_ms: 10_000,
            unplug_timeout_ms: 15_000,
            snapshot_timeout_ms: 60_000,
            memory_still_ms: 1_000,
        }
    }
}

impl CloudHypervisorConfig {
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
