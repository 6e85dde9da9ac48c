//! The guest API: `kuasar.vmm.v1.Guest`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::blocking;
use kuasar_host::record;
use kuasar_oci::processes::Command;
use ttrpc::Result as Rpc;
use ttrpc::r#async::TtrpcContext;
use vmm_common::guest::{self as api, SetupRequest};
use vmm_common::guest_ttrpc::{Guest, create_guest};
use vmm_common::handshake::{PROTOCOL, Welcome};

use crate::boot::{self, Steps};
use crate::channel::{self, Gate};
use crate::cmdline::PowerOff;
use crate::containers::{GuestContainers, POD_DIR};
use crate::debug::Debugs;
use crate::engine::Engine;
use crate::events::Events;
use crate::files::Files;
use crate::forward::Forwards;
use crate::reaper::Reaper;
use crate::spans::Spans;
use crate::storage::Storages;
use crate::{clock, hotplug, init, limits, network, power, trim};

/// Everything that the API touches.
pub struct GuestService {
    /// Containers.
    pub containers: Arc<GuestContainers>,
    /// What an engine that calls us itself may make.
    pub engine: Arc<Engine>,
    /// Children.
    pub reaper: Reaper,
    /// Who may speak to us.
    pub gate: Arc<Gate>,
    /// Port-forwards.
    pub forwards: Arc<Forwards>,
    /// Programs beside the containers.
    pub debugs: Arc<Debugs>,
    /// Events.
    pub events: Arc<Events>,
    /// What was done for requests that came with a trace.
    pub spans: Spans,
    /// Storages of the pod.
    pub storages: Storages,
    /// Copies of the host's files.
    pub files: Arc<Files>,
    /// How the machine ends.
    pub poweroff: PowerOff,
    /// Nanoseconds since boot at which we began.
    pub started_ns: u64,
    /// The same at which we served; 0 before.
    pub serving_ns: AtomicU64,
    /// What was done in between, and [after](Self::settle).
    pub steps: Mutex<Steps>,
    /// Whether the machine is ready for containers; nobody takes long to find out, since all is
    /// done on one thread.
    pub settled: AtomicBool,
    /// Whether Setup has been done; held while it is done.
    pub pod: tokio::sync::Mutex<bool>,
    /// The same, for who does not want to wait.
    pub pod_ready: AtomicBool,
    /// Whether the machine is ending.
    pub ending: AtomicBool,
    /// One network change at a time.
    pub network: tokio::sync::Mutex<()>,
}

impl GuestService {
    /// As a ttrpc service.
    pub fn services(self: &Arc<Self>) -> HashMap<String, ttrpc::r#async::Service> {
        create_guest(self.clone())
    }

    /// What was done so far.
    pub fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the machine ready for containers, once: before the host can ask for anything, and before
    /// the machine waits to become a template.
    pub fn settle(&self) {
        if self.settled.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut steps = self.steps();
        steps.end_of("word to the host");
        boot::settings();
        steps.end_of("lo and cgroups");
        trim::program();
        steps.end_of("pages of the start let go");
    }

    /// Takes what the host says at its welcome: token, clock, entropy.
    pub fn welcomed(&self, welcome: &Welcome) {
        // None of this may keep the host from being let in.
        if let Err(error) = clock::from_hex(&welcome.entropy).and_then(|bytes| clock::seed(&bytes))
        {
            self.complain("no entropy of the host's", &error);
        }
        if let Err(error) = clock::set(welcome.now_ns, 0) {
            self.complain("the clock is not the host's", &error);
        }
        self.gate.open(welcome.token.clone());
    }

    fn complain(&self, what: &str, error: &Error) {
        tracing::warn!("{what}: {}", error.chain());
        self.events.warning(&format!("{what}: {}", error.chain()));
    }

    async fn set_up(&self, request: SetupRequest) -> Result<api::SetupResponse> {
        let mut done = self.pod.lock().await;
        if *done {
            return Err(Error::AlreadyExists("the pod has been set up already".into()));
        }
        kuasar_host::id::check("sandbox", &request.sandbox_id)
            .map_err(|error| Error::InvalidArgument(error.to_string()))?;
        if request.sysctls.len() > limits::ENTRIES {
            return Err(Error::ResourceExhausted("too many sysctls".into()));
        }
        let begun = Instant::now();
        files(&request)?;
        if !request.hostname.is_empty() {
            let name = request.hostname.as_bytes();
            // SAFETY: pointer and length describe `name`.
            if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } != 0 {
                let error = std::io::Error::last_os_error();
                return Err(Error::internal("set the host name", error));
            }
        }
        let bytes = if request.shm_bytes == 0 { limits::SHM } else { request.shm_bytes };
        resize_shm(bytes)?;
        let files = begun.elapsed();
        for share in &request.shares {
            self.storages.add(share).await?;
        }
        let shares = begun.elapsed();
        if let Some(network) = request.network.as_ref() {
            let _one = self.network.lock().await;
            network::set(network).await?;
        }
        // After the network: some name an interface.
        for sysctl in &request.sysctls {
            kuasar_host::namespace::set_sysctl(&sysctl.name, &sysctl.value).map_err(|error| {
                match error.kind() {
                    kuasar_host::Kind::Invalid | kuasar_host::Kind::NotFound => {
                        Error::InvalidArgument(error.to_string())
                    }
                    _ => Error::internal(format!("set sysctl {:.100}", sysctl.name), error),
                }
            })?;
        }
        let init = if request.shared_pid { Some(self.init().await?) } else { None };
        let init_pid = init.as_ref().map_or(0, |(_, pid)| *pid);
        self.containers.set_pod(&request.sandbox_id, init)?;
        // From the beginning until each was done.
        tracing::debug!(?files, ?shares, all = ?begun.elapsed(), "the pod is set up");
        // Last: nobody is to call before there is a pod.
        let task_port = self.engine.listen(&request).await?;
        self.pod_ready.store(true, Ordering::Release);
        *done = true;
        Ok(api::SetupResponse { init_pid, task_port, ..Default::default() })
    }

    /// Process 1 of the shared PID namespace.
    async fn init(&self) -> Result<(std::os::fd::OwnedFd, u32)> {
        let failed = |error| Error::internal("make the pod's PID namespace", error);
        record::private_dir(Path::new(init::ROOT))
            .map_err(|error| Error::internal("make an empty directory", error))?;
        let command = Command {
            argv: vec![self.containers.program(), "pod-init".into()],
            env: Vec::new(),
            fds: vec![None, None, None],
            cookie: kuasar_oci::processes::new_cookie(),
            place: None,
        };
        let cookie = command.cookie;
        let spawned = self.reaper.spawn_in_new_pid_namespace(command).map_err(failed)?;
        let path = format!("/proc/{}/ns/pid", spawned.pid);
        let namespace = kuasar_host::namespace::open(Path::new(&path))
            .map_err(|error| Error::internal("open the pod's PID namespace", error))?;
        let (reaper, events) = (self.reaper.clone(), self.events.clone());
        tokio::spawn(async move {
            let exit = reaper.end_of(cookie).await;
            let status = exit.map_or(255, |exit| exit.status);
            events.warning(&format!("the init of the shared PID namespace ended: {status}"));
        });
        Ok((namespace, spawned.pid))
    }
}

/// The pod's files below `/etc`.
fn files(request: &SetupRequest) -> Result<()> {
    let failed = |error| Error::internal("write the pod's files", error);
    record::private_dir(Path::new(POD_DIR)).map_err(failed)?;
    let hostname = match request.hostname.as_str() {
        "" => String::new(),
        name => kuasar_host::dns::hostname(name)
            .map_err(|error| Error::InvalidArgument(error.to_string()))?,
    };
    let hostname = hostname.into_bytes();
    let hosts = if request.hosts.is_empty() {
        kuasar_host::dns::hosts(&request.hostname, &[]).into_bytes()
    } else {
        request.hosts.clone()
    };
    let all =
        [("hostname", hostname), ("hosts", hosts), ("resolv.conf", request.resolv_conf.clone())];
    for (name, contents) in all {
        if contents.len() > limits::FILE {
            let text = format!("{name} is longer than {} bytes", limits::FILE);
            return Err(Error::ResourceExhausted(text));
        }
        record::write_file(&Path::new(POD_DIR).join(name), &contents, 0o644).map_err(failed)?;
    }
    Ok(())
}

/// The guest's `/dev/shm` is the pod's.
fn resize_shm(bytes: u64) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("size={bytes}");
    mount(None::<&str>, "/dev/shm", None::<&str>, flags, Some(data.as_str()))
        .map_err(|error| Error::internal("set the size of /dev/shm", error))
}

#[async_trait]
impl Guest for GuestService {
    async fn info(&self, _: &TtrpcContext, _: api::InfoRequest) -> Rpc<api::InfoResponse> {
        let ready = channel::ready();
        Ok(api::InfoResponse {
            protocol: PROTOCOL,
            agent_version: ready.agent_version,
            kernel_release: ready.kernel_release,
            boot_id: ready.boot_id,
            memory_bytes: hotplug::total_memory(),
            cpus: hotplug::cpus(),
            started_ns: self.started_ns,
            serving_ns: self.serving_ns.load(Ordering::Relaxed),
            pod_ready: self.pod_ready.load(Ordering::Acquire),
            steps: (self.steps().done.iter())
                .map(|(name, cpu_ns, wall_ns)| api::Step {
                    name: (*name).to_owned(),
                    cpu_ns: *cpu_ns,
                    wall_ns: *wall_ns,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        })
    }

    async fn setup(&self, ctx: &TtrpcContext, q: SetupRequest) -> Rpc<api::SetupResponse> {
        let span = kuasar_ttrpc::span("kuasar.vmm.v1.Guest", "Setup", &ctx.metadata);
        let scope = span.as_ref().map(|span| span.scope().clone());
        Ok(kuasar_trace::within(scope, Box::pin(self.set_up(q))).await?)
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        q: api::SetNetworkRequest,
    ) -> Rpc<api::SetNetworkResponse> {
        let _one = self.network.lock().await;
        network::set(q.network.get_or_default()).await?;
        Ok(api::SetNetworkResponse::new())
    }

    async fn add_storage(
        &self,
        _: &TtrpcContext,
        q: api::AddStorageRequest,
    ) -> Rpc<api::AddStorageResponse> {
        let path = self.storages.add(q.storage.get_or_default()).await?;
        let path = path.to_string_lossy().into_owned();
        Ok(api::AddStorageResponse { path, ..Default::default() })
    }

    async fn remove_storage(
        &self,
        _: &TtrpcContext,
        q: api::RemoveStorageRequest,
    ) -> Rpc<api::RemoveStorageResponse> {
        self.storages.remove(&q.id).await?;
        Ok(api::RemoveStorageResponse::new())
    }

    async fn put_files(
        &self,
        _: &TtrpcContext,
        q: api::PutFilesRequest,
    ) -> Rpc<api::PutFilesResponse> {
        self.files.put(q).await?;
        Ok(api::PutFilesResponse::new())
    }

    async fn take_file(
        &self,
        _: &TtrpcContext,
        q: api::TakeFileRequest,
    ) -> Rpc<api::TakeFileResponse> {
        let data = self.files.take(q).await?;
        Ok(api::TakeFileResponse { data, ..Default::default() })
    }

    async fn drop_files(
        &self,
        _: &TtrpcContext,
        q: api::DropFilesRequest,
    ) -> Rpc<api::DropFilesResponse> {
        self.files.remove(q.container).await?;
        Ok(api::DropFilesResponse::new())
    }

    async fn online(&self, _: &TtrpcContext, q: api::OnlineRequest) -> Rpc<api::OnlineResponse> {
        let (cpus, memory_bytes) = hotplug::online(q.cpus, q.memory_bytes).await?;
        Ok(api::OnlineResponse { cpus, memory_bytes, ..Default::default() })
    }

    async fn set_clock(
        &self,
        _: &TtrpcContext,
        q: api::SetClockRequest,
    ) -> Rpc<api::SetClockResponse> {
        let (offset_ns, stepped) = clock::set(q.now_ns, q.tolerance_ns)?;
        Ok(api::SetClockResponse { offset_ns, stepped, ..Default::default() })
    }

    async fn renew(&self, _: &TtrpcContext, q: api::RenewRequest) -> Rpc<api::RenewResponse> {
        channel::check_token(&q.token)
            .map_err(|error| Error::InvalidArgument(error.to_string()))?;
        clock::seed(&q.entropy)?;
        clock::set(q.now_ns, 0)?;
        self.gate.open(q.token);
        Ok(api::RenewResponse::new())
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        q: api::NextEventsRequest,
    ) -> Rpc<api::NextEventsResponse> {
        Ok(self.events.after(q.after, Duration::from_millis(q.timeout_ms)).await)
    }

    async fn usage(&self, _: &TtrpcContext, _: api::UsageRequest) -> Rpc<api::UsageResponse> {
        Ok(blocking(hotplug::usage).await?)
    }

    async fn forward(&self, _: &TtrpcContext, q: api::ForwardRequest) -> Rpc<api::ForwardResponse> {
        self.forwards.expect(&q.id, q.port)?;
        Ok(api::ForwardResponse::new())
    }

    async fn debug(&self, _: &TtrpcContext, q: api::DebugRequest) -> Rpc<api::DebugResponse> {
        self.debugs.expect(q)?;
        Ok(api::DebugResponse::new())
    }

    async fn steer_debug(
        &self,
        _: &TtrpcContext,
        q: api::SteerDebugRequest,
    ) -> Rpc<api::SteerDebugResponse> {
        self.debugs.steer(&q)?;
        Ok(api::SteerDebugResponse::new())
    }

    async fn end_debug(
        &self,
        _: &TtrpcContext,
        q: api::EndDebugRequest,
    ) -> Rpc<api::EndDebugResponse> {
        self.debugs.end(&q.id).await?;
        Ok(api::EndDebugResponse::new())
    }

    async fn spans(&self, _: &TtrpcContext, q: api::SpansRequest) -> Rpc<api::SpansResponse> {
        let spans = self.spans.take(&q.trace_id);
        Ok(api::SpansResponse { spans, ..Default::default() })
    }

    async fn declare(&self, _: &TtrpcContext, q: api::DeclareRequest) -> Rpc<api::DeclareResponse> {
        self.engine.declare(q)?;
        Ok(api::DeclareResponse::new())
    }

    async fn withdraw(
        &self,
        _: &TtrpcContext,
        q: api::WithdrawRequest,
    ) -> Rpc<api::WithdrawResponse> {
        self.engine.withdraw(&q.container, &q.exec).await?;
        Ok(api::WithdrawResponse::new())
    }

    async fn made(&self, _: &TtrpcContext, q: api::MadeRequest) -> Rpc<api::MadeResponse> {
        self.engine.made(&q.container, &q.exec).await?;
        Ok(api::MadeResponse::new())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        q: api::ShutdownRequest,
    ) -> Rpc<api::ShutdownResponse> {
        if !self.ending.swap(true, Ordering::AcqRel) {
            let (grace, how) = (Duration::from_secs(q.grace_secs.into()), self.poweroff);
            tokio::spawn(async move {
                // The answer goes out first.
                tokio::time::sleep(limits::ANSWER).await;
                power::shutdown(grace, how).await
            });
        }
        Ok(api::ShutdownResponse::new())
    }
}
