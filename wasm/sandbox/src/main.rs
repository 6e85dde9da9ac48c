//! `wasm-sandboxer`: pods whose containers are WebAssembly modules or components.
//!
//! One program with three faces: the resident daemon ([`daemon`]), the built-in OCI engine for
//! native containers beside them ([`kuasar_oci::builtin`]), and the operator's commands. What runs
//! WebAssembly is another program, `wasm-worker`: the daemon carries no compiler.

mod cache;
mod compile;
mod config;
mod daemon;
mod flavor;
mod image;
mod payloads;
mod profile;
mod spec;
mod verify;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::program;
use kuasar_daemon::resident::Setup;

use crate::config::Config;

/// Pods whose containers are WebAssembly modules or components.
#[derive(Debug, Parser)]
#[command(name = "wasm-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Compile modules or components into the cache, so that their first containers start at once
    Precompile {
        /// Modules or components
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    #[command(flatten)]
    Common(program::Command),
}

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what a daemon sets up.
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().map(String::as_str) == Some("oci") {
        let arguments = arguments.skip(1).collect();
        return kuasar_oci::builtin::main("wasm-sandboxer oci", arguments).into();
    }
    kuasar_daemon::memory::tune();
    program::end("wasm-sandboxer", run(Arguments::parse()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("wasm", &given, common);
    match arguments.command {
        Some(Command::Common(command)) => return Ok(command.run(&setup)?),
        Some(Command::Precompile { files }) => {
            return kuasar_daemon::memory::runtime()?
                .block_on(compile::precompile(&config, &files))
                .map_err(|error| anyhow!(error));
        }
        None => {}
    }
    let Some(level) = program::prepare(&given, &setup)? else { return Ok(()) };
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(setup, given, config, level))
}
