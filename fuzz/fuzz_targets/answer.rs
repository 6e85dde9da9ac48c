//! What a guest answers on its control connection: the frames of ttrpc and the messages in them.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use kuasar_forward::{Client, Connect, Limits, Result};
use kuasar_protos::shim::api;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A guest that answers whatever it is asked with these bytes.
#[derive(Debug)]
struct Guest(Vec<u8>);

#[async_trait::async_trait]
impl Connect for Guest {
    async fn connect(&self, _: Duration) -> Result<UnixStream> {
        let broken = |error: std::io::Error| kuasar_forward::GuestError::Broken(error.to_string());
        let (ours, mut theirs) = UnixStream::pair().map_err(broken)?;
        let bytes = self.0.clone();
        tokio::spawn(async move {
            let mut header = [0; 10];
            if theirs.read_exact(&mut header).await.is_ok() {
                let _ = theirs.write_all(&bytes).await;
            }
        });
        Ok(ours)
    }
}

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let limit = Duration::from_millis(50);
        let limits = Limits { connect: limit, call: limit };
        let (_end, gone) = tokio::sync::watch::channel(false);
        let client = Client::new(Arc::new(Guest(data.to_vec())), limits, gone);
        let question = api::PidsRequest { id: "c".into(), ..Default::default() };
        let _: Result<api::PidsResponse> =
            client.call("containerd.task.v3.Task", "Pids", &question).await;
    });
});
