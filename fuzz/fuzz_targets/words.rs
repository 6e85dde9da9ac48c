//! Texts of a guest on their way into errors and log lines.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let clean = kuasar_forward::clean(&text);
    assert!(!clean.chars().any(char::is_control), "{clean:?}");
});
