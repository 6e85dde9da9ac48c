//! The Task service: requests to the process table, and back.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use kuasar_protos::runc_options::Options;
use kuasar_protos::shim::api;
use kuasar_protos::shim::shim_async::Task;
use kuasar_ttrpc::{Answer, Services};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::r#async::{MethodHandler, TtrpcContext};
use ttrpc::proto::{Request, Response};

use crate::error::Error;
use crate::journal::Stdio;
use crate::runtime::{CreateContainer, Mount, StatsFlavor};
use crate::server::{TaskServer, exit_time, wire_status};

/// What containerd sends a process of an exec as.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// What containerd sends with Create.
const OPTIONS: &str = "containerd.runc.v1.Options";
/// What containerd sends resources as.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

type Rpc<T> = ttrpc::Result<T>;
use api::Empty;

struct Service<'a> {
    server: &'a Arc<TaskServer>,
    flavor: StatsFlavor,
}

/// The generated code knows one name. Engines that speak v2 are containerd 1.7 and iSulad; the
/// latter reads v1 metrics only, the former reads both.
const SERVICES: [(&str, StatsFlavor); 2] = [
    ("containerd.task.v3.Task", StatsFlavor::Native),
    ("containerd.task.v2.Task", StatsFlavor::V1),
];

fn flavor(service: &str) -> Option<StatsFlavor> {
    SERVICES.iter().find(|(name, _)| *name == service).map(|(_, flavor)| *flavor)
}

impl TaskServer {
    /// `containerd.task.v3.Task` and `containerd.task.v2.Task`: the same messages and handlers.
    pub fn services(self: &Arc<Self>) -> Services {
        Services::new(Arc::new(Calls(self.clone())))
    }

    /// The same for a server of the ttrpc crate, which also serves streams. A table of the methods:
    /// for programs that have one such server, like a guest.
    pub fn tables(self: &Arc<Self>) -> HashMap<String, ttrpc::r#async::Service> {
        let calls = Arc::new(Calls(self.clone()));
        let method = |name: &&str| {
            let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Table(calls.clone()));
            ((*name).to_owned(), handler)
        };
        SERVICES
            .iter()
            .map(|(name, _)| {
                let methods = METHODS.iter().map(method).collect();
                let service = ttrpc::r#async::Service { methods, streams: HashMap::new() };
                ((*name).to_owned(), service)
            })
            .collect()
    }
}

/// All methods, for `$with`.
macro_rules! methods {
    ($with:ident) => {
        $with! {
            "State" state;
            "Create" create;
            "Start" start;
            "Delete" delete;
            "Pids" pids;
            "Pause" pause;
            "Resume" resume;
            "Checkpoint" checkpoint;
            "Kill" kill;
            "Exec" exec;
            "ResizePty" resize_pty;
            "CloseIO" close_io;
            "Update" update;
            "Wait" wait;
            "Stats" stats;
            "Connect" connect;
            "Shutdown" shutdown;
        }
    };
}

macro_rules! names {
    ($($name:literal $method:ident;)*) => { &[$($name),*] };
}

const METHODS: &[&str] = methods!(names);

/// Reads a request, has it answered, and writes the answer.
async fn unary<Q: Message, A: Message>(
    payload: Vec<u8>,
    method: impl AsyncFnOnce(Q) -> Rpc<A>,
) -> Rpc<Response> {
    let request = Q::parse_from_bytes(&payload)
        .map_err(|e| Error::InvalidArgument(format!("the request cannot be read: {e}")))?;
    drop(payload);
    let answer = method(request).await?;
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
    response.payload =
        answer.write_to_bytes().map_err(|e| Error::internal("the answer cannot be written", e))?;
    Ok(response)
}

struct Calls(Arc<TaskServer>);

/// A method in a table of the ttrpc crate: it finds itself in the request.
struct Table(Arc<Calls>);

#[async_trait]
impl MethodHandler for Table {
    async fn handler(&self, context: TtrpcContext, request: Request) -> Rpc<Response> {
        let span = kuasar_ttrpc::span(&request.service, &request.method, &context.metadata);
        let scope = span.as_ref().map(|span| span.scope().clone());
        let call = || kuasar_ttrpc::Service::call(self.0.as_ref(), context, request);
        let answer = match kuasar_trace::carry(scope.clone(), call) {
            Some(answer) => kuasar_trace::within(scope, answer).await,
            None => Err(Error::Unimplemented("there is no such method".into()).into()),
        };
        let answer = match answer {
            // Here, an error is one of the transport: the crate would send it as UNKNOWN.
            Err(ttrpc::Error::RpcStatus(status)) => {
                Ok(Response { status: MessageField::some(status), ..Response::default() })
            }
            other => other,
        };
        if let (Some(span), Ok(answer)) = (&span, &answer) {
            kuasar_ttrpc::judge(span, answer);
        }
        answer
    }
}

impl kuasar_ttrpc::Service for Calls {
    fn serves(&self, service: &str) -> bool {
        flavor(service).is_some()
    }

    /// By a `match`: a generated table of the methods would be some 3 kB for each pod.
    fn call(&self, context: TtrpcContext, request: Request) -> Option<Answer<'_>> {
        let (flavor, payload) = (flavor(&request.service)?, request.payload);
        kuasar_trace::note("kuasar.sandbox.id", &self.0.options.sandbox_id);
        macro_rules! find {
            ($($name:literal $method:ident;)*) => {
                match request.method.as_str() {
                    $($name => Box::pin(unary(payload, async move |q| {
                        Service { server: &self.0, flavor }.$method(&context, q).await
                    })),)*
                    _ => return None,
                }
            };
        }
        Some(methods!(find))
    }
}

fn expect(any: &MessageField<Any>, what: &str, wanted: &str) -> Result<Vec<u8>, Error> {
    let any = any.as_ref().ok_or_else(|| Error::InvalidArgument(format!("{what} is missing")))?;
    // Versions of containerd differ in the prefix, not in the last part.
    let last = |s: &str| s.rsplit(['/', '.']).next().unwrap_or_default().to_owned();
    if !any.type_url.is_empty() && last(&any.type_url) != last(wanted) {
        return Err(Error::InvalidArgument(format!(
            "{what} is a {:.200}, expected {wanted}",
            any.type_url
        )));
    }
    Ok(any.value.clone())
}

/// Where a container is to be restored from. containerd names it itself, or only in its options.
fn checkpoint_of(named: &str, options: Option<&Any>) -> Option<PathBuf> {
    let mut path = named.to_owned();
    if let Some(any) = options.filter(|any| path.is_empty() && any.type_url.ends_with(OPTIONS)) {
        // Options that cannot be read have never been an error.
        path = Options::parse_from_bytes(&any.value).unwrap_or_default().criu_image_path;
    }
    (!path.is_empty()).then(|| PathBuf::from(path))
}

#[async_trait]
impl Task for Service<'_> {
    async fn create(
        &self,
        _: &TtrpcContext,
        q: api::CreateTaskRequest,
    ) -> Rpc<api::CreateTaskResponse> {
        kuasar_trace::note("container.id", &q.id);
        let rootfs = q
            .rootfs
            .into_iter()
            .map(|m| Mount {
                kind: m.type_,
                source: m.source,
                target: m.target,
                options: m.options,
            })
            .collect();
        let mut stdio =
            Stdio { stdin: q.stdin, stdout: q.stdout, stderr: q.stderr, terminal: q.terminal };
        let mut request = CreateContainer {
            id: q.id,
            bundle: PathBuf::from(q.bundle),
            rootfs,
            terminal: q.terminal,
            checkpoint: checkpoint_of(&q.checkpoint, q.options.as_ref()),
            options: q.options.into_option().map(|a| (a.type_url, a.value)),
        };
        let declared = self.server.declared();
        declared.complete(&mut request, &mut stdio)?;
        let id = request.id.clone();
        let pid = self.server.create(request, stdio).await?;
        if declared.has(&id) {
            self.server.close_stdin(&id, "")?;
        }
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, q: api::StartRequest) -> Rpc<api::StartResponse> {
        kuasar_trace::note("container.id", &q.id);
        kuasar_trace::note("kuasar.exec.id", &q.exec_id);
        let pid = self.server.start(&q.id, &q.exec_id).await?;
        if self.server.declared().has_exec(&q.id, &q.exec_id) {
            self.server.close_stdin(&q.id, &q.exec_id)?;
        }
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, q: api::StateRequest) -> Rpc<api::StateResponse> {
        let c = self.server.container(&q.id)?;
        let r = c.process(&q.exec_id)?.record();
        Ok(api::StateResponse {
            id: q.id,
            bundle: c.bundle.to_string_lossy().into_owned(),
            pid: r.pid,
            status: wire_status(r.status),
            stdin: r.stdio.stdin,
            stdout: r.stdio.stdout,
            stderr: r.stdio.stderr,
            terminal: r.stdio.terminal,
            exit_status: r.exit.map_or(0, |e| e.status),
            exited_at: exit_time(r.exit),
            exec_id: q.exec_id,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, q: api::WaitRequest) -> Rpc<api::WaitResponse> {
        let exit = self.server.wait(&q.id, &q.exec_id).await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: exit_time(Some(exit)),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, q: api::KillRequest) -> Rpc<Empty> {
        kuasar_trace::note("container.id", &q.id);
        kuasar_trace::note("kuasar.exec.id", &q.exec_id);
        let signal = i32::try_from(q.signal).unwrap_or(-1);
        self.server.kill(&q.id, &q.exec_id, signal, q.all).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, q: api::DeleteRequest) -> Rpc<api::DeleteResponse> {
        kuasar_trace::note("container.id", &q.id);
        kuasar_trace::note("kuasar.exec.id", &q.exec_id);
        let (pid, exit) = self.server.delete(&q.id, &q.exec_id).await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exit_time(Some(exit)),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, q: api::ExecProcessRequest) -> Rpc<Empty> {
        kuasar_trace::note("container.id", &q.id);
        kuasar_trace::note("kuasar.exec.id", &q.exec_id);
        let announced = self.server.declared().exec(&q.id, &q.exec_id, q.terminal);
        let (spec, stdio) = match announced.filter(|_| q.spec.is_none()) {
            Some(announced) => announced,
            None => {
                let spec = String::from_utf8(expect(&q.spec, "spec", PROCESS)?)
                    .ok()
                    .filter(|s| serde_json::from_str::<serde_json::Map<_, _>>(s).is_ok())
                    .ok_or_else(|| {
                        Error::InvalidArgument("spec is no OCI process (JSON)".into())
                    })?;
                let (stdin, stdout, stderr) = (q.stdin, q.stdout, q.stderr);
                (spec, Stdio { stdin, stdout, stderr, terminal: q.terminal })
            }
        };
        self.server.exec(&q.id, &q.exec_id, stdio, spec).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, q: api::ResizePtyRequest) -> Rpc<Empty> {
        self.server.resize(&q.id, &q.exec_id, q.width, q.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, q: api::CloseIORequest) -> Rpc<Empty> {
        if q.stdin {
            self.server.close_stdin(&q.id, &q.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, q: api::PidsRequest) -> Rpc<api::PidsResponse> {
        let c = self.server.container(&q.id)?;
        let init = c.process("")?.record().pid;
        let mut pids = self.server.runtime.pids(&q.id).await.unwrap_or_default();
        // Never empty while the task exists: containerd would take it for a leaked shim.
        if pids.is_empty() {
            pids.push(init);
        }
        let info = |pid| api::ProcessInfo { pid, ..Default::default() };
        Ok(api::PidsResponse {
            processes: pids.into_iter().map(info).collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, q: api::PauseRequest) -> Rpc<Empty> {
        self.server.set_paused(&q.id, true).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, q: api::ResumeRequest) -> Rpc<Empty> {
        self.server.set_paused(&q.id, false).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, q: api::CheckpointTaskRequest) -> Rpc<Empty> {
        let options = q.options.into_option().map(|a| (a.type_url, a.value));
        self.server.checkpoint(&q.id, &q.path, options).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, q: api::UpdateTaskRequest) -> Rpc<Empty> {
        self.server.container(&q.id)?;
        let resources = expect(&q.resources, "resources", RESOURCES)?;
        self.server.runtime.update(&q.id, &resources).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, q: api::StatsRequest) -> Rpc<api::StatsResponse> {
        self.server.container(&q.id)?;
        let (type_url, value) = self.server.runtime.stats(&q.id, self.flavor).await?;
        Ok(api::StatsResponse {
            stats: MessageField::some(Any { type_url, value, ..Any::default() }),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, q: api::ConnectRequest) -> Rpc<api::ConnectResponse> {
        let shim_pid = self.server.options.shim_pid;
        // In shim mode containerd also asks for the sandbox itself when it has restarted.
        let task_pid = if q.id == self.server.options.sandbox_id {
            shim_pid
        } else {
            match self.server.container(&q.id) {
                Ok(c) => c.process("")?.record().pid,
                // containerd 1.7 asks before it creates the container, as a look at the shim:
                // stock runc's answers that there is no process yet.
                Err(Error::NotFound(_)) if self.flavor == StatsFlavor::V1 => 0,
                Err(e) => return Err(e.into()),
            }
        };
        Ok(api::ConnectResponse { shim_pid, task_pid, version: "3".into(), ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Rpc<Empty> {
        // The pod's end is the Controller's business; containerd calls this per container.
        Ok(Empty::new())
    }
}
