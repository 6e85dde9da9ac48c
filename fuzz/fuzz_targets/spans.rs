//! What a guest says it has done for a call that is traced.
#![no_main]

use std::time::{Duration, SystemTime};

use kuasar_forward::TracedCall;
use kuasar_trace::Context;
use libfuzzer_sys::fuzz_target;
use protobuf::Message;
use vmm_common::guest::SpansResponse;
use vmm_sandboxer::trace::spans;

fuzz_target!(|data: &[u8]| {
    let Ok(told) = SpansResponse::parse_from_bytes(data) else { return };
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let context = Context { trace: [1; 16], span: [2; 8], sampled: true };
    let call = TracedCall { context, start, end: start + Duration::from_millis(5) };
    for span in spans(told, &call) {
        assert!(span.context.trace == call.context.trace && span.context.span != [0; 8]);
        assert!(call.start <= span.start && span.start <= span.end && span.end <= call.end);
        assert!(span.name.chars().all(|c| !c.is_control()));
    }
});
