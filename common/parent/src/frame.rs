//! ttrpc frames, as far as the relay has to know them: the header, and of a request the method.
//!
//! A frame is `length: u32, stream: u32, type: u8, flags: u8` (big-endian) and `length` bytes of
//! body (ttrpc `PROTOCOL.md`). The body of a request is the protobuf message
//! `Request { service = 1, method = 2, … }`.

/// Bytes of a header.
pub const HEADER: usize = 10;
/// Longest body that ttrpc allows. A longer one means that the peer does not speak ttrpc.
pub const MAX_BODY: usize = 4 << 20;

/// Type of a request.
pub const REQUEST: u8 = 1;
/// Type of the response that ends a call.
pub const RESPONSE: u8 = 2;
/// Type of a data frame of a streaming call.
pub const DATA: u8 = 3;

/// Flag: the sender will send no more on this stream.
pub const REMOTE_CLOSED: u8 = 1;
/// Flag of a request: the client goes on to send data frames.
pub const REMOTE_OPEN: u8 = 2;
/// Flag of a data frame: it carries no message.
pub const NO_DATA: u8 = 4;

/// Longest frame that [`unavailable`] makes.
pub const UNAVAILABLE_LEN: usize = HEADER + 4 + 2 + TEXT.len();
const TEXT: &[u8] = b"the sandboxer is restarting: try again";

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body.
    pub len: usize,
    /// Stream number; one call is one stream.
    pub stream: u32,
    /// [`REQUEST`], [`RESPONSE`] or [`DATA`].
    pub kind: u8,
    /// Flags.
    pub flags: u8,
}

impl Header {
    /// Reads a header; `None` when there are fewer than [`HEADER`] bytes.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let (len, rest) = frame.split_first_chunk::<4>()?;
        let (stream, rest) = rest.split_first_chunk::<4>()?;
        let ([kind, flags], _) = rest.split_first_chunk::<2>()?;
        Some(Self {
            len: u32::from_be_bytes(*len) as usize,
            stream: u32::from_be_bytes(*stream),
            kind: *kind,
            flags: *flags,
        })
    }
}

/// What happens to a call while no daemon is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `Wait` and `WaitSandbox`, and `Connect`, with which containerd begins a Wait of its own (an
    /// error of it makes the container EXITED/255): it is parked and put to the next daemon.
    Wait,
    /// It changes nothing, so it can be done again: a call that a dead daemon had taken is put to
    /// the next one, if that comes in time.
    Read,
    /// `Stream`: parked as well, together with its first data frame.
    Stream,
    /// Everything else is answered Unavailable.
    Other,
}

impl Call {
    /// Classifies a request by its method and its flags.
    pub fn of(body: &[u8], flags: u8) -> Self {
        match method(body) {
            Some(b"Wait" | b"WaitSandbox" | b"Connect") => Self::Wait,
            Some(b"State" | b"Pids" | b"Stats") => Self::Read,
            Some(b"Stream") if flags & REMOTE_OPEN != 0 => Self::Stream,
            _ => Self::Other,
        }
    }
}

/// The method name of a request, if it can be found.
fn method(mut body: &[u8]) -> Option<&[u8]> {
    loop {
        let key = varint(&mut body)?;
        match key & 7 {
            0 => {
                varint(&mut body)?;
            }
            2 => {
                let n = usize::try_from(varint(&mut body)?).ok()?;
                let (value, rest) = body.split_at_checked(n)?;
                if key >> 3 == 2 {
                    return Some(value);
                }
                body = rest;
            }
            _ => return None,
        }
    }
}

fn varint(body: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = body.split_first()?;
        *body = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// A response frame with the status UNAVAILABLE (14); answers how much of `out` it fills, or 0
/// when `out` is too short.
pub fn unavailable(stream: u32, out: &mut [u8]) -> usize {
    // Response { status = 1: Status { code = 1, message = 2 } }
    let text = TEXT.len() as u8;
    let status = text + 4;
    let mut n = 0;
    let parts: [&[u8]; 4] = [
        &u32::from(status + 2).to_be_bytes(),
        &stream.to_be_bytes(),
        &[RESPONSE, 0, 0x0a, status, 0x08, 14, 0x12, text],
        TEXT,
    ];
    for part in parts {
        let Some(to) = out.get_mut(n..n + part.len()) else {
            return 0;
        };
        to.copy_from_slice(part);
        n += part.len();
    }
    n
}

/// A data frame that only says that no more follow on its stream.
pub fn closing(stream: u32) -> [u8; HEADER] {
    let [a, b, c, d] = stream.to_be_bytes();
    [0, 0, 0, 0, a, b, c, d, DATA, REMOTE_CLOSED | NO_DATA]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(service: &str, method: &str) -> Vec<u8> {
        let mut b = vec![0x0a, service.len() as u8];
        b.extend_from_slice(service.as_bytes());
        b.extend_from_slice(&[0x12, method.len() as u8]);
        b.extend_from_slice(method.as_bytes());
        b.extend_from_slice(&[0x1a, 2, 1, 2, 0x20, 0x80, 0x01]);
        b
    }

    #[test]
    fn only_waits_reads_and_streams_can_be_parked() {
        let wait = request("containerd.task.v3.Task", "Wait");
        assert_eq!(Call::of(&wait, 0), Call::Wait);
        assert_eq!(Call::of(&request("x", "WaitSandbox"), 0), Call::Wait);
        assert_eq!(Call::of(&request("x", "Connect"), 0), Call::Wait);
        assert_eq!(Call::of(&request("x", "State"), 0), Call::Read);
        assert_eq!(Call::of(&request("x", "Start"), 0), Call::Other);
        assert_eq!(Call::of(&request("x", "Stream"), REMOTE_OPEN), Call::Stream);
        assert_eq!(Call::of(&request("x", "Stream"), 0), Call::Other);
        assert_eq!(Call::of(&request("Wait", "Kill"), 0), Call::Other);
    }

    #[test]
    fn no_body_and_no_prefix_of_one_is_misread() {
        let whole = request("containerd.task.v3.Task", "Wait");
        for n in 0..whole.len() {
            let call = Call::of(&whole[..n], 0);
            assert_eq!(call == Call::Wait, n >= 31, "{n}");
        }
        for n in 0..=255u8 {
            let junk = [n, 255, 255, 255, 255, 255, 255, 255, 255, 255, 127, n];
            assert_eq!(Call::of(&junk, n), Call::Other);
            assert_eq!(Call::of(&junk[10..], n), Call::Other);
        }
    }

    #[test]
    fn an_unavailable_answer_is_a_response_frame_of_its_stream() {
        let mut out = [0; 128];
        let n = unavailable(7, &mut out);
        assert_eq!(n, UNAVAILABLE_LEN);
        let header = Header::parse(&out).unwrap();
        assert_eq!(header, Header { len: n - HEADER, stream: 7, kind: RESPONSE, flags: 0 });
        assert_eq!(&out[HEADER + 2..HEADER + 4], &[8, 14]);
        assert_eq!(unavailable(7, &mut out[..20]), 0);
    }

    #[test]
    fn a_short_header_is_no_header() {
        assert_eq!(Header::parse(&[0; 9]), None);
    }
}
