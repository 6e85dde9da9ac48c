//! gRPC's message codec over the same rust-protobuf types that ttrpc uses.

use std::marker::PhantomData;

use bytes::{Buf, BufMut};
use protobuf::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Encodes `E`, decodes `D`.
#[derive(Debug)]
pub struct MessageCodec<E, D>(PhantomData<fn() -> (E, D)>);

impl<E, D> Default for MessageCodec<E, D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// Either half of a [`MessageCodec`].
#[derive(Debug)]
pub struct Half<M>(PhantomData<fn() -> M>);

impl<E: Message, D: Message> Codec for MessageCodec<E, D> {
    type Encode = E;
    type Decode = D;
    type Encoder = Half<E>;
    type Decoder = Half<D>;

    fn encoder(&mut self) -> Half<E> {
        Half(PhantomData)
    }

    fn decoder(&mut self) -> Half<D> {
        Half(PhantomData)
    }
}

/// Tonic's default of 8 KiB per request would be most of the memory of an open Wait.
fn settings() -> BufferSettings {
    BufferSettings::new(512, 32 << 10)
}

impl<M: Message> Encoder for Half<M> {
    type Item = M;
    type Error = Status;

    fn encode(&mut self, item: M, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let bytes = item
            .write_to_bytes()
            .map_err(|e| Status::internal(format!("cannot serialise the answer: {e}")))?;
        dst.reserve(bytes.len());
        dst.put_slice(&bytes);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}

impl<M: Message> Decoder for Half<M> {
    type Item = M;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<M>, Status> {
        let bytes = src.copy_to_bytes(src.remaining());
        M::parse_from_bytes(&bytes)
            .map(Some)
            .map_err(|e| Status::invalid_argument(format!("the request is no {}: {e}", M::NAME)))
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}
