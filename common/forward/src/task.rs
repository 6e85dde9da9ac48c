//! The Task API of a guest, as a `Runtime` calls it.
//!
//! What the guest answers is checked before it is believed: pids are not 0, lists and statistics
//! are bounded, an exit status has eight bits. Calls that make something are not repeated and have
//! a limit of their own; all others may be done twice.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_task::error::{Error, Result};
use containerd_task::runtime::{AnyMessage, Exit, Keeper, ProcessRef, StatsFlavor};
use futures::future::BoxFuture;
use kuasar_protos::shim::api;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Map, Value};

use crate::client::Client;
use crate::error::GuestError;
use crate::stdio::{self, Stream};

/// containerd's Task API.
pub const V3: &str = "containerd.task.v3.Task";
/// The same in version 2, of older servers; in ours its statistics are those of cgroup v1.
pub const V2: &str = "containerd.task.v2.Task";

/// Most processes of a container that are listed.
const MAX_PIDS: usize = 65_536;
/// Most bytes of a container's statistics.
const MAX_STATS: usize = 1 << 20;
/// How long output of a guest that has ended may take to arrive: it is on this host already.
const LAST_OUTPUT: Duration = Duration::from_millis(50);
/// How long the end of a guest that has hung up may take to be seen.
const ENDING: Duration = Duration::from_secs(1);
/// Between two attempts to ask a guest that is not reached.
const AGAIN: Duration = Duration::from_millis(200);

/// The Task server of a guest.
#[derive(Debug, Clone)]
pub struct Tasks {
    client: Client,
    service: &'static str,
    make: Duration,
}

impl Tasks {
    /// The Task server that `client` reaches, under the name of its `service` ([`V3`] or [`V2`]);
    /// `make` is how long it may take to make, start or delete something.
    pub fn new(client: Client, service: &'static str, make: Duration) -> Self {
        Self { client, service, make }
    }

    async fn ask<A: Message>(&self, method: &str, question: &impl Message) -> Result<A> {
        Ok(self.client.call_again(self.service, method, question).await?)
    }

    async fn make<A: Message>(&self, method: &str, question: &impl Message) -> Result<A> {
        Ok(self.client.call_for(self.service, method, question, Some(self.make)).await?)
    }

    /// Creates a container; answers its pid.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn create(&self, question: &api::CreateTaskRequest) -> Result<u32> {
        let answer: api::CreateTaskResponse = self.make("Create", question).await?;
        checked_pid(answer.pid)
    }

    /// Starts a container or, where it is named, an exec; answers what the guest says its pid is.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn start(&self, container: &str, exec: &str) -> Result<u32> {
        let question = api::StartRequest {
            id: container.into(),
            exec_id: exec.into(),
            ..api::StartRequest::default()
        };
        self.make::<api::StartResponse>("Start", &question).await.map(|answer| answer.pid)
    }

    /// Adds an exec with this OCI `process`; `stdio` is what the guest is told of its streams.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn exec(
        &self,
        container: &str,
        exec: &str,
        process: &Map<String, Value>,
        terminal: bool,
        [stdin, stdout, stderr]: [String; 3],
    ) -> Result<()> {
        let question = api::ExecProcessRequest {
            id: container.into(),
            exec_id: exec.into(),
            terminal,
            stdin,
            stdout,
            stderr,
            spec: json("Process", process)?,
            ..api::ExecProcessRequest::default()
        };
        self.make::<api::Empty>("Exec", &question).await.map(drop)
    }

    /// Undoes an exec that could not be started: the first error is the one to report.
    pub async fn undo_exec(&self, container: &str, exec: &str) {
        let kill = api::KillRequest {
            id: container.into(),
            exec_id: exec.into(),
            signal: libc::SIGKILL as u32,
            ..api::KillRequest::default()
        };
        let _ = self.ask::<api::Empty>("Kill", &kill).await;
        self.forget_exec(container, exec).await;
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn kill(&self, process: &ProcessRef, signal: i32, all: bool) -> Result<()> {
        let question = api::KillRequest {
            id: process.container.clone(),
            exec_id: process.exec.clone(),
            signal: u32::try_from(signal).unwrap_or_default(),
            all,
            ..api::KillRequest::default()
        };
        self.ask::<api::Empty>("Kill", &question).await.map(drop)
    }

    /// Deletes a container, with its guest or without.
    ///
    /// # Errors
    /// What a guest that is there answers, or why it does not.
    pub async fn delete(&self, container: &str) -> Result<()> {
        let question = api::DeleteRequest { id: container.into(), ..api::DeleteRequest::default() };
        match self.make::<api::DeleteResponse>("Delete", &question).await {
            // Not there (any more), with the machine or without.
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            // The guest is asked no more when the pod ends; what it holds goes with it.
            Err(error) if self.client.is_gone() => {
                tracing::debug!(container, error = %error.chain(), "deleted without the guest");
                Ok(())
            }
            // It hangs up a moment before its end is seen.
            Err(error @ Error::Unavailable(_)) => {
                let ended = tokio::time::timeout(ENDING, self.client.gone()).await;
                ended.map_err(|_| error)
            }
            Err(error) => Err(error),
        }
    }

    /// The guest may forget an exec that has ended.
    pub async fn forget_exec(&self, container: &str, exec: &str) {
        let question = api::DeleteRequest {
            id: container.into(),
            exec_id: exec.into(),
            ..api::DeleteRequest::default()
        };
        match self.ask::<api::DeleteResponse>("Delete", &question).await {
            Ok(_) | Err(Error::NotFound(_)) => {}
            Err(error) => tracing::debug!(container, exec, error = %error.chain(),
                "the guest goes on knowing an ended exec"),
        }
    }

    /// Pids of a container in the guest; `pid` alone where the guest lists none, because
    /// containerd takes an empty list for a leaked shim.
    pub async fn pids(&self, container: &str, pid: u32) -> Vec<u32> {
        let question = api::PidsRequest { id: container.into(), ..api::PidsRequest::default() };
        let answer: Result<api::PidsResponse> = self.ask("Pids", &question).await;
        let listed = answer.map(|answer| answer.processes).unwrap_or_default();
        let pids: Vec<u32> =
            listed.iter().map(|one| one.pid).filter(|pid| *pid != 0).take(MAX_PIDS).collect();
        if pids.is_empty() { vec![pid.max(1)] } else { pids }
    }

    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn pause(&self, container: &str) -> Result<()> {
        let question = api::PauseRequest { id: container.into(), ..api::PauseRequest::default() };
        self.ask::<api::Empty>("Pause", &question).await.map(drop)
    }

    /// Thaws all processes of a container.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn resume(&self, container: &str) -> Result<()> {
        let question = api::ResumeRequest { id: container.into(), ..api::ResumeRequest::default() };
        self.ask::<api::Empty>("Resume", &question).await.map(drop)
    }

    /// Applies OCI `LinuxResources`.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn update(&self, container: &str, resources: &Map<String, Value>) -> Result<()> {
        let question = api::UpdateTaskRequest {
            id: container.into(),
            resources: json("LinuxResources", resources)?,
            ..api::UpdateTaskRequest::default()
        };
        self.ask::<api::Empty>("Update", &question).await.map(drop)
    }

    /// Statistics of a container, in cgroup metrics.
    ///
    /// # Errors
    /// What the guest answers, or why it does not; anything but cgroup metrics, since another
    /// type would fail the list of all containers' statistics.
    pub async fn stats(&self, container: &str, flavor: StatsFlavor) -> Result<AnyMessage> {
        const METRICS_V1: &str = "io.containerd.cgroups.v1.Metrics";
        const METRICS_V2: &str = "io.containerd.cgroups.v2.Metrics";
        let service = match flavor {
            StatsFlavor::Native => self.service,
            StatsFlavor::V1 => V2,
        };
        let question = api::StatsRequest { id: container.into(), ..api::StatsRequest::default() };
        let answer: api::StatsResponse =
            self.client.call_again(service, "Stats", &question).await?;
        let stats = answer.stats.into_option().unwrap_or_default();
        let known = match flavor {
            StatsFlavor::Native => [METRICS_V1, METRICS_V2].contains(&stats.type_url.as_str()),
            StatsFlavor::V1 => stats.type_url == METRICS_V1,
        };
        if !known || stats.value.len() > MAX_STATS {
            return Err(Error::internal("ask the guest", "it answered no cgroup statistics"));
        }
        Ok((stats.type_url, stats.value))
    }

    /// A process's input has come to its end. A process that has ended does not mind.
    pub async fn close_stdin(&self, container: &str, exec: &str) {
        let question = api::CloseIORequest {
            id: container.into(),
            exec_id: exec.into(),
            stdin: true,
            ..api::CloseIORequest::default()
        };
        if let Err(error) = self.ask::<api::Empty>("CloseIO", &question).await {
            tracing::debug!(container, exec, error = %error.chain(), "its input stays open");
        }
    }

    /// Changes the size of a process's terminal, in columns and rows.
    ///
    /// # Errors
    /// What the guest answers, or why it does not.
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        (width, height): (u16, u16),
    ) -> Result<()> {
        let question = api::ResizePtyRequest {
            id: container.into(),
            exec_id: exec.into(),
            width: width.into(),
            height: height.into(),
            ..api::ResizePtyRequest::default()
        };
        self.ask::<api::Empty>("ResizePty", &question).await.map(drop)
    }

    /// Asks how a process ended, for as long as it takes. 137, as for any process that was
    /// killed, when the guest ends meanwhile.
    pub async fn wait(&self, container: &str, exec: &str) -> u32 {
        let question = api::WaitRequest {
            id: container.into(),
            exec_id: exec.into(),
            ..api::WaitRequest::default()
        };
        loop {
            let answer: std::result::Result<api::WaitResponse, _> =
                self.client.call_for(self.service, "Wait", &question, None).await;
            match answer {
                // Codes have eight bits; a guest may say anything.
                Ok(answer) => return answer.exit_status.min(255),
                Err(GuestError::Gone) => return 137,
                Err(error) if error.is_not_found() => return 255,
                Err(error) => {
                    tracing::warn!(container, exec, %error, "its end is asked for again");
                    tokio::select! {
                        () = self.client.gone() => return 137,
                        () = tokio::time::sleep(AGAIN) => {}
                    }
                }
            }
        }
    }

    /// The exit of a process, told after its `outputs` have come to their end; they get `drain`
    /// for that, and next to nothing when the guest has ended.
    pub fn exit_of(
        &self,
        container: &str,
        exec: &str,
        outputs: Vec<Stream>,
        keeper: Arc<dyn Keeper>,
        drain: Duration,
    ) -> BoxFuture<'static, Exit> {
        let (tasks, container, exec) = (self.clone(), container.to_owned(), exec.to_owned());
        Box::pin(async move {
            let status = tasks.wait(&container, &exec).await;
            let at = SystemTime::now();
            let limit = if tasks.client.is_gone() { LAST_OUTPUT } else { drain };
            let ends = outputs.into_iter().map(|output| output.finish(limit));
            futures::future::join_all(ends).await;
            // What is kept would keep readers waiting.
            let prefix = stdio::process_prefix(&container, &exec);
            if let Err(error) = keeper.forget(&prefix).await {
                tracing::error!(%prefix, "streams stay open: {}", error.chain());
            }
            Exit { status, at }
        })
    }
}

/// A pid that a guest has answered.
///
/// # Errors
/// When it is 0, which containerd takes for no process.
pub fn checked_pid(pid: u32) -> Result<u32> {
    match pid {
        0 => Err(Error::internal("ask the guest", "it answered pid 0")),
        pid => Ok(pid),
    }
}

/// A message as the `options` of a request.
///
/// # Errors
/// When it cannot be encoded.
pub fn any(kind: &str, message: &impl Message) -> Result<Any> {
    let value =
        message.write_to_bytes().map_err(|error| Error::internal("encode a request", error))?;
    Ok(Any { type_url: kind.into(), value, ..Any::default() })
}

/// Part of an OCI spec, as requests carry it.
fn json(kind: &str, part: &Map<String, Value>) -> Result<MessageField<Any>> {
    let value =
        serde_json::to_vec(part).map_err(|error| Error::internal("encode a request", error))?;
    let type_url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
    Ok(MessageField::some(Any { type_url, value, ..Any::default() }))
}
