//! The processes beside a VMM: virtiofsd, one for each share, `vhost-device-vsock` where a host's
//! kernel has no vhost-vsock, and the relay of a serial channel ([`crate::relay`]).
//!
//! The first two speak vhost-user over a unix socket that we connect ourselves and hand to the VMM as a
//! descriptor: the VMM needs no way to any socket's path, and nothing waits by polling.
//!
//! virtiofsd's own protection is never off (CVE-2026-47243 came from switching it off): seccomp
//! `kill`, and a sandbox: `namespace` when it runs bare; `chroot` inside our jail, which has made
//! mount, PID and network namespaces around it already, so that it needs no `CAP_SYS_ADMIN`.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::error::{Doing, Error, Result};
use super::process::{Fds, Launcher, Process, Program, text};
use super::spec::{Share, VmSpec, check_socket};
use super::started::Started;
use crate::jail::{Role, View};

/// How the helpers are run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HelpersConfig {
    /// virtiofsd: absolute path, or a name in `PATH`.
    pub virtiofsd: PathBuf,
    /// virtiofsd's caching by the guest.
    pub cache: Cache,
    /// The same of containers' root file systems. Where it is another one, they have a virtiofsd of their
    /// own: with what is right for volumes, which the host changes, a guest forgets a file's pages
    /// whenever the file is opened, and reads a program anew each time that it is executed.
    pub root_cache: Cache,
    /// Threads of virtiofsd beside its main one; 0 is none.
    pub threads: u32,
    /// Extended attributes on shares.
    pub xattr: bool,
    /// `vhost-device-vsock`: absolute path, or a name in `PATH`.
    pub vsock: PathBuf,
    /// How long a helper may take until it serves, in milliseconds.
    pub timeout_ms: u64,
    /// This program, which is the relay of a serial channel. Set by the daemon, not by the file.
    #[serde(skip)]
    pub own: PathBuf,
}

impl Default for HelpersConfig {
    fn default() -> Self {
        Self {
            virtiofsd: "virtiofsd".into(),
            cache: Cache::Auto,
            root_cache: Cache::Always,
            threads: 1,
            xattr: true,
            vsock: "vhost-device-vsock".into(),
            timeout_ms: 5000,
            own: PathBuf::new(),
        }
    }
}

/// What a guest may cache of a share, see virtiofsd(1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Nothing.
    Never,
    /// Metadata.
    Metadata,
    /// Metadata for a second, and a file's pages until it is opened again.
    #[default]
    Auto,
    /// Both, as if nobody else wrote.
    Always,
}

impl Cache {
    fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Metadata => "metadata",
            Self::Auto => "auto",
            Self::Always => "always",
        }
    }
}

/// A helper that serves, and our end of its vhost-user socket, for the VMM.
#[derive(Debug)]
pub struct Helper {
    /// The process.
    pub process: Process,
    /// The connection.
    pub socket: OwnedFd,
}

/// virtiofsd's command line; `fd` is its listening socket.
fn virtiofsd_argv(
    config: &HelpersConfig,
    share: &Share,
    fd: i32,
    jailed: bool,
) -> Result<Vec<String>> {
    let mut argv = vec![
        text(&config.virtiofsd)?,
        format!("--fd={fd}"),
        format!("--shared-dir={}", text(&share.dir)?),
        format!("--sandbox={}", if jailed { "chroot" } else { "namespace" }),
        "--seccomp=kill".into(),
        format!("--cache={}", share.cache.as_str()),
        format!("--thread-pool-size={}", config.threads),
        // File handles need CAP_DAC_READ_SEARCH, which opens every file of the file system.
        "--inode-file-handles=never".into(),
        // Mounts below the share are file systems of their own in the guest too: their inode
        // numbers collide otherwise.
        "--announce-submounts".into(),
        // The limit is set already, and may not be raised.
        "--rlimit-nofile=0".into(),
        "--log-level=warn".into(),
    ];
    if config.xattr {
        argv.push("--xattr".into());
    }
    if share.read_only {
        argv.push("--readonly".into());
    }
    Ok(argv)
}

/// Starts a virtiofsd for a share.
///
/// # Errors
/// [`Error::NoProgram`], [`Error::Ended`], [`Error::Io`].
pub async fn virtiofsd(
    config: &HelpersConfig,
    launcher: &Launcher,
    spec: &VmSpec,
    share: &Share,
) -> Result<Helper> {
    let path = spec.dir.join(format!("fs-{}.sock", share.tag));
    check_socket(&path, 0)?;
    let listener = super::vsock::private(&path, None)?;
    let socket = UnixStream::connect(&path).doing(|| format!("connect {}", path.display()));
    // Both ends are ours now: nobody else shall find the path.
    std::fs::remove_file(&path).doing(|| format!("remove {}", path.display()))?;
    let process = run_virtiofsd(config, launcher, spec, share, listener).await?;
    Ok(Helper { process, socket: socket?.into() })
}

async fn run_virtiofsd(
    config: &HelpersConfig,
    launcher: &Launcher,
    spec: &VmSpec,
    share: &Share,
    listener: OwnedFd,
) -> Result<Process> {
    // It accepts with a blocking descriptor.
    nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))
        .doing(|| "configure a socket")?;
    let mut fds = Fds::default();
    let fd = fds.push(listener);
    let argv = virtiofsd_argv(config, share, fd, launcher.owner().is_some())?;
    let mut view = View::new(Role::FileServer);
    view.shared_tree = Some(share.dir.clone());
    let program = Program {
        name: format!("virtiofsd of {}", share.tag),
        argv,
        stdout: None,
        fds: &fds,
        view,
        netns: None,
        cgroups: &spec.cgroups,
    };
    launcher.run(program).await
}

/// The same for each share of a VMM that connects by path: virtiofsd listens in `dir`, which the
/// VMM's user may reach and nobody else. It serves the first who comes. Answers the sockets; the
/// processes go to `started`.
///
/// # Errors
/// As [`virtiofsd`].
pub(super) async fn virtiofsds_in(
    config: &HelpersConfig,
    launcher: &Launcher,
    spec: &VmSpec,
    dir: &Path,
    started: &mut Started,
) -> Result<Vec<PathBuf>> {
    let mut sockets = Vec::new();
    for share in &spec.shares {
        let socket = dir.join(format!("fs-{}.sock", share.tag));
        check_socket(&socket, 0)?;
        let listener = super::vsock::private(&socket, launcher.owner())?;
        let process = run_virtiofsd(config, launcher, spec, share, listener).await?;
        started.processes.push(process);
        sockets.push(socket);
    }
    Ok(sockets)
}

/// `vhost-device-vsock`'s command line.
fn vsock_argv(config: &HelpersConfig, cid: u32, socket: &Path, uds: &Path) -> Result<Vec<String>> {
    Ok(vec![
        text(&config.vsock)?,
        format!("--guest-cid={cid}"),
        format!("--socket={}", text(socket)?),
        format!("--uds-path={}", text(uds)?),
    ])
}

/// Starts a `vhost-device-vsock` for a machine. It does not end with the VMM: whoever stops the
/// machine stops it.
///
/// # Errors
/// As [`virtiofsd`]; [`Error::Deadline`].
pub async fn vsock(
    config: &HelpersConfig,
    launcher: &Launcher,
    spec: &VmSpec,
    cid: u32,
    uds: &Path,
) -> Result<Helper> {
    let mut socket = uds.as_os_str().to_owned();
    socket.push(".vhost");
    let socket = PathBuf::from(socket);
    check_socket(&socket, 0)?;
    for stale in [&socket, uds] {
        if let Err(error) = std::fs::remove_file(stale)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).doing(|| format!("remove {}", stale.display()));
        }
    }
    let dir = uds.parent().filter(|dir| dir.is_absolute()).ok_or_else(|| {
        Error::Invalid(format!("{} is no absolute path of a socket", uds.display()))
    })?;
    super::vsock::prepare(uds, launcher.owner())?;
    let watch = Watch::new(dir)?;
    let mut view = View::new(Role::VsockDevice);
    view.writable.push(dir.into());
    let program = Program {
        name: "vhost-device-vsock".into(),
        argv: vsock_argv(config, cid, &socket, uds)?,
        stdout: None,
        fds: &Fds::default(),
        view,
        netns: None,
        cgroups: &spec.cgroups,
    };
    let process = launcher.run(program).await?;
    let limit = Duration::from_millis(config.timeout_ms);
    let connected = tokio::select! {
        biased;
        exit = process.wait() => Err(process.ended(exit?)),
        connected = tokio::time::timeout(limit, watch.connect(&socket)) => match connected {
            Ok(connected) => connected,
            Err(_) => Err(Error::Deadline { what: "vhost-device-vsock to serve".into(), limit }),
        },
    };
    match connected {
        Ok(stream) => {
            // Ours is the only connection that it ever gets.
            let _ = std::fs::remove_file(&socket);
            Ok(Helper { process, socket: stream.into() })
        }
        Err(error) => {
            let _ = process.kill().await;
            process.acknowledge().await;
            Err(error)
        }
    }
}

/// Starts the relay of a serial channel, whose end of the port is `port`. It serves as soon as it
/// runs: its socket is there before. It does not end with the VMM.
///
/// # Errors
/// As [`virtiofsd`].
pub async fn relay(
    config: &HelpersConfig,
    launcher: &Launcher,
    spec: &VmSpec,
    port: UnixStream,
    uds: &Path,
) -> Result<Process> {
    check_socket(uds, 6)?;
    super::vsock::prepare(uds, launcher.owner())?;
    let mut fds = Fds::default();
    let port = fds.push(OwnedFd::from(port));
    let listen = fds.push(super::vsock::private(uds, launcher.owner())?);
    let mut view = View::new(Role::VsockDevice);
    view.writable.extend(uds.parent().map(Path::to_owned));
    let program = Program {
        name: "the serial channel's relay".into(),
        argv: crate::relay::command_line(text(&config.own)?, port, listen, text(uds)?),
        stdout: None,
        fds: &fds,
        view,
        netns: None,
        cgroups: &spec.cgroups,
    };
    launcher.run(program).await
}

/// Waits for a socket to be made in a directory.
pub(super) struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .doing(|| "watch a directory")?;
        inotify
            .add_watch(dir, AddWatchFlags::IN_CREATE)
            .doing(|| format!("watch {}", dir.display()))?;
        // SAFETY: an OwnedFd always answers the same descriptor and closes it only when dropped.
        let fd = unsafe { AsyncFd::register(OwnedFd::from(inotify)) };
        fd.map(Self).map_err(std::io::Error::from).doing(|| "watch a directory")
    }

    pub(super) async fn connect(&self, socket: &Path) -> Result<UnixStream> {
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                // Made, but listen(2) comes a moment later and nothing tells of it.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(Duration::from_micros(500)).await;
                    continue;
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).doing(|| format!("connect {}", socket.display())),
            }
            let mut ready = self.0.readable().await.doing(|| "watch a directory")?;
            // What happened is of no interest: the next look tells.
            let mut events = [0; 4096];
            while nix::unistd::read(self.0.get_ref(), &mut events).is_ok_and(|n| n > 0) {}
            ready.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec::ShareKind;
    use super::*;

    #[test]
    fn virtiofsd_is_never_without_sandbox_and_seccomp() {
        for read_only in [false, true] {
            for jailed in [false, true] {
                let share = Share {
                    tag: "kuasar".into(),
                    dir: "/run/k/share".into(),
                    kind: ShareKind::Virtiofs,
                    read_only,
                    cache: Cache::Always,
                };
                let config = HelpersConfig::default();
                let argv = virtiofsd_argv(&config, &share, 3, jailed).unwrap();
                let sandbox = if jailed { "--sandbox=chroot" } else { "--sandbox=namespace" };
                assert_eq!(argv.iter().filter(|a| a.starts_with("--sandbox")).count(), 1);
                assert!(argv.iter().any(|a| a == sandbox));
                assert_eq!(argv.iter().filter(|a| a.starts_with("--seccomp")).count(), 1);
                assert!(argv.iter().any(|a| a == "--seccomp=kill"));
                assert!(argv.iter().any(|a| a == "--shared-dir=/run/k/share"));
                assert!(argv.iter().any(|a| a == "--cache=always"));
                assert!(argv.iter().any(|a| a == "--inode-file-handles=never"));
                assert_eq!(read_only, argv.iter().any(|a| a == "--readonly"));
            }
        }
    }

    #[test]
    fn the_vsock_helper_gets_its_own_sockets_and_no_other_guest() {
        let argv = vsock_argv(
            &HelpersConfig::default(),
            7,
            Path::new("/run/k/v/s.vhost"),
            Path::new("/run/k/v/s"),
        )
        .unwrap();
        assert_eq!(
            argv[1..],
            ["--guest-cid=7", "--socket=/run/k/v/s.vhost", "--uds-path=/run/k/v/s"]
        );
    }
}
