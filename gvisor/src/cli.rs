//! Commands of `runsc`: they are run by sandbox-parent, which becomes the parent of the sentries
//! and gofers that they leave behind.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kuasar_host::live::Live;
use kuasar_host::process::{self, Identity, find_program};
use kuasar_oci::command::{self, Unfinished};
use kuasar_oci::engine::Limits;
use kuasar_oci::processes::{self, Processes};
use sandbox_parent::client::Parent;
use serde::{Deserialize, Serialize};

use crate::config::{Config, Network};
use crate::sentry::Sentry;

/// Date of the oldest release whose control protocol was compared with ours.
const OLDEST: u32 = 20240101;
/// Releases from this date on tell a network namespace of their own from the host's on every
/// kernel. Older ones look for a sysctl that Linux 6.9 and later show in all of them.
const KNOWS_NETNS: u32 = 20240801;
/// First argument by which sandbox-parent runs this program in front of `runsc`: see
/// [`crate::masked`].
pub const MASKED: &str = "run-masked";

/// Why a command did not do what it was for.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It cannot be run.
    #[error("run runsc")]
    Run(#[source] processes::Failure),
    /// It ended with these words.
    #[error("runsc {verb} failed: {reason}")]
    Failed {
        /// The command.
        verb: String,
        /// Its words, cleaned.
        reason: String,
    },
    /// It was killed.
    #[error(
        "runsc {verb} did not finish within {limit:?}: see runsc_timeouts, or debug_log for why"
    )]
    Late {
        /// The command.
        verb: String,
        /// How long it had.
        limit: Duration,
    },
    /// Something about its files.
    #[error("{0}")]
    Other(String),
}

impl From<Failure> for containerd_sandbox::error::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Late { .. } => Self::DeadlineExceeded(failure.to_string()),
            Failure::Other(text) => Self::FailedPrecondition(text),
            Failure::Failed { .. } => Self::internal("start the sandbox", failure),
            Failure::Run(error) => Self::internal("run runsc", error),
        }
    }
}

impl From<Failure> for containerd_task::error::Error {
    fn from(failure: Failure) -> Self {
        match &failure {
            Failure::Late { .. } => Self::DeadlineExceeded(failure.to_string()),
            Failure::Other(text) => Self::FailedPrecondition(text.clone()),
            Failure::Failed { verb, reason } => {
                // The image or the pod asks for a command that is not there.
                let theirs =
                    ["no such file or directory", "permission denied", "exec format error"];
                let theirs = theirs.iter().any(|words| reason.contains(words))
                    && reason.contains("starting sub-container");
                let text = format!("OCI runtime {verb} failed: runsc: {reason}");
                if theirs {
                    Self::InvalidArgument(text)
                } else {
                    Self::internal(format!("OCI runtime {verb} failed"), format!("runsc: {reason}"))
                }
            }
            Failure::Run(_) => Self::internal("run runsc", failure),
        }
    }
}

/// What is durable of a pod's sandbox.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Own {
    /// The program, as it was found.
    pub runsc: PathBuf,
    /// Its version.
    pub version: String,
    /// Global flags.
    pub args: Vec<String>,
    /// Which network.
    pub network: Network,
    /// Which platform, for people.
    pub platform: String,
    /// Id of the sandbox and of its root container to runsc.
    pub id: String,
    /// `linux.cgroupsPath` of the root container: where sentry and gofers are.
    pub cgroup: String,
    /// Containers have names of their own to runsc: [`Own::name`].
    pub own_names: bool,
    /// It waits for a checkpoint, or for a container without one.
    pub restore: bool,
    /// The sentry.
    pub sentry: Option<Identity>,
}

impl Own {
    /// What a container is to runsc and to the sentry.
    ///
    /// runsc takes the id of a command for the beginning of one, among the containers of all pods:
    /// `restore d` is for a sandbox `d07c…` if no other id begins so, and `start web` is refused
    /// while there is a `web2`. A name that ends with the sandbox's is the beginning of no other.
    /// Pods of a daemon that did not know this keep the ids that their containers have.
    pub fn name(&self, container: &str) -> String {
        match self.own_names {
            true => format!("{container}.{}", self.id),
            false => container.to_owned(),
        }
    }

    /// Whether gVisor asks systemd for cgroups.
    pub fn asks_systemd(&self) -> bool {
        self.args.iter().any(|arg| arg == "--systemd-cgroup")
    }
}

/// A program that was looked at.
#[derive(Debug, Clone)]
struct Known {
    path: PathBuf,
    changed: Option<SystemTime>,
    version: String,
}

/// Runs `runsc`.
#[derive(Debug)]
pub struct Runsc {
    parent: Parent,
    config: Live<Config>,
    /// Root of gVisor's own state; control sockets are in it.
    root: PathBuf,
    /// Path of this program for sandbox-parent.
    own_program: String,
    known: Mutex<Option<Known>>,
}

impl Runsc {
    /// With the configuration as it is at each call; gVisor's state goes to `root`.
    pub fn new(parent: Parent, config: Live<Config>, root: PathBuf, own_program: String) -> Self {
        Self { parent, config, root, own_program, known: Mutex::default() }
    }

    /// Who runs and keeps.
    pub fn parent(&self) -> &Parent {
        &self.parent
    }

    pub(crate) fn limits(&self) -> Limits {
        self.config.get().runsc_timeouts
    }

    /// Finds the program and asks for its version, once for each file.
    ///
    /// # Errors
    /// A text that says what is wrong and what helps.
    pub async fn find(&self) -> Result<(PathBuf, String), String> {
        let name = self.config.get().runsc.path.clone();
        let path = find_program(&name).ok_or_else(|| {
            format!(
                "program {} is not installed: install gVisor, or set runsc.path to where it is",
                name.display()
            )
        })?;
        let changed = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok();
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = known.as_ref().filter(|k| k.path == path && k.changed == changed) {
                return Ok((path, known.version.clone()));
            }
        }
        let shown = path.display();
        let mut command = tokio::process::Command::new(&path);
        command.arg("--version").stdin(std::process::Stdio::null()).kill_on_drop(true);
        let limit = self.limits().other;
        let output = tokio::time::timeout(limit, command.output())
            .await
            .map_err(|_| format!("{shown} --version did not answer within {limit:?}"))?
            .map_err(|error| format!("{shown} cannot be run: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().find_map(|line| line.strip_prefix("runsc version "));
        let version =
            version.map(|version| crate::urpc::clean(version.trim())).ok_or_else(|| {
                format!("{shown} --version names no version: runsc.path has to be gVisor's runsc")
            })?;
        if let Some(date) = date(&version).filter(|date| *date < OLDEST) {
            return Err(format!(
                "{shown} is gVisor of {date}, which is too old: install {OLDEST} or newer"
            ));
        }
        tracing::info!(path = %shown, version, "gVisor");
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(Known { path: path.clone(), changed, version: version.clone() });
        Ok((path, version))
    }

    /// Control socket of a sandbox.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.root.join(format!("runsc-{id}.sock"))
    }

    /// The running sandbox `id`.
    pub fn sentry(&self, id: &str) -> Sentry {
        Sentry::new(self.socket(id), self.limits().other)
    }

    /// Files that gVisor has of a container, or of all of a sandbox.
    fn state_files(&self, sandbox: &str, container: Option<&str>) -> Vec<PathBuf> {
        let tail = format!("_sandbox:{sandbox}.");
        let entries = std::fs::read_dir(&self.root).into_iter().flatten().flatten();
        entries
            .filter(|entry| {
                let name = entry.file_name();
                let name = name.to_str().unwrap_or_default();
                name.split_once(&tail)
                    .is_some_and(|(id, _)| container.is_none_or(|container| id == container))
            })
            .map(|entry| entry.path())
            .collect()
    }

    /// Removes gVisor's own records of a container, or of a whole sandbox that has ended.
    pub fn forget(&self, sandbox: &str, container: Option<&str>) {
        let mut files = match container {
            // What gVisor names them, without a look through the whole directory.
            Some(container) => ["state", "lock"]
                .map(|kind| self.root.join(format!("{container}_sandbox:{sandbox}.{kind}")))
                .to_vec(),
            None => self.state_files(sandbox, None),
        };
        if container.is_none() {
            files.push(self.socket(sandbox));
        }
        for file in files {
            if let Err(error) = std::fs::remove_file(&file)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(file = %file.display(), %error, "cannot be removed");
            }
        }
    }

    /// Removes gVisor's records of sandboxes that have ended and that no pod of `known` has. Nobody
    /// else uses our root of its state.
    pub fn forget_lost(&self, known: &[String]) {
        let entries = std::fs::read_dir(&self.root).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut lost: Vec<String> = names.filter_map(|name| sandbox_of(&name)).collect();
        lost.sort();
        lost.dedup();
        for sandbox in lost.iter().filter(|sandbox| !known.contains(sandbox)) {
            if std::os::unix::net::UnixStream::connect(self.socket(sandbox)).is_err() {
                tracing::info!(sandbox, "gVisor's records of a lost sandbox are removed");
                self.forget(sandbox, None);
            }
        }
    }

    /// Kills whatever sandbox-parent has of a pod: commands that an earlier daemon has started and
    /// that are still at work, and what they have made so far. All of them name a path below the
    /// pod's directory `dir`. Answers whether they have ended in time.
    ///
    /// # Errors
    /// When its processes cannot be listed.
    pub fn end_all(&self, dir: &Path, limit: Duration) -> kuasar_host::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let children = process::children(self.parent.pid())?;
            let mine = children.into_iter().filter(|child| process::names_dir(child.pid, dir));
            let mine: Vec<_> = mine.filter_map(Identity::open).collect();
            if mine.is_empty() {
                return Ok(true);
            }
            // What a killed one has made is sandbox-parent's then, and found by the next turn.
            for pidfd in &mine {
                let _ = process::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
            }
            for pidfd in &mine {
                let left = deadline.saturating_duration_since(Instant::now());
                if !process::pidfd_ended(pidfd.as_fd(), left)? {
                    return Ok(false);
                }
            }
        }
    }

    /// The gofer of a container, from gVisor's record of it.
    pub fn gofer(&self, sandbox: &str, container: &str) -> Option<Identity> {
        let value = self.state(sandbox, container)?;
        let pid = value.get("goferPid")?.as_u64().and_then(|pid| u32::try_from(pid).ok())?;
        Identity::of(pid)
    }

    /// Whether a container was started or restored, by gVisor's record of it.
    pub fn is_running(&self, sandbox: &str, container: &str) -> bool {
        let state = self.state(sandbox, container);
        let status = state.as_ref().and_then(|state| state.get("status")?.as_str());
        status == Some("running")
    }

    /// gVisor's record of a container.
    fn state(&self, sandbox: &str, container: &str) -> Option<serde_json::Value> {
        let file = self.root.join(format!("{container}_sandbox:{sandbox}.state"));
        serde_json::from_slice(&std::fs::read(file).ok()?).ok()
    }

    /// Starts the root container and with it the sandbox, or only makes them where they are to
    /// wait; answers the sentry's pid.
    ///
    /// # Errors
    /// Its words.
    pub async fn start_sandbox(&self, own: &Own, bundle: &Path) -> Result<u32, Failure> {
        let pid_file = bundle.join("sentry.pid");
        let mut words = match own.restore {
            true => vec!["create".to_owned()],
            false => vec!["run".to_owned(), "--detach".into()],
        };
        words.extend(["--bundle".into(), text(bundle)?]);
        words.extend(["--pid-file".into(), text(&pid_file)?, own.id.clone()]);
        self.run(own, bundle, words, [None, None, None], self.limits().create).await?;
        pid(&pid_file)
    }

    /// Runs a container without a terminal in the sandbox.
    ///
    /// # Errors
    /// Its words.
    pub async fn run_container(
        &self,
        own: &Own,
        bundle: &Path,
        id: &str,
        streams: [Option<BorrowedFd<'_>>; 3],
    ) -> Result<(), Failure> {
        let words =
            vec!["run".into(), "--detach".into(), "--bundle".into(), text(bundle)?, id.into()];
        self.run(own, bundle, words, streams, self.limits().create).await
    }

    /// Lets a container go on from a checkpoint, or the sandbox itself by its root container.
    ///
    /// # Errors
    /// Its words.
    pub async fn restore(
        &self,
        own: &Own,
        bundle: &Path,
        id: &str,
        image: &Path,
        streams: [Option<BorrowedFd<'_>>; 3],
    ) -> Result<(), Failure> {
        let mut words = vec!["restore".to_owned(), "--detach".into(), "--bundle".into()];
        words.extend([text(bundle)?, "--image-path".into(), text(image)?, id.into()]);
        self.run(own, bundle, words, streams, self.limits().create).await
    }

    /// Makes a container with a terminal, whose master comes to the socket `console`.
    ///
    /// # Errors
    /// Its words.
    pub async fn create_container(
        &self,
        own: &Own,
        bundle: &Path,
        id: &str,
        console: &Path,
    ) -> Result<(), Failure> {
        let mut words = vec!["create".to_owned(), "--bundle".into(), text(bundle)?];
        words.extend(["--console-socket".into(), text(console)?, id.into()]);
        self.run(own, bundle, words, [None, None, None], self.limits().create).await
    }

    /// Lets a container that was created run.
    ///
    /// # Errors
    /// Its words.
    pub async fn start_container(&self, own: &Own, bundle: &Path, id: &str) -> Result<(), Failure> {
        let words = vec!["start".into(), id.into()];
        self.run(own, bundle, words, [None, None, None], self.limits().create).await
    }

    /// Any other command.
    ///
    /// # Errors
    /// Its words.
    pub async fn command(&self, own: &Own, dir: &Path, words: Vec<String>) -> Result<(), Failure> {
        self.run(own, dir, words, [None, None, None], self.limits().create).await
    }

    async fn run(
        &self,
        own: &Own,
        dir: &Path,
        words: Vec<String>,
        streams: [Option<BorrowedFd<'_>>; 3],
        limit: Duration,
    ) -> Result<(), Failure> {
        let verb = words.first().cloned().unwrap_or_default();
        // What brings up the sandbox's network: any of these, of the root container.
        let masked = words.last() == Some(&own.id)
            && matches!(verb.as_str(), "run" | "create" | "start" | "restore")
            && own.network == Network::Sandbox
            && date(&own.version).is_some_and(|date| date < KNOWS_NETNS);
        let log = dir.join("engine.log");
        let mut argv = Vec::new();
        if masked {
            argv.extend([self.own_program.clone(), MASKED.to_owned()]);
        }
        argv.push(text(&own.runsc)?);
        argv.extend(["--root".into(), text(&self.root)?]);
        argv.extend(["--log".into(), text(&log)?, "--log-format".into(), "json".into()]);
        argv.extend(own.args.iter().cloned());
        argv.extend(words);
        let processes: Arc<dyn Processes> = Arc::new(self.parent.clone());
        match command::run(&processes, argv, streams.to_vec(), &log, limit).await {
            Ok(_) => Ok(()),
            Err(Unfinished::Failed(reason)) => Err(Failure::Failed { verb, reason }),
            Err(Unfinished::Late(limit)) => Err(Failure::Late { verb, limit }),
            Err(Unfinished::Spawn(error) | Unfinished::Wait(error)) => Err(Failure::Run(error)),
        }
    }
}

/// The sandbox that a file in gVisor's root belongs to: `<container>_sandbox:<sandbox>.state` and
/// `.lock`.
fn sandbox_of(name: &str) -> Option<String> {
    let (_, tail) = name.rsplit_once("_sandbox:")?;
    let sandbox = tail.strip_suffix(".state").or_else(|| tail.strip_suffix(".lock"))?;
    Some(sandbox.to_owned())
}

fn text(path: &Path) -> Result<String, Failure> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Failure::Other(format!("path {} is not UTF-8", path.display())))
}

fn pid(file: &Path) -> Result<u32, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::Other(format!("runsc left no {}: {error}", file.display())))?;
    let pid = text.trim().parse::<u32>().ok().filter(|pid| *pid > 0);
    pid.ok_or_else(|| Failure::Other(format!("runsc wrote no pid: {:.40?}", text.trim())))
}

/// Date of a release, as the number YYYYMMDD: `release-20240729.0`, `0.0~20240729.0`. `None` for
/// one that was built by hand.
pub fn date(version: &str) -> Option<u32> {
    let digits = version.split(|c: char| !c.is_ascii_digit());
    digits.filter(|part| part.len() == 8).find_map(|part| part.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_its_sandbox() {
        assert_eq!(sandbox_of("web.d07c_sandbox:d07c.state").as_deref(), Some("d07c"));
        assert_eq!(sandbox_of("d07c_sandbox:d07c.lock").as_deref(), Some("d07c"));
        assert_eq!(sandbox_of("runsc-d07c.sock"), None);
    }

    #[test]
    fn a_version_has_a_date() {
        assert_eq!(date("release-20240729.0"), Some(20240729));
        assert_eq!(date("0.0~20240729.0"), Some(20240729));
        assert_eq!(date("release-20260817.0-3-g3c5eee17d"), Some(20260817));
        assert_eq!(date("VERSION_MISSING"), None);
    }

    #[test]
    fn no_name_of_a_container_begins_another() {
        let own = |id: &str| Own { id: id.into(), own_names: true, ..Own::default() };
        let (one, two) = (own("d07c1f2e3a4b5c6d"), own("e07c1f2e3a4b5c6d"));
        let ids = ["d", "d0", "web", "web2"];
        let mut all: Vec<String> = ids.iter().map(|id| one.name(id)).collect();
        all.extend(ids.iter().map(|id| two.name(id)));
        all.extend([one.id.clone(), two.id]);
        for a in &all {
            let begun: Vec<_> = all.iter().filter(|b| b.starts_with(a.as_str())).collect();
            assert_eq!(begun.len(), 1, "{a}: {begun:?}");
        }
        let old: Own = serde_json::from_value(serde_json::json!({ "id": "d07c" })).unwrap();
        assert_eq!(old.name("web"), "web");
    }

    #[test]
    fn what_an_image_lacks_is_not_the_nodes_fault() {
        let failed = |reason: &str| Failure::Failed { verb: "run".into(), reason: reason.into() };
        let code = |reason: &str| containerd_task::error::Error::from(failed(reason)).code();
        let theirs = "starting container: starting sub-container [/x]: failed to load /x: no such file or directory";
        assert_eq!(
            code(theirs),
            containerd_task::error::Error::InvalidArgument(String::new()).code()
        );
        assert_ne!(code("cannot load sandbox"), code(theirs));
    }
}
