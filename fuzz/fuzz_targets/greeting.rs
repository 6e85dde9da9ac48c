//! The lines with which connections between host and guest begin, in both directions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_common::handshake::{self, Ready, Welcome};

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let mut from = data;
        let _ = handshake::read_json::<Ready>(&mut from).await;
        let mut from = data;
        let _ = handshake::read_json::<Welcome>(&mut from).await;
        let mut from = data;
        if let Ok(line) = handshake::read_line(&mut from).await {
            let _ = handshake::parse_hello(&line);
        }
    });
});
