use super::*;
use kuasar_protos::shim::api;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SHORT: Duration = Duration::from_millis(300);
const LIMITS: Limits = Limits { connect: SHORT, call: SHORT };

/// What the fake guest does with each connection to its control port after the greeting.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Says nothing.
    Silent,
    /// Hangs up.
    Hangs,
    /// Sends bytes without sense, without end.
    Floods,
    /// Sends answers that nobody has asked for, without end.
    Chatters,
    /// Announces a frame of 4 GiB.
    Huge,
    /// Answers every request with a payload that is no message.
    Garbage,
    /// Does not even greet.
    Rude,
    /// Greets with a line without end.
    Endless,
    /// Refuses with these words.
    Refuses,
    /// Answers rightly.
    Answers,
    /// Answers rightly but for a few bytes, which this number decides.
    Mutated(u64),
}

/// A guest that is none: what a compromised one might do on the wire.
#[derive(Debug)]
struct FakeGuest {
    manner: Manner,
    dialled: std::sync::atomic::AtomicU32,
}

#[async_trait]
impl Dial for FakeGuest {
    async fn dial(&self, _port: u32, _limit: Duration) -> io::Result<UnixStream> {
        self.dialled.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (ours, theirs) = UnixStream::pair()?;
        tokio::spawn(behave(theirs, self.manner));
        Ok(ours)
    }
}

async fn behave(mut stream: UnixStream, manner: Manner) {
    let line = handshake::read_line(&mut stream).await.unwrap();
    assert!(line.starts_with("KUASAR1 secret "), "{line}");
    match manner {
        Manner::Rude => {
            let _ = stream.read_u8().await;
            return;
        }
        Manner::Endless => {
            let _ = stream.write_all(&vec![b'x'; 1 << 20]).await;
            return;
        }
        Manner::Refuses => {
            let _ = stream.write_all(b"ERR no \x1b[31mstream\n").await;
            return;
        }
        _ => stream.write_all(b"OK\n").await.unwrap(),
    }
    let mut header = [0; 10];
    if stream.read_exact(&mut header).await.is_err() {
        return;
    }
    let [a, b, c, d, ..] = header;
    let mut body = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
    stream.read_exact(&mut body).await.unwrap();
    let frame = |length: u32, kind: u8| {
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(&header[4..8]);
        frame.extend([kind, 0]);
        frame
    };
    match manner {
        Manner::Silent => drop(stream.read_u8().await),
        Manner::Hangs => {}
        Manner::Floods => while stream.write_all(&[0xee; 4096]).await.is_ok() {},
        Manner::Chatters => {
            let mut answer = frame(2, 2);
            // The stream of no request.
            answer.splice(4..8, [0, 1, 0, 1]);
            // Response { payload = no bytes }
            answer.extend([0x12, 0]);
            let answers = answer.repeat(256);
            while stream.write_all(&answers).await.is_ok() {}
        }
        Manner::Huge => {
            let _ = stream.write_all(&frame(u32::MAX, 2)).await;
            let _ = stream.read_u8().await;
        }
        Manner::Garbage => {
            // Response { payload = 5 bytes that are no message }
            let payload = [0x12, 5, 0xff, 0xff, 0xff, 0xff, 0xff];
            let _ = stream.write_all(&frame(payload.len() as u32, 2)).await;
            let _ = stream.write_all(&payload).await;
            let _ = stream.read_u8().await;
        }
        Manner::Answers | Manner::Mutated(_) => {
            let answer = api::PidsResponse {
                processes: vec![Default::default(), Default::default()],
                ..Default::default()
            };
            let response = ttrpc::Response {
                payload: protobuf::Message::write_to_bytes(&answer).unwrap(),
                ..Default::default()
            };
            let payload = protobuf::Message::write_to_bytes(&response).unwrap();
            let mut bytes = frame(payload.len() as u32, 2);
            bytes.extend(payload);
            if let Manner::Mutated(seed) = manner {
                mutate(&mut bytes, seed);
            }
            let _ = stream.write_all(&bytes).await;
        }
        _ => {}
    }
}

/// Changes, removes or adds up to four bytes; the same for the same seed (xorshift).
fn mutate(bytes: &mut Vec<u8>, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below.max(1) as u64).unwrap()
    };
    for _ in 0..=random(4) {
        let at = random(bytes.len());
        match random(3) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random(8),
            1 if !bytes.is_empty() => drop(bytes.remove(at)),
            _ => bytes.insert(at, random(256) as u8),
        }
    }
}

fn guest(manner: Manner) -> (Arc<FakeGuest>, Guest, watch::Sender<bool>) {
    let fake = Arc::new(FakeGuest { manner, dialled: 0.into() });
    let (end, gone) = watch::channel(false);
    (fake.clone(), Guest::new(fake, "secret".into(), LIMITS, gone), end)
}

async fn pids(guest: &Guest) -> Result<api::PidsResponse> {
    let question = api::PidsRequest { id: "c".into(), ..Default::default() };
    guest.call(service::TASK, "Pids", &question).await
}

/// How a call to this guest fails, which it does in time.
async fn fails(guest: &Guest) -> GuestError {
    let asked = tokio::time::timeout(SHORT * 5, pids(guest));
    asked.await.unwrap_or_else(|_| panic!("the call hangs")).unwrap_err()
}

#[tokio::test]
async fn a_guest_that_never_answers_is_an_error_at_the_calls_deadline() {
    for manner in [Manner::Silent, Manner::Rude] {
        let (_fake, guest, _end) = guest(manner);
        let error = fails(&guest).await;
        assert!(matches!(error, GuestError::Deadline { .. }), "{manner:?}: {error:?}");
    }
}

#[tokio::test]
async fn a_guest_that_answers_garbage_is_an_error_that_calls_it_so() {
    for manner in [Manner::Garbage, Manner::Endless] {
        let (_fake, guest, _end) = guest(manner);
        let error = fails(&guest).await;
        assert!(matches!(error, GuestError::Nonsense(_)), "{manner:?}: {error:?}");
    }
}

#[tokio::test]
async fn a_guest_that_floods_is_an_error_in_time_and_holds_up_no_other() {
    for manner in [Manner::Floods, Manner::Chatters] {
        let (_fake, bad, _end) = guest(manner);
        let error = fails(&bad).await;
        assert!(matches!(error, GuestError::Deadline { .. }), "{manner:?}: {error:?}");
        // It goes on flooding while another is asked, by the same thread.
        let (_fake, good, _end) = guest(Manner::Answers);
        assert_eq!(pids(&good).await.unwrap().processes.len(), 2, "{manner:?}");
    }
}

#[tokio::test]
async fn a_guest_that_announces_four_gibibytes_is_an_error_in_time_and_gets_no_room_for_them() {
    // The most address space that this process has ever had.
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    let (_fake, guest, _end) = guest(Manner::Huge);
    let before = peak();
    let error = fails(&guest).await;
    assert!(matches!(error, GuestError::Deadline { .. }), "{error:?}");
    // Other tests run beside this one, and threads have their stacks.
    let more = peak() - before;
    assert!(more < 3 << 30, "{more} more bytes");
}

#[tokio::test]
async fn what_a_guest_refuses_a_stream_with_is_said_without_its_control_characters() {
    let (_fake, guest, _end) = guest(Manner::Refuses);
    let error = fails(&guest).await;
    let fits = matches!(
        &error,
        GuestError::Refused { message, .. } if message == "no  [31mstream"
    );
    assert!(fits, "{error:?}");
}

#[tokio::test]
async fn a_few_wrong_bytes_in_an_answer_end_the_call_in_time() {
    const SEEDS: u64 = 256;
    // Side by side: those that wait for bytes that never come wait for their deadline.
    let calls = (0..SEEDS).map(|seed| async move {
        let (_fake, guest, _end) = guest(Manner::Mutated(seed));
        let asked = tokio::time::timeout(SHORT * 20, pids(&guest));
        asked.await.unwrap_or_else(|_| panic!("seed {seed} hangs")).is_ok()
    });
    let done = futures::future::join_all(calls).await;
    // Some change what does not matter, some break it: else nothing is tried here.
    assert!(done.iter().any(|ok| *ok) && done.iter().any(|ok| !*ok));
}

#[tokio::test]
async fn a_broken_connection_is_made_again() {
    let (fake, guest, _end) = guest(Manner::Hangs);
    assert!(matches!(pids(&guest).await, Err(GuestError::Broken(_))));
    assert!(matches!(pids(&guest).await, Err(GuestError::Broken(_))));
    assert_eq!(fake.dialled.load(std::sync::atomic::Ordering::Relaxed), 2);
    let question = api::PidsRequest::default();
    let again: Result<api::PidsResponse> = guest.call_again(service::TASK, "Pids", &question).await;
    assert!(matches!(again, Err(GuestError::Broken(_))));
    assert_eq!(fake.dialled.load(std::sync::atomic::Ordering::Relaxed), 4);
}

#[tokio::test]
async fn the_end_of_the_machine_ends_every_call() {
    let (_fake, guest, end) = guest(Manner::Silent);
    let guest = Arc::new(guest);
    let waiting = tokio::spawn({
        let guest = guest.clone();
        async move {
            let question = api::WaitRequest::default();
            guest.call_for::<api::WaitResponse>(service::TASK, "Wait", &question, None).await
        }
    });
    tokio::task::yield_now().await;
    end.send_replace(true);
    let ended = tokio::time::timeout(SHORT, waiting).await.unwrap().unwrap();
    assert!(matches!(ended, Err(GuestError::Gone)));
    assert!(matches!(pids(&guest).await, Err(GuestError::Gone)));
}

async fn boots(says: &'static [u8]) -> Result<(Ready, String)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v_1023");
    let listener = tokio::net::UnixListener::bind(&path).unwrap().into();
    let fake = tokio::spawn(async move {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let _ = stream.write_all(says).await;
        if let Ok(welcome) = handshake::read_json::<Welcome>(&mut stream).await {
            assert_eq!((welcome.token.len(), welcome.entropy.len()), (64, 128));
            assert_eq!(welcome.sandbox_id, "pod");
            let _ = stream.write_all(b"{\"ok\":true}\n").await;
        }
        let _ = stream.read_u8().await;
    });
    let ready = welcome(&listener, "pod", SHORT).await;
    fake.abort();
    ready
}

#[tokio::test]
async fn a_guest_is_welcomed_once_it_says_what_it_is() {
    let line = br#"{"protocol":1,"agent_version":"0.1","kernel_release":"6.12","boot_id":"b"}"#;
    let line: &'static [u8] = [line.as_slice(), b"\n"].concat().leak();
    let (ready, token) = boots(line).await.unwrap();
    assert_eq!((ready.kernel_release.as_str(), token.len()), ("6.12", 64));
}

#[tokio::test]
async fn a_guest_that_boots_into_something_else_is_an_error_in_time() {
    let other = br#"{"protocol":9,"agent_version":"","kernel_release":"","boot_id":""}"#;
    let other: &'static [u8] = [other.as_slice(), b"\n"].concat().leak();
    let long: &'static [u8] = vec![b'x'; 100_000].leak();
    for (says, nonsense) in
        [(b"".as_slice(), false), (b"hello\n", true), (other, true), (long, true)]
    {
        let error = boots(says).await.unwrap_err();
        let fits = match nonsense {
            true => matches!(error, GuestError::Nonsense(_)),
            false => matches!(error, GuestError::Deadline { .. }),
        };
        assert!(fits, "{error:?}");
    }
}
