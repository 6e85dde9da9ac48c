//! Pods of Linux namespaces: the [`Sandboxer`] behind the Controller, below it a [`Flavor`].
//!
//! A pod is a set of namespaces that nobody lives in. sandbox-parent makes them and keeps their
//! descriptors under `<sandbox>/ns/…`, the daemon holds duplicates. Only a shared PID namespace
//! needs a process, its init; its end is the pod's end.
//!
//! Everything of one sandbox that sandbox-parent keeps has a name that begins with the sandbox's
//! id: one `forget` removes it all.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::{
    PodServices, Recovered, SandboxContext, SandboxExit, SandboxSpec, Sandboxer, Started,
};
use kuasar_daemon::metrics::timed;
use kuasar_daemon::resident::Parts;
use kuasar_daemon::tasks::{TaskServers, Tasks};
use kuasar_host::cgroup::Layout;
use kuasar_host::namespace;
use kuasar_host::process::Identity;
use kuasar_oci::pod::{Modes, Pod};
use sandbox_parent::client::Parent;

use crate::files::{self, host};
use crate::flavor::{Choice, Flavor};
use crate::spaces::{Held, Names, Spaces, Wanted};
use crate::state::PodState;

/// How long engines that an earlier daemon has started may go on while this one starts.
const UNFINISHED: Duration = Duration::from_secs(2);

/// Makes and removes pods.
pub struct NamespaceSandboxer<F> {
    flavor: F,
    parent: Parent,
    spaces: Spaces,
    /// Whether sandbox-parent was started by this daemon and knows nothing of older pods.
    fresh: bool,
    cgroups: Arc<Layout>,
    dir: PathBuf,
    servers: Arc<TaskServers>,
}

impl<F: Flavor> NamespaceSandboxer<F> {
    /// A sandboxer of pods of this flavor, whose state is below `dir`.
    pub fn new(flavor: F, parts: &Parts, cgroups: Arc<Layout>, dir: PathBuf) -> Self {
        Self {
            flavor,
            parent: parts.parent.clone(),
            spaces: Spaces::new(parts.parent.clone()),
            fresh: parts.fresh,
            cgroups,
            dir,
            servers: parts.servers.clone(),
        }
    }

    fn insert(&self, ctx: &SandboxContext, pod: Pod, own: &serde_json::Value) -> Result<Tasks> {
        self.servers.make(ctx, self.flavor.runtime(Arc::new(pod), own)?)
    }

    /// Kills whatever is left of a pod, by the cgroups of its containers' records.
    async fn kill_leftovers(&self, dir: &Path, state: &PodState) {
        let (dir, layout, init) = (dir.to_owned(), self.cgroups.clone(), state.init);
        let work = move || {
            for path in container_cgroups(&dir) {
                if let Ok(group) = layout.group(&path) {
                    let _ = group.signal_all(libc::SIGKILL);
                }
            }
            // Only the process that was recorded, never another with its pid.
            if let Some((pid, start)) = init {
                Identity { pid, start }.kill();
            }
        };
        let _ = tokio::task::spawn_blocking(work).await;
    }

    /// Ends what runs of pods whose records are lost: in quarantine, or where they were when that
    /// is full. Only what the containers' own records name is touched, never what a pod of
    /// `known` names.
    async fn clear_lost(&self, known: &[String]) {
        let (dir, layout, known) = (self.dir.clone(), self.cgroups.clone(), known.to_vec());
        let work = move || {
            let held = known.iter().map(|id| dir.join("sandboxes").join(id));
            let held: Vec<String> = held.flat_map(|dir| container_cgroups(&dir)).collect();
            for lost in lost_dirs(&dir, &known) {
                match clear_lost_dir(&layout, &lost, &held) {
                    Ok(false) => {}
                    Ok(true) => tracing::warn!(
                        dir = %lost.display(),
                        "the containers of a pod whose record is lost were ended"
                    ),
                    Err(error) => tracing::error!(
                        dir = %lost.display(),
                        error = %error.chain(),
                        "a pod whose record is lost cannot be cleared"
                    ),
                }
            }
        };
        let _ = tokio::task::spawn_blocking(work).await;
    }

    /// Hostname and sysctls of a pod's namespaces, checked.
    fn names(&self, spec: &SandboxSpec, modes: Modes) -> Result<Names> {
        let unprivileged_ports = self.flavor.settings().unprivileged_ports;
        let hostname = files::hostname(&spec.config, modes)?;
        let sysctls = files::sysctls(&spec.config, modes, unprivileged_ports)?;
        Ok(Names { hostname, sysctls })
    }

    /// Makes and keeps a pod's namespaces; nothing for a flavor that has its own.
    async fn make_namespaces(
        &self,
        spec: &SandboxSpec,
        modes: Modes,
        netns: Option<&OwnedFd>,
        names: &Names,
    ) -> Result<Option<(u32, u64)>> {
        if !self.flavor.in_namespaces() {
            return Ok(None);
        }
        self.spaces.make(&Wanted { id: &spec.id, modes, netns, names }).await
    }

    /// The namespaces of a pod that an earlier daemon has created: kept, or else made anew.
    async fn take_again(
        &self,
        ctx: &SandboxContext,
        state: &mut PodState,
        modes: Modes,
    ) -> Result<Held> {
        let spec = &ctx.spec;
        let kept = self.spaces.kept(&spec.id, state.init.map_or(0, |(pid, _)| pid)).await?;
        if kept.is_whole(modes) {
            return Ok(kept);
        }
        self.spaces.kill_init(&spec.id).await;
        self.spaces.release(&spec.id).await?;
        let netns = open_netns(&spec.netns_path)?;
        let names = self.names(spec, modes)?;
        state.init = self.make_namespaces(spec, modes, netns.as_ref(), &names).await?;
        self.spaces
            .take(&spec.id)
            .ok_or_else(|| Error::Unavailable("the pod's namespaces were released".into()))
    }

    fn started(&self, ctx: &SandboxContext, pod: &Pod, own: &serde_json::Value) -> Started {
        let mut labels = BTreeMap::new();
        let options = &ctx.spec.config.linux.security_context.selinux_options;
        if [&options.user, &options.role, &options.type_, &options.level]
            .iter()
            .all(|part| !part.is_empty())
        {
            let label =
                format!("{}:{}:{}:{}", options.user, options.role, options.type_, options.level);
            labels.insert("selinux_label".into(), label);
        }
        if !ctx.spec.runtime.is_empty() {
            labels.insert("oci_runtime_type".into(), ctx.spec.runtime.clone());
        }
        let pid = match pod.namespaces.init {
            0 => self.flavor.pid(own),
            init => init,
        };
        Started { pid, labels, ..Started::default() }
    }

    async fn save(&self, ctx: &SandboxContext, state: &PodState) -> Result<()> {
        ctx.handle.save(value(state)?).await
    }

    fn stage(&self, ctx: &SandboxContext, state: &PodState) -> Result<()> {
        ctx.handle.stage(value(state)?)
    }
}

/// Reports the pod's end when the process of `pidfd` ends: the init of its shared PID namespace,
/// or one of the flavor's.
pub fn watch_end(ctx: &SandboxContext, pidfd: OwnedFd) {
    let handle = ctx.handle.clone();
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    let Ok(ready) = (unsafe { tokio::io::unix::AsyncFd::register(pidfd) }) else { return };
    tokio::spawn(async move {
        if ready.readable().await.is_ok() {
            handle.exited(SandboxExit { status: 137, at: SystemTime::now() });
        }
    });
}

/// `linux.cgroupsPath` of every recorded container.
fn container_cgroups(dir: &Path) -> Vec<String> {
    let containers = std::fs::read_dir(dir.join("containers")).into_iter().flatten().flatten();
    containers
        .filter_map(|entry| {
            let text = std::fs::read(entry.path().join("meta.json")).ok()?;
            let meta: serde_json::Value = serde_json::from_slice(&text).ok()?;
            meta.get("cgroup")?.as_str().map(str::to_owned)
        })
        .collect()
}

/// Directories of pods below `dir` that are not in `known`.
fn lost_dirs(dir: &Path, known: &[String]) -> Vec<PathBuf> {
    let list = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let unknown = list(dir.join("sandboxes"))
        .filter(|entry| known.iter().all(|id| entry.file_name().to_str() != Some(id)));
    list(dir.join("quarantine")).chain(unknown).map(|entry| entry.path()).collect()
}

/// Kills the processes of a lost pod's containers, and removes their cgroups and mounts, and the
/// pod's own cgroup; `held` are cgroups of others. Answers whether there was anything. What is done
/// is noted by the names of the containers' records.
fn clear_lost_dir(layout: &Layout, dir: &Path, held: &[String]) -> Result<bool> {
    let paths: Vec<String> =
        container_cgroups(dir).into_iter().filter(|path| !held.contains(path)).collect();
    let groups: Vec<_> = paths.iter().filter_map(|path| layout.group(path).ok()).collect();
    for group in &groups {
        let _ = group.signal_all(libc::SIGKILL);
    }
    for group in &groups {
        group.remove(Duration::from_secs(5)).map_err(host("remove a container's cgroup"))?;
    }
    files::remove_noted_cgroup(layout, dir, held)?;
    for rootfs in container_rootfs(dir) {
        kuasar_host::mount::unmount_below(&rootfs).map_err(host("unmount a rootfs"))?;
    }
    kuasar_host::mount::unmount_below(dir).map_err(host("unmount the pod's shm"))?;
    for entry in std::fs::read_dir(dir.join("containers")).into_iter().flatten().flatten() {
        let record = entry.path().join("meta.json");
        // A later container may have the same cgroup: this one is not to be killed again.
        let _ = std::fs::rename(&record, record.with_file_name("meta.cleared.json"));
    }
    Ok(!groups.is_empty())
}

fn state(ctx: &SandboxContext) -> PodState {
    serde_json::from_value(ctx.state.clone()).unwrap_or_default()
}

fn value(state: &PodState) -> Result<serde_json::Value> {
    serde_json::to_value(state).map_err(|error| Error::internal("record the pod", error))
}

fn open_netns(path: &str) -> Result<Option<OwnedFd>> {
    if path.is_empty() {
        return Ok(None);
    }
    namespace::open(Path::new(path)).map(Some).map_err(|error| {
        Error::FailedPrecondition(format!(
            "the pod's network namespace {path} is not usable: {error}"
        ))
    })
}

#[async_trait]
impl<F: Flavor> Sandboxer for NamespaceSandboxer<F> {
    async fn create(&self, ctx: &SandboxContext) -> Result<()> {
        let spec = ctx.spec.clone();
        let modes = Modes::of(&spec.config, &spec.netns_path);
        let netns = open_netns(&spec.netns_path)?;
        let names = self.names(&spec, modes)?;
        files::check_userns(&spec.config, &spec.netns_path)?;
        let Choice { engine, own } = self.flavor.choose(&spec).await?;
        let own_cgroup = files::missing_cgroup(&self.cgroups, &spec.config)?;
        let mut state = PodState { engine, own_cgroup, own, ..PodState::default() };
        if state.own_cgroup.is_some() {
            // On disk before it is made: a daemon that is killed now leaves nothing behind.
            self.save(ctx, &state).await?;
        }
        let (dir, shm_size) = (ctx.dir.clone(), self.flavor.settings().shm_size);
        let (layout, spec_of_files, spec_of_cgroup) =
            (self.cgroups.clone(), spec.clone(), spec.clone());
        let noted_in = ctx.dir.clone();
        let wanted = state.own_cgroup.is_some();
        // All three wait for the kernel, each for another part of it: side by side.
        // The namespaces come first: sandbox-parent is at work while threads start here.
        let (init, cgroup, files) = tokio::join!(
            timed("pod_namespaces", self.make_namespaces(&spec, modes, netns.as_ref(), &names)),
            timed("pod_cgroup", async {
                match wanted {
                    true => {
                        blocking(move || {
                            let config = &spec_of_cgroup.config;
                            let made = files::create_cgroup(&layout, config)?;
                            if made {
                                files::note_cgroup(&noted_in, &config.linux.cgroup_parent)?;
                            }
                            Ok(made)
                        })
                        .await
                    }
                    false => Ok(false),
                }
            }),
            timed(
                "pod_files",
                blocking(move || {
                    files::write_etc(&dir, &spec_of_files.config, modes)?;
                    if modes.host_ipc { Ok(()) } else { files::mount_shm(&dir, shm_size) }
                })
            ),
        );
        if let Ok(false) = cgroup {
            // It was there, or somebody else has made it meanwhile.
            state.own_cgroup = None;
        }
        if let Ok(init) = &init {
            state.init = *init;
        }
        // The Controller records it with its answer; and what has failed is removed by it.
        self.stage(ctx, &state)?;
        init.and(cgroup).and(files)
    }

    async fn start(&self, ctx: &SandboxContext) -> Result<Started> {
        let spec = ctx.spec.clone();
        let mut state = state(ctx);
        let modes = Modes::of(&spec.config, &spec.netns_path);
        // It may have gone since Create, and containers enter it by its path.
        open_netns(&spec.netns_path)?;
        // Not earlier: for engines the first move holds up every mkdir of a cgroup.
        self.flavor.expect_containers(&state.engine);
        let Held { namespaces, init } = match self.spaces.take(&spec.id) {
            Some(held) => held,
            None if !self.flavor.in_namespaces() => Held::default(),
            None => self.take_again(ctx, &mut state, modes).await?,
        };
        state.started = true;
        let pod = Pod {
            id: spec.id.clone(),
            dir: ctx.dir.clone(),
            netns: spec.netns_path.clone(),
            modes,
            engine: state.engine.clone(),
            namespaces,
        };
        // Also of a failed one: `down` is to find what there is.
        let up = self.flavor.up(ctx, &pod, &mut state.own).await;
        self.stage(ctx, &state)?;
        up?;
        let started = self.started(ctx, &pod, &state.own);
        self.insert(ctx, pod, &state.own)?;
        if let Some(pidfd) = init {
            watch_end(ctx, pidfd);
        }
        Ok(started)
    }

    async fn services(&self, ctx: &SandboxContext) -> Result<PodServices> {
        match self.servers.get(&ctx.spec.id) {
            Some(tasks) => Ok(tasks.server().services()),
            None => Err(Error::NotFound(format!("sandbox {} is not running", ctx.spec.id))),
        }
    }

    async fn stop(&self, ctx: &SandboxContext, timeout: Duration) -> Result<()> {
        let state = state(ctx);
        let stopped = match self.servers.get(&ctx.spec.id) {
            Some(tasks) => tasks.stop(timeout).await,
            None => Ok(()),
        };
        self.kill_leftovers(&ctx.dir, &state).await;
        let down = self.flavor.down(ctx, &state.own).await;
        // The engine tears the network down when this has succeeded, and repeats it otherwise.
        stopped?;
        down?;
        self.spaces.release(&ctx.spec.id).await
    }

    async fn remove(&self, ctx: &SandboxContext) -> Result<()> {
        let state = state(ctx);
        let tasks = self.servers.take(&ctx.spec.id);
        drop(self.spaces.take(&ctx.spec.id));
        if state.init.is_none() && Modes::of(&ctx.spec.config, &ctx.spec.netns_path).shared_pid {
            // A daemon that was killed in Create may not have recorded it.
            self.spaces.kill_init(&ctx.spec.id).await;
        }
        self.kill_leftovers(&ctx.dir, &state).await;
        if let Some(tasks) = &tasks {
            tasks.remove().await;
        }
        self.flavor.down(ctx, &state.own).await?;
        self.flavor.removed(ctx, &state.own).await?;
        let (dir, layout) = (ctx.dir.clone(), self.cgroups.clone());
        blocking(move || {
            for path in container_cgroups(&dir) {
                if let Ok(group) = layout.group(&path) {
                    group
                        .remove(Duration::from_secs(5))
                        .map_err(host("remove a container's cgroup"))?;
                }
            }
            for rootfs in container_rootfs(&dir) {
                kuasar_host::mount::unmount_below(&rootfs).map_err(host("unmount a rootfs"))?;
            }
            kuasar_host::mount::unmount_below(&dir).map_err(host("unmount the pod's shm"))?;
            if let Some(path) = &state.own_cgroup {
                let group = layout.group(path).map_err(host("the pod's cgroup"))?;
                group.remove(Duration::from_secs(5)).map_err(host("remove the pod's cgroup"))?;
            }
            Ok(())
        })
        .await?;
        self.parent
            .forget(&format!("{}/", ctx.spec.id))
            .await
            .map_err(|error| Error::internal("release what is kept for the pod", error))
    }

    async fn recover(&self, ctx: &SandboxContext) -> Result<Recovered> {
        let state = state(ctx);
        let id = &ctx.spec.id;
        let modes = Modes::of(&ctx.spec.config, &ctx.spec.netns_path);
        let held = self.spaces.kept(id, state.init.map_or(0, |(pid, _)| pid)).await?;
        let whole = !self.flavor.in_namespaces() || held.is_whole(modes);
        let lost = match (self.fresh, state.started, whole) {
            (true, ..) => Some("sandbox-parent has been lost"),
            (_, false, _) => Some("it was never started"),
            (_, _, false) => Some("its namespaces are gone"),
            _ => None,
        };
        let Held { namespaces, init } = held;
        let pod = Pod {
            id: id.clone(),
            dir: ctx.dir.clone(),
            netns: ctx.spec.netns_path.clone(),
            modes,
            engine: state.engine.clone(),
            namespaces,
        };
        let lives = self.flavor.recovered(ctx, &pod, &state.own, lost.is_none()).await?;
        let lost = lost.or((!lives).then_some("what runs its containers has ended"));
        if lost.is_some() {
            self.kill_leftovers(&ctx.dir, &state).await;
        }
        let started = self.started(ctx, &pod, &state.own);
        // Also of a pod that is stopped or lost: containerd asks how its containers have ended,
        // and deletes them.
        let tasks = self.insert(ctx, pod, &state.own)?;
        tasks.server().recover().await;
        if let Some(why) = lost {
            tracing::debug!(sandbox = id, why, "the pod is down");
            return Ok(Recovered::Stopped(SandboxExit { status: 255, at: SystemTime::now() }));
        }
        if let Some(pidfd) = init {
            watch_end(ctx, pidfd);
        }
        Ok(Recovered::Running(started))
    }

    async fn remove_orphans(&self, known: &[String]) -> Result<()> {
        let names = self
            .parent
            .kept()
            .await
            .map_err(|error| Error::internal("ask sandbox-parent what it keeps", error))?;
        let mut strangers: Vec<&str> = names
            .iter()
            .filter_map(|name| name.split_once('/').map(|(id, _)| id))
            .filter(|id| *id != kuasar_daemon::sockets::OWN_GROUP)
            .filter(|id| known.iter().all(|known| known != id))
            .collect();
        strangers.dedup();
        for id in strangers {
            tracing::info!(sandbox = id, "removing what a lost pod has left");
            self.spaces.kill_init(id).await;
            self.flavor.orphaned(id).await;
            let _ = self.parent.forget(&format!("{id}/")).await;
        }
        self.clear_lost(known).await;
        // A pod that has a journal and was not taken up is a newer version's.
        let others = known.iter().any(|id| {
            let journal = self.dir.join("sandboxes").join(id).join("tasks");
            self.servers.get(id).is_none()
                && std::fs::read_dir(journal).is_ok_and(|mut entries| entries.next().is_some())
        });
        self.servers.sweep(UNFINISHED, others).await?;
        self.flavor.swept(known).await;
        let (dir, known) = (self.dir.clone(), known.to_vec());
        blocking(move || files::unmount_lost(&dir, &known)).await
    }

    async fn info(&self, ctx: &SandboxContext) -> Result<BTreeMap<String, String>> {
        let state = state(ctx);
        let modes = Modes::of(&ctx.spec.config, &ctx.spec.netns_path);
        let mut value = serde_json::json!({
            "engine": state.engine,
            "initPid": state.init.map(|(pid, _)| pid),
            "hostNetwork": modes.host_network, "hostIPC": modes.host_ipc, "hostPID": modes.host_pid,
            "sharedPID": modes.shared_pid,
            "sandboxParent": self.parent.pid(),
        });
        if let Some(members) = value.as_object_mut() {
            members.append(&mut self.flavor.info(ctx, &state.own).await);
        }
        Ok(BTreeMap::from([(self.flavor.name().to_owned(), value.to_string())]))
    }

    async fn metrics(&self, ctx: &SandboxContext) -> Result<(String, Vec<u8>)> {
        let path = &ctx.spec.config.linux.cgroup_parent;
        if path.is_empty() {
            return Err(Error::FailedPrecondition(
                "the pod has no cgroup_parent to measure".into(),
            ));
        }
        let group = self.cgroups.group(path).map_err(host("cgroup_parent"))?;
        blocking(move || Ok(group.metrics())).await
    }

    async fn update(&self, ctx: &SandboxContext, fields: &[String]) -> Result<()> {
        const RESOURCES: &str = "podsandbox.UpdatedResourcesKey";
        self.servers.declare(ctx, fields).await?;
        let wanted =
            fields.is_empty() || fields.iter().any(|field| field.starts_with("extensions"));
        if !wanted {
            return Ok(());
        }
        let Some((_, value)) = ctx.spec.extensions.get(RESOURCES) else { return Ok(()) };
        let path = &ctx.spec.config.linux.cgroup_parent;
        if path.is_empty() {
            return Ok(());
        }
        let resources = files::updated_resources(value)?;
        let group = self.cgroups.group(path).map_err(host("cgroup_parent"))?;
        blocking(move || {
            group.update(resources.to_string().as_bytes()).map_err(host("update the pod's cgroup"))
        })
        .await
    }
}

fn container_rootfs(dir: &Path) -> Vec<PathBuf> {
    let containers = std::fs::read_dir(dir.join("containers")).into_iter().flatten().flatten();
    containers
        .filter_map(|entry| {
            let text = std::fs::read(entry.path().join("meta.json")).ok()?;
            let meta: serde_json::Value = serde_json::from_slice(&text).ok()?;
            meta.get("rootfs")?.as_str().map(PathBuf::from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_pod_is_one_in_quarantine_or_unknown_and_is_cleared_once() {
        let dir = tempfile::tempdir().unwrap();
        let container = |pod: &str| {
            let dir = dir.path().join(pod).join("containers/c");
            std::fs::create_dir_all(&dir).unwrap();
            let text = r#"{"cgroup": "/kuasar-test-nowhere/c", "rootfs": "/nowhere/rootfs"}"#;
            std::fs::write(dir.join("meta.json"), text).unwrap();
        };
        ["sandboxes/good", "sandboxes/stays", "quarantine/torn-0"].into_iter().for_each(container);
        let known = ["good".to_owned()];
        let mut lost = lost_dirs(dir.path(), &known);
        lost.sort();
        let at = |name: &str| dir.path().join(name);
        assert_eq!(lost, [at("quarantine/torn-0"), at("sandboxes/stays")]);
        let Ok(layout) = Layout::detect() else { return };
        let held = container_cgroups(&at("sandboxes/good"));
        assert!(!clear_lost_dir(&layout, &at("sandboxes/stays"), &held).unwrap());
        assert!(clear_lost_dir(&layout, &at("quarantine/torn-0"), &[]).unwrap());
        assert!(!clear_lost_dir(&layout, &at("quarantine/torn-0"), &[]).unwrap());
    }

    #[test]
    fn the_cgroup_that_was_made_for_a_lost_pod_goes_and_no_other() {
        let Ok(layout) = Layout::detect() else { return };
        let root = format!("/kuasar-pod-test-{}", std::process::id());
        let group = |name: &str| layout.group(&format!("{root}/{name}")).unwrap();
        let all = ["ours", "kubelets", "shared", "shared/other"];
        if let Err(error) = all.iter().try_for_each(|name| group(name).create().map(drop)) {
            return eprintln!("skipped: cgroups are not writable here: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let lost = |name: &str, noted: bool| {
            let container = dir.path().join(name).join("containers/c");
            std::fs::create_dir_all(&container).unwrap();
            let meta = serde_json::json!({ "cgroup": format!("{root}/{name}/c") });
            std::fs::write(container.join("meta.json"), meta.to_string()).unwrap();
            if noted {
                files::note_cgroup(&dir.path().join(name), &format!("{root}/{name}")).unwrap();
            }
            let held = [format!("{root}/shared/other")];
            clear_lost_dir(&layout, &dir.path().join(name), &held).map(|_| group(name).exists())
        };
        let stays = [lost("ours", true), lost("kubelets", false), lost("shared", true)];
        let root = layout.group(&root).unwrap();
        let parent = root.exists();
        root.remove(Duration::from_secs(5)).unwrap();
        assert_eq!(stays.map(Result::unwrap), [false, true, true]);
        assert!(parent, "what is above the pod's group is not its own");
    }
}
