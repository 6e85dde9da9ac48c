//! What the machine of a running pod gets when the pod's resources change.

use std::sync::Arc;

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::SandboxContext;
use kuasar_pod::files::host;
use vmm_common::guest as wire;

use crate::config::SizeConfig;
use crate::errors::machine;
use crate::guest::{Guest, service};
use crate::sandboxer::{VmmSandboxer, state};
use crate::vmm::{Feature, Vm};

/// CPUs and memory of a running machine from now on; `None` is left as it is.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    pub cpus: Option<u32>,
    pub memory_mib: Option<u32>,
}

/// What `resources` (those of a runtime spec, as JSON) want of a machine that can change.
///
/// # Errors
/// `FailedPrecondition` when it is more than the machine was made for.
pub(crate) fn wanted(
    vm: &dyn Vm,
    size: &SizeConfig,
    resources: &serde_json::Value,
) -> Result<Growth> {
    let number = |pointer: &str| {
        resources.pointer(pointer).and_then(serde_json::Value::as_i64).unwrap_or_default()
    };
    let limits = (number("/cpu/quota"), number("/cpu/period"), number("/memory/limit"));
    let (cpus, memory) = size.of(limits.0, limits.1, limits.2);
    let (features, has) = (vm.features(), vm.state());
    // What is not asked for is neither changed nor measured against the machine.
    let cpus = (limits.0 > 0 && features.has(Feature::CpuResize)).then_some(cpus);
    let memory_mib = (limits.2 > 0 && features.has(Feature::MemoryResize)).then_some(memory);
    for (what, wanted, most, key) in [
        ("CPUs", cpus, has.cpus.most, "grow_cpus"),
        ("MiB of memory", memory_mib, has.memory_mib.most, "grow_memory_mib"),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| *wanted > most) {
            return Err(Error::FailedPrecondition(format!(
                "the pod's machine cannot have {wanted} {what}, only {most}: set size.{key} in \
                 the configuration, for pods that start after it, or start the pod anew"
            )));
        }
    }
    Ok(Growth { cpus, memory_mib })
}

/// What containers' resources may want of their machine beyond what it has: it grows up to what it was
/// made for, and never shrinks, because it is the other containers', too.
pub(crate) struct Machine {
    pub vm: Arc<dyn Vm>,
    pub size: SizeConfig,
    /// One change at a time.
    pub turn: tokio::sync::Mutex<()>,
}

impl Machine {
    /// Room for a container with these resources (those of a runtime spec). A machine that cannot have as
    /// much gets what it can: the guest's cgroup holds the limit in any case.
    ///
    /// # Errors
    /// The VMM's and the guest's.
    pub(crate) async fn make_room(
        &self,
        container: &str,
        guest: &Guest,
        resources: &serde_json::Map<String, serde_json::Value>,
    ) -> containerd_task::error::Result<()> {
        let features = self.vm.features();
        let number = |group: &str, key: &str| {
            let group = resources.get(group).and_then(|group| group.get(key));
            group.and_then(serde_json::Value::as_i64).unwrap_or_default()
        };
        let (quota, memory) = (number("cpu", "quota"), number("memory", "limit"));
        let more_cpus = quota > 0 && features.has(Feature::CpuResize);
        let more_memory = memory > 0 && features.has(Feature::MemoryResize);
        if !more_cpus && !more_memory {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        let (cpus, memory) = self.size.of(quota, number("cpu", "period"), memory);
        let most = self.vm.state();
        let failed = |error| containerd_task::error::Error::internal("resize the machine", error);
        let goal = |what: &str, wanted: u32, most: u32| {
            if wanted > most {
                tracing::warn!(container, wanted, most, "the machine cannot have as much: {what}");
            }
            wanted.min(most)
        };
        if more_memory {
            let goal = goal("memory (MiB)", memory, most.memory_mib.most);
            if goal > self.vm.memory().await.map_err(failed)? {
                self.vm.resize_memory(goal).await.map_err(failed)?;
            }
        }
        if more_cpus {
            let goal = goal("processors", cpus, most.cpus.most);
            let question = wire::InfoRequest::new();
            let has: wire::InfoResponse =
                guest.call_again(service::GUEST, "Info", &question).await?;
            if goal > has.cpus {
                self.vm.resize_cpus(goal).await.map_err(failed)?;
                let grown = wire::OnlineRequest { cpus: goal, ..wire::OnlineRequest::default() };
                let _: wire::OnlineResponse =
                    guest.call_again(service::GUEST, "Online", &grown).await?;
            }
        }
        Ok(())
    }
}

impl VmmSandboxer {
    /// Gives a pod other resources: its cgroup, and its machine where that can change.
    ///
    /// # Errors
    /// What cannot be, before anything is changed.
    pub(crate) async fn resize(
        &self,
        ctx: &SandboxContext,
        resources: &serde_json::Value,
    ) -> Result<()> {
        // Refused before anything is changed.
        let machine_too = self
            .running(&ctx.spec.id)
            .map(|live| {
                let growth = wanted(&*live.vm, &self.config().size, resources)?;
                Ok::<_, Error>((live, growth))
            })
            .transpose()?;
        let path = &ctx.spec.config.linux.cgroup_parent;
        if !path.is_empty() {
            let group = self.cgroups.group(path).map_err(host("cgroup_parent"))?;
            let text = resources.to_string();
            blocking(move || {
                group.update(text.as_bytes()).map_err(host("update the pod's cgroup"))
            })
            .await?;
        }
        let Some((live, growth)) = machine_too else { return Ok(()) };
        let mut grown = wire::OnlineRequest::default();
        if let Some(cpus) = growth.cpus {
            live.vm.resize_cpus(cpus).await.map_err(machine)?;
            grown.cpus = cpus;
        }
        if let Some(memory) = growth.memory_mib {
            live.vm.resize_memory(memory).await.map_err(machine)?;
        }
        if grown.cpus > 0 {
            let _: wire::OnlineResponse =
                live.guest.call_again(service::GUEST, "Online", &grown).await?;
        }
        let mut state = state(ctx);
        state.vm = Some(live.vm.state());
        self.save(ctx, &state).await
    }
}
