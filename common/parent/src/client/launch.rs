//! Finding the sandbox-parent of a directory, or starting one.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::transport::reach;
use super::{Connections, Parent, ParentError, ParentOptions, Result};

/// One that is just ending holds its lock for a moment longer than its socket.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

fn failed(what: impl Into<String>, source: io::Error) -> ParentError {
    ParentError::Start { what: what.into(), source }
}

pub(super) async fn connect_or_spawn(
    options: &ParentOptions,
    cgroups: &[PathBuf],
) -> Result<(Parent, Connections, bool)> {
    let path = options.dir.join("parent.sock");
    let mut attempt = 0;
    loop {
        attempt += 1;
        if let Ok(socket) = reach(&path, options.timeout).await {
            match Parent::over(socket, options.timeout).await {
                // It ended while we said hello.
                Err(ParentError::Lost) if attempt < ATTEMPTS => {}
                outcome => return outcome.map(|(parent, events)| (parent, events, false)),
            }
        }
        match spawn(options, cgroups).await {
            Ok(()) => break,
            // Another daemon of this directory may have been faster, or an old one is ending.
            Err(ParentError::Start { .. }) if options.binary.exists() && attempt < ATTEMPTS => {
                tokio::time::sleep(PAUSE).await;
            }
            Err(e) => return Err(e),
        }
    }
    let (parent, events) = over(&path, options.timeout).await?;
    Ok((parent, events, true))
}

/// Connects to a running one.
pub(super) async fn over(path: &Path, timeout: Duration) -> Result<(Parent, Connections)> {
    let socket = reach(path, timeout)
        .await
        .map_err(|e| failed(format!("connect to {}", path.display()), e))?;
    Parent::over(socket, timeout).await
}

/// Runs the program; when its foreground half has ended well, the socket is there.
async fn spawn(options: &ParentOptions, cgroups: &[PathBuf]) -> Result<()> {
    let mut command = tokio::process::Command::new(&options.binary);
    command
        .arg(&options.dir)
        .arg(format!("connections={}", options.max_connections))
        .arg(format!("pods={}", options.pods))
        .arg(format!("kept={}", options.kept))
        .arg(format!("watched={}", options.watched))
        .arg(format!("hold={}", options.hold.as_millis()));
    for cgroup in cgroups {
        let mut argument = OsString::from("cgroup=");
        argument.push(cgroup);
        command.arg(argument);
    }
    // The padding gives its title room for `[sandbox-<64 digits>]`.
    command.arg(format!("title={}", "-".repeat(90))).env_clear().stdin(Stdio::null());
    let what = || format!("start {}", options.binary.display());
    let output = tokio::time::timeout(options.timeout, command.output())
        .await
        .map_err(|_| ParentError::Timeout(options.timeout))?
        .map_err(|e| failed(what(), e))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(what(), io::Error::other(text)))
}
