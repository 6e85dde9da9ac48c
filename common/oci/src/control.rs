//! What is done to running containers: signals, process lists, freezing, limits, statistics.
//!
//! For engines whose containers are processes of this host none of it needs the engine, and so
//! none of it runs a program: pidfds and the container's cgroup do it all. That is what the
//! methods of [`Control`] do by default. An engine whose containers are behind a kernel of their
//! own (gVisor) overrides those that the host's cgroup does not answer truly.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use containerd_task::host::{blocking, internal};
use containerd_task::runtime::{AnyMessage, ProcessRef, StatsFlavor};
use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_host::process;

use crate::engine::{Engine, Engines};

/// How long a cgroup may take to freeze, or to lose its killed processes.
pub(crate) const CGROUP_DEADLINE: Duration = Duration::from_secs(5);

/// A container.
pub struct Target<'a> {
    /// Its id.
    pub id: &'a str,
    /// Directory of its bundle and of the engine's state.
    pub dir: &'a Path,
    /// Pid of its init process.
    pub pid: u32,
    /// `linux.cgroupsPath` as its engine got it.
    pub cgroup: &'a str,
    pub(crate) engine: &'a str,
    pub(crate) engines: &'a std::sync::Arc<Engines>,
    pub(crate) layout: &'a Layout,
}

impl Target<'_> {
    /// Its cgroup on this host.
    ///
    /// # Errors
    /// When the recorded path is no cgroup's.
    pub fn cgroup(&self) -> Result<Cgroup> {
        let what = || format!("cgroup of container {}", self.id);
        self.layout.group(self.cgroup).map_err(internal(what()))
    }

    /// Its engine.
    ///
    /// # Errors
    /// When the engine is not configured or not installed any more.
    pub fn engine(&self) -> Result<Engine> {
        self.engines.get(self.engine).map_err(Error::FailedPrecondition)
    }
}

/// How running containers are handled. One method overridden is one thing done by the engine
/// instead of on the host.
#[async_trait]
pub trait Control: Send + Sync {
    /// Signals every process of the container.
    async fn kill_all(&self, target: &Target<'_>, signal: i32) -> Result<()> {
        let cgroup = target.cgroup()?;
        blocking(move || cgroup.signal_all(signal).map_err(internal("signal all processes"))).await
    }

    /// Signals one process of the container.
    async fn kill(&self, target: &Target<'_>, process: &ProcessRef, signal: i32) -> Result<()> {
        let id = target.id;
        let gone =
            || Error::NotFound(format!("process {} of container {id} has ended", process.pid));
        let pidfd = process::pidfd_open(process.pid).map_err(|_| gone())?;
        // The pid may be another process's by now: ours is in the container's cgroup.
        let membership =
            std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).map_err(|_| gone())?;
        let leaf = target.cgroup.rsplit(['/', ':']).next().unwrap_or_default();
        if !membership.contains(leaf) {
            return Err(gone());
        }
        match process::pidfd_signal(pidfd.as_fd(), signal) {
            Ok(()) => Ok(()),
            Err(error) if error.errno() == Some(libc::ESRCH) => Err(gone()),
            Err(error) if error.errno() == Some(libc::EINVAL) => {
                Err(Error::InvalidArgument(format!("unknown signal {signal}")))
            }
            Err(error) => Err(Error::internal("signal the process", error)),
        }
    }

    /// Pids of the container's processes, as the Task server knows pids. An empty list stands for
    /// the init process alone.
    async fn pids(&self, target: &Target<'_>) -> Result<Vec<u32>> {
        let group = target.layout.group(target.cgroup);
        Ok(group.and_then(|cgroup| cgroup.pids()).unwrap_or_default())
    }

    /// Freezes the container.
    async fn pause(&self, target: &Target<'_>) -> Result<()> {
        let cgroup = target.cgroup()?;
        blocking(move || cgroup.freeze(CGROUP_DEADLINE).map_err(internal("freeze"))).await
    }

    /// Lets it go on.
    async fn resume(&self, target: &Target<'_>) -> Result<()> {
        let cgroup = target.cgroup()?;
        blocking(move || cgroup.thaw().map_err(internal("thaw"))).await
    }

    /// Applies OCI `LinuxResources` (JSON).
    async fn update(&self, target: &Target<'_>, resources: &[u8]) -> Result<()> {
        let cgroup = target.cgroup()?;
        let resources = resources.to_vec();
        blocking(move || cgroup.update(&resources).map_err(internal("update resources"))).await
    }

    /// What the container uses.
    async fn stats(&self, target: &Target<'_>, flavor: StatsFlavor) -> Result<AnyMessage> {
        let cgroup = target.cgroup()?;
        blocking(move || {
            Ok(match flavor {
                StatsFlavor::Native => cgroup.metrics(),
                StatsFlavor::V1 => cgroup.metrics_v1(),
            })
        })
        .await
    }

    /// A descriptor that becomes readable when the container runs out of memory.
    async fn oom_watch(&self, target: &Target<'_>) -> Option<OwnedFd> {
        target.cgroup().ok()?.oom_watch()
    }

    /// How often the container has lost a process for want of memory.
    fn oom_kills(&self, target: &Target<'_>) -> u64 {
        target.cgroup().map(|cgroup| cgroup.oom_kills()).unwrap_or_default()
    }
}

/// Everything by pidfds and the host's cgroups.
#[derive(Debug, Clone, Copy)]
pub struct OnHost;

impl Control for OnHost {}
