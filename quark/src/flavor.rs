//! Pods on Quark: one process per pod, which is a virtual machine with Quark's kernel in it.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::{SandboxContext, SandboxSpec};
use containerd_task::runtime::Runtime;
use kuasar_forward::GuestError;
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_host::process::Identity;
use kuasar_oci::observer::Observer;
use kuasar_oci::pod::Pod;
use kuasar_pod::files::{self, host};
use kuasar_pod::kernel;
use kuasar_pod::sandboxer::watch_end;
use kuasar_pod::{Choice, Flavor, Metrics, PodSettings};
use kuasar_protos::shim::api;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::engine::{self, Quark, Start};
use crate::runtime::{Containers, ROOT};
use crate::spec;
use crate::tree::Tree;

/// Between two attempts to reach a sandbox that does not answer yet.
const AGAIN: Duration = Duration::from_millis(10);
/// How long killed processes may take to end.
const END: Duration = Duration::from_secs(5);

/// What is durable of a pod's sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Own {
    /// The program, as it was found.
    pub program: PathBuf,
    /// Short id, for the socket.
    pub short: String,
    /// Where the sandbox's process is, as in `linux.cgroupsPath`.
    pub cgroup: String,
    /// The process.
    pub process: Option<Identity>,
}

/// Makes a sandbox for each pod.
pub struct QuarkFlavor {
    config: Live<Config>,
    quark: Arc<Quark>,
    cgroups: Arc<Layout>,
}

impl QuarkFlavor {
    /// With the configuration as it is at each call.
    pub fn new(config: Live<Config>, quark: Arc<Quark>, cgroups: Arc<Layout>) -> Self {
        Self { config, quark, cgroups }
    }

    /// Waits until the sandbox answers calls: its socket is there earlier.
    async fn serves(&self, dir: &std::path::Path, own: &Own, process: Identity) -> Result<()> {
        let client = self.quark.client(&own.short, engine::gone(process.open()));
        let question = api::StateRequest { id: "none".into(), ..api::StateRequest::default() };
        let limit = self.quark.limits().start;
        let asked = async {
            loop {
                let answer: kuasar_forward::Result<api::StateResponse> = client
                    .call_for(kuasar_forward::task::V2, "State", &question, Some(limit))
                    .await;
                match answer {
                    // Not yet, or it is ending: that shows in a moment.
                    Err(GuestError::Broken(_)) => tokio::time::sleep(AGAIN).await,
                    answer => return answer,
                }
            }
        };
        let answer = tokio::time::timeout(limit, asked).await;
        let late = || GuestError::Deadline { what: "its first call".into(), limit };
        match answer.unwrap_or_else(|_| Err(late())) {
            Ok(_) => Ok(()),
            // It knows no such container, and said so.
            Err(error) if error.is_not_found() => Ok(()),
            Err(GuestError::Gone) => Err(Error::FailedPrecondition(format!(
                "quark's sandbox has ended at once: see quark's own log{}",
                engine::said(&dir.join("quark.log"))
            ))),
            Err(error) => Err(error.into()),
        }
    }
}

fn own(value: &Value) -> Own {
    serde_json::from_value(value.clone()).unwrap_or_default()
}

fn task(what: &'static str) -> impl FnOnce(containerd_task::error::Error) -> Error {
    move |error| Error::internal(what, error.chain())
}

#[async_trait]
impl Flavor for QuarkFlavor {
    fn name(&self) -> &'static str {
        "quark"
    }

    fn in_namespaces(&self) -> bool {
        false
    }

    fn pid(&self, value: &Value) -> u32 {
        own(value).process.map_or(0, |process| process.pid)
    }

    fn settings(&self) -> PodSettings {
        PodSettings { shm_size: self.config.get().shm_size, unprivileged_ports: false }
    }

    async fn choose(&self, sandbox: &SandboxSpec) -> Result<Choice> {
        kernel::check("Quark", &sandbox.config, &self.config.get().ignored_sysctls)?;
        let program = self.quark.find().map_err(Error::FailedPrecondition)?;
        let own = Own {
            program,
            short: kernel::short_id(&sandbox.id),
            cgroup: kernel::cgroup(sandbox),
            process: None,
        };
        if std::os::unix::net::UnixStream::connect(self.quark.socket(&own.short)).is_ok() {
            return Err(Error::AlreadyExists(format!("Quark has a sandbox {}", own.short)));
        }
        let own = serde_json::to_value(own)
            .map_err(|error| Error::internal("record the sandbox", error))?;
        Ok(Choice { engine: "quark".into(), own })
    }

    fn runtime(&self, pod: Arc<Pod>, value: &Value) -> Result<Arc<dyn Runtime>> {
        let drain = self.config.get().drain;
        let cgroups = self.cgroups.clone();
        Ok(Arc::new(Containers::new(pod, own(value), &self.quark, cgroups, drain)))
    }

    async fn up(&self, ctx: &SandboxContext, pod: &Pod, value: &mut Value) -> Result<()> {
        let mut own = own(value);
        let hostname = files::hostname(&ctx.spec.config, pod.modes)?;
        let text = spec::sandbox(pod, &hostname).to_string();
        let (dir, tree) = (ctx.dir.clone(), Tree::new(&ctx.dir));
        let cgroup = self.cgroups.group(&own.cgroup).map_err(host("the sandbox's cgroup"))?;
        let (record, group, made) = (own.clone(), cgroup.clone(), tree.clone());
        blocking(move || {
            kernel::write_record(&dir, ROOT, &record.cgroup)?;
            group.create().map_err(host("make the sandbox's cgroup"))?;
            made.make(text.as_bytes()).map_err(task("make the pod's tree"))
        })
        .await?;
        let begun = Instant::now();
        let start = Start {
            program: &own.program,
            id: &ctx.spec.id,
            short: &own.short,
            dir: &ctx.dir,
            tree: &tree.path(),
            cgroup: &cgroup,
        };
        let (process, pidfd) = self.quark.start(&start).await?;
        own.process = Some(process);
        *value = serde_json::to_value(&own)
            .map_err(|error| Error::internal("record the sandbox", error))?;
        self.serves(&ctx.dir, &own, process).await?;
        Metrics("quark").phase("sandbox", begun.elapsed());
        watch_end(ctx, pidfd);
        Ok(())
    }

    async fn down(&self, ctx: &SandboxContext, value: &Value) -> Result<()> {
        let own = own(value);
        if own.short.is_empty() {
            return Ok(());
        }
        let socket = self.quark.socket(&own.short);
        let cgroup = self.cgroups.group(&own.cgroup).ok();
        let tree = Tree::new(&ctx.dir);
        blocking(move || {
            if let Some(pidfd) = own.process.and_then(Identity::open) {
                engine::end(pidfd.as_fd(), END)?;
            }
            // A start that failed may have left something behind which no record names.
            if let Some(cgroup) = cgroup.filter(|cgroup| cgroup.exists()) {
                let _ = cgroup.signal_all(libc::SIGKILL);
                if !cgroup.wait_empty(END).map_err(host("wait for quark"))? {
                    return Err(Error::DeadlineExceeded(format!(
                        "processes of the sandbox have not ended within {END:?}"
                    )));
                }
            }
            let _ = std::fs::remove_file(&socket);
            // Volumes are the node's again.
            tree.release().map_err(task("unmount the pod's files"))
        })
        .await
    }

    async fn recovered(
        &self,
        ctx: &SandboxContext,
        _pod: &Pod,
        value: &Value,
        whole: bool,
    ) -> Result<bool> {
        let own = own(value);
        let Some(pidfd) = own.process.filter(|_| whole).and_then(Identity::open) else {
            return Ok(false);
        };
        watch_end(ctx, pidfd);
        Ok(true)
    }

    async fn info(&self, _ctx: &SandboxContext, value: &Value) -> Map<String, Value> {
        let own = own(value);
        let mut info = Map::new();
        info.insert("quark".into(), json!(own.program));
        info.insert("quarkPid".into(), json!(own.process.map(|process| process.pid)));
        info.insert("taskSocket".into(), json!(self.quark.socket(&own.short)));
        info.insert("cgroup".into(), json!(own.cgroup));
        info
    }
}
