//! Sandboxes that are microVMs.

mod adopt;
mod announced;
pub mod block;
mod boot;
pub mod config;
pub mod copy;
pub mod daemon;
mod drivers;
mod errors;
pub mod forward;
mod growth;
pub mod guest;
pub mod jail;
mod making;
pub mod network;
mod nics;
mod pool;
mod prepare;
pub mod runtime;
pub mod sandboxer;
pub mod share;
pub mod spec;
pub mod template;
mod trace;
pub mod vmm;
mod watch;
