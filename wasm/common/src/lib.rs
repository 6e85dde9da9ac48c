//! What the sandboxer and the workers of WebAssembly pods share.
//!
//! * [`job::Job`] is what a worker is told of one container.
//! * [`wire`] is how the sandboxer asks a warm worker for a process.
//! * [`kind`] tells a module from a component, and both from anything else.

pub mod job;
pub mod kind;
pub mod wire;
