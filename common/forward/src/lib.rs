//! Engines behind a Task socket.
//!
//! In some sandboxes the containers are made by somebody else's Task server: `vmm-task` in a
//! microVM, or Quark. The daemon's own Task server stays in front of it, because it is the one
//! that prepares root file systems and streams on the host, journals, publishes events and may be
//! started again. This crate is what both kinds share:
//!
//! | module | what |
//! |---|---|
//! | [`client`] | one connection for all calls: dialled when it is needed, and again after it broke; deadlines; the guest's end |
//! | [`task`] | the calls of the Task API as a [`containerd_task::runtime::Runtime`] makes them, answers checked |
//! | [`tree`] | root file systems and volumes, shown to who makes the containers |
//! | [`stdio`] | bytes between a guest's streams and the engine's, which outlive the daemon |
//! | [`error`] | why a guest did not do something |
//!
//! Whatever comes from a guest is hostile: frames are bounded by ttrpc (4 MiB), every call but
//! Wait has a deadline, texts are cut and cleaned before they get into an error or a log, and
//! answers are checked. A guest that answers nonsense harms its own pod.

pub mod client;
pub mod error;
pub mod stdio;
pub mod task;
pub mod tree;

pub use client::{Client, Connect, Limits, TracedCall};
pub use error::{GuestError, Result, clean};
