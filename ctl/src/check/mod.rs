//! `check`: what this host can run, what is missing, and what mends it.
//!
//! A finding has one state: *good*; *absent*, which somebody who does not want the thing need not
//! mind; *warning*; *bad*, which makes pods fail. Only the last makes the exit code 5. What is said
//! of configurations is what the daemon itself says.

mod containerd;
mod daemon;
mod host;
mod isulad;

use std::path::PathBuf;

use kuasar_daemon::diagnosis::Problem;
use serde_json::{Value, json};

use crate::daemons::Daemon;
use crate::error::{Error, Result};
use crate::output::{self, Colours, Format, Progress};

/// What `check` does.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Print the stanzas that containerd's configuration lacks, to be pasted; where iSulad is, what
    /// its daemon.json lacks, to be merged into it
    #[arg(long)]
    pub fix: bool,
    /// containerd's configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    pub containerd_config: PathBuf,
    /// iSulad's configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/isulad/daemon.json")]
    pub isulad_config: PathBuf,
    /// Show what is good, too
    #[arg(short, long)]
    pub verbose: bool,
}

/// How well a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Good,
    /// Not here; nothing needs it.
    Absent,
    /// Pods run, but not as they could.
    Warning,
    /// Pods will fail.
    Bad,
}

/// What was found of one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it belongs to.
    pub area: &'static str,
    /// The thing.
    pub what: String,
    /// How well it is.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// The one command, or the one line, that mends it; empty where nothing needs to be.
    pub remedy: String,
}

impl Finding {
    /// Something that is well.
    pub fn good(area: &'static str, what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            area,
            what: what.into(),
            state: State::Good,
            detail: detail.into(),
            remedy: String::new(),
        }
    }

    /// What a daemon says in the same words.
    pub fn bad(area: &'static str, what: impl Into<String>, problem: Problem) -> Self {
        Self::other(State::Bad, area, what, problem.detail, problem.remedy)
    }

    /// Something that is not.
    pub fn other(
        state: State,
        area: &'static str,
        what: impl Into<String>,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { area, what: what.into(), state, detail: detail.into(), remedy: remedy.into() }
    }
}

/// `check`.
///
/// # Errors
/// [`Error::Findings`] when something is bad.
pub async fn check(daemons: &[Daemon], args: &CheckArgs, format: Format) -> Result<()> {
    let looked = containerd::read(&args.containerd_config);
    let isulad = isulad::read(&args.isulad_config);
    if args.fix {
        let missing = containerd::stanzas(daemons, looked.as_ref().ok());
        let config = isulad.as_ref().ok().and_then(Option::as_ref);
        let of_isulad = (config.is_some() || isulad::is_installed())
            .then(|| isulad::stanza(daemons, config))
            .flatten();
        return fix(&missing, of_isulad.as_ref(), args, format);
    }
    let mut all = {
        let _progress = Progress::new("looking at the host");
        let wanted = daemons.to_vec();
        let host = tokio::task::spawn_blocking(move || host::findings(&wanted)).await;
        host.map_err(|e| Error::Failed(format!("looking at the host: {e}")))?
    };
    all.extend(containerd::findings(daemons, &args.containerd_config, looked).await);
    all.extend(isulad::findings(daemons, &args.isulad_config, isulad));
    all.extend(daemon::findings(daemons).await);
    show(&all, args.verbose, format)?;
    let bad = all.iter().any(|finding| finding.state == State::Bad);
    if bad { Err(Error::Findings) } else { Ok(()) }
}

/// What the engines' configurations lack.
fn fix(containerd: &str, isulad: Option<&Value>, args: &CheckArgs, format: Format) -> Result<()> {
    if format == Format::Json {
        return output::json(&json!({ "stanzas": containerd, "isulad": isulad }));
    }
    if containerd.is_empty() && isulad.is_none() {
        output::note("nothing is missing");
        return Ok(());
    }
    output::print(containerd)?;
    let Some(isulad) = isulad else { return Ok(()) };
    output::note(&format!("to be merged into {}:", args.isulad_config.display()));
    output::print(&format!("{isulad:#}\n"))
}

fn word(state: State) -> &'static str {
    match state {
        State::Good => "good",
        State::Absent => "absent",
        State::Warning => "warning",
        State::Bad => "bad",
    }
}

fn show(all: &[Finding], verbose: bool, format: Format) -> Result<()> {
    if format == Format::Json {
        let all: Vec<Value> = all
            .iter()
            .map(|f| {
                json!({
                    "area": f.area, "what": f.what, "state": word(f.state), "detail": f.detail,
                    "remedy": Some(&f.remedy).filter(|remedy| !remedy.is_empty()),
                })
            })
            .collect();
        return output::json(&all.into());
    }
    let colours = Colours::detect();
    let mut area = "";
    for f in all.iter().filter(|f| verbose || f.state != State::Good) {
        if f.area != area {
            output::print(&format!("{}\n", f.area))?;
            area = f.area;
        }
        let state = match f.state {
            State::Good => colours.good("good   "),
            State::Absent => "absent ".into(),
            State::Warning => colours.warn("warning"),
            State::Bad => colours.bad("bad    "),
        };
        let remedy = if f.remedy.is_empty() { String::new() } else { format!(": {}", f.remedy) };
        let text = output::clean(&format!("{}: {}{remedy}", f.what, f.detail));
        output::print(&format!("  {state}  {text}\n"))?;
    }
    let count = |state| all.iter().filter(|f| f.state == state).count();
    let (good, absent) = (count(State::Good), count(State::Absent));
    let (warnings, bad) = (count(State::Warning), count(State::Bad));
    output::print(&format!("{good} good, {absent} absent, {warnings} warnings, {bad} bad\n"))
}
