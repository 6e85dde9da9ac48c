//! Against the ttrpc crate's own client, and by hand where that is too well-behaved.

use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::*;

/// `Echo` answers its payload, `Wait` nothing until it is told to, `Panic` panics.
struct Straw {
    go: Notify,
    dropped: Arc<Notify>,
}

struct Tell(Arc<Notify>);
impl Drop for Tell {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Service for Straw {
    fn serves(&self, service: &str) -> bool {
        service == "straw"
    }

    fn call(&self, context: TtrpcContext, request: Request) -> Option<Answer<'_>> {
        let mut response = Response::new();
        response.set_status(get_status(Code::OK, ""));
        Some(match request.method.as_str() {
            "Echo" => Box::pin(async move {
                response.payload = request.payload;
                for (key, values) in context.metadata {
                    response.payload.extend(format!("{key}={}", values.join(",")).bytes());
                }
                Ok(response)
            }),
            "Wait" => Box::pin(async move {
                let _tell = Tell(self.dropped.clone());
                self.go.notified().await;
                Ok(response)
            }),
            "Large" => Box::pin(async move {
                response.payload = vec![1; MAX_BODY];
                Ok(response)
            }),
            "Panic" => Box::pin(async { panic!("as the test wants") }),
            _ => return None,
        })
    }
}

struct Bench {
    straw: Arc<Straw>,
    cut: Arc<Notify>,
    server: tokio::task::JoinHandle<()>,
    client: UnixStream,
}

fn bench() -> Bench {
    let (client, server) = UnixStream::pair().unwrap();
    let straw = Arc::new(Straw { go: Notify::new(), dropped: Arc::default() });
    let cut = Arc::new(Notify::new());
    let (services, off) = (Services::new(straw.clone()), cut.clone());
    let server = tokio::spawn(serve(server, services, async move { off.notified().await }));
    Bench { straw, cut, server, client }
}

fn client(stream: UnixStream) -> ttrpc::r#async::Client {
    ttrpc::r#async::Client::new(ttrpc::asynchronous::transport::Socket::new(stream))
}

fn request(method: &str, payload: &[u8]) -> Request {
    Request {
        service: "straw".into(),
        method: method.into(),
        payload: payload.into(),
        timeout_nano: 10_000_000_000,
        ..Default::default()
    }
}

fn code(answer: ttrpc::Result<Response>) -> Code {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("{other:?}"),
    }
}

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn calls_are_answered_side_by_side_with_metadata() {
    let b = bench();
    let client = client(b.client);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.request(request("Wait", b"")).await }
    });
    for round in 0..100u32 {
        let payload = vec![7; round as usize * 1000];
        let mut q = request("Echo", &payload);
        q.metadata = ttrpc::context::to_pb(HashMap::from([("k".into(), vec!["v".into()])]));
        let answer = client.request(q).await.unwrap();
        assert_eq!(answer.payload, [&payload[..], b"k=v"].concat());
    }
    assert!(!waiting.is_finished());
    b.straw.go.notify_one();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_not_there_or_fails_has_its_code() {
    let b = bench();
    let client = client(b.client);
    assert_eq!(code(client.request(request("None", b"")).await), Code::UNIMPLEMENTED);
    let other = Request { service: "other".into(), ..request("Echo", b"") };
    assert_eq!(code(client.request(other).await), Code::UNIMPLEMENTED);
    assert_eq!(code(client.request(request("Panic", b"")).await), Code::INTERNAL);
    assert_eq!(code(client.request(request("Large", b"")).await), Code::RESOURCE_EXHAUSTED);
    // The connection is as good as before.
    client.request(request("Echo", b"x")).await.unwrap();
}

#[tokio::test]
async fn a_deadline_ends_the_call() {
    let mut b = bench();
    let q = Request { timeout_nano: 20_000_000, ..request("Wait", b"") };
    let body = q.encode().unwrap();
    write(&mut b.client, body.len() as u32, 1, REQUEST, &body).await;
    let answer = read(&mut b.client).await;
    assert_eq!(answer.status().code(), Code::DEADLINE_EXCEEDED);
    tokio::time::timeout(SOON, b.straw.dropped.notified()).await.unwrap();
}

async fn write(to: &mut UnixStream, length: u32, stream: u32, kind: u8, body: &[u8]) {
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(body);
    to.write_all(&frame).await.unwrap();
}

async fn read(from: &mut UnixStream) -> Response {
    let mut header = [0; HEADER];
    tokio::time::timeout(SOON, from.read_exact(&mut header)).await.unwrap().unwrap();
    let mut body = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
    from.read_exact(&mut body).await.unwrap();
    Response::decode(&body).unwrap()
}

#[tokio::test]
async fn a_frame_may_come_byte_by_byte_and_an_empty_one_is_a_frame() {
    let mut b = bench();
    write(&mut b.client, 0, 3, 3, b"").await; // data of no stream
    let body = request("Echo", b"slow").encode().unwrap();
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend([0, 0, 0, 1, REQUEST, 0]);
    frame.extend(body);
    for byte in frame {
        b.client.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(read(&mut b.client).await.payload, b"slow");
}

#[tokio::test]
async fn wrong_frames_are_answered_and_the_connection_goes_on() {
    let mut b = bench();
    let (long, body) = (MAX_BODY + 1, vec![0; MAX_BODY + 1]);
    write(&mut b.client, long as u32, 1, REQUEST, &body).await;
    assert_eq!(read(&mut b.client).await.status().code(), Code::INVALID_ARGUMENT);
    write(&mut b.client, 2, 3, REQUEST, b"\xff\xff").await;
    assert_eq!(read(&mut b.client).await.status().code(), Code::INVALID_ARGUMENT);
    let body = request("Echo", b"x").encode().unwrap();
    write(&mut b.client, body.len() as u32, 2, REQUEST, &body).await;
    assert_eq!(read(&mut b.client).await.status().code(), Code::INVALID_ARGUMENT);
    write(&mut b.client, body.len() as u32, 5, REQUEST, &body).await;
    assert_eq!(read(&mut b.client).await.payload, b"x");
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_its_calls() {
    let mut b = bench();
    let body = Request { timeout_nano: 0, ..request("Wait", b"") }.encode().unwrap();
    write(&mut b.client, body.len() as u32, 1, REQUEST, &body).await;
    let echo = request("Echo", b"").encode().unwrap();
    write(&mut b.client, echo.len() as u32, 3, REQUEST, &echo).await;
    read(&mut b.client).await; // so the first has begun
    drop(b.client);
    tokio::time::timeout(SOON, b.straw.dropped.notified()).await.unwrap();
    tokio::time::timeout(SOON, b.server).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_cut_ends_calls_without_an_answer() {
    let mut b = bench();
    let body = Request { timeout_nano: 0, ..request("Wait", b"") }.encode().unwrap();
    write(&mut b.client, body.len() as u32, 1, REQUEST, &body).await;
    let echo = request("Echo", b"").encode().unwrap();
    write(&mut b.client, echo.len() as u32, 3, REQUEST, &echo).await;
    read(&mut b.client).await;
    b.cut.notify_one();
    let mut rest = Vec::new();
    tokio::time::timeout(SOON, b.client.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.is_empty());
}

/// What an idle connection costs: held here, because there is one per container.
#[tokio::test]
async fn an_idle_connection_and_a_parked_call_are_small() {
    let (_, server) = UnixStream::pair().unwrap();
    let idle = std::mem::size_of_val(&serve(server, Services::default(), async {}));
    assert!(idle <= 640, "{idle} bytes");
    let call = std::mem::size_of_val(&answer(&Services::default(), Default::default(), Vec::new()));
    assert!(call <= 1024, "{call} bytes");
}
