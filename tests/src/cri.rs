//! CRI over gRPC, blocking, with panics where a test would stop anyway.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
pub use k8s_cri::v1::*;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

pub type Client = RuntimeServiceClient<Channel>;

/// The async runtime of the tests.
pub fn runtime() -> &'static tokio::runtime::Runtime {
    static R: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    R.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    })
}

/// A new connection to containerd.
pub async fn connect() -> Client {
    let path = crate::bed().join("run/containerd.sock");
    let channel = Endpoint::from_static("http://[::]:50051")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }))
        .await
        .unwrap();
    RuntimeServiceClient::new(channel).max_decoding_message_size(64 << 20)
}

/// Calls a method of CRI on a fresh connection, with a deadline of two minutes.
#[macro_export]
macro_rules! cri {
    ($method:ident, $request:expr) => {
        $crate::cri::runtime().block_on(async {
            let mut request = tonic::Request::new($request);
            request.set_timeout(std::time::Duration::from_secs(120));
            let mut client = $crate::cri::connect().await;
            client.$method(request).await.map(|r| r.into_inner())
        })
    };
}

/// A number that no other test of any run has.
pub fn unique() -> u64 {
    static N: AtomicU64 = AtomicU64::new(0);
    let start = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    start.wrapping_add(N.fetch_add(1, Ordering::Relaxed))
}

/// Parent of the pods' cgroups, one for each bed: two of a machine do not see each other.
pub fn cgroup_root() -> String {
    let (top, bed) = (crate::top(), crate::bed());
    let bed = bed.strip_prefix(top.join("target")).unwrap_or(&bed);
    let bed = bed.to_string_lossy().replace('/', "-");
    format!("kuasar-e2e-{}-{bed}", top.file_name().unwrap().to_string_lossy())
}

/// Configuration of a pod as kubelet sends it: explicit namespace options.
pub fn pod_config(name: &str) -> PodSandboxConfig {
    let uid = format!("{name}-{}", unique());
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: uid.clone(),
            namespace: "e2e".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: bed_logs().join(&uid).to_string_lossy().into_owned(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("/{}/{uid}", cgroup_root()),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Configuration of a container of the pod `config`, as kubelet sends it.
pub fn container_config(config: &PodSandboxConfig, command: &[&str]) -> ContainerConfig {
    let name = format!("c{}", unique());
    let options =
        config.linux.as_ref().and_then(|l| l.security_context.as_ref()?.namespace_options.clone());
    let security =
        LinuxContainerSecurityContext { namespace_options: options, ..Default::default() };
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.clone(), attempt: 0 }),
        image: Some(ImageSpec { image: "localhost/busybox:latest".into(), ..Default::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(security),
        }),
        ..Default::default()
    }
}

fn bed_logs() -> PathBuf {
    crate::bed().join("run/logs")
}

/// A running pod; removed when dropped.
pub struct Pod {
    pub id: String,
    pub config: PodSandboxConfig,
}

impl Pod {
    pub fn run(config: PodSandboxConfig) -> Self {
        Self::try_run(config, &crate::handler()).unwrap()
    }

    /// With the namespace options changed.
    pub fn with(name: &str, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        let mut config = pod_config(name);
        let linux = config.linux.as_mut().unwrap();
        let security = linux.security_context.as_mut().unwrap();
        change(security.namespace_options.as_mut().unwrap());
        Self::run(config)
    }

    pub fn try_run(config: PodSandboxConfig, handler: &str) -> Result<Self, Status> {
        std::fs::create_dir_all(&config.log_directory).unwrap();
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: if handler == "runc" { String::new() } else { handler.into() },
        };
        let id = cri!(run_pod_sandbox, request)?.pod_sandbox_id;
        Ok(Self { id, config })
    }

    pub fn state(&self) -> i32 {
        let q = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        cri!(pod_sandbox_status, q).unwrap().status.unwrap().state
    }

    pub fn stop(&self) {
        cri!(stop_pod_sandbox, StopPodSandboxRequest { pod_sandbox_id: self.id.clone() }).unwrap();
    }

    pub fn remove(&self) -> Result<(), Status> {
        cri!(stop_pod_sandbox, StopPodSandboxRequest { pod_sandbox_id: self.id.clone() })?;
        cri!(remove_pod_sandbox, RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() })?;
        Ok(())
    }

    /// Creates and starts a container.
    pub fn start(&self, command: &[&str]) -> Container {
        self.start_with(command, |_| {})
    }

    pub fn start_with(
        &self,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Container {
        let c = self.create_with(command, change).unwrap();
        c.start().unwrap();
        c
    }

    pub fn create_with(
        &self,
        command: &[&str],
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container, Status> {
        let mut config = container_config(&self.config, command);
        change(&mut config);
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        let id = cri!(
            create_container,
            CreateContainerRequest {
                pod_sandbox_id: self.id.clone(),
                config: Some(config),
                sandbox_config: Some(self.config.clone()),
            }
        )?
        .container_id;
        Ok(Container { id, log })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A test that fails leaves its pod to this; one that removed it is no error.
        let _ = self.remove();
        let _ = std::fs::remove_dir_all(&self.config.log_directory);
    }
}

/// A container; removed with its pod.
pub struct Container {
    pub id: String,
    pub log: PathBuf,
}

impl Container {
    pub fn start(&self) -> Result<(), Status> {
        cri!(start_container, StartContainerRequest { container_id: self.id.clone() }).map(drop)
    }

    pub fn stop(&self, seconds: i64) -> Result<(), Status> {
        let q = StopContainerRequest { container_id: self.id.clone(), timeout: seconds };
        cri!(stop_container, q).map(drop)
    }

    pub fn remove(&self) -> Result<(), Status> {
        cri!(remove_container, RemoveContainerRequest { container_id: self.id.clone() }).map(drop)
    }

    pub fn status(&self) -> ContainerStatus {
        let q = ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        cri!(container_status, q).unwrap().status.unwrap()
    }

    /// Host pid of the init process.
    pub fn pid(&self) -> u32 {
        let q = ContainerStatusRequest { container_id: self.id.clone(), verbose: true };
        let info = cri!(container_status, q).unwrap().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        info["pid"].as_u64().unwrap() as u32
    }

    pub fn is_running(&self) -> bool {
        self.status().state() == ContainerState::ContainerRunning
    }

    /// Waits for the end; answers the exit code.
    pub fn wait(&self) -> i32 {
        crate::wait_for("the container ends", Duration::from_secs(60), || {
            self.status().state() == ContainerState::ContainerExited
        });
        self.status().exit_code
    }

    /// Runs a command in it: exit code, standard output, standard error.
    pub fn exec(&self, command: &[&str]) -> (i32, String, String) {
        let q = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: 60,
        };
        let r = cri!(exec_sync, q).unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (r.exit_code, text(&r.stdout), text(&r.stderr))
    }

    /// Output of a shell line that must succeed.
    pub fn sh(&self, line: &str) -> String {
        let (code, out, err) = self.exec(&["sh", "-c", line]);
        assert_eq!(code, 0, "{line}: {out}{err}");
        out.trim_end().to_owned()
    }

    /// Output that containerd has logged: the bytes of `stream`.
    pub fn logged(&self, stream: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in std::fs::read(&self.log).unwrap_or_default().split_inclusive(|b| *b == b'\n') {
            let parts: Vec<&[u8]> = line.splitn(4, |b| *b == b' ').collect();
            let [_, s, tag, text] = parts.as_slice() else { continue };
            if *s != stream.as_bytes() {
                continue;
            }
            // `P` is a piece of a line: its line feed is the log's, not the program's.
            let keep = if *tag == b"P" { text.len() - 1 } else { text.len() };
            bytes.extend_from_slice(&text[..keep]);
        }
        bytes
    }
}

/// Annotations as a map.
pub fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A request with a deadline.
pub fn within<T>(request: T, seconds: u64) -> Request<T> {
    let mut request = Request::new(request);
    request.set_timeout(Duration::from_secs(seconds));
    request
}
