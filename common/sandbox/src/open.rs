//! `kuasar.sandbox.v1.Endpoint` on the daemon's socket: `containerd-shim-kuasar-… start` asks
//! here for a pod's socket before CreateSandbox, and `delete` asks what is alive.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use kuasar_protos::endpoint as api;
use kuasar_protos::endpoint_ttrpc as service;
use kuasar_ttrpc::Services;
use ttrpc::r#async::TtrpcContext;

use crate::actor::Sandbox;
use crate::controller::Controller;
use crate::endpoint::{Late, Opened};
use crate::error::{Error, Result};
use crate::shim_mode;
use crate::store::Phase;
use crate::ttrpc_service::call_of;
use crate::wire::{check_id, timestamp, ttrpc_error};

impl Controller {
    /// Serves the runtime Sandbox service on a pod's socket, before its tasks are there.
    pub(crate) async fn serve_shim_mode(&self, id: &str) -> Result<()> {
        let late: Late = Arc::new(OnceLock::new());
        let services = shim_mode::services(self.clone(), id, late.clone());
        self.core.endpoints.serve_early(id, services, late)
    }

    async fn open(&self, q: api::OpenRequest) -> Result<api::OpenResponse> {
        check_id(&q.sandbox_id)?;
        let id = &q.sandbox_id;
        let endpoints = &self.core.endpoints;
        let path = if q.existing || self.core.find(id).is_ok() {
            endpoints.path(id).ok_or_else(|| {
                Error::NotFound(format!("sandbox {id} has no socket here: was it created here?"))
            })?
        } else {
            if !Path::new(&q.bundle).is_absolute() || q.bundle.len() > 4095 {
                return Err(Error::InvalidArgument("bundle must be an absolute path".into()));
            }
            if endpoints.opened_before(std::time::Duration::ZERO).len()
                >= self.core.options.max_sandboxes
            {
                return Err(Error::ResourceExhausted("too many pod sockets are open".into()));
            }
            let opened = Opened { bundle: q.bundle.into(), namespace: q.namespace };
            let (path, new) = endpoints.open(id, Some(opened)).await?;
            if new {
                self.serve_shim_mode(id).await?;
            }
            path
        };
        let address = format!("unix://{}", path.display());
        Ok(api::OpenResponse { address, ..Default::default() })
    }

    fn probe(&self, q: &api::ProbeRequest) -> Result<api::ProbeResponse> {
        let mut answer = api::ProbeResponse::new();
        let exit = if q.container_id.is_empty() {
            let Ok(sandbox) = self.core.find(&q.sandbox_id) else { return Ok(answer) };
            let r = sandbox.record();
            answer.pid = r.started.pid;
            answer.alive = matches!(r.phase, Phase::Ready | Phase::Stopping);
            r.exit.map(|e| (e.status, e.at))
        } else {
            let look = self.core.options.tasks.as_ref();
            let Some(task) = look.and_then(|look| look(&q.container_id)) else {
                return Ok(answer);
            };
            answer.pid = task.pid;
            answer.alive = task.exit.is_none();
            task.exit
        };
        if let Some((status, at)) = exit {
            answer.exit_status = status;
            answer.exited_at = timestamp(at);
        }
        Ok(answer)
    }

    async fn close_opened(&self, q: &api::CloseRequest) -> Result<api::CloseResponse> {
        check_id(&q.sandbox_id)?;
        let id = &q.sandbox_id;
        if self.core.find(id).is_err() && self.core.endpoints.opened(id).is_some() {
            self.core.endpoints.close(id).await;
        }
        Ok(api::CloseResponse::new())
    }

    /// Whether an engine is there and has not named this sandbox for `limit`, though it was
    /// recovered, and nothing runs in it. Start was done and its answer got lost with the daemon
    /// before this one: for the engine the sandbox has never been. One that knows it keeps a Wait
    /// open, and calls it again within seconds.
    fn is_unclaimed(&self, sandbox: &Sandbox, limit: Duration) -> bool {
        let spoken = self.core.first_call.get().is_some_and(|first| first.elapsed() >= limit);
        let busy = self.core.options.busy.as_ref();
        spoken && !sandbox.is_named() && !busy.is_some_and(|busy| busy(&sandbox.id))
    }

    /// From time to time: removes what nobody came back for, and tries removals again.
    pub async fn collect(&self) {
        let _observed = self.observed("Collect");
        for id in self.core.endpoints.opened_before(self.core.options.open_timeout) {
            if self.core.find(&id).is_err() {
                tracing::warn!(sandbox = id, "its socket was opened and never used: closing it");
                self.core.endpoints.close(&id).await;
            }
        }
        for sandbox in self.core.all() {
            let r = sandbox.record();
            let limit = self.core.options.unstarted_timeout;
            let forgotten = match r.phase {
                Phase::Created => r.created_at.elapsed().is_ok_and(|age| age >= limit),
                Phase::Ready => self.is_unclaimed(&sandbox, limit),
                _ => false,
            };
            if forgotten || r.phase == Phase::Removing {
                tracing::warn!(sandbox = sandbox.id, phase = ?r.phase, "removing what is left");
                let done = self.shut_down(&Default::default(), &sandbox.id, false).await;
                if let Err(e) = done {
                    tracing::warn!(sandbox = sandbox.id, "it stays for now: {}", e.chain());
                }
            }
        }
    }
}

struct Over(Controller);

#[async_trait]
impl service::Endpoint for Over {
    async fn open(
        &self,
        ctx: &TtrpcContext,
        q: api::OpenRequest,
    ) -> ttrpc::Result<api::OpenResponse> {
        let work = Box::pin(self.0.open(q));
        self.0.run("Open", &call_of(ctx), work).await.map_err(|e| ttrpc_error(&e))
    }

    async fn probe(
        &self,
        ctx: &TtrpcContext,
        q: api::ProbeRequest,
    ) -> ttrpc::Result<api::ProbeResponse> {
        let work = async { self.0.probe(&q) };
        self.0.run("Probe", &call_of(ctx), work).await.map_err(|e| ttrpc_error(&e))
    }

    async fn close(
        &self,
        ctx: &TtrpcContext,
        q: api::CloseRequest,
    ) -> ttrpc::Result<api::CloseResponse> {
        let work = Box::pin(self.0.close_opened(&q));
        self.0.run("Close", &call_of(ctx), work).await.map_err(|e| ttrpc_error(&e))
    }
}

/// The service for a ttrpc server.
pub(crate) fn services(controller: Controller) -> Services {
    service::create_endpoint(Arc::new(Over(controller))).into()
}
