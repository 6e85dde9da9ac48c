//! Pods that go on from a checkpoint.
//!
//! A checkpoint is of a whole sandbox, and gVisor restores it into one that was created and never
//! ran: a sentry that has begun to run refuses. containerd names a checkpoint when it creates a
//! container, which is after the pod's start. So a pod that is to go on from one says so
//! ([`crate::config::Flags::restore`]), and its sandbox waits. The first container that starts
//! decides: from a checkpoint, and the sandbox is told of it; without one, and the sandbox runs.
//! The sentry goes on when the last container of the checkpoint is there; it knows them by the
//! name in their specs, or by their order.
//!
//! **An image is not to be trusted.** It has to be a flat directory of plain files; of its content
//! the count of containers is read here, bounded. The rest is read by the sentry, which confines
//! itself before.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use containerd_task::error::{Error, Result};
use containerd_task::host::{blocking, internal};
use containerd_task::runtime::{AnyMessage, CreateContainer, ProcessIo, Spawned};
use kuasar_host::{record, safe_path};
use kuasar_oci::observer::Observer;
use kuasar_pod::Metrics;
use sandbox_parent::client::Parent;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::ANNOTATION_PREFIX;
use crate::runtime::{Containers, Meta, save};

/// The file of an image that begins with what it is.
const STATE_FILE: &str = "checkpoint.img";
/// Its first bytes.
const MAGIC: &[u8; 8] = b"gVisorSF";
/// Most bytes of a checkpoint's words about itself: later releases have all specs in them.
const MOST: u64 = 16 << 20;
/// Most containers that one may have.
const CONTAINERS: usize = 4096;

/// How far the restore of a pod is; on disk before each step.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Progress {
    /// Containers that the checkpoint has beside the sandbox's own.
    containers: usize,
    /// Those of them that are there, by their new ids.
    done: Vec<String>,
}

impl Progress {
    fn file(pod: &Path) -> PathBuf {
        pod.join("restore.json")
    }

    fn load(pod: &Path) -> Result<Option<Self>> {
        let text = match std::fs::read(Self::file(pod)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::internal("read restore.json", error)),
        };
        let progress = serde_json::from_slice(&text);
        progress.map(Some).map_err(|error| Error::internal("read restore.json", error))
    }

    fn save(&self, pod: &Path) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::internal("write restore.json", error))?;
        record::write_file(&Self::file(pod), &text, 0o600).map_err(internal("write restore.json"))
    }

    fn is_whole(&self) -> bool {
        self.done.len() >= self.containers
    }
}

/// How many containers an image has beside the sandbox's own.
///
/// # Errors
/// [`Error::InvalidArgument`] for what is no checkpoint of gVisor.
fn containers(image: &Path) -> Result<usize> {
    let bad = |words: &str| {
        Error::InvalidArgument(format!("{}: {words}", image.join(STATE_FILE).display()))
    };
    let root = kuasar_oci::checkpoint::open(image)?;
    let file = safe_path::open_beneath(root.as_fd(), Path::new(STATE_FILE), libc::O_RDONLY, 0)
        .map_err(|error| bad(&format!("no checkpoint of gVisor: {error}")))?;
    let mut file = std::fs::File::from(file);
    let (mut magic, mut length) = ([0; 8], [0; 8]);
    let head = file.read_exact(&mut magic).and_then(|()| file.read_exact(&mut length));
    if head.is_err() || magic != *MAGIC {
        return Err(bad("no checkpoint of gVisor"));
    }
    let length = u64::from_be_bytes(length);
    if length > MOST {
        return Err(bad("its description of itself is too long"));
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(|error| bad(&error.to_string()))?;
    let said: Value =
        serde_json::from_slice(&text).map_err(|_| bad("its description of itself is damaged"))?;
    let count = match said.get("container_count") {
        // As gVisor itself takes it.
        None => Some(1),
        Some(count) => count.as_str().and_then(|count| count.parse().ok()),
    };
    match count {
        Some(count @ 1..=CONTAINERS) => Ok(count - 1),
        _ => Err(bad("its number of containers is none")),
    }
}

impl Containers {
    /// Prepares a container that is to go on from a checkpoint.
    pub(crate) async fn prepare_restored(&self, request: &CreateContainer) -> Result<()> {
        if !self.own.restore {
            return Err(Error::FailedPrecondition(format!(
                "the sandbox of this pod runs already, and gVisor restores into none that does: \
                 make the pod with annotation {ANNOTATION_PREFIX}restore = \"true\", which \
                 allowed_annotations has to have"
            )));
        }
        if request.terminal {
            return Err(Error::Unimplemented(
                "gVisor cannot restore a container that has a terminal".into(),
            ));
        }
        let checkpoint = request.checkpoint.clone();
        let mut meta = Meta { handle: Parent::new_cookie(), checkpoint, ..Meta::default() };
        let (pod, own, wanted) = (self.pod.clone(), self.own.clone(), request.clone());
        blocking(move || {
            if containers(meta.checkpoint.as_deref().unwrap_or(Path::new("")))? == 0 {
                return Err(Error::InvalidArgument("the checkpoint has no container".into()));
            }
            Self::prepare(&pod, &own, &wanted, &mut meta)
        })
        .await
    }

    /// Lets a container go on from its checkpoint, as soon as the others of it are there.
    pub(crate) async fn restore_inner(&self, id: &str, io: ProcessIo) -> Result<Spawned> {
        let mut meta = self.meta(id)?;
        let image = meta.checkpoint.clone().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {id} is from no checkpoint"))
        })?;
        let ProcessIo::Streams { stdin, stdout, stderr } = &io else {
            return Err(Error::internal("restore", "a container with a terminal was prepared"));
        };
        let streams = [stdin, stdout, stderr].map(|fd| fd.as_ref().map(AsFd::as_fd));
        let begun = Instant::now();
        let (exit, name) = (self.expect(id, None), self.name(id));
        {
            let _only = self.root.lock().await;
            let mut progress = self.begin_restore(&image).await?;
            if progress.is_whole() && !progress.done.iter().any(|done| done == id) {
                return Err(Error::FailedPrecondition(format!(
                    "all containers of the checkpoint are there already: {}",
                    progress.done.len()
                )));
            }
            // A daemon that was killed may have come as far as this.
            if !self.runsc.is_running(&self.own.id, &name) {
                let dir = self.pod.container(id);
                self.runsc.restore(&self.own, &dir, &name, &image, streams).await?;
            }
            if !progress.done.iter().any(|done| done == id) {
                progress.done.push(id.to_owned());
            }
            progress.save(&self.pod.dir)?;
        }
        Metrics("gvisor").phase("engine_restore", begun.elapsed());
        meta.started = true;
        meta.gofer = self.runsc.gofer(&self.own.id, &name);
        save(&self.pod.container(id), &meta)?;
        self.follow(id, meta.handle).await?;
        Ok(Spawned { pid: self.sentry_pid(), handle: meta.handle, terminal: None, exit })
    }

    /// The sandbox has been told of its checkpoint when this is done.
    async fn begin_restore(&self, image: &Path) -> Result<Progress> {
        let waits = !self.runsc.is_running(&self.own.id, &self.own.id);
        let progress = match Progress::load(&self.pod.dir)? {
            Some(progress) => progress,
            None if waits => {
                let image = image.to_owned();
                let containers = blocking(move || containers(&image)).await?;
                let progress = Progress { containers, done: Vec::new() };
                progress.save(&self.pod.dir)?;
                progress
            }
            None => {
                return Err(Error::FailedPrecondition(
                    "the sandbox runs already, because a container without a checkpoint was \
                     started first: containers with one have to come before"
                        .into(),
                ));
            }
        };
        if waits {
            let root = self.pod.dir.join("root");
            let none = [None, None, None];
            self.runsc.restore(&self.own, &root, &self.own.id, image, none).await?;
        }
        Ok(progress)
    }

    /// A container that is from no checkpoint wants a sandbox that runs.
    pub(crate) async fn wake(&self) -> Result<()> {
        if !self.own.restore {
            return Ok(());
        }
        let _only = self.root.lock().await;
        match Progress::load(&self.pod.dir)? {
            Some(progress) if !progress.is_whole() => Err(Error::FailedPrecondition(format!(
                "{} of {} containers of the checkpoint are there: others have to wait for all",
                progress.done.len(),
                progress.containers
            ))),
            Some(_) => Ok(()),
            None if self.runsc.is_running(&self.own.id, &self.own.id) => Ok(()),
            None => {
                let root = self.pod.dir.join("root");
                Ok(self.runsc.start_container(&self.own, &root, &self.own.id).await?)
            }
        }
    }

    /// Writes a checkpoint of the whole pod.
    pub(crate) async fn checkpoint_pod(
        &self,
        container: &str,
        path: &Path,
        options: Option<AnyMessage>,
    ) -> Result<()> {
        self.meta(container)?;
        self.wake().await?;
        let (options, image) = kuasar_oci::checkpoint::asked(path, options)?;
        let image = image.to_str().filter(|image| image.starts_with('/')).ok_or_else(|| {
            Error::InvalidArgument(format!("{}: not an absolute path", image.display()))
        })?;
        let mut words = vec!["checkpoint".to_owned(), "--image-path".into(), image.into()];
        if !options.exit {
            words.push("--leave-running".into());
        }
        words.push(self.own.id.clone());
        Ok(self.runsc.command(&self.own, &self.pod.container(container), words).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(head: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(STATE_FILE), head).unwrap();
        dir
    }

    fn head(text: &str) -> Vec<u8> {
        let length = (text.len() as u64).to_be_bytes();
        [MAGIC.as_slice(), &length, text.as_bytes(), b"the rest"].concat()
    }

    #[test]
    fn an_image_tells_how_many_containers_it_has() {
        let count = |text: &str| containers(image(&head(text)).path());
        assert_eq!(count(r#"{"container_count":"3","x":"y"}"#).unwrap(), 2);
        assert_eq!(count(r#"{"container_count":"1"}"#).unwrap(), 0);
        assert_eq!(count("{}").unwrap(), 0);
    }

    #[test]
    fn an_image_that_is_none_is_refused() {
        let long = [MAGIC.as_slice(), &u64::MAX.to_be_bytes()].concat();
        let bad = [
            b"".to_vec(),
            b"gVisor".to_vec(),
            b"no gVisor and long enough".to_vec(),
            long,
            head("{"),
            head(r#"{"container_count":"0"}"#),
            head(r#"{"container_count":"-1"}"#),
            head(r#"{"container_count":"99999999"}"#),
            head(r#"{"container_count":3}"#),
        ];
        for bytes in bad {
            let answer = containers(image(&bytes).path());
            assert!(matches!(answer, Err(Error::InvalidArgument(_))), "{bytes:?}: {answer:?}");
        }
        let dir = image(&head("{}"));
        std::os::unix::fs::symlink("/etc/shadow", dir.path().join("pages.img")).unwrap();
        assert!(matches!(containers(dir.path()), Err(Error::InvalidArgument(_))));
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(containers(empty.path()), Err(Error::InvalidArgument(_))));
        assert!(matches!(containers(Path::new("relative")), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn progress_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Progress::load(dir.path()).unwrap(), None);
        let mut progress = Progress { containers: 2, done: vec!["a".into()] };
        progress.save(dir.path()).unwrap();
        assert_eq!(Progress::load(dir.path()).unwrap().as_ref(), Some(&progress));
        assert!(!progress.is_whole());
        progress.done.push("b".into());
        assert!(progress.is_whole());
    }
}
