//! Ends all connections of a pod at once.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Off until it is turned on, for good. A pod has one: a tenth of a `watch` channel.
#[derive(Default)]
pub(crate) struct Switch {
    on: AtomicBool,
    told: Notify,
}

impl Switch {
    /// Wakes everybody who waits.
    pub(crate) fn turn_on(&self) {
        self.on.store(true, Ordering::SeqCst);
        self.told.notify_waiters();
    }

    /// Until it is on.
    pub(crate) async fn turned_on(&self) {
        let told = self.told.notified();
        tokio::pin!(told);
        // From here on a notification counts, so that none is missed between look and wait.
        told.as_mut().enable();
        if !self.on.load(Ordering::SeqCst) {
            told.await;
        }
    }
}
