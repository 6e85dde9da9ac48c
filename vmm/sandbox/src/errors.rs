//! What the Controller is told when a machine, its network or a pod's files fail: the gRPC code, and
//! the whole chain of causes.

use containerd_sandbox::error::Error;
pub(crate) use kuasar_host::chain;

use crate::{network, vmm};

pub(crate) fn machine(error: vmm::Error) -> Error {
    let text = error.chain();
    match error {
        vmm::Error::Unsupported { .. } => Error::Unimplemented(text),
        vmm::Error::Invalid(_) => Error::InvalidArgument(text),
        vmm::Error::NoProgram(_) | vmm::Error::Ended { .. } => Error::FailedPrecondition(text),
        vmm::Error::Exhausted(_) => Error::ResourceExhausted(text),
        vmm::Error::Deadline { .. } => Error::DeadlineExceeded(text),
        other => Error::internal("the machine", other),
    }
}

pub(crate) fn net(error: network::Error) -> Error {
    match error {
        network::Error::Unsupported(text) => Error::FailedPrecondition(text),
        network::Error::Host { context, source } => Error::internal(context, source),
    }
}

pub(crate) fn task(error: containerd_task::error::Error) -> Error {
    use containerd_task::error::Error as Task;
    match error {
        Task::InvalidArgument(text) => Error::InvalidArgument(text),
        Task::Unimplemented(text) => Error::Unimplemented(text),
        Task::FailedPrecondition(text) => Error::FailedPrecondition(text),
        Task::ResourceExhausted(text) => Error::ResourceExhausted(text),
        Task::DeadlineExceeded(text) => Error::DeadlineExceeded(text),
        other => Error::internal("the pod's files", other),
    }
}
