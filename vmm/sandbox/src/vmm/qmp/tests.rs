//! The protocol against a recorded fake: a peer that plays lines which a real QEMU 11.1 sent.

use std::os::fd::AsFd;

use qapi::qmp::{getfd, query_status, stop};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 1, "major": 11}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
const LIMIT: Duration = Duration::from_millis(300);

/// Answers the n-th command with the n-th reply; `ID` in it is the command's id.
fn recorded(replies: Vec<&'static str>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let (r, mut w) = theirs.into_split();
        let mut commands = BufReader::new(r).lines();
        w.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
        let negotiated = vec![r#"{"return": {}, "id": ID}"#];
        for reply in negotiated.into_iter().chain(replies) {
            let Ok(Some(command)) = commands.next_line().await else { return };
            let id = serde_json::from_str::<Value>(&command).unwrap()["id"].to_string();
            w.write_all(reply.replace("ID", &id).as_bytes()).await.unwrap();
            w.write_all(b"\r\n").await.unwrap();
        }
        // Silent, not gone.
        let _ = commands.next_line().await;
        std::future::pending::<()>().await;
    });
    ours
}

async fn connect(replies: Vec<&'static str>) -> Qmp {
    Qmp::new(Kind::Qemu, recorded(replies), LIMIT).await.unwrap()
}

#[tokio::test]
async fn answers_are_typed_and_refusals_carry_the_words_of_the_vmm() {
    let qmp = connect(vec![
        r#"{"return": {"status": "running", "running": true}, "id": ID}"#,
        r#"{"id": ID, "error": {"class": "GenericError", "desc": "Bus 'rp9' not found"}}"#,
    ])
    .await;
    assert!(qmp.execute(&query_status {}).await.unwrap().running);
    let refused = qmp.execute(&stop {}).await.unwrap_err();
    assert_eq!(refused.to_string(), "qemu refused stop: Bus 'rp9' not found");
}

#[tokio::test]
async fn an_answer_that_comes_too_late_disturbs_nothing() {
    // The answer to the first command comes with the second one, before that one's own.
    let qmp = connect(vec![
        "",
        "{\"return\": {}, \"id\": 2}\n{\"return\": {\"status\": \"paused\", \"running\": false}, \"id\": ID}",
    ])
    .await;
    assert!(matches!(qmp.execute(&stop {}).await, Err(Error::Deadline { .. })));
    assert!(!qmp.execute(&query_status {}).await.unwrap().running);
}

#[tokio::test]
async fn events_come_in_between_and_unknown_ones_are_passed_over() {
    let qmp = connect(vec![concat!(
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "NEW_IN_QEMU_99", "data": {}}"#,
        "\n",
        r#"{"timestamp": {"seconds": 1764113000, "microseconds": 5}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
        "\n",
        r#"{"return": {}, "id": ID}"#
    )])
    .await;
    let mut events = qmp.events();
    qmp.execute(&stop {}).await.unwrap();
    let Event::SHUTDOWN { data, .. } = events.recv().await.unwrap() else { panic!() };
    assert!(data.guest);
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = tokio::spawn(async move {
        let mut theirs = theirs.into_std().unwrap();
        theirs.set_nonblocking(false).unwrap();
        tokio::task::spawn_blocking(move || {
            use std::io::Write;
            theirs.write_all(format!("{GREETING}\n").as_bytes()).unwrap();
            let mut got = 0;
            for id in 1..=2 {
                let mut bytes = [0; 4096];
                let mut space = nix::cmsg_space!([i32; 1]);
                let mut iov = [std::io::IoSliceMut::new(&mut bytes)];
                let message = nix::sys::socket::recvmsg::<()>(
                    theirs.as_raw_fd(),
                    &mut iov,
                    Some(&mut space),
                    MsgFlags::empty(),
                )
                .unwrap();
                got += message.cmsgs().unwrap().count();
                writeln!(theirs, "{{\"return\": {{}}, \"id\": {id}}}").unwrap();
            }
            got
        })
        .await
        .unwrap()
    });
    let qmp = Qmp::new(Kind::Qemu, ours, LIMIT).await.unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    qmp.execute_with(&getfd { fdname: "tap".into() }, Some(null.as_fd())).await.unwrap();
    assert_eq!(peer.await.unwrap(), 1);
}

#[tokio::test]
async fn garbage_floods_and_silence_end_in_clear_errors() {
    for (bytes, protocol) in [
        (b"hello\n".to_vec(), true),
        (b"{\"return\": {}}\n".to_vec(), true),
        (vec![b'x'; 3 << 20], true),
        (Vec::new(), false),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flood = tokio::spawn(async move {
            let _ = theirs.write_all(&bytes).await;
            theirs
        });
        let error = Qmp::new(Kind::Qemu, ours, LIMIT).await.unwrap_err();
        match error {
            Error::Protocol { .. } => assert!(protocol),
            Error::Deadline { .. } => assert!(!protocol),
            other => panic!("{other}"),
        }
        flood.abort();
    }
}

#[tokio::test]
async fn when_the_vmm_goes_those_who_wait_are_told() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        theirs.write_all(format!("{GREETING}\n").as_bytes()).await.unwrap();
        let mut lines = BufReader::new(&mut theirs).lines();
        lines.next_line().await.unwrap();
    });
    assert!(matches!(Qmp::new(Kind::Qemu, ours, LIMIT).await, Err(Error::Gone)));
}

#[tokio::test]
async fn answers_of_stratovirt_that_name_no_command_come_in_order() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = tokio::spawn(async move {
        theirs.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
        let (from, mut to) = theirs.split();
        let mut lines = BufReader::new(from).lines();
        let mut got = 0;
        // To the second command there is no answer in time, but later, and with the third's.
        for answer in ["{}", "", "{\"late\":1}}\r\n{\"return\":{\"running\":true}"] {
            lines.next_line().await.unwrap().unwrap();
            got += 1;
            if !answer.is_empty() {
                to.write_all(format!("{{\"return\":{answer}}}\r\n").as_bytes()).await.unwrap();
            }
        }
        got
    });
    let qmp = Qmp::new(Kind::StratoVirt, ours, LIMIT).await.unwrap();
    let silent = qmp.call("query-migrate", serde_json::json!({}), None).await;
    assert!(matches!(silent, Err(Error::Deadline { .. })), "{silent:?}");
    let answer = qmp.call("query-status", serde_json::json!({}), None).await.unwrap();
    assert_eq!(answer, serde_json::json!({ "running": true }));
    assert_eq!(peer.await.unwrap(), 3);
}
