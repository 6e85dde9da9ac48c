//! `quark-sandboxer`: pods on Quark, an application kernel in a virtual machine.
//!
//! Two faces: the resident daemon ([`daemon`]), and the operator's `shutdown-parent`.

mod config;
mod daemon;
mod engine;
mod flavor;
mod runtime;
mod spec;
mod streams;
mod tree;

use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::resident::Setup;

use crate::config::Config;

/// Pods on Quark: one application kernel in a virtual machine per pod.
#[derive(Debug, Parser)]
#[command(name = "quark-sandboxer", version)]
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
    kuasar_daemon::memory::tune();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quark-sandboxer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("quark", &given, common);
    if let Some(Command::ShutdownParent { force }) = arguments.command {
        let limit = setup.common.timeouts.parent;
        let ended = kuasar_daemon::resident::shutdown_parent(&setup.dir, limit, force);
        return Ok(kuasar_daemon::memory::runtime()?.block_on(ended)?);
    }
    if let Some(level) = &given.log_level {
        kuasar_daemon::logging::check(level).map_err(|error| anyhow!(error))?;
    }
    if given.check_config {
        println!("the configuration is good");
        return Ok(());
    }
    let level = given.log_level.as_deref().or(setup.common.log_level.as_deref());
    let level = kuasar_daemon::logging::init_as(level.unwrap_or("info"), setup.common.log_format)
        .map_err(|error| anyhow!(error))?;
    if let Some(point) = kuasar_daemon::failpoint::arm(&setup.dir) {
        tracing::warn!(point, "a failpoint is armed");
    }
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(setup, given, config, level))
}
