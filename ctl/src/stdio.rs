//! The standard streams of a process in a pod: FIFOs that its daemon opens, and our own streams.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::{Error, Result};

/// When a process has ended, its output is in the pipe already. What it has left behind may hold
/// the pipe for longer: then nobody waits for it.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes that are copied at once.
const CHUNK: usize = 32 << 10;

/// FIFOs of one process, in a private directory that goes with it.
pub struct Streams {
    dir: tempfile::TempDir,
    terminal: bool,
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    copies: Vec<JoinHandle<()>>,
}

impl Streams {
    /// FIFOs for a process; `input` when it gets our standard input. With a terminal there is no
    /// standard error.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(input: bool, terminal: bool) -> Result<Self> {
        let base = crate::run::state_dir()?;
        let dir = tempfile::Builder::new()
            .prefix(&format!("io-{}-", crate::run::owner()))
            .tempdir_in(&base);
        let dir = dir.map_err(Error::at("make a directory in", &base))?;
        let make = |name: &str| -> Result<PathBuf> {
            let path = dir.path().join(name);
            let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
            nix::unistd::mkfifo(&path, mode).map_err(|e| Error::Io {
                what: format!("make {}", path.display()),
                source: e.into(),
            })?;
            Ok(path)
        };
        let receiver = |name: &str| -> Result<pipe::Receiver> {
            let path = make(name)?;
            let open = pipe::OpenOptions::new().open_receiver(&path);
            open.map_err(Error::at("open", &path))
        };
        let stdout = Some(receiver("out")?);
        let stderr = if terminal { None } else { Some(receiver("err")?) };
        let stdin = match input {
            false => None,
            true => {
                let path = make("in")?;
                // Both ways, because nobody reads it yet; given up when our input ends.
                let open = pipe::OpenOptions::new().read_write(true).open_sender(&path);
                Some(open.map_err(Error::at("open", &path))?)
            }
        };
        Ok(Self { dir, terminal, stdin, stdout, stderr, copies: Vec::new() })
    }

    fn path(&self, name: &str, wanted: bool) -> String {
        if wanted { self.dir.path().join(name).display().to_string() } else { String::new() }
    }

    /// Paths for a request: standard input, output and error.
    pub fn paths(&self) -> (String, String, String) {
        let (input, error) = (self.stdin.is_some(), !self.terminal);
        (self.path("in", input), self.path("out", true), self.path("err", error))
    }

    /// Begins to copy, once the daemon has opened its ends. Answers what tells of the end of our
    /// standard input.
    pub fn start(&mut self) -> Option<JoinHandle<()>> {
        if let Some(out) = self.stdout.take() {
            self.copies.push(tokio::spawn(copy_out(out, std::io::stdout())));
        }
        if let Some(err) = self.stderr.take() {
            self.copies.push(tokio::spawn(copy_out(err, std::io::stderr())));
        }
        self.stdin.take().map(|stdin| tokio::spawn(feed(stdin)))
    }

    /// Copies the rest, when the process has ended.
    pub async fn finish(self) {
        for copy in self.copies {
            let abort = copy.abort_handle();
            if tokio::time::timeout(LINGER, copy).await.is_err() {
                abort.abort();
            }
        }
    }
}

/// Until every writer has gone. A descendant of the process may hold the pipe: the caller decides
/// how long it waits.
pub async fn copy_out(mut from: impl AsyncRead + Unpin, mut to: impl Write) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                // Nobody reads us: what comes is thrown away, so that the process goes on.
                let _ = to.write_all(bytes).and_then(|()| to.flush());
            }
        }
    }
}

/// Our standard input, by a thread of its own: it cannot be read without blocking. Answers where it
/// went, and how many bytes it had.
pub async fn copy_in<W: AsyncWrite + Unpin>(mut to: W) -> (W, u64) {
    let mut copied = 0;
    let (send, mut chunks) = mpsc::channel::<Vec<u8>>(4);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        while let Ok(n @ 1..) = input.read(&mut buffer) {
            let bytes = buffer.get(..n).unwrap_or_default().to_vec();
            if send.blocking_send(bytes).is_err() {
                return;
            }
        }
    });
    while let Some(bytes) = chunks.recv().await {
        if to.write_all(&bytes).await.is_err() {
            break;
        }
        copied += bytes.len() as u64;
    }
    (to, copied)
}

/// The same for a process' standard input, which is given up then.
async fn feed(to: pipe::Sender) {
    drop(copy_in(to).await);
    // What was written is to be read before the pipe has no writer any more: CloseIO comes next.
}

/// Our terminal in raw mode, until it is dropped.
pub struct RawTerminal(Termios);

impl RawTerminal {
    /// Nothing when standard input is no terminal.
    ///
    /// # Errors
    /// When its mode cannot be set.
    pub fn enter() -> Result<Option<Self>> {
        let input = std::io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let failed =
            |e: nix::Error| Error::Io { what: "set up the terminal".into(), source: e.into() };
        let before = termios::tcgetattr(input.as_fd()).map_err(failed)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(input.as_fd(), SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

/// Columns and rows of our terminal.
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request fills the structure that it gets.
    let r = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (r == 0 && size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}
