//! `vmm-sandboxer`: sandboxes that are microVMs.
//!
//! One program with four faces: the resident daemon, the jailer of VMMs and their helpers
//! (`vmm-sandboxer jail`, which sandbox-parent runs), one of these helpers (`vmm-sandboxer relay`), and
//! the operator's `shutdown-parent`.

use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::program;
use kuasar_daemon::resident::Setup;
use vmm_sandboxer::config::Config;

/// Sandboxes that are microVMs.
#[derive(Debug, Parser)]
#[command(name = "vmm-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<program::Command>,
}

fn main() -> ExitCode {
    // Jailer and relay first: they want nothing of what a daemon sets up.
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.peek().is_some_and(|first| first == "jail") {
        return ExitCode::from(vmm_sandboxer::jail::main(arguments.skip(1)));
    }
    if arguments.peek().is_some_and(|first| first == "relay") {
        return ExitCode::from(vmm_sandboxer::relay::main(arguments.skip(1)));
    }
    kuasar_daemon::memory::tune();
    program::end("vmm-sandboxer", run(Arguments::parse()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("vmm", &given, common);
    if let Some(command) = arguments.command {
        return Ok(command.run(&setup)?);
    }
    if given.check_config
        && let Err(missing) = config.images(config.vmm.kind())
    {
        // The configuration is good all the same: a guest may be installed later.
        eprintln!("vmm-sandboxer: warning: {missing}");
    }
    let Some(level) = program::prepare(&given, &setup)? else { return Ok(()) };
    kuasar_daemon::memory::runtime()?
        .block_on(vmm_sandboxer::daemon::run(setup, given, config, level))
}
