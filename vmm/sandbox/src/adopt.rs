//! How a machine of the pool becomes a pod's.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::SandboxContext;
use kuasar_host::cgroup::Cgroup;
use kuasar_pod::files::host;

use crate::boot::Running;
use crate::config::{Config, ShareBy};
use crate::errors::{machine, task};
use crate::guest::{self, GuestError};
use crate::pool::{Idle, Pooled};
use crate::sandboxer::{PodState, VmmSandboxer};
use crate::share::ShareTree;
use crate::vmm::{Feature, Range, VmSpec, VmState, Vmm};

/// What of a machine's size has to be changed for a pod; `None` is left as it is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    cpus: Option<u32>,
    memory_mib: Option<u32>,
}

/// Whether a machine with `has` can be one with `wanted`: to what it has to be changed then. It must
/// be able to grow later as the pod's own could.
fn fit(has: Range, wanted: Range, changes: bool) -> Option<Option<u32>> {
    if wanted.most > has.most {
        return None;
    }
    match has.at_boot == wanted.at_boot {
        true => Some(None),
        false => changes.then_some(Some(wanted.at_boot)),
    }
}

fn change(vm: &dyn Vmm, spec: &VmSpec, cpus: Range, memory: Range) -> Option<Change> {
    let features = vm.features();
    // CPUs of the boot stay: only more can come.
    let more = features.has(Feature::CpuResize) && spec.cpus.at_boot > cpus.at_boot;
    Some(Change {
        cpus: fit(cpus, spec.cpus, more)?,
        memory_mib: fit(memory, spec.memory_mib, features.has(Feature::MemoryResize))?,
    })
}

impl VmmSandboxer {
    /// Takes a machine for the pod out of the pool. Nothing when there is none that fits, or
    /// none that is well: then everything is as it was.
    ///
    /// # Errors
    /// When the pod's record cannot be written.
    pub(crate) async fn take_pooled(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        state: &mut PodState,
        driver: &Arc<dyn Vmm>,
        spec: &VmSpec,
        cgroup: &Cgroup,
    ) -> Result<Option<Running>> {
        if config.template.pool == 0 {
            return Ok(None);
        }
        let before = state.clone();
        // A machine may fail at this moment, and the next one not; each is tried once.
        while let Some((key, change)) = self.fitting(driver, spec, before.share).await? {
            let Some((pooled, idle)) = self.pool.take(&key, before.share).await else { continue };
            let begun = Instant::now();
            let adopted = self.adopt(ctx, config, state, &pooled, idle, (spec, &change), cgroup);
            match adopted.await {
                Ok(running) => {
                    kuasar_daemon::metrics::observe("pool_take", begun.elapsed());
                    tracing::debug!(sandbox = ctx.spec.id, machine = pooled.name,
                        took = ?begun.elapsed(), "a machine of the pool is the pod's");
                    self.pool.taken();
                    return Ok(Some(running));
                }
                Err(error) => {
                    tracing::warn!(sandbox = ctx.spec.id, machine = pooled.name,
                        error = %error.chain(), "a machine of the pool is of no use");
                    self.give_up(ctx, config, state, &before, &pooled).await?;
                }
            }
        }
        self.pool.missed();
        Ok(None)
    }

    /// The template whose copies in the pool would do, and what has to be changed of them.
    async fn fitting(
        &self,
        driver: &Arc<dyn Vmm>,
        spec: &VmSpec,
        share: ShareBy,
    ) -> Result<Option<(String, Change)>> {
        for (key, cpus, memory_mib) in self.pool.kinds(share) {
            let Some(change) = change(&**driver, spec, cpus, memory_mib) else { continue };
            // The same but for its size.
            let like = VmSpec { cpus, memory_mib, nics: Vec::new(), ..spec.clone() };
            let (templates, driver) = (self.templates.clone(), driver.clone());
            let same = blocking(move || templates.key(&*driver, &like).map_err(machine)).await?;
            if same == key {
                return Ok(Some((key, change)));
            }
        }
        Ok(None)
    }

    #[allow(clippy::too_many_arguments)] // one step of `take_pooled`
    async fn adopt(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        state: &mut PodState,
        pooled: &Pooled,
        idle: Idle,
        (spec, change): (&VmSpec, &Change),
        cgroup: &Cgroup,
    ) -> Result<Running> {
        let vm = &pooled.vm;
        // One that stands still would hold the pod up at each of the steps below. One that is late is well:
        // on a busy host all are, and to end it and make another is more work for that host.
        let limit = config.template.ready;
        match tokio::time::timeout(limit, vm.ping()).await {
            Ok(answer) => answer.map_err(machine)?,
            Err(_) => {
                let text = format!("its VMM does not answer within {limit:?}");
                return Err(Error::DeadlineExceeded(text));
            }
        }
        // The pod's from here on: first in its record, then not the pool's any more.
        state.machine_dir = Some(pooled.dir.clone());
        state.user = pooled.user;
        state.vm = Some(vm.state());
        self.save(ctx, state).await?;
        pooled.disown()?;
        self.users.hand_over(&pooled.name, &ctx.spec.id);
        let (own, theirs) = (ShareTree::new(&ctx.dir), pooled.tree());
        let (group, processes) = (cgroup.clone(), vm.state());
        let shared = state.share != ShareBy::None;
        blocking(move || {
            enter(&group, &processes)?;
            // Without a share there is no tree.
            if shared { own.take_over(&theirs).map_err(task) } else { Ok(()) }
        })
        .await?;
        if let Some(cpus) = change.cpus {
            vm.resize_cpus(cpus).await.map_err(machine)?;
        }
        if let Some(wanted) = change.memory_mib {
            let got = vm.resize_memory(wanted).await.map_err(machine)?;
            if got != wanted {
                return Err(Error::FailedPrecondition(format!(
                    "it has {got} MiB of memory where the pod is to have {wanted}"
                )));
            }
        }
        let plug = async {
            for nic in &spec.nics {
                vm.attach_nic(nic).await.map_err(machine)?;
            }
            Ok(())
        };
        let greet = async { welcome(idle, &ctx.spec.id, limit).await.map_err(Error::from) };
        let ((), token) = tokio::select! {
            biased;
            _ = vm.wait() => return Err(Error::FailedPrecondition("it has ended".into())),
            done = async { futures::try_join!(plug, greet) } => done?,
        };
        state.vm = Some(vm.state());
        state.token.clone_from(&token);
        self.save(ctx, state).await?;
        let (dir, cpus) = (pooled.dir.clone(), change.cpus);
        Ok(Running { vm: vm.clone(), token, dir, cpus, saved_nic: false })
    }

    /// Everything as it was `before` a machine was taken, which is ended.
    async fn give_up(
        &self,
        ctx: &SandboxContext,
        config: &Config,
        state: &mut PodState,
        before: &PodState,
        pooled: &Pooled,
    ) -> Result<()> {
        let tree = ShareTree::new(&ctx.dir);
        self.pool.discard(pooled).await;
        // Its user was the pod's.
        self.users.release(&ctx.spec.id);
        let user = self.user(&ctx.spec.id, config)?;
        *state = PodState { user, ..before.clone() };
        let shared = state.share != ShareBy::None;
        blocking(move || {
            tree.remove().map_err(task)?;
            if shared { tree.make().map_err(task) } else { Ok(()) }
        })
        .await?;
        self.save(ctx, state).await
    }
}

/// Moves a machine's processes into a cgroup. Memory that they have touched stays charged to where
/// they were: the kernel moves processes, not charges.
fn enter(group: &Cgroup, vm: &VmState) -> Result<()> {
    for record in [&vm.vmm].into_iter().chain(&vm.helpers) {
        let ended = || Error::FailedPrecondition(format!("its {} has ended", record.name));
        // By start time: the number alone may be somebody else's by now.
        let process: OwnedFd = record.identity.open().ok_or_else(ended)?;
        group.add_process(record.identity.pid).map_err(host("move it into the pod's cgroup"))?;
        drop(process);
        record.identity.open().ok_or_else(ended)?;
    }
    Ok(())
}

/// Welcomes the agent: the one that waits, or, when it has just hung up, the next that dials.
async fn welcome(idle: Idle, sandbox: &str, limit: Duration) -> guest::Result<String> {
    let Idle { ready, agent } = idle;
    let talk = async {
        match agent.welcome(sandbox).await {
            Ok((_, token)) => Ok(token),
            Err(GuestError::Broken(_)) => {
                guest::Waiting::accept(&ready).await?.welcome(sandbox).await.map(|(_, token)| token)
            }
            Err(error) => Err(error),
        }
    };
    let late = |_| GuestError::Deadline { what: "of the pool".into(), limit };
    tokio::time::timeout(limit, talk).await.map_err(late)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_fits_where_it_is_or_can_be_made_as_large_and_can_grow_as_far() {
        let to = |at_boot, most| Range { at_boot, most };
        assert_eq!(fit(to(256, 512), to(256, 512), false), Some(None));
        // One that could not grow as far is no pod's that may.
        assert_eq!(fit(to(256, 512), to(256, 513), true), None);
        assert_eq!(fit(to(256, 512), to(384, 512), true), Some(Some(384)));
        assert_eq!(fit(to(256, 512), to(128, 384), true), Some(Some(128)));
        for wanted in [to(384, 512), to(128, 384)] {
            assert_eq!(fit(to(256, 512), wanted, false), None);
        }
        assert_eq!(fit(to(256, 256), to(384, 384), true), None);
    }
}
