//! The Controller over ttrpc: the generated trait on top of [`Controller`].

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kuasar_protos::controller as api;
use kuasar_protos::controller_ttrpc as service;
use kuasar_ttrpc::Services;
use tokio::time::Instant;
use ttrpc::r#async::TtrpcContext;

use crate::controller::{Call, Controller};
use crate::wire::ttrpc_error;

/// What ttrpc knows of a request.
pub(crate) fn call_of(ctx: &TtrpcContext) -> Call {
    let namespace = ctx.metadata.get("containerd-namespace-ttrpc").and_then(|v| v.first());
    let timeout = u64::try_from(ctx.timeout_nano).ok().filter(|n| *n > 0);
    Call {
        namespace: namespace.cloned().unwrap_or_default(),
        deadline: timeout.and_then(|n| Instant::now().checked_add(Duration::from_nanos(n))),
    }
}

struct Over(Controller);

macro_rules! forward {
    ($($name:literal $method:ident $q:ident $a:ident;)*) => {
        #[async_trait]
        impl service::Controller for Over {
            $(async fn $method(&self, ctx: &TtrpcContext, q: api::$q) -> ttrpc::Result<api::$a> {
                let call = call_of(ctx);
                let work = Box::pin(self.0.$method(&call, q));
                self.0.run($name, &call, work).await.map_err(|e| ttrpc_error(&e))
            })*
        }
    };
}

forward! {
    "Create" create ControllerCreateRequest ControllerCreateResponse;
    "Start" start ControllerStartRequest ControllerStartResponse;
    "Platform" platform ControllerPlatformRequest ControllerPlatformResponse;
    "Stop" stop ControllerStopRequest ControllerStopResponse;
    "Wait" wait ControllerWaitRequest ControllerWaitResponse;
    "Status" status ControllerStatusRequest ControllerStatusResponse;
    "Shutdown" shutdown ControllerShutdownRequest ControllerShutdownResponse;
    "Metrics" metrics ControllerMetricsRequest ControllerMetricsResponse;
    "Update" update ControllerUpdateRequest ControllerUpdateResponse;
}

/// The service for a ttrpc server.
pub(crate) fn services(controller: Controller) -> Services {
    service::create_controller(Arc::new(Over(controller))).into()
}
