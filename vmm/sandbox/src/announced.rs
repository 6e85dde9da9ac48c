//! Containers of engines that call the guest themselves (`task_endpoint = "guest"`).
//!
//! Such an engine announces, in the Controller's Update, what it is about to make, and then dials
//! `vmm-task`. So the daemon prepares in Update what it otherwise prepares in Task.Create and
//! Task.Exec: root file system, volumes, disks, the spec in the guest's terms, streams. It declares
//! that to the guest, and undoes it when it is announced no longer.
//!
//! The engine's FIFOs are joined with the guest's streams before there is a process. Output is as
//! everywhere else: both ends are kept by sandbox-parent, and the next daemon goes on. Input is not
//! held open: such an engine calls no CloseIO, and closes its FIFO instead. Until it has opened it
//! nothing is read from it.
//!
//! What is prepared is known by the list in the pod's record; what is there besides is of an Update
//! that a daemon did not live to answer, and is undone.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_task::declared::Declared;
use containerd_task::error::{Error, Result};
use containerd_task::journal::Stdio;
use containerd_task::runtime::{CreateContainer, Runtime};
use containerd_task::stdio::{self as engine, Io, Streams};
use kuasar_forward::stdio::{self, Direction, Stream};
use kuasar_host::record;
use protobuf::MessageField;
use serde_json::{Map, Value};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use vmm_common::guest as wire;
use vmm_common::handshake::StreamKind;

use crate::guest::{GuestError, service};
use crate::runtime::{Containers, ends};
use crate::spec;

/// Between two attempts to ask a guest that is not reached.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a stream may still move bytes whose process has never been.
const LEFT: Duration = Duration::from_millis(50);

/// Container, and exec (empty: the container's own process).
type Name = (String, String);

/// What is prepared in one pod.
pub(crate) struct Announced {
    containers: Arc<Containers>,
    /// Nobody connects to these: the streams' other ends are FIFOs.
    streams: Arc<Streams>,
    /// Who sees a process to its end.
    followed: Mutex<BTreeMap<Name, JoinHandle<()>>>,
}

/// What an exec or container has of the engine, and of the guest.
#[derive(Default)]
struct Joined {
    io: Io,
    outputs: Vec<Stream>,
    input: Option<JoinHandle<()>>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        // One that nobody has written to yet.
        self.input.iter().for_each(JoinHandle::abort);
    }
}

/// Name of the engine's ends with sandbox-parent, as the Task server has it.
fn io_name((container, exec): &Name) -> String {
    format!("io/{container}/{exec}/")
}

fn check((container, exec): &Name) -> Result<()> {
    let invalid = |error: kuasar_host::Error| Error::InvalidArgument(error.to_string());
    kuasar_host::id::check("container", container).map_err(invalid)?;
    if !exec.is_empty() {
        kuasar_host::id::check("exec", exec).map_err(invalid)?;
    }
    Ok(())
}

impl Announced {
    /// Nothing is prepared yet.
    pub fn new(containers: Arc<Containers>) -> Arc<Self> {
        let streams = Arc::default();
        Arc::new(Self { containers, streams, followed: Mutex::default() })
    }

    fn followed(&self) -> MutexGuard<'_, BTreeMap<Name, JoinHandle<()>>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares what is new in the list, and undoes what is not in it any more.
    ///
    /// # Errors
    /// Why the first of the new ones cannot be prepared: nothing is left of it.
    pub async fn settle(self: &Arc<Self>, list: &Declared) -> Result<()> {
        let wanted = list.names();
        wanted.iter().try_for_each(check)?;
        let have: BTreeSet<Name> = self.followed().keys().cloned().collect();
        // Execs before their containers.
        for name in have.iter().rev().filter(|name| !wanted.contains(*name)) {
            if let Err(error) = self.undo(name).await {
                // Not ended yet, or not reached: at the next Update.
                tracing::warn!(container = name.0, exec = name.1, error = %error.chain(),
                    "announced no longer, and still there");
            }
        }
        for name in wanted.difference(&have) {
            if let Err(error) = self.prepare(list, name).await {
                if let Err(second) = self.undo(name).await {
                    tracing::warn!(container = name.0, exec = name.1, error = %second.chain(),
                        "cannot clean up after a failed preparation");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes up what an earlier daemon has prepared.
    pub async fn recover(self: &Arc<Self>, list: &Declared) {
        let known = list.names();
        for id in self.containers.existing().await {
            let name = (id, String::new());
            if known.contains(&name) {
                continue;
            }
            tracing::info!(container = name.0, "removing what an unanswered Update has prepared");
            if let Err(error) = self.undo(&name).await {
                tracing::error!(container = name.0, error = %error.chain(), "it stays");
            }
        }
        for name in known.into_iter().filter(|name| check(name).is_ok()) {
            if name.1.is_empty() {
                self.containers.resume_copies(&name.0).await;
            }
            match self.resume(list, &name).await {
                Ok(joined) => self.follow(name, joined),
                Err(error) => {
                    tracing::error!(container = name.0, exec = name.1, error = %error.chain(),
                        "its streams are lost");
                    self.follow(name, Joined::default());
                }
            }
        }
    }

    async fn prepare(self: &Arc<Self>, list: &Declared, name: &Name) -> Result<()> {
        let (container, exec) = name;
        let given = list.stdio(container, exec);
        let mut question = wire::DeclareRequest {
            container: container.clone(),
            exec: exec.clone(),
            terminal: given.terminal,
            stdin: given.stdin.clone(),
            stdout: given.stdout.clone(),
            stderr: given.stderr.clone(),
            ..wire::DeclareRequest::default()
        };
        if exec.is_empty() {
            let what = self.container(list, container, given.terminal).await?;
            question.what = MessageField::some(what);
        } else {
            question.process = process(list, container, exec)?;
        }
        let _: wire::DeclareResponse =
            self.containers.guest.call_again(service::GUEST, "Declare", &question).await?;
        let joined = self.join(name, &given).await?;
        self.follow(name.clone(), joined);
        Ok(())
    }

    /// Root file system, volumes, disks and spec of a container.
    async fn container(
        &self,
        list: &Declared,
        id: &str,
        terminal: bool,
    ) -> Result<wire::Container> {
        // In place of the engine's bundle, of which Update does not tell.
        let bundle = self.containers.host.dir(id).join("bundle");
        record::private_dir(&bundle)
            .map_err(|error| Error::internal("make the container's directory", error))?;
        let mut request = CreateContainer {
            id: id.to_owned(),
            bundle,
            rootfs: Vec::new(),
            terminal,
            checkpoint: None,
            options: None,
        };
        list.complete(&mut request, &mut Stdio::default())?;
        let (what, _) = self.containers.ready(&request, terminal).await?;
        Ok(what)
    }

    /// Joins the engine's FIFOs with the guest's streams.
    async fn join(&self, name: &Name, given: &Stdio) -> Result<Joined> {
        let ((container, exec), keeper) = (name, &self.containers.keeper);
        let mut joined = Joined::default();
        // Input that is no terminal's goes its own way.
        let stdin = if given.terminal { "" } else { given.stdin.as_str() };
        let ours = match given.terminal {
            true => given.clone(),
            false => Stdio { stdin: String::new(), ..given.clone() },
        };
        let (io, mut prepared) = engine::open(&ours, &io_name(name))?;
        prepared.keep(&**keeper).await?;
        let (ends, _, terminal) = ends(io, container, exec);
        for (which, kind, fd, direction) in ends {
            let guest = self.containers.guest.stream(container, exec, kind).await?;
            let stream = stdio::name(container, exec, which);
            joined.outputs.push(stdio::begin(keeper, stream, guest, fd, direction).await?);
        }
        let guest = &self.containers.guest;
        let terminal = match terminal {
            true => Some(guest.stream(container, exec, StreamKind::Terminal).await?),
            false => None,
        };
        joined.io = prepared.attach(terminal, &**keeper, &self.streams).await?;
        if !stdin.is_empty() {
            let open = std::fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
                .open(stdin);
            let open = open.map_err(|error| {
                Error::InvalidArgument(format!("cannot open stdin {stdin:.300?}: {error}"))
            })?;
            joined.input = Some(self.input(name, open.into()).await?);
        }
        Ok(joined)
    }

    /// The input of a process, from when its writer is there.
    async fn input(&self, (container, exec): &Name, fd: OwnedFd) -> Result<JoinHandle<()>> {
        let failed = |error: std::io::Error| Error::internal("listen to an input", error);
        let name = stdio::name(container, exec, "stdin");
        self.containers.keeper.keep(&format!("{name}engine"), fd.as_fd()).await?;
        let seen = fd.try_clone().map_err(failed)?;
        let (containers, container, exec) =
            (self.containers.clone(), container.clone(), exec.clone());
        Ok(tokio::spawn(async move {
            // A FIFO without a writer reads as ended, but polls as such only when one has gone.
            // What cannot be polled is a file, which is always ready.
            // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
            if let Ok(seen) = unsafe { AsyncFd::register(seen) } {
                let _ = seen.readable().await;
            }
            let joined = async {
                let guest = containers.guest.stream(&container, &exec, StreamKind::Stdin).await?;
                stdio::begin(&containers.keeper, name, guest, fd, Direction::Input).await
            };
            if let Err(error) = joined.await {
                tracing::warn!(container, exec, error = %error.chain(), "no input");
            }
        }))
    }

    /// What [`Self::join`] has made before this daemon.
    async fn resume(&self, list: &Declared, name: &Name) -> Result<Joined> {
        let ((container, exec), keeper) = (name, &self.containers.keeper);
        let mut given = list.stdio(container, exec);
        let mut joined = Joined::default();
        if !given.terminal {
            for which in ["stdout", "stderr"] {
                let stream = stdio::name(container, exec, which);
                joined.outputs.extend(stdio::resume(keeper, stream, Direction::Output).await?);
            }
            let stdin = stdio::name(container, exec, "stdin");
            let ours = keeper.fetch(&format!("{stdin}engine")).await?;
            let theirs = keeper.fetch(&format!("{stdin}guest")).await?;
            match (ours, theirs) {
                (Some(_), Some(_)) => {
                    drop(stdio::resume(keeper, stdin, Direction::Input).await?);
                }
                (Some(fd), None) => joined.input = Some(self.input(name, fd).await?),
                _ => {}
            }
            given.stdin.clear();
        }
        joined.io =
            engine::recover(&given, false, &io_name(name), &**keeper, &self.streams).await?;
        Ok(joined)
    }

    /// Sees a process to its end, whenever it comes.
    fn follow(&self, name: Name, joined: Joined) {
        let containers = self.containers.clone();
        let task = tokio::spawn(see_to_its_end(containers, name.clone(), joined));
        if let Some(old) = self.followed().insert(name, task) {
            old.abort();
        }
    }

    /// Takes back what was declared, with what was made of it, and what the host has for it.
    async fn undo(&self, name: &Name) -> Result<()> {
        let (container, exec) = name;
        let question = wire::WithdrawRequest {
            container: container.clone(),
            exec: exec.clone(),
            ..wire::WithdrawRequest::default()
        };
        let answer: std::result::Result<wire::WithdrawResponse, _> =
            self.containers.guest.call_again(service::GUEST, "Withdraw", &question).await;
        match answer {
            Ok(_) | Err(GuestError::Gone) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(task) = self.followed().remove(name) {
            task.abort();
        }
        let keeper = &self.containers.keeper;
        if !exec.is_empty() {
            keeper.forget(&stdio::process_prefix(container, exec)).await?;
            return keeper.forget(&io_name(name)).await;
        }
        self.containers.delete(container, Path::new("")).await?;
        keeper.forget(&format!("io/{container}/")).await
    }
}

/// An exec's process in the guest's terms.
fn process(list: &Declared, container: &str, exec: &str) -> Result<Vec<u8>> {
    let terminal = list.is_terminal(container, exec);
    let (text, _) = list.exec(container, exec, terminal).ok_or_else(|| {
        Error::InvalidArgument(format!("exec {exec} of container {container} has no spec"))
    })?;
    let mut process: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|error| Error::InvalidArgument(format!("the exec's process: {error}")))?;
    spec::process(&mut process)?;
    kuasar_host::spec::set_terminal(&mut process, terminal, None);
    serde_json::to_vec(&process).map_err(|error| Error::internal("write the process", error))
}

async fn see_to_its_end(containers: Arc<Containers>, name: Name, mut joined: Joined) {
    let (container, exec) = &name;
    let outputs = std::mem::take(&mut joined.outputs);
    if made(&containers, &name).await {
        let drain = containers.drain();
        // How it has ended the engine learns from the guest.
        let _ = containers.exit_of(container, exec, outputs).await;
        // A terminal's.
        let outputs = joined.io.take_outputs();
        let aborts: Vec<_> = outputs.iter().map(JoinHandle::abort_handle).collect();
        if tokio::time::timeout(drain, futures::future::join_all(outputs)).await.is_err() {
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
    } else {
        let ends = outputs.into_iter().map(|output| output.finish(LEFT));
        futures::future::join_all(ends).await;
    }
    // Our ends go, so that the engine sees the end.
    drop(joined);
    for prefix in [stdio::process_prefix(container, exec), io_name(&name)] {
        if let Err(error) = containers.keeper.forget(&prefix).await {
            tracing::error!(%prefix, "streams stay open: {}", error.chain());
        }
    }
}

/// Waits until the engine has made what was declared; false when that cannot be any more.
async fn made(containers: &Containers, (container, exec): &Name) -> bool {
    let question = wire::MadeRequest {
        container: container.clone(),
        exec: exec.clone(),
        ..wire::MadeRequest::default()
    };
    loop {
        let answer: std::result::Result<wire::MadeResponse, _> =
            containers.guest.call_for(service::GUEST, "Made", &question, None).await;
        match answer {
            Ok(_) => return true,
            Err(GuestError::Gone) => return false,
            Err(error) if error.is_not_found() => return false,
            Err(error) => {
                tracing::debug!(container, exec, %error, "asked again");
                tokio::select! {
                    () = containers.guest.gone() => return false,
                    () = tokio::time::sleep(AGAIN) => {}
                }
            }
        }
    }
}
