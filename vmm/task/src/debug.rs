//! The debug console: programs beside the containers, for the host's operator.
//!
//! There is none unless the kernel's command line says so (`kuasar.debug_console`): what is not there at
//! the boot cannot be switched on by whoever comes later. `Guest.Debug` names a program; the stream that
//! the host then dials under the call's id, behind the boot's token like every stream, starts it and is
//! joined with it. It runs as we do, in our own namespaces: it sees everything of the guest.
//!
//! A session is one program and whatever it has started, in a cgroup of its own beside the pod's. It
//! ends with its program, with its stream, or when it is told to: a hang-up first, then SIGKILL for all
//! that is in the cgroup.

mod ends;
mod program;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_task::error::{Error, Result};
use containerd_task::host::blocking;
use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_oci::processes::{Command, Processes, new_cookie};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;
use vmm_common::DEBUG_FILES;
use vmm_common::guest::{DebugRequest, SteerDebugRequest, steer_debug_request::What};

use crate::channel::Stream;
use crate::files::Files;
use crate::limits;
use crate::reaper::Reaper;

use ends::{Ends, Size};
pub use program::{WORD, main};

/// Said where there is none.
const OFF: &str = "this guest has no debug console: set guest.debug_console = true in vmm-sandboxer's \
                   configuration; pods that are started from then on have one";
/// Bytes that are copied at once: half of what may be written to a vsock device.
const BUFFER: usize = vmm_common::CHUNK / 2;

/// The debug sessions of this guest.
pub struct Debugs {
    enabled: bool,
    reaper: Reaper,
    files: Arc<Files>,
    /// Our own program.
    exe: String,
    /// Where sessions get their cgroups; without one a session is its process group.
    layout: Option<Layout>,
    /// How long a session waits for its stream.
    patience: Duration,
    sessions: Mutex<HashMap<String, Entry>>,
}

struct Entry {
    /// Until its stream comes.
    waits: Option<(Wanted, Instant)>,
    orders: watch::Sender<Orders>,
    /// Where its terminal's size is set.
    terminal: Option<ends::Resize>,
}

/// What is to run.
struct Wanted {
    argv: Vec<String>,
    terminal: Option<Size>,
}

/// What a session is told while it runs.
#[derive(Default, Clone, Copy)]
struct Orders {
    /// Its input has so many bytes.
    input_bytes: Option<u64>,
    end: bool,
}

fn plain(id: &str) -> Result<()> {
    kuasar_host::id::check("debug session", id)
        .map(drop)
        .map_err(|error| Error::InvalidArgument(error.to_string()))
}

fn size(width: u32, height: u32) -> Result<Size> {
    match (u16::try_from(width), u16::try_from(height)) {
        (Ok(width), Ok(height)) => Ok(Size { width, height }),
        _ => Err(Error::InvalidArgument("no terminal is as large as that".into())),
    }
}

impl Debugs {
    /// None yet, and never any where it is not `enabled`.
    pub fn new(enabled: bool, reaper: Reaper, files: Arc<Files>, exe: String) -> Arc<Self> {
        // Only root can make groups.
        let root = nix::unistd::geteuid().is_root();
        let layout = (enabled && root).then(|| Layout::detect().ok()).flatten();
        let (patience, sessions) = (limits::DEBUG_TIME, Mutex::default());
        Arc::new(Self { enabled, reaper, files, exe, layout, patience, sessions })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream with this id may come and start a program. One that comes too late finds neither it nor
    /// its files: the host may have gone in between.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] where there is no debug console; [`Error::InvalidArgument`],
    /// [`Error::AlreadyExists`], [`Error::ResourceExhausted`].
    pub fn expect(self: &Arc<Self>, question: DebugRequest) -> Result<()> {
        if !self.enabled {
            return Err(Error::FailedPrecondition(OFF.into()));
        }
        plain(&question.id)?;
        let (words, bytes) = limits::DEBUG_WORDS;
        let argv = question.argv;
        let odd = |word: &String| word.contains('\0');
        if argv.iter().any(odd) || !argv.first().is_some_and(|program| program.starts_with('/')) {
            let text = "a debug session wants the absolute path of a program, and arguments";
            return Err(Error::InvalidArgument(text.into()));
        }
        if argv.len() > words || argv.iter().map(String::len).sum::<usize>() > bytes {
            let text = format!("more than {words} words or {bytes} bytes of arguments");
            return Err(Error::ResourceExhausted(text));
        }
        let size = size(question.width, question.height)?;
        let wanted = Wanted { argv, terminal: question.terminal.then_some(size) };
        let mut sessions = self.lock();
        if sessions.contains_key(&question.id) {
            return Err(Error::AlreadyExists(format!("debug session {} is there", question.id)));
        }
        if sessions.len() >= limits::DEBUGS {
            let text = format!("a guest has at most {} debug sessions", limits::DEBUGS);
            return Err(Error::ResourceExhausted(text));
        }
        let orders = watch::Sender::new(Orders::default());
        let since = Instant::now();
        let entry = Entry { waits: Some((wanted, since)), orders, terminal: None };
        sessions.insert(question.id.clone(), entry);
        tokio::spawn(self.clone().expire(question.id, since));
        Ok(())
    }

    /// Forgets a session for which no stream comes.
    async fn expire(self: Arc<Self>, id: String, since: Instant) {
        tokio::time::sleep_until(since + self.patience).await;
        let waits = |entry: &Entry| entry.waits.as_ref().is_some_and(|(_, own)| *own == since);
        let still = self.lock().get(&id).is_some_and(waits);
        if !still {
            return;
        }
        tracing::info!(session = id, "nobody has come for a debug session");
        if let Err(error) = self.end(&id).await {
            tracing::warn!(session = id, error = %error.chain(), "its files stay");
        }
    }

    /// Changes a session.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InvalidArgument`].
    pub fn steer(&self, question: &SteerDebugRequest) -> Result<()> {
        let sessions = self.lock();
        let entry = sessions.get(&question.id);
        let entry = entry.ok_or_else(|| Error::NotFound("there is no such session".into()))?;
        match &question.what {
            Some(What::Size(wanted)) => {
                let size = size(wanted.width, wanted.height)?;
                entry.terminal.as_ref().map_or(Ok(()), |terminal| terminal.set(size))
            }
            Some(What::InputBytes(bytes)) => {
                entry.orders.send_modify(|orders| orders.input_bytes = Some(*bytes));
                Ok(())
            }
            _ => Err(Error::InvalidArgument("nothing is said of the session".into())),
        }
    }

    /// Ends a session, or forgets one that no stream has come for, with its files.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]; of the kernel.
    pub async fn end(&self, id: &str) -> Result<()> {
        plain(id)?;
        let runs = {
            let mut sessions = self.lock();
            sessions.retain(|own, entry| own != id || entry.waits.is_none());
            let entry = sessions.get(id);
            entry.map(|entry| entry.orders.send_modify(|orders| orders.end = true)).is_some()
        };
        // One that runs removes them itself.
        if runs { Ok(()) } else { self.files.remove(format!("{DEBUG_FILES}{id}")).await }
    }

    /// Starts the program of the call with this id.
    ///
    /// # Errors
    /// [`Error::NotFound`] without such a call; why it cannot be started.
    pub async fn start(self: &Arc<Self>, id: &str) -> Result<Session> {
        let (wanted, orders) = {
            let mut sessions = self.lock();
            let entry = sessions.get_mut(id);
            let taken = entry.and_then(|entry| Some((entry.waits.take()?.0, entry)));
            let none = || Error::NotFound("no debug session waits for this stream".into());
            let (wanted, entry) = taken.ok_or_else(none)?;
            (wanted, entry.orders.subscribe())
        };
        let place = Place { debugs: self.clone(), id: id.into() };
        match self.run(&place, wanted, orders).await {
            Ok(running) => Ok(Session { running, place }),
            Err(error) => {
                place.clear().await;
                Err(error)
            }
        }
    }

    async fn run(
        &self,
        place: &Place,
        wanted: Wanted,
        orders: watch::Receiver<Orders>,
    ) -> Result<Running> {
        let (ends, program) = ends::pair(wanted.terminal)?;
        let group = match &self.layout {
            Some(layout) => {
                let failed = |error| Error::internal("make the session's cgroup", error);
                let group = layout.group(&format!("/debug-{}", place.id)).map_err(failed)?;
                let made = group.clone();
                blocking(move || made.create().map(drop).map_err(failed)).await?;
                Some(group)
            }
            None => None,
        };
        let cookie = new_cookie();
        let terminal = wanted.terminal.is_some();
        let command = Command {
            argv: program::command(&self.exe, terminal, group.as_ref(), &wanted.argv),
            env: program::environment(&wanted.argv),
            fds: vec![
                Some(program.input.as_fd()),
                Some(program.output.as_fd()),
                Some(program.output.as_fd()),
            ],
            cookie,
            place: None,
        };
        let spawned = match self.reaper.spawn(command).await {
            Ok(spawned) => spawned,
            Err(error) => {
                remove(group).await;
                return Err(Error::internal("start a debug session", error));
            }
        };
        if let Some(entry) = self.lock().get_mut(&place.id) {
            entry.terminal = ends.resize();
        }
        Ok(Running { ends, orders, group, pid: spawned.pid, cookie })
    }
}

/// A session's entry in the table; gone when this is.
struct Place {
    debugs: Arc<Debugs>,
    id: String,
}

impl Place {
    /// Gives back all that the session had.
    async fn clear(self) {
        let files = format!("{DEBUG_FILES}{}", self.id);
        if let Err(error) = self.debugs.files.remove(files).await {
            tracing::warn!(session = self.id, error = %error.chain(), "its files stay");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.debugs.lock().remove(&self.id);
    }
}

struct Running {
    ends: Ends,
    orders: watch::Receiver<Orders>,
    group: Option<Cgroup>,
    pid: u32,
    cookie: u64,
}

/// A session whose program runs. It has to be [joined](Self::join) or [ended](Self::end).
pub struct Session {
    running: Running,
    place: Place,
}

impl Session {
    /// Joins it with its stream, until one of them ends; then nothing of it is left.
    pub async fn join(self, stream: impl Stream) {
        let Self { running, place } = self;
        let reaper = place.debugs.reaper.clone();
        let Running { ends, mut orders, group, pid, cookie } = running;
        let (from_host, mut to_host) = tokio::io::split(stream);
        {
            let Ends { input, mut output } = ends;
            let inwards = inwards(from_host, input, orders.clone());
            let outwards = outwards(&mut output, &mut to_host);
            tokio::pin!(inwards, outwards);
            let told = async { drop(orders.wait_for(|orders| orders.end).await) };
            tokio::select! {
                _ = reaper.exit_of(cookie) => {
                    // What it has left behind would hold its output open.
                    kill(group.clone(), pid).await;
                    let _ = tokio::time::timeout(limits::DRAIN, &mut outwards).await;
                }
                () = &mut inwards => {}
                () = &mut outwards => {}
                () = told => {}
            }
            // Our ends of its streams are closed here, which hangs up a terminal.
        }
        end(&reaper, group, pid, cookie).await;
        place.clear().await;
        // The last of it: whoever sees the stream's end finds nothing any more.
        let _ = tokio::time::timeout(limits::DRAIN, to_host.shutdown()).await;
    }

    /// Ends it.
    pub async fn end(self) {
        let Self { running: Running { ends, group, pid, cookie, .. }, place } = self;
        drop(ends);
        end(&place.debugs.reaper, group, pid, cookie).await;
        place.clear().await;
    }
}

/// Until the stream has ended. When the program takes no more, what comes is thrown away.
async fn inwards(
    mut from: impl AsyncRead + Unpin,
    to: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    mut orders: watch::Receiver<Orders>,
) {
    let (mut to, mut passed) = (Some(to), 0_u64);
    let mut buffer = vec![0; BUFFER];
    loop {
        let most = orders.borrow_and_update().input_bytes;
        if most.is_some_and(|most| passed >= most) {
            to = None;
        }
        tokio::select! {
            changed = orders.changed(), if most.is_none() => {
                if changed.is_err() {
                    return;
                }
            }
            read = from.read(&mut buffer) => {
                let Ok(n @ 1..) = read else { return };
                passed = passed.saturating_add(n as u64);
                let bytes = buffer.get(..n).unwrap_or_default();
                if let Some(input) = &mut to
                    && input.write_all(bytes).await.is_err()
                {
                    to = None;
                }
            }
        }
    }
}

/// Until nobody writes any more, or the stream takes nothing.
async fn outwards(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let bytes = buffer.get(..n).unwrap_or_default();
        if to.write_all(bytes).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

/// Hangs up, and kills what does not end by that.
async fn end(reaper: &Reaper, group: Option<Cgroup>, pid: u32, cookie: u64) {
    for signal in [libc::SIGHUP, libc::SIGCONT] {
        signal_all(group.as_ref(), pid, signal);
    }
    let _ = tokio::time::timeout(limits::HANG_UP, reaper.exit_of(cookie)).await;
    kill(group.clone(), pid).await;
    if tokio::time::timeout(limits::KILLED, reaper.end_of(cookie)).await.is_err() {
        tracing::warn!(pid, "a debug session's program does not end");
        reaper.acknowledge(cookie).await;
    }
    remove(group).await;
}

async fn kill(group: Option<Cgroup>, pid: u32) {
    // On another thread: the group may have to be frozen first.
    let killed = tokio::task::spawn_blocking(move || {
        signal_all(group.as_ref(), pid, libc::SIGKILL);
    });
    let _ = killed.await;
}

fn signal_all(group: Option<&Cgroup>, pid: u32, signal: i32) {
    match (group, i32::try_from(pid)) {
        (Some(group), _) => {
            if let Err(error) = group.signal_all(signal) {
                tracing::warn!(pid, %error, "a debug session is not signalled");
            }
        }
        (None, Ok(pid)) if pid > 1 => {
            // SAFETY: plain integers; an empty group is no error.
            unsafe { libc::kill(-pid, signal) };
        }
        _ => {}
    }
}

async fn remove(group: Option<Cgroup>) {
    let Some(group) = group else { return };
    let removed = blocking(move || {
        group.remove(limits::KILLED).map_err(|error| Error::internal("remove its cgroup", error))
    });
    if let Err(error) = removed.await {
        tracing::warn!(error = %error.chain(), "of a debug session something stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_common::guest;

    fn debugs(enabled: bool) -> Arc<Debugs> {
        Debugs::new(enabled, Reaper::default(), Arc::default(), "/none".into())
    }

    fn question(id: &str, argv: &[&str]) -> DebugRequest {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        DebugRequest { id: id.into(), argv, ..Default::default() }
    }

    #[tokio::test]
    async fn a_guest_whose_kernel_was_not_told_of_it_refuses_and_names_the_key() {
        let debugs = debugs(false);
        let error = debugs.expect(question("s", &["/bin/sh"])).unwrap_err();
        assert!(
            matches!(&error, Error::FailedPrecondition(text)
                if text.contains("guest.debug_console = true")),
            "{error}"
        );
        assert!(matches!(debugs.start("s").await, Err(Error::NotFound(_))));
    }

    #[tokio::test]
    async fn odd_questions_open_nothing() {
        let debugs = debugs(true);
        for id in ["", ".", "..", "../x", "a/b", "a b", "a\nb", &"x".repeat(129)] {
            let error = debugs.expect(question(id, &["/bin/sh"])).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{id:?}: {error}");
            assert!(matches!(debugs.end(id).await, Err(Error::InvalidArgument(_))), "{id:?}");
        }
        for argv in [&[][..], &[""], &["sh"], &["/bin/sh", "a\0b"]] {
            let error = debugs.expect(question("s", argv)).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{argv:?}: {error}");
        }
        let (words, bytes) = limits::DEBUG_WORDS;
        for argv in [vec!["/bin/sh"; words + 1], vec!["/bin/sh", &"x".repeat(bytes)]] {
            let error = debugs.expect(question("s", &argv)).unwrap_err();
            assert!(matches!(error, Error::ResourceExhausted(_)), "{error}");
        }
        let large = DebugRequest { width: 65_536, ..question("s", &["/bin/sh"]) };
        assert!(matches!(debugs.expect(large), Err(Error::InvalidArgument(_))));
        assert!(debugs.lock().is_empty());
    }

    #[tokio::test]
    async fn a_session_for_which_no_stream_comes_is_forgotten() {
        let mut debugs = debugs(true);
        Arc::get_mut(&mut debugs).unwrap().patience = Duration::from_millis(5);
        debugs.expect(question("s", &["/bin/sh"])).unwrap();
        let gone = async {
            while !debugs.lock().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), gone).await.unwrap();
        assert!(matches!(debugs.start("s").await, Err(Error::NotFound(_))));
    }

    #[tokio::test]
    async fn so_many_sessions_and_no_more_and_one_stream_for_each() {
        let debugs = debugs(true);
        for n in 0..limits::DEBUGS {
            debugs.expect(question(&format!("s{n}"), &["/bin/sh"])).unwrap();
        }
        let more = debugs.expect(question("more", &["/bin/sh"]));
        assert!(matches!(more, Err(Error::ResourceExhausted(_))));
        let again = debugs.expect(question("s0", &["/bin/sh"]));
        assert!(matches!(again, Err(Error::AlreadyExists(_))));
        // What cannot be started has been, and makes room.
        assert!(debugs.start("s0").await.is_err());
        assert!(matches!(debugs.start("s0").await, Err(Error::NotFound(_))));
        debugs.expect(question("more", &["/bin/sh"])).unwrap();
        debugs.end("more").await.unwrap();
        assert!(matches!(debugs.start("more").await, Err(Error::NotFound(_))));
        let steer = |id: &str, what| {
            debugs.steer(&SteerDebugRequest { id: id.into(), what, ..Default::default() })
        };
        assert!(matches!(steer("s1", None), Err(Error::InvalidArgument(_))));
        let huge = guest::Size { width: 70_000, height: 1, ..Default::default() };
        assert!(matches!(steer("s1", Some(What::Size(huge))), Err(Error::InvalidArgument(_))));
        assert!(matches!(steer("none", Some(What::InputBytes(1))), Err(Error::NotFound(_))));
    }
}
