//! How pods' agents are reached: what their machines get for it, where their READY arrives, and how
//! their ports are dialled.
//!
//! | [`Way`] | the machine has | its ports are dialled at | READY arrives at |
//! |---|---|---|---|
//! | `hybrid` | vsock by `vhost-device-vsock`, or the VMM's own | the unix socket `<dir>/v/s` | `<dir>/v/s_1023` |
//! | `serial`, `console` | a virtio-serial port | the same socket, of the relay ([`crate::relay`]) | the same |
//! | `vsock` | vsock of the host's kernel | its context id | a port of the host for this machine alone |
//!
//! With the kernel's vsock all guests of a host dial the same host. So each is told a port of its own on
//! its command line (`kuasar.ready=`), and whoever comes there from another context id is
//! hung up on. The port is no secret; what the guest is told there is one.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername,
    getsockname, getsockopt, listen as listen_at, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use vmm_common::port;

use crate::errors::machine;
use crate::guest::Dial;
use crate::vmm::{self, Channel, Feature, VmSpec, Vmm, Way};

/// Context id of guests whose vsock is their own unix sockets: it tells nobody apart.
const CID: u32 = 3;
/// `VMADDR_CID_ANY` and `VMADDR_PORT_ANY` of `linux/vm_sockets.h`.
const ANY: u32 = u32::MAX;

/// The unix socket of a machine's vsock.
pub(crate) fn uds(dir: &Path) -> PathBuf {
    dir.join("v").join("s")
}

/// Whether agents of this VMM's machines can be reached the way that is configured.
pub(crate) fn serves(driver: &dyn Vmm) -> Result<()> {
    let needed = match driver.way() {
        Way::Hybrid => Feature::HybridVsock,
        Way::Serial | Way::Console => Feature::Serial,
        Way::Vsock => return vmm::vhost_vsock(&driver.name()).map_err(machine),
    };
    match driver.features().has(needed) {
        true => Ok(()),
        false => Err(machine(driver.cannot(needed))),
    }
}

/// A machine with its channel: what is looked for by no other way than that need not be waited for.
/// Templates are made by the serial port and copied with vsock, and look for both.
pub(crate) fn give(driver: &dyn Vmm, spec: VmSpec) -> VmSpec {
    let mut spec = VmSpec { channel: of(driver, &spec.dir), ..spec };
    let only = match driver.way() {
        Way::Hybrid => None,
        Way::Serial | Way::Console => Some("kuasar.channel=serial"),
        Way::Vsock => Some("kuasar.channel=vsock"),
    };
    spec.boot.params.extend(only.map(str::to_owned));
    spec
}

/// What a machine in `dir` gets.
fn of(driver: &dyn Vmm, dir: &Path) -> Channel {
    let serial = |console| {
        let socket = dir.join("serial.sock");
        Channel::Serial { socket, console, uds: Some(uds(dir)) }
    };
    match driver.way() {
        Way::Hybrid => Channel::HybridVsock { cid: CID, uds: uds(dir) },
        Way::Serial => serial(false),
        Way::Console => serial(true),
        Way::Vsock => Channel::KernelVsock { cid: 0 },
    }
}

/// Where a machine's ports are dialled; `dir` is its directory, for one that is not there any more.
pub(crate) fn dial(channel: Option<&Channel>, dir: &Path) -> Arc<dyn Dial> {
    match channel {
        Some(Channel::KernelVsock { cid }) => Arc::new(Kernel(*cid)),
        _ => Arc::new(Hybrid(uds(dir))),
    }
}

/// A port of a machine, as an engine dials it.
pub(crate) fn endpoint(channel: Option<&Channel>, dir: &Path, port: u32) -> String {
    match channel {
        Some(Channel::KernelVsock { cid }) => format!("ttrpc+vsock://{cid}:{port}"),
        _ => format!("ttrpc+hvsock://{}:{port}", uds(dir).display()),
    }
}

/// Dials a guest through its unix socket.
#[derive(Debug)]
struct Hybrid(PathBuf);

#[async_trait]
impl Dial for Hybrid {
    async fn dial(&self, port: u32, limit: Duration) -> io::Result<UnixStream> {
        vmm::vsock::dial(&self.0, port, limit).await.map_err(io::Error::other)
    }
}

/// Dials a guest by its context id.
#[derive(Debug)]
struct Kernel(u32);

#[async_trait]
impl Dial for Kernel {
    async fn dial(&self, port: u32, limit: Duration) -> io::Result<UnixStream> {
        let dialled = tokio::time::timeout(limit, self.connect(port));
        dialled.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Kernel {
    async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let fd = stream_socket()?;
        match connect(fd.as_raw_fd(), &VsockAddr::new(self.0, port)) {
            Ok(()) => return stream(fd),
            Err(Errno::EINPROGRESS | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let fd = registered(fd)?;
        drop(fd.writable().await?);
        match getsockopt(fd.get_ref(), sockopt::SocketError)? {
            0 => stream(fd.into_inner()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn stream_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Vsock, SockType::Stream, flags, None)
}

fn registered(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// A stream of whichever family: what is done with it (read, write, shut down, poll, splice) is the
/// same for all of them, and nobody asks it for addresses.
fn stream(fd: OwnedFd) -> io::Result<UnixStream> {
    UnixStream::from_std(std::os::unix::net::UnixStream::from(fd))
}

/// Where a machine's agent says READY.
#[derive(Debug)]
pub struct Listener(At);

#[derive(Debug)]
enum At {
    Unix(UnixListener),
    Kernel {
        socket: AsyncFd<OwnedFd>,
        /// Who may come; 0 is nobody yet.
        cid: AtomicU32,
    },
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self(At::Unix(listener))
    }
}

impl Listener {
    /// The machine has started, and this is its channel.
    pub(crate) fn is_of(&self, channel: &Channel) {
        if let (At::Kernel { cid, .. }, Channel::KernelVsock { cid: own }) = (&self.0, channel) {
            cid.store(*own, Ordering::Relaxed);
        }
    }

    /// The agent's next connection.
    ///
    /// # Errors
    /// When none can be accepted.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        match &self.0 {
            At::Unix(listener) => Ok(listener.accept().await?.0),
            At::Kernel { socket, cid } => loop {
                let mut ready = socket.readable().await?;
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let accepted = ready.try_io(|socket| Ok(accept4(socket.as_raw_fd(), flags)?));
                let Ok(accepted) = accepted else { continue };
                // SAFETY: accept4 has just made it, and nobody else knows of it.
                let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(accepted?) };
                let peer: VsockAddr = getpeername(fd.as_raw_fd())?;
                if peer.cid() == cid.load(Ordering::Relaxed) {
                    return stream(fd);
                }
                tracing::warn!(cid = peer.cid(), "READY of another machine: hung up on");
            },
        }
    }
}

/// Listens for the READY of the machine that `spec` describes; what it is started with says where.
/// `owner`: who has to be able to connect to a unix socket.
pub(crate) fn listen(
    spec: &VmSpec,
    owner: Option<(u32, u32)>,
) -> Result<(Listener, Cow<'_, VmSpec>)> {
    if let Some(uds) = spec.channel.uds() {
        let listener = vmm::vsock::bind(uds, port::READY, owner).map_err(machine)?;
        return Ok((listener.into(), Cow::Borrowed(spec)));
    }
    let (listener, port) = listen_on_vsock()
        .map_err(|error| Error::internal("listen on the kernel's vsock", error))?;
    let mut spec = spec.clone();
    spec.boot.params.push(format!("kuasar.ready={port}"));
    Ok((listener, Cow::Owned(spec)))
}

/// A port that the kernel chooses.
fn listen_on_vsock() -> io::Result<(Listener, u32)> {
    let fd = stream_socket()?;
    bind(fd.as_raw_fd(), &VsockAddr::new(ANY, ANY))?;
    listen_at(&fd.as_fd(), Backlog::new(16)?)?;
    let port = getsockname::<VsockAddr>(fd.as_raw_fd())?.port();
    Ok((Listener(At::Kernel { socket: registered(fd)?, cid: AtomicU32::new(0) }), port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Launcher;
    use crate::vmm::helpers::HelpersConfig;
    use crate::vmm::process::Local;
    use crate::vmm::qemu::{self, Machine, Qemu, QemuConfig};
    use crate::vmm::stratovirt::{Chosen, StratoVirt, StratoVirtConfig};

    fn launcher() -> Launcher {
        Launcher::new(Arc::new(Local::new().unwrap()), None)
    }

    fn qemu(channel: qemu::Chosen) -> Qemu {
        Qemu::new(QemuConfig { channel, ..QemuConfig::default() }, Default::default(), launcher())
    }

    fn stratovirt(channel: Chosen) -> StratoVirt {
        let config = StratoVirtConfig { channel, ..StratoVirtConfig::default() };
        StratoVirt::new(config, Default::default(), launcher())
    }

    #[tokio::test]
    async fn each_way_is_a_channel_and_an_endpoint() {
        let dir = Path::new("/run/k/vm/a");
        let hybrid = of(&qemu(qemu::Chosen::Hybrid), dir);
        assert_eq!(hybrid, Channel::HybridVsock { cid: 3, uds: "/run/k/vm/a/v/s".into() });
        for (way, is_console) in [(qemu::Chosen::Serial, false), (qemu::Chosen::Console, true)] {
            let serial = of(&qemu(way), dir);
            assert!(matches!(&serial, Channel::Serial { console, .. } if *console == is_console));
            assert_eq!(serial.uds(), hybrid.uds());
            serves(&qemu(way)).unwrap();
            assert_eq!(endpoint(Some(&serial), dir, 1026), "ttrpc+hvsock:///run/k/vm/a/v/s:1026");
        }
        assert_eq!(of(&qemu(qemu::Chosen::Vsock), dir), Channel::KernelVsock { cid: 0 });
        let kernel = Channel::KernelVsock { cid: 70_001 };
        assert_eq!(endpoint(Some(&kernel), dir, 1026), "ttrpc+vsock://70001:1026");
        assert!(format!("{:?}", dial(Some(&kernel), dir)).contains("70001"));
        assert!(format!("{:?}", dial(None, dir)).contains("/run/k/vm/a/v/s"));
    }

    #[tokio::test]
    async fn copies_have_the_port_of_their_template_and_so_has_who_has_no_helper_for_vsock() {
        let way = |machine, copied, vsock: &str, channel| {
            let config = QemuConfig { machine, copied, channel, ..QemuConfig::default() };
            let helpers = HelpersConfig { vsock: vsock.into(), ..HelpersConfig::default() };
            Qemu::new(config, helpers, launcher()).way()
        };
        use Machine::{Microvm, Q35};
        use qemu::Chosen::{Auto, Hybrid, Serial};
        let (there, nowhere) = ("/proc/self/exe", "/nowhere/vhost-device-vsock");
        for (machine, copied, vsock, chosen, wanted) in [
            (Q35, true, there, Auto, Way::Serial),
            (Q35, false, there, Auto, Way::Hybrid),
            // It has no templates.
            (Microvm, true, there, Auto, Way::Hybrid),
            (Microvm, false, nowhere, Auto, Way::Serial),
            // What was chosen is not looked into.
            (Q35, true, nowhere, Hybrid, Way::Hybrid),
            (Microvm, false, there, Serial, Way::Serial),
        ] {
            let is = way(machine, copied, vsock, chosen);
            assert_eq!(is, wanted, "{machine:?} {copied} {vsock} {chosen:?}");
        }
    }

    #[tokio::test]
    async fn without_the_kernels_vsock_stratovirt_has_its_console_and_who_wants_it_is_told_what_to_do()
     {
        if vmm::vhost_vsock("x").is_ok() {
            assert_eq!(stratovirt(Chosen::Auto).way(), Way::Vsock);
            return;
        }
        assert_eq!(stratovirt(Chosen::Auto).way(), Way::Console);
        serves(&stratovirt(Chosen::Auto)).unwrap();
        for driver in [&qemu(qemu::Chosen::Vsock) as &dyn Vmm, &stratovirt(Chosen::Vsock)] {
            let error = serves(driver).unwrap_err().to_string();
            assert!(
                error.contains("load the module vhost_vsock, or set another channel"),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_machine_of_the_kernels_vsock_is_told_its_own_port_of_the_host() {
        let mut spec = crate::vmm::spec::tests::spec();
        spec.channel = Channel::KernelVsock { cid: 0 };
        let made = listen(&spec, None);
        let Ok((one, told)) = made else {
            eprintln!("skipped: this kernel has no vsock: {}", made.unwrap_err());
            return;
        };
        let (_other, second) = listen(&spec, None).unwrap();
        let port = |spec: &VmSpec| spec.boot.params.last().unwrap().clone();
        assert!(port(&told).starts_with("kuasar.ready="));
        assert_ne!(port(&told), port(&second));
        one.is_of(&Channel::KernelVsock { cid: 9 });
        let At::Kernel { cid, .. } = &one.0 else { panic!() };
        assert_eq!(cid.load(Ordering::Relaxed), 9);
        // Nobody has this id.
        let error = Kernel(0x7fff_fff0).dial(1024, Duration::from_secs(5)).await.unwrap_err();
        println!("{error}");
    }
}
