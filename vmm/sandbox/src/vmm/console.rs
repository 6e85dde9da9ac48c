//! The console log: what a guest writes, bounded.
//!
//! The VMM's standard output is a pipe. Its reading end is kept beyond the daemon's end (so that
//! the last words of a VM that dies meanwhile are not lost; a full pipe holds the guest's console
//! up, and nothing else) and copied here into two files of limited size.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::error::{Doing, Result};

/// Makes the pipe: the reading end does not block, the writing end does.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let (r, w) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing(|| "make a pipe")?;
    nix::fcntl::fcntl(&r, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .doing(|| "configure a pipe")?;
    Ok((r, w))
}

/// Copies `pipe` into the log until its other end is closed. The task ends with that.
///
/// # Errors
/// [`super::Error::Io`] when the log cannot be made.
pub fn follow(pipe: OwnedFd, log: &Path, limit: u64) -> Result<tokio::task::JoinHandle<()>> {
    let mut log = Log::open(log, limit).doing(|| format!("open {}", log.display()))?;
    let mut pipe = pipe::Receiver::from_owned_fd(pipe).doing(|| "read a pipe")?;
    Ok(tokio::spawn(async move {
        let mut bytes = Vec::with_capacity(4096);
        loop {
            bytes.clear();
            match pipe.read_buf(&mut bytes).await {
                Ok(0) | Err(_) => return,
                // A full disk must not stop the guest: what does not fit is dropped.
                Ok(_) => drop(log.write(&bytes)),
            }
            // Idle consoles cost a task and no buffer.
            if bytes.capacity() > 4096 {
                bytes = Vec::with_capacity(4096);
            }
        }
    }))
}

/// The last bytes of a console, for an error: of the older part as well when the newer is short.
pub fn tail(log: &Path, most: usize) -> String {
    let mut all = std::fs::read(older(log)).unwrap_or_default();
    all.extend(std::fs::read(log).unwrap_or_default());
    super::error::clean(&all, most)
}

fn older(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    limit: u64,
}

impl Log {
    fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let mut log = Self { path: path.into(), file: None, written: 0, limit };
        if limit > 0 {
            let file = Self::options().append(true).open(path)?;
            log.written = file.metadata()?.len();
            log.file = Some(file);
        }
        Ok(log)
    }

    fn options() -> std::fs::OpenOptions {
        let mut options = File::options();
        options.create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        options
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() && self.file.is_some() {
            if self.written >= self.limit {
                std::fs::rename(&self.path, older(&self.path))?;
                self.file = Some(Self::options().write(true).truncate(true).open(&self.path)?);
                self.written = 0;
            }
            let room = usize::try_from(self.limit - self.written).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            if let Some(file) = &mut self.file {
                file.write_all(now)?;
            }
            self.written += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }
}

/// Keeps the reading end and copies it; what a driver does at start.
pub(crate) async fn begin(
    processes: &dyn super::Processes,
    id: &str,
    pipe: OwnedFd,
    console: &super::Console,
) -> Result<()> {
    processes.keep(&name(id), pipe.as_fd()).await?;
    follow(pipe, &console.log, console.limit).map(drop)
}

/// Takes the copying up again after a restart. A log that cannot go on is no reason to give up a
/// machine.
pub(crate) async fn resume(
    processes: &dyn super::Processes,
    id: &str,
    (log, limit): &(PathBuf, u64),
) {
    match processes.fetch(&name(id)).await {
        Ok(Some(pipe)) => {
            if let Err(error) = follow(pipe, log, *limit) {
                tracing::warn!(id, %error, "the console log does not go on");
            }
        }
        Ok(None) => tracing::warn!(id, "the console's pipe was not kept: no log from now on"),
        Err(error) => tracing::warn!(id, %error, "the console log does not go on"),
    }
}

fn name(id: &str) -> String {
    format!("{id}/console")
}

/// Forgets the kept end.
pub(crate) async fn forget(processes: &dyn super::Processes, id: &str) {
    if let Err(error) = processes.forget(&name(id)).await {
        tracing::warn!(id, %error, "cannot forget a console's pipe");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn however_much_a_guest_writes_the_log_stays_small_and_has_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let (r, w) = pair().unwrap();
        let copy = follow(r, &log, 1000).unwrap();
        let writer = tokio::task::spawn_blocking(move || {
            let mut w = File::from(w);
            for i in 0..2000 {
                writeln!(w, "line {i}").unwrap();
            }
            writeln!(w, "Kernel panic").unwrap();
        });
        writer.await.unwrap();
        copy.await.unwrap();
        let size = |p: &Path| std::fs::metadata(p).unwrap().len();
        assert!(size(&log) <= 1000 && size(&older(&log)) == 1000);
        assert!(tail(&log, 100).ends_with("line 1999 Kernel panic"));
    }
}
