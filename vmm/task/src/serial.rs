//! The channel over one virtio-serial port, where there is no usable vsock.
//!
//! What is a connection over vsock is a stream of [`vmm_common::mux`] here: the same ports, the same
//! first lines, the same [`Gate`]. In each session with a host that has not welcomed us yet we
//! dial READY.
//!
//! The port has our name, and is one of two things:
//!
//! * a plain port (`/dev/vportNpM`), which reads as ended and polls as hung up for as long as no host
//!   has its side open;
//! * a console (StratoVirt's microvm has no other): then that file cannot be opened, and
//!   `/dev/hvc0` is the way. That is a terminal, which has to be made raw before a byte of it is worth
//!   anything, and which tells nothing of the host.
//!
//! Two threads copy between the port and a socket pair, because the plain port's poll cannot wait for
//! the moment at which the other side opens (it reports a hang-up for as long as it is closed): an
//! edge-triggered epoll can.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::termios::{self, SetArg};
use tokio::sync::Semaphore;
use vmm_common::handshake::Welcome;
use vmm_common::mux::{Incoming, Mux};
use vmm_common::{CHUNK, SERIAL_PORT, port};

use crate::channel::{self, Gate, Port};
use crate::engine::Engine;
use crate::limits;

/// The console's terminal. Ours is the first: a machine with another before it is not one of ours.
const CONSOLE: &str = "/dev/hvc0";
/// What a terminal that reads as ended is given, before it is read again.
const PAUSE: Duration = Duration::from_millis(100);

/// The port of our name, if this machine has one.
pub fn find() -> Option<PathBuf> {
    find_in(Path::new("/sys/class/virtio-ports"))
}

fn find_in(sys: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(sys).ok()?;
    let ours = |entry: &std::fs::DirEntry| {
        let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        name.trim_end() == SERIAL_PORT
    };
    entries.flatten().find(ours).map(|entry| Path::new("/dev").join(entry.file_name()))
}

/// Returns as soon as there is a port of our name: the kernel makes it known when the driver and the
/// device have agreed on it, which may be after we began.
///
/// # Errors
/// When the kernel does not tell of its devices.
pub async fn wait_for_port() -> containerd_task::error::Result<PathBuf> {
    loop {
        let there = || Ok(find());
        match crate::uevent::wait_for("a serial port", limits::PORT_TIME, there).await {
            Err(containerd_task::error::Error::DeadlineExceeded(_)) => {}
            other => return other,
        }
    }
}

/// Opens the port, or the terminal that it is: raw.
fn open(path: &Path) -> io::Result<File> {
    let options = || {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC);
        options
    };
    match options().open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let terminal = options().open(CONSOLE)?;
            raw(&terminal)?;
            Ok(terminal)
        }
        other => other,
    }
}

/// Every byte as it is: no echo, no lines, no signals, no flow control. What was typed at it before
/// is forgotten.
fn raw(terminal: &File) -> io::Result<()> {
    let mut settings = termios::tcgetattr(terminal)?;
    termios::cfmakeraw(&mut settings);
    termios::tcsetattr(terminal, SetArg::TCSAFLUSH, &settings)?;
    Ok(())
}

/// Serves the port for ever. `welcomed` is called with the host's welcome.
///
/// # Errors
/// When the port cannot be opened or a thread not started.
pub fn serve(
    path: PathBuf,
    gate: Arc<Gate>,
    engine: Arc<Engine>,
    welcomed: impl Fn(&Welcome) + Send + Sync + 'static,
) -> io::Result<()> {
    let opened = Arc::new(open(&path)?);
    let (ours, theirs) = UnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    let theirs = tokio::net::UnixStream::from_std(theirs)?;
    let ours = Arc::new(ours);
    let thread =
        |name: &str| std::thread::Builder::new().name(name.into()).stack_size(limits::STACK);
    let (port, socket) = (opened.clone(), ours.clone());
    thread("serial in").spawn(move || {
        if let Err(error) = inwards(&port, &socket) {
            tracing::error!(%error, path = %path.display(), "the serial port is lost");
        }
        let _ = socket.shutdown(std::net::Shutdown::Both);
    })?;
    thread("serial out").spawn(move || {
        let _ = outwards(&ours, &opened);
        let _ = ours.shutdown(std::net::Shutdown::Both);
    })?;
    let mux = Mux::guest();
    tokio::spawn(greet(mux.clone(), gate.clone(), welcomed));
    tokio::spawn(accept(mux.clone(), gate, engine));
    tokio::spawn(async move { mux.run(theirs).await });
    Ok(())
}

/// Says READY in each session, until a host has welcomed us.
async fn greet(mux: Mux, gate: Arc<Gate>, welcomed: impl Fn(&Welcome)) {
    let mut sessions = mux.sessions();
    while sessions.wait_for(Option::is_some).await.is_ok() {
        if gate.is_open() {
            return;
        }
        let dial = || {
            let mux = mux.clone();
            async move { mux.open(port::READY).await }
        };
        tokio::select! {
            () = channel::welcome(dial, || {}, &welcomed) => return,
            // Whoever we have dialled is not there any more.
            changed = sessions.changed() => if changed.is_err() { return },
        }
    }
}

async fn accept(mux: Mux, gate: Arc<Gate>, engine: Arc<Engine>) {
    let greeting = Arc::new(Semaphore::new(limits::GREETING));
    loop {
        let incoming = mux.next().await;
        let kind = match incoming.port {
            port::CONTROL => Port::Control,
            port::STREAM => Port::Stream,
            port::TASK => {
                engine.offer(Incoming::accept, incoming).await;
                continue;
            }
            // Dropped, it is refused.
            _ => continue,
        };
        let Ok(place) = greeting.clone().try_acquire_owned() else {
            tracing::warn!(?kind, "too many streams greet at the same time: one was refused");
            continue;
        };
        let (gate, stream) = (gate.clone(), incoming.accept());
        tokio::spawn(async move {
            if let Err(error) = gate.connection(kind, stream).await {
                tracing::info!(%error, ?kind, "a stream was refused");
            }
            drop(place);
        });
    }
}

/// From the port, for as long as anybody listens here.
fn inwards(port: &File, mut to: &UnixStream) -> io::Result<()> {
    let opened = Opened::new(port)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match (&*port).read(&mut buffer) {
            // No host: it may come again.
            Ok(0) => opened.wait(port)?,
            Ok(n) => {
                if to.write_all(buffer.get(..n).unwrap_or_default()).is_err() {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// To the port. It waits for a host, where it knows of one.
fn outwards(mut from: &UnixStream, port: &File) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => (&*port).write_all(buffer.get(..n).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits for the moment at which the other side opens.
struct Opened(Epoll);

impl Opened {
    fn new(port: &File) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLET;
        epoll.add(port, EpollEvent::new(edge, 0))?;
        Ok(Self(epoll))
    }

    fn wait(&self, port: &File) -> io::Result<()> {
        loop {
            let mut fds = [PollFd::new(port.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO)?;
            let events = fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            if !events.contains(PollFlags::POLLHUP) {
                if events.is_empty() {
                    // A terminal's, which says nothing of why.
                    std::thread::sleep(PAUSE);
                }
                return Ok(());
            }
            let mut events = [EpollEvent::empty()];
            match self.0.wait(&mut events, EpollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn the_port_is_found_by_its_name() {
        let sys = tempfile::tempdir().unwrap();
        for (port, name) in [("vport0p1", "other\n"), ("vport1p1", "org.kuasar.agent.0\n")] {
            let dir = sys.path().join(port);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("name"), name).unwrap();
        }
        assert_eq!(find_in(sys.path()).unwrap(), Path::new("/dev/vport1p1"));
        assert_eq!(find_in(Path::new("/nowhere")), None);
    }

    #[test]
    fn a_terminal_passes_every_byte_as_it_is_and_answers_none() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let (host, terminal) = (File::from(pty.master), File::from(pty.slave));
        raw(&terminal).unwrap();
        let all: Vec<u8> = (0..=255).collect();
        let copy = all.clone();
        let mut writer = File::from(OwnedFd::from(host.try_clone().unwrap()));
        let there = std::thread::spawn(move || writer.write_all(&copy).unwrap());
        let mut got = vec![0; all.len()];
        (&terminal).read_exact(&mut got).unwrap();
        assert_eq!(got, all);
        there.join().unwrap();
        // The first thing that the host reads is what we write: there was no echo.
        (&terminal).write_all(&all).unwrap();
        (&host).read_exact(&mut got).unwrap();
        assert_eq!(got, all);
    }
}
