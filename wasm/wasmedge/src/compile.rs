//! Compiles one module with the library's compiler, which works through files: those of a file
//! system that is this process's alone, empty, and gone with it.

use std::ffi::CStr;

use wasm_common::kind::{Detected, Kind, detect};

use crate::library::Library;
use crate::module;

/// Where the compiler finds the module; the process's root is its own.
const FROM: &CStr = c"/module.wasm";
/// Where it leaves the code.
const TO: &CStr = c"/code.wasm";

/// Code for a module; `counts` has it count what it does.
///
/// # Errors
/// What is wrong with the module.
pub fn compile(library: &Library, bytes: &[u8], counts: bool) -> Result<Vec<u8>, String> {
    match detect(bytes) {
        Detected::Wasm(Kind::Module) => {}
        Detected::Wasm(Kind::Component) => return Err(module::NO_COMPONENTS.into()),
        other => return Err(format!("not a module: {other:?}")),
    }
    let file = |path: &CStr| std::path::PathBuf::from(path.to_string_lossy().into_owned());
    std::fs::write(file(FROM), bytes).map_err(|error| format!("write the module: {error}"))?;
    library.compile(FROM, TO, counts).map_err(|failure| failure.message)?;
    std::fs::read(file(TO)).map_err(|error| format!("read the compiled code: {error}"))
}
