//! ttrpc frames, as far as the Streaming service needs them.
//!
//! Streams are not served through the ttrpc crate: its server cannot end a stream with a bare
//! close frame, wait for the client's, and then hang up, which is what containerd needs (a
//! Response instead surfaces there as an unmarshal error). So a connection whose first request is
//! `Streaming/Stream` is taken over here, and all others go to the crate.
//!
//! A frame is `length: u32 BE, stream: u32 BE, type: u8, flags: u8` and the body.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

/// Bytes of a frame's header.
pub const HEADER: usize = 10;
/// ttrpc's limit for a body.
pub const MAX_BODY: usize = 4 << 20;
/// Frame type of a request.
pub const REQUEST: u8 = 1;
/// Frame type of stream data.
pub const DATA: u8 = 3;
/// Flag: the sender sends no more.
pub const REMOTE_CLOSED: u8 = 1;
/// Flag: the frame has no body that means anything.
pub const NO_DATA: u8 = 4;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Stream number.
    pub stream: u32,
    /// Type.
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Body.
    pub body: Vec<u8>,
}

impl Frame {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.body.len());
        out.extend_from_slice(&(self.body.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.stream.to_be_bytes());
        out.extend_from_slice(&[self.kind, self.flags]);
        out.extend_from_slice(&self.body);
        out
    }
}

/// Collects bytes until a frame is whole.
#[derive(Debug, Default)]
pub struct Decoder(Vec<u8>);

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Bytes that are no whole frame yet.
    pub fn rest(&self) -> &[u8] {
        &self.0
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// `InvalidData` when the length is over ttrpc's limit.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        let Some((head, tail)) = self.0.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [a, b, c, d, e, f, g, h, kind, flags] = *head;
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if len > MAX_BODY {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "frame longer than 4 MiB"));
        }
        let Some(body) = tail.get(..len) else { return Ok(None) };
        let frame =
            Frame { stream: u32::from_be_bytes([e, f, g, h]), kind, flags, body: body.to_vec() };
        self.0.drain(..HEADER + len);
        if self.0.is_empty() {
            self.0 = Vec::new();
        }
        Ok(Some(frame))
    }
}

/// Reads from a connection until its first frame is whole; answers all bytes read so far.
///
/// # Errors
/// As the connection's; `UnexpectedEof` when it closes first.
pub async fn first_frame(stream: &mut UnixStream) -> io::Result<(Frame, Vec<u8>)> {
    let mut decoder = Decoder::default();
    let mut seen = Vec::new();
    let mut buf = [0u8; 2048];
    loop {
        let n = stream.read(&mut buf).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let bytes = buf.get(..n).unwrap_or_default();
        decoder.push(bytes);
        seen.extend_from_slice(bytes);
        if let Some(frame) = decoder.next_frame()? {
            return Ok((frame, seen));
        }
        // A long first request is none of ours: the crate reads the rest.
        if seen.len() > 64 << 10 {
            return Ok((Frame { stream: 0, kind: 0, flags: 0, body: Vec::new() }, seen));
        }
    }
}

/// A connection from which some bytes have been read already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Vec<u8>,
    at: usize,
    inner: S,
}

impl<S> Prefixed<S> {
    /// Puts `prefix` in front of what `inner` will deliver.
    pub fn new(prefix: Vec<u8>, inner: S) -> Self {
        Self { prefix, at: 0, inner }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let rest = this.prefix.get(this.at..).unwrap_or_default();
        if rest.is_empty() {
            return Pin::new(&mut this.inner).poll_read(cx, buf);
        }
        let n = rest.len().min(buf.remaining());
        buf.put_slice(rest.get(..n).unwrap_or_default());
        this.at += n;
        if this.at >= this.prefix.len() {
            this.prefix = Vec::new();
            this.at = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_found_however_its_bytes_arrive() {
        let f = Frame { stream: 7, kind: DATA, flags: NO_DATA, body: b"hello".to_vec() };
        let bytes = f.encode();
        let mut d = Decoder::default();
        for b in &bytes[..bytes.len() - 1] {
            d.push(&[*b]);
            assert_eq!(d.next_frame().unwrap(), None);
        }
        d.push(&bytes[bytes.len() - 1..]);
        assert_eq!(d.next_frame().unwrap(), Some(f));
        d.push(&[0xff; HEADER]);
        assert!(d.next_frame().is_err());
    }
}
