//! `wasm-worker-wasmedge`: runs WebAssembly containers with WasmEdge.
//!
//! The same two faces as `wasm-worker`, and the same confinement ([`wasm_process`]): `zygote` and
//! `compile`. Other than that one it is linked dynamically, since libwasmedge is loaded at run time
//! ([`library`]): it has a C++ runtime and LLVM below it, and no version of it is ours to choose.
//!
//! The library and its plugins are loaded before anything of an image is near: in the zygote by its
//! one thread, in the compiler before it gives everything up. In containers nothing is loaded.

mod compile;
mod library;
mod module;
mod workload;

use std::process::ExitCode;

use library::{Library, hello_of};
use wasm_process::{confine, zygote};

/// What messages call this program.
const NAME: &str = "wasm-worker-wasmedge";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["zygote", library, plugins] => zygote::run(NAME, || workload::Warm::new(library, plugins)),
        ["compile", limits, "plain" | "epoch", library, _plugins] => {
            compile(limits, library, false)
        }
        ["compile", limits, _, library, _plugins] => compile(limits, library, true),
        ["version", library, _plugins] => Library::load(library).map(|library| {
            let hello = hello_of(&library);
            println!("{} {} ({})", hello.engine, hello.version, hello.settings);
        }),
        _ => Err("usage: wasm-worker-wasmedge zygote LIBRARY PLUGINS | compile LIMITS VARIANT \
                  LIBRARY PLUGINS | version LIBRARY PLUGINS; wasm-sandboxer starts it, it is of \
                  no use by hand"
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

fn compile(limits: &str, library: &str, counts: bool) -> Result<(), String> {
    let library = Library::load(library)?;
    confine::run(limits, confine::Needs::Scratch, |module| {
        compile::compile(&library, module, counts)
    })
}
