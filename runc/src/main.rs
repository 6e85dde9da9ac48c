//! `runc-sandboxer`: sandboxes and containers of Linux namespaces.
//!
//! One program with four faces: the resident daemon ([`daemon`]), the built-in OCI engine
//! ([`kuasar_oci::builtin`], which sandbox-parent runs for every container), the same as a process that
//! makes the processes of execs ([`kuasar_oci::builtin::serve`]), and the operator's `shutdown-parent`.

mod config;
mod daemon;
mod flavor;

use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::program;
use kuasar_daemon::resident::Setup;

use crate::config::Config;

/// First argument of this program for the process that makes execs' processes.
const EXECS: &str = "execs";

/// Sandboxes and containers of Linux namespaces. `runc-sandboxer oci` is the built-in OCI engine.
#[derive(Debug, Parser)]
#[command(name = "runc-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<program::Command>,
}

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what a daemon sets up.
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("oci") => {
            let arguments = arguments.collect();
            return kuasar_oci::builtin::main("runc-sandboxer oci", arguments).into();
        }
        Some(EXECS) => {
            return kuasar_oci::builtin::serve::main("runc-sandboxer execs", arguments).into();
        }
        _ => {}
    }
    kuasar_daemon::memory::tune();
    program::end("runc-sandboxer", run(Arguments::parse()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("runc", &given, common);
    if let Some(command) = arguments.command {
        return Ok(command.run(&setup)?);
    }
    let Some(level) = program::prepare(&given, &setup)? else { return Ok(()) };
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(setup, given, config, level))
}
