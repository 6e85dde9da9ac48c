//! Sandboxes that are microVMs.

pub mod jail;
pub mod vmm;
