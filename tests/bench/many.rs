//! Many containers in one pod at the same time.

use std::time::{Duration, Instant};

use kuasar_tests::cri::*;

use crate::report::{Report, Row};
use crate::{container, memory, ms, order, pod, unmake};

/// Nanoseconds of processor time of processes that live, and of what they have reaped.
fn processor_time(pids: &[u32]) -> u64 {
    pids.iter().map(|pid| running(*pid) + reaped(*pid)).sum()
}

fn running(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let time = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    tasks.filter_map(time).sum()
}

/// `cutime` and `cstime` of proc(5).
fn reaped(pid: u32) -> u64 {
    const NANOSECONDS_PER_TICK: u64 = 10_000_000;
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after.split_whitespace().skip(13).take(2).filter_map(|n| n.parse::<u64>().ok());
    ticks.sum::<u64>() * NANOSECONDS_PER_TICK
}

/// What of stock's or of ours runs now. The processes of stock's containers are not among them,
/// those of WebAssembly are: they run our program.
fn managing(is_stock: bool) -> Vec<u32> {
    if is_stock {
        return memory::shims();
    }
    memory::our_processes().into_iter().map(|(_, pid)| pid).collect()
}

/// Makes and starts `n` containers in one pod at the same time; answers how long that took, and
/// how much processor time of what manages them.
async fn round(client: &mut Client, handler: &str, is_stock: bool, n: usize) -> (Duration, f64) {
    let (made, config) = pod(client, handler, true).await;
    // What a handler does for its first container only.
    let _ = container(client, handler, &made.pod, &config).await;
    let before = processor_time(&managing(is_stock));
    let begun = Instant::now();
    let tasks: Vec<_> = (0..n)
        .map(|_| {
            let (handler, pod, config) = (handler.to_owned(), made.pod.clone(), config.clone());
            let mut client = client.clone();
            tokio::spawn(async move { container(&mut client, &handler, &pod, &config).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let took = begun.elapsed();
    let spent = processor_time(&managing(is_stock)).saturating_sub(before);
    unmake(client, &made).await;
    (took, spent as f64 / 1e6 / n as f64)
}

/// Both handlers in turns.
pub async fn measure(
    report: &mut Report,
    client: &mut Client,
    handlers: &[String; 2],
    rounds: usize,
    n: usize,
) {
    let (mut rates, mut times): ([Vec<f64>; 2], [Vec<f64>; 2]) = Default::default();
    for turn in 0..rounds {
        for h in order(turn, handlers) {
            let (took, spent) = round(client, &handlers[h], h == 0, n).await;
            rates[h].push(n as f64 * 1e3 / ms(took));
            times[h].push(spent);
        }
    }
    let [stock, ours] = rates;
    report.row(
        Row::samples(&format!("{n} containers in one go, in one pod"), "containers/s", stock, ours)
            .more_is_better(),
    );
    let [stock, ours] = times;
    let name = "the same: processor time of what manages them, for each";
    report.row(Row::samples(name, "ms", stock, ours));
}
