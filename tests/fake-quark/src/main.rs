//! A fake: what `quark` looks like from outside, with ordinary processes inside.
//!
//! It has Quark's command line, leaves a process behind as Quark does, which enters the network
//! namespace of its `config.json`, makes the tree its root and serves the Task API on the socket
//! that it was given; bundles and FIFOs are named as that process sees them. There is no virtual
//! machine and no kernel: the process is the first one of a PID namespace instead, so that its end
//! is the end of everything in it, and containers are made by the built-in OCI engine.
//!
//! What Quark's Task server does not do (as of its source in June 2025), this one does not either:
//! Pids, Update, Pause, Resume and Checkpoint are not implemented.
//!
//! `--fake MODE` in front of `sandbox` makes it misbehave: see [`Mode`].

mod boot;
mod runtime;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, ExitCode, Stdio};

/// How to misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Not at all.
    #[default]
    None,
    /// The command fails with words.
    Fails,
    /// The command never ends.
    Hangs,
    /// The process that is left behind ends at once.
    Dies,
    /// It listens and never answers.
    Deaf,
    /// It answers everything with rubbish.
    Rubbish,
    /// The pid file names another process.
    Lies,
    /// It says that it has killed what it has not.
    Spares,
}

impl Mode {
    fn of(word: &str) -> Option<Self> {
        Some(match word {
            "fails" => Self::Fails,
            "hangs" => Self::Hangs,
            "dies" => Self::Dies,
            "deaf" => Self::Deaf,
            "rubbish" => Self::Rubbish,
            "lies" => Self::Lies,
            "spares" => Self::Spares,
            "none" => Self::None,
            _ => return None,
        })
    }
}

#[derive(Debug, Default)]
struct Arguments {
    mode: Mode,
    word: String,
    tree: String,
    socket: String,
    id: String,
    pid_file: String,
}

fn parse(arguments: &[String]) -> Option<Arguments> {
    let mut all = Arguments::default();
    let mut rest = arguments.iter();
    let mut sandbox = false;
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-r" | "--root" => all.tree = rest.next()?.clone(),
            "--fake" => {
                all.word = rest.next()?.clone();
                all.mode = Mode::of(&all.word)?;
            }
            "sandbox" => sandbox = true,
            "--task-socket" => all.socket = rest.next()?.clone(),
            "--id" => all.id = rest.next()?.clone(),
            "--pid-file" => all.pid_file = rest.next()?.clone(),
            _ => return None,
        }
    }
    let given = [&all.tree, &all.socket, &all.id, &all.pid_file];
    (sandbox && given.iter().all(|text| !text.is_empty())).then_some(all)
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The command `sandbox`.
fn sandbox(arguments: &Arguments) -> Result<(), Failure> {
    match arguments.mode {
        Mode::Fails => return Err("the fake was told to fail".into()),
        Mode::Hangs => loop {
            std::thread::park();
        },
        _ => {}
    }
    let listener = UnixListener::bind(&arguments.socket)?;
    // The process that is left behind is the first one of its namespace.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)?;
    let mode = if arguments.word.is_empty() { "none" } else { arguments.word.as_str() };
    let child = Command::new("/proc/self/exe")
        .args(["boot", &arguments.tree, &arguments.id, mode])
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()?;
    let pid = match arguments.mode {
        Mode::Lies => std::os::unix::process::parent_id(),
        _ => child.id(),
    };
    std::fs::write(&arguments.pid_file, pid.to_string())?;
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        // The engine, on the hot path.
        ["oci", ..] => {
            let rest = arguments.into_iter().skip(1).collect();
            return kuasar_oci::builtin::main("fake-quark oci", rest).into();
        }
        ["boot", tree, id, mode] => boot::main(tree, id, Mode::of(mode).unwrap_or_default()),
        _ => match parse(&arguments) {
            Some(arguments) => sandbox(&arguments),
            None => {
                Err("usage: fake-quark [--fake MODE] -r DIR sandbox --task-socket PATH --id ID \
                         --pid-file PATH"
                    .into())
            }
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the error is {error}");
            ExitCode::from(255)
        }
    }
}
