//! Pods of Linux namespaces: what the sandboxers share whose containers need no virtual machine.
//!
//! [`sandboxer::NamespaceSandboxer`] is the whole Sandboxer of such a pod: its files, `/dev/shm`,
//! cgroup and namespaces, its Task server, stop, removal and recovery. A [`flavor::Flavor`] says
//! what runs in the pod: it checks and chooses at Create, makes the
//! [`Runtime`](containerd_task::runtime::Runtime) of the containers, and may have processes of
//! its own per pod.

pub mod files;
pub mod flavor;
pub mod kernel;
pub mod observer;
pub mod sandboxer;
mod spaces;
pub mod state;

pub use flavor::{Choice, Flavor, PodSettings};
pub use observer::Metrics;
pub use sandboxer::NamespaceSandboxer;
pub use state::PodState;
