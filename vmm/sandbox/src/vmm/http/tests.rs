use std::io::IoSliceMut;
use std::os::fd::FromRawFd;

use nix::sys::socket::{ControlMessageOwned, recvmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

/// A server that gives one answer; what it was sent comes back.
async fn answered(answer: Vec<u8>, hold: bool) -> (Result<Value>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = tokio::spawn(async move {
        let (mut peer, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let n = peer.read(&mut request).await.unwrap();
        request.truncate(n);
        let _ = peer.write_all(&answer).await;
        if hold {
            // Until the client goes.
            let _ = peer.read(&mut [0; 1]).await;
        }
        request
    });
    let http = Http::new(Kind::Firecracker, socket, "/api", Duration::from_millis(300));
    let answer = http.get::<Value>("/x").await;
    (answer, server.await.unwrap())
}

fn with_body(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[tokio::test]
async fn an_answer_is_read_and_the_request_has_its_path() {
    let (answer, request) = answered(with_body("200 OK", "{\"a\":1}"), true).await;
    assert_eq!(answer.unwrap(), serde_json::json!({ "a": 1 }));
    let request = String::from_utf8(request).unwrap();
    assert!(request.starts_with("GET /api/x HTTP/1.1\r\n"), "{request}");
}

#[tokio::test]
async fn a_refusal_has_the_vmms_words_in_one_bounded_line() {
    let said = |status, body| async move {
        match answered(with_body(status, body), true).await.0 {
            Err(Error::Refused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(said("400 Bad", "{\"fault_message\":\"no\\nkernel\"}").await, "no kernel");
    assert_eq!(said("500 Bad", "[\"cannot boot\",\"no kernel\"]").await, "cannot boot: no kernel");
    assert_eq!(said("404 Not", "").await, "status 404");
    let long = format!("{{\"fault_message\":\"{}\"}}", "x".repeat(5000)).leak();
    assert_eq!(said("400 Bad", long).await.len(), REASON);
}

#[tokio::test]
async fn silence_garbage_and_floods_are_errors_of_their_own() {
    let (silent, _) = answered(Vec::new(), true).await;
    assert!(matches!(silent, Err(Error::Deadline { .. })), "{silent:?}");
    let (gone, _) = answered(Vec::new(), false).await;
    assert!(matches!(gone, Err(Error::Gone)), "{gone:?}");
    let (cut, _) =
        answered(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{".to_vec(), false).await;
    assert!(matches!(cut, Err(Error::Gone | Error::Protocol { .. })), "{cut:?}");
    for bad in [
        b"\xff\xfe nonsense\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n".to_vec(),
        format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(100_000)).into_bytes(),
        with_body("200 OK", "no json"),
        with_body("200 OK", &"[".repeat(100_000)),
        with_body("200 OK", &" ".repeat(MAX_ANSWER + 1)),
    ] {
        let (answer, _) = answered(bad, true).await;
        assert!(matches!(answer, Err(Error::Protocol { .. })), "{answer:?}");
    }
    let nobody = Http::new(Kind::Firecracker, "/nowhere/api".into(), "", Duration::from_secs(1));
    assert!(matches!(nobody.get::<Value>("/").await, Err(Error::Gone)));
}

#[tokio::test]
async fn descriptors_travel_once_with_the_first_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (peer, _) = listener.accept().unwrap();
        let mut bytes = [0; 4096];
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut data = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(peer.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::empty());
        let fds: Vec<OwnedFd> = message
            .unwrap()
            .cmsgs()
            .unwrap()
            .flat_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => fds,
                _ => Vec::new(),
            })
            // SAFETY: they have just arrived and are nobody else's.
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect();
        use std::io::Write;
        (&peer).write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        fds.len()
    });
    let null = || Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    let http = Http::new(Kind::CloudHypervisor, socket, "/api/v1", Duration::from_secs(5));
    http.put_with("/vm.add-net", &serde_json::json!({}), vec![null(), null()]).await.unwrap();
    assert_eq!(server.join().unwrap(), 2);
}
