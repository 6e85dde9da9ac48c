//! What a file is, by its first bytes: never a panic, and a header decides alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wasm_common::kind::{HEADER, detect};

fuzz_target!(|data: &[u8]| {
    let what = detect(data);
    if data.len() >= HEADER {
        assert_eq!(what, detect(&data[..HEADER]));
    }
});
