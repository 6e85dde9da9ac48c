//! What was done for requests that came with a trace, until the host asks for it.
//!
//! A guest has no way to a collector, and is not to have one. The host decides what is followed: a
//! request without a `traceparent` leaves nothing here.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kuasar_oci::observer::Observer;
use kuasar_trace::{Finished, Kind, Sink};
use vmm_common::guest as api;

use crate::limits;

/// Finished spans, bounded: the oldest go first.
#[derive(Debug, Clone, Default)]
pub struct Spans(Arc<Mutex<VecDeque<Finished>>>);

impl Sink for Spans {
    fn record(&self, span: Finished) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= limits::SPANS {
            all.pop_front();
        }
        all.push_back(span);
    }
}

impl Spans {
    /// Takes what is there of a trace.
    pub fn take(&self, trace: &[u8]) -> Vec<api::Span> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (wanted, others) = all.drain(..).partition(|span| span.context.trace == trace);
        *all = others;
        if all.is_empty() {
            all.shrink_to_fit();
        }
        let wanted: VecDeque<Finished> = wanted;
        wanted.into_iter().map(told).collect()
    }
}

fn told(span: Finished) -> api::Span {
    let nanos = |at: SystemTime| {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    api::Span {
        span_id: span.context.span.into(),
        parent_id: span.parent.map(Into::into).unwrap_or_default(),
        name: span.name,
        server: span.kind == Kind::Server,
        start_ns: nanos(span.start),
        end_ns: nanos(span.end),
        error: span.error.unwrap_or_default(),
        ..Default::default()
    }
}

/// The phases of the runtime's work become spans.
#[derive(Debug, Clone, Copy)]
pub struct Phases;

impl Observer for Phases {
    fn phase(&self, name: &'static str, took: Duration) {
        kuasar_trace::past(name, took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kuasar_trace::Context;

    fn one(context: Context) -> Finished {
        let (start, end) = (SystemTime::now(), SystemTime::now());
        Finished {
            name: "x".into(),
            kind: Kind::Server,
            context,
            parent: None,
            start,
            end,
            attributes: Vec::new(),
            error: None,
            service: None,
        }
    }

    #[test]
    fn a_trace_is_told_once_and_what_nobody_asks_for_is_bounded() {
        let spans = Spans::default();
        let (ours, other) = (Context::root(), Context::root());
        spans.record(one(ours));
        spans.record(one(other));
        assert_eq!(spans.take(&ours.trace).len(), 1);
        assert!(spans.take(&ours.trace).is_empty());
        for _ in 0..2 * limits::SPANS {
            spans.record(one(other));
        }
        assert_eq!(spans.take(&other.trace).len(), limits::SPANS);
    }
}
