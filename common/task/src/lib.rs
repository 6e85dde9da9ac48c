//! containerd's Task API v2 and v3 and its Streaming API over ttrpc, served once for every
//! sandboxer and, unchanged, inside a guest.

pub mod error;
pub mod runtime;
