//! Who may speak to us, and how connections begin.
//!
//! Until the host has answered our READY nothing is served: every greeting is refused. After
//! that, whoever shows this boot's token is the host (see [`vmm_common::handshake`]). A greeting
//! is bounded in length and time, and only so many may be under way; a connection that is one
//! too many is closed at once.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_task::TaskServer;
use containerd_task::stdio::raw::RawConnection;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use vmm_common::handshake::{
    self, HandshakeError, PROTOCOL, Purpose, Ready, StreamKind, Welcome, parse_hello, read_line,
    same_token,
};
use vmm_common::{CHUNK, port};

use crate::debug::Debugs;
use crate::forward::Forwards;
use crate::limits;

/// What a port is for; a greeting for anything else is refused there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// ttrpc.
    Control,
    /// Streams.
    Stream,
}

/// Lets the host in and nobody else.
pub struct Gate {
    token: Mutex<Option<String>>,
    tasks: Arc<TaskServer>,
    forwards: Arc<Forwards>,
    debugs: Arc<Debugs>,
    control: mpsc::Sender<Control>,
    control_slots: Arc<Semaphore>,
    /// How long a connection may take to greet.
    patience: Duration,
}

/// A connection in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static> Stream for T {}

impl Gate {
    /// A gate that is closed. Greeted control connections go to `control`.
    pub fn new(
        tasks: Arc<TaskServer>,
        forwards: Arc<Forwards>,
        debugs: Arc<Debugs>,
        control: mpsc::Sender<Control>,
    ) -> Arc<Self> {
        let control_slots = Arc::new(Semaphore::new(limits::CONTROL));
        let patience = limits::GREETING_TIME;
        Arc::new(Self {
            token: Mutex::default(),
            tasks,
            forwards,
            debugs,
            control,
            control_slots,
            patience,
        })
    }

    /// From now on `token` opens, and no other.
    pub fn open(&self, token: String) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }

    /// Whether a token opens it.
    pub fn is_open(&self) -> bool {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn may(&self, token: &str) -> Result<(), &'static str> {
        match &*self.token.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Err("not before the host has welcomed this guest"),
            Some(ours) if same_token(ours, token) => Ok(()),
            Some(_) => Err("wrong token"),
        }
    }

    /// Greets whoever has connected, and passes the connection on. Answers an error when it was
    /// refused.
    ///
    /// # Errors
    /// [`HandshakeError`]; the other side has been told.
    pub async fn connection(
        &self,
        port: Port,
        mut stream: impl Stream,
    ) -> Result<(), HandshakeError> {
        let late = || HandshakeError::Malformed("no greeting in time".into());
        let greeting = tokio::time::timeout(self.patience, read_line(&mut stream));
        let line = match greeting.await.map_err(|_| late()).and_then(|line| line) {
            Ok(line) => line,
            Err(error) => return refuse(&mut stream, error).await,
        };
        let (token, purpose) = match parse_hello(&line) {
            Ok(hello) => hello,
            Err(error) => return refuse(&mut stream, error).await,
        };
        if let Err(why) = self.may(token) {
            return refuse(&mut stream, HandshakeError::Refused(why.into())).await;
        }
        match (port, purpose) {
            (Port::Control, Purpose::Control) => {
                let Ok(slot) = self.control_slots.clone().try_acquire_owned() else {
                    return refused(&mut stream, "too many control connections").await;
                };
                ok(&mut stream).await?;
                let control = Control::new(stream, slot);
                // It only fails when the server has ended, and then so does everything.
                let _ = self.control.send(control).await;
                Ok(())
            }
            (Port::Stream, Purpose::Stream { container, kind: StreamKind::Forward, .. }) => {
                match self.forwards.connect(&container).await {
                    Ok((slot, socket)) => {
                        ok(&mut stream).await?;
                        tokio::spawn(crate::forward::join(slot, stream, socket));
                        Ok(())
                    }
                    Err(error) => refused(&mut stream, &error.chain()).await,
                }
            }
            (Port::Stream, Purpose::Stream { container, kind: StreamKind::Debug, .. }) => {
                match self.debugs.start(&container).await {
                    Ok(session) => match ok(&mut stream).await {
                        Ok(()) => {
                            tokio::spawn(session.join(stream));
                            Ok(())
                        }
                        Err(error) => {
                            tokio::spawn(session.end());
                            Err(error)
                        }
                    },
                    Err(error) => refused(&mut stream, &error.chain()).await,
                }
            }
            (Port::Stream, Purpose::Stream { container, exec, kind }) => {
                let name = format!("{container}/{exec}/{}", kind.word());
                let streams = self.tasks.streams();
                if !streams.has_raw(&name) {
                    return refused(&mut stream, "no process has this stream").await;
                }
                ok(&mut stream).await?;
                let connection: RawConnection = Box::new(stream);
                // The process may have ended in between: the connection is closed then.
                streams
                    .attach_raw(&name, connection)
                    .map_err(|error| HandshakeError::Refused(error.to_string()))
            }
            (Port::Control, Purpose::Stream { .. }) => {
                refused(&mut stream, "this port is for control").await
            }
            (Port::Stream, Purpose::Control) => {
                refused(&mut stream, "this port is for streams").await
            }
        }
    }
}

async fn ok(stream: &mut impl Stream) -> Result<(), HandshakeError> {
    let answer = async {
        stream.write_all(b"OK\n").await?;
        stream.flush().await
    };
    match tokio::time::timeout(limits::GREETING_TIME, answer).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(HandshakeError::Io(io::ErrorKind::TimedOut.into())),
    }
}

async fn refused(stream: &mut impl Stream, why: &str) -> Result<(), HandshakeError> {
    refuse(stream, HandshakeError::Refused(why.into())).await
}

async fn refuse(stream: &mut impl Stream, error: HandshakeError) -> Result<(), HandshakeError> {
    let why: String = match &error {
        HandshakeError::Refused(why) => why.clone(),
        other => other.to_string(),
    };
    let why: String = why.chars().filter(|c| !c.is_control()).take(200).collect();
    let answer = async {
        stream.write_all(format!("ERR {why}\n").as_bytes()).await?;
        stream.shutdown().await
    };
    // Whoever does not read that has gone.
    let _ = tokio::time::timeout(limits::GREETING_TIME, answer).await;
    Err(error)
}

/// A control connection: it holds its place, and writes in small pieces, because some
/// vsock devices hang on large ones.
pub struct Control {
    stream: Box<dyn Stream>,
    _slot: OwnedSemaphorePermit,
}

impl Control {
    /// A connection that needs no greeting.
    pub(crate) fn new(stream: impl Stream, slot: OwnedSemaphorePermit) -> Self {
        Self { stream: Box::new(stream), _slot: slot }
    }
}

impl AsyncRead for Control {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Control {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let piece = buf.get(..CHUNK).unwrap_or(buf);
        Pin::new(&mut self.stream).poll_write(cx, piece)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Listens on both vsock ports.
///
/// # Errors
/// When the kernel has no vsock.
pub fn listen(gate: &Arc<Gate>) -> io::Result<()> {
    for (number, port) in [(port::CONTROL, Port::Control), (port::STREAM, Port::Stream)] {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, number))?;
        tokio::spawn(accept(listener, port, gate.clone()));
    }
    Ok(())
}

async fn accept(listener: VsockListener, port: Port, gate: Arc<Gate>) {
    let greeting = Arc::new(Semaphore::new(limits::GREETING));
    loop {
        let stream = match listener.accept().await {
            // The kernel lets only the host's CID through to a guest without siblings, but that
            // is the device's promise and not ours.
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => stream,
            Ok((_, peer)) => {
                tracing::warn!(cid = peer.cid(), "a connection that is not the host's was refused");
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, ?port, "cannot accept a connection");
                // Out of descriptors: let some be closed first.
                tokio::time::sleep(limits::ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = greeting.clone().try_acquire_owned() else {
            tracing::warn!(?port, "too many connections greet at the same time: one was refused");
            continue;
        };
        let gate = gate.clone();
        tokio::spawn(async move {
            if let Err(error) = gate.connection(port, stream).await {
                tracing::info!(%error, ?port, "a connection was refused");
            }
            drop(place);
        });
    }
}

/// What we say of ourselves.
pub fn ready() -> Ready {
    let line = |path: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim_end().chars().take(128).collect()
    };
    Ready {
        protocol: PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: line("/proc/sys/kernel/osrelease"),
        boot_id: line("/proc/sys/kernel/random/boot_id"),
    }
}

/// Says that we serve, on a connection that can only be the host's, and takes its welcome; does
/// `meanwhile` what need not be done before, since the host takes its time to answer.
///
/// # Errors
/// [`HandshakeError`].
pub async fn announce(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    meanwhile: impl FnOnce(),
) -> Result<Welcome, HandshakeError> {
    let talk = async {
        handshake::write_json(stream, &ready()).await?;
        meanwhile();
        let welcome: Welcome = handshake::read_json(stream).await?;
        check_token(&welcome.token)?;
        Ok(welcome)
    };
    let late = |_| HandshakeError::Io(io::ErrorKind::TimedOut.into());
    tokio::time::timeout(limits::WELCOME_TIME, talk).await.map_err(late)?
}

/// A token that can be guessed would be as good as none.
///
/// # Errors
/// [`HandshakeError::Malformed`].
pub fn check_token(token: &str) -> Result<(), HandshakeError> {
    let good = (32..=256).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic());
    let text = "the token is not 32 to 256 characters";
    if good { Ok(()) } else { Err(HandshakeError::Malformed(text.into())) }
}

/// The last line of the talk.
///
/// # Errors
/// [`HandshakeError`].
pub async fn acknowledge(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> Result<(), HandshakeError> {
    handshake::write_json(stream, &HashMap::from([("ok", true)])).await
}

/// Dials the host until it answers, and answers its welcome; `taken` is called in between, so
/// that everything is in force when the host hears that it is. `meanwhile` is called whenever we
/// are about to wait for a host that we have reached.
pub async fn welcome<S, F>(dial: impl Fn() -> F, meanwhile: impl Fn(), taken: impl Fn(&Welcome))
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = io::Result<S>>,
{
    const SHORT: Duration = Duration::from_millis(10);
    let mut pause = SHORT;
    loop {
        let reached = AtomicBool::new(false);
        let attempt = async {
            let mut stream = dial().await?;
            reached.store(true, Ordering::Relaxed);
            let welcome = announce(&mut stream, &meanwhile).await?;
            taken(&welcome);
            acknowledge(&mut stream).await
        };
        match attempt.await {
            Ok(()) => return,
            Err(error) => tracing::info!(%error, "the host does not answer yet"),
        }
        if reached.into_inner() {
            // A host that listens and does not answer yet has no pod for this machine: it may have one
            // at any moment, and is told anew now and then that there is a guest.
            pause = SHORT;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(limits::READY_PAUSE);
    }
}

/// Dials a port of the host over vsock.
///
/// # Errors
/// When nobody listens there.
pub async fn dial_host(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await
}

/// Returns as soon as there is a vsock device.
///
/// # Errors
/// When the kernel does not tell of its devices.
pub async fn wait_for_vsock() -> containerd_task::error::Result<()> {
    loop {
        let there = || Ok(has_vsock().then_some(()));
        match crate::uevent::wait_for("a vsock device", limits::VSOCK_TIME, there).await {
            Err(containerd_task::error::Error::DeadlineExceeded(_)) => {}
            other => return other,
        }
    }
}

/// Whether there is a vsock device, and so a host at its other end.
pub fn has_vsock() -> bool {
    // IOCTL_VM_SOCKETS_GET_LOCAL_CID of linux/vm_sockets.h.
    const GET_LOCAL_CID: u64 = 0x7b9;
    let Ok(device) = std::fs::File::open("/dev/vsock") else { return false };
    let mut cid: libc::c_uint = 0;
    // SAFETY: the kernel writes one unsigned int.
    let result = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&device),
            GET_LOCAL_CID as _,
            std::ptr::from_mut(&mut cid),
        )
    };
    result == 0 && cid != VMADDR_CID_ANY
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_task::TaskOptions;
    use containerd_task::events::EventSender;
    use containerd_task::journal::{NoJournal, Stdio};
    use containerd_task::runtime::NoKeeper;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn gate() -> (Arc<Gate>, mpsc::Receiver<Control>, Arc<TaskServer>) {
        let (sender, receiver) = mpsc::channel(4);
        let runtime = Arc::new(containerd_task::testing::Nothing);
        let tasks = TaskServer::new(
            runtime,
            Arc::new(NoKeeper),
            Arc::new(NoJournal),
            EventSender::none(),
            TaskOptions::default(),
        );
        let (reaper, exe) = (crate::reaper::Reaper::default(), "/none".to_owned());
        let debugs = Debugs::new(false, reaper, Arc::default(), exe);
        (Gate::new(tasks.clone(), Arc::default(), debugs, sender), receiver, tasks)
    }

    async fn dial(gate: &Arc<Gate>, port: Port, line: &str) -> (String, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let gate = gate.clone();
        tokio::spawn(async move { gate.connection(port, ours).await });
        theirs.write_all(line.as_bytes()).await.unwrap();
        (read_line(&mut theirs).await.unwrap(), theirs)
    }

    #[tokio::test]
    async fn nothing_is_served_before_the_welcome_or_without_the_token() {
        let (gate, mut control, _tasks) = gate();
        let hello = handshake::hello(TOKEN, &Purpose::Control);
        let (answer, _) = dial(&gate, Port::Control, &hello).await;
        assert!(answer.starts_with("ERR not before"), "{answer}");
        gate.open(TOKEN.into());
        for line in ["\n", "GET / HTTP/1.1\r\n", "KUASAR1 x control\n", "KUASAR2 x control\n"] {
            let (answer, mut stream) = dial(&gate, Port::Control, line).await;
            assert!(answer.starts_with("ERR "), "{line:?}: {answer}");
            assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        }
        assert!(control.try_recv().is_err());
        let (answer, mut stream) = dial(&gate, Port::Control, &hello).await;
        assert_eq!(answer, "OK");
        let mut served = control.recv().await.unwrap();
        stream.write_all(b"frame").await.unwrap();
        let mut five = [0; 5];
        served.read_exact(&mut five).await.unwrap();
        assert_eq!(&five, b"frame");
    }

    #[tokio::test]
    async fn an_endless_greeting_is_cut_off() {
        let (gate, _control, _tasks) = gate();
        gate.open(TOKEN.into());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let served = tokio::spawn(async move { gate.connection(Port::Control, ours).await });
        let _ = theirs.write_all(&vec![b'x'; 64 << 10]).await;
        assert!(matches!(served.await.unwrap(), Err(HandshakeError::TooLong)));
    }

    #[tokio::test]
    async fn a_silent_connection_is_given_up() {
        let (gate, _control, _tasks) = gate();
        let mut gate = Arc::into_inner(gate).unwrap();
        gate.patience = Duration::from_millis(20);
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(gate.connection(Port::Stream, ours).await.is_err());
    }

    #[tokio::test]
    async fn control_connections_are_counted() {
        let (gate, mut control, _tasks) = gate();
        gate.open(TOKEN.into());
        let hello = handshake::hello(TOKEN, &Purpose::Control);
        let mut held = Vec::new();
        for _ in 0..limits::CONTROL {
            assert_eq!(dial(&gate, Port::Control, &hello).await.0, "OK");
            held.push(control.recv().await.unwrap());
        }
        assert!(dial(&gate, Port::Control, &hello).await.0.starts_with("ERR too many"));
        held.pop();
        assert_eq!(dial(&gate, Port::Control, &hello).await.0, "OK");
    }

    #[tokio::test]
    async fn a_stream_goes_to_the_process_that_expects_it() {
        let (gate, _control, tasks) = gate();
        gate.open(TOKEN.into());
        let purpose = Purpose::Stream {
            container: "c".into(),
            exec: String::new(),
            kind: StreamKind::Stdout,
        };
        let hello = handshake::hello(TOKEN, &purpose);
        assert!(dial(&gate, Port::Stream, &hello).await.0.starts_with("ERR no process"));
        let debug = hello.replace("stdout", "debug");
        assert!(dial(&gate, Port::Stream, &debug).await.0.starts_with("ERR no debug session"));
        let stdout = vmm_common::stream_address("c", "", StreamKind::Stdout);
        tasks.streams().expect_raw(&Stdio { stdout, ..Stdio::default() }).unwrap();
        assert_eq!(dial(&gate, Port::Stream, &hello).await.0, "OK");
        assert!(dial(&gate, Port::Control, &hello).await.0.starts_with("ERR this port"));
        let control = handshake::hello(TOKEN, &Purpose::Control);
        assert!(dial(&gate, Port::Stream, &control).await.0.starts_with("ERR this port"));
    }

    #[tokio::test]
    async fn odd_greetings_open_nothing() {
        let (gate, mut control, _tasks) = gate();
        gate.open(TOKEN.into());
        let mut random = crate::testing::Random(5);
        for n in 0..300 {
            let mut line = random.bytes(80);
            if n % 3 == 0 {
                line = [b"KUASAR1 ".to_vec(), line].concat();
            }
            line.retain(|b| *b != b'\n');
            line.push(b'\n');
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&line).await.unwrap();
            assert!(gate.connection(Port::Control, ours).await.is_err());
        }
        assert!(control.try_recv().is_err());
    }

    #[tokio::test]
    async fn the_welcome_is_taken_before_it_is_acknowledged() {
        let (mut guest, mut host) = UnixStream::pair().unwrap();
        let guest = tokio::spawn(async move { announce(&mut guest, || {}).await });
        let ready: Ready = handshake::read_json(&mut host).await.unwrap();
        assert_eq!(ready.protocol, PROTOCOL);
        let weak = Welcome {
            token: "short".into(),
            now_ns: 1,
            entropy: "00".into(),
            sandbox_id: "s".into(),
        };
        handshake::write_json(&mut host, &weak).await.unwrap();
        assert!(matches!(guest.await.unwrap(), Err(HandshakeError::Malformed(_))));
    }
}
