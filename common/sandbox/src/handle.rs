//! What a sandboxer may tell the Controller about a sandbox at any time.

use std::sync::Arc;

use crate::error::Result;
use crate::sandboxer::SandboxExit;

/// Takes what a [`SandboxHandle`] says. The Controller is one; a sandboxer's tests may bring
/// their own.
pub trait HandleSink: Send + Sync + 'static {
    /// Makes the sandboxer's state durable.
    ///
    /// # Errors
    /// When it could not be written, or the sandbox is gone.
    fn save(&self, state: serde_json::Value) -> Result<()>;

    /// Takes the sandboxer's state; it is written with the next change of the sandbox.
    ///
    /// # Errors
    /// When the sandbox is gone.
    fn stage(&self, state: serde_json::Value) -> Result<()>;

    /// The sandbox has ended by itself.
    fn exited(&self, exit: SandboxExit);
}

/// A sandboxer's line to the Controller, for one sandbox. Cheap to clone; may be kept.
#[derive(Clone)]
pub struct SandboxHandle(Arc<dyn HandleSink>);

impl SandboxHandle {
    /// A handle that speaks to `sink`.
    pub fn new(sink: Arc<dyn HandleSink>) -> Self {
        Self(sink)
    }

    /// Saves the sandboxer's own state of this sandbox. Durable when it returns; may be called
    /// from inside any method of the sandboxer.
    ///
    /// # Errors
    /// When it could not be written, or the sandbox is gone.
    pub async fn save(&self, state: serde_json::Value) -> Result<()> {
        // A small file on tmpfs: cheaper here than on another thread.
        self.0.save(state)
    }

    /// Sets the sandboxer's own state of this sandbox, to be written with what the Controller
    /// records next: the success of the Create or Start that is under way, or its roll-back, which
    /// sees this state. One write less than [`SandboxHandle::save`], for what need not be found
    /// again when the daemon is killed before.
    ///
    /// # Errors
    /// When the sandbox is gone.
    pub fn stage(&self, state: serde_json::Value) -> Result<()> {
        self.0.stage(state)
    }

    /// Reports that the sandbox has ended by itself: it becomes Stopped and its Waits are
    /// answered. The first report counts; after an ordered stop it does nothing.
    pub fn exited(&self, exit: SandboxExit) {
        self.0.exited(exit);
    }
}

impl std::fmt::Debug for SandboxHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SandboxHandle")
    }
}
