//! The engine's command line, read by hand: it is read on every create and exec.

use std::path::PathBuf;

use super::{Error, Result};

/// A parsed command line.
#[derive(Debug)]
pub struct Args {
    /// Directory that holds one state directory per container.
    pub root: PathBuf,
    /// Where to write errors, as JSON lines.
    pub log: Option<PathBuf>,
    /// Container id.
    pub id: String,
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Make a container; its process waits for `start`.
    Create(Create),
    /// Run a further process in a container.
    Exec(Exec),
    /// Let the container's process run.
    Start,
    /// Send a signal.
    Kill {
        /// Signal number.
        signal: i32,
        /// To every process of the container.
        all: bool,
    },
    /// Remove a container.
    Delete {
        /// Kill it first.
        force: bool,
    },
    /// Print the OCI state.
    State,
}

/// Options of `create`.
#[derive(Debug, Default)]
pub struct Create {
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Where to write the pid.
    pub pid_file: Option<PathBuf>,
    /// Socket that gets the pty master.
    pub console_socket: Option<PathBuf>,
    /// How many descriptors from 3 on the payload inherits.
    pub preserve_fds: i32,
    /// Use systemd for the cgroup.
    pub systemd: bool,
    /// Leave the container to libcontainer, whatever its spec.
    pub libcontainer: bool,
    /// Directory in which compiled seccomp profiles are kept.
    pub cache: Option<PathBuf>,
}

/// Options of `exec`.
#[derive(Debug, Default)]
pub struct Exec {
    /// File with the OCI `process` object.
    pub process: PathBuf,
    /// Where to write the pid.
    pub pid_file: Option<PathBuf>,
    /// Socket that gets the pty master.
    pub console_socket: Option<PathBuf>,
    /// Directory in which compiled seccomp profiles are kept.
    pub cache: Option<PathBuf>,
}

const USAGE: &str = "usage: [oci] --root DIR [--log FILE] [--libcontainer] [--seccomp-cache DIR] \
    create --bundle DIR [--pid-file F] [--console-socket S] [--preserve-fds N] ID | \
    exec --process F [--pid-file F] [--console-socket S] ID | start ID | kill ID [SIGNAL] | \
    delete [--force] ID | state ID";

impl Args {
    /// Reads the arguments after `oci`.
    pub fn parse(arguments: Vec<String>) -> Result<Self> {
        let mut words = Words(arguments.into_iter());
        let mut root = PathBuf::from("/run/kuasar-oci");
        let mut log = None;
        let (mut systemd, mut libcontainer, mut cache) = (false, false, None);
        let name = loop {
            let (word, inline) = words.option()?;
            match word.as_str() {
                "--root" => root = words.value(&word, inline)?.into(),
                "--log" => log = Some(words.value(&word, inline)?.into()),
                "--log-format" => drop(words.value(&word, inline)?),
                "--systemd-cgroup" => systemd = true,
                "--libcontainer" => libcontainer = true,
                "--seccomp-cache" => cache = Some(words.value(&word, inline)?.into()),
                "--debug" => {}
                other if other.starts_with('-') => {
                    return Err(Error::Usage(format!("unknown option {other}; {USAGE}")));
                }
                _ => break word,
            }
        };
        let mut exec = Exec { cache: cache.clone(), ..Exec::default() };
        let mut create = Create { systemd, libcontainer, cache, ..Create::default() };
        let (mut all, mut force) = (false, false);
        let mut rest = Vec::new();
        while let Some((word, inline)) = words.next() {
            match (name.as_str(), word.as_str()) {
                ("create", "--bundle" | "-b") => create.bundle = words.value(&word, inline)?.into(),
                ("create", "--pid-file") => {
                    create.pid_file = Some(words.value(&word, inline)?.into());
                }
                ("create", "--console-socket") => {
                    create.console_socket = Some(words.value(&word, inline)?.into());
                }
                ("create", "--preserve-fds") => {
                    let text = words.value(&word, inline)?;
                    create.preserve_fds = text.parse().map_err(|_| {
                        Error::Usage(format!("--preserve-fds {text}: not a number"))
                    })?;
                }
                ("exec", "--process" | "-p") => exec.process = words.value(&word, inline)?.into(),
                ("exec", "--pid-file") => exec.pid_file = Some(words.value(&word, inline)?.into()),
                ("exec", "--console-socket") => {
                    exec.console_socket = Some(words.value(&word, inline)?.into());
                }
                ("exec", "--detach" | "-d") => {}
                ("kill", "--all" | "-a") => all = true,
                ("delete", "--force" | "-f") => force = true,
                (_, other) if other.starts_with('-') => {
                    return Err(Error::Usage(format!("unknown option {other} of {name}; {USAGE}")));
                }
                _ => rest.push(word),
            }
        }
        let mut rest = rest.into_iter();
        let id = rest.next().ok_or_else(|| Error::Usage(format!("no container id; {USAGE}")))?;
        check_id(&id)?;
        let command = match name.as_str() {
            "create" => Command::Create(create),
            "exec" => Command::Exec(exec),
            "start" => Command::Start,
            "state" => Command::State,
            "delete" => Command::Delete { force },
            "kill" => Command::Kill { signal: signal(rest.next().as_deref())?, all },
            other => return Err(Error::Usage(format!("unknown command {other}; {USAGE}"))),
        };
        Ok(Self { root, log, id, command })
    }
}

/// The id becomes a directory name: the same characters as runc allows.
fn check_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() || id.len() > 1024 || id.starts_with('.') || !id.chars().all(plain) {
        return Err(Error::Usage(format!("invalid container id {id:?}")));
    }
    Ok(())
}

fn signal(text: Option<&str>) -> Result<i32> {
    use std::str::FromStr;
    let Some(text) = text else { return Ok(libc::SIGTERM) };
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let name = if text.starts_with("SIG") { text.to_owned() } else { format!("SIG{text}") };
    nix::sys::signal::Signal::from_str(&name)
        .map(|signal| signal as i32)
        .map_err(|_| Error::Usage(format!("unknown signal {text}")))
}

struct Words(std::vec::IntoIter<String>);

impl Words {
    /// The next word; `--name=value` comes apart.
    fn next(&mut self) -> Option<(String, Option<String>)> {
        let word = self.0.next()?;
        match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                Some((name.to_owned(), Some(value.to_owned())))
            }
            _ => Some((word, None)),
        }
    }

    fn option(&mut self) -> Result<(String, Option<String>)> {
        self.next().ok_or_else(|| Error::Usage(USAGE.to_owned()))
    }

    fn value(&mut self, name: &str, inline: Option<String>) -> Result<String> {
        inline
            .or_else(|| self.0.next())
            .ok_or_else(|| Error::Usage(format!("{name} needs a value")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn a_create_command_line_as_runc_takes_it() {
        let args = parse("--root /r --log=/l create --bundle /b --pid-file /p --preserve-fds 2 c1")
            .unwrap();
        assert_eq!(args.root, PathBuf::from("/r"));
        assert_eq!(args.log, Some(PathBuf::from("/l")));
        assert_eq!(args.id, "c1");
        let Command::Create(create) = args.command else { panic!("not create") };
        assert_eq!(create.preserve_fds, 2);
        assert_eq!(create.bundle, PathBuf::from("/b"));
    }

    #[test]
    fn ids_cannot_leave_the_root_directory() {
        for id in ["../x", "a/b", ".", "..", ".hidden"] {
            assert!(parse(&format!("state {id}")).is_err(), "{id}");
        }
    }

    #[test]
    fn signals_by_number_and_by_name() {
        for line in ["kill c 9", "kill c KILL", "kill c SIGKILL"] {
            let Command::Kill { signal, .. } = parse(line).unwrap().command else { panic!() };
            assert_eq!(signal, 9);
        }
        assert!(parse("kill c NOSUCH").is_err());
    }
}
