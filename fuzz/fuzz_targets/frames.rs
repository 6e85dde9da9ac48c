//! Frames of a serial port or console: any bytes, and frames that a hostile side may say in any order.
#![no_main]

use std::task::Waker;

use libfuzzer_sys::fuzz_target;
use vmm_common::mux::Role;
use vmm_common::mux::frame::{Finder, Frame, Kind, MOST};
use vmm_common::mux::state::{ARRIVED, REFUSED, STREAMS, State, WINDOW};

/// The session that the host begins.
const NUMBER: u64 = 7;

fuzz_target!(|data: &[u8]| {
    any_bytes(data);
    for role in [Role::Host, Role::Guest] {
        any_frames(role, data);
    }
});

/// What is found does not depend on where the bytes are cut.
fn any_bytes(data: &[u8]) {
    let whole = Finder::default().find(data);
    let size = data.first().map_or(1, |byte| usize::from(byte % 64) + 1);
    let mut finder = Finder::default();
    let mut pieces = Vec::new();
    for piece in data.chunks(size) {
        pieces.extend(finder.find(piece));
        assert!(finder.kept() <= MOST);
    }
    assert_eq!(pieces, whole);
}

/// Eight bytes are a frame, and what we do ourselves after it.
fn any_frames(role: Role, data: &[u8]) {
    let mut state = State::new(role, NUMBER);
    let (mut finder, mut held) = (Finder::default(), Vec::new());
    for said in data.chunks_exact(8) {
        let &[kind, session, stream, low, high, payload, act, which] = said else { return };
        let kind = Kind::ALL[usize::from(kind) % Kind::ALL.len()];
        let stream = u32::from(stream);
        let argument = match kind {
            // Mostly what belongs there: all else is lost at once.
            Kind::Data | Kind::End if high < 0xf0 => state.place(stream),
            _ => u32::from_le_bytes([low, high, 0, high]),
        };
        let payload = match kind {
            Kind::Data => vec![low; usize::from(payload) * 32],
            _ => Vec::new(),
        };
        let session = [NUMBER, NUMBER, 0, NUMBER + 1][usize::from(session) % 4];
        let frame = Frame { session, stream, kind, argument, payload };
        let mut wire = Vec::new();
        frame.write(&mut wire);
        assert_eq!(finder.find(&wire), std::slice::from_ref(&frame));
        state.hear(frame);

        let key = held.get(usize::from(which) % held.len().max(1)).copied();
        match (act % 8, key) {
            (0, _) => held.extend(state.arrived().map(|(key, _)| key)),
            (1, _) => held.extend(state.open(u32::from(which))),
            (2, Some(key)) => state.accept(key),
            (3, Some(key)) => drop(state.write(key, &[which; 999], Waker::noop())),
            (4, Some(key)) => drop(state.read(key, 3000, &mut |_| {}, Waker::noop())),
            (5, Some(key)) => {
                held.retain(|other| *other != key);
                state.drop_stream(key);
            }
            (6, Some(key)) => state.end(key),
            _ => {
                let mut bytes = Vec::new();
                state.fill(&mut bytes);
                assert!(bytes.len() < 64 * 1024);
                assert!(finder.find(&bytes).len() <= bytes.len());
            }
        }
        let (streams, longest, others) = state.held();
        assert!(streams <= STREAMS && longest <= WINDOW && others <= REFUSED + ARRIVED);
    }
}
