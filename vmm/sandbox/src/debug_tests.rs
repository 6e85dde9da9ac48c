use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use futures::stream;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;
use vmm_common::guest_ttrpc;
use vmm_common::handshake::{Purpose, parse_hello, read_line};

use super::*;
use crate::guest::{Dial, Limits};

const SOON: Duration = Duration::from_secs(20);

/// A guest that has a debug console, whose programs say what they hear; and what it was asked.
#[derive(Debug, Default)]
struct FakeGuest {
    /// Refuses, like one whose kernel was not told.
    off: bool,
    asked: Mutex<Vec<String>>,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl FakeGuest {
    fn note(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }
}

struct Service(Arc<FakeGuest>);

#[async_trait]
impl guest_ttrpc::Guest for Service {
    async fn debug(
        &self,
        _: &TtrpcContext,
        q: wire::DebugRequest,
    ) -> ttrpc::Result<wire::DebugResponse> {
        self.0.note(format!("debug {} {:?} {}", q.id, &q.argv[1..], q.terminal));
        if self.0.off {
            let text = "set guest.debug_console".to_owned();
            let status = ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, text);
            return Err(ttrpc::Error::RpcStatus(status));
        }
        Ok(wire::DebugResponse::new())
    }

    async fn put_files(
        &self,
        _: &TtrpcContext,
        q: wire::PutFilesRequest,
    ) -> ttrpc::Result<wire::PutFilesResponse> {
        let mut files = self.0.files.lock().unwrap();
        for entry in q.entries {
            let path = format!("{}/{}", q.container, String::from_utf8(entry.path).unwrap());
            files.entry(path).or_default().extend(entry.data);
        }
        Ok(wire::PutFilesResponse::new())
    }

    async fn end_debug(
        &self,
        _: &TtrpcContext,
        q: wire::EndDebugRequest,
    ) -> ttrpc::Result<wire::EndDebugResponse> {
        self.0.note(format!("end {}", q.id));
        Ok(wire::EndDebugResponse::new())
    }
}

#[derive(Debug)]
struct To(Arc<FakeGuest>);

#[async_trait]
impl Dial for To {
    async fn dial(&self, _: u32, _: Duration) -> std::io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        tokio::spawn(serve(theirs, self.0.clone()));
        Ok(ours)
    }
}

async fn serve(mut stream: UnixStream, guest: Arc<FakeGuest>) {
    let line = read_line(&mut stream).await.unwrap();
    let (token, purpose) = parse_hello(&line).unwrap();
    assert_eq!(token, "secret");
    stream.write_all(b"OK\n").await.unwrap();
    match purpose {
        Purpose::Control => {
            let one = stream::once(async move { Ok::<_, std::io::Error>(stream) });
            let one = Box::pin(futures::StreamExt::chain(one, stream::pending()));
            let listener = ttrpc::r#async::transport::Listener::new(one);
            let service = guest_ttrpc::create_guest(Arc::new(Service(guest)));
            let server = ttrpc::r#async::Server::new();
            let mut server = server.add_listener(listener).register_service(service);
            server.start().await.unwrap();
            std::future::pending().await
        }
        Purpose::Stream { container, kind, .. } => {
            assert_eq!(kind, StreamKind::Debug);
            guest.note(format!("stream {container}"));
            let (mut from, mut to) = stream.into_split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        }
    }
}

struct Bench {
    fake: Arc<FakeGuest>,
    guest: Arc<Guest>,
    dir: tempfile::TempDir,
    config: GuestConfig,
    slots: Arc<Semaphore>,
    end: watch::Sender<bool>,
    patience: Duration,
}

/// An ELF header, and a program header for a loader if it wants one.
fn elf(loader: bool) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &64_u16.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &1_u16.to_le_bytes());
    file.resize(64 + 56, 0);
    file[64] = if loader { 3 } else { 1 };
    file
}

fn bench(off: bool) -> Bench {
    let fake = Arc::new(FakeGuest { off, ..FakeGuest::default() });
    let (end, gone) = watch::channel(false);
    let limits = Limits { connect: SOON, call: SOON };
    let guest = Guest::new(Arc::new(To(fake.clone())), "secret".into(), limits, gone);
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("busybox");
    std::fs::write(&program, [elf(false), vec![b'x'; 600 << 10]].concat()).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let config =
        GuestConfig { debug_console: true, debug_program: program, ..GuestConfig::default() };
    let slots = Arc::new(Semaphore::new(2));
    Bench { fake, guest: Arc::new(guest), dir, config, slots, end, patience: SOON }
}

impl Bench {
    async fn open(&self, args: &[&str]) -> Result<DebugConsole> {
        let args = args.iter().map(|word| (*word).to_owned()).collect();
        let what = DebugProgram { args, terminal: Some((80, 24)) };
        let place = Place { sandbox: "pod", dir: self.dir.path(), patience: self.patience };
        open(place, self.guest.clone(), &self.slots, &self.config, what).await
    }

    fn asked(&self) -> Vec<String> {
        self.fake.asked.lock().unwrap().clone()
    }

    /// Until the guest was told of the session's end, and its place is free.
    async fn ended(&self, session: &str) {
        let wanted = format!("end {session}");
        let deadline = tokio::time::Instant::now() + SOON;
        while !self.asked().contains(&wanted) || self.slots.available_permits() < 2 {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", self.asked());
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_session_is_joined_with_one_connection_by_a_socket_of_roots_alone() {
    let bench = bench(false);
    let console = bench.open(&[]).await.unwrap();
    let mode = std::fs::metadata(&console.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = UnixStream::connect(&console.path).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    let mut said = [0; 5];
    client.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"hello");
    assert!(!console.path.exists());
    drop(client);
    bench.ended(&console.session).await;
    let session = &console.session;
    let wanted = [
        format!("debug {session} [\"sh\"] true"),
        format!("stream {session}"),
        format!("end {session}"),
    ];
    assert_eq!(bench.asked(), wanted);
    let files = bench.fake.files.lock().unwrap();
    let put = |name: &str| files.get(&format!(".debug-{session}/{name}"));
    assert_eq!(*put("busybox").unwrap(), std::fs::read(&bench.config.debug_program).unwrap());
    assert_eq!(put("sh").unwrap(), b"busybox");
}

#[tokio::test]
async fn what_is_off_on_the_host_or_in_the_guest_is_refused_and_leaves_nothing() {
    let mut off = bench(true);
    let error = off.open(&["sh", "-c", "id"]).await.unwrap_err();
    assert!(
        matches!(&error, Error::FailedPrecondition(text) if text.contains("guest.debug_console")),
        "{error}"
    );
    let session = off.asked()[0].split(' ').nth(1).unwrap().to_owned();
    assert_eq!(off.asked()[0], format!("debug {session} [\"sh\", \"-c\", \"id\"] true"));
    off.ended(&session).await;
    assert!(off.fake.files.lock().unwrap().is_empty());
    off.config.debug_console = false;
    let error = off.open(&[]).await.unwrap_err();
    assert!(error.to_string().contains("guest.debug_console = true"), "{error}");
    assert_eq!(off.asked().len(), 2, "the guest was not asked again");
}

#[tokio::test]
async fn so_many_sessions_and_no_more_and_all_end_with_the_machine() {
    let bench = bench(false);
    let consoles = [bench.open(&[]).await.unwrap(), bench.open(&[]).await.unwrap()];
    assert!(matches!(bench.open(&[]).await, Err(Error::ResourceExhausted(_))));
    let mut client = UnixStream::connect(&consoles[0].path).await.unwrap();
    bench.end.send_replace(true);
    assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0);
    let deadline = tokio::time::Instant::now() + SOON;
    while bench.slots.available_permits() < 2 {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert!(consoles.iter().all(|console| !console.path.exists()));
}

#[tokio::test]
async fn a_session_that_nobody_comes_for_ends() {
    let bench = Bench { patience: Duration::from_millis(1), ..bench(false) };
    let console = bench.open(&[]).await.unwrap();
    bench.ended(&console.session).await;
    assert!(!console.path.exists());
}

#[test]
fn a_program_that_a_guest_cannot_run_is_refused_with_the_key_and_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("program");
    let config = GuestConfig { debug_program: path.clone(), ..GuestConfig::default() };
    let refusal = || match program_of(&config, ".debug-x") {
        Err(Error::FailedPrecondition(text)) => text,
        other => panic!("{other:?}"),
    };
    let check = |what: &str| {
        let text = refusal();
        assert!(text.contains("guest.debug_program") && text.contains(what), "{text}");
        assert!(text.contains("static busybox"), "{text}");
    };
    check("cannot be read");
    std::fs::create_dir(&path).unwrap();
    check("is no program");
    std::fs::remove_dir(&path).unwrap();
    std::fs::write(&path, elf(false)).unwrap();
    check("is no program");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
    assert_eq!(program_of(&config, ".debug-x").unwrap().len(), 1);
    for other in [elf(true), b"#!/bin/sh\n".to_vec()] {
        std::fs::write(&path, other).unwrap();
        check("is not static");
    }
    std::fs::File::options().write(true).open(&path).unwrap().set_len(MOST + 1).unwrap();
    check("has more than");
}
