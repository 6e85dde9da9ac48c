//! Pods: `ps`, `inspect`, `stop`, and how a command finds the pod that it is about.

use std::time::Duration;

use kuasar_protos::admin as api;
use kuasar_protos::controller as sandbox;
use serde_json::{Value, json};

use crate::client::{Client, patient};
use crate::error::{Error, Result};
use crate::output::{self, Format, Progress, Table, age, moment, rfc3339, short};

/// Label of pods that `kuasar-ctl run` has made: pid and start time of its process.
pub const OWNER: &str = "io.kuasar.ctl.owner";

/// A pod and whose it is.
#[derive(Clone)]
pub struct Pod {
    /// Its daemon.
    pub client: Client,
    /// What the daemon says of it.
    pub sandbox: api::Sandbox,
}

impl Pod {
    /// `namespace/name`, or its id.
    pub fn name(&self) -> String {
        let s = &self.sandbox;
        match (s.pod_namespace.as_str(), s.pod_name.as_str()) {
            (_, "") => s.id.clone(),
            ("", name) => name.to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        }
    }

    /// The container that was named, or the only one that runs.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Usage`], with the names that there are.
    pub fn container(&self, named: Option<&str>) -> Result<&api::Container> {
        let all = &self.sandbox.containers;
        let running = |c: &&api::Container| matches!(c.status.as_str(), "running" | "paused");
        let found: Vec<&api::Container> = match named {
            Some(name) => all
                .iter()
                .filter(|c| c.id.starts_with(name) || crate::bundle::name(c) == Some(name.into()))
                .collect(),
            None => all.iter().filter(running).collect(),
        };
        match found.as_slice() {
            [one] => Ok(one),
            [] => Err(Error::NotFound(match named {
                Some(name) => format!("pod {} has no container {name:?}", self.name()),
                None => format!("no container runs in pod {}", self.name()),
            })),
            several => {
                let ids: Vec<String> = several.iter().map(|c| short(&c.id)).collect();
                let text = format!("pod {} has several containers", self.name());
                Err(Error::Usage(format!("{text}: say one of {}", ids.join(", "))))
            }
        }
    }
}

/// All pods of these daemons, asked side by side.
///
/// # Errors
/// The first daemon's that fails.
pub async fn all(clients: &[Client]) -> Result<Vec<Pod>> {
    let asked = clients.iter().map(Client::sandboxes);
    let mut all = Vec::new();
    for (client, listed) in clients.iter().zip(futures::future::join_all(asked).await) {
        let pod = |sandbox| Pod { client: client.clone(), sandbox };
        all.extend(listed?.into_iter().map(pod));
    }
    Ok(all)
}

/// The one pod that `target` names: its id or the beginning of it, its name, `namespace/name`, or a
/// container's id. Also answers the container when that was named.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Usage`] when several fit.
pub async fn find(clients: &[Client], target: &str) -> Result<(Pod, Option<String>)> {
    pick(all(clients).await?, target)
}

fn pick(all: Vec<Pod>, target: &str) -> Result<(Pod, Option<String>)> {
    if target.is_empty() {
        return Err(Error::Usage("the name of a pod is empty".into()));
    }
    let exact = |pod: &Pod| {
        pod.sandbox.id == target || pod.sandbox.pod_name == target || pod.name() == target
    };
    let mut found: Vec<(Pod, Option<String>)> =
        all.iter().filter(|pod| exact(pod)).map(|pod| (pod.clone(), None)).collect();
    if found.is_empty() {
        let begins = |pod: &&Pod| pod.sandbox.id.starts_with(target);
        found = all.iter().filter(begins).map(|pod| (pod.clone(), None)).collect();
    }
    if found.is_empty() {
        for pod in &all {
            let containers = pod.sandbox.containers.iter();
            for container in containers.filter(|c| c.id.starts_with(target)) {
                found.push((pod.clone(), Some(container.id.clone())));
            }
        }
    }
    if found.len() > 1 {
        let ids: Vec<String> = found
            .iter()
            .map(|(pod, _)| format!("{} ({})", short(&pod.sandbox.id), pod.name()))
            .collect();
        return Err(Error::Usage(format!(
            "{target:?} fits {}: say more of its id",
            ids.join(", ")
        )));
    }
    found.pop().ok_or_else(|| {
        Error::NotFound(format!("no pod and no container is named {target:?}: see kuasar-ctl ps"))
    })
}

/// A sandbox as JSON.
pub fn value(client: &Client, s: &api::Sandbox) -> Value {
    let containers: Vec<Value> = s.containers.iter().map(container_value).collect();
    let exited = moment(s.exited_at.as_ref());
    json!({
        "id": s.id,
        "sandboxer": client.kind,
        "name": s.pod_name,
        "namespace": s.pod_namespace,
        "uid": s.pod_uid,
        "attempt": s.attempt,
        "containerdNamespace": s.namespace,
        "runtime": s.runtime,
        "phase": s.phase,
        "pid": s.pid,
        "createdAt": rfc3339(moment(s.created_at.as_ref())),
        "exitedAt": rfc3339(exited),
        "exitStatus": exited.map(|_| s.exit_status),
        "address": s.address,
        "netns": s.netns,
        "cgroup": s.cgroup,
        "logDirectory": s.log_directory,
        "labels": s.labels,
        "containers": containers,
    })
}

fn container_value(c: &api::Container) -> Value {
    let exited = moment(c.exited_at.as_ref());
    json!({
        "id": c.id,
        "name": crate::bundle::name(c),
        "status": c.status,
        "pid": c.pid,
        "bundle": c.bundle,
        "execs": c.execs,
        "exitedAt": rfc3339(exited),
        "exitStatus": exited.map(|_| c.exit_status),
    })
}

/// What `ps` shows.
#[derive(Debug, clap::Args)]
pub struct PsArgs {
    /// Show containers, not pods
    #[arg(short, long)]
    pub containers: bool,
    /// Show whole ids
    #[arg(long)]
    pub no_trunc: bool,
    /// Show ids only
    #[arg(short, long)]
    pub quiet: bool,
}

/// `ps`.
///
/// # Errors
/// The daemons'.
pub async fn ps(clients: &[Client], args: &PsArgs, format: Format) -> Result<()> {
    let pods = all(clients).await?;
    if format == Format::Json {
        let all: Vec<Value> = pods.iter().map(|pod| value(&pod.client, &pod.sandbox)).collect();
        return output::json(&all.into());
    }
    let shown = |id: &str| if args.no_trunc { id.to_owned() } else { short(id) };
    if args.quiet {
        let containers = |pod: &Pod| -> Vec<String> {
            pod.sandbox.containers.iter().map(|c| c.id.clone()).collect()
        };
        let ids: Vec<String> = match args.containers {
            true => pods.iter().flat_map(containers).collect(),
            false => pods.iter().map(|pod| pod.sandbox.id.clone()).collect(),
        };
        return output::print(&ids.iter().map(|id| format!("{id}\n")).collect::<String>());
    }
    let mut table = if args.containers {
        Table::new(&["CONTAINER", "NAME", "STATUS", "PID", "EXECS", "POD", "SANDBOXER"])
    } else {
        Table::new(&["POD", "NAME", "SANDBOXER", "PHASE", "AGE", "PID", "CONTAINERS"])
    };
    for pod in &pods {
        let s = &pod.sandbox;
        if args.containers {
            for c in &s.containers {
                let status = match c.exited_at.is_some() {
                    true => format!("{} ({})", c.status, c.exit_status),
                    false => c.status.clone(),
                };
                let name = crate::bundle::name(c).unwrap_or_default();
                let (pid, execs) = (c.pid.to_string(), c.execs.to_string());
                let kind = pod.client.kind.clone();
                table.row([shown(&c.id), name, status, pid, execs, pod.name(), kind]);
            }
            continue;
        }
        let phase = match s.exited_at.is_some() {
            true => format!("{} ({})", s.phase, s.exit_status),
            false => s.phase.clone(),
        };
        let running = s.containers.iter().filter(|c| c.status == "running").count();
        let containers = format!("{running}/{}", s.containers.len());
        let (kind, age) = (pod.client.kind.clone(), age(moment(s.created_at.as_ref())));
        let pid = if s.pid == 0 { "-".to_owned() } else { s.pid.to_string() };
        table.row([shown(&s.id), pod.name(), kind, phase, age, pid, containers]);
    }
    output::print(&table.text())
}

/// `inspect`: all that is known of pods, as JSON.
///
/// # Errors
/// The daemons'.
pub async fn inspect(clients: &[Client], targets: &[String]) -> Result<()> {
    let mut all = Vec::new();
    for target in targets {
        let (pod, _) = find(clients, target).await?;
        let q = sandbox::ControllerStatusRequest {
            sandbox_id: pod.sandbox.id.clone(),
            verbose: true,
            ..Default::default()
        };
        let status = pod.client.controller().status(pod.client.context(), &q).await?;
        let mut value = value(&pod.client, &pod.sandbox);
        // Each entry is a JSON text of its own.
        let info: serde_json::Map<String, Value> = status
            .info
            .into_iter()
            .map(|(key, text)| (key, serde_json::from_str(&text).unwrap_or(Value::String(text))))
            .collect();
        if let Some(members) = value.as_object_mut() {
            members.insert("state".into(), status.state.into());
            members.insert("taskVersion".into(), status.version.into());
            members.insert("info".into(), info.into());
        }
        all.push(value);
    }
    output::json(&all.into())
}

/// What `stop` does.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// Pods: id, beginning of an id, name or namespace/name
    #[arg(required = true)]
    pub pods: Vec<String>,
    /// Remove them, too. An engine that made them is not told
    #[arg(long)]
    pub remove: bool,
    /// How long their containers may take to end, in seconds; 0 is the daemon's own limit
    #[arg(short, long, default_value_t = 0, value_name = "SECONDS")]
    pub timeout: u32,
}

/// `stop`.
///
/// # Errors
/// The daemon's.
pub async fn stop(clients: &[Client], args: &StopArgs, format: Format) -> Result<()> {
    for target in &args.pods {
        let (pod, _) = find(clients, target).await?;
        let _progress = Progress::new(format!("stopping {}", pod.name()));
        end(&pod.client, &pod.sandbox.id, args.timeout, args.remove).await?;
        match format {
            Format::Json => output::json_line(&json!({
                "id": pod.sandbox.id, "stopped": true, "removed": args.remove,
            }))?,
            Format::Table => output::print(&format!("{}\n", pod.sandbox.id))?,
        }
    }
    Ok(())
}

/// Ends a sandbox, and removes it if wanted.
///
/// # Errors
/// The daemon's.
pub async fn end(client: &Client, id: &str, timeout_secs: u32, remove: bool) -> Result<()> {
    let sandbox_id = id.to_owned();
    let q = sandbox::ControllerStopRequest { sandbox_id, timeout_secs, ..Default::default() };
    match client.controller().stop(patient(), &q).await.map_err(Error::from) {
        Ok(_) => {}
        Err(Error::NotFound(_)) if remove => {}
        Err(error) => return Err(error),
    }
    if remove {
        let sandbox_id = id.to_owned();
        let q = sandbox::ControllerShutdownRequest { sandbox_id, ..Default::default() };
        client.controller().shutdown(patient(), &q).await?;
    }
    Ok(())
}

/// Removes the pods that this process has made.
///
/// # Errors
/// The daemon's.
pub async fn remove_own(client: &Client) -> Result<()> {
    let own = crate::run::owner();
    for sandbox in client.sandboxes().await? {
        if sandbox.labels.get(OWNER) == Some(&own) {
            crate::run::remove_pod(client, &sandbox.id).await?;
        }
    }
    Ok(())
}

/// What `gc` does.
#[derive(Debug, clap::Args)]
pub struct GcArgs {
    /// Remove unreadable records from quarantine, too
    #[arg(long)]
    pub quarantine: bool,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

/// `gc`: pods of a `kuasar-ctl run` that was killed, what it has left, and what the daemons collect
/// from time to time.
///
/// # Errors
/// The daemons'.
pub async fn gc(clients: &[Client], args: &GcArgs, format: Format) -> Result<()> {
    let mut removed = Vec::new();
    for pod in all(clients).await? {
        let owner = pod.sandbox.labels.get(OWNER);
        if owner.is_none_or(|owner| crate::run::is_alive(owner)) {
            continue;
        }
        removed.push(("abandoned pod", pod.client.kind.clone(), pod.sandbox.id.clone()));
        if !args.dry_run {
            let _progress = Progress::new(format!("removing {}", pod.sandbox.id));
            crate::run::remove_pod(&pod.client, &pod.sandbox.id).await?;
        }
    }
    for left in crate::run::leftovers(args.dry_run)? {
        removed.push(("files of a run", String::new(), left));
    }
    let (quarantine, dry_run) = (args.quarantine, args.dry_run);
    for client in clients {
        let q = api::CollectRequest { quarantine, dry_run, ..Default::default() };
        let patience = ttrpc::context::with_duration(Duration::from_secs(120));
        let answer = client.admin().collect(patience, &q).await?;
        let kind = &client.kind;
        removed.extend(answer.removed.into_iter().map(|id| ("forgotten pod", kind.clone(), id)));
        let records = answer.quarantined.into_iter();
        removed.extend(records.map(|name| ("quarantined record", kind.clone(), name)));
    }
    if format == Format::Json {
        let all: Vec<Value> = removed
            .iter()
            .map(|(what, kind, id)| json!({ "what": what, "sandboxer": kind, "id": id }))
            .collect();
        return output::json(&json!({ "removed": all, "dryRun": args.dry_run }));
    }
    let mut table = Table::new(&["REMOVED", "SANDBOXER", "ID"]);
    for (what, kind, id) in removed {
        table.row([what.to_owned(), kind, id]);
    }
    output::print(&table.text())
}
