//! stdio over the control connection, for a channel that is one byte stream (see
//! [`crate::serial`]): containerd's Streaming service.
//!
//! A stream is named as on the stream port, `<container>/<exec>/<stdin|stdout|stderr|terminal>`,
//! in its StreamInit, and is acknowledged with an empty message. Data then goes as
//! `containerd.types.transfer.Data` within the credit that `WindowUpdate` grants, in both
//! directions: no stream can hold the others up. A closed request direction is the end of input;
//! the response is the end of output.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_task::TaskServer;
use containerd_task::error::{Error, Result};
use kuasar_protos::streaming::StreamInit;
use kuasar_protos::streaming_ttrpc::{Streaming, create_streaming};
use kuasar_protos::transfer::{Data, WindowUpdate};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use ttrpc::r#async::{ServerStream, TtrpcContext};
use vmm_common::CHUNK;

/// Credit for input, and bytes in between, per stream.
const WINDOW: usize = 64 << 10;

struct Service(Arc<TaskServer>);

/// As a ttrpc service.
pub fn services(tasks: Arc<TaskServer>) -> HashMap<String, ttrpc::r#async::Service> {
    create_streaming(Arc::new(Service(tasks)))
}

fn pack(name: &str, message: &impl Message) -> Result<Any> {
    let value =
        message.write_to_bytes().map_err(|error| Error::internal("encode a message", error))?;
    Ok(Any { type_url: name.into(), value, ..Any::default() })
}

fn grant(bytes: usize) -> Result<Any> {
    let update = i32::try_from(bytes).unwrap_or(i32::MAX);
    pack("containerd.types.transfer.WindowUpdate", &WindowUpdate { update, ..Default::default() })
}

enum Heard {
    Data(Vec<u8>),
    Credit(usize),
    Nothing,
}

fn hear(any: &Any) -> Heard {
    match any.type_url.rsplit('/').next() {
        Some("containerd.types.transfer.WindowUpdate") => {
            let update = WindowUpdate::parse_from_bytes(&any.value).map_or(0, |w| w.update);
            Heard::Credit(usize::try_from(update).unwrap_or(0))
        }
        Some("containerd.types.transfer.Data") => {
            Heard::Data(Data::parse_from_bytes(&any.value).map(|d| d.data).unwrap_or_default())
        }
        _ => Heard::Nothing,
    }
}

#[async_trait]
impl Streaming for Service {
    async fn stream(
        &self,
        _: &TtrpcContext,
        mut stream: ServerStream<Any, Any>,
    ) -> ttrpc::Result<()> {
        let first = stream.recv().await?.unwrap_or_default();
        let id = StreamInit::parse_from_bytes(&first.value)
            .map_err(|error| Error::InvalidArgument(format!("StreamInit: {error}")))?
            .id;
        let (ours, theirs) = duplex(WINDOW);
        // Before the process learns of it, so that an unknown name answers an error.
        self.0.streams().attach_raw(&id, Box::new(theirs))?;
        stream.send(&Any { type_url: "google.protobuf.Empty".into(), ..Any::default() }).await?;
        stream.send(&grant(WINDOW)?).await?;
        relay(stream, ours).await
    }
}

async fn relay(mut stream: ServerStream<Any, Any>, ours: DuplexStream) -> ttrpc::Result<()> {
    let (mut reader, mut writer) = split(ours);
    let (mut credit, mut listens) = (0usize, true);
    let mut buffer = vec![0; CHUNK];
    loop {
        let room = credit.min(CHUNK);
        tokio::select! {
            message = stream.recv(), if listens => match message? {
                None => {
                    listens = false;
                    // The process may have ended already.
                    let _ = writer.shutdown().await;
                }
                Some(any) => match hear(&any) {
                    Heard::Credit(more) => credit = credit.saturating_add(more),
                    Heard::Data(data) => {
                        // Within its credit it fits; more than that waits, and so does the host.
                        if writer.write_all(&data).await.is_ok() {
                            stream.send(&grant(data.len())?).await?;
                        }
                    }
                    Heard::Nothing => {}
                },
            },
            read = reader.read(buffer.get_mut(..room).unwrap_or_default()), if room > 0 => {
                let n = read.unwrap_or(0);
                if n == 0 {
                    return Ok(());
                }
                credit -= n;
                let data = buffer.get(..n).unwrap_or_default().to_vec();
                let data = Data { data, ..Data::default() };
                stream.send(&pack("containerd.types.transfer.Data", &data)?).await?;
            }
            // Whoever has closed grants no more either.
            else => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_messages_are_nothing() {
        let mut random = crate::testing::Random(2);
        for name in ["Data", "WindowUpdate"] {
            for _ in 0..500 {
                let any = Any {
                    type_url: format!("containerd.types.transfer.{name}"),
                    value: random.bytes(20),
                    ..Any::default()
                };
                match hear(&any) {
                    Heard::Credit(n) => assert!(n <= i32::MAX as usize),
                    Heard::Data(data) => assert!(data.len() <= 20),
                    Heard::Nothing => {}
                }
            }
        }
        let less = grant(0).map(|mut any| {
            any.value = WindowUpdate { update: -5, ..Default::default() }.write_to_bytes().unwrap();
            any
        });
        assert!(matches!(hear(&less.unwrap()), Heard::Credit(0)));
    }
}
