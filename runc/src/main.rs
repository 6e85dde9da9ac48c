//! `runc-sandboxer`: sandboxes and containers of Linux namespaces.
//!
//! One program with three faces: the resident daemon ([`daemon`]), the built-in OCI engine
//! ([`oci`], which sandbox-parent runs for every container), and the operator's
//! `shutdown-parent`.

mod config;
mod console;
mod daemon;
mod engine;
mod files;
mod metrics;
mod oci;
mod pod;
mod runtime;
mod sandboxer;
mod selfexe;
mod sockets;
mod spec;
mod tasks;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};

const USAGE: &str = "usage: runc-sandboxer [--listen SOCKET] [--dir DIR] [--config FILE] \
    [--log-level LEVEL] [--check-config] [--version]\n\
    \x20      runc-sandboxer oci …            the built-in OCI engine\n\
    \x20      runc-sandboxer shutdown-parent [--dir DIR] [--force]";

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what a daemon sets up.
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().map(String::as_str) == Some("oci") {
        return oci::main(arguments.skip(1).collect()).into();
    }
    match run(arguments.collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("runc-sandboxer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Vec<String>) -> anyhow::Result<()> {
    let mut places = daemon::Places {
        listen: "/run/kuasar-runc/runc.sock".into(),
        dir: "/run/kuasar-runc".into(),
        config: None,
        log_level: None,
    };
    let (mut check, mut shutdown, mut force) = (false, false, false);
    let mut words = arguments.into_iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--listen" => places.listen = value()?.into(),
            "--dir" => places.dir = value()?.into(),
            "--config" => places.config = Some(PathBuf::from(value()?)),
            "--log-level" => places.log_level = Some(value()?),
            "--check-config" => check = true,
            "--force" => force = true,
            "shutdown-parent" => shutdown = true,
            "--version" | "-V" => {
                println!("runc-sandboxer {}", env!("CARGO_PKG_VERSION"));
                return Ok(());
            }
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other}\n{USAGE}"),
        }
    }
    let config = daemon::load(&places)?;
    if check {
        println!("the configuration is good");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .thread_stack_size(256 << 10)
        .thread_keep_alive(Duration::from_secs(5))
        .build()?;
    if shutdown {
        return runtime.block_on(async {
            let (parent, _) = sandbox_parent::client::Parent::connect(&places.dir, Duration::from_secs(10)).await?;
            parent.shutdown(force).await.context("it keeps pods; remove them first or say --force")
        });
    }
    let level = places.log_level.clone().unwrap_or_else(|| config.log_level.clone());
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_new(level).context("log level")?)
        .with_writer(std::io::stderr)
        .init();
    memory();
    runtime.block_on(daemon::run(places, config))
}

/// One malloc arena, and memory given back early: the daemon is idle most of its life.
fn memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: plain settings of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}
