//! `bench`: how long pods take to start and to go, against a daemon that runs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use serde_json::json;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::{self, Format, Progress, Table};
use crate::run::{Netns, Network, PodSpec, RunDir};

/// What `bench` does.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Pods
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 20)]
    pub pods: u32,
    /// Pods at the same time
    #[arg(short = 'j', long, value_name = "NUMBER", default_value_t = 1)]
    pub parallel: u32,
    /// The pods' network
    #[arg(long, value_enum, default_value_t)]
    pub network: Network,
    /// Write each figure into this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub raw: Option<PathBuf>,
}

/// One pod: how long its start and its removal took.
type Figures = (Duration, Duration);

async fn one(client: &Client, network: Network) -> Result<Figures> {
    let dir = RunDir::new()?;
    let netns = match network {
        Network::Host => None,
        Network::None => Some(Netns::new(dir.path())?),
    };
    let pod = PodSpec::new(None, netns.as_ref().map(Netns::path));
    let begun = Instant::now();
    let started = pod.start(client).await;
    let ready = begun.elapsed();
    let begun = Instant::now();
    let removed = pod.remove(client).await;
    started?;
    removed?;
    Ok((ready, begun.elapsed()))
}

/// The value below which this part of the sorted values lies.
fn part(sorted: &[Duration], share: f64) -> Duration {
    let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or_default()
}

/// `bench`.
///
/// # Errors
/// The first pod's that fails; every pod is removed.
pub async fn bench(client: &Client, args: &BenchArgs, format: Format) -> Result<()> {
    if args.pods == 0 || args.parallel == 0 {
        return Err(Error::Usage("--pods and --parallel: at least 1".into()));
    }
    let mut stopped = crate::process::Stopped::new()?;
    let begun = Instant::now();
    let all = async {
        let _progress = Progress::new(format!("{} pods", args.pods));
        let pods = stream::iter(0..args.pods).map(|_| one(client, args.network));
        pods.buffer_unordered(args.parallel as usize).collect::<Vec<_>>().await
    };
    let all = tokio::select! {
        all = all => all,
        signal = stopped.next() => {
            crate::pods::remove_own(client).await?;
            return Err(Error::Exit(crate::process::code_of(signal)));
        }
    };
    let took = begun.elapsed();
    let all: Vec<Figures> = all.into_iter().collect::<Result<_>>()?;
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    if let Some(path) = &args.raw {
        let rows: Vec<_> =
            all.iter().map(|(a, b)| json!({ "startMs": ms(*a), "removeMs": ms(*b) })).collect();
        std::fs::write(path, format!("{:#}\n", json!(rows))).map_err(Error::at("write", path))?;
    }
    let mut table = Table::new(&["STEP", "MIN ms", "MEDIAN ms", "P90 ms", "P99 ms", "MAX ms"]);
    let mut steps = serde_json::Map::new();
    let (starts, removals): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    for (name, mut values) in [("start", starts), ("remove", removals)] {
        values.sort();
        let parts = [0.0, 0.5, 0.9, 0.99, 1.0].map(|share| ms(part(&values, share)));
        let [min, median, p90, p99, max] = parts;
        steps.insert(
            name.into(),
            json!({
                "minMs": min, "medianMs": median, "p90Ms": p90, "p99Ms": p99, "maxMs": max,
            }),
        );
        let [a, b, c, d, e] = parts.map(|value| format!("{value:.2}"));
        table.row([name.to_owned(), a, b, c, d, e]);
    }
    let rate = f64::from(args.pods) / took.as_secs_f64().max(1e-9);
    match format {
        Format::Json => output::json(&json!({
            "sandboxer": client.kind, "version": client.info.version, "pods": args.pods,
            "parallel": args.parallel, "podsPerSecond": rate, "steps": steps,
        })),
        Format::Table => {
            let n = args.parallel;
            let head = format!(
                "{}-sandboxer, {} pods, {n} at a time, {rate:.1} pods/s\n",
                client.kind, args.pods
            );
            output::print(&(head + &table.text()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_values_that_were_measured() {
        let values: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(part(&values, 0.0), Duration::from_millis(1));
        assert_eq!(part(&values, 1.0), Duration::from_millis(100));
        assert_eq!(part(&values, 0.9), Duration::from_millis(90));
        assert_eq!(part(&[], 0.5), Duration::ZERO);
    }
}
