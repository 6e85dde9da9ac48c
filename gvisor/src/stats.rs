//! Metrics of a container as containerd's messages: what the sentry counts for it, in the shape of
//! the host's cgroups.
//!
//! A container's own cgroup has its limits and no process in it. All that runs is in the cgroup of
//! the sandbox, so only the sentry can tell containers apart.

use containerd_task::runtime::{AnyMessage, StatsFlavor};
use kuasar_host::cgroup::{Cgroup, V1_TYPE, V2_TYPE};

use kuasar_protos::shim::cgroups::metrics as v1;
use kuasar_protos::shim::cgroups_v2::metrics as v2;
use protobuf::Message;

use crate::sentry::Usage;

/// A container's CPU time in nanoseconds. Where the sentry knows only how its containers compare,
/// their sandbox's time is divided like that.
fn cpu(root: Option<&Cgroup>, usage: &Usage, id: &str) -> u64 {
    if usage.cpu() > 0 {
        return usage.cpu();
    }
    let all: u128 = usage.shares.values().map(|share| u128::from(*share)).sum();
    let ours = u128::from(usage.shares.get(id).copied().unwrap_or_default());
    let total = root.map(|root| u128::from(total(root))).unwrap_or_default();
    if all == 0 || total == 0 {
        return u64::try_from(ours).unwrap_or(u64::MAX);
    }
    u64::try_from(total * ours / all).unwrap_or(u64::MAX)
}

fn total(root: &Cgroup) -> u64 {
    let (_, bytes) = root.metrics_v1();
    v1::Metrics::parse_from_bytes(&bytes).map(|m| m.cpu.usage.total).unwrap_or_default()
}

/// The message: limits from the container's cgroup, use from the sentry.
pub fn message(
    cgroup: &Cgroup,
    root: Option<&Cgroup>,
    usage: &Usage,
    id: &str,
    flavor: StatsFlavor,
) -> AnyMessage {
    let cpu = cpu(root, usage, id);
    let wants_v1 = flavor == StatsFlavor::V1 || !cgroup.layout().is_v2();
    if wants_v1 {
        let (_, bytes) = cgroup.metrics_v1();
        let mut m = v1::Metrics::parse_from_bytes(&bytes).unwrap_or_default();
        m.pids.mut_or_insert_default().current = usage.processes();
        let time = m.cpu.mut_or_insert_default().usage.mut_or_insert_default();
        (time.total, time.user, time.kernel) = (cpu, 0, 0);
        time.per_cpu.clear();
        let memory = m.memory.mut_or_insert_default();
        memory.rss = usage.memory();
        memory.total_rss = usage.memory();
        let entry = memory.usage.mut_or_insert_default();
        entry.usage = usage.memory();
        entry.max = entry.max.max(usage.memory());
        return (V1_TYPE.into(), m.write_to_bytes().unwrap_or_default());
    }
    let (_, bytes) = cgroup.metrics();
    let mut m = v2::Metrics::parse_from_bytes(&bytes).unwrap_or_default();
    m.pids.mut_or_insert_default().current = usage.processes();
    m.cpu.mut_or_insert_default().usage_usec = cpu / 1000;
    let memory = m.memory.mut_or_insert_default();
    memory.usage = usage.memory();
    memory.anon = usage.memory();
    (V2_TYPE.into(), m.write_to_bytes().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(text: &str) -> Usage {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn cpu_time_is_the_containers_own_or_its_share() {
        let own = usage(r#"{"event":{"data":{"cpu":{"usage":{"total":5}}}}}"#);
        assert_eq!(cpu(None, &own, "a"), 5);
        let shared = usage(r#"{"containerUsage":{"a":30,"b":10}}"#);
        assert_eq!(cpu(None, &shared, "a"), 30);
        assert_eq!(cpu(None, &shared, "c"), 0);
    }
}
