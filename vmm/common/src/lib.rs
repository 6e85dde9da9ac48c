//! What `vmm-sandboxer` and `vmm-task` say to each other.
//!
//! Three ports: the guest dials [`port::READY`] on the host once it serves the other two, and is
//! given its token; the host dials [`port::CONTROL`] for the one ttrpc connection (Task API,
//! Streaming, [`guest_ttrpc`]) and [`port::STREAM`] for the bytes of one process's stream each.
//! [`port::TASK`] is for engines that call the guest themselves, and only there when the host has
//! asked for it. [`handshake`] has the lines with which every other connection begins.

pub mod clock;
pub mod handshake;
pub mod mux;

/// Everything that the build script generated.
#[allow(
    missing_docs,
    unused,
    nonstandard_style,
    clippy::all,
    clippy::restriction,
    rust_2018_idioms,
    clippy::pedantic
)] // generated code
mod generated {
    include!(concat!(env!("OUT_DIR"), "/protos/mod.rs"));
    pub mod guest_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/protos/guest_ttrpc.rs"));
    }
}

/// `kuasar.vmm.v1`: messages of the guest API.
pub use generated::guest;
/// `kuasar.vmm.v1.Guest` as a ttrpc service and client.
pub use generated::guest_ttrpc;

/// vsock ports.
pub mod port {
    /// Host: the guest says that it serves.
    pub const READY: u32 = 1023;
    /// Guest: control connection.
    pub const CONTROL: u32 = 1024;
    /// Guest: raw streams.
    pub const STREAM: u32 = 1025;
    /// Guest: the Task API for an engine, without a greeting, where the host asks for that.
    pub const TASK: u32 = 1026;
}

/// Name of the virtio-serial port that carries the control connection where there is no vsock.
pub const SERIAL_PORT: &str = "org.kuasar.agent.0";
/// Tag of the pod's share.
pub const SHARE_TAG: &str = "kuasar";
/// Where the guest mounts it.
pub const SHARE_PATH: &str = "/run/kuasar/share";
/// Tag of the share of the containers' root file systems, where they have one of their own.
pub const ROOTS_TAG: &str = "kuasar-roots";
/// Where the guest mounts it.
pub const ROOTS_PATH: &str = "/run/kuasar/roots";
/// Where the guest has copies of the host's files, in a pod without a share.
pub const FILES_PATH: &str = "/run/kuasar/files";
/// With a debug session's id behind it: under which its program is put among these copies. No
/// container's id begins like that.
pub const DEBUG_FILES: &str = ".debug-";
/// Type URL of [`guest::Container`] in the options of a Task.Create.
pub const CONTAINER_TYPE: &str = "kuasar.vmm.v1.Container";
/// Most that may be written at once on vsock, in bytes: some devices hang on larger descriptors.
pub const CHUNK: usize = 16 * 1024;

/// Address of a process's stream in a Task.Create or Task.Exec that the host sends to the guest
/// (`exec` is empty for the first process). A connection that greets with the same words carries
/// its bytes: [`handshake::Purpose::Stream`].
pub fn stream_address(container: &str, exec: &str, kind: handshake::StreamKind) -> String {
    format!("vsock-stream://{container}/{exec}/{}", kind.word())
}
