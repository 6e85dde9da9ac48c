//! Containers of one pod that are not all of one kind.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_task::error::Result;
use containerd_task::runtime::Mount;
use serde_json::Value;

use crate::pod::Pod;

/// A container that is being made: its rootfs is mounted, its spec edited for the pod.
#[derive(Debug)]
pub struct Candidate {
    /// Container id.
    pub id: String,
    /// Its pod.
    pub pod: Arc<Pod>,
    /// Where its rootfs is on the host. What is in it is the image's.
    pub rootfs: PathBuf,
    /// What was mounted there; empty when it was there already.
    pub mounts: Vec<Mount>,
    /// The number that the first of [`Chosen::descriptors`] has in the engine.
    pub descriptor: RawFd,
}

/// How a container is made.
#[derive(Debug)]
pub struct Chosen {
    /// Engine, by name.
    pub engine: String,
    /// Further descriptors for it.
    pub descriptors: Vec<OwnedFd>,
}

/// Looks at containers, and says which engine makes them.
#[async_trait]
pub trait Payloads: Send + Sync {
    /// Chooses; may change the spec, which is written for the engine afterwards.
    ///
    /// # Errors
    /// When no engine can make it. Everything is undone.
    async fn choose(&self, candidate: &Candidate, spec: &mut Value) -> Result<Chosen>;

    /// Whether further processes can be run in containers of this engine.
    ///
    /// # Errors
    /// When they cannot.
    fn check_exec(&self, engine: &str) -> Result<()>;
}
