//! The namespaces of pods: made and kept by sandbox-parent, held by the daemon.
//!
//! They are made while the rest of the pod's Create is under way, and are held here until Start.
//! What sandbox-parent keeps under `<id>/ns/…` outlives the daemon: a Start after its restart, and
//! the pod's recovery, fetch it from there.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use containerd_sandbox::error::{Error, Result};
use kuasar_host::{namespace, process};
use kuasar_oci::pod::{Modes, Namespaces};
use sandbox_parent::client::{Parent, ParentError, PodNamespaces};
use sandbox_parent::protocol::stage;

use crate::files::host;

/// What is asked of a pod's namespaces.
pub(crate) struct Wanted<'a> {
    pub id: &'a str,
    pub modes: Modes,
    pub netns: Option<&'a OwnedFd>,
    pub names: &'a Names,
}

/// What is set in new namespaces.
pub(crate) struct Names {
    pub hostname: String,
    pub sysctls: Vec<(String, String)>,
}

/// A pod's namespaces, and the init of a shared PID namespace.
#[derive(Default)]
pub(crate) struct Held {
    pub namespaces: Namespaces,
    pub init: Option<OwnedFd>,
}

impl Held {
    /// Whether all is there that pods of such modes have, and the init, if any, lives.
    pub fn is_whole(&self, modes: Modes) -> bool {
        let has = |fd: &Option<OwnedFd>| fd.is_some();
        let ns = &self.namespaces;
        let lives = |pidfd: &OwnedFd| process::pidfd_signal(pidfd.as_fd(), 0).is_ok();
        (modes.host_ipc || has(&ns.ipc))
            && (modes.host_network || has(&ns.uts))
            && (!modes.shared_pid || has(&ns.pid) && self.init.as_ref().is_some_and(lives))
    }
}

/// The namespaces of all pods.
pub(crate) struct Spaces {
    parent: Parent,
    /// Made, and not yet taken by Start.
    made: Mutex<HashMap<String, Held>>,
}

impl Spaces {
    pub fn new(parent: Parent) -> Self {
        Self { parent, made: Mutex::default() }
    }

    fn made(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the namespaces of a pod and has them kept. Answers pid and start time of the init of
    /// a shared PID namespace.
    ///
    /// # Errors
    /// FailedPrecondition for a network namespace that cannot be entered, InvalidArgument for a
    /// sysctl that is refused. Whatever was made is released with the pod.
    pub async fn make(&self, wanted: &Wanted<'_>) -> Result<Option<(u32, u64)>> {
        let Wanted { id, modes, netns, names: Names { hostname, sysctls } } = *wanted;
        let request = PodNamespaces {
            id,
            ipc: !modes.host_ipc,
            uts: (!modes.host_network).then_some(hostname.as_str()),
            pid: modes.shared_pid,
            netns: netns.map(AsFd::as_fd),
            sysctls: sysctls.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect(),
        };
        let made =
            self.parent.pod_namespaces(&request).await.map_err(|error| explain(error, sysctls))?;
        let (pid, init) = match made.init {
            Some((pid, pidfd)) => (pid, Some(pidfd)),
            None => (0, None),
        };
        if !made.kept {
            // First of all: by it the process is found again.
            self.keep(id, "init", init.as_ref()).await?;
        }
        let pid_namespace = match pid {
            0 => None,
            pid => Some(
                namespace::open(Path::new(&format!("/proc/{pid}/ns/pid")))
                    .map_err(host("open the pod's PID namespace"))?,
            ),
        };
        let namespaces = Namespaces {
            ipc: made.ipc,
            uts: made.uts,
            user: made.user,
            pid: pid_namespace,
            init: pid,
        };
        if !made.kept {
            tokio::try_join!(
                self.keep(id, "ipc", namespaces.ipc.as_ref()),
                self.keep(id, "uts", namespaces.uts.as_ref()),
                self.keep(id, "user", namespaces.user.as_ref()),
                self.keep(id, "pid", namespaces.pid.as_ref()),
            )?;
        }
        self.made().insert(id.to_owned(), Held { namespaces, init });
        Ok((pid != 0).then(|| (pid, process::start_time(pid).unwrap_or_default())))
    }

    /// What [`Spaces::make`] has made in this daemon and nobody has taken yet.
    pub fn take(&self, id: &str) -> Option<Held> {
        self.made().remove(id)
    }

    /// What sandbox-parent keeps of a pod; `init` is the recorded pid.
    pub async fn kept(&self, id: &str, init: u32) -> Result<Held> {
        let (ipc, uts, user, pid, pidfd) = tokio::try_join!(
            self.fetch(id, "ipc"),
            self.fetch(id, "uts"),
            self.fetch(id, "user"),
            self.fetch(id, "pid"),
            self.fetch(id, "init"),
        )?;
        Ok(Held { namespaces: Namespaces { ipc, uts, user, pid, init }, init: pidfd })
    }

    /// Kills the init of a pod's shared PID namespace, if one is kept: it takes every process in
    /// it along.
    pub async fn kill_init(&self, id: &str) {
        if let Ok(Some(pidfd)) = self.fetch(id, "init").await {
            let _ = process::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        }
    }

    /// Releases a pod's namespaces.
    pub async fn release(&self, id: &str) -> Result<()> {
        drop(self.take(id));
        self.parent
            .forget(&format!("{id}/ns/"))
            .await
            .map_err(|error| Error::internal("release the pod's namespaces", error))
    }

    async fn keep(&self, id: &str, name: &str, fd: Option<&OwnedFd>) -> Result<()> {
        let Some(fd) = fd else { return Ok(()) };
        self.parent
            .keep(&format!("{id}/ns/{name}"), fd.as_fd())
            .await
            .map_err(|error| Error::internal(format!("keep the pod's {name} namespace"), error))
    }

    async fn fetch(&self, id: &str, name: &str) -> Result<Option<OwnedFd>> {
        self.parent
            .fetch(&format!("{id}/ns/{name}"))
            .await
            .map_err(|error| Error::internal(format!("fetch the pod's {name} namespace"), error))
    }
}

/// A failed request in words that name what to change.
fn explain(error: ParentError, sysctls: &[(String, String)]) -> Error {
    match error.failure() {
        Some((errno, step)) if step >= stage::SYSCTL => {
            let reason = std::io::Error::from_raw_os_error(errno);
            match sysctls.get(usize::from(step - stage::SYSCTL)) {
                Some((name, value)) => Error::InvalidArgument(format!(
                    "sysctl {name} = {value:?} cannot be set: {reason}"
                )),
                None => Error::internal("set a sysctl", reason),
            }
        }
        Some((errno, stage::NETNS | stage::USERNS)) => Error::FailedPrecondition(format!(
            "the pod's network namespace cannot be entered: {}",
            std::io::Error::from_raw_os_error(errno)
        )),
        _ => Error::internal("make the pod's namespaces", error),
    }
}
