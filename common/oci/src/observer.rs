//! What a program learns of the runtime's work, for its metrics.

use std::time::Duration;

/// Told of what happens. Does nothing by itself; `()` is the observer that wants to know nothing.
pub trait Observer: Send + Sync {
    /// A phase of a request took this long. Names are constants: `rootfs`, `engine_create`,
    /// `engine_start`, `engine_exec`.
    fn phase(&self, name: &'static str, took: Duration) {
        let _ = (name, took);
    }

    /// A container's or an exec's process has ended.
    fn exit(&self) {}
}

impl Observer for () {}
