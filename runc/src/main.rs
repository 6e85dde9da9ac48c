//! `runc-sandboxer`: sandboxes and containers of Linux namespaces.
//!
//! One program with three faces: the resident daemon, the built-in OCI engine ([`oci`], which
//! sandbox-parent runs for every container), and the operator's `shutdown-parent`.

mod config;
mod console;
mod engine;
mod metrics;
mod oci;
mod pod;
mod runtime;
mod selfexe;
mod spec;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what a daemon sets up.
    let mut arguments = std::env::args();
    if arguments.nth(1).as_deref() == Some("oci") {
        return oci::main(arguments.collect()).into();
    }
    ExitCode::SUCCESS
}
