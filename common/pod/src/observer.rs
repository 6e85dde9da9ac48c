//! What a runtime does, as metrics of the daemon.

use std::time::Duration;

use kuasar_daemon::registry::Counter;
use kuasar_oci::observer::Observer;

static EXITS: Counter = Counter { name: "kuasar_task_exits_total", labels: &["sandboxer"] };

/// Books phases and exits under the name of a sandboxer, such as `runc`.
#[derive(Debug, Clone, Copy)]
pub struct Metrics(pub &'static str);

impl Observer for Metrics {
    fn phase(&self, name: &'static str, took: Duration) {
        kuasar_daemon::metrics::observe(name, took);
    }

    fn exit(&self) {
        EXITS.add(&[self.0], 1);
    }
}
