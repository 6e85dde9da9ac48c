//! A sandbox-parent in a directory of its own, and daemons that can be killed.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::future::Future;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sandbox_parent::client::{Connection, Connections, Parent, ParentOptions, Spawn};

/// The program under test: the one of this build, or a static release build.
pub fn program() -> PathBuf {
    std::env::var_os("SANDBOX_PARENT_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_sandbox-parent").into(), PathBuf::from)
}

pub struct Home(pub tempfile::TempDir);

impl Home {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("parent").tempdir().unwrap())
    }

    pub fn socket(&self, pod: &str) -> PathBuf {
        self.0.path().join(format!("{pod}.sock"))
    }

    /// A daemon; the first one starts sandbox-parent.
    pub fn daemon(&self) -> Daemon {
        self.daemon_with(1000)
    }

    pub fn daemon_with(&self, max_connections: u32) -> Daemon {
        self.start(max_connections, Duration::ZERO)
    }

    /// The first one of these starts a sandbox-parent that lets calls wait for so long.
    pub fn daemon_that_holds(&self, hold: Duration) -> Daemon {
        self.start(1000, hold)
    }

    fn start(&self, max_connections: u32, hold: Duration) -> Daemon {
        let options = ParentOptions {
            max_connections,
            hold,
            timeout: Duration::from_secs(20),
            ..ParentOptions::new(self.0.path(), program())
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (parent, connections, fresh) =
            runtime.block_on(Parent::connect_or_spawn(&options)).unwrap();
        Daemon { parent, connections, fresh, runtime }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // Whatever the test came to, sandbox-parent and its children end.
        let path = self.0.path().to_owned();
        let ended = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                if let Ok((p, _c)) = Parent::connect(&path, Duration::from_secs(5)).await {
                    let _ = p.shutdown(true).await;
                }
            });
        });
        let _ = ended.join();
    }
}

/// A daemon with a runtime of its own, so that it can die with all its sockets.
pub struct Daemon {
    pub parent: Parent,
    pub connections: Connections,
    pub fresh: bool,
    pub runtime: tokio::runtime::Runtime,
}

impl Daemon {
    pub fn run<T>(&self, f: impl Future<Output = T>) -> T {
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(30), f).await.expect("it takes too long")
        })
    }

    /// Dies at once: every socket that its tasks hold is closed.
    pub fn kill(self) {
        let Self { parent, connections, runtime, .. } = self;
        drop((parent, connections));
        runtime.shutdown_timeout(Duration::from_secs(5));
    }

    /// Listens for a pod, ready for its connections.
    pub fn listen(&self, home: &Home, pod: &str) {
        let listener = UnixListener::bind(home.socket(pod)).unwrap();
        self.run(async {
            use std::os::fd::AsFd;
            self.parent.listen(pod, listener.as_fd()).await.unwrap();
            self.parent.ready().await.unwrap();
        });
    }

    pub fn connection(&mut self) -> Connection {
        self.runtime
            .block_on(async {
                tokio::time::timeout(Duration::from_secs(10), self.connections.recv()).await
            })
            .expect("no connection comes")
            .expect("sandbox-parent is gone")
    }
}

/// A client of a pod.
pub fn dial(home: &Home, pod: &str) -> UnixStream {
    let stream = UnixStream::connect(home.socket(pod)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// The daemon's end of a connection, blocking.
pub fn blocking(c: Connection) -> UnixStream {
    c.stream.set_nonblocking(false).unwrap();
    c.stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    c.stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    c.stream
}

pub fn shell(script: &str, cookie: u64) -> Spawn<'static> {
    Spawn {
        argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
        env: vec!["PATH=/usr/bin:/bin".into()],
        fds: vec![None, None, None],
        cookie,
    }
}

/// Waits for a condition.
pub fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !f() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn frame(stream: u32, kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let mut f = (body.len() as u32).to_be_bytes().to_vec();
    f.extend_from_slice(&stream.to_be_bytes());
    f.extend_from_slice(&[kind, flags]);
    f.extend_from_slice(body);
    f
}

pub fn request(stream: u32, method: &str, flags: u8, extra: usize) -> Vec<u8> {
    let mut b = vec![0x0a, 3];
    b.extend_from_slice(b"svc");
    b.extend_from_slice(&[0x12, method.len() as u8]);
    b.extend_from_slice(method.as_bytes());
    b.resize(b.len() + extra, 0x55);
    frame(stream, 1, flags, &b)
}

pub fn read_frame(from: &mut UnixStream) -> (u32, u8, u8, Vec<u8>) {
    use std::io::Read;
    let mut head = [0; 10];
    from.read_exact(&mut head).expect("a frame's header");
    let len = u32::from_be_bytes(head[..4].try_into().unwrap()) as usize;
    let mut body = vec![0; len];
    from.read_exact(&mut body).expect("a frame's body");
    (u32::from_be_bytes(head[4..8].try_into().unwrap()), head[8], head[9], body)
}
