//! What the machine of a running pod gets when the pod's resources change.

use std::sync::Arc;

use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::SandboxContext;
use kuasar_pod::files::host;
use kuasar_protos::cri::PodSandboxConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vmm_common::guest as wire;

use crate::config::SizeConfig;
use crate::errors::machine;
use crate::guest::{Guest, service};
use crate::sandboxer::{VmmSandboxer, state};
use crate::vmm::{Feature, Range, Vm};

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
pub(crate) fn wanted(vm: &dyn Vm, size: &SizeConfig, resources: &Value) -> Result<Growth> {
    let number =
        |pointer: &str| resources.pointer(pointer).and_then(Value::as_i64).unwrap_or_default();
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

/// Limits of a container, or of all containers of a pod together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Limits {
    /// Thousandths of a CPU; 0: none is known.
    pub milli_cpus: u64,
    /// Bytes; 0: none is known.
    pub memory: u64,
    /// Bytes of huge pages, which `memory` does not count.
    pub huge: u64,
}

impl Limits {
    /// Those in `resources` (of a runtime spec); others are as they were.
    pub fn or(self, resources: &Map<String, Value>) -> Self {
        let number = |group: &str, key: &str| {
            let number = resources.get(group).and_then(|group| group.get(key));
            number.and_then(Value::as_i64).map(|number| u64::try_from(number).unwrap_or(0))
        };
        let milli = |quota: u64| {
            let period = number("cpu", "period").filter(|period| *period > 0).unwrap_or(100_000);
            quota.saturating_mul(1000).div_ceil(period)
        };
        let huge = resources.get("hugepageLimits").and_then(Value::as_array).map(|list| {
            let limit = |entry: &Value| entry.get("limit").and_then(Value::as_u64).unwrap_or(0);
            list.iter().map(limit).fold(0, u64::saturating_add)
        });
        Self {
            milli_cpus: number("cpu", "quota").map_or(self.milli_cpus, milli),
            memory: number("memory", "limit").unwrap_or(self.memory),
            huge: huge.unwrap_or(self.huge),
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            milli_cpus: self.milli_cpus.saturating_add(other.milli_cpus),
            memory: self.memory.saturating_add(other.memory),
            huge: self.huge.saturating_add(other.huge),
        }
    }

    /// CPUs, and MiB of memory of a machine that has `plain` without huge pages, which these want; 0 is
    /// what it has.
    fn of_machine(self, size: &SizeConfig, plain: u32) -> (u32, u32) {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let (cpus, memory) = size.of(whole(self.milli_cpus), 1000, whole(self.memory));
        let memory = if self.memory > 0 { memory } else { plain };
        let memory = memory.saturating_add(mib(self.huge));
        let of = |wanted: bool, number: u32| if wanted { number } else { 0 };
        (of(self.milli_cpus > 0, cpus), of(self.memory > 0 || self.huge > 0, memory))
    }
}

/// In whole MiB.
pub(crate) fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

/// What the containers of a pod may want of their machine beyond what it has: it grows up to what it was
/// made for, and never shrinks by itself.
pub(crate) struct Machine {
    pub vm: Arc<dyn Vm>,
    pub size: SizeConfig,
    /// MiB that it was made with for the pod's huge pages.
    pub huge: u32,
    /// One change at a time.
    pub turn: tokio::sync::Mutex<()>,
}

/// MiB of huge pages that a pod says it wants at its start. kubelet says it of containers alone.
pub(crate) fn huge_of(config: &PodSandboxConfig) -> u32 {
    let limits = config.linux.resources.hugepage_limits.iter().map(|one| one.limit);
    mib(limits.fold(0, u64::saturating_add))
}

impl Machine {
    /// MiB of huge pages that containers with these limits, and their pod, want.
    pub(crate) fn huge(&self, all: impl IntoIterator<Item = Limits>) -> u32 {
        mib(all.into_iter().fold(Limits::default(), Limits::and).huge).max(self.huge)
    }

    /// Room for all containers of the pod, of which one is new or has new limits. A machine that cannot
    /// have as much gets what it can: the guest's cgroups hold the limits in any case.
    ///
    /// # Errors
    /// The VMM's and the guest's.
    pub(crate) async fn make_room(
        &self,
        container: &str,
        guest: &Guest,
        all: impl IntoIterator<Item = Limits>,
    ) -> containerd_task::error::Result<()> {
        let features = self.vm.features();
        let most = self.vm.state();
        let can = |range: Range| range.most > range.at_boot;
        if !can(most.cpus) && !can(most.memory_mib) {
            return Ok(());
        }
        let all = all.into_iter().fold(Limits::default(), Limits::and);
        let plain = most.memory_mib.at_boot.saturating_sub(self.huge);
        let (cpus, memory) = all.of_machine(&self.size, plain);
        let more_cpus = cpus > most.cpus.at_boot && features.has(Feature::CpuResize);
        let more_memory = memory > most.memory_mib.at_boot && features.has(Feature::MemoryResize);
        if !more_cpus && !more_memory {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
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
    pub(crate) async fn resize(&self, ctx: &SandboxContext, resources: &Value) -> Result<()> {
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
            let most = live.vm.state().memory_mib.most;
            let memory = memory.saturating_add(live.containers.huge()).min(most);
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(resources: Value) -> Limits {
        Limits::default().or(resources.as_object().unwrap())
    }

    #[test]
    fn limits_add_up_and_stay_unless_they_are_named() {
        let first = of(json!({
            "cpu": {"quota": 150_000, "period": 100_000, "shares": 5},
            "memory": {"limit": 100 << 20},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1GB", "limit": 0}],
        }));
        assert_eq!(first, Limits { milli_cpus: 1500, memory: 100 << 20, huge: 4 << 20 });
        let changed = first.or(json!({"memory": {"limit": -1}}).as_object().unwrap());
        assert_eq!(changed, Limits { memory: 0, ..first });
        let second = of(json!({"cpu": {"quota": 10_000, "period": 20_000}}));
        assert_eq!(first.and(second).milli_cpus, 2000);
        assert_eq!(of(json!({})), Limits::default());
        assert_eq!(of(json!({"cpu": 1, "memory": [], "hugepageLimits": 2})), Limits::default());
    }

    #[test]
    fn what_is_not_limited_wants_nothing() {
        let size = SizeConfig::default();
        let want = |limits: Limits| limits.of_machine(&size, 256);
        assert_eq!(want(Limits::default()), (0, 0));
        assert_eq!(want(Limits { milli_cpus: 1001, ..Limits::default() }), (2, 0));
        assert_eq!(want(Limits { memory: 300 << 20, ..Limits::default() }), (0, 348));
        // Beyond what the others were given.
        assert_eq!(want(Limits { huge: 64 << 20, ..Limits::default() }), (0, 320));
        assert_eq!(want(Limits { memory: 300 << 20, huge: 1, milli_cpus: 0 }), (0, 349));
        let most = Limits { milli_cpus: u64::MAX, memory: u64::MAX, huge: u64::MAX };
        assert_eq!(want(most).0, size.max_cpus);
        assert_eq!(want(most.and(most)).1, u32::MAX);
    }
}
