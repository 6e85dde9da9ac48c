//! containerd's sandbox Controller, served once for every sandboxer.
//!
//! A daemon brings a [`Sandboxer`](sandboxer::Sandboxer), which makes and removes one kind of
//! sandbox, and a [`PodSockets`], which owns the pods' listening sockets
//! and outlives the daemon (sandbox-parent). This crate does everything between those and the
//! engine:
//!
//! | module | its one idea |
//! |---|---|
//! | [`controller`] | the nine RPCs, without a transport, and the table of sandboxes |
//! | `actor` | one task per sandbox; every change of state happens there, in order |
//! | [`store`] | one directory and one durable record per sandbox |
//! | `recovery` | what a new daemon does before it listens |
//! | [`endpoint`] | the pod's socket and its ttrpc server |
//! | `shim_mode` | the runtime Sandbox service for containerd without a proxy plugin |
//! | [`server`] | one unix socket, gRPC and ttrpc |
//!
//! What may not happen: an engine must never see a `Wait` answered because *we* end (it would
//! take the pod for dead), and never a sandbox that nobody will remove (containerd calls nothing
//! after a failed Create or Start). The first is why connections are cut rather than closed in
//! order; the second is why work goes on in the actor when the caller has left, and is rolled
//! back there.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # async fn f(
//! #     sandboxer: Arc<dyn containerd_sandbox::sandboxer::Sandboxer>,
//! #     sockets: Arc<dyn containerd_sandbox::endpoint::PodSockets>,
//! # ) -> containerd_sandbox::error::Result<()> {
//! use containerd_sandbox::{Controller, ControllerOptions};
//! let options = ControllerOptions { dir: "/run/kuasar-runc".into(), ..Default::default() };
//! let controller = Controller::new(options, sandboxer, sockets)?;
//! let endpoints = controller.endpoints(); // feed it: endpoints.connection(pod, stream)
//! let (_stop, stopped) = tokio::sync::watch::channel(false);
//! controller.serve(|| { /* tell systemd */ }, stopped).await
//! # }
//! ```

mod actor;
pub mod codec;
pub mod controller;
pub mod endpoint;
pub mod error;
mod grpc;
mod handle;
mod info;
mod open;
pub mod options;
mod pause;
mod recovery;
pub mod sandboxer;
pub mod server;
mod shim_mode;
pub mod store;
mod ttrpc_service;
mod wire;

pub use controller::{Call, Controller};
pub use endpoint::{Endpoints, PodSockets};
pub use handle::{HandleSink, SandboxHandle};
pub use options::{ControllerOptions, TaskProbe};
pub use wire::ttrpc_error;
