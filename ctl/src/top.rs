//! `top`: what pods use of processors and memory, again and again.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use kuasar_protos::controller::ControllerMetricsRequest;
use kuasar_protos::shim::cgroups::metrics as v1;
use kuasar_protos::shim::cgroups_v2::metrics as v2;
use protobuf::Message;
use serde_json::{Value, json};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::{self, Format, Table, bytes, short};
use crate::pods::{self, Pod};

/// What `top` shows.
#[derive(Debug, clap::Args)]
pub struct TopArgs {
    /// Seconds between two looks
    #[arg(short = 'd', long, value_name = "SECONDS", default_value_t = 2.0)]
    pub interval: f64,
    /// Looks until it ends; without a terminal 1
    #[arg(short = 'n', long, value_name = "NUMBER")]
    pub iterations: Option<u64>,
}

/// What a pod has used.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Processor time in nanoseconds.
    pub cpu: u64,
    /// Memory in bytes, without what can be dropped at once.
    pub memory: u64,
    /// Limit of memory in bytes; 0 for none.
    pub limit: u64,
    /// Processes.
    pub pids: u64,
}

/// Limits from here on stand for none, as the kernel pads them to pages.
const UNLIMITED: u64 = 1 << 62;

/// Reads metrics of either version of cgroups.
///
/// # Errors
/// For anything else.
pub fn usage(type_url: &str, value: &[u8]) -> Result<Usage> {
    let damaged = |e: protobuf::Error| Error::Failed(format!("metrics: {e}"));
    let limit = |limit: u64| if limit >= UNLIMITED { 0 } else { limit };
    match type_url.rsplit('/').next().unwrap_or_default() {
        "io.containerd.cgroups.v1.Metrics" => {
            let m = v1::Metrics::parse_from_bytes(value).map_err(damaged)?;
            Ok(Usage {
                cpu: m.cpu.usage.total,
                memory: m.memory.usage.usage.saturating_sub(m.memory.total_inactive_file),
                limit: limit(m.memory.usage.limit),
                pids: m.pids.current,
            })
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let m = v2::Metrics::parse_from_bytes(value).map_err(damaged)?;
            Ok(Usage {
                cpu: m.cpu.usage_usec.saturating_mul(1000),
                memory: m.memory.usage.saturating_sub(m.memory.inactive_file),
                limit: limit(m.memory.usage_limit),
                pids: m.pids.current,
            })
        }
        other => Err(Error::Failed(format!("metrics of an unknown kind: {other:.80?}"))),
    }
}

async fn usage_of(pod: &Pod) -> Result<Usage> {
    let sandbox_id = pod.sandbox.id.clone();
    let q = ControllerMetricsRequest { sandbox_id, ..Default::default() };
    let answer = pod.client.controller().metrics(pod.client.context(), &q).await?;
    let data = &answer.metrics.data;
    usage(&data.type_url, &data.value)
}

/// `top`.
///
/// # Errors
/// The daemons'.
pub async fn top(clients: &[Client], args: &TopArgs, format: Format) -> Result<()> {
    if !(0.1..=3600.0).contains(&args.interval) {
        return Err(Error::Usage("--interval: 0.1 to 3600 seconds".into()));
    }
    let pause = Duration::from_secs_f64(args.interval);
    let live = std::io::stdout().is_terminal() && format == Format::Table;
    let most = args.iterations.unwrap_or(if live { u64::MAX } else { 1 });
    let mut before: HashMap<String, (Instant, u64)> = HashMap::new();
    // The first look is what later ones are compared with.
    let mut shown = 0;
    let mut first = true;
    while shown < most {
        let running = pods::all(clients).await?;
        let running: Vec<Pod> =
            running.into_iter().filter(|p| p.sandbox.phase == "ready").collect();
        let used = futures::future::join_all(running.iter().map(usage_of)).await;
        let now = Instant::now();
        let mut rows: Vec<(&Pod, Option<Usage>, Option<f64>)> = Vec::new();
        let mut next = HashMap::new();
        for (pod, used) in running.iter().zip(used) {
            let used = used.ok();
            let cpu = used.and_then(|used| {
                next.insert(pod.sandbox.id.clone(), (now, used.cpu));
                let (at, old) = before.get(&pod.sandbox.id)?;
                let past = now.duration_since(*at).as_nanos() as f64;
                Some(used.cpu.saturating_sub(*old) as f64 * 100.0 / past.max(1.0))
            });
            rows.push((pod, used, cpu));
        }
        before = next;
        if !first {
            rows.sort_by(|a, b| b.2.unwrap_or(0.0).total_cmp(&a.2.unwrap_or(0.0)));
            show(&rows, format, live)?;
            shown += 1;
        }
        if shown < most {
            // A first look is only the beginning of a span: it may be short.
            let short = Duration::from_millis(500).min(pause);
            tokio::time::sleep(if first { short } else { pause }).await;
        }
        first = false;
    }
    Ok(())
}

fn show(rows: &[(&Pod, Option<Usage>, Option<f64>)], format: Format, live: bool) -> Result<()> {
    if format == Format::Json {
        let all: Vec<Value> = rows
            .iter()
            .map(|(pod, used, cpu)| {
                json!({
                    "pod": pod.sandbox.id, "name": pod.name(), "sandboxer": pod.client.kind,
                    "cpuPercent": cpu,
                    "cpuNanoseconds": used.map(|u| u.cpu),
                    "memoryBytes": used.map(|u| u.memory),
                    "memoryLimitBytes": used.map(|u| u.limit).filter(|limit| *limit > 0),
                    "processes": used.map(|u| u.pids),
                })
            })
            .collect();
        return output::json(&all.into());
    }
    let mut table =
        Table::new(&["POD", "NAME", "SANDBOXER", "CPU", "MEMORY", "LIMIT", "PROCESSES"]);
    for (pod, used, cpu) in rows {
        let of = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        table.row([
            short(&pod.sandbox.id),
            pod.name(),
            pod.client.kind.clone(),
            of(cpu.map(|cpu| format!("{cpu:.1}%"))),
            of(used.map(|u| bytes(u.memory))),
            of(used.filter(|u| u.limit > 0).map(|u| bytes(u.limit))),
            of(used.map(|u| u.pids.to_string())),
        ]);
    }
    let clear = if live { "\x1b[H\x1b[2J" } else { "" };
    output::print(&format!("{clear}{}", table.text()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_of_cgroups_are_read_in_the_same_units() {
        let mut one = v1::Metrics::new();
        one.cpu.mut_or_insert_default().usage.mut_or_insert_default().total = 5000;
        let memory = one.memory.mut_or_insert_default();
        memory.total_inactive_file = 10;
        let entry = memory.usage.mut_or_insert_default();
        (entry.usage, entry.limit) = (110, u64::MAX - 4095);
        one.pids.mut_or_insert_default().current = 3;
        let mut two = v2::Metrics::new();
        two.cpu.mut_or_insert_default().usage_usec = 5;
        let memory = two.memory.mut_or_insert_default();
        (memory.usage, memory.inactive_file, memory.usage_limit) = (110, 10, u64::MAX);
        two.pids.mut_or_insert_default().current = 3;
        let wanted = Usage { cpu: 5000, memory: 100, limit: 0, pids: 3 };
        let of = |version: &str, bytes: Vec<u8>| {
            usage(&format!("io.containerd.cgroups.{version}.Metrics"), &bytes).unwrap()
        };
        assert_eq!(of("v1", one.write_to_bytes().unwrap()), wanted);
        assert_eq!(of("v2", two.write_to_bytes().unwrap()), wanted);
        assert!(usage("x", &[]).is_err());
    }
}
