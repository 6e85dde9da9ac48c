//! What the workers of all WebAssembly engines have in common.
//!
//! * [`zygote`] is the warm process that containers are forked from.
//! * [`confine`] is the process that compiles one module, and can do nothing else.
//! * [`container`] is what a container's process does before it belongs to the module, and how it
//!   ends.
//! * [`profile`] is the seccomp filter of all containers.

pub mod confine;
pub mod container;
pub mod memory;
pub mod profile;
pub mod zygote;
