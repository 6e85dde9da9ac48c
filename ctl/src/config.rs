//! `config`: what daemons are configured to do, whether that is right, and the way over from upstream
//! Kuasar's files.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::daemons::{self, Daemon, KINDS};
use crate::error::{Error, Result};
use crate::output::{self, Format, Table};

/// The files that packages install: every key at its default, switched off with a `#`.
fn packaged(kind: &str) -> &'static str {
    match kind {
        "runc" => include_str!("../../packaging/runc-sandboxer.toml"),
        "vmm" => include_str!("../../packaging/vmm-sandboxer.toml"),
        "gvisor" => include_str!("../../packaging/gvisor-sandboxer.toml"),
        "quark" => include_str!("../../packaging/quark-sandboxer.toml"),
        _ => include_str!("../../packaging/wasm-sandboxer.toml"),
    }
}

/// Commands of `config`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show a daemon's settings: what is set stands bare, defaults behind a `#`
    Show {
        /// Sandboxer; all that are configured without
        kind: Option<String>,
    },
    /// Check configurations, by the daemons' own programs
    Check {
        /// Sandboxer; all that are configured without
        kind: Option<String>,
    },
    /// Write a configuration of vmm-sandboxer from one of upstream Kuasar
    Migrate {
        /// Upstream's file, usually /var/lib/kuasar/config.toml
        file: PathBuf,
        /// VMM, when the file does not show which one upstream was built for
        #[arg(long, value_name = "NAME", value_parser = ["qemu", "cloud-hypervisor", "stratovirt"])]
        vmm: Option<String>,
        /// Write the result here, and not to standard output; an existing file is not replaced
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
}

/// An error of a configuration on one line, with its cause.
pub fn explain(error: &kuasar_daemon::config::ConfigError) -> String {
    let text = match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    one_line(&text)
}

/// Texts of the TOML parser show the place on further lines.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `config`.
///
/// # Errors
/// [`Error::Findings`] for a configuration that is wrong.
pub async fn config(command: &Command, config_dir: &Path, format: Format) -> Result<()> {
    match command {
        Command::Show { kind } => show(&chosen(kind.as_deref(), config_dir)?, format),
        Command::Check { kind } => check(&chosen(kind.as_deref(), config_dir)?, format).await,
        Command::Migrate { file, vmm, to } => {
            let text = std::fs::read_to_string(file).map_err(Error::at("read", file))?;
            let ours = crate::migrate::migrate(&text, vmm.as_deref())
                .map_err(|why| Error::Failed(format!("{}: {}", file.display(), one_line(&why))))?;
            match to {
                None => output::print(&ours),
                Some(to) => {
                    use std::io::Write;
                    let new = std::fs::OpenOptions::new().write(true).create_new(true).open(to);
                    let written = new.and_then(|mut file| file.write_all(ours.as_bytes()));
                    written.map_err(Error::at("write", to))
                }
            }
        }
    }
}

fn chosen(kind: Option<&str>, config_dir: &Path) -> Result<Vec<Daemon>> {
    match kind {
        Some(kind) => daemons::find(config_dir, &[], Some(kind)),
        None => {
            let all = KINDS.iter().map(|kind| daemons::of_kind(kind, config_dir));
            Ok(all.filter(|daemon| daemon.config.is_some()).collect())
        }
    }
}

/// The packaged text with what is set put in its place. Equal, as a configuration, to the files that
/// it was made from.
fn filled(packaged: &str, mut set: toml::Table) -> String {
    fn at<'a>(root: &'a mut toml::Table, path: &[String]) -> Option<&'a mut toml::Table> {
        path.iter().try_fold(root, |table, key| table.get_mut(key)?.as_table_mut())
    }
    let is_table = |value: &toml::Value| value.is_table();
    // What a table has beyond the keys that the text knows.
    let rest = |set: &mut toml::Table, path: &[String]| -> String {
        let Some(table) = at(set, path) else { return String::new() };
        let keys: Vec<String> =
            table.iter().filter(|(_, v)| !is_table(v)).map(|(k, _)| k.clone()).collect();
        let lines = keys.into_iter().filter_map(|key| {
            let value = table.remove(&key)?;
            Some(toml::to_string(&toml::Table::from_iter([(key, value)])).unwrap_or_default())
        });
        lines.collect()
    };
    let (mut out, mut path): (String, Vec<String>) = Default::default();
    for line in packaged.lines() {
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            out.push_str(&rest(&mut set, &path));
            path = header.split('.').map(str::to_owned).collect();
        }
        let key = line.strip_prefix('#').and_then(|l| l.split_once(" = ")).map(|(key, _)| key);
        let plain = |key: &&str| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let value = key.filter(plain).and_then(|key| {
            let table = at(&mut set, &path)?;
            Some((key.to_owned(), table.remove(key)?))
        });
        match value {
            Some(pair) => {
                out.push_str(&toml::to_string(&toml::Table::from_iter([pair])).unwrap_or_default());
            }
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out.push_str(&rest(&mut set, &path));
    prune(&mut set);
    if !set.is_empty() {
        out.push('\n');
        out.push_str(&toml::to_string(&set).unwrap_or_default());
    }
    out
}

/// Removes tables that have become empty.
fn prune(table: &mut toml::Table) {
    table.retain(|_, value| match value {
        toml::Value::Table(inner) => {
            prune(inner);
            !inner.is_empty()
        }
        _ => true,
    });
}

fn show(daemons: &[Daemon], format: Format) -> Result<()> {
    let mut all = Vec::new();
    for daemon in daemons {
        if let Some(problem) = &daemon.problem {
            return Err(Error::Failed(problem.clone()));
        }
        let set = kuasar_daemon::config::table(daemon.config.as_deref())
            .map_err(|error| Error::Failed(explain(&error)))?;
        let file = daemon.config.as_ref().map(|file| file.display().to_string());
        match format {
            Format::Json => all.push(json!({
                "sandboxer": daemon.kind, "file": file,
                "set": serde_json::to_value(&set).unwrap_or(Value::Null),
            })),
            Format::Table => {
                let from = file.unwrap_or_else(|| "no file, all is at its default".into());
                let head = format!("# {}-sandboxer: {from}\n", daemon.kind);
                output::print(&(head + &filled(packaged(&daemon.kind), set) + "\n"))?;
            }
        }
    }
    if format == Format::Json { output::json(&all.into()) } else { Ok(()) }
}

/// What a daemon's own program says of its configuration: nothing when it is good, and warnings.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What is wrong.
    pub problem: Option<String>,
    /// What will be.
    pub warnings: Vec<String>,
}

/// A program of ours: beside this one, or in `PATH`.
pub fn program(name: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(name));
    beside
        .filter(|path| path.is_file())
        .or_else(|| kuasar_host::process::find_program(Path::new(name)))
}

/// Asks the program of a daemon; where it is not installed, what all daemons share is checked here.
///
/// # Errors
/// When the program cannot be run.
pub async fn verdict(daemon: &Daemon) -> Result<Verdict> {
    let Some(file) = &daemon.config else { return Ok(Verdict::default()) };
    let name = format!("{}-sandboxer", daemon.kind);
    let Some(program) = program(&name) else {
        let problem = daemon.problem.clone();
        return Ok(Verdict { problem, warnings: vec![format!("{name} is not installed here")] });
    };
    let mut command = tokio::process::Command::new(&program);
    command.arg("--config").arg(file).arg("--check-config").stdin(Stdio::null());
    let out = tokio::time::timeout(std::time::Duration::from_secs(20), command.output()).await;
    let out = out
        .map_err(|_| Error::Failed(format!("{} --check-config does not end", program.display())))?
        .map_err(Error::at("run", &program))?;
    let own = format!("{name}: ");
    let said = |line: &str| output::clean(line.strip_prefix(&own).unwrap_or(line));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    if out.status.success() {
        let warning = |line: &str| said(line).strip_prefix("warning: ").map(str::to_owned);
        return Ok(Verdict { problem: None, warnings: text.lines().filter_map(warning).collect() });
    }
    Ok(Verdict { problem: Some(one_line(&said(text.trim()))), warnings: Vec::new() })
}

async fn check(daemons: &[Daemon], format: Format) -> Result<()> {
    let mut table = Table::new(&["SANDBOXER", "FILE", "RESULT"]);
    let (mut all, mut wrong) = (Vec::new(), false);
    for daemon in daemons {
        let verdict = verdict(daemon).await?;
        wrong |= verdict.problem.is_some();
        let file = daemon.config.as_ref().map(|f| f.display().to_string()).unwrap_or_default();
        let result = match (&verdict.problem, verdict.warnings.as_slice()) {
            (Some(problem), _) => problem.clone(),
            (None, []) => "good".into(),
            (None, warnings) => format!("good, but: {}", warnings.join("; ")),
        };
        table.row([daemon.kind.clone(), file.clone(), result]);
        all.push(json!({
            "sandboxer": daemon.kind, "file": file, "good": verdict.problem.is_none(),
            "problem": verdict.problem, "warnings": verdict.warnings,
        }));
    }
    match format {
        Format::Json => output::json(&all.into())?,
        Format::Table => output::print(&table.text())?,
    }
    if wrong { Err(Error::Findings) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_the_same_configuration() {
        for kind in KINDS {
            let text = filled(packaged(kind), toml::Table::new());
            assert_eq!(text.trim_end(), packaged(kind).trim_end(), "{kind}");
        }
        let set: toml::Table = "log_level = 'debug'\nfuture = 1\n[limits]\nmax_execs = 7\n\
            [runtimes]\n'io.containerd.x.v1' = 'crun'\n[engines.crun]\npath = '/c'\n"
            .parse()
            .unwrap();
        let text = filled(packaged("runc"), set.clone());
        assert_eq!(
            text.parse::<toml::Table>()
                .map(|mut t| {
                    prune(&mut t);
                    t
                })
                .unwrap(),
            set,
            "{text}"
        );
        assert!(text.contains("\nlog_level = \"debug\"\n") && text.contains("\n#dir = "), "{text}");
    }

    #[test]
    fn a_wrong_file_is_explained_on_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runc-sandboxer.toml");
        std::fs::write(&file, "a = [\nb").unwrap();
        let error = kuasar_daemon::config::table(Some(&file)).unwrap_err();
        assert!(!explain(&error).contains('\n'));
    }
}
