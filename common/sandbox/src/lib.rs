//! containerd's sandbox Controller, served once for every sandboxer.

pub mod error;
pub mod sandboxer;
