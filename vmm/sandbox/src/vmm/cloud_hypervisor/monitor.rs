//! Cloud Hypervisor's pipe of events.
//!
//! It starts a guest that resets itself again, where every other VMM here ends. A second life of a
//! pod's guest would be one without its containers: told of the reset, we let the VMM end. The
//! pipe's reading end is kept beyond the daemon's end, so that what is told meanwhile is not lost.

use std::os::fd::OwnedFd;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::broadcast;

use super::super::Event;
use super::super::error::{Doing, Result};
use super::super::http::Http;
use super::super::process::Process;
use super::api;

/// Bytes of one event, at most; real ones have some hundred.
const MAX_EVENT: usize = 16 << 10;

/// Reads events until the VMM ends.
pub(super) fn follow(
    pipe: OwnedFd,
    http: Http,
    process: std::sync::Arc<Process>,
    events: broadcast::Sender<Event>,
) -> Result<tokio::task::JoinHandle<()>> {
    let mut pipe = pipe::Receiver::from_owned_fd(pipe).doing(|| "read a pipe of events")?;
    Ok(tokio::spawn(async move {
        let mut reader = Reader::default();
        let mut bytes = Vec::with_capacity(4096);
        loop {
            bytes.clear();
            match pipe.read_buf(&mut bytes).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            for event in reader.read(&bytes) {
                let reset = matches!(&event, Event::Shutdown { reason } if reason == RESET);
                // Nobody may be listening.
                let _ = events.send(event);
                if reset && http.order("/vmm.shutdown").await.is_err() {
                    process.signal(libc::SIGKILL);
                }
            }
        }
    }))
}

const RESET: &str = "the guest has reset itself";

fn translate(event: &api::Event) -> Option<Event> {
    Some(match (event.source.as_str(), event.event.as_str()) {
        ("vm", "rebooting") => Event::Shutdown { reason: RESET.into() },
        ("vm", "shutdown") => Event::Shutdown { reason: "the guest has powered off".into() },
        ("guest", "panic") => Event::Panicked,
        ("vm", "paused") => Event::Paused,
        ("vm", "resumed") => Event::Resumed,
        ("vm", "device-removed") => {
            let id = event.properties.as_ref()?.get("id")?;
            Event::Detached { id: id.clone() }
        }
        _ => return None,
    })
}

/// Objects of JSON, one behind the other, of bounded size. What is none is dropped up to the next
/// empty line, which stands between two.
#[derive(Debug, Default)]
pub struct Reader(Vec<u8>);

impl Reader {
    /// The events that mean something to us and are complete with these bytes.
    pub fn read(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.feed(bytes).iter().filter_map(translate).collect()
    }

    fn feed(&mut self, bytes: &[u8]) -> Vec<api::Event> {
        self.0.extend_from_slice(bytes);
        let mut found = Vec::new();
        while let Some(end) = self.0.windows(2).position(|two| two == b"\n\n") {
            let one: Vec<u8> = self.0.drain(..end + 2).collect();
            match serde_json::from_slice::<api::Event>(&one) {
                Ok(event) => found.push(event),
                Err(_) if one.trim_ascii().is_empty() => {}
                Err(error) => tracing::debug!(%error, "an event that is none"),
            }
        }
        if self.0.len() > MAX_EVENT {
            self.0.clear();
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REBOOT: &str = "{\n \"timestamp\": {\"secs\": 1, \"nanos\": 2},\n \"source\": \"vm\",\n \
                          \"event\": \"rebooting\",\n \"properties\": null\n}\n\n";

    #[test]
    fn events_are_whole_however_they_come_in_pieces() {
        let gone =
            "{\"source\":\"vm\",\"event\":\"device-removed\",\"properties\":{\"id\":\"d\"}}\n\n";
        let text = format!("{REBOOT}{gone}");
        for size in [1, 7, 4096] {
            let mut reader = Reader::default();
            let all: Vec<_> =
                text.as_bytes().chunks(size).flat_map(|piece| reader.feed(piece)).collect();
            let all: Vec<_> = all.iter().filter_map(translate).collect();
            assert_eq!(
                all,
                [Event::Shutdown { reason: RESET.into() }, Event::Detached { id: "d".into() }]
            );
        }
    }

    #[test]
    fn garbage_is_dropped_and_bounded() {
        let mut reader = Reader::default();
        assert!(reader.feed(b"nonsense\n\n{}\n\n\xff\xff\n\n").is_empty());
        for _ in 0..100 {
            assert!(reader.feed(&[b'x'; 4096]).is_empty());
            assert!(reader.0.len() <= MAX_EVENT + 4096);
        }
        reader.feed(b"\n\n");
        assert_eq!(reader.feed(REBOOT.as_bytes()).len(), 1);
    }

    #[test]
    fn a_spoilt_event_is_none_or_another_and_the_next_one_is_read() {
        // Each byte in turn, by each of a few others.
        for at in 0..REBOOT.len() - 2 {
            for byte in [b'\0', b'"', b'{', b'}', b'\n', b'9', 0xff] {
                let mut bytes = REBOOT.as_bytes().to_vec();
                bytes[at] = byte;
                let mut reader = Reader::default();
                reader.feed(&bytes);
                assert_eq!(reader.feed(REBOOT.as_bytes()).len(), 1, "{byte} at {at}");
            }
        }
    }
}
