//! The channel over one virtio-serial port, where there is no usable vsock.
//!
//! The port is one byte stream that has no connections: the other side is there or it is not.
//! The same lines go over it as over vsock: first our READY and the host's welcome, once; then
//! each time that the host has opened its side, a greeting, and ttrpc frames until it closes. A
//! host that comes back greets anew, with the token that it has written down.
//!
//! Two threads copy between the port and a socket pair, because the driver's poll cannot wait for
//! the moment at which the other side opens (it reports a hang-up for as long as it is closed):
//! an edge-triggered epoll can.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::sync::mpsc;
use vmm_common::handshake::Welcome;
use vmm_common::{CHUNK, SERIAL_PORT};

use crate::channel::{self, Gate, Port};
use crate::limits;

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

/// Serves the port for ever. `welcomed` is called with the host's welcome.
///
/// # Errors
/// When the port cannot be opened or a thread not started.
pub fn serve(
    path: PathBuf,
    gate: Arc<Gate>,
    welcomed: impl Fn(&Welcome) + Send + 'static,
) -> io::Result<()> {
    let port = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
    let (sender, mut sessions) = mpsc::channel::<UnixStream>(1);
    std::thread::Builder::new().name("serial".into()).stack_size(limits::STACK).spawn(
        move || {
            if let Err(error) = copy(&port, &sender) {
                tracing::error!(%error, path = %path.display(), "the serial port is lost");
            }
        },
    )?;
    tokio::spawn(async move {
        let mut known = false;
        while let Some(session) = sessions.recv().await {
            let Ok(mut session) = tokio::net::UnixStream::from_std(session) else { continue };
            if !known && !gate.is_open() {
                match channel::announce(&mut session).await {
                    Ok(welcome) => {
                        welcomed(&welcome);
                        if let Err(error) = channel::acknowledge(&mut session).await {
                            tracing::info!(%error, "the host has gone within the handshake");
                        }
                        known = true;
                    }
                    Err(error) => {
                        tracing::info!(%error, "no welcome on the serial port");
                        continue;
                    }
                }
            }
            if let Err(error) = gate.connection(Port::Serial, session).await {
                tracing::info!(%error, "a greeting on the serial port was refused");
            }
        }
    });
    Ok(())
}

/// One session after the other: waits for the host, copies until it has gone.
fn copy(port: &File, sessions: &mpsc::Sender<UnixStream>) -> io::Result<()> {
    let opened = Opened::new(port)?;
    loop {
        opened.wait(port)?;
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        if sessions.blocking_send(theirs).is_err() {
            return Ok(());
        }
        std::thread::scope(|scope| {
            let writer = std::thread::Builder::new().stack_size(limits::STACK);
            let outwards = writer.spawn_scoped(scope, || pass(&ours, port));
            // Ends when the host has gone; or when the session has, which its next byte tells.
            let _ = pass(port, &ours);
            let _ = ours.shutdown(std::net::Shutdown::Both);
            outwards.map(drop)
        })?;
    }
}

fn pass(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(buffer.get(..n).unwrap_or_default())?,
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
            let hung_up =
                fds.iter().filter_map(PollFd::revents).any(|r| r.contains(PollFlags::POLLHUP));
            if !hung_up {
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
}
