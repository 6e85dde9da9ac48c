//! What a pod's socket serves when containerd has no proxy plugin for us (`sandboxer = "shim"`,
//! engine-contract §8.2): `containerd.runtime.sandbox.v1.Sandbox`, and Task for the *sandbox'*
//! id.
//!
//! containerd takes this socket for a shim. It is served before there are any tasks, and
//! connections are made before Start. So Task is served by [`LateTasks`] from the beginning, which
//! forwards to the sandboxer's own services once they are there. For the sandbox' id,
//! which no Task server knows, Connect and Pids are answered here: containerd asks them when it
//! restarts and gives the pod up when they fail. An engine without sandboxes makes other calls for it,
//! too: [`pause`].

use std::sync::Arc;

use async_trait::async_trait;
use kuasar_protos::controller as api;
use kuasar_protos::shim::api as task;
use kuasar_protos::shim::sandbox_api as rt;
use kuasar_protos::shim::sandbox_async as service;
use kuasar_protos::shim::types::platform::Platform;
use kuasar_ttrpc::{Answer, Service};
use protobuf::{Message, MessageField};
use ttrpc::r#async::TtrpcContext;
use ttrpc::proto::{Request, Response};

use crate::controller::{Call, Controller};
use crate::endpoint::Late;
use crate::error::{Error, Result};
use crate::pause;
use crate::sandboxer::PodServices;
use crate::ttrpc_service::call_of;
use crate::wire::ttrpc_error;

const TASK: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
/// The services of a pod's socket in shim mode.
pub(crate) fn services(controller: Controller, id: &str, late: Late) -> PodServices {
    let pod = Arc::new(Pod { controller, id: id.to_owned(), late });
    let tasks = PodServices::new(Arc::new(LateTasks(pod.clone())));
    PodServices::from(service::create_sandbox(pod)).and(tasks)
}

struct Pod {
    controller: Controller,
    id: String,
    late: Late,
}

impl Pod {
    /// This socket is one pod's: another id is not known here.
    fn check(&self, id: &str) -> Result<()> {
        if id == self.id {
            return Ok(());
        }
        Err(Error::NotFound(format!("this is the socket of sandbox {}", self.id)))
    }

    async fn run<T>(
        &self,
        ctx: &TtrpcContext,
        rpc: &'static str,
        id: &str,
        work: impl AsyncFnOnce(&Controller, &Call) -> Result<T>,
    ) -> ttrpc::Result<T> {
        let call = call_of(ctx);
        let work = async {
            self.check(id)?;
            work(&self.controller, &call).await
        };
        self.controller.run(rpc, &call, Box::pin(work)).await.map_err(|e| ttrpc_error(&e))
    }
}

#[async_trait]
impl service::Sandbox for Pod {
    async fn create_sandbox(
        &self,
        ctx: &TtrpcContext,
        q: rt::CreateSandboxRequest,
    ) -> ttrpc::Result<rt::CreateSandboxResponse> {
        let id = q.sandbox_id.clone();
        self.run(ctx, "Create", &id, async |c, call| {
            let q = api::ControllerCreateRequest {
                sandbox_id: q.sandbox_id,
                options: q.options,
                netns_path: q.netns_path,
                annotations: q.annotations,
                ..Default::default()
            };
            c.create(call, q).await?;
            Ok(rt::CreateSandboxResponse::new())
        })
        .await
    }

    async fn start_sandbox(
        &self,
        ctx: &TtrpcContext,
        q: rt::StartSandboxRequest,
    ) -> ttrpc::Result<rt::StartSandboxResponse> {
        self.run(ctx, "Start", &q.sandbox_id.clone(), async |c, call| {
            let q = api::ControllerStartRequest { sandbox_id: q.sandbox_id, ..Default::default() };
            let a = c.start(call, q).await?;
            Ok(rt::StartSandboxResponse {
                pid: a.pid,
                created_at: a.created_at,
                spec: a.spec,
                ..Default::default()
            })
        })
        .await
    }

    async fn platform(
        &self,
        ctx: &TtrpcContext,
        q: rt::PlatformRequest,
    ) -> ttrpc::Result<rt::PlatformResponse> {
        self.run(ctx, "Platform", &q.sandbox_id, async |c, call| {
            let platform = c.platform(call, Default::default()).await?.platform;
            let platform = platform.into_option().map(|p| Platform {
                os: p.os,
                architecture: p.architecture,
                ..Default::default()
            });
            Ok(rt::PlatformResponse { platform: platform.into(), ..Default::default() })
        })
        .await
    }

    async fn stop_sandbox(
        &self,
        ctx: &TtrpcContext,
        q: rt::StopSandboxRequest,
    ) -> ttrpc::Result<rt::StopSandboxResponse> {
        self.run(ctx, "Stop", &q.sandbox_id, async |c, call| {
            let q = api::ControllerStopRequest {
                sandbox_id: q.sandbox_id.clone(),
                timeout_secs: q.timeout_secs,
                ..Default::default()
            };
            c.stop(call, q).await?;
            Ok(rt::StopSandboxResponse::new())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        ctx: &TtrpcContext,
        q: rt::WaitSandboxRequest,
    ) -> ttrpc::Result<rt::WaitSandboxResponse> {
        self.run(ctx, "Wait", &q.sandbox_id, async |c, call| {
            let sandbox_id = q.sandbox_id.clone();
            let q = api::ControllerWaitRequest { sandbox_id, ..Default::default() };
            let a = c.wait(call, q).await?;
            Ok(rt::WaitSandboxResponse {
                exit_status: a.exit_status,
                exited_at: a.exited_at,
                ..Default::default()
            })
        })
        .await
    }

    /// A failed status fails the whole CRI call here, NotFound as well: an unknown sandbox is
    /// simply not ready.
    async fn sandbox_status(
        &self,
        ctx: &TtrpcContext,
        q: rt::SandboxStatusRequest,
    ) -> ttrpc::Result<rt::SandboxStatusResponse> {
        self.run(ctx, "Status", &q.sandbox_id, async |c, call| {
            let request = api::ControllerStatusRequest {
                sandbox_id: q.sandbox_id.clone(),
                verbose: q.verbose,
                ..Default::default()
            };
            let a = match c.status(call, request).await {
                Err(Error::NotFound(_)) => api::ControllerStatusResponse {
                    sandbox_id: q.sandbox_id.clone(),
                    state: "SANDBOX_NOTREADY".into(),
                    ..Default::default()
                },
                known => known?,
            };
            Ok(rt::SandboxStatusResponse {
                sandbox_id: a.sandbox_id,
                pid: a.pid,
                state: a.state,
                info: a.info,
                created_at: a.created_at,
                exited_at: a.exited_at,
                extra: a.extra,
                ..Default::default()
            })
        })
        .await
    }

    async fn ping_sandbox(
        &self,
        ctx: &TtrpcContext,
        q: rt::PingRequest,
    ) -> ttrpc::Result<rt::PingResponse> {
        self.run(ctx, "Ping", &q.sandbox_id, async |_, _| Ok(rt::PingResponse::new())).await
    }

    async fn shutdown_sandbox(
        &self,
        ctx: &TtrpcContext,
        q: rt::ShutdownSandboxRequest,
    ) -> ttrpc::Result<rt::ShutdownSandboxResponse> {
        self.run(ctx, "Shutdown", &q.sandbox_id, async |c, call| {
            c.shut_down(call, &q.sandbox_id, true).await?;
            Ok(rt::ShutdownSandboxResponse::new())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        ctx: &TtrpcContext,
        q: rt::SandboxMetricsRequest,
    ) -> ttrpc::Result<rt::SandboxMetricsResponse> {
        self.run(ctx, "Metrics", &q.sandbox_id, async |c, call| {
            let sandbox_id = q.sandbox_id.clone();
            let q = api::ControllerMetricsRequest { sandbox_id, ..Default::default() };
            let a = c.metrics(call, q).await?.metrics.unwrap_or_default();
            let mut answer = rt::SandboxMetricsResponse::new();
            let metric = answer.mut_metrics();
            metric.timestamp = a.timestamp;
            metric.id = a.id;
            metric.data = a.data;
            Ok(answer)
        })
        .await
    }
}

/// A Task service that exists before the Task server does.
struct LateTasks(Arc<Pod>);

impl LateTasks {
    /// The answer for the sandbox' own id, to the two questions that concern it.
    fn own(&self, request: &Request) -> Option<Vec<u8>> {
        let pid = self.0.controller.pid(&self.0.id);
        match request.method.as_str() {
            "Connect" => {
                let q = task::ConnectRequest::parse_from_bytes(&request.payload).ok()?;
                self.0.check(&q.id).ok()?;
                let answer = task::ConnectResponse {
                    shim_pid: std::process::id(),
                    task_pid: pid,
                    version: "3".into(),
                    ..Default::default()
                };
                answer.write_to_bytes().ok()
            }
            "Pids" => {
                let q = task::PidsRequest::parse_from_bytes(&request.payload).ok()?;
                self.0.check(&q.id).ok()?;
                let process =
                    task::ProcessInfo { pid, info: MessageField::none(), ..Default::default() };
                let answer = task::PidsResponse { processes: vec![process], ..Default::default() };
                answer.write_to_bytes().ok()
            }
            _ => None,
        }
    }

    /// The answer to any other call for the sandbox' own id, which an engine without sandboxes makes.
    async fn pause(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let (pod, call) = (&self.0, call_of(&context));
        let work = pause::answer(&pod.controller, &call, &pod.id, &request);
        let payload = pod.controller.run("Pause", &call, Box::pin(work)).await;
        let mut response = Response::new();
        response.payload = payload.map_err(|e| ttrpc_error(&e))?;
        response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
        Ok(response)
    }
}

impl Service for LateTasks {
    fn serves(&self, service: &str) -> bool {
        TASK.contains(&service)
    }

    fn call(&self, context: TtrpcContext, request: Request) -> Option<Answer<'_>> {
        if let Some(payload) = self.own(&request) {
            let mut response = Response::new();
            response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
            response.payload = payload;
            return Some(Box::pin(async { Ok(response) }));
        }
        if pause::concerns(&request, &self.0.id) {
            return Some(Box::pin(self.pause(context, request)));
        }
        let Some(services) = self.0.late.get() else {
            let early = Error::FailedPrecondition("the sandbox is not started".into());
            return Some(Box::pin(async move { Err(ttrpc_error(&early)) }));
        };
        services.find(&request.service)?.call(context, request)
    }
}
