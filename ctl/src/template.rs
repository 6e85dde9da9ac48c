//! `template`: machines that were saved when they were ready, and that pods start from.

use std::time::{Duration, Instant};

use kuasar_protos::admin as api;
use serde_json::{Value, json};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::{self, Format, Progress, Table, age, bytes, moment, rfc3339};
use crate::run::{Netns, PodSpec, RunDir};

/// Commands of `template`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Which there are
    List,
    /// Compare one, or all, with their digests
    Verify {
        /// Key, or beginning of it
        key: Option<String>,
    },
    /// Remove templates; the next pod of their size boots cold and makes one again
    Remove {
        /// Keys, or beginnings of them
        #[arg(required = true)]
        keys: Vec<String>,
    },
    /// Make the template of a size, by a pod of that size which is removed again
    Make {
        /// CPU limit of the pods that it is for
        #[arg(long, value_name = "NUMBER")]
        cpus: Option<f64>,
        /// Memory limit of the pods that it is for, in MiB
        #[arg(long, value_name = "MIB")]
        memory: Option<u32>,
        /// Runtime type of the pods that it is for
        #[arg(long, value_name = "TYPE", default_value = "")]
        runtime: String,
        /// Seconds that it may take
        #[arg(long, value_name = "SECONDS", default_value_t = 180)]
        limit: u64,
    },
}

async fn ask(client: &Client, q: api::TemplatesRequest) -> Result<api::TemplatesResponse> {
    // Digests of some hundred megabytes.
    let patience = ttrpc::context::with_duration(Duration::from_secs(300));
    Ok(client.admin().templates(patience, &q).await?)
}

async fn list(client: &Client) -> Result<api::TemplatesResponse> {
    ask(client, api::TemplatesRequest::new()).await
}

/// The one key that begins so.
fn pick(all: &api::TemplatesResponse, begin: &str) -> Result<String> {
    let found: Vec<&str> = all
        .templates
        .iter()
        .filter(|t| t.finished && t.key.starts_with(begin))
        .map(|t| t.key.as_str())
        .collect();
    match found.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(Error::NotFound(format!("no template's key begins with {begin:?}"))),
        _ => Err(Error::Usage(format!("several keys begin with {begin:?}: say more of it"))),
    }
}

/// `template`.
///
/// # Errors
/// The daemon's; [`Error::Findings`] for a damaged template.
pub async fn template(client: &Client, command: &Command, format: Format) -> Result<()> {
    let mut all = list(client).await?;
    match command {
        Command::List => {}
        Command::Verify { key } => {
            let _progress = Progress::new("comparing");
            let keys: Vec<String> = match key {
                Some(begin) => vec![pick(&all, begin)?],
                None => {
                    all.templates.iter().filter(|t| t.finished).map(|t| t.key.clone()).collect()
                }
            };
            for key in keys {
                let q = api::TemplatesRequest { verify: key.clone(), ..Default::default() };
                let told = ask(client, q).await?;
                let problem = told.templates.into_iter().find(|t| t.key == key).map(|t| t.problem);
                if let (Some(problem), Some(one)) =
                    (problem, all.templates.iter_mut().find(|t| t.key == key))
                {
                    one.problem = if problem.is_empty() { "whole".into() } else { problem };
                }
            }
        }
        Command::Remove { keys } => {
            for begin in keys {
                let remove = pick(&all, begin)?;
                all = ask(client, api::TemplatesRequest { remove, ..Default::default() }).await?;
            }
        }
        Command::Make { cpus, memory, runtime, limit } => {
            make(client, &all, *cpus, *memory, runtime, Duration::from_secs(*limit)).await?;
            all = list(client).await?;
        }
    }
    show(&all, format)?;
    let damaged = |t: &api::Template| !t.problem.is_empty() && t.problem != "whole";
    if all.templates.iter().any(damaged) { Err(Error::Findings) } else { Ok(()) }
}

/// A pod of the size boots cold, and the daemon makes a template of it; that is waited for.
async fn make(
    client: &Client,
    before: &api::TemplatesResponse,
    cpus: Option<f64>,
    memory: Option<u32>,
    runtime: &str,
    limit: Duration,
) -> Result<()> {
    if !before.enabled {
        return Err(Error::Failed(
            "pods do not start from templates here: set template.enabled = true in \
             vmm-sandboxer.toml, and restart kuasar-vmm"
                .into(),
        ));
    }
    let _progress = Progress::new("making a template");
    let dir = RunDir::new()?;
    let netns = Netns::new(dir.path())?;
    let mut pod = PodSpec::new(None, Some(netns.path()));
    pod.limit(cpus, memory);
    pod.set_runtime(runtime);
    let started = pod.start(client).await;
    let removed = pod.remove(client).await;
    started?;
    removed?;
    let until = Instant::now() + limit;
    let known = |key: &str| before.templates.iter().any(|t| t.finished && t.key == key);
    let mut seen = false;
    loop {
        let now = list(client).await?;
        if now.templates.iter().any(|t| t.finished && !known(&t.key)) {
            return Ok(());
        }
        let working = now.templates.iter().any(|t| !t.finished);
        // It begins some moments after the pod.
        if seen && !working || !seen && until.saturating_duration_since(Instant::now()) < limit / 4
        {
            return Err(Error::Failed(
                "no template was made: there is one of this size already, or the machine cannot be \
                 saved; see the daemon's log"
                    .into(),
            ));
        }
        seen |= working;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

fn show(all: &api::TemplatesResponse, format: Format) -> Result<()> {
    if format == Format::Json {
        let templates: Vec<Value> = all
            .templates
            .iter()
            .map(|t| {
                json!({
                    "key": t.key, "bytes": t.bytes, "finished": t.finished,
                    "madeAt": rfc3339(moment(t.made_at.as_ref())),
                    "verified": (!t.problem.is_empty()).then(|| t.problem == "whole"),
                    "problem": Some(&t.problem).filter(|p| !p.is_empty() && *p != "whole"),
                })
            })
            .collect();
        let pool = all.pool.as_ref().map(|pool| {
            json!({
                "wanted": pool.wanted, "ready": pool.ready, "refilled": pool.refilled,
                "taken": pool.taken, "missed": pool.missed, "lost": pool.lost,
                "hindrance": Some(&pool.hindrance).filter(|why| !why.is_empty()),
            })
        });
        let value = json!({
            "enabled": all.enabled, "dir": all.dir, "templates": templates, "pool": pool,
        });
        return output::json(&value);
    }
    if !all.enabled {
        output::note("pods do not start from templates: template.enabled is false");
    }
    let mut table = Table::new(&["KEY", "SIZE", "AGE", "STATE"]);
    for t in &all.templates {
        let state = match (t.finished, t.problem.as_str()) {
            (false, _) => "being made",
            (true, "") => "ready",
            (true, problem) => problem,
        };
        let key = t.key.chars().take(16).collect();
        table.row([key, bytes(t.bytes), age(moment(t.made_at.as_ref())), state.into()]);
    }
    output::print(&table.text())?;
    let Some(pool) = all.pool.as_ref() else { return Ok(()) };
    if !pool.hindrance.is_empty() {
        output::note(&format!("no pool is kept: {}", pool.hindrance));
    }
    let mut table = Table::new(&["POOL", "READY", "TAKEN", "MISSED", "REFILLED", "LOST"]);
    let ready = pool.ready.to_string();
    let counts = [pool.taken, pool.missed, pool.refilled, pool.lost].map(|n| n.to_string());
    let [taken, missed, refilled, lost] = counts;
    table.row([pool.wanted.to_string(), ready, taken, missed, refilled, lost]);
    output::print("\n")?;
    output::print(&table.text())
}
