//! What one machine is for every driver: its processes, its record, and how it ends.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex as AsyncMutex, broadcast};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::error::{Doing, Error, Result};
use super::process::{Exit, Process, Record};
use super::spec::{Disk, DiskFormat, VmSpec};
use super::{Event, Kind, Processes, STATE_VERSION, Vm, VmState, Vmm, console, vsock};

/// Events that a slow receiver may be behind.
const EVENTS: usize = 32;
/// How long a VMM may take to end after it was asked, before it is killed.
const QUIT: Duration = Duration::from_secs(2);
/// Name of the kept reading end of a VMM's pipe of events, behind the machine's id.
pub(super) const EVENT_PIPE: &str = "events";

/// [`super::Vmm::identity`] of the program at `path`, run with `config`.
///
/// # Errors
/// [`Error::NoProgram`], [`Error::Io`].
pub(super) fn identity(path: &Path, config: &impl Serialize) -> Result<String> {
    let wanted = path.display().to_string();
    let program =
        kuasar_host::process::find_program(wanted.as_ref()).ok_or(Error::NoProgram(wanted))?;
    let meta = std::fs::metadata(&program).doing(|| format!("look at {}", program.display()))?;
    let config = serde_json::to_string(config).unwrap_or_default();
    let changed = (meta.ctime(), meta.ctime_nsec());
    Ok(format!("{} {} {} {changed:?} {config}", program.display(), meta.ino(), meta.len()))
}

/// One machine; `P` is what only its driver keeps of it in [`VmState::driver`].
pub(super) struct Core<P> {
    state: Mutex<(VmState, P)>,
    pub process: Arc<Process>,
    helpers: Mutex<Vec<Arc<Process>>>,
    pub events: broadcast::Sender<Event>,
    /// One change of devices or of state at a time.
    pub change: AsyncMutex<()>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl<P> Drop for Core<P> {
    fn drop(&mut self) {
        // The processes go on: another daemon may take them up.
        held(&self.tasks).iter().for_each(JoinHandle::abort);
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: Serialize + DeserializeOwned> Core<P> {
    /// A machine that has just been started.
    pub fn new(kind: Kind, spec: &VmSpec, own: P, process: Process, helpers: Vec<Process>) -> Self {
        let state = VmState {
            version: STATE_VERSION,
            kind,
            id: spec.id.clone(),
            dir: spec.dir.clone(),
            vmm: process.record().clone(),
            helpers: helpers.iter().map(|helper| helper.record().clone()).collect(),
            channel: spec.channel.clone(),
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            console: (spec.console.log.clone(), spec.console.limit),
            driver: serde_json::Value::Null,
        };
        Self::assemble(state, own, process, helpers)
    }

    /// A machine of an earlier daemon.
    ///
    /// # Errors
    /// [`Error::State`] when the record is not of this driver.
    pub fn take_up(kind: Kind, state: VmState, processes: &Arc<dyn Processes>) -> Result<Self> {
        if state.kind != kind || state.version > STATE_VERSION {
            return Err(Error::State(format!(
                "{} version {} is not one of {kind}, version {STATE_VERSION} or older",
                state.kind, state.version
            )));
        }
        let own = serde_json::from_value(state.driver.clone())
            .map_err(|error| Error::State(error.to_string()))?;
        let take = |record: &Record| Process::take_up(record.clone(), processes.clone());
        let (process, helpers) = (take(&state.vmm), state.helpers.iter().map(take).collect());
        Ok(Self::assemble(state, own, process, helpers))
    }

    fn assemble(state: VmState, own: P, process: Process, helpers: Vec<Process>) -> Self {
        let (events, _) = broadcast::channel(EVENTS);
        let process = Arc::new(process);
        let core = Self {
            state: Mutex::new((state, own)),
            process,
            helpers: Mutex::default(),
            events,
            change: AsyncMutex::default(),
            tasks: Mutex::default(),
        };
        let alive = core.process.is_alive();
        for helper in helpers.into_iter().map(Arc::new) {
            if alive {
                core.watch(&helper);
            }
            held(&core.helpers).push(helper);
        }
        core
    }

    fn watch(&self, helper: &Arc<Process>) {
        let (helper, events) = (helper.clone(), self.events.clone());
        self.keep(tokio::spawn(async move {
            if let Ok(exit) = helper.wait().await {
                let name = helper.record().name.clone();
                let _ = events.send(Event::HelperEnded { name, status: exit.status });
            }
        }));
    }

    /// A helper of a device that was plugged in.
    pub fn add_helper(&self, helper: Process) {
        let helper = Arc::new(helper);
        self.locked().0.helpers.push(helper.record().clone());
        self.watch(&helper);
        held(&self.helpers).push(helper);
    }

    /// Tells of the end of a VMM that has no other way to say that its guest has gone.
    pub fn tell_of_end(&self) {
        let (process, events) = (self.process.clone(), self.events.clone());
        self.keep(tokio::spawn(async move {
            if let Ok(Exit { status: 0, .. }) = process.wait().await {
                let _ = events.send(Event::Shutdown { reason: "the guest has ended".into() });
            }
        }));
    }

    /// A task that ends with this machine's handle.
    pub fn keep(&self, task: JoinHandle<()>) {
        held(&self.tasks).push(task);
    }

    /// State, and what only the driver keeps.
    pub fn locked(&self) -> MutexGuard<'_, (VmState, P)> {
        held(&self.state)
    }

    /// [`super::Vm::state`].
    pub fn vm_state(&self) -> VmState {
        let (state, own) = &*self.locked();
        VmState { driver: serde_json::to_value(own).unwrap_or_default(), ..state.clone() }
    }

    /// [`Error::Gone`] for a machine that has ended.
    pub fn alive(&self) -> Result<()> {
        if self.process.is_alive() { Ok(()) } else { Err(Error::Gone) }
    }

    /// The end of it: waits up to `grace` for it to come by itself, asks with `ask`, kills.
    ///
    /// # Errors
    /// As [`super::Vm::stop`].
    pub async fn stop(
        &self,
        grace: Duration,
        ask: impl Future<Output = Result<()>>,
    ) -> Result<Exit> {
        let mut exit = self.process.wait_for(grace).await?;
        if exit.is_none() && self.process.is_alive() {
            // A stopped or busy VMM must not hold this up.
            if matches!(tokio::time::timeout(QUIT, ask).await, Ok(Ok(()) | Err(Error::Gone))) {
                exit = self.process.wait_for(QUIT).await?;
            }
        }
        let exit = match exit {
            Some(exit) => exit,
            None => self.process.kill().await?,
        };
        let helpers = held(&self.helpers).clone();
        for helper in helpers {
            helper.kill().await?;
        }
        Ok(exit)
    }

    /// [`super::Vm::release`]: forgets exits and kept descriptors, removes the channel's sockets
    /// and `files`.
    pub async fn release(&self, files: &[PathBuf]) {
        let (id, channel) = {
            let state = self.locked();
            (state.0.id.clone(), state.0.channel.clone())
        };
        let processes = self.process.processes();
        forget_pipes(&*processes, &id).await;
        let helpers = held(&self.helpers).clone();
        for process in helpers.iter().chain([&self.process]) {
            process.acknowledge().await;
        }
        channel.sockets().iter().for_each(|path| remove(path));
        files.iter().for_each(|path| remove(path));
    }
}

/// Forgets the kept ends of a machine's pipes, as far as it has them.
pub(super) async fn forget_pipes(processes: &dyn Processes, id: &str) {
    console::forget(processes, id).await;
    if let Err(error) = processes.forget(&format!("{id}/{EVENT_PIPE}")).await {
        tracing::warn!(id, %error, "cannot forget a pipe of events");
    }
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove a file");
    }
}

/// The directory of a machine in which its VMM may make sockets and files, for `owner` alone.
///
/// # Errors
/// As [`vsock::prepare`].
pub(super) fn work_dir(dir: &Path, owner: Option<(u32, u32)>) -> Result<PathBuf> {
    let work = dir.join("w");
    vsock::prepare(&work.join("socket"), owner)?;
    Ok(work)
}

/// Waits for what a VMM was asked at its start, or for its last words.
///
/// # Errors
/// [`Error::Ended`] when it ends first; else what `asked` says.
pub(super) async fn or_last_words<T>(
    process: &Process,
    limit: Duration,
    asked: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        exit = process.wait() => Err(process.ended(exit?)),
        answer = asked => match answer {
            // The connection breaks a moment before the exit is known.
            Err(Error::Gone) => match process.wait_for(limit).await? {
                Some(exit) => Err(process.ended(exit)),
                None => Err(Error::Gone),
            },
            other => other,
        },
    }
}

/// Ends a machine whose start went wrong when it ran already; answers why.
pub(super) async fn abandon(machine: &dyn Vm, why: Error) -> Error {
    if let Err(error) = machine.stop(Duration::ZERO).await {
        tracing::error!(%error, "a machine of a failed start is left");
    }
    machine.release().await;
    why
}

/// [`Error::Unsupported`] on a host without KVM, for a VMM that has nothing else.
pub(super) fn need_kvm(vmm: &dyn Vmm) -> Result<()> {
    if Path::new("/dev/kvm").exists() {
        return Ok(());
    }
    Err(Error::Unsupported {
        vmm: vmm.name(),
        what: "run without KVM".into(),
        way_out: "this host has no /dev/kvm: load the module, or use qemu with accel = \"tcg\""
            .into(),
    })
}

/// [`Error::Unsupported`] for a disk that is no raw image.
pub(super) fn need_raw(vmm: String, disk: &Disk) -> Result<()> {
    match disk.format {
        DiskFormat::Raw => Ok(()),
        DiskFormat::Qcow2 => Err(Error::Unsupported {
            vmm,
            what: "read qcow2 images".into(),
            way_out: "use raw images, or another VMM".into(),
        }),
    }
}

/// The answer for a device that cannot be unplugged.
pub(super) fn stays(id: &str) -> Error {
    Error::Invalid(format!("device {id} is there from the boot and stays as long as the machine"))
}

/// Looks at a guest's memory with `look`, each `interval`, until it has `wanted` MiB: for `limit`
/// at most. A guest whose memory has been the same for as long as `still` has given, or taken, what
/// it can. Answers what it has.
pub(super) async fn settle<F: Future<Output = Result<u32>>>(
    wanted: u32,
    interval: Duration,
    (still, limit): (Duration, Duration),
    mut look: impl FnMut() -> F,
) -> Result<u32> {
    let mut settling = Settling::new(wanted, still, limit, Instant::now());
    loop {
        let actual = look().await?;
        if settling.is_over(actual, Instant::now()) {
            return Ok(actual);
        }
        tokio::time::sleep(interval).await;
    }
}

/// When [`settle`] is over.
struct Settling {
    wanted: u32,
    still: Duration,
    until: Instant,
    last: Option<(u32, Instant)>,
}

impl Settling {
    fn new(wanted: u32, still: Duration, limit: Duration, now: Instant) -> Self {
        Self { wanted, still, until: now + limit, last: None }
    }

    /// Whether nothing more is to be waited for, at `now` with `actual` MiB.
    fn is_over(&mut self, actual: u32, now: Instant) -> bool {
        let since = match self.last {
            Some((last, since)) if last == actual => since,
            _ => now,
        };
        self.last = Some((actual, since));
        actual == self.wanted || now - since >= self.still || now >= self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_waited_for_as_long_as_it_moves() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let begun = || Settling::new(128, 3 * second, 100 * second, start);
        let mut one = begun();
        // Slow, but never the same for three seconds.
        for n in 0..40 {
            assert!(!one.is_over(256 - n, start + n * 2 * second), "{n}");
        }
        assert!(one.is_over(128, start + 80 * second));
        let mut one = begun();
        assert!(!one.is_over(148, start));
        assert!(!one.is_over(148, start + 2 * second));
        assert!(one.is_over(148, start + 3 * second));
        assert!(!one.is_over(147, start + 4 * second));
        assert!(one.is_over(146, start + 100 * second));
    }
}
