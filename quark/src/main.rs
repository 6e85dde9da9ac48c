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
use kuasar_daemon::program;
use kuasar_daemon::resident::Setup;

use crate::config::Config;

/// Pods on Quark: one application kernel in a virtual machine per pod.
#[derive(Debug, Parser)]
#[command(name = "quark-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<program::Command>,
}

fn main() -> ExitCode {
    kuasar_daemon::memory::tune();
    program::end("quark-sandboxer", run(Arguments::parse()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("quark", &given, common);
    if let Some(command) = arguments.command {
        return Ok(command.run(&setup)?);
    }
    let Some(level) = program::prepare(&given, &setup)? else { return Ok(()) };
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(setup, given, config, level))
}
