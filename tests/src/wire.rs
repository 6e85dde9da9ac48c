//! The daemon's socket and the pods' task sockets, spoken to without containerd: for what CRI
//! cannot send, and for bundles that no image makes.

use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use containerd_sandbox::codec::MessageCodec;
use hyper_util::rt::TokioIo;
use kuasar_protos::controller as api;
use kuasar_protos::cri as pod;
use kuasar_protos::runc_options::CheckpointOptions;
use kuasar_protos::shim::api as task;
use kuasar_protos::shim::shim_async::TaskClient;
use kuasar_protos::shim::types::mount::Mount;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use tonic::transport::{Endpoint, Uri};
use tonic::{Code, Status};

use crate::cri::{cgroup_root, runtime, unique};

/// A checkpoint of container `id` into `path`, with options as containerd sends them.
pub fn checkpoint_request(
    id: &str,
    path: &str,
    options: &CheckpointOptions,
) -> task::CheckpointTaskRequest {
    let options = Any {
        type_url: "containerd.runc.v1.CheckpointOptions".into(),
        value: options.write_to_bytes().unwrap(),
        ..Any::default()
    };
    task::CheckpointTaskRequest {
        id: id.into(),
        path: path.into(),
        options: MessageField::some(options),
        ..Default::default()
    }
}

/// What containerd sends an exec's process as.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// Path of the daemon's socket.
pub fn daemon_socket() -> PathBuf {
    crate::bed().join(format!("run/kuasar-{}.sock", crate::kind()))
}

/// Connects to a socket as the bed's mount namespace sees it; its path may be of any length.
pub fn connect(path: &Path) -> UnixStream {
    let handle = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(crate::root().join(path.strip_prefix("/").unwrap()))
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    UnixStream::connect(format!("/proc/self/fd/{}", handle.as_raw_fd())).unwrap()
}

/// Calls a method of the Controller as containerd does.
pub fn controller<Q: Message, A: Message>(method: &str, q: Q) -> Result<A, Status> {
    let mut request = crate::cri::within(q, 60);
    request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
    runtime().block_on(controller_with(method, request))
}

/// Calls a method of the Controller with this request's metadata.
pub async fn controller_with<Q: Message, A: Message>(
    method: &str,
    request: tonic::Request<Q>,
) -> Result<A, Status> {
    let channel = Endpoint::from_static("http://[::]:1")
        .connect_with_connector(tower::service_fn(|_: Uri| async {
            let socket = tokio::net::UnixStream::connect(daemon_socket()).await?;
            Ok::<_, std::io::Error>(TokioIo::new(socket))
        }))
        .await
        .map_err(|e| Status::unavailable(e.to_string()))?;
    let mut client = tonic::client::Grpc::new(channel)
        .max_decoding_message_size(64 << 20)
        .max_encoding_message_size(64 << 20);
    client.ready().await.map_err(|e| Status::unknown(e.to_string()))?;
    let path = format!("/containerd.services.sandbox.v1.Controller/{method}");
    let codec = MessageCodec::<Q, A>::default();
    client.unary(request, path.parse().unwrap(), codec).await.map(tonic::Response::into_inner)
}

/// A task client on a pod's socket.
pub async fn tasks(socket: &Path) -> TaskClient {
    let stream = connect(socket);
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    let socket = ttrpc::asynchronous::transport::Socket::new(stream);
    TaskClient::new(ttrpc::r#async::Client::new(socket))
}

/// A deadline of a minute.
pub fn minute() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(60_000_000_000)
}

/// The code and text of a ttrpc error, which has gRPC's numbers.
pub fn refusal(error: ttrpc::Error) -> Status {
    match error {
        ttrpc::Error::RpcStatus(s) => Status::new(Code::from(s.code.value()), s.message),
        other => Status::unknown(other.to_string()),
    }
}

/// Calls a method of the Task service on a pod's socket.
#[macro_export]
macro_rules! task {
    ($socket:expr, $method:ident, $request:expr) => {
        $crate::cri::runtime()
            .block_on(async {
                let client = $crate::wire::tasks($socket).await;
                client.$method($crate::wire::minute(), &$request).await
            })
            .map_err($crate::wire::refusal)
    };
}

/// The task socket of a sandbox.
pub fn task_socket(id: &str) -> PathBuf {
    let q = api::ControllerStatusRequest { sandbox_id: id.into(), ..Default::default() };
    let answer: api::ControllerStatusResponse = controller("Status", q).unwrap();
    PathBuf::from(answer.address.strip_prefix("ttrpc+unix://").unwrap())
}

/// A Create of the Controller: host network, a PID namespace for each container.
pub fn create_request(id: &str) -> api::ControllerCreateRequest {
    create_with(id, |_| {})
}

/// The same with its pod configuration changed.
pub fn create_with(
    id: &str,
    change: impl FnOnce(&mut pod::PodSandboxConfig),
) -> api::ControllerCreateRequest {
    let mut config = pod::PodSandboxConfig::new();
    config.hostname = "direct".into();
    let linux = config.linux.mut_or_insert_default();
    linux.cgroup_parent = format!("/{}/{id:.40}", cgroup_root());
    let security = linux.security_context.mut_or_insert_default();
    let options = security.namespace_options.mut_or_insert_default();
    options.network = pod::NamespaceMode::NODE.into();
    options.pid = pod::NamespaceMode::CONTAINER.into();
    change(&mut config);
    api::ControllerCreateRequest {
        sandbox_id: id.into(),
        options: MessageField::some(Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Any::default()
        }),
        ..Default::default()
    }
}

/// A pod that containerd knows nothing of; removed when dropped.
pub struct Direct {
    pub id: String,
    pub socket: PathBuf,
    pub labels: std::collections::HashMap<String, String>,
}

impl Direct {
    pub fn run(name: &str) -> Self {
        Self::run_with(name, |_| {})
    }

    /// With this engine.
    pub fn run_on(name: &str, engine: &str) -> Self {
        Self::run_with(name, |config| {
            config.annotations.insert("io.kuasar.runc.engine".into(), engine.into());
        })
    }

    pub fn run_with(name: &str, change: impl FnOnce(&mut pod::PodSandboxConfig)) -> Self {
        let id = format!("{name}-{}", unique());
        let _: api::ControllerCreateResponse =
            controller("Create", create_with(&id, change)).unwrap();
        let q = api::ControllerStartRequest { sandbox_id: id.clone(), ..Default::default() };
        let started: Result<api::ControllerStartResponse, _> = controller("Start", q);
        let started = started.unwrap();
        let socket = PathBuf::from(started.address.strip_prefix("ttrpc+unix://").unwrap());
        Self { id, socket, labels: started.labels }
    }

    /// Creates and starts a container of `bundle`, waits for its end, answers the exit code.
    pub fn run_to_end(&self, bundle: &Bundle) -> Result<u32, Status> {
        let id = format!("c{}", unique());
        task!(&self.socket, create, bundle.request(&id))?;
        let q = task::StartRequest { id: id.clone(), ..Default::default() };
        let started = task!(&self.socket, start, q);
        let ended = started.and_then(|_| {
            let q = task::WaitRequest { id: id.clone(), ..Default::default() };
            task!(&self.socket, wait, q)
        });
        let q = task::DeleteRequest { id, ..Default::default() };
        let deleted = task!(&self.socket, delete, q);
        let ended = ended?;
        deleted.map(|_| ended.exit_status)
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        let q =
            api::ControllerShutdownRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let _: Result<api::ControllerShutdownResponse, _> = controller("Shutdown", q);
    }
}

/// A bundle whose rootfs is a directory with busybox; removed when dropped.
pub struct Bundle {
    pub dir: PathBuf,
    pub spec: Value,
}

impl Bundle {
    pub fn new(args: &[&str]) -> Self {
        let dir = crate::bed().join(format!("run/logs/bundle-{}", unique()));
        let bin = dir.join("rootfs/bin");
        std::fs::create_dir_all(&bin).unwrap();
        for name in ["dev", "etc", "proc", "sys", "tmp"] {
            std::fs::create_dir(dir.join("rootfs").join(name)).unwrap();
        }
        let busybox = bin.join("busybox");
        std::fs::copy(crate::bed().join("src/busybox"), &busybox).unwrap();
        for name in ["sh", "cat", "echo", "head", "id", "ls", "sleep", "stty", "touch", "true"] {
            std::fs::hard_link(&busybox, bin.join(name)).unwrap();
        }
        let ns = |kind: &str| json!({ "type": kind, "path": format!("/proc/0/ns/{kind}") });
        let spec = json!({
            // crun 1.8 wants it to be this.
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 0, "gid": 0 }, "args": args, "env": ["PATH=/bin"], "cwd": "/",
                "capabilities": { "bounding": [], "effective": [], "permitted": [] },
            },
            "root": { "path": "rootfs" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "mode=755", "size=65536k"] },
            ],
            "linux": {
                "namespaces": [{ "type": "mount" }, { "type": "pid" }, ns("ipc"), ns("uts")],
                "cgroupsPath": format!("/{}/bundle-{}", cgroup_root(), unique()),
            },
        });
        Self { dir, spec }
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Adds a bind mount.
    pub fn bind(&mut self, source: &Path, destination: &str) {
        let mount = json!({
            "destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"],
        });
        self.spec["mounts"].as_array_mut().unwrap().push(mount);
    }

    /// What the container has written to `/out`.
    pub fn out(&self) -> String {
        std::fs::read_to_string(self.rootfs().join("out")).unwrap_or_default().trim_end().to_owned()
    }

    /// Writes `config.json`; answers a Create for it, without standard streams.
    pub fn request(&self, id: &str) -> task::CreateTaskRequest {
        std::fs::write(self.dir.join("config.json"), self.spec.to_string()).unwrap();
        task::CreateTaskRequest {
            id: id.into(),
            bundle: self.dir.to_string_lossy().into_owned(),
            ..Default::default()
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A mount for [`task::CreateTaskRequest::rootfs`].
pub fn rootfs_mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    }
}
