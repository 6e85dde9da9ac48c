//! Which interfaces of WASI 0.3 a component has: never a panic, and what is refused says which.
#![no_main]

#[path = "../../wasm/worker/src/interface.rs"]
mod interface;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Err(words) = interface::refuse(data) {
        assert!(words.contains("wasi:"), "{words}");
    }
});
