//! `exec`: a further process in a container, on any sandboxer.

use std::time::Duration;

use kuasar_protos::shim::api as task;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use crate::bundle;
use crate::client::{Client, patient, tasks};
use crate::error::{Error, Result};
use crate::pods;
use crate::process::Process;
use crate::stdio::Streams;

/// What containerd sends an exec's process as.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// What `exec` does.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Container, by name or id; needed when several run in the pod
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// Environment variable, may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// User, numeric
    #[arg(short, long, value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, u32)>,
    /// Pod: id, beginning of an id, name or namespace/name; or a container's id
    pub pod: String,
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `uid` or `uid:gid`.
pub fn user(text: &str) -> std::result::Result<(u32, u32), String> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    let number = |part: &str| part.parse().map_err(|_| format!("{part:?} is no number"));
    Ok((number(uid)?, number(gid)?))
}

/// A name for an exec or a pod that nobody else has, and that is told from others by its first
/// characters.
pub fn unique(prefix: &str) -> String {
    use sha2::{Digest, Sha256};
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let digest = Sha256::digest(format!("{} {now:?} {count}", crate::run::owner()));
    let digits = kuasar_host::hex(digest.get(..8).unwrap_or_default());
    format!("{prefix}-{digits}")
}

/// `exec`: answers the process' exit code.
///
/// # Errors
/// The daemon's.
pub async fn exec(clients: &[Client], args: &ExecArgs) -> Result<u8> {
    let (pod, named) = pods::find(clients, &args.pod).await?;
    let container = pod.container(named.as_deref().or(args.container.as_deref()))?;
    let (env, cwd) = (&args.env, args.workdir.as_deref());
    let spec = bundle::process(container, &args.command, args.tty, env, cwd, args.user)?;
    let streams = Streams::new(args.interactive, args.tty)?;
    let process = Process {
        tasks: tasks(&pod.sandbox.address).await?,
        container: container.id.clone(),
        exec: unique("ctl"),
        grace: Duration::from_secs(10),
    };
    let (stdin, stdout, stderr) = streams.paths();
    let q = task::ExecProcessRequest {
        id: process.container.clone(),
        exec_id: process.exec.clone(),
        terminal: args.tty,
        stdin,
        stdout,
        stderr,
        spec: MessageField::some(Any {
            type_url: PROCESS.into(),
            value: spec.to_string().into_bytes(),
            ..Any::default()
        }),
        ..Default::default()
    };
    process.tasks.exec(patient(), &q).await.map_err(Error::from)?;
    let ended = process.follow(streams, args.tty).await;
    let deleted = process.delete().await;
    let code = ended?;
    deleted?;
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        assert_eq!(user("5"), Ok((5, 0)));
        assert_eq!(user("5:7"), Ok((5, 7)));
        assert!(user("root").is_err() && user("5:").is_err());
    }
}
