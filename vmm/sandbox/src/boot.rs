//! A pod's machine, from its description to its agent's first word: booted cold, or copied from a
//! template ([`crate::template`]).

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::SandboxContext;
use kuasar_host::cgroup::Cgroup;
use kuasar_pod::files::host;
use tokio::sync::watch;
use vmm_common::guest as wire;
use vmm_common::port;

use crate::config::{Config, RootImage};
use crate::drivers::{Hybrid, uds};
use crate::errors::{chain, machine};
use crate::guest::service;
use crate::network::Plan;
use crate::sandboxer::{CGROUP, PodState, VmmSandboxer};
use crate::share::ShareTree;
use crate::template;
use crate::vmm::{
    self, Boot, Channel, Console, Disk, DiskFormat, Feature, Features, Launcher, Nic, Range, Root,
    Share, ShareKind, Vm, VmSpec, Vmm,
};

/// Context id of guests whose vsock is their own unix sockets: it tells nobody apart.
const CID: u32 = 3;
/// A pod's console log, in its state directory.
pub(crate) const CONSOLE: &str = "console.log";
/// Characters of a guest's console in an error.
const CONSOLE_TAIL: usize = 400;

/// What a guest said last, or from the words on with which its kernel gave up: what comes behind
/// them are addresses.
fn last_words(log: &Path) -> String {
    let said = vmm::console::tail(log, 8 * CONSOLE_TAIL);
    match said.find("Kernel panic").and_then(|at| said.get(at..)) {
        Some(panic) => panic.chars().take(CONSOLE_TAIL).collect(),
        None => vmm::console::tail(log, CONSOLE_TAIL),
    }
}

/// Whether pods can be machines of this VMM; said before anything is made.
pub(crate) fn serves_pods(driver: &dyn Vmm) -> Result<()> {
    let missing = [
        (Feature::Virtiofs, "it has no shared directories, and a pod's volumes and files need one"),
        (
            Feature::HybridVsock,
            "it has no vsock as unix sockets, over which the daemon talks to agents",
        ),
    ];
    match missing.into_iter().find(|(feature, _)| !driver.features().has(*feature)) {
        None => Ok(()),
        Some((_, why)) => Err(Error::Unimplemented(format!(
            "{} runs no pods yet: {why}; use vmm = \"qemu\" or \"cloud-hypervisor\" for this \
             runtime class",
            driver.name()
        ))),
    }
}

/// The template of a machine: its name, and where it is when there is one.
struct Template {
    key: String,
    dir: Option<PathBuf>,
}

impl VmmSandboxer {
    /// The machine of a pod.
    #[allow(clippy::too_many_arguments)] // all that a machine is made of
    fn vm_spec(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        features: Features,
        dir: &Path,
        netns: Option<Arc<OwnedFd>>,
        nics: Vec<Nic>,
        cgroup: &Cgroup,
    ) -> Result<VmSpec> {
        let images = config.guest.find().map_err(Error::FailedPrecondition)?;
        let root = match images.root {
            RootImage::Initrd(path) => Root::Initrd(path),
            RootImage::Erofs(path) => Root::Image {
                disk: Disk::open("root", &path, DiskFormat::Raw, true).map_err(machine)?,
                fstype: "erofs".into(),
            },
        };
        let linux = &ctx.spec.config.linux;
        let resources = linux.resources.as_ref().cloned().unwrap_or_default();
        let (cpus, memory) = config.size.of(
            resources.cpu_quota,
            resources.cpu_period,
            resources.memory_limit_in_bytes,
        );
        let (more_cpus, more_memory) = config.size.growth(cpus, memory);
        let range = |feature, range: Range| {
            if features.has(feature) { range } else { Range::fixed(range.at_boot) }
        };
        Ok(VmSpec {
            id: ctx.spec.id.clone(),
            dir: dir.to_owned(),
            cpus: range(Feature::CpuResize, more_cpus),
            memory_mib: range(Feature::MemoryResize, more_memory),
            hugepages: config.size.hugepages,
            boot: Boot { kernel: images.kernel, root, params: config.guest.params.clone() },
            shares: vec![Share {
                tag: vmm_common::SHARE_TAG.into(),
                dir: ShareTree::new(&ctx.dir).served(),
                kind: ShareKind::Virtiofs,
                read_only: false,
            }],
            nics,
            disks: Vec::new(),
            channel: Channel::HybridVsock { cid: CID, uds: uds(dir) },
            entropy: true,
            console: Console { log: ctx.dir.join(CONSOLE), limit: config.guest.console_bytes },
            netns,
            cgroups: cgroup.entrances(),
        })
    }

    /// Starts the machine of a pod whose taps are there, up to the agent's answer.
    pub(crate) async fn boot(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        state: &mut PodState,
        netns: Option<Arc<OwnedFd>>,
        nics: Vec<Nic>,
        plan: &Plan,
    ) -> Result<u32> {
        let kind = config
            .vmm_of(&ctx.spec.runtime, &ctx.spec.config.annotations)
            .map_err(Error::InvalidArgument)?
            .kind();
        let (driver, launcher) = self.vmm(config, kind, state.user)?;
        let cgroup = state.machine_cgroup.clone().unwrap_or_default();
        let cgroup = self.cgroups.group(&cgroup).map_err(host("the machine's cgroup"))?;
        let made = cgroup.clone();
        blocking(move || made.create().map(drop).map_err(host("make the machine's cgroup")))
            .await?;
        let dir = state.machine_dir.clone().unwrap_or_default();
        if let Some(parent) = dir.parent() {
            kuasar_host::record::private_dir(parent)
                .map_err(host("make the machines' directory"))?;
        }
        kuasar_host::record::private_dir(&dir).map_err(host("make the machine's directory"))?;
        let spec = self.vm_spec(ctx, config, driver.features(), &dir, netns, nics, &cgroup)?;
        let template = self.template(config, &driver, &spec).await;
        let copied = match &template {
            Some(Template { key, dir: Some(saved) }) => {
                let copy = self.attempt(ctx, config, state, &driver, &launcher, &spec, Some(saved));
                match copy.await {
                    Ok(running) => Some(running),
                    Err(error) => {
                        tracing::warn!(sandbox = ctx.spec.id, error = %error.chain(),
                            "no copy of the template: the pod boots cold");
                        self.templates.reject(key);
                        None
                    }
                }
            }
            _ => None,
        };
        let (vm, token) = match copied {
            Some(running) => running,
            None => self.attempt(ctx, config, state, &driver, &launcher, &spec, None).await?,
        };
        if let Some(Template { key, dir: None }) = template {
            self.make_template(config, kind, &spec, key);
        }
        // The machine has its own copies; ours would keep the taps.
        drop(spec);
        let gone = watch::channel(false);
        let pid = vm.pid();
        let dial = Arc::new(Hybrid(uds(&dir)));
        let (_tasks, guest) = self.insert(ctx, config, vm, token, dial, gone)?;
        let begun = Instant::now();
        let question = Self::setup(ctx, config, plan)?;
        let limit = Some(config.guest_timeouts.create);
        let answer: wire::SetupResponse =
            guest.call_for(service::GUEST, "Setup", &question, limit).await?;
        if answer.task_port != question.task_port {
            return Err(Error::FailedPrecondition(
                "the guest's agent serves no engines: use the guest image that came with this \
                 daemon, or task_endpoint = \"host\""
                    .into(),
            ));
        }
        if question.task_port != 0 {
            self.prepare_announced(&ctx.spec.id);
        }
        kuasar_daemon::metrics::observe("guest_setup", begun.elapsed());
        self.follow_network(ctx, Some(plan.network.clone()));
        Ok(pid)
    }

    /// Starts a machine, cold or from what was `saved`, and welcomes its agent. Answers it with
    /// the agent's token; a copy that fails leaves nothing, so that another attempt may follow.
    #[allow(clippy::too_many_arguments)] // one step of `boot`, taken once or twice
    async fn attempt(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        state: &mut PodState,
        driver: &Arc<dyn Vmm>,
        launcher: &Launcher,
        spec: &VmSpec,
        saved: Option<&Path>,
    ) -> Result<(Arc<dyn Vm>, String)> {
        let uds = uds(&spec.dir);
        let ready = vmm::vsock::bind(&uds, port::READY, launcher.owner()).map_err(machine)?;
        let begun = Instant::now();
        let vm = match saved {
            Some(saved) => driver.restore(spec, saved).await,
            None => driver.spawn(spec).await,
        };
        let vm = vm.map_err(machine)?;
        let what = if saved.is_some() { "vmm_restore" } else { "vmm_spawn" };
        kuasar_daemon::metrics::observe(what, begun.elapsed());
        state.vm = Some(vm.state());
        self.save(ctx, state).await?;
        let begun = Instant::now();
        let limit = match saved {
            Some(_) => config.template.ready,
            None => config.guest_timeouts.boot,
        };
        let welcomed = tokio::select! {
            biased;
            ended = vm.wait() => Err(Error::FailedPrecondition(format!(
                "the machine ended before its guest was ready ({})",
                match ended {
                    Ok(exit) => format!("status {}", exit.status),
                    Err(error) => error.to_string(),
                }
            ))),
            ready = crate::guest::welcome(&ready, &ctx.spec.id, limit) => ready.map_err(Error::from),
        };
        let (agent, token) = match welcomed {
            Ok(welcomed) => welcomed,
            Err(error) => {
                if saved.is_some() {
                    vm.stop(Duration::ZERO).await.map_err(machine)?;
                    vm.release().await;
                    state.vm = None;
                    self.save(ctx, state).await?;
                }
                let said = last_words(&ctx.dir.join(CONSOLE));
                let text = format!("{}; its console: {said:?}", error.chain());
                return Err(match error {
                    Error::FailedPrecondition(_) => Error::FailedPrecondition(text),
                    Error::DeadlineExceeded(_) => Error::DeadlineExceeded(text),
                    _ => Error::FailedPrecondition(text),
                });
            }
        };
        kuasar_daemon::metrics::observe("guest_boot", begun.elapsed());
        tracing::debug!(sandbox = ctx.spec.id, kernel = agent.kernel_release,
            agent = agent.agent_version, template = saved.is_some(), took = ?begun.elapsed(),
            "the guest serves");
        state.token.clone_from(&token);
        self.save(ctx, state).await?;
        Ok((vm, token))
    }

    /// The template for a machine like `spec`, where there are templates.
    async fn template(
        &self,
        config: &Config,
        driver: &Arc<dyn Vmm>,
        spec: &VmSpec,
    ) -> Option<Template> {
        let features = driver.features();
        // What a template does not have is plugged in after its copy has begun to run.
        let able = features.has(Feature::Snapshot) && features.has(Feature::NicHotplug);
        if !config.template.enabled || !able {
            return None;
        }
        let (templates, driver, spec) = (self.templates.clone(), driver.clone(), spec.clone());
        let found = blocking(move || {
            let key = templates.key(&*driver, &spec).map_err(machine)?;
            Ok(Template { dir: templates.find(&key), key })
        });
        match found.await {
            Ok(found) => Some(found),
            Err(error) => {
                tracing::warn!(error = %error.chain(), "pods start without templates");
                None
            }
        }
    }

    /// Makes a template in the background, unless one is being made.
    fn make_template(&self, config: &Config, kind: vmm::Kind, spec: &VmSpec, key: String) {
        let Some(turn) = self.templates.turn(&key) else { return };
        // Not the pod's user: it is another machine, and it may outlive the pod.
        let name = format!("{}{key}", template::PREFIX);
        let driver = self.user(&name, config).and_then(|user| self.vmm(config, kind, user));
        let driver = match driver {
            Ok((driver, _)) => driver,
            Err(error) => return tracing::warn!(error = %error.chain(), "no template"),
        };
        let dir = self.template_dir(&key);
        let group = match self.cgroups.group(&self.template_cgroup()) {
            Ok(group) => group,
            Err(error) => return tracing::warn!(%error, "no cgroup for a template"),
        };
        let spec = template::machine(spec, &key, &dir, group.entrances());
        let (limit, most) = (config.guest_timeouts.boot, config.template.most);
        let (templates, users) = (self.templates.clone(), self.users.clone());
        tokio::spawn(async move {
            let _turn = turn;
            let begun = Instant::now();
            let made = async {
                group.create().map_err(vmm::Error::from)?;
                kuasar_host::record::private_dir(&dir)?;
                templates.make(&*driver, &spec, &key, limit, most).await
            };
            match made.await {
                Ok(()) => tracing::info!(key, took = ?begun.elapsed(), "a template is ready"),
                Err(error) => {
                    tracing::warn!(key, error = chain(&error), "no template: pods boot cold")
                }
            }
            let _ = std::fs::remove_dir_all(&dir);
            let removed = tokio::task::spawn_blocking(move || group.remove(CGROUP)).await;
            if !matches!(removed, Ok(Ok(()))) {
                tracing::warn!("the cgroup of a template's machine is left");
            }
            users.release(&name);
        });
    }

    fn template_dir(&self, key: &str) -> PathBuf {
        self.dir.join("vm").join(format!("t-{}", key.get(..8).unwrap_or(key)))
    }

    /// One for each state directory: two daemons on a host do not end each other's machines.
    fn template_cgroup(&self) -> String {
        let dir = self.dir.to_string_lossy().replace('/', "_");
        format!("/kuasar-vmm/template{dir}")
    }

    /// Ends and removes what a daemon that died while it made a template has left.
    pub(crate) fn sweep_templates(&self) -> Result<()> {
        self.templates.sweep();
        let group =
            self.cgroups.group(&self.template_cgroup()).map_err(host("the templates' cgroup"))?;
        if group.exists() {
            let _ = group.signal_all(libc::SIGKILL);
            group.remove(CGROUP).map_err(host("remove the templates' cgroup"))?;
        }
        let dirs = std::fs::read_dir(self.dir.join("vm")).into_iter().flatten().flatten();
        for entry in dirs.filter(|entry| entry.file_name().to_string_lossy().starts_with("t-")) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::cloud_hypervisor::CloudHypervisor;
    use crate::vmm::firecracker::Firecracker;
    use crate::vmm::process::Local;
    use crate::vmm::qemu::Qemu;
    use crate::vmm::stratovirt::StratoVirt;

    #[tokio::test]
    async fn a_vmm_that_cannot_hold_pods_is_refused_with_the_reason() {
        let launcher = || Launcher::new(Arc::new(Local::new().unwrap()), None);
        serves_pods(&Qemu::new(Default::default(), Default::default(), launcher())).unwrap();
        let hypervisor = CloudHypervisor::new(Default::default(), Default::default(), launcher());
        serves_pods(&hypervisor).unwrap();
        let firecracker = Firecracker::new(Default::default(), launcher());
        let stratovirt = StratoVirt::new(Default::default(), Default::default(), launcher());
        let refused: [(&dyn Vmm, _); 2] =
            [(&firecracker, "no shared directories"), (&stratovirt, "no vsock as unix sockets")];
        for (driver, why) in refused {
            let error = serves_pods(driver).unwrap_err();
            assert!(matches!(&error, Error::Unimplemented(text) if text.contains(why)), "{error}");
        }
    }
}
