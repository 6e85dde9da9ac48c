//! `wasm-worker`: runs WebAssembly containers with Wasmtime.
//!
//! One program with two faces, both started by sandbox-parent for `wasm-sandboxer`:
//!
//! * `wasm-worker zygote` ([`zygote`]) is warm: the engine is set up and everything that WASI
//!   offers is linked. It has one thread, and forks a process for each container that it is asked
//!   for. The process makes the container as the built-in OCI engine does, then runs the compiled
//!   module in it ([`workload`], [`serve`]) without executing anything.
//! * `wasm-worker compile` ([`compile`]) compiles one module, which is hostile, after it has given
//!   up everything but two descriptors.
//!
//! The zygote never touches an image's bytes, compiled or not: what it has in memory is in every
//! container.

mod code;
mod compile;
mod engine;
mod random;
mod serve;
mod state;
mod workload;
mod zygote;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let result = match (words.next().as_deref(), words.next()) {
        (Some("zygote"), None) => zygote::run(),
        (Some("compile"), Some(limits)) => compile::run(&limits),
        (Some("version"), None) => engine::hello().map(|hello| {
            println!("{} {} ({})", hello.engine, hello.version, hello.settings);
        }),
        _ => Err("usage: wasm-worker zygote | compile LIMITS | version; \
                  wasm-sandboxer starts it, it is of no use by hand"
            .into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wasm-worker: {error}");
            ExitCode::FAILURE
        }
    }
}
