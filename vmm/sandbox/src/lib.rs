//! Sandboxes that are microVMs.

pub mod guest;
pub mod network;
pub mod share;
pub mod spec;
pub mod stdio;
