//! Command-line arguments that all daemons have.

use std::path::PathBuf;

/// Arguments of a sandboxer.
#[derive(Debug, Clone, clap::Args)]
pub struct DaemonArgs {
    /// Socket of the sandbox Controller (a path; gRPC and ttrpc)
    #[arg(short, long, value_name = "PATH")]
    pub listen: Option<PathBuf>,
    /// State directory, on a tmpfs; private to this daemon
    #[arg(short, long, value_name = "PATH", global = true)]
    pub dir: Option<PathBuf>,
    /// Configuration file (TOML); the drop-ins `conf.d/*.toml` beside it and `FILE.d/*.toml` are read after it
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a filter such as `info,containerd_task=debug`
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Check the configuration and exit
    #[arg(long)]
    pub check_config: bool,
}
