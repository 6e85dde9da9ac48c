//! Wire messages and ttrpc services that `containerd-shim-protos` does not carry.
//!
//! One set of message types serves both transports: the ttrpc services generated here, and gRPC
//! through the codec of `containerd-sandbox`. The Task, events, cgroup-metrics and
//! `runtime.sandbox.v1` messages come from [`containerd_shim_protos`], re-exported as [`shim`].

pub use containerd_shim_protos as shim;

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
    pub mod controller_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/protos/controller_ttrpc.rs"));
    }
    pub mod admin_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/protos/admin_ttrpc.rs"));
    }
    pub mod endpoint_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/protos/endpoint_ttrpc.rs"));
    }
    pub mod streaming_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/protos/streaming_ttrpc.rs"));
    }
}

/// `kuasar.admin.v1`: what an operator's tool asks a daemon.
pub use generated::admin;
/// `kuasar.admin.v1.Admin` as a ttrpc service and client.
pub use generated::admin_ttrpc;
/// `containerd.services.content.v1`: blobs by digest.
pub use generated::content;
/// `containerd.services.sandbox.v1`: the messages of the sandbox Controller.
pub use generated::controller;
/// `containerd.services.sandbox.v1.Controller` as a ttrpc service and client.
pub use generated::controller_ttrpc;
/// `runtime.v1`: the pod configuration of Kubernetes' CRI.
pub use generated::cri;
/// `kuasar.sandbox.v1`: how a shim binary asks a daemon for a pod's socket.
pub use generated::endpoint;
/// `kuasar.sandbox.v1.Endpoint` as a ttrpc service and client.
pub use generated::endpoint_ttrpc;
/// `containerd.services.images.v1`: images by name.
pub use generated::images;
/// `kuasar.otlp`: what OpenTelemetry collectors take of traces.
pub use generated::otlp;
/// `containerd.runc.v1`: options of Create and Checkpoint.
pub use generated::runc_options;
/// `containerd.services.streaming.v1`: the first message of a stdio stream.
pub use generated::streaming;
/// `containerd.services.streaming.v1.Streaming` as a ttrpc service and client.
pub use generated::streaming_ttrpc;
/// `containerd.types.transfer`: data and credit on a stdio stream.
pub use generated::transfer;
/// `containerd.types`.
pub use generated::types;
