//! Sandboxes that are microVMs.

pub mod config;
pub mod daemon;
pub mod forward;
pub mod guest;
pub mod jail;
pub mod network;
pub mod runtime;
pub mod sandboxer;
pub mod share;
pub mod spec;
pub mod vmm;
