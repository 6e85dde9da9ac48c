//! What is passed on, and what is kept.

use super::*;

static KEPT: Mutex<Vec<Finished>> = Mutex::new(Vec::new());
const CALLER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

struct Keep;

impl Sink for Keep {
    fn record(&self, span: Finished) {
        KEPT.lock().unwrap().push(span);
    }
    fn begins(&self) -> bool {
        true
    }
}

fn kept(trace: [u8; 16]) -> Vec<Finished> {
    let all = KEPT.lock().unwrap();
    all.iter().filter(|span| span.context.trace == trace).cloned().collect()
}

#[test]
fn a_traceparent_comes_back_and_a_malformed_one_counts_as_none() {
    let read = Context::parse(CALLER).unwrap();
    assert_eq!(read.to_string(), CALLER);
    assert!(
        Context::parse("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-more").is_some()
    );
    for bad in [
        "",
        "00",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e47é-00f067aa0ba902b7-01",
    ] {
        assert_eq!(Context::parse(bad), None, "{bad}");
    }
}

#[test]
fn spans_of_a_request_hang_together_across_threads() {
    install(Box::new(Keep));
    let caller = Context::parse(CALLER).unwrap();
    let span = server("a.b.C", "Create", Some(CALLER)).unwrap();
    let own = span.scope().context();
    span.scope().enter(|| {
        note("id", &"é".repeat(1000));
        let carried = current();
        std::thread::spawn(move || carry(carried, || past("phase", Duration::from_millis(5))))
            .join()
            .unwrap();
        let asked = child("ask", Kind::Client).unwrap();
        asked.scope().failed("no");
    });
    assert!(current().is_none());
    drop(span);
    let spans = kept(caller.trace);
    let names: Vec<&str> = spans.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["phase", "ask", "a.b.C/Create"]);
    assert_eq!(spans[2].parent, Some(caller.span));
    assert!(spans[..2].iter().all(|s| s.parent == Some(own.span)));
    assert!(spans[0].end.duration_since(spans[0].start).unwrap() >= Duration::from_millis(5));
    assert_eq!(spans[1].error.as_deref(), Some("no"));
    assert!(spans[2].attributes.iter().all(|(_, v)| v.len() <= MAX_VALUE));
}

#[test]
fn only_what_is_sampled_or_changes_something_is_followed() {
    install(Box::new(Keep));
    let unsampled = CALLER.replace("-01", "-00");
    assert!(server("s", "Create", Some(&unsampled)).is_none());
    assert!(server("s", "Wait", Some(CALLER)).is_none());
    assert!(server("s", "State", None).is_none());
    let caller = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";
    assert!(server("s", "State", Some(caller)).is_some());
    assert!(child("nobody's", Kind::Internal).is_none());
    let create = server("s", "Create", None).unwrap();
    let first = create.scope().context();
    drop(create);
    let start = server("s", "Start", None).unwrap();
    start.scope().enter(|| join(first));
    assert_eq!(start.scope().context().trace, first.trace);
    // One that the caller has put into a trace stays there.
    let other = server("s", "Start", Some(caller)).unwrap();
    other.scope().enter(|| join(first));
    assert_ne!(other.scope().context().trace, first.trace);
}
