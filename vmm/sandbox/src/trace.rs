//! What a guest has done for a request that is followed.
//!
//! vmm-task keeps the spans of such a request until it is asked for them, which happens beside
//! the pod's work and holds nobody up. The guest is hostile: it can say something about the one call
//! that it was asked about, in bounded words, and nothing about other times or traces.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kuasar_forward::TracedCall;
use kuasar_trace::{Context, Finished, Kind};
use vmm_common::guest as api;

use crate::guest::{Client, clean, service};

/// Most spans that are taken for one call.
const MOST: usize = 64;
/// Longest name, in characters.
const NAME: usize = 128;

/// Asks the guest, and books what it says as the guest's own.
pub fn collect(client: Client, call: TracedCall) {
    tokio::spawn(async move {
        let q = api::SpansRequest { trace_id: call.context.trace.into(), ..Default::default() };
        // A guest of an older version does not know it.
        if let Ok(told) = client.call::<api::SpansResponse>(service::GUEST, "Spans", &q).await {
            spans(told, &call).into_iter().for_each(kuasar_trace::record);
        }
    });
}

fn at(ns: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_nanos(ns)).unwrap_or(UNIX_EPOCH)
}

/// The guest's spans, where they belong: its clock is moved so that its answer lies in the middle of the
/// call, times end with the call, and whatever hangs nowhere hangs at the call.
pub fn spans(told: api::SpansResponse, call: &TracedCall) -> Vec<Finished> {
    let all: Vec<(api::Span, [u8; 8], Option<[u8; 8]>)> = told
        .spans
        .into_iter()
        .take(MOST)
        .filter_map(|span| {
            let id: [u8; 8] = span.span_id.as_slice().try_into().ok()?;
            let parent = span.parent_id.as_slice().try_into().ok();
            (id != [0; 8] && id != call.context.span).then_some((span, id, parent))
        })
        .collect();
    let known: HashSet<[u8; 8]> = all.iter().map(|(_, id, _)| *id).collect();
    let answer = all.iter().find(|(_, _, parent)| *parent == Some(call.context.span));
    let took = |from: SystemTime, to: SystemTime| to.duration_since(from).unwrap_or_default();
    let Some((answer, ..)) = answer else { return Vec::new() };
    let (begun, ended) = (at(answer.start_ns), at(answer.end_ns));
    let rest = took(call.start, call.end).saturating_sub(took(begun, ended)) / 2;
    let moved = |ns: u64| {
        let later = took(begun, at(ns));
        let place = call.start.checked_add(rest).and_then(|at| at.checked_add(later));
        place.unwrap_or(call.end).clamp(call.start, call.end)
    };
    all.iter()
        .map(|(span, id, parent)| Finished {
            name: clean(&span.name).chars().take(NAME).collect(),
            kind: if span.server { Kind::Server } else { Kind::Internal },
            context: Context { span: *id, ..call.context },
            parent: parent
                .filter(|parent| known.contains(parent) && parent != id)
                .or(Some(call.context.span)),
            start: moved(span.start_ns),
            end: moved(span.end_ns).max(moved(span.start_ns)),
            attributes: Vec::new(),
            error: (!span.error.is_empty()).then(|| clean(&span.error)),
            service: Some("vmm-task"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> TracedCall {
        let start = SystemTime::now();
        TracedCall { context: Context::root(), start, end: start + Duration::from_millis(10) }
    }

    fn span(id: u8, parent: [u8; 8], start_ns: u64, end_ns: u64) -> api::Span {
        api::Span {
            span_id: vec![id; 8],
            parent_id: parent.into(),
            name: "a\nb".into(),
            start_ns,
            end_ns,
            ..Default::default()
        }
    }

    #[test]
    fn a_guests_spans_are_placed_within_the_call() {
        let call = call();
        let own = call.context.span;
        let ms = 1_000_000;
        let told = api::SpansResponse {
            spans: vec![span(2, [1; 8], 7 * ms, 8 * ms), span(1, own, 6 * ms, 10 * ms)],
            ..Default::default()
        };
        let all = spans(told, &call);
        let after = |at: SystemTime| at.duration_since(call.start).unwrap().as_millis();
        let (phase, answer) = (&all[0], &all[1]);
        assert_eq!((after(answer.start), after(answer.end)), (3, 7));
        assert_eq!((after(phase.start), after(phase.end)), (4, 5));
        assert_eq!((phase.parent, answer.parent), (Some([1; 8]), Some(own)));
        assert!(
            all.iter().all(|s| s.context.trace == call.context.trace && !s.name.contains('\n'))
        );
    }

    #[test]
    fn a_hostile_guest_says_little_and_nothing_of_others() {
        let call = call();
        let own = call.context.span;
        let mut hostile = vec![span(1, own, u64::MAX, 0), span(2, [9; 8], 0, u64::MAX)];
        hostile.push(api::Span { span_id: own.into(), ..Default::default() });
        hostile.push(api::Span { span_id: vec![1; 9000], ..Default::default() });
        hostile.extend((0..1000).map(|_| span(3, [3; 8], 1, 2)));
        hostile[0].name = "x".repeat(1 << 20);
        let all = spans(api::SpansResponse { spans: hostile, ..Default::default() }, &call);
        assert!(all.len() <= MOST);
        for span in all {
            assert!(span.start >= call.start && span.end <= call.end && span.start <= span.end);
            assert!(span.name.len() <= NAME && span.context.span != own);
            assert!(span.parent == Some(own) || span.parent == Some([1; 8]), "{span:?}");
        }
        assert!(spans(api::SpansResponse::default(), &call).is_empty());
    }
}
