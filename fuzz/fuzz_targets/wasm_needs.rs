//! What a module asks for, read by WasmEdge's worker before its library sees it: never a panic.
#![no_main]

#[path = "../../wasm/wasmedge/src/module.rs"]
#[allow(dead_code)]
mod module;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(needs) = module::needs(data) {
        assert!(needs.functions.len() <= data.len());
    }
});
