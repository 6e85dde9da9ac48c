//! containerd's Task API v2 and v3 and its Streaming API over ttrpc, served once for every
//! sandboxer and, unchanged, inside a guest.
//!
//! A [`TaskServer`] belongs to one pod. Below it a [`runtime::Runtime`] makes processes; beside it
//! a [`journal::Journal`] remembers them, a [`runtime::Keeper`] keeps descriptors over a restart,
//! and an [`events::EventSender`] tells containerd.

pub mod declared;
pub mod error;
pub mod events;
pub mod frame;
pub mod host;
pub mod journal;
pub mod runtime;
mod server;
mod service;
pub mod stdio;
pub mod testing;

pub use server::{TaskOptions, TaskServer};
