//! Sandboxes that are microVMs.

pub mod network;
