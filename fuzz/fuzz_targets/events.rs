//! What Cloud Hypervisor tells on its pipe of events, in pieces: the first byte is their length.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_sandboxer::vmm::cloud_hypervisor::monitor::Reader;

fuzz_target!(|data: &[u8]| {
    let Some((length, bytes)) = data.split_first() else { return };
    let mut reader = Reader::default();
    let most = bytes.len() / 2;
    let told: usize =
        bytes.chunks(usize::from(*length).max(1)).map(|piece| reader.read(piece).len()).sum();
    // Each ends with an empty line.
    assert!(told <= most, "{told} events in {} bytes", bytes.len());
});
