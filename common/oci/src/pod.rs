//! A pod as the daemon holds it: its namespaces by descriptor, and where its files are.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use kuasar_protos::cri::{NamespaceMode, PodSandboxConfig};

use crate::spec::{Namespace, PodSpec};

/// Namespace choices of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Modes {
    /// Host network, and with it the host's UTS namespace.
    pub host_network: bool,
    /// Host IPC.
    pub host_ipc: bool,
    /// Host PID namespace.
    pub host_pid: bool,
    /// One PID namespace for all containers.
    pub shared_pid: bool,
}

impl Modes {
    /// From the pod's configuration. An engine that sends no CRI configuration (and so no
    /// namespace options) gets one PID namespace per container.
    pub fn of(config: &PodSandboxConfig, netns_path: &str) -> Self {
        let context = &config.linux.security_context;
        let Some(options) = context.namespace_options.as_ref() else {
            return Self {
                host_network: netns_path.is_empty(),
                host_ipc: false,
                host_pid: false,
                shared_pid: false,
            };
        };
        let node = NamespaceMode::NODE;
        Self {
            host_network: netns_path.is_empty(),
            host_ipc: options.ipc.enum_value_or_default() == node,
            host_pid: options.pid.enum_value_or_default() == node,
            shared_pid: options.pid.enum_value_or_default() == NamespaceMode::POD,
        }
    }
}

/// The descriptors of a pod's namespaces.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// IPC.
    pub ipc: Option<OwnedFd>,
    /// UTS.
    pub uts: Option<OwnedFd>,
    /// The user namespace that owns the network namespace, when it is not the host's.
    pub user: Option<OwnedFd>,
    /// The shared PID namespace.
    pub pid: Option<OwnedFd>,
    /// Pid of its init, 0 without.
    pub init: u32,
}

/// A started pod.
#[derive(Debug)]
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// Private directory of the sandbox.
    pub dir: PathBuf,
    /// Network namespace path; empty for the host's.
    pub netns: String,
    /// Namespace choices.
    pub modes: Modes,
    /// Engine by name.
    pub engine: String,
    /// Namespaces.
    pub namespaces: Namespaces,
}

fn held(host: bool, fd: Option<&OwnedFd>, otherwise: Namespace) -> Namespace {
    match (host, fd) {
        (true, _) => Namespace::Host,
        (false, Some(fd)) => Namespace::Held(fd.as_raw_fd()),
        (false, None) => otherwise,
    }
}

impl Pod {
    /// Directory of a container's own bundle and engine state.
    pub fn container(&self, id: &str) -> PathBuf {
        self.dir.join("containers").join(id)
    }

    /// What `/dev/shm` of the containers is.
    pub fn shm(&self) -> PathBuf {
        shm(&self.dir, self.modes)
    }

    /// What the pod contributes to its containers' specs.
    pub fn spec<'a>(&self, files: &'a Path, shm: &'a Path) -> PodSpec<'a> {
        let modes = self.modes;
        let ns = &self.namespaces;
        PodSpec {
            network: if modes.host_network {
                Namespace::Host
            } else {
                Namespace::Path(self.netns.clone())
            },
            ipc: held(modes.host_ipc, ns.ipc.as_ref(), Namespace::New),
            uts: held(modes.host_network, ns.uts.as_ref(), Namespace::New),
            pid: held(modes.host_pid, ns.pid.as_ref(), Namespace::New),
            user: held(ns.user.is_none(), ns.user.as_ref(), Namespace::Host),
            sandbox_pid: ns.init,
            files,
            shm,
        }
    }
}

/// Where a pod's `/dev/shm` is on the host.
pub fn shm(dir: &Path, modes: Modes) -> PathBuf {
    if modes.host_ipc { PathBuf::from("/dev/shm") } else { dir.join("shm") }
}
