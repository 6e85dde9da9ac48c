//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::output::Format;
use crate::{bench, check, config, debug, exec, exporter, observe, pods, run, template, top};

const EXIT_CODES: &str = "Exit codes:
  0    good
  1    failed
  2    the command line is wrong
  3    no daemon answers
  4    what was named does not exist
  5    check, config check or template verify have found something
  125  exec and run: failed themselves; else the process' own code";

/// What runs in the sandboxers of a node, and what a node can run.
#[derive(Debug, Parser)]
#[command(name = "kuasar-ctl", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// How results are written
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub output: Format,
    /// Only this sandboxer: runc, vmm, gvisor, quark or wasm
    #[arg(short, long, global = true, value_name = "KIND")]
    pub sandboxer: Option<String>,
    /// Socket of a daemon, in place of the configured ones; may be repeated
    #[arg(short, long, global = true, value_name = "[KIND=]PATH")]
    pub address: Vec<String>,
    /// Directory with the daemons' configuration files
    #[arg(long, global = true, value_name = "DIR", default_value = "/etc/kuasar")]
    pub config_dir: PathBuf,
    /// Directory for what run, exec and bench need while they run; private, made if missing
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/kuasar-ctl")]
    pub state_dir: PathBuf,
    /// Seconds that a daemon may take to answer a question
    #[arg(long = "answer-timeout", global = true, value_name = "SECONDS", default_value_t = 10)]
    pub answer: u64,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// How long a daemon may take to answer a question.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.answer.max(1))
    }

    /// The daemons that the command line is about, for what goes on asking for them.
    pub fn wanted(&self) -> Wanted {
        let (kind, addresses) = (self.sandboxer.clone(), self.address.clone());
        Wanted { kind, addresses, config_dir: self.config_dir.clone() }
    }
}

/// Which daemons a command is about.
#[derive(Debug)]
pub struct Wanted {
    /// `--sandboxer`.
    pub kind: Option<String>,
    /// `--address`.
    pub addresses: Vec<String>,
    /// `--config-dir`.
    pub config_dir: PathBuf,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check what this host can run, and what is missing
    Check(check::CheckArgs),
    /// List pods, or containers
    Ps(pods::PsArgs),
    /// Show all that is known of pods, as JSON
    Inspect {
        /// Pods: id, beginning of an id, name or namespace/name
        #[arg(required = true)]
        pods: Vec<String>,
    },
    /// Show what pods use, again and again
    Top(top::TopArgs),
    /// Show a container's log
    Logs(observe::LogsArgs),
    /// Run a further process in a container
    Exec(exec::ExecArgs),
    /// Show the console log of a pod's machine
    Console(observe::ConsoleArgs),
    /// Run a program beside a pod's containers, in its machine's guest; a shell by default
    Debug(debug::DebugArgs),
    /// Follow what happens to pods and containers
    Events(observe::EventsArgs),
    /// Show the daemons' metrics, or serve them for Prometheus
    Metrics(exporter::MetricsArgs),
    /// End pods
    Stop(pods::StopArgs),
    /// Remove what nobody will come back for
    Gc(pods::GcArgs),
    /// Saved machines that pods of vmm-sandboxer start from
    Template {
        /// What to do with them
        #[command(subcommand)]
        command: template::Command,
    },
    /// Show, check and migrate configurations
    Config {
        /// What to do with them
        #[command(subcommand)]
        command: config::Command,
    },
    /// Run a pod of one container with no engine, and remove it
    Run(Box<run::RunArgs>),
    /// Measure how long pods take to start and to go
    Bench(bench::BenchArgs),
    /// Write completions for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory
    Man {
        /// Directory, which has to exist
        dir: PathBuf,
    },
}

/// One page for the program and one for each command.
///
/// # Errors
/// When they cannot be written.
pub fn write_man_pages(dir: &Path) -> Result<()> {
    clap_mangen::generate_to(Arguments::command(), dir).map_err(Error::at("write pages into", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_the_source_is_the_containers_own() {
        let line = ["kuasar-ctl", "run", "--sandboxer", "wasm", "hello.wasm", "--", "--help", "-x"];
        let Command::Run(run) = Arguments::try_parse_from(line).unwrap().command else {
            panic!("no run");
        };
        assert_eq!(run.command, ["--help", "-x"]);
        let line = ["kuasar-ctl", "exec", "pod", "ls", "-l"];
        let Command::Exec(exec) = Arguments::try_parse_from(line).unwrap().command else {
            panic!("no exec");
        };
        assert_eq!((exec.pod.as_str(), exec.command.len()), ("pod", 2));
        let line = ["kuasar-ctl", "debug", "pod", "sh", "-c", "ps -o pid"];
        let Command::Debug(debug) = Arguments::try_parse_from(line).unwrap().command else {
            panic!("no debug");
        };
        assert_eq!((debug.pod.as_str(), debug.args.len()), ("pod", 3));
        for bad in [&["kuasar-ctl"][..], &["kuasar-ctl", "run"], &["kuasar-ctl", "ps", "--nothing"]]
        {
            assert!(Arguments::try_parse_from(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        write_man_pages(dir.path()).unwrap();
        for page in ["kuasar-ctl.1", "kuasar-ctl-run.1", "kuasar-ctl-config-migrate.1"] {
            assert!(dir.path().join(page).is_file(), "{page}");
        }
    }
}
