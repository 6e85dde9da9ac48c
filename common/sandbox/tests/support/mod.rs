//! A sandboxer and a sandbox-parent of straw, and a daemon around them on a real socket.

#![allow(dead_code)] // each test binary uses a part

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_sandbox::codec::MessageCodec;
use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::*;
use containerd_sandbox::{Controller, ControllerOptions, Endpoints, PodSockets, SandboxHandle};
use kuasar_protos::controller as api;
use kuasar_protos::controller_ttrpc::ControllerClient;
use protobuf::Message;
use tokio::sync::{Semaphore, watch};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A sandboxer that makes nothing, remembers what it was asked, and fails on demand.
#[derive(Default)]
pub struct StrawSandboxer {
    /// `method id`, in order.
    pub calls: Mutex<Vec<String>>,
    /// Methods that fail.
    pub failing: Mutex<HashSet<&'static str>>,
    /// Methods that panic.
    pub panicking: Mutex<HashSet<&'static str>>,
    /// Methods that wait for a permit.
    pub gates: Mutex<HashMap<&'static str, Arc<Semaphore>>>,
    /// Sandboxes that exist in the world.
    pub world: Mutex<HashSet<String>>,
    /// Handles by sandbox.
    pub handles: Mutex<HashMap<String, SandboxHandle>>,
    /// Last spec and state that a method saw.
    pub seen: Mutex<Option<(Arc<SandboxSpec>, serde_json::Value)>>,
    /// Ids that recover finds dead.
    pub dead: Mutex<HashSet<String>>,
    /// What remove_orphans was told.
    pub known: Mutex<Option<Vec<String>>>,
    /// Timeouts of stop.
    pub timeouts: Mutex<Vec<Duration>>,
    /// Endpoint of its own.
    pub address: Mutex<Option<String>>,
}

impl StrawSandboxer {
    async fn enter(&self, what: &'static str, ctx: &SandboxContext) -> Result<()> {
        self.calls.lock().unwrap().push(format!("{what} {}", ctx.spec.id));
        self.handles.lock().unwrap().insert(ctx.spec.id.clone(), ctx.handle.clone());
        *self.seen.lock().unwrap() = Some((ctx.spec.clone(), ctx.state.clone()));
        let gate = self.gates.lock().unwrap().get(what).cloned();
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        if self.panicking.lock().unwrap().contains(what) {
            panic!("straw is on fire");
        }
        if self.failing.lock().unwrap().contains(what) {
            return Err(Error::internal(format!("cannot {what}"), "straw"));
        }
        Ok(())
    }

    pub fn count(&self, what: &str) -> usize {
        let calls = self.calls.lock().unwrap();
        calls.iter().filter(|c| c.split(' ').next() == Some(what)).count()
    }

    pub fn gate(&self, what: &'static str) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.gates.lock().unwrap().insert(what, gate.clone());
        gate
    }
}

#[async_trait]
impl Sandboxer for StrawSandboxer {
    async fn create(&self, ctx: &SandboxContext) -> Result<()> {
        self.enter("create", ctx).await?;
        self.world.lock().unwrap().insert(ctx.spec.id.clone());
        ctx.handle.save(serde_json::json!({ "made": true })).await
    }

    async fn start(&self, ctx: &SandboxContext) -> Result<Started> {
        self.enter("start", ctx).await?;
        Ok(Started {
            pid: 42,
            labels: BTreeMap::from([("selinux_label".into(), "straw_t".into())]),
            address: self.address.lock().unwrap().clone(),
            spec: Some(b"{\"ociVersion\":\"1.2.0\"}".to_vec()),
        })
    }

    async fn services(&self, ctx: &SandboxContext) -> Result<PodServices> {
        self.enter("services", ctx).await?;
        Ok(straw_task::services())
    }

    async fn stop(&self, ctx: &SandboxContext, timeout: Duration) -> Result<()> {
        self.timeouts.lock().unwrap().push(timeout);
        self.enter("stop", ctx).await
    }

    async fn remove(&self, ctx: &SandboxContext) -> Result<()> {
        self.enter("remove", ctx).await?;
        self.world.lock().unwrap().remove(&ctx.spec.id);
        Ok(())
    }

    async fn recover(&self, ctx: &SandboxContext) -> Result<Recovered> {
        self.enter("recover", ctx).await?;
        if self.dead.lock().unwrap().contains(&ctx.spec.id) {
            return Ok(Recovered::Stopped(SandboxExit { status: 137, at: SystemTime::now() }));
        }
        Ok(Recovered::Running(Started { pid: 43, ..Default::default() }))
    }

    async fn remove_orphans(&self, known: &[String]) -> Result<()> {
        *self.known.lock().unwrap() = Some(known.to_vec());
        Ok(())
    }

    async fn info(&self, ctx: &SandboxContext) -> Result<BTreeMap<String, String>> {
        self.enter("info", ctx).await?;
        Ok(BTreeMap::from([("straw".into(), "1".into())]))
    }

    async fn metrics(&self, ctx: &SandboxContext) -> Result<(String, Vec<u8>)> {
        self.enter("metrics", ctx).await?;
        Ok(("io.containerd.cgroups.v2.Metrics".into(), vec![1]))
    }

    async fn update(&self, ctx: &SandboxContext, fields: &[String]) -> Result<()> {
        assert!(fields.len() < 9);
        self.enter("update", ctx).await
    }
}

/// A Task service that answers Connect for container `c`.
pub mod straw_task {
    use super::*;
    use kuasar_protos::shim::api::{ConnectRequest, ConnectResponse};
    use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
    use ttrpc::proto::{Request, Response};

    struct Connect;

    #[async_trait]
    impl MethodHandler for Connect {
        async fn handler(&self, _: TtrpcContext, q: Request) -> ttrpc::Result<Response> {
            let q = ConnectRequest::parse_from_bytes(&q.payload).unwrap();
            let mut response = Response::new();
            if q.id == "c" {
                response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
                let answer = ConnectResponse { task_pid: 7, ..Default::default() };
                response.payload = answer.write_to_bytes().unwrap();
            } else {
                response.set_status(ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no such task"));
            }
            Ok(response)
        }
    }

    pub fn services() -> PodServices {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Connect);
        let methods = HashMap::from([("Connect".to_owned(), handler)]);
        let service = Service { methods, streams: HashMap::new() };
        HashMap::from([("containerd.task.v3.Task".to_owned(), service)]).into()
    }

    /// Asks Connect over a pod's socket.
    pub async fn connect(address: &str, id: &str) -> ttrpc::Result<ConnectResponse> {
        let address = address.strip_prefix("ttrpc+").unwrap_or(address);
        let client = ttrpc::r#async::Client::connect(address).await?;
        let q = ConnectRequest { id: id.into(), ..Default::default() };
        let request = Request {
            service: "containerd.task.v3.Task".into(),
            method: "Connect".into(),
            payload: q.write_to_bytes().unwrap(),
            timeout_nano: 5_000_000_000,
            ..Default::default()
        };
        let answer = client.request(request).await?;
        Ok(ConnectResponse::parse_from_bytes(&answer.payload).unwrap())
    }
}

/// Accepts in this process and outlives the Controllers, as sandbox-parent does.
#[derive(Default, Clone)]
pub struct StrawSockets(Arc<Mutex<StrawState>>);

#[derive(Default)]
struct StrawState {
    endpoints: Option<Endpoints>,
    ready: bool,
    held: Vec<(String, UnixStream)>,
    pods: HashMap<String, tokio::task::JoinHandle<()>>,
}

impl StrawSockets {
    pub fn serve(&self, endpoints: Endpoints) {
        let mut state = self.0.lock().unwrap();
        state.endpoints = Some(endpoints);
        state.ready = false;
    }

    pub fn pods(&self) -> Vec<String> {
        self.0.lock().unwrap().pods.keys().cloned().collect()
    }

    /// sandbox-parent died as well.
    pub fn lose_all(&self) {
        for (_, task) in self.0.lock().unwrap().pods.drain() {
            task.abort();
        }
    }
}

#[async_trait]
impl PodSockets for StrawSockets {
    async fn listen(&self, pod: &str, listener: OwnedFd) -> io::Result<()> {
        let listener = std::os::unix::net::UnixListener::from(listener);
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let (state, name) = (self.0.clone(), pod.to_owned());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let stream = stream.into_std().unwrap();
                let mut state = state.lock().unwrap();
                match (&state.endpoints, state.ready) {
                    (Some(endpoints), true) => endpoints.connection(&name, stream),
                    _ => state.held.push((name.clone(), stream)),
                }
            }
        });
        self.0.lock().unwrap().pods.insert(pod.into(), task);
        Ok(())
    }

    async fn unlisten(&self, pod: &str) -> io::Result<()> {
        if let Some(task) = self.0.lock().unwrap().pods.remove(pod) {
            task.abort();
        }
        Ok(())
    }

    async fn is_listening(&self, pod: &str) -> io::Result<bool> {
        Ok(self.0.lock().unwrap().pods.contains_key(pod))
    }

    // Like sandbox-parent it cannot list its pods.
    async fn retain(&self, _: &[String]) -> io::Result<()> {
        Ok(())
    }

    async fn ready(&self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.ready = true;
        let held = std::mem::take(&mut state.held);
        for (pod, stream) in held {
            state.endpoints.as_ref().unwrap().connection(&pod, stream);
        }
        Ok(())
    }
}

/// A daemon on a directory of its own; may be restarted.
pub struct Bed {
    pub dir: Arc<tempfile::TempDir>,
    pub sandboxer: Arc<StrawSandboxer>,
    pub sockets: StrawSockets,
    pub controller: Controller,
    pub options: ControllerOptions,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<()>>,
}

pub async fn bed() -> Bed {
    bed_with(|_| {}).await
}

pub async fn bed_with(change: impl FnOnce(&mut ControllerOptions)) -> Bed {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let mut options = ControllerOptions {
        dir: dir.path().join("state"),
        socket: dir.path().join("s.sock"),
        ..Default::default()
    };
    change(&mut options);
    Bed::launch(dir, Arc::default(), StrawSockets::default(), options).await
}

impl Bed {
    async fn launch(
        dir: Arc<tempfile::TempDir>,
        sandboxer: Arc<StrawSandboxer>,
        sockets: StrawSockets,
        options: ControllerOptions,
    ) -> Self {
        let controller =
            Controller::new(options.clone(), sandboxer.clone(), Arc::new(sockets.clone())).unwrap();
        sockets.serve(controller.endpoints());
        let (stop, stopped) = watch::channel(false);
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let served = controller.clone();
        let task =
            tokio::spawn(async move { served.serve(|| ready.send(()).unwrap(), stopped).await });
        is_ready.await.unwrap();
        Self { dir, sandboxer, sockets, controller, options, stop, task }
    }

    /// Ends the daemon; the sockets and the world stay.
    pub async fn end(self) -> (Arc<tempfile::TempDir>, StrawSockets, ControllerOptions) {
        self.stop.send_replace(true);
        self.task.await.unwrap().unwrap();
        (self.dir, self.sockets, self.options)
    }

    /// Ends it, lets `meanwhile` happen, and starts it again with a fresh sandboxer.
    pub async fn restart(self, meanwhile: impl FnOnce(&std::path::Path, &StrawSandboxer)) -> Self {
        let (dir, sockets, options) = self.end().await;
        let sandboxer = Arc::new(StrawSandboxer::default());
        meanwhile(&options.dir, &sandboxer);
        Self::launch(dir, sandboxer, sockets, options).await
    }

    pub async fn grpc(&self) -> Grpc {
        let uri = format!("unix://{}", self.options.socket.display());
        let channel = tonic::transport::Endpoint::from_shared(uri).unwrap().connect().await;
        Grpc(channel.unwrap())
    }

    pub async fn ttrpc(&self) -> ttrpc::r#async::Client {
        let uri = format!("unix://{}", self.options.socket.display());
        ttrpc::r#async::Client::connect(&uri).await.unwrap()
    }

    pub async fn ttrpc_controller(&self) -> ControllerClient {
        ControllerClient::new(self.ttrpc().await)
    }

    pub fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.options.dir.join("sandboxes").join(id)
    }
}

/// A gRPC client of the Controller.
#[derive(Clone)]
pub struct Grpc(pub Channel);

impl Grpc {
    pub async fn call<Q: Message, A: Message>(
        &self,
        method: &str,
        q: tonic::Request<Q>,
    ) -> std::result::Result<A, Status> {
        let mut client = tonic::client::Grpc::new(self.0.clone())
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        client.ready().await.map_err(|e| Status::unknown(e.to_string()))?;
        let path = format!("/containerd.services.sandbox.v1.Controller/{method}");
        let codec = MessageCodec::<Q, A>::default();
        client.unary(q, path.parse().unwrap(), codec).await.map(tonic::Response::into_inner)
    }

    async fn plain<Q: Message, A: Message>(
        &self,
        method: &str,
        q: Q,
    ) -> std::result::Result<A, Status> {
        self.call(method, tonic::Request::new(q)).await
    }

    pub async fn create_with(
        &self,
        q: api::ControllerCreateRequest,
    ) -> std::result::Result<api::ControllerCreateResponse, Status> {
        self.plain("Create", q).await
    }

    pub async fn create(&self, id: &str) -> std::result::Result<(), Status> {
        self.create_with(create_request(id)).await.map(drop)
    }

    pub async fn start(
        &self,
        id: &str,
    ) -> std::result::Result<api::ControllerStartResponse, Status> {
        let q = api::ControllerStartRequest { sandbox_id: id.into(), ..Default::default() };
        self.plain("Start", q).await
    }

    /// Create and Start.
    pub async fn up(&self, id: &str) -> api::ControllerStartResponse {
        self.create(id).await.unwrap();
        self.start(id).await.unwrap()
    }

    pub async fn stop(&self, id: &str, secs: u32) -> std::result::Result<(), Status> {
        let q = api::ControllerStopRequest {
            sandbox_id: id.into(),
            timeout_secs: secs,
            ..Default::default()
        };
        self.plain::<_, api::ControllerStopResponse>("Stop", q).await.map(drop)
    }

    pub async fn wait(&self, id: &str) -> std::result::Result<api::ControllerWaitResponse, Status> {
        let q = api::ControllerWaitRequest { sandbox_id: id.into(), ..Default::default() };
        self.plain("Wait", q).await
    }

    pub async fn status(
        &self,
        id: &str,
        verbose: bool,
    ) -> std::result::Result<api::ControllerStatusResponse, Status> {
        let q =
            api::ControllerStatusRequest { sandbox_id: id.into(), verbose, ..Default::default() };
        self.plain("Status", q).await
    }

    pub async fn state(&self, id: &str) -> String {
        match self.status(id, false).await {
            Ok(s) => s.state,
            Err(e) => format!("{:?}", e.code()),
        }
    }

    pub async fn shutdown(&self, id: &str) -> std::result::Result<(), Status> {
        let q = api::ControllerShutdownRequest { sandbox_id: id.into(), ..Default::default() };
        self.plain::<_, api::ControllerShutdownResponse>("Shutdown", q).await.map(drop)
    }

    pub async fn platform(&self) -> api::ControllerPlatformResponse {
        self.plain("Platform", api::ControllerPlatformRequest::new()).await.unwrap()
    }

    pub async fn metrics(
        &self,
        id: &str,
    ) -> std::result::Result<api::ControllerMetricsResponse, Status> {
        let q = api::ControllerMetricsRequest { sandbox_id: id.into(), ..Default::default() };
        self.plain("Metrics", q).await
    }

    pub async fn update(&self, q: api::ControllerUpdateRequest) -> std::result::Result<(), Status> {
        self.plain::<_, api::ControllerUpdateResponse>("Update", q).await.map(drop)
    }
}

pub fn create_request(id: &str) -> api::ControllerCreateRequest {
    api::ControllerCreateRequest { sandbox_id: id.into(), ..Default::default() }
}

pub fn code<T: std::fmt::Debug>(result: std::result::Result<T, Status>) -> Code {
    result.err().map_or(Code::Ok, |e| e.code())
}

/// Waits until `done`, looking again whenever other tasks have run; for at most 10 seconds.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let all = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(10), all).await.is_ok(), "not yet: {what}");
}
