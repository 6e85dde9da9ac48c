//! What Cloud Hypervisor and Firecracker answer on their API socket.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use vmm_sandboxer::vmm::Kind;
use vmm_sandboxer::vmm::http::Http;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (Ok(runtime), Ok(dir)) = (runtime, tempfile::tempdir()) else { return };
    runtime.block_on(async {
        let socket = dir.path().join("api");
        let Ok(listener) = UnixListener::bind(&socket) else { return };
        let bytes = data.to_vec();
        tokio::spawn(async move {
            while let Ok((mut theirs, _)) = listener.accept().await {
                let mut question = [0; 4096];
                let _ = theirs.read(&mut question).await;
                let _ = theirs.write_all(&bytes).await;
            }
        });
        let limit = Duration::from_millis(50);
        let http = Http::new(Kind::CloudHypervisor, socket, "/api/v1", limit);
        let _ = http.get::<serde_json::Value>("/vm.info").await;
        let _ = http.order("/vm.pause").await;
    });
});
