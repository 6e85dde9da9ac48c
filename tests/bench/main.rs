//! `kuasar-bench`: figures of a handler beside stock runc, taken interleaved in one run, so that
//! the neighbours' load falls on both alike. Writes Markdown, JSON and pictures to `target/bench`.
//!
//! Environment: `BENCH_QUICK=1` for a run below two minutes; or each number by itself:
//! `BENCH_N` (serial pods), `BENCH_EXECS`, `BENCH_REPS` (parallel rounds), `BENCH_PARALLEL`,
//! `BENCH_PODS` (pods whose memory is weighed), `BENCH_MANY` (containers in one go; 0 for none),
//! `BENCH_GOES` (how often).
//! `KUASAR_HANDLER` names the handler; that of WebAssembly runs a module where others run a program,
//! and has no execs.
//!
//! As on a node, a pod's cgroup is there before its RunPodSandbox: kubelet makes it.
//! `BENCH_KUBELET=0` leaves that to the handler.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures
)] // as tests; futures of a client are large

mod many;
mod memory;
mod report;

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_tests::cri::*;
use kuasar_tests::{daemon_pid, handler, switch, wait_for};
use report::{Report, Row};

fn number(name: &str, full: usize, quick: usize) -> usize {
    let chosen = std::env::var(format!("BENCH_{name}")).ok().and_then(|v| v.parse().ok());
    let is_quick = std::env::var_os("BENCH_QUICK").is_some_and(|v| v != "0");
    chosen.unwrap_or(if is_quick { quick } else { full })
}

/// A pod with one sleeping container, made over a connection that stays open.
struct Made {
    pod: String,
    container: String,
    log_directory: String,
    /// What kubelet would have made.
    cgroup: Option<Cgroup>,
    /// RunPodSandbox, CreateContainer, StartContainer.
    took: [Duration; 3],
}

/// A pod without a container.
async fn pod(client: &mut Client, handler: &str, host_network: bool) -> (Made, PodSandboxConfig) {
    let mut config = pod_config("bench");
    if host_network {
        // As kubelet does: the host's name is not the pod's to set.
        config.hostname.clear();
        let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.namespace_options.as_mut().unwrap().network = NamespaceMode::Node as i32;
    }
    std::fs::create_dir_all(&config.log_directory).unwrap();
    let cgroup = pod_cgroup(&config);
    let run = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: if handler == "runc" { String::new() } else { handler.into() },
    };
    let start = Instant::now();
    let pod = client.run_pod_sandbox(within(run, 120)).await.unwrap().into_inner().pod_sandbox_id;
    let took = [start.elapsed(), Duration::ZERO, Duration::ZERO];
    let log_directory = config.log_directory.clone();
    let made = Made { pod, container: String::new(), log_directory, cgroup, took };
    (made, config)
}

/// Whether containers of this handler are modules.
fn is_wasm(handler: &str) -> bool {
    handler.starts_with("kuasar-wasm")
}

/// A container that sleeps, and how long it took to create and to start it.
async fn container(
    client: &mut Client,
    handler: &str,
    pod: &str,
    config: &PodSandboxConfig,
) -> (String, [Duration; 2]) {
    let mut own = container_config(config, &["sleep", "1000000"]);
    if is_wasm(handler) {
        own = container_config(config, &["/sleep.wasm"]);
        let image = kuasar_tests::wasm::IMAGE.to_owned();
        own.image = Some(ImageSpec { image, ..Default::default() });
    }
    let begun = Instant::now();
    let create = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(own),
        sandbox_config: Some(config.clone()),
    };
    let container =
        client.create_container(within(create, 120)).await.unwrap().into_inner().container_id;
    let created = Instant::now();
    let begin = StartContainerRequest { container_id: container.clone() };
    client.start_container(within(begin, 120)).await.unwrap();
    (container, [created - begun, created.elapsed()])
}

async fn make(client: &mut Client, handler: &str, host_network: bool) -> Made {
    let (mut made, config) = pod(client, handler, host_network).await;
    let (container, took) = container(client, handler, &made.pod, &config).await;
    made.container = container;
    made.took = [made.took[0], took[0], took[1]];
    made
}

/// Makes the pod's cgroup, as kubelet does.
fn pod_cgroup(config: &PodSandboxConfig) -> Option<Cgroup> {
    if std::env::var_os("BENCH_KUBELET").is_some_and(|v| v == "0") {
        return None;
    }
    let path = &config.linux.as_ref().unwrap().cgroup_parent;
    let group = Layout::detect().unwrap().group(path).unwrap();
    assert!(group.create().unwrap(), "the cgroup {path} was there");
    Some(group)
}

async fn unmake(client: &mut Client, made: &Made) -> Duration {
    let start = Instant::now();
    let id = made.pod.clone();
    client
        .stop_pod_sandbox(within(StopPodSandboxRequest { pod_sandbox_id: id.clone() }, 120))
        .await
        .unwrap();
    client
        .remove_pod_sandbox(within(RemovePodSandboxRequest { pod_sandbox_id: id }, 120))
        .await
        .unwrap();
    let took = start.elapsed();
    let _ = std::fs::remove_dir_all(&made.log_directory);
    if let Some(group) = &made.cgroup {
        group.remove(Duration::from_secs(10)).unwrap();
    }
    took
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Both handlers, the order changing each round.
fn order(round: usize, handlers: &[String; 2]) -> [usize; 2] {
    let _ = handlers;
    if round.is_multiple_of(2) { [0, 1] } else { [1, 0] }
}

async fn serial(report: &mut Report, client: &mut Client, handlers: &[String; 2], n: usize) {
    let names = [
        "RunPodSandbox",
        "CreateContainer",
        "StartContainer",
        "run + create + start",
        "stop + remove",
    ];
    let mut samples: [[Vec<f64>; 5]; 2] = Default::default();
    for h in handlers {
        let warm = make(client, h, true).await;
        unmake(client, &warm).await;
    }
    for round in 0..n {
        for h in order(round, handlers) {
            let made = make(client, &handlers[h], true).await;
            for (phase, took) in made.took.iter().enumerate() {
                samples[h][phase].push(ms(*took));
            }
            samples[h][3].push(ms(made.took.iter().sum()));
            samples[h][4].push(ms(unmake(client, &made).await));
        }
    }
    let [stock, ours] = samples;
    for (name, (a, b)) in names.iter().zip(stock.into_iter().zip(ours)) {
        report.row(Row::samples(&format!("{name}, host network"), "ms", a, b));
    }
}

async fn execs(report: &mut Report, client: &mut Client, handlers: &[String; 2], n: usize) {
    let pods = [make(client, &handlers[0], true).await, make(client, &handlers[1], true).await];
    let mut samples: [Vec<f64>; 2] = Default::default();
    for round in 0..n {
        for h in order(round, handlers) {
            let q = ExecSyncRequest {
                container_id: pods[h].container.clone(),
                cmd: vec!["true".into()],
                timeout: 60,
            };
            let start = Instant::now();
            let answer = client.exec_sync(within(q, 60)).await.unwrap().into_inner();
            assert_eq!(answer.exit_code, 0);
            samples[h].push(ms(start.elapsed()));
        }
    }
    for pod in &pods {
        unmake(client, pod).await;
    }
    let [stock, ours] = samples;
    report.row(Row::samples("ExecSync of `true`", "ms", stock, ours));
}

/// Makes `n` pods, `width` at a time; answers them and the time it took.
async fn make_many(
    handler: &str,
    host_network: bool,
    n: usize,
    width: usize,
) -> (Vec<Made>, Duration) {
    let start = Instant::now();
    let tasks: Vec<_> = (0..width)
        .map(|lane| {
            let handler = handler.to_owned();
            tokio::spawn(async move {
                let mut client = connect().await;
                let mut made = Vec::new();
                for _ in (lane..n).step_by(width) {
                    made.push(make(&mut client, &handler, host_network).await);
                }
                made
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    (all, start.elapsed())
}

async fn unmake_many(client: &mut Client, all: Vec<Made>) {
    for made in &all {
        unmake(client, made).await;
    }
}

async fn parallel(
    report: &mut Report,
    client: &mut Client,
    handlers: &[String; 2],
    reps: usize,
    n: usize,
) {
    let mut samples: [Vec<f64>; 2] = Default::default();
    for round in 0..reps {
        for h in order(round, handlers) {
            let (all, took) = make_many(&handlers[h], false, n, n).await;
            samples[h].push(n as f64 / took.as_secs_f64());
            unmake_many(client, all).await;
        }
    }
    let [stock, ours] = samples;
    report.row(
        Row::samples(&format!("{n} pods in parallel, bridge network"), "pods/s", stock, ours)
            .more_is_better(),
    );
}

async fn weigh(report: &mut Report, client: &mut Client, handlers: &[String; 2], pods: usize) {
    let mut weights = Vec::new();
    for handler in handlers {
        let is_stock = handler == &handlers[0];
        let (all, _) = make_many(handler, true, pods, 4).await;
        tokio::time::sleep(Duration::from_secs(2)).await; // memory settles
        let weight = if is_stock { memory::stock() } else { memory::ours() };
        println!("memory of {pods} pods on {handler}: {weight}");
        report.note(&format!("{handler}, {pods} pods: {weight}"));
        weights.push(weight.total() as f64 / 1024.0);
        if !is_stock {
            report.row(Row::one_sided(
                &format!("daemon killed and started again with {pods} pods, until READY"),
                "ms",
                restart(client, &all).await,
            ));
        }
        unmake_many(client, all).await;
    }
    report.row(Row::samples(
        &format!("management memory (PSS), {pods} pods of one container"),
        "MiB",
        vec![weights[0]],
        vec![weights[1]],
    ));
}

/// Kills the daemon and starts it again; answers milliseconds until it said READY to its service
/// manager, which it does when every pod has been taken up. Then each pod must be ready.
async fn restart(client: &mut Client, pods: &[Made]) -> Vec<f64> {
    let path = kuasar_tests::bed().join("run/bench-notify.sock");
    let _ = std::fs::remove_file(&path);
    let notify = UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut samples = Vec::new();
    for _ in 0..5 {
        switch(&["daemon", "kill"], &[]);
        let start = Instant::now();
        switch(&["daemon", "spawn"], &[("NOTIFY_SOCKET", &path.to_string_lossy())]);
        let mut message = [0; 256];
        loop {
            let n = notify.recv(&mut message).expect("the daemon says READY within a minute");
            if String::from_utf8_lossy(&message[..n]).lines().any(|l| l == "READY=1") {
                break;
            }
        }
        samples.push(ms(start.elapsed()));
        for made in pods {
            let q = PodSandboxStatusRequest { pod_sandbox_id: made.pod.clone(), verbose: false };
            let state = loop {
                // containerd's own client needs a moment to connect again.
                match client.pod_sandbox_status(within(q.clone(), 60)).await {
                    Ok(answer) => break answer.into_inner().status.unwrap().state,
                    Err(_) => assert!(start.elapsed() < Duration::from_secs(60)),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            assert_eq!(state, PodSandboxState::SandboxReady as i32);
        }
    }
    std::fs::remove_file(&path).unwrap();
    samples
}

/// Mean of each phase that the daemon itself has measured, from its metrics.
fn own_phases(report: &mut Report, of: &str) {
    let kind = kuasar_tests::kind();
    let path = kuasar_tests::bed().join(format!("run/kuasar-{kind}-metrics.sock"));
    let Some(text) = report::scrape(&path) else {
        report.note("the daemon serves no metrics: its own phases are left out");
        return;
    };
    report.phases(of, report::phases(&text));
}

fn main() {
    let handlers = ["runc".to_owned(), handler()];
    let (n, runs) = (number("N", 30, 6), number("EXECS", 100, 20));
    let (reps, width) = (number("REPS", 3, 1), number("PARALLEL", 10, 10));
    let pods = number("PODS", 100, 20);
    let (goes, containers) = (number("GOES", 3, 1), number("MANY", 100, 20));
    if is_wasm(&handlers[1]) {
        kuasar_tests::wasm::import();
    }
    let mut report = Report::new(&handlers);
    runtime().block_on(async {
        let mut client = connect().await;
        let r = &mut report;
        println!("serial: {n} pods each");
        serial(r, &mut client, &handlers, n).await;
        if !is_wasm(&handlers[1]) {
            println!("exec: {runs} each");
            execs(r, &mut client, &handlers, runs).await;
        }
        own_phases(r, "one pod at a time, and exec");
        println!("parallel: {reps} rounds of {width} pods each");
        parallel(r, &mut client, &handlers, reps, width).await;
        own_phases(r, "with the pods in parallel");
        if containers > 0 {
            println!("in one go: {goes} rounds of {containers} containers each");
            many::measure(r, &mut client, &handlers, goes, containers).await;
            own_phases(r, "with the containers in one go");
        }
        println!("memory: {pods} pods each");
        weigh(r, &mut client, &handlers, pods).await;
    });
    wait_for("the daemon is there", Duration::from_secs(5), || daemon_pid() > 0);
    let at = report.write();
    println!("{}", std::fs::read_to_string(at.join("report.md")).unwrap());
    println!("written to {}", at.display());
}
