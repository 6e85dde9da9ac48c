//! How StratoVirt is run: the keys of the configuration file's `[stratovirt]`.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// StratoVirt's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StratoVirtConfig {
    /// The program: absolute path, or a name in `PATH`. Its features `vhost_vsock` and
    /// `virtio_rng` are needed for the kernel's vsock and the entropy source.
    pub path: PathBuf,
    /// Its kernel, in place of `guest.kernel`: a vmlinux (of whose ELF file the flat binary is made
    /// that StratoVirt takes), a bzImage, or such a flat binary.
    pub kernel: Option<PathBuf>,
    /// Its own system call filter. Off where its list does not fit the host's C library, which
    /// then ends it.
    pub seccomp: bool,
    /// A balloon: memory can be resized. Machines with one cannot be saved.
    pub balloon: bool,
    /// How agents are reached.
    pub channel: Chosen,
    /// Deadline for its start and for each command, in milliseconds.
    pub timeout_ms: u64,
    /// How long saving or loading a snapshot, and resizing memory, may take, in milliseconds.
    pub snapshot_timeout_ms: u64,
    /// How long a guest's memory may stay the same, before the size that was asked for is reached,
    /// until that counts for all that it can give or take, in milliseconds.
    pub memory_still_ms: u64,
}

/// The ways that StratoVirt has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chosen {
    /// The kernel's vsock where the host has it, else the console.
    #[default]
    Auto,
    /// vsock of the host's kernel.
    Vsock,
    /// A virtio console: its microvm has no other port.
    Console,
}

impl Default for StratoVirtConfig {
    fn default() -> Self {
        Self {
            path: "stratovirt".into(),
            kernel: None,
            seccomp: true,
            balloon: false,
            channel: Chosen::Auto,
            timeout_ms: 10_000,
            snapshot_timeout_ms: 60_000,
            memory_still_ms: 1_000,
        }
    }
}

impl StratoVirtConfig {
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
