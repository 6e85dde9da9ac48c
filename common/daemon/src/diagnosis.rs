//! What is wrong around a daemon, on one line with its remedy. A daemon says it when it starts, and
//! `kuasar-ctl check` without one: both in these words.

use std::fmt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Oldest containerd with sandboxers; before it there is only the shim.
const OLDEST: (u32, u32) = (2, 0);
/// Oldest containerd at all: its shims are told of sandboxes.
const OLDEST_SHIM: (u32, u32) = (1, 7);
/// Longest time for containerd to say its version.
const PATIENCE: Duration = Duration::from_secs(10);

/// Something that is not as it has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What was found.
    pub detail: String,
    /// The one command, or the one change, that mends it.
    pub remedy: String,
}

impl Problem {
    fn new(detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { detail: detail.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.detail, self.remedy)
    }
}

/// Others than its owner get at this file: `what` is the word for it, `mode` the most that it may have.
pub fn open_to_others(what: &str, path: &Path, mode: u32) -> Option<Problem> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let (shown, found) = (path.display(), meta.permissions().mode() & 0o777);
    (found & !mode != 0).then(|| {
        Problem::new(
            format!("{what} {shown} has mode {found:04o}: others get in"),
            format!("chmod {mode:04o} {shown}"),
        )
    })
}

/// This file belongs to somebody else than `uid`, who runs the daemon.
pub fn owned_by_another(what: &str, path: &Path, uid: u32) -> Option<Problem> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let shown = path.display();
    (meta.uid() != uid).then(|| {
        Problem::new(
            format!("{what} {shown} belongs to user {}", meta.uid()),
            format!("chown {uid} {shown}"),
        )
    })
}

/// A socket that another daemon serves.
pub fn served_by_another(socket: &Path) -> Problem {
    Problem::new(
        format!("another daemon serves {}", socket.display()),
        "stop it, or give one of the two another `listen`",
    )
}

/// A state directory that another daemon uses.
pub fn used_by_another(dir: &Path) -> Problem {
    Problem::new(
        format!("another daemon uses {}", dir.display()),
        "stop it, or give one of the two another `dir`",
    )
}

/// What a version of containerd means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Containerd {
    /// One that we work with.
    Good(String),
    /// Pods run, but by the shim only; or it cannot be told.
    Limited(Problem),
    /// No pod will run.
    TooOld(Problem),
}

/// Major and minor number at the beginning of a version.
pub fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Of what `containerd --version` says: `containerd github.com/containerd/containerd/v2 2.1.9 …`.
pub fn containerd(said: &str) -> Containerd {
    let remedy = "install containerd 2.1 or later";
    match said.split_whitespace().find_map(|word| Some((word, numbers(word)?))) {
        Some((word, found)) if found >= OLDEST => Containerd::Good(word.into()),
        Some((word, found)) if found >= OLDEST_SHIM => Containerd::Limited(Problem::new(
            format!("containerd {word} is without sandboxers, and works only with the shim"),
            remedy,
        )),
        Some((word, _)) => Containerd::TooOld(Problem::new(
            format!("containerd {word} is older than 1.7 and not supported"),
            remedy,
        )),
        None => Containerd::Limited(Problem::new(
            "containerd does not say its version",
            "look at what containerd --version says",
        )),
    }
}

/// The containerd in `PATH`; `None` when there is none.
pub async fn installed_containerd() -> Option<Containerd> {
    let program = kuasar_host::process::find_program(Path::new("containerd"))?;
    let mut command = tokio::process::Command::new(&program);
    command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let said = match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(Ok(out)) => String::from_utf8_lossy(&out.stdout).into_owned(),
        _ => String::new(),
    };
    Some(containerd(&said))
}

/// Warns in the log of a containerd that pods cannot come from.
pub async fn warn_of_containerd() {
    if let Some(Containerd::Limited(problem) | Containerd::TooOld(problem)) =
        installed_containerd().await
    {
        tracing::warn!("{problem}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_containerd_are_judged() {
        let said =
            |v: &str| containerd(&format!("containerd github.com/containerd/containerd {v} 1"));
        assert_eq!(said("2.1.9+ds1"), Containerd::Good("2.1.9+ds1".into()));
        assert!(matches!(said("1.7.24~ds1"), Containerd::Limited(_)));
        let Containerd::TooOld(problem) = said("1.6.20~ds1") else { panic!() };
        assert_eq!(
            problem.to_string(),
            "containerd 1.6.20~ds1 is older than 1.7 and not supported: install containerd 2.1 or later"
        );
        assert!(matches!(containerd(""), Containerd::Limited(_)));
    }

    #[test]
    fn open_directories_and_sockets_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let mode =
            |mode| std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
        mode(0o755);
        let found = open_to_others("state directory", dir.path(), 0o700).unwrap();
        assert!(found.detail.contains("mode 0755") && found.remedy.starts_with("chmod 0700 /"));
        mode(0o700);
        assert_eq!(open_to_others("state directory", dir.path(), 0o700), None);
        let own = nix::unistd::geteuid().as_raw();
        assert_eq!(owned_by_another("state directory", dir.path(), own), None);
        let found = owned_by_another("state directory", dir.path(), own + 1).unwrap();
        assert!(found.to_string().contains(&format!("belongs to user {own}: chown ")), "{found}");
        assert_eq!(open_to_others("socket", Path::new("/nowhere/x"), 0o600), None);
    }
}
