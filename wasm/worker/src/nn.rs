//! WASI-NN by ONNX Runtime, whose library is loaded at run time: in a program of its own, built with
//! the feature `wasi-nn` and linked dynamically, `wasm-worker-nn`.
//!
//! The library is loaded, and has run a graph of ours, before the zygote forks: what it reads of the
//! machine (`/proc`, `/sys`) is not there in a container, and the memory that it sets up is shared.
//! It computes on the thread that asks, so that it has no threads: a fork would lose them. Graphs of
//! an image are read, and run, in that image's container alone, under its filter and limits.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use ort::environment::GlobalThreadPoolOptions;
use ort::session::Session;
use ort::value::Tensor;
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
    let (version, file) = find(library)?;
    quietly(|| warm(&file))?.map_err(|error| format!("ONNX Runtime {version}: {error}"))?;
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    match threads {
        Ok(1) => Ok(version),
        Ok(more) => {
            Err(format!("ONNX Runtime {version} has made {more} threads: it cannot be used"))
        }
        Err(error) => Err(format!("/proc/self/task: {error}")),
    }
}

/// Makes what all graphs have in common, and runs one.
fn warm(file: &str) -> Result<(), ort::Error> {
    // First of all: what comes behind it looks for the library, by a name of its own if it has none.
    let environment = ort::init_from(file);
    let threads = GlobalThreadPoolOptions::default().with_intra_threads(1)?;
    let threads = threads.with_inter_threads(1)?.with_spin_control(false)?;
    environment.with_telemetry(false).with_global_thread_pool(threads).commit()?;
    let mut session = Session::builder()?.commit_from_memory(IDENTITY)?;
    let input = Tensor::from_array(([1], vec![1.0_f32]))?;
    session.run(ort::inputs![input])?;
    Ok(())
}

/// Without standard error meanwhile: Debian's library says of each operator, hundreds of lines, that it
/// is there already.
fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let wrap = |error: std::io::Error| format!("standard error: {error}");
    let ours = std::io::stderr().as_fd().try_clone_to_owned().map_err(wrap)?;
    let null = std::fs::File::options().write(true).open("/dev/null").map_err(wrap)?;
    let put = |fd: BorrowedFd<'_>| {
        // SAFETY: both are open descriptors; standard error is nobody's to own.
        let done = unsafe { libc::dup2(fd.as_raw_fd(), libc::STDERR_FILENO) };
        if done < 0 { Err(wrap(std::io::Error::last_os_error())) } else { Ok(()) }
    };
    put(null.as_fd())?;
    // What has gone wrong is not said by then: it is the answer.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    put(ours.as_fd())?;
    result.map_err(|why| match why.downcast::<String>() {
        Ok(text) => format!("ONNX Runtime: {text}"),
        Err(_) => "ONNX Runtime cannot be used".into(),
    })
}

/// The version of a library that is of use, and the file that it is. It stays loaded.
fn find(name: &str) -> Result<(String, String), String> {
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
    let base = *base.map_err(|error| format!("{name} is no ONNX Runtime: {error}"))?;
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
    // By its path: what has none is looked for beside our program first, which is executed by a
    // descriptor and has no directory.
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: an address, and room for the answer.
    let found = unsafe { libc::dladdr(base as *const libc::c_void, info.as_mut_ptr()) };
    // SAFETY: all zeroes are a valid value of it.
    let info = unsafe { info.assume_init() };
    if found == 0 || info.dli_fname.is_null() {
        return Err(format!("{name}: it is not known which file that is"));
    }
    // SAFETY: the loader's own text, there as long as the library is.
    let file = unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned();
    // Its code is in use until the process ends.
    let _: *mut libc::c_void = library.into_raw();
    Ok((text, file))
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
