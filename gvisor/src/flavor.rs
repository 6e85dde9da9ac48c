//! Pods on gVisor: one sentry per pod, started with a root container that only waits.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_sandbox::error::{Error, Result, blocking};
use containerd_sandbox::sandboxer::{SandboxContext, SandboxSpec};
use containerd_task::runtime::Runtime;
use kuasar_host::cgroup::{Layout, Warmer};
use kuasar_host::live::Live;
use kuasar_host::loopback::Gate;
use kuasar_host::process::{self, Identity};
use kuasar_host::{namespace, record};
use kuasar_oci::observer::Observer;
use kuasar_oci::pod::{Modes, Pod};
use kuasar_pod::files::{self, host};
use kuasar_pod::kernel;
use kuasar_pod::sandboxer::watch_end;
use kuasar_pod::{Choice, Flavor, Metrics, PodSettings};
use serde_json::{Map, Value, json};

use crate::cli::{Own, Runsc};
use crate::config::{Config, Network};
use crate::forward;
use crate::runtime::{Containers, ROOT};
use crate::{pause, spec};

/// How long a killed sentry may take to end.
const END: Duration = Duration::from_secs(5);

/// Makes a sandbox for each pod.
pub struct Gvisor {
    config: Live<Config>,
    runsc: Arc<Runsc>,
    cgroups: Arc<Layout>,
    warmer: OnceLock<Warmer>,
    /// Who serves forwarded connections, by pod.
    gates: Mutex<HashMap<String, tokio::task::AbortHandle>>,
}

impl Gvisor {
    /// With the configuration as it is at each call.
    pub fn new(config: Live<Config>, runsc: Arc<Runsc>, cgroups: Arc<Layout>) -> Self {
        Self { config, runsc, cgroups, warmer: OnceLock::new(), gates: Mutex::default() }
    }

    fn kept(id: &str, name: &str) -> String {
        format!("{id}/ns/{name}")
    }

    async fn keep(&self, id: &str, name: &str, fd: &OwnedFd) -> Result<()> {
        self.runsc
            .parent()
            .keep(&Self::kept(id, name), fd.as_fd())
            .await
            .map_err(|error| Error::internal(format!("keep the pod's {name}"), error))
    }

    /// Lets containerd forward ports. A pod does without where the kernel cannot do it.
    async fn open_gate(&self, pod: &Pod, own: &Own) -> Result<()> {
        let netns = namespace::open(Path::new(&pod.netns)).map_err(host("the pod's network"))?;
        let opened = tokio::task::spawn_blocking(move || Gate::open(netns.as_fd())).await;
        let gate = match opened.map_err(|error| Error::internal("worker", error))? {
            Ok(gate) => gate,
            Err(error) => {
                tracing::warn!(sandbox = pod.id, %error, "ports of this pod cannot be forwarded");
                return Ok(());
            }
        };
        tokio::try_join!(
            self.keep(&pod.id, "gate", &gate.listener),
            self.keep(&pod.id, "gate-link", &gate.link),
        )?;
        self.serve_gate(&pod.id, own, gate.listener);
        Ok(())
    }

    fn serve_gate(&self, id: &str, own: &Own, listener: OwnedFd) {
        let limit = self.config.get().max_forwards;
        let serve = forward::serve(listener, self.runsc.sentry(&own.id), own.id.clone(), limit);
        let task = tokio::spawn(serve).abort_handle();
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = gates.insert(id.to_owned(), task) {
            old.abort();
        }
    }

    fn close_gate(&self, id: &str) {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = gates.remove(id) {
            task.abort();
        }
    }

    /// Writes the root container's bundle, and the record by which its processes are found.
    fn write_bundle(dir: &Path, pod: &Pod, own: &Own, hostname: &str) -> Result<()> {
        let bundle = dir.join("root");
        let rootfs = bundle.join("rootfs");
        record::private_dir(&rootfs).map_err(host("make the root container's bundle"))?;
        let program = rootfs.join("pause");
        record::write_file(&program, &pause::program(), 0o755)
            .map_err(host("write the root container's program"))?;
        // Whatever the umask, the sandbox is to run it.
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))
            .map_err(|error| Error::internal("write the root container's program", error))?;
        let text = spec::root(pod, own, hostname).to_string();
        record::write_file(&bundle.join("config.json"), text.as_bytes(), 0o600)
            .map_err(host("write the root container's spec"))?;
        kernel::write_record(dir, ROOT, &own.cgroup)
    }
}

/// Ends commands of a pod that an earlier daemon has left at work: one that goes on would bring the
/// sandbox up again, or write a record of it, after it was removed.
fn end_all(runsc: &Runsc, dir: &Path) -> Result<()> {
    let ended = runsc.end_all(dir, END);
    if ended.map_err(host("end what runs of the pod"))? {
        return Ok(());
    }
    Err(Error::DeadlineExceeded(format!(
        "processes of the sandbox have not ended within {END:?}: they hang in the kernel"
    )))
}

fn own(value: &Value) -> Own {
    serde_json::from_value(value.clone()).unwrap_or_default()
}

fn check_platform(platform: &str) -> Result<()> {
    if platform != "kvm" {
        return Ok(());
    }
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::FailedPrecondition(format!(
            "platform kvm needs /dev/kvm, which cannot be opened ({error}): load the kvm module, \
             or choose platform systrap"
        ))),
    }
}

#[async_trait]
impl Flavor for Gvisor {
    fn name(&self) -> &'static str {
        "gvisor"
    }

    fn in_namespaces(&self) -> bool {
        false
    }

    fn pid(&self, value: &Value) -> u32 {
        own(value).sentry.map_or(0, |sentry| sentry.pid)
    }

    fn settings(&self) -> PodSettings {
        PodSettings { shm_size: self.config.get().shm_size, unprivileged_ports: false }
    }

    async fn choose(&self, sandbox: &SandboxSpec) -> Result<Choice> {
        let config = self.config.get();
        kernel::check("gVisor", &sandbox.config, &config.ignored_sysctls)?;
        let (runsc, version) = self.runsc.find().await.map_err(Error::FailedPrecondition)?;
        let modes = Modes::of(&sandbox.config, &sandbox.netns_path);
        let flags = config
            .flags(&sandbox.config.annotations, modes.host_network)
            .map_err(Error::InvalidArgument)?;
        check_platform(&flags.platform)?;
        let parent = &sandbox.config.linux.cgroup_parent;
        let cgroup = match config.runsc.systemd_cgroup {
            true => spec::systemd_cgroup(parent, &sandbox.id),
            false => kernel::cgroup(sandbox),
        };
        let own = Own {
            runsc,
            version,
            args: flags.args,
            network: flags.network,
            platform: flags.platform,
            own_names: true,
            restore: flags.restore,
            id: kernel::short_id(&sandbox.id),
            cgroup,
            sentry: None,
        };
        if self.runsc.socket(&own.id).exists() {
            return Err(Error::AlreadyExists(format!("gVisor has a sandbox {}", own.id)));
        }
        let own = serde_json::to_value(own)
            .map_err(|error| Error::internal("record the sandbox", error))?;
        Ok(Choice { engine: "runsc".into(), own })
    }

    fn runtime(&self, pod: Arc<Pod>, value: &Value) -> Result<Arc<dyn Runtime>> {
        let (runsc, cgroups) = (self.runsc.clone(), self.cgroups.clone());
        Ok(Arc::new(Containers::new(pod, own(value), runsc, cgroups)))
    }

    fn expect_containers(&self, _engine: &str) {
        let span = self.config.get().warm_cgroups;
        if !span.is_zero() {
            self.warmer.get_or_init(|| Warmer::new(&self.cgroups)).keep(span);
        }
    }

    async fn up(&self, ctx: &SandboxContext, pod: &Pod, value: &mut Value) -> Result<()> {
        let mut own = own(value);
        let hostname = files::hostname(&ctx.spec.config, pod.modes)?;
        Self::write_bundle(&ctx.dir, pod, &own, &hostname)?;
        let begun = Instant::now();
        let pid = self.runsc.start_sandbox(&own, &ctx.dir.join("root")).await?;
        Metrics("gvisor").phase("sandbox", begun.elapsed());
        let ended = || Error::internal("start the sandbox", "the sentry has ended at once");
        let sentry = Identity::of(pid).ok_or_else(ended)?;
        own.sentry = Some(sentry);
        *value = serde_json::to_value(&own)
            .map_err(|error| Error::internal("record the sandbox", error))?;
        if own.network == Network::Sandbox && !pod.modes.host_network {
            self.open_gate(pod, &own).await?;
        }
        watch_end(ctx, sentry.open().ok_or_else(ended)?);
        Ok(())
    }

    async fn down(&self, ctx: &SandboxContext, value: &Value) -> Result<()> {
        let own = own(value);
        self.close_gate(&ctx.spec.id);
        let sentry = own.sentry.and_then(Identity::open);
        let (runsc, dir) = (self.runsc.clone(), ctx.dir.clone());
        blocking(move || {
            if let Some(pidfd) = sentry {
                let _ = process::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
                if !process::pidfd_ended(pidfd.as_fd(), END).map_err(host("wait for the sentry"))? {
                    return Err(Error::DeadlineExceeded(format!(
                        "the sandbox has not ended within {END:?}: its sentry hangs in the kernel"
                    )));
                }
            }
            end_all(&runsc, &dir)?;
            if !own.id.is_empty() {
                runsc.forget(&own.id, None);
            }
            Ok(())
        })
        .await
    }

    async fn swept(&self, known: &[String]) {
        let runsc = self.runsc.clone();
        let known: Vec<String> = known.iter().map(|id| kernel::short_id(id)).collect();
        let _ = tokio::task::spawn_blocking(move || runsc.forget_lost(&known)).await;
    }

    async fn recovered(
        &self,
        ctx: &SandboxContext,
        pod: &Pod,
        value: &Value,
        whole: bool,
    ) -> Result<bool> {
        let own = own(value);
        let Some(pidfd) = own.sentry.filter(|_| whole).and_then(Identity::open) else {
            let (runsc, dir) = (self.runsc.clone(), ctx.dir.clone());
            blocking(move || end_all(&runsc, &dir)).await?;
            return Ok(false);
        };
        let gate = self.runsc.parent().fetch(&Self::kept(&pod.id, "gate")).await;
        let gate = gate.map_err(|error| Error::internal("fetch the pod's gate", error))?;
        if let Some(listener) = gate {
            self.serve_gate(&pod.id, &own, listener);
        }
        watch_end(ctx, pidfd);
        Ok(true)
    }

    async fn info(&self, _ctx: &SandboxContext, value: &Value) -> Map<String, Value> {
        let own = own(value);
        let mut info = Map::new();
        info.insert("runsc".into(), json!(own.runsc));
        info.insert("version".into(), json!(own.version));
        info.insert("sandbox".into(), json!(own.id));
        info.insert("sentryPid".into(), json!(own.sentry.map(|sentry| sentry.pid)));
        info.insert("network".into(), json!(own.network));
        info.insert("platform".into(), json!(own.platform));
        info.insert("restore".into(), json!(own.restore));
        info.insert("flags".into(), json!(own.args));
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_platform_is_told_with_what_helps() {
        assert!(check_platform("systrap").is_ok());
        if !Path::new("/dev/kvm").exists() {
            let error = check_platform("kvm").unwrap_err().to_string();
            assert!(error.contains("systrap"), "{error}");
        }
    }
}
