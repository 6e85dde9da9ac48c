//! The debug console: a program beside the containers of a pod, for an operator of the host.
//!
//! Off unless `guest.debug_console` says so at the boot of the machine: the agent of a guest whose kernel
//! was not told of it refuses. The guest has no programs but its agent, so that one of the host's is
//! copied into it for the session.
//!
//! ```text
//! kuasar-ctl ── admin: Debug ──▶ this ── Guest.Debug, PutFiles, stream `debug/<id>` ──▶ vmm-task
//!      └─────── unix socket, root's alone, one connection ──┴──── joined with the stream
//! ```
//!
//! A session ends with its program, its connection or its machine, and with this daemon: nothing of it
//! is durable.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::{DebugChange, DebugConsole, DebugProgram};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vmm_common::guest as wire;
use vmm_common::guest::{file_entry::Kind, steer_debug_request::What};
use vmm_common::handshake::StreamKind;
use vmm_common::{DEBUG_FILES, FILES_PATH};

use crate::copy::{CopyConfig, read};
use crate::errors::machine;
use crate::guest::{Guest, GuestError, random_hex, service};
use crate::images::GuestConfig;

/// Sessions of a pod at the same time: as many as its agent has.
pub(crate) const MAX: usize = 8;
/// How long the one who has asked may take to connect: it does so at once.
pub(crate) const CONNECT: Duration = Duration::from_secs(10);
/// Bytes of a program: it is in the guest's memory.
const MOST: u64 = 32 << 20;

/// Whose session it is, and where its socket is made.
pub(crate) struct Place<'a> {
    pub sandbox: &'a str,
    pub dir: &'a Path,
    /// How long it waits there.
    pub patience: Duration,
}

/// Said of a pod whose machine does not run.
pub(crate) fn not_running(sandbox: &str) -> Error {
    Error::FailedPrecondition(format!("pod {sandbox} is not running: it has no machine"))
}

/// Starts a program in the guest, and listens for who has asked for it.
pub(crate) async fn open(
    place: Place<'_>,
    guest: Arc<Guest>,
    slots: &Arc<Semaphore>,
    config: &GuestConfig,
    what: DebugProgram,
) -> Result<DebugConsole> {
    if !config.debug_console {
        return Err(Error::FailedPrecondition(
            "the debug console is off: set guest.debug_console = true in vmm-sandboxer's \
             configuration; pods that are started from then on have one"
                .into(),
        ));
    }
    let slot = slots.clone().try_acquire_owned().map_err(|_| {
        Error::ResourceExhausted(format!("the pod has {MAX} debug sessions already: end one"))
    })?;
    let id = random_hex(8).map_err(|error| Error::internal("name a debug session", error))?;
    let sandbox = place.sandbox.to_owned();
    let session = Session { sandbox, guest, id, _slot: slot };
    let (dir, patience, config) = (place.dir.to_owned(), place.patience, config.clone());
    // By itself: a request that is given up leaves nothing in the guest.
    let opened = tokio::spawn(async move {
        match session.begin(&dir, &config, what).await {
            Ok((stream, door)) => {
                let console = DebugConsole { session: session.id.clone(), path: door.path.clone() };
                // What is done there is nobody's request: this is all that tells of it.
                tracing::info!(sandbox = session.sandbox, session = session.id, "a debug session");
                tokio::spawn(session.serve(stream, door, patience));
                Ok(console)
            }
            Err(error) => {
                session.end().await;
                Err(error)
            }
        }
    });
    opened.await.map_err(|error| Error::internal("open a debug session", error))?
}

/// Changes a session.
pub(crate) async fn steer(guest: &Guest, session: &str, what: DebugChange) -> Result<()> {
    let what = match what {
        DebugChange::Size(width, height) => {
            What::Size(wire::Size { width, height, ..wire::Size::default() })
        }
        DebugChange::InputBytes(bytes) => What::InputBytes(bytes),
    };
    let question = wire::SteerDebugRequest {
        id: session.into(),
        what: Some(what),
        ..wire::SteerDebugRequest::default()
    };
    let _: wire::SteerDebugResponse = guest.call(service::GUEST, "SteerDebug", &question).await?;
    Ok(())
}

/// A session, from its name on. It has to be ended.
struct Session {
    sandbox: String,
    guest: Arc<Guest>,
    id: String,
    _slot: OwnedSemaphorePermit,
}

/// The socket of a session; it is removed when this is dropped.
struct Door {
    path: PathBuf,
    listener: UnixListener,
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Door {
    /// In a directory of root's; its name is short, as names of sockets have to be.
    fn open(dir: &Path) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let path = dir.join(format!("d{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let failed = |error| Error::internal("listen for the debug session", error);
        let socket = crate::vmm::vsock::private(&path, None).map_err(machine)?;
        let listener = std::os::unix::net::UnixListener::from(socket);
        Ok(Self { listener: UnixListener::from_std(listener).map_err(failed)?, path })
    }
}

impl Session {
    async fn begin(
        &self,
        dir: &Path,
        config: &GuestConfig,
        what: DebugProgram,
    ) -> Result<(UnixStream, Door)> {
        let container = format!("{DEBUG_FILES}{}", self.id);
        let name = config.debug_program.file_name().unwrap_or_default().to_string_lossy();
        let args = if what.args.is_empty() { &config.debug_args } else { &what.args };
        let program = format!("{FILES_PATH}/{container}/m0/{name}");
        let (width, height) = what.terminal.unwrap_or_default();
        let question = wire::DebugRequest {
            id: self.id.clone(),
            argv: [program].into_iter().chain(args.iter().cloned()).collect(),
            terminal: what.terminal.is_some(),
            width,
            height,
            ..wire::DebugRequest::default()
        };
        // First: a guest that has none is sent no program.
        let asked: std::result::Result<wire::DebugResponse, _> =
            self.guest.call(service::GUEST, "Debug", &question).await;
        asked.map_err(refused)?;
        let config = config.clone();
        for message in blocking(move || program_of(&config, &container)).await? {
            let _: wire::PutFilesResponse =
                self.guest.call(service::GUEST, "PutFiles", &message).await?;
        }
        let stream = self.guest.stream(&self.id, "", StreamKind::Debug).await?;
        let stream = std::os::unix::net::UnixStream::from(stream);
        let stream = UnixStream::from_std(stream)
            .map_err(|error| Error::internal("use the debug session's stream", error))?;
        Ok((stream, Door::open(dir)?))
    }

    /// Joins the one connection with the stream.
    async fn serve(self, stream: UnixStream, door: Door, patience: Duration) {
        let came = tokio::select! {
            () = self.guest.gone() => None,
            came = tokio::time::timeout(patience, door.listener.accept()) => came.ok(),
        };
        drop(door);
        match came {
            Some(Ok((client, _))) => {
                tokio::select! {
                    () = self.guest.gone() => {}
                    () = join(client, stream) => {}
                }
            }
            _ => {
                tracing::info!(sandbox = self.sandbox, session = self.id, "nobody has come for it")
            }
        }
        self.end().await;
    }

    /// Ends it in the guest, in whatever state it is there.
    async fn end(self) {
        let question = wire::EndDebugRequest { id: self.id.clone(), ..Default::default() };
        let ended: std::result::Result<wire::EndDebugResponse, _> =
            self.guest.call_again(service::GUEST, "EndDebug", &question).await;
        match ended {
            // Neither guests that have gone nor those that know nothing of it have anything left.
            Ok(_) | Err(GuestError::Gone) => {}
            Err(GuestError::Refused { code: ttrpc::Code::UNIMPLEMENTED, .. }) => {}
            Err(error) => tracing::warn!(sandbox = self.sandbox, session = self.id, %error,
                "a debug session is not ended in its guest"),
        }
    }
}

fn refused(error: GuestError) -> Error {
    match error {
        GuestError::Refused { code: ttrpc::Code::UNIMPLEMENTED, .. } => Error::FailedPrecondition(
            "the guest's agent has no debug console: use the guest image that came with this \
             daemon, and start the pod anew"
                .into(),
        ),
        other => other.into(),
    }
}

/// Until one of both has ended: the end of either is the session's.
async fn join(client: UnixStream, stream: UnixStream) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_guest, mut to_guest) = stream.into_split();
    let inwards = tokio::io::copy(&mut from_client, &mut to_guest);
    let outwards = async {
        let _ = tokio::io::copy(&mut from_guest, &mut to_client).await;
        let _ = to_client.shutdown().await;
    };
    tokio::select! {
        _ = inwards => {}
        () = outwards => {}
    }
}

/// The program in messages to a guest, below a directory where its other names are, too.
fn program_of(config: &GuestConfig, container: &str) -> Result<Vec<wire::PutFilesRequest>> {
    let path = &config.debug_program;
    let wrong = |what: &str| {
        Error::FailedPrecondition(format!("guest.debug_program: {} {what}", path.display()))
    };
    let advice = "install a static busybox, or set guest.debug_program to one";
    let unreadable =
        |error: &dyn std::fmt::Display| wrong(&format!("cannot be read ({error}): {advice}"));
    let file = File::open(path).map_err(|error| unreadable(&error))?;
    let meta = file.metadata().map_err(|error| unreadable(&error))?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return Err(wrong(&format!("is no program: {advice}")));
    }
    let limits = CopyConfig { max_bytes: MOST, max_files: 1, ..CopyConfig::default() };
    let mut entries = match read::read(&OwnedFd::from(file), &limits) {
        Ok(entries) => entries,
        Err(read::Error::TooLarge(_)) => {
            return Err(wrong(&format!("has more than {MOST} bytes: {advice}")));
        }
        Err(error) => return Err(wrong(&format!("{error}: {advice}"))),
    };
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    for entry in &mut entries {
        if wants_loader(&entry.data) {
            return Err(wrong(&format!(
                "is not static, and its libraries are not there: {advice}"
            )));
        }
        entry.path = name.to_vec();
        (entry.mode, entry.uid, entry.gid) = (0o755, 0, 0);
        entry.attributes.clear();
    }
    let root =
        |kind: Kind| wire::FileEntry { kind: kind.into(), mode: 0o755, ..Default::default() };
    entries.insert(0, root(Kind::DIRECTORY));
    let links = config.debug_links.iter().filter(|link| link.as_bytes() != name);
    entries.extend(links.map(|link| wire::FileEntry {
        path: link.clone().into_bytes(),
        data: name.to_vec(),
        ..root(Kind::SYMLINK)
    }));
    Ok(read::messages(container, 0, entries))
}

/// Whether an ELF program names a loader, which the guest does not have. A script names one as well.
fn wants_loader(program: &[u8]) -> bool {
    use object::Endianness;
    use object::elf::{FileHeader64, PT_INTERP};
    use object::read::elf::{FileHeader, ProgramHeader};
    if program.starts_with(b"#!") {
        return true;
    }
    let Ok(file) = FileHeader64::<Endianness>::parse(program) else { return false };
    let Ok(endian) = file.endian() else { return false };
    let Ok(headers) = file.program_headers(endian, program) else { return false };
    headers.iter().any(|header| header.p_type(endian) == PT_INTERP)
}

#[cfg(test)]
#[path = "debug_tests.rs"]
mod tests;
