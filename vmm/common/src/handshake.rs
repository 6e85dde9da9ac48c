//! The lines with which connections begin.
//!
//! The guest is hostile to the host, and everybody but the host is hostile to the guest. The guest
//! trusts the host because only the host can listen on its CID (2). The host takes one [`Ready`]
//! per boot, before any container exists in the guest, and answers a [`Welcome`] with a random
//! token. Whoever then dials the guest has to show that token: with the kernel's vhost-vsock any
//! process of the host could dial. The token is never on the kernel's command line, which
//! containers can read.
//!
//! Lines are JSON or words, end with `\n`, are at most [`MAX_LINE`] bytes long, and are read byte
//! by byte, so that nothing of what follows is swallowed. Deadlines are the caller's.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Version of protocol and guest API.
pub const PROTOCOL: u32 = 1;
/// Most bytes of a line, its end included.
pub const MAX_LINE: usize = 8 * 1024;

/// Why a connection did not begin.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It broke.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The other side ended it within a line.
    #[error("connection ended within the handshake")]
    Ended,
    /// A line without end.
    #[error("a line of the handshake is longer than {MAX_LINE} bytes")]
    TooLong,
    /// A line that makes no sense.
    #[error("malformed handshake: {0}")]
    Malformed(String),
    /// The other side said no.
    #[error("refused by the other side: {0}")]
    Refused(String),
}

/// First line from the guest on the READY connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// Version of vmm-task.
    pub agent_version: String,
    /// `uname -r`.
    pub kernel_release: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// The host's answer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// 32 random bytes in hex.
    pub token: String,
    /// Wall clock, nanoseconds since 1970.
    pub now_ns: i64,
    /// For the guest's random number generator: bytes in hex.
    pub entropy: String,
    /// Sandbox id.
    pub sandbox_id: String,
}

impl std::fmt::Debug for Welcome {
    /// Without its secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Welcome").field("sandbox_id", &self.sandbox_id).finish_non_exhaustive()
    }
}

/// Which stream of a process a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Host to process.
    Stdin,
    /// Process to host.
    Stdout,
    /// Process to host.
    Stderr,
    /// Both ways.
    Terminal,
    /// Both ways, to a port of the pod.
    Forward,
    /// Both ways, to a program beside the containers.
    Debug,
}

impl StreamKind {
    /// Its word in the line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Terminal => "terminal",
            Self::Forward => "forward",
            Self::Debug => "debug",
        }
    }

    fn of(word: &str) -> Option<Self> {
        let all = [Self::Stdin, Self::Stdout, Self::Stderr, Self::Terminal];
        let more = [Self::Forward, Self::Debug];
        all.into_iter().chain(more).find(|kind| kind.word() == word)
    }
}

/// What a connection to the guest is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// ttrpc.
    Control,
    /// One stream of one process: container id, exec id (empty for the first process). For
    /// [`StreamKind::Forward`] and [`StreamKind::Debug`] the container is the id of the call.
    Stream {
        /// Container id.
        container: String,
        /// Exec id.
        exec: String,
        /// Which.
        kind: StreamKind,
    },
}

/// First line of a connection to the guest.
pub fn hello(token: &str, purpose: &Purpose) -> String {
    match purpose {
        Purpose::Control => format!("KUASAR1 {token} control\n"),
        Purpose::Stream { container, exec, kind } => {
            format!("KUASAR1 {token} stream {container}/{exec}/{}\n", kind.word())
        }
    }
}

/// The token and purpose in such a line (without its end).
///
/// # Errors
/// [`HandshakeError::Malformed`].
pub fn parse_hello(line: &str) -> Result<(&str, Purpose), HandshakeError> {
    let bad = || HandshakeError::Malformed("not a greeting".into());
    let mut words = line.split(' ');
    if words.next() != Some("KUASAR1") {
        return Err(bad());
    }
    let token = words.next().ok_or_else(bad)?;
    let purpose = match (words.next(), words.next(), words.next()) {
        (Some("control"), None, None) => Purpose::Control,
        (Some("stream"), Some(name), None) => {
            let mut parts = name.split('/');
            let (container, exec, kind) = (parts.next(), parts.next(), parts.next());
            let (Some(container), Some(exec), Some(kind), None) =
                (container, exec, kind.and_then(StreamKind::of), parts.next())
            else {
                return Err(bad());
            };
            if container.is_empty() {
                return Err(bad());
            }
            Purpose::Stream { container: container.into(), exec: exec.into(), kind }
        }
        _ => return Err(bad()),
    };
    Ok((token, purpose))
}

/// Whether two tokens are the same, in a time that does not depend on where they differ.
pub fn same_token(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |diff, (x, y)| diff | (x ^ y)) == 0
}

/// Reads one line, without its end.
///
/// # Errors
/// [`HandshakeError`].
pub async fn read_line(from: &mut (impl AsyncRead + Unpin)) -> Result<String, HandshakeError> {
    let mut line = Vec::with_capacity(128);
    loop {
        let mut byte = [0];
        match from.read(&mut byte).await? {
            0 => return Err(HandshakeError::Ended),
            _ if byte == *b"\n" => break,
            _ if line.len() + 1 >= MAX_LINE => return Err(HandshakeError::TooLong),
            _ => line.extend(byte),
        }
    }
    String::from_utf8(line).map_err(|_| HandshakeError::Malformed("not UTF-8".into()))
}

/// Reads a line of JSON.
///
/// # Errors
/// [`HandshakeError`].
pub async fn read_json<T: serde::de::DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> Result<T, HandshakeError> {
    let line = read_line(from).await?;
    serde_json::from_str(&line).map_err(|error| HandshakeError::Malformed(error.to_string()))
}

/// Writes a line of JSON.
///
/// # Errors
/// [`HandshakeError::Io`].
pub async fn write_json(
    to: &mut (impl AsyncWrite + Unpin),
    value: &impl Serialize,
) -> Result<(), HandshakeError> {
    let mut line =
        serde_json::to_vec(value).map_err(|error| HandshakeError::Malformed(error.to_string()))?;
    line.push(b'\n');
    to.write_all(&line).await?;
    Ok(to.flush().await?)
}

/// The host's side of the beginning of a connection: says [`hello`] and reads the answer.
///
/// # Errors
/// [`HandshakeError::Refused`] with the guest's words, and the others.
pub async fn greet(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    token: &str,
    purpose: &Purpose,
) -> Result<(), HandshakeError> {
    stream.write_all(hello(token, purpose).as_bytes()).await?;
    let answer = read_line(stream).await?;
    match answer.strip_prefix("ERR ") {
        _ if answer == "OK" => Ok(()),
        Some(why) => Err(HandshakeError::Refused(why.chars().take(200).collect())),
        None => Err(HandshakeError::Malformed("neither OK nor ERR".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_read_as_it_was_written() {
        let stream =
            |exec: &str, kind| Purpose::Stream { container: "c1".into(), exec: exec.into(), kind };
        for purpose in [
            Purpose::Control,
            stream("", StreamKind::Stdout),
            stream("e-1", StreamKind::Terminal),
            stream("", StreamKind::Forward),
            stream("", StreamKind::Debug),
        ] {
            let line = hello("abc", &purpose);
            assert_eq!(parse_hello(line.trim_end()).unwrap(), ("abc", purpose));
        }
    }

    #[test]
    fn other_greetings_are_malformed() {
        for line in [
            "",
            "KUASAR1",
            "KUASAR1 t",
            "KUASAR1 t control x",
            "KUASAR2 t control",
            "KUASAR1 t stream",
            "KUASAR1 t stream c//bad",
            "KUASAR1 t stream c/stdout",
            "KUASAR1 t stream //stdout",
            "KUASAR1 t stream c/e/stdout/x",
        ] {
            assert!(parse_hello(line).is_err(), "{line:?}");
        }
    }

    /// Bytes from a fixed seed: a failure is the same each time.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % n as u64) as usize
        }

        /// A line with some bytes changed, removed or doubled.
        fn spoil(&mut self, line: &str) -> Vec<u8> {
            let mut bytes = line.as_bytes().to_vec();
            for _ in 0..=self.below(4) {
                let at = self.below(bytes.len().max(1));
                match self.below(4) {
                    _ if bytes.is_empty() => bytes.push(b' '),
                    0 => drop(bytes.remove(at)),
                    1 => bytes.insert(at, bytes[at]),
                    2 => bytes[at] = b" /\n\0K\xff"[self.below(6)],
                    _ => bytes[at] = self.below(256) as u8,
                }
            }
            bytes
        }
    }

    #[tokio::test]
    async fn a_spoilt_line_is_refused_or_means_what_it_says() {
        let mut dice = Dice(0x2545_f491_4f6c_dd1d);
        let stream =
            Purpose::Stream { container: "c1".into(), exec: "e1".into(), kind: StreamKind::Stderr };
        let ready = r#"{"protocol":1,"agent_version":"1","kernel_release":"6","boot_id":"b"}"#;
        for n in 0..20_000 {
            let purpose = if n % 2 == 0 { &Purpose::Control } else { &stream };
            let bytes = dice.spoil(&hello("abc", purpose));
            if let Ok(line) = read_line(&mut bytes.as_slice()).await
                && let Ok((token, purpose)) = parse_hello(&line)
            {
                assert_eq!(hello(token, &purpose), format!("{line}\n"));
            }
            let mut bytes = dice.spoil(ready);
            bytes.push(b'\n');
            // An error or a value; whatever it is, it ends and does not panic.
            let _ = read_json::<Ready>(&mut bytes.as_slice()).await;
        }
    }

    #[tokio::test]
    async fn a_line_ends_where_it_ends_and_is_bounded() {
        let mut bytes: &[u8] = b"first\nrest";
        assert_eq!(read_line(&mut bytes).await.unwrap(), "first");
        assert_eq!(bytes, b"rest");
        assert!(matches!(read_line(&mut bytes).await, Err(HandshakeError::Ended)));
        let long = vec![b'x'; MAX_LINE + 1];
        assert!(matches!(read_line(&mut long.as_slice()).await, Err(HandshakeError::TooLong)));
        assert!(matches!(
            read_line(&mut b"\xff\n".as_slice()).await,
            Err(HandshakeError::Malformed(_))
        ));
    }

    #[tokio::test]
    async fn a_refusal_carries_the_reason() {
        let (mut host, mut guest) = tokio::io::duplex(256);
        guest.write_all(b"ERR wrong token\n").await.unwrap();
        let error = greet(&mut host, "t", &Purpose::Control).await.unwrap_err();
        assert!(matches!(error, HandshakeError::Refused(why) if why == "wrong token"));
        assert_eq!(read_line(&mut guest).await.unwrap(), "KUASAR1 t control");
    }

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same_token("abc", "abc"));
        assert!(!same_token("abc", "abd"));
        assert!(!same_token("abc", "abcd"));
        let welcome = Welcome {
            token: "secret".into(),
            now_ns: 0,
            entropy: String::new(),
            sandbox_id: "s".into(),
        };
        assert!(!format!("{welcome:?}").contains("secret"));
    }
}
