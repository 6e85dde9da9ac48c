//! What a client of a pod sees while daemons come and go, frame by frame.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use support::{Home, blocking, dial, frame, read_frame, request, until};

const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// Nothing comes within a moment, and the connection is open.
fn silent(client: &mut UnixStream) {
    client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let e = client.read(&mut [0; 1]).expect_err("the connection must stay open and silent");
    assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock);
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
}

fn unavailable(client: &mut UnixStream, stream: u32) {
    let (id, kind, _, body) = read_frame(client);
    assert_eq!((id, kind, &body[2..4]), (stream, RESPONSE, &[8u8, 14][..]));
}

#[test]
fn frames_go_both_ways_unchanged() {
    let home = Home::new();
    let mut daemon = daemon(&home);
    let mut client = dial(&home, "p");
    let mut server = connection(&mut daemon);
    for (i, size) in [0, 1, 500, 1024, 1100, 65_000, 70_000, 4_000_000].into_iter().enumerate() {
        let (stream, call) = (i as u32 * 2 + 1, request(i as u32 * 2 + 1, "Kill", 0, size));
        let (c, sent) = (client.try_clone().unwrap(), call.clone());
        let writer = std::thread::spawn(move || (&c).write_all(&sent).unwrap());
        let got = read_frame(&mut server);
        writer.join().unwrap();
        assert!(got.0 == stream && got.3 == call[10..], "{size} up");
        let answer = frame(stream, RESPONSE, 0, &vec![i as u8; size]);
        let (s, sent) = (server.try_clone().unwrap(), answer.clone());
        let writer = std::thread::spawn(move || (&s).write_all(&sent).unwrap());
        let got = read_frame(&mut client);
        writer.join().unwrap();
        assert!(got.0 == stream && got.3 == answer[10..], "{size} down");
    }
}

#[test]
fn a_wait_survives_its_daemon_and_other_calls_are_unavailable() {
    let home = Home::new();
    let mut first = daemon(&home);
    let mut client = dial(&home, "p");
    let mut server = connection(&mut first);
    let wait = request(1, "Wait", 0, 100);
    client.write_all(&wait).unwrap();
    client.write_all(&request(3, "Kill", 0, 10)).unwrap();
    assert_eq!(read_frame(&mut server).0, 1);
    assert_eq!(read_frame(&mut server).0, 3);
    drop(server);
    first.kill();
    unavailable(&mut client, 3);
    // While nobody is there: a call is refused at once, whatever its size; a wait is taken.
    client.write_all(&request(5, "State", 0, 3)).unwrap();
    unavailable(&mut client, 5);
    client.write_all(&request(7, "Create", 0, 300_000)).unwrap();
    unavailable(&mut client, 7);
    client.write_all(&request(9, "WaitSandbox", 0, 3)).unwrap();
    silent(&mut client);

    let mut second = home.daemon();
    assert!(!second.fresh);
    assert_eq!(second.run(second.parent.pods()).unwrap(), ["p"]);
    assert_eq!(second.run(second.parent.status()).unwrap().parked, 2);
    second.run(second.parent.ready()).unwrap();
    let c = second.connection();
    assert!(c.replay && c.pod == "p");
    let mut server = blocking(c);
    let mut again = [read_frame(&mut server), read_frame(&mut server)];
    again.sort();
    assert_eq!(again[0].3, wait[10..]);
    assert_eq!(again[1].0, 9);
    server.write_all(&frame(1, RESPONSE, 0, b"exit 7")).unwrap();
    assert_eq!(read_frame(&mut client), (1, RESPONSE, 0, b"exit 7".to_vec()));
    silent(&mut client);
}

#[test]
fn a_call_waits_for_the_next_daemon_and_not_for_ever() {
    let home = Home::new();
    let mut first = home.daemon_that_holds(Duration::from_millis(1500));
    first.listen(&home, "p");
    let mut client = dial(&home, "p");
    let mut server = connection(&mut first);
    client.write_all(&request(1, "Start", 0, 3)).unwrap();
    read_frame(&mut server);
    drop(server);
    first.kill();
    // It may have been done.
    unavailable(&mut client, 1);
    // It has not been done: whatever its size, it is kept, and so is what follows it.
    let large = request(3, "Create", 0, 300_000);
    let (mut other, sent) = (client.try_clone().unwrap(), large.clone());
    let writer = std::thread::spawn(move || {
        other.write_all(&sent).unwrap();
        other.write_all(&request(5, "Wait", 0, 3)).unwrap();
    });
    silent(&mut client);
    let mut second = home.daemon();
    second.run(second.parent.ready()).unwrap();
    let mut server = connection(&mut second);
    assert!(read_frame(&mut server).3 == large[10..]);
    assert_eq!(read_frame(&mut server).0, 5);
    writer.join().unwrap();
    server.write_all(&frame(3, RESPONSE, 0, b"made")).unwrap();
    assert_eq!(read_frame(&mut client), (3, RESPONSE, 0, b"made".to_vec()));
    client.write_all(&request(7, "Start", 0, 3)).unwrap();
    read_frame(&mut server);
    drop(server);
    second.kill();
    // sandbox-parent has seen that nobody is there.
    unavailable(&mut client, 7);
    // Nobody comes: it is refused, the wait is not.
    client.write_all(&request(9, "State", 0, 3)).unwrap();
    silent(&mut client);
    unavailable(&mut client, 9);
    client.write_all(&request(11, "State", 0, 3)).unwrap();
    unavailable(&mut client, 11);
    silent(&mut client);
}

/// containerd's Wait is a Connect and a Wait, and an error of either is a container's exit for it.
#[test]
fn what_only_reads_is_put_to_the_next_daemon_and_connect_for_ever() {
    let home = Home::new();
    let mut first = home.daemon_that_holds(Duration::from_millis(1500));
    first.listen(&home, "p");
    let mut client = dial(&home, "p");
    let mut server = connection(&mut first);
    let calls = [(1, "Connect"), (3, "State"), (5, "Pids"), (7, "Stats")];
    for (stream, method) in calls {
        client.write_all(&request(stream, method, 0, 30)).unwrap();
        assert_eq!(read_frame(&mut server).0, stream);
    }
    drop(server);
    first.kill();
    silent(&mut client);
    let mut second = home.daemon_that_holds(Duration::from_millis(1500));
    second.run(second.parent.ready()).unwrap();
    let mut server = connection(&mut second);
    let mut again: Vec<_> = calls.iter().map(|_| read_frame(&mut server)).collect();
    again.sort();
    for ((stream, method), got) in calls.into_iter().zip(again) {
        assert_eq!((got.0, &got.3), (stream, &request(stream, method, 0, 30)[10..].to_vec()));
    }
    server.write_all(&frame(3, RESPONSE, 0, b"running")).unwrap();
    assert_eq!(read_frame(&mut client), (3, RESPONSE, 0, b"running".to_vec()));
    drop(server);
    second.kill();
    // Nobody comes in time: what reads is refused, a Connect goes on waiting.
    silent(&mut client);
    let mut refused = [read_frame(&mut client), read_frame(&mut client)];
    refused.sort();
    for (stream, got) in [5, 7].into_iter().zip(refused) {
        assert_eq!((got.0, got.1, &got.3[2..4]), (stream, RESPONSE, &[8u8, 14][..]));
    }
    client.write_all(&request(9, "Connect", 0, 3)).unwrap();
    silent(&mut client);
    let mut third = home.daemon();
    third.run(third.parent.ready()).unwrap();
    let mut server = connection(&mut third);
    let mut again = [read_frame(&mut server).0, read_frame(&mut server).0];
    again.sort();
    assert_eq!(again, [1, 9]);
}

#[test]
fn connections_that_come_while_no_daemon_is_there_are_kept() {
    let home = Home::new();
    daemon(&home).kill();
    let mut client = dial(&home, "p");
    client.write_all(&request(1, "Wait", 0, 3)).unwrap();
    client.write_all(&request(3, "Pids", 0, 3)).unwrap();
    unavailable(&mut client, 3);
    let mut second = home.daemon();
    second.run(second.parent.ready()).unwrap();
    let mut server = connection(&mut second);
    assert_eq!(read_frame(&mut server).0, 1);
}

#[test]
fn an_answer_that_was_written_before_the_death_arrives_and_half_of_one_does_not() {
    let home = Home::new();
    let mut first = daemon(&home);
    let mut client = dial(&home, "p");
    let mut server = connection(&mut first);
    for stream in [1, 3] {
        client.write_all(&request(stream, "Start", 0, 3)).unwrap();
        read_frame(&mut server);
    }
    let mut bytes = frame(1, RESPONSE, 0, b"whole");
    bytes.extend_from_slice(&frame(3, RESPONSE, 0, b"half of it")[..15]);
    server.write_all(&bytes).unwrap();
    assert_eq!(read_frame(&mut client).3, b"whole");
    silent(&mut client);
    drop(server);
    first.kill();
    unavailable(&mut client, 3);
}

#[test]
fn a_long_answer_that_is_cut_off_is_filled_up_and_spoils_only_itself() {
    let home = Home::new();
    let mut first = daemon(&home);
    let mut client = dial(&home, "p");
    let mut server = connection(&mut first);
    client.write_all(&request(1, "Stats", 0, 3)).unwrap();
    client.write_all(&request(3, "Wait", 0, 3)).unwrap();
    read_frame(&mut server);
    read_frame(&mut server);
    let long = frame(1, RESPONSE, 0, &vec![7; 1_000_000]);
    server.write_all(&long[..100_000]).unwrap();
    drop(server);
    first.kill();
    let (stream, _, _, body) = read_frame(&mut client);
    assert_eq!((stream, body.len(), body[0], body[999_999]), (1, 1_000_000, 7, 0));
    let mut second = home.daemon();
    second.run(second.parent.ready()).unwrap();
    let mut server = connection(&mut second);
    assert_eq!(read_frame(&mut server).0, 3);
    server.write_all(&frame(3, RESPONSE, 0, b"ok")).unwrap();
    assert_eq!(read_frame(&mut client), (3, RESPONSE, 0, b"ok".to_vec()));
}

#[test]
fn a_request_whose_daemon_dies_while_it_is_sent_is_unavailable() {
    let home = Home::new();
    let mut first = daemon(&home);
    let mut client = dial(&home, "p");
    let server = connection(&mut first);
    let call = request(1, "Create", 0, 2_000_000);
    let (head, tail) = call.split_at(100_000);
    client.write_all(head).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    drop(server);
    first.kill();
    client.write_all(tail).unwrap();
    unavailable(&mut client, 1);
    client.write_all(&request(3, "State", 0, 3)).unwrap();
    unavailable(&mut client, 3);
}

#[test]
fn a_stream_is_replayed_with_its_first_message_and_acknowledged_once() {
    let home = Home::new();
    let mut first = daemon(&home);
    let mut client = dial(&home, "p");
    let mut server = connection(&mut first);
    let (open, init) = (request(1, "Stream", 2, 0), frame(1, DATA, 0, b"init"));
    client.write_all(&open).unwrap();
    client.write_all(&init).unwrap();
    read_frame(&mut server);
    read_frame(&mut server);
    server.write_all(&frame(1, DATA, 0, b"ack")).unwrap();
    assert_eq!(read_frame(&mut client).3, b"ack");
    drop(server);
    first.kill();
    // Input for a container waits where it is.
    client.write_all(&frame(1, DATA, 0, b"input")).unwrap();
    silent(&mut client);

    let mut second = home.daemon();
    second.run(second.parent.ready()).unwrap();
    let mut server = connection(&mut second);
    assert_eq!(read_frame(&mut server).3, open[10..]);
    assert_eq!(read_frame(&mut server).3, b"init");
    assert_eq!(read_frame(&mut server).3, b"input");
    server.write_all(&frame(1, DATA, 0, b"ack")).unwrap();
    server.write_all(&frame(1, DATA, 0, b"output")).unwrap();
    assert_eq!(read_frame(&mut client).3, b"output");
    // Both sides close: nothing is pending any more.
    server.write_all(&frame(1, DATA, 5, b"")).unwrap();
    client.write_all(&frame(1, DATA, 5, b"")).unwrap();
    assert_eq!(read_frame(&mut client).2, 5);
    assert_eq!(read_frame(&mut server).2, 5);
    drop(server);
    second.kill();
    let third = home.daemon();
    assert_eq!(third.run(third.parent.status()).unwrap().parked, 0);
}

#[test]
fn a_daemon_that_hangs_up_on_a_client_closes_it() {
    let home = Home::new();
    let mut daemon = daemon(&home);
    let mut client = dial(&home, "p");
    drop(connection(&mut daemon));
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    until("the connection is gone", || {
        daemon.run(daemon.parent.status()).unwrap().connections == 0
    });
}

#[test]
fn a_client_that_hangs_up_is_gone_at_the_daemon_too() {
    let home = Home::new();
    let mut daemon = daemon(&home);
    let mut client = dial(&home, "p");
    let mut server = connection(&mut daemon);
    // Half first: what the daemon answers still arrives.
    client.write_all(&request(1, "Wait", 0, 3)).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    read_frame(&mut server);
    assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
    server.write_all(&frame(1, RESPONSE, 0, b"late")).unwrap();
    assert_eq!(read_frame(&mut client).3, b"late");
    drop(client);
    until("the connection is gone", || {
        daemon.run(daemon.parent.status()).unwrap().connections == 0
    });
}

#[test]
fn a_slow_client_holds_up_nobody_else() {
    let home = Home::new();
    let mut daemon = daemon(&home);
    let slow = dial(&home, "p");
    let mut server = connection(&mut daemon);
    let writer = std::thread::spawn(move || {
        for i in 0..40 {
            let bytes = frame(i, RESPONSE, 0, &vec![1; 60_000]);
            server.write_all(&bytes).unwrap();
        }
        server
    });
    let mut other = dial(&home, "p");
    let mut second = connection(&mut daemon);
    other.write_all(&request(1, "State", 0, 3)).unwrap();
    assert_eq!(read_frame(&mut second).0, 1);
    second.write_all(&frame(1, RESPONSE, 0, b"x")).unwrap();
    assert_eq!(read_frame(&mut other).0, 1);
    let mut slow = slow;
    for i in 0..40 {
        let (stream, _, _, body) = read_frame(&mut slow);
        assert_eq!((stream, body.len()), (i, 60_000));
        std::thread::sleep(Duration::from_millis(2));
    }
    writer.join().unwrap();
}

#[test]
fn junk_ends_its_own_connection_only() {
    let home = Home::new();
    let mut daemon = daemon(&home);
    let mut good = dial(&home, "p");
    let mut server = connection(&mut daemon);
    for junk in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[255; 64], &[0; 7]] {
        let mut bad = dial(&home, "p");
        bad.write_all(junk).unwrap();
        bad.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = bad.read(&mut [0; 64]);
    }
    good.write_all(&request(1, "State", 0, 3)).unwrap();
    assert_eq!(read_frame(&mut server).0, 1);
}

#[test]
fn a_thousand_idle_connections_do_no_harm_and_more_are_refused() {
    let home = Home::new();
    let mut daemon = daemon(&home);
    let clients: Vec<_> = (0..1000).map(|_| dial(&home, "p")).collect();
    let mut ends: Vec<_> = clients.iter().map(|_| connection(&mut daemon)).collect();
    let mut over = dial(&home, "p");
    assert_eq!(over.read(&mut [0; 1]).unwrap(), 0);
    let counts = daemon.run(daemon.parent.status()).unwrap();
    assert_eq!((counts.connections, counts.refused), (1000, 1));
    let mut last = clients.last().unwrap();
    last.write_all(&request(1, "State", 0, 3)).unwrap();
    let found = ends.iter_mut().rev().any(|e| {
        e.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        e.read(&mut [0; 64]).is_ok()
    });
    assert!(found);
    daemon.run(daemon.parent.unlisten("p")).unwrap();
    assert_eq!(daemon.run(daemon.parent.status()).unwrap().connections, 0);
}

fn daemon(home: &Home) -> support::Daemon {
    let daemon = home.daemon();
    daemon.listen(home, "p");
    daemon
}

fn connection(daemon: &mut support::Daemon) -> UnixStream {
    blocking(daemon.connection())
}
