//! WASI-NN by ONNX Runtime, whose library is loaded at run time: in a program of its own, built with
//! the feature `wasi-nn` and linked dynamically, `wasm-worker-nn`.
//!
//! The library is loaded, and has run a graph of ours, before the zygote forks: what it reads of the
//! machine (`/proc`, `/sys`) is not there in a container, and the memory that it sets up is shared.
//! It computes on the thread that asks, so that it has no threads: a fork would lose them. Graphs of
//! an image are read, and run, in that image's container alone, under its filter and limits.

use std::ffi::CStr;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use ort::environment::GlobalThreadPoolOptions;
use ort::session::Session;
use wasmtime::Linker;
use wasmtime::component::Linker as ComponentLinker;
use wasmtime_wasi_nn::wit::WasiNnView;
use wasmtime_wasi_nn::{InMemoryRegistry, Registry, backend, wit, witx};

use crate::state::{Component, Module};

/// A graph that answers its input: `Identity`, of a `float[1]`. An ONNX `ModelProto` in the wire format
/// of protocol buffers: version 8 of the format, operators of version 13.
pub const IDENTITY: &[u8] = b"\x08\x08\x42\x04\x0a\x00\x10\x0d\x3a\x37\
    \x0a\x10\x0a\x01x\x12\x01y\x22\x08Identity\
    \x12\x01g\
    \x5a\x0f\x0a\x01x\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01\
    \x62\x0f\x0a\x01y\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01";

/// Loads the library that is named, and has it run a graph; answers its version.
///
/// # Errors
/// When it cannot be: the text says what to install.
pub fn load(library: &str) -> Result<String, String> {
    let version = version(library)?;
    let wrap = |error: ort::Error| format!("ONNX Runtime {version}: {error}");
    let environment = ort::init_from(library);
    let threads = GlobalThreadPoolOptions::default();
    let threads = threads.with_intra_threads(1).and_then(|all| all.with_inter_threads(1));
    let threads = threads.and_then(|all| all.with_spin_control(false)).map_err(wrap)?;
    let environment = environment.with_telemetry(false).with_global_thread_pool(threads);
    environment.commit().map_err(wrap)?;
    let session = Session::builder().and_then(|builder| builder.commit_from_memory(IDENTITY));
    drop(session.map_err(wrap)?);
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    match threads {
        Ok(1) => Ok(version),
        Ok(more) => {
            Err(format!("ONNX Runtime {version} has made {more} threads: it cannot be used"))
        }
        Err(error) => Err(format!("/proc/self/task: {error}")),
    }
}

/// The version of a library that is of use. It stays loaded.
fn version(name: &str) -> Result<String, String> {
    // SAFETY: what loading it runs are initialisers of the library that the operator has named.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|error| {
        // The loader's own words are its cause.
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        let reason = cause.unwrap_or_else(|| error.to_string());
        format!(
            "ONNX Runtime cannot be loaded ({reason}): install libonnxruntime1.23 or later (the \
             package's name in Debian), or set wasi_nn.library"
        )
    })?;
    // SAFETY: the signature is that of onnxruntime_c_api.h, in all of its versions.
    let base = unsafe {
        library.get::<unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase")
    };
    let base = base.map_err(|error| format!("{name} is no ONNX Runtime: {error}"))?;
    // SAFETY: no arguments; the structure is never freed, and no more is the text.
    let text = unsafe {
        let base = base();
        CStr::from_ptr(((*base).GetVersionString)()).to_string_lossy().into_owned()
    };
    let minor = text.split('.').nth(1).and_then(|minor| minor.parse::<u32>().ok());
    if minor.is_none_or(|minor| minor < ort::MINOR_VERSION) {
        return Err(format!(
            "ONNX Runtime {text:.40} is too old: 1.{} or later is wanted, such as Debian's \
             libonnxruntime1.23; or set wasi_nn.library",
            ort::MINOR_VERSION
        ));
    }
    // Its code is in use until the process ends.
    std::mem::forget(library);
    Ok(text)
}

/// Links `wasi_ephemeral_nn` for modules.
///
/// # Errors
/// The engine's.
pub fn link_modules(linker: &mut Linker<Module>) -> wasmtime::Result<()> {
    witx::add_to_linker(linker, |state: &mut Module| &mut state.nn)
}

/// Links `wasi:nn` for components.
///
/// # Errors
/// The engine's.
pub fn link_components(linker: &mut ComponentLinker<Component>) -> wasmtime::Result<()> {
    wit::add_to_linker(linker, |state: &mut Component| {
        WasiNnView::new(&mut state.table, &mut state.nn)
    })
}

/// What a module has of it; graphs come from the program alone, none has a name.
pub fn of_module() -> witx::WasiNnCtx {
    witx::WasiNnCtx::new(backend::list(), Registry::from(InMemoryRegistry::new()))
}

/// What a component has of it.
pub fn of_component() -> wit::WasiNnCtx {
    wit::WasiNnCtx::new(backend::list(), Registry::from(InMemoryRegistry::new()))
}
