//! What the host is to know without having asked: a bounded queue behind `Guest.NextEvents`.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use vmm_common::guest::{self, NextEventsResponse, OutOfMemory, Text};

use crate::limits;

#[derive(Default)]
struct Queue {
    events: VecDeque<guest::Event>,
    /// Sequence number of the newest one.
    last: u64,
}

/// The queue. When it is full the oldest go, and the host is told how many.
#[derive(Default)]
pub struct Events {
    queue: Mutex<Queue>,
    more: Notify,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: guest::event::Event) {
        let mut queue = self.lock();
        queue.last += 1;
        if queue.events.len() >= limits::EVENTS {
            queue.events.pop_front();
        }
        let sequence = queue.last;
        let event = guest::Event { sequence, event: Some(event), ..Default::default() };
        queue.events.push_back(event);
        drop(queue);
        self.more.notify_waiters();
    }

    /// A container has had an out-of-memory kill.
    pub fn oom(&self, container: &str) {
        let container = container.into();
        self.push(guest::event::Event::Oom(OutOfMemory { container, ..Default::default() }));
    }

    /// Something that an operator wants to read.
    pub fn warning(&self, text: &str) {
        let mut end = text.len().min(limits::TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = text.get(..end).unwrap_or_default().into();
        self.push(guest::event::Event::Warning(Text { text, ..Default::default() }));
    }

    /// Events after `after`; waits until there is one, at most `timeout`.
    pub async fn after(&self, after: u64, timeout: Duration) -> NextEventsResponse {
        let wait = async {
            loop {
                let more = self.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                if self.lock().last > after {
                    return;
                }
                more.await;
            }
        };
        let _ = tokio::time::timeout(timeout.min(limits::EVENTS_TIME), wait).await;
        let queue = self.lock();
        let events: Vec<_> =
            queue.events.iter().filter(|event| event.sequence > after).cloned().collect();
        let dropped = events
            .first()
            .map_or(0, |event| event.sequence.saturating_sub(after).saturating_sub(1));
        NextEventsResponse { events, dropped, ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_waited_for_kept_and_dropped() {
        let events = std::sync::Arc::new(Events::default());
        let none = events.after(0, Duration::from_millis(10)).await;
        assert!(none.events.is_empty() && none.dropped == 0);
        let waiting = tokio::spawn({
            let events = events.clone();
            async move { events.after(0, Duration::from_secs(60)).await }
        });
        tokio::task::yield_now().await;
        events.oom("c1");
        let answer = waiting.await.unwrap();
        assert_eq!(answer.events.len(), 1);
        assert_eq!(answer.events[0].oom().container, "c1");
        for _ in 0..limits::EVENTS + 9 {
            events.warning(&"é".repeat(limits::TEXT));
        }
        let answer = events.after(1, Duration::ZERO).await;
        assert_eq!((answer.events.len(), answer.dropped), (limits::EVENTS, 9));
        assert!(answer.events[0].warning().text.len() <= limits::TEXT);
        let last = answer.events.last().unwrap().sequence;
        assert!(events.after(last, Duration::ZERO).await.events.is_empty());
        // A number that we never gave answers nothing, and nothing breaks.
        assert!(events.after(u64::MAX, Duration::ZERO).await.events.is_empty());
    }
}
