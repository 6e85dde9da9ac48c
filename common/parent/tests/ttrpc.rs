//! containerd's client library and a Task server, with this process between them.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, StateRequest, StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, TaskClient, create_task};
use sandbox_parent::client::Parent;
use support::{Daemon, Home};
use tokio::sync::Semaphore;
use ttrpc::asynchronous::{Client, TtrpcContext};

/// Answers Wait when it is let, State with as many bytes as the id says.
struct Server {
    exits: Arc<Semaphore>,
    seen: Arc<Semaphore>,
}

#[async_trait::async_trait]
impl Task for Server {
    async fn wait(&self, _c: &TtrpcContext, q: WaitRequest) -> ttrpc::Result<WaitResponse> {
        self.seen.add_permits(1);
        self.exits.acquire().await.unwrap().forget();
        Ok(WaitResponse { exit_status: q.id.parse().unwrap_or(255), ..Default::default() })
    }
    async fn state(&self, _c: &TtrpcContext, q: StateRequest) -> ttrpc::Result<StateResponse> {
        if q.exec_id == "hang" {
            self.seen.add_permits(1);
            std::future::pending::<()>().await;
        }
        Ok(StateResponse { bundle: "x".repeat(q.id.len()), ..Default::default() })
    }
    async fn connect(
        &self,
        _c: &TtrpcContext,
        _q: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse { task_pid: 7, ..Default::default() })
    }
}

/// Serves every connection that comes; answers how it is steered.
fn serve(daemon: &mut Daemon) -> (Arc<Semaphore>, Arc<Semaphore>) {
    let (exits, seen) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (_closed, empty) = tokio::sync::mpsc::channel(1);
    let mut connections = std::mem::replace(&mut daemon.connections, empty);
    let (e, s) = (exits.clone(), seen.clone());
    daemon.runtime.spawn(async move {
        let mut servers = Vec::new();
        while let Some(c) = connections.recv().await {
            // Each connection is a listener of one.
            let service = create_task(Arc::new(Server { exits: e.clone(), seen: s.clone() }));
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let mut server = ttrpc::asynchronous::Server::new()
                .bind(&format!("unix://{}", path.display()))
                .unwrap()
                .register_service(service);
            server.start().await.unwrap();
            let inner = tokio::net::UnixStream::connect(&path).await.unwrap();
            c.stream.set_nonblocking(true).unwrap();
            let mut outer = tokio::net::UnixStream::from_std(c.stream).unwrap();
            servers.push((server, dir));
            tokio::spawn(async move {
                let mut inner = inner;
                let _ = tokio::io::copy_bidirectional(&mut inner, &mut outer).await;
            });
        }
    });
    (exits, seen)
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(0)
}

fn listen(home: &Home, daemon: &Daemon) {
    daemon.listen(home, "p");
}

#[test]
fn a_wait_of_containerd_outlives_two_daemons() {
    let home = Home::new();
    let mut first = home.daemon();
    listen(&home, &first);
    let (_exits, seen) = serve(&mut first);
    let clients = tokio::runtime::Runtime::new().unwrap();
    let path = home.socket("p");
    let client =
        clients.block_on(async { Client::connect(&format!("unix://{}", path.display())).await });
    let task = TaskClient::new(client.unwrap());
    let call = |task: &TaskClient, id: &str| {
        let (task, q) = (task.clone(), WaitRequest { id: id.into(), ..Default::default() });
        clients.spawn(async move { task.wait(context(), &q).await })
    };
    let waits = [call(&task, "3"), call(&task, "4")];
    let t = task.clone();
    let hang = clients.spawn(async move {
        let q = StateRequest { exec_id: "hang".into(), ..Default::default() };
        t.state(context(), &q).await
    });
    let state = |len: usize| {
        let q = StateRequest { id: "i".repeat(len), ..Default::default() };
        clients.block_on(async {
            tokio::time::timeout(Duration::from_secs(20), task.state(context(), &q)).await.unwrap()
        })
    };
    for len in [1, 1000, 70_000, 2_000_000, 4_000_000] {
        assert_eq!(state(len).unwrap().bundle.len(), len);
    }
    first.run(async { seen.acquire_many(3).await.unwrap().forget() });
    first.kill();

    let refused = |e: ttrpc::Error| match e {
        ttrpc::Error::RpcStatus(s) => s.code.value(),
        e => panic!("{e}"),
    };
    let hang = clients.block_on(async {
        tokio::time::timeout(Duration::from_secs(10), hang).await.unwrap().unwrap()
    });
    assert_eq!(refused(hang.unwrap_err()), 14);
    assert_eq!(refused(state(10).unwrap_err()), 14);
    assert_eq!(refused(state(100_000).unwrap_err()), 14);

    for round in 0..2 {
        let mut daemon = home.daemon();
        let (exits, seen) = serve(&mut daemon);
        daemon.run(daemon.parent.ready()).unwrap();
        daemon.run(async { seen.acquire_many(2).await.unwrap().forget() });
        assert_eq!(state(10).unwrap().bundle.len(), 10);
        assert!(waits.iter().all(|w| !w.is_finished()));
        if round == 1 {
            exits.add_permits(2);
            let [a, b] = waits;
            let exits = clients.block_on(async {
                tokio::time::timeout(Duration::from_secs(10), async {
                    (a.await.unwrap().unwrap(), b.await.unwrap().unwrap())
                })
                .await
                .unwrap()
            });
            assert_eq!((exits.0.exit_status, exits.1.exit_status), (3, 4));
            return;
        }
        daemon.kill();
    }
}

/// The daemon of the next test: started by it, and killed by it.
#[test]
fn daemon_that_is_killed() {
    let Some(dir) = std::env::var_os("KILLED_DAEMON_DIR") else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let options = sandbox_parent::client::ParentOptions::new(dir, support::program());
        let (parent, mut connections, _) = Parent::connect_or_spawn(&options).await.unwrap();
        parent.ready().await.unwrap();
        let mut held = Vec::new();
        while let Some(c) = connections.recv().await {
            held.push(c);
        }
    });
}

#[test]
fn kill_9_of_a_daemon_leaves_its_clients_connected() {
    use std::io::Write;
    let home = Home::new();
    let first = home.daemon();
    listen(&home, &first);
    first.kill();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["daemon_that_is_killed", "--exact", "--nocapture"])
        .env("KILLED_DAEMON_DIR", home.0.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut clients: Vec<_> = (0..50).map(|_| support::dial(&home, "p")).collect();
    for c in &mut clients {
        c.write_all(&support::request(1, "Wait", 0, 50)).unwrap();
        c.write_all(&support::request(3, "Kill", 0, 50)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(500));
    child.kill().unwrap();
    child.wait().unwrap();
    for c in &mut clients {
        let (stream, kind, _, body) = support::read_frame(c);
        assert_eq!((stream, kind, body[3]), (3, 2, 14));
    }
    let mut second = home.daemon();
    second.run(second.parent.ready()).unwrap();
    let counts = second.run(second.parent.status()).unwrap();
    assert_eq!(counts.connections, 50);
    for _ in &clients {
        let c = second.connection();
        assert!(c.replay);
        let mut end = support::blocking(c);
        assert_eq!(support::read_frame(&mut end).0, 1);
        end.write_all(&support::frame(1, 2, 0, b"ok")).unwrap();
    }
    for c in &mut clients {
        assert_eq!(support::read_frame(c).3, b"ok");
    }
}
