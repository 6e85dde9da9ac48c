//! Pods that are machines: the [`Sandboxer`] behind the Controller.
//!
//! | step | what is made | undone by |
//! |---|---|---|
//! | create | the pod's files and cgroup | `remove` |
//! | start | share tree, taps and redirections, the machine and its helpers, the agent's channel | `remove`; taps and redirections by `stop` |
//!
//! Every step is found again by name or by record, so that a daemon that is killed between two of
//! them leaves nothing: mounts are below the sandbox's directory, processes are in the pod's
//! cgroup of machines, taps end with their last descriptor, the machine's sockets are in a
//! directory that is recorded before it is made.
//!
//! A machine that ends by itself is seen by the exit of its VMM: its containers end with 137 and
//! the Controller is told.

mod recovery;

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::{
    DebugChange, DebugConsole, DebugProgram, PodServices, Recovered, SandboxContext, Sandboxer,
    Started, TemplateJob, TemplateList,
};
use containerd_task::runtime::Keeper;
use kuasar_daemon::resident::Parts;
use kuasar_daemon::tasks::{ParentKeeper, TaskServers, Tasks, announces};
use kuasar_host::cgroup::Layout;
use kuasar_oci::pod::Modes;
use kuasar_pod::files::{self, host};
use protobuf::MessageField;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};
use vmm_common::{guest as wire, port};

use crate::announced::Announced;
use crate::block;
use crate::boot::{CONSOLE, files_by};
use crate::channel;
use crate::config::{Config, HostNetwork, ShareBy, TaskEndpoint};
use crate::debug;
use crate::drivers::Machinery;
use crate::errors::{chain, machine, net, task};
use crate::growth::{Machine, huge_of};
use crate::guest::{Dial, Guest, Limits, service};
use crate::network::{self, Interface, Plan};
use crate::nics;
use crate::pool::Pool;
use crate::runtime::{Containers, Pod};
use crate::share::ShareTree;
use crate::vmm::{Vm, VmState};
use crate::watch::{watch_end, watch_events, watch_health, watch_helpers};

/// How long a killed process may take to leave its cgroup.
pub(crate) const CGROUP: Duration = Duration::from_secs(5);

/// What is durable of a pod.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PodState {
    /// cgroup parent, when the pod's cgroup was made by us.
    pub own_cgroup: Option<String>,
    /// cgroup of VMM and helpers.
    pub machine_cgroup: Option<String>,
    /// Directory of the machine's sockets and logs.
    pub machine_dir: Option<PathBuf>,
    /// The machine.
    pub vm: Option<VmState>,
    /// User and group of its VMM and vsock helper, where it has its own.
    pub user: Option<u32>,
    /// The agent's token.
    pub token: String,
    /// Interfaces that were joined with taps.
    pub interfaces: Vec<Interface>,
    /// Port on which the guest serves the engine; 0: it does not.
    pub task_port: u32,
    /// How its files reach the guest.
    pub share: ShareBy,
}

/// A running machine.
pub(crate) struct Live {
    pub vm: Arc<dyn Vm>,
    pub guest: Arc<Guest>,
    pub containers: Arc<Containers>,
    /// What an engine that calls the guest has announced.
    announced: OnceLock<Arc<Announced>>,
    /// Debug sessions that there may be.
    debugs: Arc<Semaphore>,
    /// What watches it.
    watchers: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        let watchers = self.watchers.get_mut().unwrap_or_else(PoisonError::into_inner);
        watchers.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// Makes and removes pods.
pub struct VmmSandboxer {
    pub(crate) machinery: Arc<Machinery>,
    pub(crate) pool: Arc<Pool>,
    /// Whether sandbox-parent was started by this daemon and knows nothing of older pods.
    fresh: bool,
    servers: Arc<TaskServers>,
    live: Mutex<HashMap<String, Arc<Live>>>,
}

impl Deref for VmmSandboxer {
    type Target = Machinery;

    fn deref(&self) -> &Machinery {
        &self.machinery
    }
}

pub(crate) fn state(ctx: &SandboxContext) -> PodState {
    serde_json::from_value(ctx.state.clone()).unwrap_or_default()
}

/// The namespace choices of a pod, as a guest can serve them: what would be the host's is the
/// pod's, because the guest's own belongs to its agent.
fn shared_pid(modes: Modes) -> bool {
    modes.shared_pid || modes.host_pid
}

impl VmmSandboxer {
    /// A sandboxer whose state is below `dir`; `exe` is this program, which is the jailer, too.
    pub fn new(
        config: Arc<RwLock<Arc<Config>>>,
        parts: &Parts,
        cgroups: Layout,
        dir: PathBuf,
        exe: PathBuf,
    ) -> Self {
        let machinery = Machinery::new(config, parts.parent.clone(), cgroups, dir, exe);
        let machinery = Arc::new(machinery);
        Self {
            pool: Pool::new(machinery.clone()),
            machinery,
            fresh: parts.fresh,
            servers: parts.servers.clone(),
            live: Mutex::default(),
        }
    }

    fn live(&self) -> MutexGuard<'_, HashMap<String, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn running(&self, id: &str) -> Option<Arc<Live>> {
        self.live().get(id).cloned()
    }

    /// The group of a pod's VMM and helpers.
    fn machine_cgroup(&self, ctx: &SandboxContext) -> String {
        let parent = &ctx.spec.config.linux.cgroup_parent;
        let parent = kuasar_host::cgroup::expand_systemd(parent);
        let parent = if parent.is_empty() { "/kuasar-vmm".to_owned() } else { parent };
        format!("{}/machine-{}", parent.trim_end_matches('/'), ctx.spec.id)
    }

    pub(crate) async fn save(&self, ctx: &SandboxContext, state: &PodState) -> Result<()> {
        let value = serde_json::to_value(state)
            .map_err(|error| Error::internal("record the pod", error))?;
        ctx.handle.save(value).await
    }

    fn keeper(&self, id: &str) -> Arc<dyn Keeper> {
        Arc::new(ParentKeeper::new(self.parent.clone(), id.to_owned()))
    }

    /// A short private directory for sockets, whose paths have at most 107 bytes.
    fn machine_dir(&self, id: &str) -> PathBuf {
        let short: String = id.chars().take(12).collect();
        let dirs = self.dir.join("vm");
        let free = |dir: &PathBuf| !dir.exists();
        let numbered = (0..1000).map(|n| dirs.join(format!("{short}{n}")));
        let first = dirs.join(&short);
        if free(&first) { first } else { numbered.into_iter().find(free).unwrap_or(first) }
    }

    fn open_network(&self, ctx: &SandboxContext, config: &Config) -> Result<Option<OwnedFd>> {
        let path = &ctx.spec.netns_path;
        if path.is_empty() {
            return match config.host_network {
                HostNetwork::None => Ok(None),
                HostNetwork::Refuse => Err(Error::FailedPrecondition(
                    "a VM cannot be on the host's network: set hostNetwork: false, or run the \
                     pod with another runtime class; host_network = \"none\" in the \
                     configuration runs such pods without network"
                        .into(),
                )),
            };
        }
        network::open(path).map(Some).map_err(|error| {
            Error::FailedPrecondition(format!(
                "the pod's network namespace is not usable: {}",
                chain(&error)
            ))
        })
    }

    /// What the guest is told of its pod.
    pub(crate) fn setup(
        ctx: &SandboxContext,
        config: &Config,
        by: ShareBy,
        plan: &Plan,
    ) -> Result<wire::SetupRequest> {
        let modes = Modes::of(&ctx.spec.config, &ctx.spec.netns_path);
        // The names and the sysctls are the guest's alone, whatever the pod shares.
        let own = Modes { host_network: false, host_ipc: false, ..modes };
        let file = |name: &str| {
            std::fs::read(ctx.dir.join(name))
                .map_err(|error| Error::internal(format!("read the pod's {name}"), error))
        };
        let sysctls = files::sysctls(&ctx.spec.config, own, config.guest.unprivileged_ports)?;
        let share = |(tag, path): &(&str, &str)| wire::Storage {
            id: (*tag).into(),
            kind: by.file_system().into(),
            options: by.options(),
            source: (*tag).into(),
            target: (*path).into(),
            ..wire::Storage::default()
        };
        let shares = by.shares().iter().map(share).collect();
        Ok(wire::SetupRequest {
            sandbox_id: ctx.spec.id.clone(),
            hostname: files::hostname(&ctx.spec.config, own)?,
            resolv_conf: file("resolv.conf")?,
            hosts: file("hosts")?,
            sysctls: sysctls
                .into_iter()
                .map(|(name, value)| wire::Sysctl { name, value, ..wire::Sysctl::default() })
                .collect(),
            shared_pid: shared_pid(modes),
            shm_bytes: config.guest.shm_size,
            network: MessageField::some(plan.network.clone()),
            shares,
            task_port: Self::task_port(ctx, config),
            ..wire::SetupRequest::default()
        })
    }

    /// Takes a running machine into the table, with everything that watches it.
    pub(crate) fn insert(
        &self,
        ctx: &SandboxContext,
        (config, share): (&Config, ShareBy),
        vm: Arc<dyn Vm>,
        token: String,
        dial: Arc<dyn Dial>,
        gone: (watch::Sender<bool>, watch::Receiver<bool>),
    ) -> Result<(Tasks, Arc<Guest>)> {
        let id = &ctx.spec.id;
        let (end, gone) = gone;
        let times = config.guest_timeouts;
        let limits = Limits { connect: times.connect, call: times.call };
        let guest = Arc::new(Guest::new(dial, token, limits, gone));
        let pod = Pod {
            id: id.clone(),
            dir: ctx.dir.clone(),
            pid: vm.pid(),
            drain: times.drain,
            create: times.create,
            kill: times.kill,
        };
        let turn = tokio::sync::Mutex::default();
        let huge = huge_of(&ctx.spec.config);
        let machine = Machine { vm: vm.clone(), size: config.size, huge, turn };
        let (keeper, files) = (self.keeper(id), (config.storage.clone(), share.sharing(config)));
        let containers = Containers::new(pod, guest.clone(), keeper, Some(machine), files);
        let containers = Arc::new(containers);
        let tasks = self.servers.make(ctx, containers.clone())?;
        let mut watchers = vec![
            tokio::spawn(watch_helpers(id.clone(), vm.clone())),
            tokio::spawn(watch_events(guest.clone(), containers.clone())),
        ];
        if !times.health.is_zero() {
            watchers.push(tokio::spawn(watch_health(
                id.clone(),
                vm.clone(),
                guest.clone(),
                times.health,
                times.unwell,
            )));
        }
        let netns = &ctx.spec.netns_path;
        if !netns.is_empty() {
            let begun = network::open(netns).map_err(|error| chain(&error)).and_then(|netns| {
                crate::forward::start(netns.as_fd(), guest.clone()).map_err(|e| e.to_string())
            });
            match begun {
                Ok(forwards) => watchers.push(forwards),
                Err(error) => {
                    tracing::warn!(sandbox = id, error, "no port-forward to this pod");
                }
            }
        }
        // Not among the watchers: it has to see the end that we order as well.
        let console = ctx.dir.join(CONSOLE);
        tokio::spawn(watch_end(id.clone(), vm.clone(), end, ctx.handle.clone(), console));
        let live = Live {
            vm,
            guest: guest.clone(),
            containers,
            announced: OnceLock::new(),
            debugs: Arc::new(Semaphore::new(debug::MAX)),
            watchers: Mutex::new(watchers),
        };
        self.live().insert(id.clone(), Arc::new(live));
        Ok((tasks, guest))
    }

    /// Follows the network of a running pod; `told` is what its guest knows of it.
    pub(crate) fn follow_network(&self, ctx: &SandboxContext, told: Option<wire::Network>) {
        let netns = &ctx.spec.netns_path;
        let Some(live) = self.running(&ctx.spec.id).filter(|_| !netns.is_empty()) else { return };
        match network::open(netns) {
            Ok(netns) => {
                let (id, vm, guest) = (ctx.spec.id.clone(), live.vm.clone(), live.guest.clone());
                let watcher = tokio::spawn(crate::nics::follow(id, netns, vm, guest, told));
                live.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(watcher);
            }
            Err(error) => tracing::warn!(
                sandbox = ctx.spec.id,
                error = chain(&error),
                "changes of its network are not seen"
            ),
        }
    }

    /// Port on which the guest of a new pod serves its engine. containerd says its namespace, and
    /// announces nothing: it calls us.
    pub(crate) fn task_port(ctx: &SandboxContext, config: &Config) -> u32 {
        let guest = config.task_endpoint == TaskEndpoint::Guest && ctx.spec.namespace.is_empty();
        if guest { port::TASK } else { 0 }
    }

    /// What the engine announces of a running pod is prepared for its guest from now on.
    pub(crate) fn prepare_announced(&self, id: &str) -> Option<Arc<Announced>> {
        let live = self.running(id)?;
        Some(live.announced.get_or_init(|| Announced::new(live.containers.clone())).clone())
    }

    fn announced(&self, id: &str) -> Option<Arc<Announced>> {
        self.running(id)?.announced.get().cloned()
    }

    fn started(&self, ctx: &SandboxContext, pid: u32) -> Started {
        let mut labels = BTreeMap::new();
        if !ctx.spec.runtime.is_empty() {
            labels.insert("oci_runtime_type".into(), ctx.spec.runtime.clone());
        }
        Started { pid, labels, ..Started::default() }
    }

    /// Ends a pod's machine, running or only recorded, and whatever is in its cgroup.
    async fn end_machine(
        &self,
        ctx: &SandboxContext,
        state: &PodState,
        grace: Duration,
    ) -> Result<()> {
        let live = self.live().remove(&ctx.spec.id);
        if let Some(live) = live {
            live.vm.stop(grace).await.map_err(machine)?;
            live.vm.release().await;
        } else if let Some(recorded) = &state.vm {
            // Nobody has it in hand: a start that failed, or a daemon that has just begun.
            let (driver, _) = self.vmm(&self.config(), recorded.kind, state.user)?;
            match driver.reattach(block::newest(&ctx.dir, recorded.clone())).await {
                Ok(vm) => {
                    vm.stop(Duration::ZERO).await.map_err(machine)?;
                    vm.release().await;
                }
                Err(error) => tracing::warn!(sandbox = ctx.spec.id, %error,
                    "its machine cannot be taken up, only killed"),
            }
        }
        if state.vm.is_some() {
            // Its exit is forgotten: nobody may wait for it again.
            self.save(ctx, &PodState { vm: None, ..state.clone() }).await?;
        }
        let Some(path) = state.machine_cgroup.clone() else { return Ok(()) };
        let group = self.cgroups.group(&path).map_err(host("the machine's cgroup"))?;
        blocking(move || {
            if group.exists() {
                let _ = group.signal_all(libc::SIGKILL);
                group.remove(CGROUP).map_err(host("remove the machine's cgroup"))?;
            }
            Ok(())
        })
        .await
    }

    /// Takes the pod's interfaces apart from their taps.
    async fn part(&self, ctx: &SandboxContext, state: &PodState) -> Result<()> {
        let (path, interfaces) = (ctx.spec.netns_path.clone(), state.interfaces.clone());
        if interfaces.is_empty() || path.is_empty() {
            return Ok(());
        }
        blocking(move || match network::open(&path) {
            Ok(netns) => network::part(netns.as_fd(), &interfaces).map_err(net),
            // It is gone, and with it everything in it.
            Err(_) => Ok(()),
        })
        .await
    }
}

#[async_trait]
impl Sandboxer for VmmSandboxer {
    async fn create(&self, ctx: &SandboxContext) -> Result<()> {
        let spec = ctx.spec.clone();
        let config = self.config();
        let modes = Modes::of(&spec.config, &spec.netns_path);
        drop(self.open_network(ctx, &config)?);
        let (driver, _) = self.driver_of(ctx, &config, None)?;
        crate::boot::serves_pods(&*driver, config.share)?;
        config.images(driver.kind()).map_err(Error::FailedPrecondition)?;
        files::sysctls(&spec.config, modes, false)?;
        if files::has_userns(&spec.config) {
            return Err(Error::FailedPrecondition(
                "a pod in a VM has no user namespace of its own: set hostUsers: true; the VM is \
                 the stronger border"
                    .into(),
            ));
        }
        let (dir, layout, spec_too) = (ctx.dir.clone(), self.cgroups.clone(), spec.clone());
        let own = Modes { host_network: false, ..modes };
        let made = blocking(move || {
            files::write_etc(&dir, &spec_too.config, own)?;
            files::make_cgroup(&layout, &spec_too.config)
        })
        .await?;
        let state = PodState {
            own_cgroup: made.then(|| spec.config.linux.cgroup_parent.clone()),
            ..PodState::default()
        };
        self.save(ctx, &state).await
    }

    async fn start(&self, ctx: &SandboxContext) -> Result<Started> {
        let config = self.config();
        let mut state = state(ctx);
        let netns = self.open_network(ctx, &config)?.map(Arc::new);
        state.machine_cgroup = Some(self.machine_cgroup(ctx));
        state.machine_dir = Some(self.machine_dir(&ctx.spec.id));
        state.user = self.user(&ctx.spec.id, &config)?;
        state.task_port = Self::task_port(ctx, &config);
        let (driver, taps) = self.driver_of(ctx, &config, state.user)?;
        state.share = files_by(driver.features(), &config);
        let begun = Instant::now();
        let plan = match netns.clone() {
            Some(netns) => blocking(move || network::plan(netns.as_fd()).map_err(net)).await?,
            None => Plan::default(),
        };
        state.interfaces.clone_from(&plan.interfaces);
        // Before anything is made: a daemon that dies now knows what to undo.
        self.save(ctx, &state).await?;
        let (tree, shared) = (ShareTree::new(&ctx.dir), state.share != ShareBy::None);
        let of = netns.clone();
        let (joined, plan) = blocking(move || {
            if shared {
                tree.make().map_err(task)?;
            }
            let joined = match of {
                Some(netns) => network::join(netns.as_fd(), &plan, taps).map_err(net)?,
                None => Vec::new(),
            };
            Ok((joined, plan))
        })
        .await?;
        kuasar_daemon::metrics::observe("pod_network", begun.elapsed());
        let joined = joined.into_iter().enumerate();
        let nics = joined.map(|(n, one)| nics::nic(nics::id(n), one)).collect();
        let pid = self.boot(ctx, &config, &mut state, netns, nics, &plan).await?;
        let mut started = self.started(ctx, pid);
        if state.task_port != 0 {
            let (channel, dir) = (state.vm.map(|vm| vm.channel), state.machine_dir);
            let dir = dir.unwrap_or_default();
            started.address = Some(channel::endpoint(channel.as_ref(), &dir, state.task_port));
        }
        Ok(started)
    }

    async fn services(&self, ctx: &SandboxContext) -> Result<PodServices> {
        match self.servers.get(&ctx.spec.id) {
            Some(tasks) => Ok(tasks.server().services()),
            None => Err(Error::NotFound(format!("sandbox {} is not running", ctx.spec.id))),
        }
    }

    async fn stop(&self, ctx: &SandboxContext, _timeout: Duration) -> Result<()> {
        let config = self.config();
        let state = state(ctx);
        let grace = config.guest_timeouts.shutdown;
        if let Some(live) = self.running(&ctx.spec.id) {
            // Its containers end with it, after their filesystems are written.
            let question = wire::ShutdownRequest::default();
            let asked = live.guest.call_for::<wire::ShutdownResponse>(
                service::GUEST,
                "Shutdown",
                &question,
                Some(grace),
            );
            let grace = match asked.await {
                Ok(_) => grace,
                Err(error) => {
                    tracing::warn!(sandbox = ctx.spec.id, %error, "its machine is killed");
                    Duration::ZERO
                }
            };
            self.end_machine(ctx, &state, grace).await?;
        } else {
            self.end_machine(ctx, &state, Duration::ZERO).await?;
        }
        self.part(ctx, &state).await
    }

    async fn remove(&self, ctx: &SandboxContext) -> Result<()> {
        let state = state(ctx);
        self.end_machine(ctx, &state, Duration::ZERO).await?;
        if let Err(error) = self.part(ctx, &state).await {
            tracing::warn!(sandbox = ctx.spec.id, error = %error.chain(), "its network");
        }
        if let Some(tasks) = self.servers.take(&ctx.spec.id) {
            tasks.remove().await;
        }
        let (dir, layout) = (ctx.dir.clone(), self.cgroups.clone());
        blocking(move || {
            ShareTree::new(&dir).remove().map_err(task)?;
            if let Some(dir) = &state.machine_dir {
                // Where a machine of the pool had its tree before it was a pod's.
                ShareTree::new(dir).remove().map_err(task)?;
            }
            kuasar_host::mount::unmount_below(&dir).map_err(host("unmount the pod's files"))?;
            if let Some(path) = &state.own_cgroup {
                let group = layout.group(path).map_err(host("the pod's cgroup"))?;
                group.remove(CGROUP).map_err(host("remove the pod's cgroup"))?;
            }
            if let Some(dir) = &state.machine_dir
                && let Err(error) = std::fs::remove_dir_all(dir)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(Error::internal(format!("remove {}", dir.display()), error));
            }
            Ok(())
        })
        .await?;
        self.users.release(&ctx.spec.id);
        self.parent
            .forget(&format!("{}/", ctx.spec.id))
            .await
            .map_err(|error| Error::internal("release what is kept for the pod", error))
    }

    async fn recover(&self, ctx: &SandboxContext) -> Result<Recovered> {
        self.take_up(ctx).await
    }

    async fn remove_orphans(&self, known: &[String]) -> Result<()> {
        self.remove_lost(known).await
    }

    async fn info(&self, ctx: &SandboxContext) -> Result<BTreeMap<String, String>> {
        let state = state(ctx);
        let live = self.running(&ctx.spec.id);
        let text = serde_json::json!({
            "vmm": live.as_ref().map(|live| live.vm.name()),
            "pid": live.as_ref().map(|live| live.vm.pid()),
            "features": live.as_ref().map(|live| format!("{:?}", live.vm.features())),
            "cpus": state.vm.as_ref().map(|vm| vm.cpus.at_boot),
            "memoryMiB": state.vm.as_ref().map(|vm| vm.memory_mib.at_boot),
            "user": state.user,
            "interfaces": state.interfaces,
            "sandboxParent": self.parent.pid(),
        });
        Ok(BTreeMap::from([("vmm".to_owned(), text.to_string())]))
    }

    async fn console(&self, ctx: &SandboxContext) -> Result<PathBuf> {
        if self.config().guest.console_bytes == 0 {
            return Err(Error::FailedPrecondition(
                "no console log is kept: set guest.console_bytes in the configuration".into(),
            ));
        }
        // That of a machine of the pool began before the pod.
        Ok(state(ctx).vm.map_or_else(|| ctx.dir.join(CONSOLE), |vm| vm.console.0))
    }

    async fn debug(&self, ctx: &SandboxContext, what: DebugProgram) -> Result<DebugConsole> {
        let (config, id) = (self.config(), &ctx.spec.id);
        let live = self.running(id).ok_or_else(|| debug::not_running(id))?;
        let dir = state(ctx).machine_dir.unwrap_or_default();
        let place = debug::Place { sandbox: id, dir: &dir, patience: debug::CONNECT };
        debug::open(place, live.guest.clone(), &live.debugs, &config.guest, what).await
    }

    async fn steer_debug(
        &self,
        ctx: &SandboxContext,
        session: &str,
        what: DebugChange,
    ) -> Result<()> {
        let id = &ctx.spec.id;
        let live = self.running(id).ok_or_else(|| debug::not_running(id))?;
        debug::steer(&live.guest, session, what).await
    }

    async fn templates(&self, what: TemplateJob) -> Result<TemplateList> {
        let (templates, enabled) = (self.templates.clone(), self.config().template.enabled);
        let pool = self.pool.info();
        blocking(move || {
            let dir = templates.dir().to_owned();
            let work = templates.work(&what).map_err(|error| match error {
                crate::vmm::Error::Invalid(text) => Error::NotFound(text),
                other => Error::internal("templates", other),
            });
            Ok(TemplateList { enabled, dir, templates: work?, pool })
        })
        .await
    }

    async fn finish(&self) {
        self.pool.finish().await;
    }

    async fn metrics(&self, ctx: &SandboxContext) -> Result<(String, Vec<u8>)> {
        let state = state(ctx);
        let parent = &ctx.spec.config.linux.cgroup_parent;
        let path = if parent.is_empty() { state.machine_cgroup } else { Some(parent.clone()) };
        let path = path.ok_or_else(|| Error::FailedPrecondition("the pod has no cgroup".into()))?;
        let group = self.cgroups.group(&path).map_err(host("the pod's cgroup"))?;
        blocking(move || Ok(group.metrics())).await
    }

    async fn update(&self, ctx: &SandboxContext, fields: &[String]) -> Result<()> {
        const RESOURCES: &str = "podsandbox.UpdatedResourcesKey";
        self.servers.declare(ctx, fields).await?;
        if let Some(announced) = self.announced(&ctx.spec.id).filter(|_| announces(fields)) {
            let list = kuasar_daemon::tasks::announced(ctx)?;
            announced.settle(&list).await.map_err(task)?;
        }
        let wanted =
            fields.is_empty() || fields.iter().any(|field| field.starts_with("extensions"));
        if !wanted {
            return Ok(());
        }
        let Some((_, value)) = ctx.spec.extensions.get(RESOURCES) else { return Ok(()) };
        let resources = files::updated_resources(value)?;
        self.resize(ctx, &resources).await
    }
}
