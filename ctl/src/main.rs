//! `kuasar-ctl`: what runs in the sandboxers of a node, and what a node can run.
//!
//! | module | its one idea |
//! |---|---|
//! | [`args`] | the command line |
//! | [`daemons`], [`mod@client`] | which daemons there are, and connections to them |
//! | [`pods`] | `ps`, `inspect`, `stop`, `gc`, and how a pod is named |
//! | [`observe`], [`top`] | `events`, `metrics`, `logs`, `console`, `top` |
//! | [`exporter`] | `metrics --listen`: one endpoint for a node |
//! | [`process`], [`stdio`], [`exec`] | a process, its streams, signals and end; `exec` |
//! | [`mod@debug`] | a program in the guest of a pod that is a machine |
//! | [`run`], [`mod@bench`], [`template`] | pods that this program makes itself |
//! | [`check`], [`config`], [`migrate`] | what a host can run, and how its daemons are configured |
//! | [`output`], [`error`] | what people and programs read, and exit codes |

mod args;
mod bench;
mod bundle;
mod check;
mod client;
mod config;
mod daemons;
mod debug;
mod error;
mod exec;
mod exporter;
mod migrate;
mod observe;
mod output;
mod pods;
mod process;
mod run;
mod stdio;
mod template;
mod top;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Arguments, Command};
use crate::client::{Client, dial_all};
use crate::error::{Error, Result};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let beside_process = matches!(arguments.command, Command::Exec(_) | Command::Run(_));
    run::set_state_dir(arguments.state_dir.clone());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = match runtime {
        Ok(runtime) => {
            let done = runtime.block_on(dispatch(arguments));
            // A thread may be reading our standard input: nobody waits for it.
            runtime.shutdown_background();
            done
        }
        Err(error) => Err(Error::io("start threads")(error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, Error::Exit(_) | Error::Closed | Error::Findings) {
                output::note(&error.to_string());
            }
            let code = match beside_process {
                true => error.exit_code_beside_process(),
                false => error.exit_code(),
            };
            ExitCode::from(code)
        }
    }
}

/// The daemons that a command is about.
async fn clients(arguments: &Arguments) -> Result<Vec<Client>> {
    clients_of(arguments, arguments.sandboxer.as_deref()).await
}

async fn clients_of(arguments: &Arguments, kind: Option<&str>) -> Result<Vec<Client>> {
    let all = daemons::find(&arguments.config_dir, &arguments.address, kind)?;
    let clients = dial_all(&all, arguments.timeout()).await?;
    match kind {
        None => Ok(clients),
        Some(kind) => {
            let of_kind: Vec<Client> = clients.into_iter().filter(|c| c.kind == kind).collect();
            match of_kind.is_empty() {
                true => Err(Error::NotFound(format!("no {kind}-sandboxer answers"))),
                false => Ok(of_kind),
            }
        }
    }
}

/// The one daemon that a command is about.
async fn client(arguments: &Arguments) -> Result<Client> {
    one(clients(arguments).await?)
}

fn one(mut all: Vec<Client>) -> Result<Client> {
    match (all.pop(), all.is_empty()) {
        (Some(client), true) => Ok(client),
        (None, _) => Err(Error::NotFound("no daemon answers".into())),
        (Some(last), false) => {
            let kinds: Vec<&str> = all.iter().chain([&last]).map(|c| c.kind.as_str()).collect();
            let all = kinds.join(", ");
            Err(Error::Usage(format!("several daemons run: say --sandboxer with one of {all}")))
        }
    }
}

async fn dispatch(arguments: Arguments) -> Result<()> {
    let format = arguments.output;
    match &arguments.command {
        Command::Check(args) => {
            let all = daemons::find(
                &arguments.config_dir,
                &arguments.address,
                arguments.sandboxer.as_deref(),
            )?;
            check::check(&all, args, format).await
        }
        Command::Ps(args) => pods::ps(&clients(&arguments).await?, args, format).await,
        Command::Inspect { pods } => pods::inspect(&clients(&arguments).await?, pods).await,
        Command::Top(args) => top::top(&clients(&arguments).await?, args, format).await,
        Command::Logs(args) => observe::logs(&clients(&arguments).await?, args, format).await,
        Command::Console(args) => observe::console(&clients(&arguments).await?, args).await,
        Command::Debug(args) => debug::debug(&clients(&arguments).await?, args).await,
        Command::Events(args) => observe::events(&clients(&arguments).await?, args, format).await,
        Command::Metrics(args) if args.listen.is_empty() => {
            observe::metrics(&clients(&arguments).await?, format).await
        }
        Command::Metrics(args) => exporter::serve(arguments.wanted(), args).await,
        Command::Stop(args) => pods::stop(&clients(&arguments).await?, args, format).await,
        Command::Gc(args) => pods::gc(&clients(&arguments).await?, args, format).await,
        Command::Exec(args) => {
            Err(Error::Exit(exec::exec(&clients(&arguments).await?, args).await?))
        }
        Command::Run(args) => Err(Error::Exit(run::run(&client(&arguments).await?, args).await?)),
        Command::Bench(args) => bench::bench(&client(&arguments).await?, args, format).await,
        Command::Template { command } => {
            let kind = arguments.sandboxer.as_deref().unwrap_or("vmm");
            let client = one(clients_of(&arguments, Some(kind)).await?)?;
            template::template(&client, command, format).await
        }
        Command::Config { command } => config::config(command, &arguments.config_dir, format).await,
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "kuasar-ctl", &mut text);
            output::print(&String::from_utf8_lossy(&text))
        }
        Command::Man { dir } => args::write_man_pages(dir),
    }
}
