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
//! Built with the feature `wasi-nn` it is `wasm-worker-nn`: both take the name of ONNX Runtime's library
//! behind `zygote` and `version`, and compile nothing, since compiled code is the same.
//!
//! The zygote never touches an image's bytes, compiled or not: what it has in memory is in every
//! container.

mod code;
mod engine;
#[cfg(test)]
mod figures;
mod interface;
#[cfg(feature = "wasi-nn")]
mod nn;
mod random;
mod serve;
mod state;
mod threads;
mod wasip3;
mod workload;

use std::process::ExitCode;

use wasm_process::{confine, zygote};

/// What messages call this program.
const NAME: &str = if cfg!(feature = "wasi-nn") { "wasm-worker-nn" } else { "wasm-worker" };
const USAGE: &str = if cfg!(feature = "wasi-nn") {
    "usage: wasm-worker-nn zygote LIBRARY | version LIBRARY; wasm-sandboxer starts it, it is of no \
     use by hand"
} else {
    "usage: wasm-worker zygote | compile LIMITS VARIANT | version; wasm-sandboxer starts it, it is \
     of no use by hand"
};

/// Loads what this program is built to load; answers what `version` says of it.
#[cfg(not(feature = "wasi-nn"))]
fn load(words: &[&str]) -> Result<String, String> {
    if words.is_empty() { Ok(String::new()) } else { Err(USAGE.into()) }
}

#[cfg(feature = "wasi-nn")]
fn load(words: &[&str]) -> Result<String, String> {
    let [library] = words else { return Err(USAGE.into()) };
    nn::load(library).map(|version| format!(" with ONNX Runtime {version}"))
}

fn version(words: &[&str]) -> Result<(), String> {
    let with = load(words)?;
    let hello = engine::hello()?;
    println!("{} {} ({}){with}", hello.engine, hello.version, hello.settings);
    Ok(())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match *words.as_slice() {
        ["zygote", ref more @ ..] => zygote::run(NAME, || {
            load(more)?;
            engine::Warm::new()
        }),
        ["compile", limits, variant] => {
            confine::run(limits, confine::Needs::Memory, |module| engine::compile(module, variant))
        }
        ["version", ref more @ ..] => version(more),
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME}: {error}");
            ExitCode::FAILURE
        }
    }
}
