//! What stands behind a vsock of unix sockets answers to `CONNECT`.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use vmm_sandboxer::vmm::vsock;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (Ok(runtime), Ok(dir)) = (runtime, tempfile::tempdir()) else { return };
    runtime.block_on(async {
        let uds = dir.path().join("vsock");
        let Ok(listener) = UnixListener::bind(&uds) else { return };
        let bytes = data.to_vec();
        tokio::spawn(async move {
            while let Ok((mut theirs, _)) = listener.accept().await {
                let _ = theirs.write_all(&bytes).await;
            }
        });
        let _ = vsock::dial(&uds, 1024, Duration::from_millis(20)).await;
    });
});
