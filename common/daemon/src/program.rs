//! What `main()` of every sandboxer does around its daemon: the operator's commands, the checks
//! before anything starts, and the words with which a program ends.

use std::fmt::Display;
use std::process::ExitCode;

use crate::args::DaemonArgs;
use crate::logging::{self, LevelHandle};
use crate::resident::{self, ResidentError, Setup};

/// Commands of an operator that every sandboxer has.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// End this directory's sandbox-parent; refused while it keeps pods
    ShutdownParent {
        /// End it all the same: pods are lost
        #[arg(long)]
        force: bool,
    },
}

/// Why a program does not start, or a command fails.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// A log level or filter that is none, or logs that cannot be set up.
    #[error("{0}")]
    Logs(String),
    /// sandbox-parent could not be ended.
    #[error(transparent)]
    Parent(#[from] ResidentError),
    /// There are no threads to be had.
    #[error(transparent)]
    Threads(#[from] std::io::Error),
}

impl Command {
    /// Does it; there is no daemon meanwhile.
    ///
    /// # Errors
    /// As [`resident::shutdown_parent`].
    pub fn run(self, setup: &Setup) -> Result<(), ProgramError> {
        let Self::ShutdownParent { force } = self;
        let limit = setup.common.timeouts.parent;
        let ended = resident::shutdown_parent(&setup.dir, limit, force);
        Ok(crate::memory::runtime()?.block_on(ended)?)
    }
}

/// Checks the log level, sets the logs up and arms the failpoint of a test. `None` when that was all:
/// only a check was asked for, and its answer is printed.
///
/// # Errors
/// [`ProgramError::Logs`].
pub fn prepare(args: &DaemonArgs, setup: &Setup) -> Result<Option<LevelHandle>, ProgramError> {
    if let Some(level) = &args.log_level {
        logging::check(level).map_err(ProgramError::Logs)?;
    }
    if args.check_config {
        println!("the configuration is good");
        return Ok(None);
    }
    let level = args.log_level.as_deref().or(setup.common.log_level.as_deref());
    let level = logging::init_as(level.unwrap_or("info"), setup.common.log_format)
        .map_err(ProgramError::Logs)?;
    if let Some(point) = crate::failpoint::arm(&setup.dir) {
        tracing::warn!(point, "a failpoint is armed");
    }
    Ok(Some(level))
}

/// The exit code of a program; what went wrong is said on stderr, with all its causes.
pub fn end(program: &str, outcome: Result<(), impl Display>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
