//! What is asked of a running sentry: calls of its control protocol by name.
//!
//! Everything that `runsc exec`, `kill`, `wait`, `ps`, `events`, `pause`, `resume` and
//! `port-forward` would do, without a process of `runsc`.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::urpc::{CallError, Connection};

/// Result of a call.
pub type Result<T> = std::result::Result<T, CallError>;

/// Whom a signal is for; numbers are gVisor's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    /// One process: the container's first, or an exec by its pid.
    Process = 0,
    /// All of the container.
    All = 1,
    /// Those in the foreground of the process's terminal.
    Foreground = 2,
}

/// A process to run in a container.
#[derive(Debug, Default, Serialize)]
pub struct Exec {
    /// Program, or a name that is looked up in the container's `PATH`; empty for the first of argv.
    pub filename: String,
    /// Program name and arguments.
    pub argv: Vec<String>,
    /// `NAME=value`.
    pub envv: Vec<String>,
    /// Working directory.
    #[serde(rename = "wd")]
    pub cwd: String,
    /// User.
    #[serde(rename = "KUID")]
    pub uid: u32,
    /// Group.
    #[serde(rename = "KGID")]
    pub gid: u32,
    /// Further groups.
    #[serde(rename = "ExtraKGIDs")]
    pub groups: Vec<u32>,
    /// Releases before August 2025 ignore it.
    #[serde(rename = "NoNewPrivileges")]
    pub no_new_privileges: bool,
    /// All five sets.
    #[serde(rename = "Capabilities")]
    pub capabilities: Capabilities,
    /// Its streams are a terminal of the host.
    #[serde(rename = "StdioIsPty")]
    pub terminal: bool,
    /// Numbers of its descriptors.
    #[serde(rename = "GuestFDs")]
    pub fds: [u32; 3],
    /// Container.
    #[serde(rename = "ContainerID")]
    pub container: String,
}

/// Capability sets as bits, as Linux numbers them.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Capabilities {
    /// Permitted.
    pub permitted_caps: u64,
    /// Inheritable.
    pub inheritable_caps: u64,
    /// Effective.
    pub effective_caps: u64,
    /// Bounding.
    pub bounding_caps: u64,
    /// Ambient.
    pub ambient_caps: u64,
}

/// What a container uses, as a sentry tells it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Usage {
    event: Event,
    /// CPU time of each container, where the container has no cgroup of the sandbox's own.
    #[serde(rename = "containerUsage", deserialize_with = "or_default")]
    pub shares: BTreeMap<String, u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Event {
    data: Stats,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Stats {
    cpu: Cpu,
    memory: Memory,
    pids: Pids,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    usage: CpuUsage,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CpuUsage {
    total: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    usage: Entry,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    usage: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Pids {
    current: u64,
}

impl Usage {
    /// CPU time in nanoseconds; 0 where only [`Usage::shares`] are known.
    pub fn cpu(&self) -> u64 {
        self.event.data.cpu.usage.total
    }

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        self.event.data.memory.usage.usage
    }

    /// Number of processes.
    pub fn processes(&self) -> u64 {
        self.event.data.pids.current
    }
}

/// Go writes `null` for an empty map or list.
fn or_default<'de, D, T>(value: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// A running sentry.
#[derive(Debug, Clone)]
pub struct Sentry {
    socket: PathBuf,
    limit: Duration,
}

impl Sentry {
    /// The one behind this control socket; it has `limit` for each answer.
    pub fn new(socket: PathBuf, limit: Duration) -> Self {
        Self { socket, limit }
    }

    /// A connection for calls whose answers may take long.
    ///
    /// # Errors
    /// [`CallError::Gone`] when the sandbox has ended.
    pub async fn dial(&self) -> Result<Connection> {
        Connection::dial(&self.socket, self.limit).await
    }

    /// One call on a connection that is there.
    ///
    /// # Errors
    /// Those of the call, and [`CallError::Late`].
    pub async fn call_on<T: DeserializeOwned>(
        &self,
        connection: &Connection,
        method: &str,
        arg: impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<T> {
        let call = async {
            connection.send(method, arg, fds).await?;
            connection.receive().await
        };
        let answer = tokio::time::timeout(self.limit, call)
            .await
            .map_err(|_| CallError::Late(self.limit))??;
        serde_json::from_value(answer).map_err(|error| CallError::Garbled(error.to_string()))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        arg: impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<T> {
        self.call_on(&self.dial().await?, method, arg, fds).await
    }

    async fn order(&self, method: &str, arg: impl Serialize) -> Result<()> {
        self.call::<Value>(method, arg, &[]).await.map(drop)
    }

    /// Asks for the end of a container's first process; the answer comes then.
    ///
    /// # Errors
    /// When the call cannot be sent.
    pub async fn ask_end(connection: &Connection, container: &str) -> Result<()> {
        connection.send("containerManager.Wait", container, &[]).await
    }

    /// Asks for the end of an exec; the answer comes then, and only once.
    ///
    /// # Errors
    /// When the call cannot be sent.
    pub async fn ask_end_of_exec(connection: &Connection, container: &str, pid: u32) -> Result<()> {
        let arg = json!({ "CID": container, "PID": pid });
        connection.send("containerManager.WaitPID", arg, &[]).await
    }

    /// Runs a process; answers its pid in the container.
    ///
    /// # Errors
    /// The sentry's words when there is no such program, for example.
    pub async fn exec(
        &self,
        connection: &Connection,
        exec: &Exec,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<u32> {
        self.call_on(connection, "containerManager.ExecuteAsync", exec, &streams).await
    }

    /// Sends a signal; `pid` 0 is the container's first process.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn signal(&self, container: &str, pid: u32, signal: i32, to: Receiver) -> Result<()> {
        let arg = json!({ "CID": container, "Signo": signal, "PID": pid, "Mode": to as u8 });
        self.order("containerManager.Signal", arg).await
    }

    /// Pids, in the container, of its processes.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn processes(&self, container: &str) -> Result<Vec<u32>> {
        #[derive(Deserialize)]
        struct Process {
            pid: u32,
        }
        let list: Option<Vec<Process>> =
            self.call("containerManager.Processes", container, &[]).await?;
        Ok(list.unwrap_or_default().iter().map(|process| process.pid).collect())
    }

    /// What a container uses.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn usage(&self, container: &str) -> Result<Usage> {
        self.call("containerManager.Event", container, &[]).await
    }

    /// Kills what is left of a container and forgets it.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn destroy(&self, container: &str) -> Result<()> {
        self.order("containerManager.DestroySubcontainer", container).await
    }

    /// Stops all tasks of all containers.
    ///
    /// # Errors
    /// When the sandbox has ended.
    pub async fn pause(&self) -> Result<()> {
        self.order("containerManager.Pause", ()).await
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// When the sandbox has ended.
    pub async fn resume(&self) -> Result<()> {
        self.order("containerManager.Resume", ()).await
    }

    /// Connects a unix stream socket to a TCP port of the sandbox.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn forward(&self, container: &str, port: u16, stream: BorrowedFd<'_>) -> Result<()> {
        let arg = json!({ "ContainerID": container, "Port": port });
        self.call::<Value>("containerManager.PortForward", arg, &[stream]).await.map(drop)
    }
}

/// Status of a process from the number that a sentry answers for its end: as wait(2) has it.
pub fn status(answer: &Value) -> u32 {
    match answer.as_u64().and_then(|status| i32::try_from(status).ok()) {
        Some(status) if libc::WIFSIGNALED(status) => 128 + libc::WTERMSIG(status) as u32,
        Some(status) => libc::WEXITSTATUS(status) as u32,
        None => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_code_or_a_signal() {
        assert_eq!(status(&json!(0)), 0);
        assert_eq!(status(&json!(7 << 8)), 7);
        assert_eq!(status(&json!(9)), 137);
        assert_eq!(status(&json!(15)), 143);
        assert_eq!(status(&json!("x")), 255);
        assert_eq!(status(&json!(u64::MAX)), 255);
    }

    #[test]
    fn usage_is_read_with_what_go_leaves_out_and_writes_as_null() {
        let text = r#"{"event":{"type":"stats","id":"c","data":{"cpu":{"usage":{}},
            "memory":{"usage":{"limit":0,"usage":3510272,"failcnt":0}},"pids":{"current":2},
            "network_interfaces":null}},"containerUsage":null}"#;
        let usage: Usage = serde_json::from_str(text).unwrap();
        assert_eq!((usage.cpu(), usage.memory(), usage.processes()), (0, 3_510_272, 2));
        assert!(usage.shares.is_empty());
    }

    #[test]
    fn an_exec_has_the_names_that_a_sentry_reads() {
        let exec = Exec { fds: [0, 1, 2], container: "c".into(), ..Exec::default() };
        let value = serde_json::to_value(&exec).unwrap();
        for name in ["filename", "argv", "envv", "wd", "KUID", "KGID", "ExtraKGIDs", "Capabilities"]
        {
            assert!(value.get(name).is_some(), "{name}");
        }
        assert_eq!(value.get("GuestFDs").unwrap(), &json!([0, 1, 2]));
        assert!(value.pointer("/Capabilities/BoundingCaps").is_some());
    }
}
