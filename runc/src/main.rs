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
mod oci;
mod pod;
mod runtime;
mod sandboxer;
mod selfexe;
mod sockets;
mod spec;
mod tasks;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;

/// Sandboxes and containers of Linux namespaces. `runc-sandboxer oci` is the built-in OCI engine.
#[derive(Debug, Parser)]
#[command(name = "runc-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// End this directory's sandbox-parent; refused while it keeps pods
    ShutdownParent {
        /// End it all the same: pods are lost
        #[arg(long)]
        force: bool,
    },
}

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what a daemon sets up.
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().map(String::as_str) == Some("oci") {
        return oci::main(arguments.skip(1).collect()).into();
    }
    kuasar_daemon::memory::tune();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("runc-sandboxer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let places = daemon::Places {
        listen: given.listen.unwrap_or_else(|| "/run/kuasar-runc/runc.sock".into()),
        dir: given.dir.unwrap_or_else(|| "/run/kuasar-runc".into()),
        config: given.config,
        log_level: given.log_level,
    };
    if let Some(Command::ShutdownParent { force }) = arguments.command {
        return kuasar_daemon::memory::runtime()?.block_on(async {
            let limit = Duration::from_secs(10);
            let (parent, _) = sandbox_parent::client::Parent::connect(&places.dir, limit).await?;
            parent.shutdown(force).await.context("it keeps pods: remove them first, or say --force")
        });
    }
    let config = daemon::load(&places)?;
    if given.check_config {
        println!("the configuration is good");
        return Ok(());
    }
    let level = places.log_level.as_deref().unwrap_or(&config.log_level);
    let level = kuasar_daemon::logging::init(level).map_err(|error| anyhow!(error))?;
    if let Some(point) = kuasar_daemon::failpoint::arm(&places.dir) {
        tracing::warn!(point, "a failpoint is armed");
    }
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(places, config, level))
}
