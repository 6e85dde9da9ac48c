//! The pool: machines that are ready before a pod asks for one.
//!
//! ```text
//! refill:  restore a template ─▶ its agent says that it serves ─▶ it waits, unanswered
//! start:   take ─▶ pod's record, cgroup, tree, NICs ─▶ the agent is welcomed: token, time, entropy
//! ```
//!
//! A pooled machine is a copy of the template for pods of the default size, with its own user, its
//! own share (an empty tree) and its channel. It has no NIC, and its VMM runs in an empty network
//! namespace of its own, where it stays when it becomes a pod's: a process cannot be moved into
//! another by somebody else. The taps are opened by the daemon, in the pod's namespace, and reach
//! the VMM as descriptors; a device belongs to the namespace in which it was made, whoever has the
//! descriptor.
//!
//! **Nobody is welcomed twice.** A pooled agent has no token, no sandbox and no entropy of ours
//! until a pod has taken its machine. What a machine can be taken by is removed from the table
//! under a lock, so that it is given to one pod at most; across a restart nothing is given at all:
//! a daemon ends what an earlier one has kept ready ([`Pool::sweep`]).
//!
//! **Whose it is** is told by a file in the machine's directory: it is the pool's as long as the
//! file is there. A pod writes its own record first, and removes the file then.
//!
//! Whatever goes wrong here costs a pod the time of a restore or a boot, and nothing else.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::PoolInfo;
use futures::future::join_all;
use kuasar_daemon::registry::{Counter, Gauge};
use kuasar_pod::files::host;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, broadcast, oneshot, watch};
use tokio::task::JoinHandle;

use crate::boot::{CONSOLE, files_by, plain};
use crate::channel::{self, Listener};
use crate::config::{Config, ShareBy};
use crate::drivers::Machinery;
use crate::errors::{machine, task};
use crate::guest::{Waiting, random_hex};
use crate::sandboxer::CGROUP;
use crate::share::ShareTree;
use crate::vmm::{CopyNics, Event, Feature, Kind, Range, Vm, VmSpec, VmState, Vmm};

/// Kind of the record in a pooled machine's directory, and its version.
const RECORD: (&str, u32) = ("vm-pooled", 1);
/// The record's file.
const FILE: &str = "pooled";
/// Beginning of the names of pooled machines.
const PREFIX: &str = "pool-";
/// Beginning of the names of their directories.
const DIR: &str = "p-";
/// An agent that is not answered dials again after half a minute: one that has not for so long hangs.
const SILENT: Duration = Duration::from_secs(120);
/// Longest pause after machines that could not be made ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a machine that is just being made may hold up the daemon's end.
const END: Duration = Duration::from_secs(15);

static MACHINES: Counter =
    Counter { name: "kuasar_pool_machines_total", labels: &["sandboxer", "event"] };
static READY: Gauge = Gauge { name: "kuasar_pool_ready", labels: &["sandboxer"] };
static WANTED: Gauge = Gauge { name: "kuasar_pool_wanted", labels: &["sandboxer"] };

/// What is durable of a pooled machine.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The machine, once it runs.
    vm: Option<VmState>,
}

/// A machine of the pool.
#[derive(Debug)]
pub(crate) struct Pooled {
    /// Its name: of its user, of what sandbox-parent keeps for it.
    pub name: String,
    /// The template that it is a copy of.
    pub key: String,
    /// How it gets a pod's files.
    pub share: ShareBy,
    pub dir: PathBuf,
    pub user: Option<u32>,
    pub cpus: Range,
    pub memory_mib: Range,
    pub vm: Arc<dyn Vm>,
}

impl Pooled {
    /// The tree that its virtiofsd serves.
    pub fn tree(&self) -> ShareTree {
        ShareTree::new(&self.dir)
    }

    fn is(&self, key: &str, share: ShareBy) -> bool {
        self.key == key && self.share == share
    }

    /// From now on it is not the pool's any more: whoever calls this has recorded it.
    pub fn disown(&self) -> Result<()> {
        std::fs::remove_file(self.dir.join(FILE))
            .map_err(|error| Error::internal("take a machine out of the pool", error))
    }
}

/// An agent that waits to be welcomed.
#[derive(Debug)]
pub(crate) struct Idle {
    /// Where it dials when it has waited for too long.
    pub ready: Listener,
    pub agent: Waiting,
}

/// A pooled machine, and who watches it.
struct Entry {
    machine: Arc<Pooled>,
    /// Ends the watch.
    leave: oneshot::Sender<()>,
    /// Answers the agent of a machine that is well.
    watch: JoinHandle<Option<Idle>>,
}

/// What has happened since the daemon's start.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    refilled: u64,
    taken: u64,
    missed: u64,
    lost: u64,
}

#[derive(Default)]
struct State {
    ready: Vec<Entry>,
    counts: Counts,
    /// Why there is no pool, when one is configured.
    hindrance: Option<String>,
    task: Option<JoinHandle<()>>,
}

/// The machines that are ready.
pub struct Pool {
    machinery: Arc<Machinery>,
    state: Mutex<State>,
    /// There is something to do.
    wake: Notify,
    /// The daemon ends.
    end: watch::Sender<bool>,
}

/// What a look at the pool has come to.
enum Look {
    /// Nothing to do until something happens.
    Full,
    /// One was made; there may be more to make.
    More,
    /// It did not work.
    Failed,
}

impl Pool {
    /// An empty one, in which nothing happens before [`Pool::begin`].
    pub(crate) fn new(machinery: Arc<Machinery>) -> Arc<Self> {
        let (state, wake) = (Mutex::default(), Notify::new());
        Arc::new(Self { machinery, state, wake, end: watch::Sender::new(false) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, event: &str, which: impl FnOnce(&mut Counts) -> &mut u64) {
        *which(&mut self.state().counts) += 1;
        MACHINES.add(&["vmm", event], 1);
    }

    /// The configuration may have changed.
    pub(crate) fn look(&self) {
        self.wake.notify_one();
    }

    /// Keeps the pool filled from now on.
    pub(crate) fn begin(self: &Arc<Self>) {
        let pool = self.clone();
        let mut state = self.state();
        if state.task.is_none() {
            state.task = Some(tokio::spawn(async move { pool.run().await }));
        }
    }

    async fn run(self: Arc<Self>) {
        let mut end = self.end.subscribe();
        let mut failures = 0_u32;
        loop {
            let config = self.machinery.config();
            let look = self.refill(&config).await;
            let pause = match &look {
                Look::Full => None,
                Look::More => Some(config.template.refill),
                Look::Failed => {
                    let longer = config.template.refill.max(Duration::from_secs(1));
                    Some((longer * 2_u32.saturating_pow(failures.min(8))).min(PATIENCE))
                }
            };
            failures = if matches!(look, Look::Failed) { failures.saturating_add(1) } else { 0 };
            let rest = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => self.wake.notified().await,
                }
            };
            tokio::select! {
                biased;
                _ = end.wait_for(|end| *end) => return,
                () = rest => {}
            }
        }
    }

    /// Ends what does not fit the configuration any more, or makes one machine that is missing.
    async fn refill(self: &Arc<Self>, config: &Arc<Config>) -> Look {
        let wanted = if config.template.enabled { config.template.pool } else { 0 };
        WANTED.set(&["vmm"], f64::from(wanted));
        if wanted == 0 {
            self.state().hindrance = None;
            self.retire(None).await;
            return Look::Full;
        }
        let look = match self.template(config).await {
            Ok(None) => {
                self.retire(None).await;
                return Look::Full;
            }
            Ok(Some((spec, key, share))) => {
                self.retire(Some((&key, share))).await;
                if self.state().ready.len() >= wanted as usize {
                    return Look::Full;
                }
                self.add(config, spec, key).await
            }
            Err(error) => Err(error),
        };
        match look {
            Ok(look) => look,
            Err(error) => {
                tracing::warn!(error = %error.chain(), "no machine for the pool");
                MACHINES.add(&["vmm", "failed"], 1);
                Look::Failed
            }
        }
    }

    /// A machine of the default size, its template's name, and how it gets files; nothing where there is no
    /// pool.
    async fn template(&self, config: &Config) -> Result<Option<(VmSpec, String, ShareBy)>> {
        let kind = config.vmm.kind();
        let (driver, _) = self.machinery.vmm(config, kind, None)?;
        let features = driver.features();
        let why = match driver.copies(config.size.hugepages) {
            _ if crate::boot::serves_pods(&*driver, config.share).is_err() => {
                Some(format!("{} runs no pods", driver.name()))
            }
            Ok(CopyNics::Plugged) => None,
            // Its tap would have to be there before its pod.
            Ok(CopyNics::Declared) => Some(driver.cannot(Feature::NicHotplug).to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = why {
            if self.state().hindrance.replace(why.clone()).as_ref() != Some(&why) {
                tracing::error!(
                    "template.pool = {}: no pool is kept, and pods start without one: {why}",
                    config.template.pool
                );
            }
            return Ok(None);
        }
        self.state().hindrance = None;
        let spec = self.spec(config, &*driver, PREFIX, Path::new("/"))?;
        let (templates, share) = (self.machinery.templates.clone(), files_by(features, config));
        blocking(move || {
            let key = templates.key(&*driver, &spec).map_err(machine)?;
            Ok(Some((spec, key, share)))
        })
        .await
    }

    fn spec(&self, config: &Config, driver: &dyn Vmm, name: &str, dir: &Path) -> Result<VmSpec> {
        let size = config.size.of(0, 0, 0);
        let (share, console) = (ShareTree::new(dir).served(), dir.join(CONSOLE));
        let group =
            self.machinery.cgroups.group(&self.cgroup()).map_err(host("the pool's cgroup"))?;
        let name = (name.to_owned(), dir);
        let plain = plain(config, driver, name, size, share, console, group.entrances());
        Ok(channel::give(driver, plain?))
    }

    /// Makes one machine ready; the template first when there is none.
    async fn add(
        self: &Arc<Self>,
        config: &Arc<Config>,
        like: VmSpec,
        key: String,
    ) -> Result<Look> {
        let (templates, name) = (self.machinery.templates.clone(), key.clone());
        let Some(saved) = blocking(move || Ok(templates.find(&name))).await? else {
            let Some(turn) = self.machinery.templates.turn(&key) else {
                // Another is being made, or this one could not be made a short while ago.
                return Ok(Look::Failed);
            };
            let kind = config.vmm.kind();
            self.machinery.clone().make_template(turn, config.clone(), kind, like, key).await;
            return Ok(Look::More);
        };
        let random = random_hex(4).map_err(|error| Error::internal("no random bytes", error))?;
        let (name, dir) = (format!("{PREFIX}{random}"), self.dirs().join(format!("{DIR}{random}")));
        let begun = Instant::now();
        match self.make(config, &name, &dir, &key, &saved).await {
            Ok((machine, idle)) => {
                tracing::info!(machine = name, took = ?begun.elapsed(), "a machine is ready");
                kuasar_daemon::metrics::observe("pool_refill", begun.elapsed());
                self.count("refilled", |counts| &mut counts.refilled);
                self.insert(machine, idle);
                Ok(Look::More)
            }
            Err(error) => {
                self.clear(&name, &dir).await?;
                Err(error)
            }
        }
    }

    async fn make(
        &self,
        config: &Config,
        name: &str,
        dir: &Path,
        key: &str,
        saved: &Path,
    ) -> Result<(Pooled, Idle)> {
        let user = self.machinery.user(name, config)?;
        let (driver, launcher) = self.machinery.vmm(config, config.vmm.kind(), user)?;
        let group =
            self.machinery.cgroups.group(&self.cgroup()).map_err(host("the pool's cgroup"))?;
        let own = dir.to_owned();
        let share = files_by(driver.features(), config);
        let shared = share != ShareBy::None;
        blocking(move || {
            kuasar_host::record::private_dir(&own).map_err(host("make a machine's directory"))?;
            record(&own, None)?;
            group.create().map_err(host("make the pool's cgroup"))?;
            if shared { ShareTree::new(&own).make().map_err(task) } else { Ok(()) }
        })
        .await?;
        let spec = self.spec(config, &*driver, name, dir)?;
        let (ready, spec) = channel::listen(&spec, launcher.owner())?;
        let vm = driver.restore(&spec, saved).await.map_err(machine)?;
        let limit = config.template.ready;
        let waiting = async {
            record(dir, Some(vm.state()))?;
            tokio::select! {
                biased;
                ended = vm.wait() => Err(Error::FailedPrecondition(match ended {
                    Ok(exit) => format!("the machine ended with status {}", exit.status),
                    Err(error) => error.to_string(),
                })),
                agent = tokio::time::timeout(limit, Waiting::accept(&ready)) => match agent {
                    Ok(agent) => agent.map_err(Error::from),
                    Err(_) => Err(Error::DeadlineExceeded(format!(
                        "the copy's agent did not serve within {limit:?}"
                    ))),
                },
            }
        };
        match waiting.await {
            Ok(agent) => {
                let (cpus, memory_mib) = (spec.cpus, spec.memory_mib);
                let (name, key, dir) = (name.to_owned(), key.to_owned(), dir.to_owned());
                let machine = Pooled { name, key, share, dir, user, cpus, memory_mib, vm };
                Ok((machine, Idle { ready, agent }))
            }
            Err(error) => {
                end(&*vm).await?;
                Err(error)
            }
        }
    }

    fn insert(self: &Arc<Self>, machine: Pooled, idle: Idle) {
        let machine = Arc::new(machine);
        let (leave, told) = oneshot::channel();
        let (pool, watched) = (self.clone(), machine.clone());
        let mut state = self.state();
        // It finds itself in the table: that is filled before the lock is given back.
        let watch = tokio::spawn(async move {
            match guard(&*watched.vm, idle, told).await {
                Ok(idle) => Some(idle),
                Err(why) => {
                    pool.lost(&watched, why).await;
                    None
                }
            }
        });
        state.ready.push(Entry { machine, leave, watch });
        READY.set(&["vmm"], state.ready.len() as f64);
    }

    /// A machine is no good any more. Its end is that of whoever has it in the table, or has just
    /// taken it out.
    async fn lost(&self, machine: &Pooled, why: &str) {
        let found = {
            let mut state = self.state();
            let before = state.ready.len();
            state.ready.retain(|entry| entry.machine.name != machine.name);
            READY.set(&["vmm"], state.ready.len() as f64);
            state.ready.len() < before
        };
        tracing::warn!(machine = machine.name, why, "a machine of the pool is lost");
        self.count("lost", |counts| &mut counts.lost);
        if found {
            self.discard(machine).await;
        }
        self.wake.notify_one();
    }

    /// Ends a machine that was taken out of the table, and leaves nothing of it.
    pub(crate) async fn discard(&self, machine: &Pooled) {
        if let Err(error) = end(&*machine.vm).await {
            tracing::error!(machine = machine.name, error = %error.chain(), "it is left");
            return;
        }
        if let Err(error) = self.clear(&machine.name, &machine.dir).await {
            tracing::error!(machine = machine.name, error = %error.chain(), "some of it is left");
        }
    }

    /// Removes what an ended machine has left.
    async fn clear(&self, name: &str, dir: &Path) -> Result<()> {
        let own = dir.to_owned();
        blocking(move || remove(&own)).await?;
        self.machinery.users.release(name);
        Ok(())
    }

    /// What copies there are that get files this way: template, CPUs and memory. One machine of each is
    /// enough to know whether it fits.
    pub(crate) fn kinds(&self, share: ShareBy) -> Vec<(String, Range, Range)> {
        let state = self.state();
        let mut all: Vec<(String, Range, Range)> = Vec::new();
        for Entry { machine, .. } in state.ready.iter().filter(|e| e.machine.share == share) {
            if all.iter().all(|(key, ..)| *key != machine.key) {
                all.push((machine.key.clone(), machine.cpus, machine.memory_mib));
            }
        }
        all
    }

    /// Takes a copy of template `key` that gets files by `share` out of the pool, for good: nobody else
    /// gets it.
    pub(crate) async fn take(&self, key: &str, share: ShareBy) -> Option<(Arc<Pooled>, Idle)> {
        loop {
            let entry = {
                let mut state = self.state();
                let at = state.ready.iter().position(|entry| entry.machine.is(key, share))?;
                let entry = state.ready.remove(at);
                READY.set(&["vmm"], state.ready.len() as f64);
                entry
            };
            self.wake.notify_one();
            let _ = entry.leave.send(());
            match entry.watch.await {
                Ok(Some(idle)) => return Some((entry.machine, idle)),
                // It ended at this moment; the watch did not find it in the table any more.
                _ => self.discard(&entry.machine).await,
            }
        }
    }

    /// A pod runs in a machine of the pool.
    pub(crate) fn taken(&self) {
        self.count("taken", |counts| &mut counts.taken);
    }

    /// A pod for which there was none, though there is a pool.
    pub(crate) fn missed(&self) {
        self.count("missed", |counts| &mut counts.missed);
    }

    /// Ends all machines but the copies of this template that get files this way.
    async fn retire(&self, wanted: Option<(&str, ShareBy)>) {
        let old: Vec<Entry> = {
            let mut state = self.state();
            let all = std::mem::take(&mut state.ready);
            let (stay, go) = all
                .into_iter()
                .partition(|entry| wanted.is_some_and(|(key, share)| entry.machine.is(key, share)));
            state.ready = stay;
            READY.set(&["vmm"], state.ready.len() as f64);
            go
        };
        join_all(old.into_iter().map(|entry| async move {
            entry.watch.abort();
            let _ = entry.watch.await;
            self.discard(&entry.machine).await;
        }))
        .await;
    }

    /// The daemon ends: so do machines that are no pod's.
    pub(crate) async fn finish(&self) {
        self.end.send_replace(true);
        let task = self.state().task.take();
        if let Some(task) = task
            && tokio::time::timeout(END, task).await.is_err()
        {
            tracing::warn!("a machine that was just being made for the pool is killed");
        }
        self.retire(None).await;
        if let Err(error) = self.sweep().await {
            tracing::error!(error = %error.chain(), "some of the pool is left");
        }
    }

    /// Ends and removes what is in no table: machines of an earlier daemon.
    pub(crate) async fn sweep(&self) -> Result<()> {
        let dirs = std::fs::read_dir(self.dirs()).into_iter().flatten().flatten();
        let dirs: Vec<PathBuf> = dirs
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(DIR))
            .map(|entry| entry.path())
            .collect();
        let config = self.machinery.config();
        let mut ours = Vec::new();
        for dir in dirs {
            let (kind, version) = RECORD;
            match kuasar_host::record::read::<Record>(&dir.join(FILE), kind, version) {
                Ok(Record { vm: Some(vm) }) => {
                    let (id, driver) = (vm.id.clone(), vm.kind);
                    if let Err(error) = self.end_recorded(&config, driver, vm).await {
                        // Its cgroup is killed below.
                        tracing::warn!(machine = id, error = %error.chain(), "cannot be taken up");
                    }
                }
                Ok(Record { vm: None }) => {}
                // A pod's, or nobody's when there is nothing in it.
                Err(_) if !dir.join(FILE).exists() => {
                    let _ = std::fs::remove_dir(&dir);
                    continue;
                }
                Err(error) => tracing::warn!(dir = %dir.display(), %error, "a torn record"),
            }
            ours.push(dir);
        }
        let group =
            self.machinery.cgroups.group(&self.cgroup()).map_err(host("the pool's cgroup"))?;
        blocking(move || {
            if group.exists() {
                let _ = group.signal_all(libc::SIGKILL);
                group.remove(CGROUP).map_err(host("remove the pool's cgroup"))?;
            }
            ours.iter().try_for_each(|dir| remove(dir))
        })
        .await
    }

    async fn end_recorded(&self, config: &Config, kind: Kind, vm: VmState) -> Result<()> {
        let (driver, _) = self.machinery.vmm(config, kind, None)?;
        end(&*driver.reattach(vm).await.map_err(machine)?).await
    }

    /// What an operator sees of it; nothing when none is configured.
    pub(crate) fn info(&self) -> Option<PoolInfo> {
        let config = self.machinery.config();
        let wanted = if config.template.enabled { config.template.pool } else { 0 };
        let state = self.state();
        let Counts { refilled, taken, missed, lost } = state.counts;
        let ready = u32::try_from(state.ready.len()).unwrap_or(u32::MAX);
        let hindrance = state.hindrance.clone();
        let info = PoolInfo { wanted, ready, refilled, taken, missed, lost, hindrance };
        (wanted > 0 || ready > 0).then_some(info)
    }

    fn dirs(&self) -> PathBuf {
        self.machinery.dir.join("vm")
    }

    /// One for each state directory, as the templates'.
    fn cgroup(&self) -> String {
        format!("/kuasar-vmm/pool{}", self.machinery.dir.to_string_lossy().replace('/', "_"))
    }
}

fn record(dir: &Path, vm: Option<VmState>) -> Result<()> {
    let (kind, version) = RECORD;
    kuasar_host::record::write(&dir.join(FILE), kind, version, &Record { vm })
        .map_err(host("record a machine of the pool"))
}

/// Removes a machine's directory. What is mounted there goes first: when that fails, nothing is
/// removed.
fn remove(dir: &Path) -> Result<()> {
    ShareTree::new(dir).remove().map_err(task)?;
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::internal(format!("remove {}", dir.display()), error))
        }
        _ => Ok(()),
    }
}

async fn end(vm: &dyn Vm) -> Result<()> {
    vm.stop(Duration::ZERO).await.map_err(machine)?;
    vm.release().await;
    Ok(())
}

/// Watches a machine that waits, until it is told to leave: answers its agent then. Answers why the
/// machine is of no use when it, a helper or its guest is not well.
async fn guard(
    vm: &dyn Vm,
    idle: Idle,
    mut leave: oneshot::Receiver<()>,
) -> std::result::Result<Idle, &'static str> {
    let Idle { ready, mut agent } = idle;
    let mut events = vm.events();
    let ended = vm.wait();
    tokio::pin!(ended);
    let silent = tokio::time::sleep(SILENT);
    tokio::pin!(silent);
    loop {
        tokio::select! {
            biased;
            _ = &mut ended => return Err("it has ended"),
            event = events.recv() => match event {
                Ok(Event::HelperEnded { .. }) => return Err("a helper of it has ended"),
                Ok(Event::Shutdown { .. } | Event::Panicked) => return Err("its guest has ended"),
                Err(broadcast::error::RecvError::Closed) => return Err("it is not to be seen"),
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            },
            _ = &mut leave => return Ok(Idle { ready, agent }),
            () = &mut silent => return Err("its guest hangs"),
            again = Waiting::accept(&ready) => match again {
                // It has waited for long, and dialled anew.
                Ok(again) => {
                    agent = again;
                    silent.as_mut().reset(tokio::time::Instant::now() + SILENT);
                }
                Err(error) => {
                    tracing::debug!(%error, "a pooled agent's greeting");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
        }
    }
}
