//! A command of an engine, run to its end: the same for runc, crun, runsc and the built-in one.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::place::Place;
use crate::processes::{Command, Failure, Processes, new_cookie};

/// How a command did not do what it was for.
#[derive(Debug, thiserror::Error)]
pub enum Unfinished {
    /// It cannot be run.
    #[error("cannot be run")]
    Spawn(#[source] Failure),
    /// How it ended is not known.
    #[error("its end cannot be known")]
    Wait(#[source] Failure),
    /// It had this long, and was killed.
    #[error("did not finish within {0:?}")]
    Late(Duration),
    /// It ended with these words, which are bounded and in one line.
    #[error("{0}")]
    Failed(String),
}

/// Runs a command, program first, and waits for its end. `log` is where it is told to write its
/// errors; what an earlier one has left there is removed. Answers the number from which on exits can
/// be those of what it leaves behind ([`Processes::watch`]).
///
/// # Errors
/// When it does not end well within `limit`.
pub async fn run(
    processes: &Arc<dyn Processes>,
    argv: Vec<String>,
    fds: Vec<Option<BorrowedFd<'_>>>,
    log: &Path,
    limit: Duration,
) -> Result<u64, Unfinished> {
    run_in(processes, argv, fds, None, log, limit).await.map(|done| done.since)
}

/// What a command that has ended well leaves behind.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// The number from which on exits can be those of what it leaves behind ([`Processes::watch`]).
    pub since: u64,
    /// See [`Spawned::watched`](crate::processes::Spawned::watched).
    pub watched: Option<u64>,
}

/// The same for a program that makes a process which is to be in this place.
///
/// # Errors
/// As [`run`].
pub async fn run_in(
    processes: &Arc<dyn Processes>,
    argv: Vec<String>,
    fds: Vec<Option<BorrowedFd<'_>>>,
    place: Option<Place>,
    log: &Path,
    limit: Duration,
) -> Result<Done, Unfinished> {
    let _ = std::fs::remove_file(log);
    let cookie = new_cookie();
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let command = Command { argv, env: vec![format!("PATH={path}")], fds, cookie, place };
    let spawned = processes.spawn(command).await.map_err(Unfinished::Spawn)?;
    let exit = match tokio::time::timeout(limit, processes.exit_of(cookie)).await {
        Ok(exit) => exit.map_err(Unfinished::Wait)?,
        Err(_) => {
            // It may have ended just now.
            let _ = kuasar_host::process::pidfd_signal(spawned.pidfd.as_fd(), libc::SIGKILL);
            // It is reaped and forgotten as soon as the kernel has ended it.
            let processes = processes.clone();
            tokio::spawn(async move {
                let _ = processes.exit_of(cookie).await;
                processes.acknowledge(cookie).await;
            });
            return Err(Unfinished::Late(limit));
        }
    };
    processes.acknowledge(cookie).await;
    if exit.status == 0 {
        return Ok(Done { since: spawned.since, watched: spawned.watched });
    }
    let words = last_error(log)
        .unwrap_or_else(|| format!("it ended with status {} and no message", exit.status));
    Err(Unfinished::Failed(words))
}

/// The message of the last error line of an engine's log (the JSON that runc, crun and runsc write).
fn last_error(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text);
    let mut last = None;
    for line in text.lines() {
        match serde_json::from_str::<serde_json::Value>(line) {
            Ok(entry) => {
                let level = entry.get("level").and_then(|level| level.as_str()).unwrap_or("error");
                if matches!(level, "error" | "fatal") {
                    last =
                        entry.get("msg").and_then(|msg| msg.as_str()).map(str::to_owned).or(last);
                }
            }
            Err(_) if !line.trim().is_empty() => last = Some(line.trim().to_owned()),
            Err(_) => {}
        }
    }
    last.as_deref().map(one_line)
}

/// What may be a container's words, in part: bounded, and in one line.
pub fn one_line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(2000).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_the_message() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "{\"level\":\"warning\",\"msg\":\"w\"}\n{\"level\":\"error\",\"msg\":\"first\"}\n{\"level\":\"error\",\"msg\":\"se\\ncond\"}\n{\"level\":\"info\",\"msg\":\"i\"}\n").unwrap();
        assert_eq!(last_error(&log).unwrap(), "second");
        std::fs::write(&log, "plain words\n").unwrap();
        assert_eq!(last_error(&log).unwrap(), "plain words");
        assert!(last_error(&dir.path().join("none")).is_none());
    }
}
