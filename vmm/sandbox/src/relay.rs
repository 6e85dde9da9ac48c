//! The relay of a serial channel: `vmm-sandboxer relay --port FD --listen FD --uds PATH`.
//!
//! A machine whose agent speaks through one serial port ([`vmm_common::mux`]) has a small process beside
//! it, as one with vsock has `vhost-device-vsock`, and it looks the same from the host: `<uds>`
//! takes `CONNECT <port>\n`, and what the guest dials arrives at `<uds>_<port>` ([`crate::vmm::vsock`]).
//!
//! **Why a process, and not the daemon.** A VMM lets one connection in to its end of the port, and what
//! its buffers hold when that breaks is lost, with whatever part of a frame. So that end may not be
//! the daemon's, which may be killed at any moment. sandbox-parent would have to keep the end and
//! could not hand over what the dead daemon had read and not passed on. The relay is a child
//! of sandbox-parent, lives as long as the machine, and holds the session; the streams behind
//! it are unix sockets, of which sandbox-parent keeps the daemon's ends. What a killed
//! daemon has not read stands in those sockets, in the relay (within the stream's window) and in the
//! guest, and the next daemon reads on.
//!
//! It is jailed like the other helpers: the machine's own user, no capabilities, no network, and of
//! the host's files the directory of the channel's sockets. It does not end when the port does:
//! whoever stops the machine stops it, and its end before that is the machine's.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, split};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};
use vmm_common::mux::{Incoming, Mux, MuxStream, STREAMS};
use vmm_common::port;

use crate::vmm::vsock::port_path;

/// How long whoever connects may take to say where to.
const GREETING: Duration = Duration::from_secs(10);
/// How long the guest may take to accept.
const ACCEPT: Duration = Duration::from_secs(60);
/// `CONNECT 4294967295`.
const LINE: usize = 18;
/// Streams that the guest may have opened: READY is all that it opens.
const OF_THE_GUEST: usize = 16;
/// How long connections wait that cannot be accepted now.
const PAUSE: Duration = Duration::from_millis(50);

struct Arguments {
    port: OwnedFd,
    listen: OwnedFd,
    uds: PathBuf,
}

/// The command line of a relay whose descriptors have these numbers.
pub(crate) fn command_line(own: String, port: i32, listen: i32, uds: String) -> Vec<String> {
    let fd = |fd: i32| fd.to_string();
    vec![
        own,
        "relay".into(),
        "--port".into(),
        fd(port),
        "--listen".into(),
        fd(listen),
        "--uds".into(),
        uds,
    ]
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Option<Arguments> {
    let (mut port, mut listen, mut uds) = (None, None, None);
    let mut args = args.into_iter();
    while let (Some(name), value) = (args.next(), args.next()) {
        let value = value?;
        let fd = || value.to_str().and_then(|text| text.parse::<RawFd>().ok()).filter(|fd| *fd > 2);
        match name.to_str()? {
            "--port" => port = Some(fd()?),
            "--listen" => listen = Some(fd()?),
            "--uds" => uds = Some(PathBuf::from(value)),
            _ => return None,
        }
    }
    let (port, listen, uds) = (port?, listen?, uds?);
    if port == listen {
        return None;
    }
    // SAFETY: the numbers were given to this process for this purpose, and each is taken once.
    let (port, listen) = unsafe { (OwnedFd::from_raw_fd(port), OwnedFd::from_raw_fd(listen)) };
    Some(Arguments { port, listen, uds })
}

/// Relays until it is killed; `args` come behind the subcommand's name. Answers the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let Some(arguments) = parse(args) else {
        eprintln!("usage: relay --port FD --listen FD --uds PATH");
        return 2;
    };
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(run(arguments)));
    match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("relay: {error}");
            1
        }
    }
}

async fn run(arguments: Arguments) -> io::Result<()> {
    let Arguments { port, listen, uds } = arguments;
    let lost = Arc::new(Notify::new());
    let port = std::os::unix::net::UnixStream::from(port);
    port.set_nonblocking(true)?;
    let port = UnixStream::from_std(port)?;
    let listener = std::os::unix::net::UnixListener::from(listen);
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let number = crate::guest::random_hex(8)?;
    let mux = Mux::host(u64::from_str_radix(&number, 16).map_err(io::Error::other)?);
    let relaying = async {
        tokio::join!(inwards(listener, &mux, &lost), outwards(&uds, &mux), async {
            if let Err(error) = mux.run(port).await {
                eprintln!("relay: the port: {error}");
            }
            // The machine has gone. Who watches it sees how; nobody is to see our end first.
            std::future::pending::<()>().await;
        });
    };
    tokio::select! {
        () = relaying => Ok(()),
        () = lost.notified() => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "the port has lost bytes of a process"))
        }
    }
}

/// Streams of the host. `lost` is told when one of a process has lost bytes.
async fn inwards(listener: UnixListener, mux: &Mux, lost: &Arc<Notify>) {
    let places = Arc::new(Semaphore::new(STREAMS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, _)) => {
                let (mux, lost) = (mux.clone(), lost.clone());
                tokio::spawn(async move {
                    if dial(socket, &mux).await {
                        lost.notify_one();
                    }
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The port that is asked for; nothing, when whoever asks says something else.
async fn asked(socket: &mut UnixStream) -> Option<u32> {
    let mut line = Vec::with_capacity(LINE);
    loop {
        // Byte by byte: what follows the line is the guest's.
        match socket.read_u8().await.ok()? {
            b'\n' => break,
            byte if line.len() < LINE => line.push(byte),
            _ => return None,
        }
    }
    std::str::from_utf8(&line).ok()?.strip_prefix("CONNECT ")?.parse().ok()
}

/// Hung up on, whoever dials knows that nobody listens. Answers whether bytes of a process were lost.
async fn dial(mut socket: UnixStream, mux: &Mux) -> bool {
    let asked = tokio::time::timeout(GREETING, asked(&mut socket)).await;
    let Ok(Some(port)) = asked else { return false };
    let Ok(Ok(stream)) = tokio::time::timeout(ACCEPT, mux.open(port)).await else { return false };
    let answer = format!("OK {}\n", stream.number());
    let told = socket.write_all(answer.as_bytes()).await.is_ok();
    told && join(socket, stream).await && port == port::STREAM
}

/// Streams of the guest.
async fn outwards(uds: &Path, mux: &Mux) {
    let places = Arc::new(Semaphore::new(OF_THE_GUEST));
    loop {
        let incoming = mux.next().await;
        // Dropped, it is refused.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let path = port_path(uds, incoming.port);
        tokio::spawn(async move {
            if let Ok(socket) = UnixStream::connect(path).await {
                join(socket, Incoming::accept(incoming)).await;
            }
            drop(place);
        });
    }
}

/// Passes bytes and ends on, both ways, until both have come to their end, or the reader of what
/// the guest sends has gone. Answers whether bytes were lost on the way.
async fn join(socket: UnixStream, stream: MuxStream) -> bool {
    let (stopped, lost) = (stream.stopped(), stream.lost());
    let (mut from_guest, mut to_guest) = split(stream);
    let (mut from_host, mut to_host) = socket.into_split();
    let inwards = async {
        tokio::select! {
            _ = copy(&mut from_host, &mut to_guest) => {}
            () = stopped => {
                // Whoever writes to it learns that nobody reads.
                let _ = shutdown(from_host.as_ref().as_raw_fd(), Shutdown::Read);
            }
        }
        let _ = to_guest.shutdown().await;
        io::Result::Ok(())
    };
    let outwards = async {
        copy(&mut from_guest, &mut to_host).await?;
        to_host.shutdown().await
    };
    // An error is the end of all of it.
    let _ = tokio::try_join!(inwards, outwards);
    lost()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::vsock;

    const SOON: Duration = Duration::from_secs(20);

    async fn soon<T>(work: impl Future<Output = T>) -> T {
        tokio::time::timeout(SOON, work).await.unwrap()
    }

    /// A relay with its guest, both in this process.
    async fn relay() -> (tempfile::TempDir, PathBuf, Mux, tokio::task::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v/s");
        vsock::prepare(&uds, None).unwrap();
        let listen = vsock::private(&uds, None).unwrap();
        let (port, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let arguments = Arguments { port: port.into(), listen, uds: uds.clone() };
        tokio::spawn(async move { run(arguments).await.unwrap() });
        let guest = Mux::guest();
        let running = guest.clone();
        let port = UnixStream::from_std(theirs).unwrap();
        let port = tokio::spawn(async move { drop(running.run(port).await) });
        soon(guest.sessions().wait_for(Option::is_some)).await.unwrap();
        (dir, uds, guest, port)
    }

    #[tokio::test]
    async fn both_sides_dial_each_other_and_ends_are_passed_on() {
        let (_dir, uds, guest, _port) = relay().await;
        let accept = async { guest.next().await.accept() };
        let (ours, mut theirs) =
            soon(async { tokio::join!(vsock::dial(&uds, 1025, SOON), accept) }).await;
        let mut ours = ours.unwrap();
        soon(ours.write_all(b"question")).await.unwrap();
        soon(ours.shutdown()).await.unwrap();
        let mut text = String::new();
        soon(theirs.read_to_string(&mut text)).await.unwrap();
        assert_eq!(text, "question");
        soon(theirs.write_all(b"answer")).await.unwrap();
        drop(theirs);
        text.clear();
        soon(ours.read_to_string(&mut text)).await.unwrap();
        assert_eq!(text, "answer");

        // READY, with and without somebody who listens.
        assert!(soon(guest.open(1023)).await.is_err());
        let listener = vsock::bind(&uds, 1023, None).unwrap();
        let (opened, accepted) =
            soon(async { tokio::join!(guest.open(1023), listener.accept()) }).await;
        let (mut opened, (mut accepted, _)) = (opened.unwrap(), accepted.unwrap());
        soon(opened.write_all(b"ready\n")).await.unwrap();
        let mut line = [0; 6];
        soon(accepted.read_exact(&mut line)).await.unwrap();
        assert_eq!(&line, b"ready\n");
    }

    #[tokio::test]
    async fn who_asks_for_nothing_or_for_nobody_is_hung_up_on_and_a_reader_that_goes_ends_the_writer()
     {
        let (_dir, uds, guest, port) = relay().await;
        for line in ["HELLO 1\n", "CONNECT x\n", "CONNECT 99999999999999999999999999999\n"] {
            let mut stream = UnixStream::connect(&uds).await.unwrap();
            stream.write_all(line.as_bytes()).await.unwrap();
            assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap_or(0), 0, "{line}");
        }
        let refuse = async { drop(guest.next().await) };
        let (refused, ()) = soon(async { tokio::join!(vsock::dial(&uds, 7, SOON), refuse) }).await;
        assert!(refused.is_err());
        let accept = async { guest.next().await.accept() };
        let (ours, mut theirs) =
            soon(async { tokio::join!(vsock::dial(&uds, 1025, SOON), accept) }).await;
        drop(ours.unwrap());
        let flood = async { while theirs.write_all(&[0; 4096]).await.is_ok() {} };
        soon(flood).await;
        let accept = async { guest.next().await.accept() };
        let (ours, theirs) =
            soon(async { tokio::join!(vsock::dial(&uds, 1025, SOON), accept) }).await;
        let mut ours = ours.unwrap();
        drop(theirs);
        soon(async { while ours.write_all(&[0; 4096]).await.is_ok() {} }).await;
        // The machine's end is that of what its guest says, and not of the relay.
        let accept = async { guest.next().await.accept() };
        let (ours, _theirs) =
            soon(async { tokio::join!(vsock::dial(&uds, 1025, SOON), accept) }).await;
        port.abort();
        let mut ours = ours.unwrap();
        assert_eq!(soon(ours.read(&mut [0; 1])).await.unwrap_or(0), 0);
        assert!(vsock::dial(&uds, 1025, SOON).await.is_err());
    }

    #[tokio::test]
    async fn a_port_that_loses_bytes_of_a_process_ends_the_relay_and_of_another_stream_that_alone()
    {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v/s");
        vsock::prepare(&uds, None).unwrap();
        let listen = vsock::private(&uds, None).unwrap();
        let (port, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let arguments = Arguments { port: port.into(), listen, uds: uds.clone() };
        let running = tokio::spawn(run(arguments));
        // What the guest writes is changed on its way when it is told so.
        let (ours, between) = tokio::io::duplex(1 << 16);
        let guest = Mux::guest();
        let speaking = guest.clone();
        tokio::spawn(async move { speaking.run(ours).await });
        let change = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let changes = change.clone();
        let (mut from_relay, mut to_relay) = UnixStream::from_std(theirs).unwrap().into_split();
        let (mut from_guest, mut to_guest) = split(between);
        tokio::spawn(async move { copy(&mut from_relay, &mut to_guest).await });
        tokio::spawn(async move {
            let mut bytes = vec![0; 1 << 16];
            while let Ok(n @ 1..) = from_guest.read(&mut bytes).await {
                if changes.swap(false, std::sync::atomic::Ordering::Relaxed) {
                    bytes[n / 2] ^= 0x55;
                }
                to_relay.write_all(&bytes[..n]).await.unwrap();
            }
        });
        soon(guest.sessions().wait_for(Option::is_some)).await.unwrap();
        for (port, ends) in [(port::CONTROL, false), (port::STREAM, true)] {
            let accept = async { guest.next().await.accept() };
            let (host, mut theirs) =
                soon(async { tokio::join!(vsock::dial(&uds, port, SOON), accept) }).await;
            let mut host = host.unwrap();
            theirs.write_all(b"whole").await.unwrap();
            soon(host.read_exact(&mut [0; 5])).await.unwrap();
            change.store(true, std::sync::atomic::Ordering::Relaxed);
            theirs.write_all(b"changed").await.unwrap();
            // It is missed when something follows it.
            while change.load(std::sync::atomic::Ordering::Relaxed) {
                tokio::task::yield_now().await;
            }
            theirs.write_all(b"more").await.unwrap();
            assert_eq!(soon(host.read(&mut [0; 1])).await.unwrap_or(0), 0);
            if !ends {
                assert!(!running.is_finished());
                continue;
            }
            drop(theirs);
        }
        let error = soon(running).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("lost bytes"), "{error}");
    }

    #[test]
    fn the_command_line_is_read_strictly() {
        let words = |line: &str| parse(line.split_whitespace().map(OsString::from)).is_some();
        for bad in [
            "",
            "--port 3",
            "--port 3 --listen 3 --uds /u",
            "--port 1 --listen 4 --uds /u",
            "--port 3 --listen 4 --uds",
            "--what 1 --port 3 --listen 4 --uds /u",
        ] {
            assert!(!words(bad), "{bad}");
        }
        let line = command_line("/p".into(), 3, 4, "/u".into()).join(" ");
        assert_eq!(line, "/p relay --port 3 --listen 4 --uds /u");
    }
}
