//! What QEMU and StratoVirt say on their monitor: greeting, answers and events. The first byte says
//! whose dialect it is.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use vmm_sandboxer::vmm::Kind;
use vmm_sandboxer::vmm::qmp::Qmp;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
        let Some((first, bytes)) = data.split_first() else { return };
        let kind = if first % 2 == 0 { Kind::Qemu } else { Kind::StratoVirt };
        let bytes = bytes.to_vec();
        tokio::spawn(async move {
            let _ = theirs.write_all(&bytes).await;
        });
        if let Ok(qmp) = Qmp::new(kind, ours, Duration::from_millis(50)).await {
            let _ = qmp.call("query-status", serde_json::json!({}), None).await;
        }
    });
});
