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

use crate::channel;
use crate::config::{Config, ShareBy};
use crate::drivers;
use crate::errors::machine;
use crate::growth::huge_of;
use crate::guest::service;
use crate::images::RootImage;
use crate::making::Template;
use crate::network::{Plan, Taps};
use crate::nics;
use crate::sandboxer::{PodState, VmmSandboxer};
use crate::share::ShareTree;
use crate::vmm::{
    self, Boot, Channel, Console, CopyNics, Disk, DiskFormat, Feature, Features, Launcher, Nic,
    Range, Root, Share, Vm, VmSpec, Vmm,
};

/// A pod's console log, in its state directory.
pub(crate) const CONSOLE: &str = "console.log";
/// Characters of a guest's console in an error.
const CONSOLE_TAIL: usize = 400;

/// What a guest said last, or [`panic_words`].
fn last_words(log: &Path) -> String {
    panic_words(log).unwrap_or_else(|| vmm::console::tail(log, CONSOLE_TAIL))
}

/// The words with which a guest's kernel gave up, if they are among the last of its console, and what
/// comes behind them: mostly addresses.
pub(crate) fn panic_words(log: &Path) -> Option<String> {
    let said = vmm::console::tail(log, 8 * CONSOLE_TAIL);
    let panic = said.find("Kernel panic").and_then(|at| said.get(at..))?;
    Some(panic.chars().take(CONSOLE_TAIL).collect())
}

/// How files reach the pods of a VMM: as configured, or not at all where it has no shares.
pub(crate) fn share_of(features: Features, configured: ShareBy) -> ShareBy {
    match [Feature::Virtiofs, Feature::Ninep].iter().any(|by| features.has(*by)) {
        true => configured,
        false => ShareBy::None,
    }
}

/// The same by a configuration: whether root file systems are shared apart.
pub(crate) fn files_by(features: Features, config: &Config) -> ShareBy {
    let by = share_of(features, config.share);
    let apart = config.helpers.root_cache != config.helpers.cache;
    if by == ShareBy::Virtiofs && apart { ShareBy::Roots } else { by }
}

/// Whether pods can be machines of this VMM; said before anything is made.
pub(crate) fn serves_pods(driver: &dyn Vmm, configured: ShareBy) -> Result<()> {
    let lacks = |feature| !driver.features().has(feature);
    let why = match share_of(driver.features(), configured) {
        ShareBy::Virtiofs if lacks(Feature::Virtiofs) => {
            "it has no virtiofs, which the configuration wants"
        }
        ShareBy::Ninep if lacks(Feature::Ninep) => {
            "it serves no files by 9p, which the configuration wants"
        }
        // Its containers' root file systems are disks.
        ShareBy::None if lacks(Feature::DiskHotplug) => {
            let why = driver.cannot(Feature::DiskHotplug);
            return Err(Error::Unimplemented(format!("pods without a share need disks: {why}")));
        }
        _ => return channel::serves(driver),
    };
    Err(Error::Unimplemented(format!(
        "{} runs no pods yet: {why}; use vmm = \"qemu\" or \"cloud-hypervisor\" for this runtime class",
        driver.name()
    )))
}

/// A machine of this size, with a share and its agent's channel, and nothing yet of a pod's.
pub(crate) fn plain(
    config: &Config,
    driver: &dyn Vmm,
    (id, dir): (String, &Path),
    (cpus, memory): (u32, u32),
    share: PathBuf,
    console: PathBuf,
    cgroups: Vec<PathBuf>,
) -> Result<VmSpec> {
    let features = driver.features();
    let images = config.images(driver.kind()).map_err(Error::FailedPrecondition)?;
    let root = match images.root {
        RootImage::Initrd(path) => Root::Initrd(path),
        RootImage::Erofs(path) => Root::Image {
            disk: Disk::open("root", &path, DiskFormat::Raw, true).map_err(machine)?,
            fstype: "erofs".into(),
        },
    };
    let by = files_by(features, config);
    // All of the same tree.
    let tree = |(tag, _): &(&str, _)| {
        let roots = *tag == vmm_common::ROOTS_TAG;
        let cache = if roots { config.helpers.root_cache } else { config.helpers.cache };
        let (tag, dir) = ((*tag).to_owned(), share.clone());
        by.kind().map(|kind| Share { tag, dir, kind, read_only: false, cache })
    };
    let (more_cpus, more_memory) = config.size.growth(cpus, memory);
    let range = |feature, range: Range| {
        if features.has(feature) { range } else { Range::fixed(range.at_boot) }
    };
    Ok(VmSpec {
        id,
        dir: dir.to_owned(),
        cpus: range(Feature::CpuResize, more_cpus),
        memory_mib: range(Feature::MemoryResize, more_memory),
        hugepages: config.size.hugepages,
        boot: Boot { kernel: images.kernel, root, params: config.guest.kernel_params() },
        shares: by.shares().iter().filter_map(tree).collect(),
        nics: Vec::new(),
        disks: Vec::new(),
        // The driver's affair: see [`channel::give`].
        channel: Channel::None,
        entropy: true,
        console: Console { log: console, limit: config.guest.console_bytes },
        netns: None,
        cgroups,
    })
}

/// A machine whose agent has its token.
pub(crate) struct Running {
    pub vm: Arc<dyn Vm>,
    pub token: String,
    /// Its directory.
    pub dir: PathBuf,
    /// CPUs that it was given since its kernel booted, all together: the guest has to use them.
    pub cpus: Option<u32>,
    /// Its NIC is that of its template, as its guest sees it.
    pub saved_nic: bool,
}

impl VmmSandboxer {
    fn kind_of(ctx: &SandboxContext, config: &Config) -> Result<vmm::Kind> {
        let vmm = config.vmm_of(&ctx.spec.runtime, &ctx.spec.config.annotations);
        Ok(vmm.map_err(Error::InvalidArgument)?.kind())
    }

    /// The driver for a pod whose machine is of `user`, and how that comes by its taps.
    pub(crate) fn driver_of(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        user: Option<u32>,
    ) -> Result<(Arc<dyn Vmm>, Taps)> {
        let (driver, launcher) = self.vmm(config, Self::kind_of(ctx, config)?, user)?;
        let taps = drivers::taps(&*driver, &launcher);
        Ok((driver, taps))
    }

    /// The machine of a pod.
    #[allow(clippy::too_many_arguments)] // all that a machine is made of
    fn vm_spec(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        driver: &dyn Vmm,
        dir: &Path,
        netns: Option<Arc<OwnedFd>>,
        nics: Vec<Nic>,
        cgroup: &Cgroup,
    ) -> Result<VmSpec> {
        let linux = &ctx.spec.config.linux;
        let resources = linux.resources.as_ref().cloned().unwrap_or_default();
        let size = config.size.of(
            resources.cpu_quota,
            resources.cpu_period,
            resources.memory_limit_in_bytes,
        );
        let memory = size.1.saturating_add(huge_of(&ctx.spec.config));
        let size = (size.0, memory.min(config.size.max_memory_mib));
        let (share, console) = (ShareTree::new(&ctx.dir).served(), ctx.dir.join(CONSOLE));
        let name = (ctx.spec.id.clone(), dir);
        let entrances = cgroup.entrances();
        let plain = plain(config, driver, name, size, share, console, entrances)?;
        Ok(VmSpec { nics, netns, ..plain })
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
        let kind = Self::kind_of(ctx, config)?;
        let (driver, launcher) = self.vmm(config, kind, state.user)?;
        let cgroup = state.machine_cgroup.clone().unwrap_or_default();
        let cgroup = self.cgroups.group(&cgroup).map_err(host("the machine's cgroup"))?;
        let made = cgroup.clone();
        blocking(move || made.create().map(drop).map_err(host("make the machine's cgroup")))
            .await?;
        let dir = state.machine_dir.clone().unwrap_or_default();
        let spec = self.vm_spec(ctx, config, &*driver, &dir, netns, nics, &cgroup)?;
        let spec = channel::give(&*driver, spec);
        let template = self.template(config, &driver, &spec).await;
        let saved_nic = matches!(driver.copies(spec.hugepages), Ok(CopyNics::Declared));
        let pooled = match &template {
            // With that there is no pool.
            Some(_) if !saved_nic => {
                self.take_pooled(ctx, config, state, &driver, &spec, &cgroup).await?
            }
            _ => None,
        };
        let running = match pooled {
            Some(running) => running,
            None => {
                let started =
                    self.start_machine(ctx, config, state, (&driver, &launcher), &spec, &template);
                let (vm, token, copied) = started.await?;
                Running { vm, token, dir, cpus: None, saved_nic: copied && saved_nic }
            }
        };
        if let Some(Template { key, dir: None }) = template
            && let Some(turn) = self.templates.turn(&key)
        {
            let (machinery, config) = (self.machinery.clone(), self.config());
            // Without the taps, which end with their last descriptor.
            let like = VmSpec { nics: Vec::new(), netns: None, ..spec.clone() };
            tokio::spawn(machinery.make_template(turn, config, kind, like, key));
        }
        // The machine has its own copies; ours would keep the taps.
        drop(spec);
        let gone = watch::channel(false);
        let Running { vm, token, dir, cpus, saved_nic } = running;
        let pid = vm.pid();
        let dial = channel::dial(Some(&vm.state().channel), &dir);
        let own = (config, state.share);
        let (_tasks, guest) = self.insert(ctx, own, vm, token, dial, gone)?;
        if let Some(cpus) = cpus {
            let plugged = wire::OnlineRequest { cpus, ..wire::OnlineRequest::default() };
            let _: wire::OnlineResponse =
                guest.call_again(service::GUEST, "Online", &plugged).await?;
        }
        let begun = Instant::now();
        let mut question = Self::setup(ctx, config, state.share, plan)?;
        if saved_nic {
            nics::was_saved(question.network.mut_or_insert_default());
        }
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

    /// Starts the pod's own machine: from its template where there is one, else cold. Answers it with its
    /// agent's token, and whether it is a copy.
    async fn start_machine(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        state: &mut PodState,
        (driver, launcher): (&Arc<dyn Vmm>, &Launcher),
        spec: &VmSpec,
        template: &Option<Template>,
    ) -> Result<(Arc<dyn Vm>, String, bool)> {
        if let Some(parent) = spec.dir.parent() {
            kuasar_host::record::private_dir(parent)
                .map_err(host("make the machines' directory"))?;
        }
        kuasar_host::record::private_dir(&spec.dir)
            .map_err(host("make the machine's directory"))?;
        let copied = match template {
            Some(Template { key, dir: Some(saved) }) => {
                let copy = self.attempt(ctx, config, state, driver, launcher, spec, Some(saved));
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
        let is_copy = copied.is_some();
        let (vm, token) = match copied {
            Some(running) => running,
            None => self.attempt(ctx, config, state, driver, launcher, spec, None).await?,
        };
        Ok((vm, token, is_copy))
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
        let (ready, spec) = channel::listen(spec, launcher.owner())?;
        let spec = &*spec;
        let begun = Instant::now();
        let vm = match saved {
            Some(saved) => driver.restore(spec, saved).await,
            None => driver.spawn(spec).await,
        };
        let vm = vm.map_err(machine)?;
        ready.is_of(&vm.state().channel);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::cloud_hypervisor::CloudHypervisor;
    use crate::vmm::firecracker::{Firecracker, FirecrackerConfig};
    use crate::vmm::process::Local;
    use crate::vmm::qemu::Qemu;
    use crate::vmm::stratovirt::StratoVirt;

    #[tokio::test]
    async fn a_vmm_that_cannot_hold_pods_is_refused_with_the_reason() {
        let launcher = || Launcher::new(Arc::new(Local::new().unwrap()), None);
        let qemu = Qemu::new(Default::default(), Default::default(), launcher());
        serves_pods(&qemu, ShareBy::Virtiofs).unwrap();
        serves_pods(&qemu, ShareBy::Ninep).unwrap();
        let hypervisor = CloudHypervisor::new(Default::default(), Default::default(), launcher());
        serves_pods(&hypervisor, ShareBy::Virtiofs).unwrap();
        let error = serves_pods(&hypervisor, ShareBy::Ninep).unwrap_err().to_string();
        assert!(error.contains("9p"), "{error}");
        serves_pods(&hypervisor, ShareBy::None).unwrap();
        // Without shares, whatever is configured.
        let firecracker = Firecracker::new(Default::default(), launcher());
        serves_pods(&firecracker, ShareBy::Virtiofs).unwrap();
        assert_eq!(share_of(firecracker.features(), ShareBy::Virtiofs), ShareBy::None);
        assert_eq!(share_of(hypervisor.features(), ShareBy::Ninep), ShareBy::Ninep);
        let no_slots = FirecrackerConfig {
            disk_slots: 0,
            read_only_disk_slots: 0,
            ..FirecrackerConfig::default()
        };
        let no_slots = Firecracker::new(no_slots, launcher());
        let stratovirt = StratoVirt::new(Default::default(), Default::default(), launcher());
        serves_pods(&stratovirt, ShareBy::Virtiofs).unwrap();
        let refused: [(&dyn Vmm, _, _); 2] = [
            (&no_slots, ShareBy::Virtiofs, "disk_slots"),
            // A microvm.
            (&qemu, ShareBy::None, "q35"),
        ];
        for (driver, share, why) in refused {
            let error = serves_pods(driver, share).unwrap_err();
            assert!(matches!(&error, Error::Unimplemented(text) if text.contains(why)), "{error}");
        }
    }
}
