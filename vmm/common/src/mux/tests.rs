use super::frame::tests::Random;
use super::frame::{Frame, Kind, PAYLOAD};
use super::state::{ARRIVED, REFUSED};
use super::*;
use std::task::Waker;
use tokio::io::{DuplexStream, duplex, split};
use tokio::task::JoinHandle;

const NUMBER: u64 = 0x1122_3344_5566_7788;

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.unwrap()
}

fn run(mux: &Mux, port: DuplexStream) -> JoinHandle<io::Result<()>> {
    let mux = mux.clone();
    tokio::spawn(async move { mux.run(port).await })
}

async fn up(mux: &Mux) {
    soon(mux.sessions().wait_for(Option::is_some)).await.unwrap();
}

/// A host and a guest with a narrow port between them.
async fn pair() -> (Mux, Mux) {
    let (host, guest) = (Mux::host(NUMBER), Mux::guest());
    let (a, b) = duplex(1000);
    run(&host, a);
    run(&guest, b);
    up(&host).await;
    up(&guest).await;
    (host, guest)
}

/// A stream that the host has opened, and the guest's side of it.
async fn joined(host: &Mux, guest: &Mux) -> (MuxStream, MuxStream) {
    let accepted = async { guest.next().await.accept() };
    let (ours, theirs) = soon(async { tokio::join!(host.open(1025), accepted) }).await;
    (ours.unwrap(), theirs)
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[tokio::test]
async fn streams_carry_all_bytes_in_order_both_ways_while_another_stands_still() {
    let (host, guest) = pair().await;
    let (mut stuck, _unread) = joined(&host, &guest).await;
    // More than anybody reads: it fills what it may, and waits.
    let full = tokio::spawn(async move {
        let _ = stuck.write_all(&bytes(1 << 20)).await;
    });
    let mut all = Vec::new();
    for n in 0..4 {
        let (ours, theirs) = joined(&host, &guest).await;
        let sent = bytes(300_000 + n);
        for stream in [ours, theirs] {
            let (mut reader, mut writer) = split(stream);
            let copy = sent.clone();
            tokio::spawn(async move {
                writer.write_all(&copy).await.unwrap();
                writer.shutdown().await.unwrap();
            });
            let expected = sent.clone();
            all.push(tokio::spawn(async move {
                let mut got = Vec::new();
                reader.read_to_end(&mut got).await.unwrap();
                assert!(got == expected);
            }));
        }
    }
    for one in all {
        soon(one).await.unwrap();
    }
    assert!(!full.is_finished());
    let (_, longest, _) = guest.0.state().held();
    assert_eq!(longest, WINDOW);
    full.abort();
}

#[tokio::test]
async fn what_was_written_comes_also_when_the_stream_was_dropped_and_then_nothing_is_left() {
    let (host, guest) = pair().await;
    let (mut ours, mut theirs) = joined(&host, &guest).await;
    let sent = bytes(WAITING);
    soon(theirs.write_all(&sent)).await.unwrap();
    drop(theirs);
    soon(ours.stopped()).await;
    assert_eq!(ours.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut got = Vec::new();
    soon(ours.read_to_end(&mut got)).await.unwrap();
    assert!(got == sent);
    drop(ours);
    let (one, other) = joined(&host, &guest).await;
    drop((one, other));
    for mux in [&host, &guest] {
        // Told of by nothing: what the other side knows comes later than what it sends.
        soon(async {
            while mux.0.state().held().0 > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_port_that_nobody_wants_is_refused() {
    let (host, guest) = pair().await;
    let refuse = async { drop(guest.next().await) };
    let (refused, ()) = soon(async { tokio::join!(host.open(7), refuse) }).await;
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    // The guest opens, too.
    let accept = async { host.next().await };
    let (opened, incoming) = soon(async {
        tokio::join!(guest.open(1023), async {
            let incoming = accept.await;
            let port = incoming.port;
            (incoming.accept(), port)
        })
    })
    .await;
    assert_eq!(incoming.1, 1023);
    drop(opened.unwrap());
    // One that is given up before it is accepted is no stream of the other side either.
    let waiting = tokio::time::timeout(Duration::from_millis(20), host.open(9)).await;
    assert!(waiting.is_err());
    let late = soon(guest.next()).await;
    let mut late = late.accept();
    assert!(soon(late.read(&mut [0; 1])).await.is_err());
}

/// A port with nobody at the other side, to speak by hand.
async fn guest_alone() -> (Mux, DuplexStream, JoinHandle<io::Result<()>>) {
    let guest = Mux::guest();
    let (port, theirs) = duplex(1 << 20);
    let running = run(&guest, theirs);
    (guest, port, running)
}

fn frame(session: u64, stream: u32, kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Frame { session, stream, kind, argument: 1025, payload: payload.to_vec() }.write(&mut bytes);
    bytes
}

#[tokio::test]
async fn a_host_that_went_in_the_middle_of_a_frame_is_followed_by_another() {
    let (guest, mut port, _running) = guest_alone().await;
    port.write_all(&frame(5, 0, Kind::Sync, b"")).await.unwrap();
    port.write_all(&frame(5, 1, Kind::Open, b"")).await.unwrap();
    let mut old = soon(guest.next()).await.accept();
    soon(old.write_all(b"of the old session")).await.unwrap();
    let data = frame(5, 1, Kind::Data, &bytes(PAYLOAD));
    // The first half of a frame, and the new host begins; and what was still on its way follows.
    port.write_all(&data[..data.len() / 2]).await.unwrap();
    let mut new = Mux::host(6);
    let state = std::mem::replace(&mut new, Mux::host(6));
    drop(new);
    let running = run(&state, port);
    up(&state).await;
    assert!(soon(old.read(&mut [0; 1])).await.is_err());
    assert_eq!(*guest.sessions().borrow(), Some(6));
    let (mut ours, mut theirs) = joined(&state, &guest).await;
    // The same number as the old one's, which changes nothing of the new one.
    assert_eq!(theirs.number(), old.number());
    assert!(old.write(b"x").await.is_err());
    drop(old);
    soon(theirs.write_all(b"new")).await.unwrap();
    let mut got = [0; 3];
    soon(ours.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"new");
    running.abort();
}

#[tokio::test]
async fn a_guest_that_was_saved_in_a_session_is_in_step_with_the_host_of_its_copy() {
    let (guest, mut port, _running) = guest_alone().await;
    port.write_all(&frame(5, 0, Kind::Sync, b"")).await.unwrap();
    up(&guest).await;
    // It dials the host that is just going.
    let dialling = {
        let guest = guest.clone();
        tokio::spawn(async move { guest.open(1023).await })
    };
    let mut some = [0; 200];
    soon(port.read(&mut some)).await.unwrap();
    let host = Mux::host(NUMBER);
    run(&host, port);
    assert!(soon(dialling).await.unwrap().is_err());
    up(&host).await;
    let accept = async { host.next().await.accept() };
    let (opened, _accepted) = soon(async { tokio::join!(guest.open(1023), accept) }).await;
    opened.unwrap();
}

#[tokio::test]
async fn the_end_of_the_port_is_the_end_of_its_streams() {
    let (guest, mut port, running) = guest_alone().await;
    port.write_all(&frame(5, 0, Kind::Sync, b"")).await.unwrap();
    port.write_all(&frame(5, 1, Kind::Open, b"")).await.unwrap();
    let mut stream = soon(guest.next()).await.accept();
    drop(port);
    let _ = soon(running).await.unwrap();
    assert!(soon(stream.read(&mut [0; 1])).await.is_err());
    assert_eq!(guest.open(1).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn a_peer_that_sends_more_than_it_was_granted_loses_the_stream_alone() {
    let mut state = State::new(Role::Host, NUMBER);
    let say = |stream, kind, argument, payload: Vec<u8>| Frame {
        session: NUMBER,
        stream,
        kind,
        argument,
        payload,
    };
    state.hear(say(0, Kind::Begun, 0, Vec::new()));
    for id in [2, 4] {
        state.hear(say(id, Kind::Open, 1, Vec::new()));
        let (key, _) = state.arrived().unwrap();
        state.accept(key);
    }
    for n in 0..2 * WINDOW / PAYLOAD {
        state.hear(say(2, Kind::Data, (n * PAYLOAD) as u32, vec![1; PAYLOAD]));
    }
    let (streams, longest, _) = state.held();
    assert_eq!((streams, longest), (2, WINDOW));
    assert_eq!(state.write((NUMBER, 2), b"x", Waker::noop()), Progress::Broken);
    assert_eq!(state.write((NUMBER, 4), b"x", Waker::noop()), Progress::Done(1));
}

/// What a guest has sent of a stream, as frames of their own; the last one is the end.
async fn sent(bytes_sent: &[u8]) -> Vec<Frame> {
    let (guest, mut port, _running) = guest_alone().await;
    port.write_all(&frame(NUMBER, 0, Kind::Sync, b"")).await.unwrap();
    port.write_all(&frame(NUMBER, 1, Kind::Open, b"")).await.unwrap();
    let mut stream = soon(guest.next()).await.accept();
    stream.write_all(bytes_sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let (mut finder, mut all, mut some) = (frame::Finder::default(), Vec::new(), vec![0; 9000]);
    while !all.iter().any(|frame: &Frame| frame.kind == Kind::End) {
        let n = soon(port.read(&mut some)).await.unwrap();
        all.extend(finder.find(&some[..n]));
    }
    all.retain(|frame| matches!(frame.kind, Kind::Data | Kind::End));
    all
}

#[tokio::test]
async fn bytes_that_are_lost_or_changed_are_an_error_and_never_other_bytes() {
    let original = bytes(3 * PAYLOAD);
    let frames = sent(&original).await;
    assert!(frames.len() > 3, "{}", frames.len());
    // None, each of the frames that carry bytes, and a byte of each.
    for case in 0..2 * frames.len() - 1 {
        let mut line = Vec::new();
        for (n, frame) in frames.iter().enumerate() {
            let begin = line.len();
            frame.write(&mut line);
            if case == n + 1 && frame.kind == Kind::Data {
                line.truncate(begin);
            } else if case == n + frames.len() && frame.kind == Kind::Data {
                // Far behind the header, and no zero.
                let byte = &mut line[begin + 100];
                *byte = if *byte == 1 { 2 } else { *byte ^ 1 };
            }
        }
        let mut state = State::new(Role::Host, NUMBER);
        let say = |kind, argument, stream| Frame {
            session: NUMBER,
            stream,
            kind,
            argument,
            payload: Vec::new(),
        };
        state.hear(say(Kind::Begun, 0, 0));
        let key = state.open(1025).unwrap();
        state.fill(&mut Vec::new());
        state.hear(say(Kind::Accept, 0, key.1));
        for frame in frame::Finder::default().find(&line) {
            state.hear(frame);
        }
        let mut got = Vec::new();
        let last = loop {
            let mut add = |some: &[u8]| got.extend_from_slice(some);
            match state.read(key, usize::MAX, &mut add, Waker::noop()) {
                Progress::Done(n) if n > 0 => {}
                other => break other,
            }
        };
        if case == 0 {
            assert_eq!((last, got == original), (Progress::Done(0), true), "{case}");
        } else {
            assert_eq!(last, Progress::Broken, "{case}");
            assert!(original.starts_with(&got), "{case}");
        }
    }
}

#[test]
fn whatever_a_hostile_peer_says_what_is_kept_for_it_has_bounds() {
    for role in [Role::Host, Role::Guest] {
        let mut random = Random(0x9e37_79b9 + role as u64);
        let mut state = State::new(role, NUMBER);
        let mut held = Vec::new();
        for step in 0..60_000 {
            let mut frame = random.frame();
            frame.session = [NUMBER, NUMBER, NUMBER, 0, 3][random.below(5)];
            frame.stream = match random.below(3) {
                0 => random.next() as u32,
                _ => random.next() as u32 % 64,
            };
            if random.below(200) != 0 && matches!(frame.kind, Kind::Sync | Kind::Hello) {
                frame.kind = Kind::Open;
            }
            if matches!(frame.kind, Kind::Data | Kind::End) && random.below(20) != 0 {
                frame.argument = state.place(frame.stream);
            }
            if step % 500 == 0 {
                frame.kind = if role == Role::Host { Kind::Begun } else { Kind::Sync };
                frame.session = state.session().unwrap_or(NUMBER);
            }
            state.hear(frame);
            // We do something as well, now and then.
            match random.below(8) {
                0 => held.extend(state.arrived().map(|(key, _)| key)),
                1 => held.extend(state.open(1)),
                2 if !held.is_empty() => state.accept(held[random.below(held.len())]),
                3 if !held.is_empty() => {
                    let key = held[random.below(held.len())];
                    let _ = state.write(key, &[7; 999], Waker::noop());
                }
                4 if !held.is_empty() => {
                    let key = held[random.below(held.len())];
                    let _ = state.read(key, 3000, &mut |_| {}, Waker::noop());
                }
                5 if held.len() > 40 => state.drop_stream(held.swap_remove(random.below(40))),
                6 => {
                    let mut bytes = Vec::new();
                    state.fill(&mut bytes);
                    assert!(bytes.len() < 64 * 1024, "{}", bytes.len());
                }
                _ => {}
            }
            let (streams, longest, others) = state.held();
            assert!(streams <= STREAMS && longest <= WINDOW && others <= REFUSED + ARRIVED);
        }
    }
}
