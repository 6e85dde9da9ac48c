//! `gvisor-sandboxer`: pods on gVisor, an application kernel.
//!
//! One program with three faces: the resident daemon ([`daemon`]), a step in front of `runsc`
//! ([`masked`], which sandbox-parent runs for releases that need it), and the operator's
//! `shutdown-parent`.

mod cli;
mod config;
mod daemon;
mod exec;
mod flavor;
mod forward;
mod masked;
mod pause;
mod restore;
mod runtime;
mod sentry;
mod spec;
mod stats;
mod urpc;

use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::program;
use kuasar_daemon::resident::Setup;

use crate::config::Config;

/// Pods on gVisor: one application kernel per pod.
#[derive(Debug, Parser)]
#[command(name = "gvisor-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<program::Command>,
}

fn main() -> ExitCode {
    // This first: it is on the way of every pod and wants nothing of what a daemon sets up.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((cli::MASKED, words)) =
        arguments.split_first().map(|(first, words)| (first.as_str(), words))
    {
        let Err(error) = masked::exec(words);
        eprintln!("gvisor-sandboxer {}: {error}", cli::MASKED);
        return ExitCode::from(125);
    }
    kuasar_daemon::memory::tune();
    program::end("gvisor-sandboxer", run(Arguments::parse()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("gvisor", &given, common);
    if let Some(command) = arguments.command {
        return Ok(command.run(&setup)?);
    }
    let Some(level) = program::prepare(&given, &setup)? else { return Ok(()) };
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(setup, given, config, level))
}
