//! `wasm-worker`: runs WebAssembly containers with Wasmtime.
//!
//! One program with two faces, both started by sandbox-parent for `wasm-sandboxer`:
//!
//! * `wasm-worker zygote` ([`wasm_process::zygote`]) is warm: the engine is set up and everything that WASI
//!   offers is linked. It has one thread, and forks a process for each container that it is asked
//!   for. The process makes the container as the built-in OCI engine does, then runs the compiled
//!   module in it ([`workload`], [`serve`]) without executing anything.
//! * `wasm-worker compile` ([`wasm_process::confine`]) compiles one module, which is hostile, after it
//!   has given up everything but two descriptors.
//!
//! The zygote never touches an image's bytes, compiled or not: what it has in memory is in every
//! container.

mod code;
mod engine;
#[cfg(test)]
mod figures;
mod random;
mod serve;
mod state;
mod threads;
mod wasip3;
mod workload;

use std::process::ExitCode;

use wasm_process::{confine, zygote};

/// What messages call this program.
const NAME: &str = "wasm-worker";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let result = match (words.next().as_deref(), words.next(), words.next()) {
        (Some("zygote"), None, None) => zygote::run(NAME, engine::Warm::new),
        (Some("compile"), Some(limits), Some(variant)) => {
            confine::run(&limits, confine::Needs::Memory, |module| {
                engine::compile(module, &variant)
            })
        }
        (Some("version"), None, None) => engine::hello().map(|hello| {
            println!("{} {} ({})", hello.engine, hello.version, hello.settings);
        }),
        _ => Err("usage: wasm-worker zygote | compile LIMITS VARIANT | version; \
                  wasm-sandboxer starts it, it is of no use by hand"
            .into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME}: {error}");
            ExitCode::FAILURE
        }
    }
}
