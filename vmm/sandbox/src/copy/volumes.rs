//! The copied volumes of one pod's containers, from Create to Delete.
//!
//! What is copied, followed or brought back is opened once. The descriptors of volumes that are needed
//! later are kept by sandbox-parent, so the next daemon goes on with the very same files and directories.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_task::error::{Error, Result};
use containerd_task::host::blocking;
use containerd_task::runtime::Keeper;
use kuasar_host::safe_path::proc_path;
use protobuf::Message;
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;
use vmm_common::guest as wire;

use super::changes::Watched;
use super::{Copied, CopyConfig, Rule, Wanted, is_whole, read};
use crate::guest::{Guest, GuestError, service};

/// kubelet changes several names of a volume one after the other: it is read when it has been quiet for so
/// long.
const QUIET: Duration = Duration::from_millis(50);
/// Changes that never end are looked at all the same.
const LOUD: Duration = Duration::from_secs(1);
/// After this a volume is carried again that could not be.
const AGAIN: Duration = Duration::from_secs(10);

/// What was carried last.
type Sum = [u8; 32];

/// The copied volumes of a pod.
pub(crate) struct Volumes {
    pod: String,
    guest: Arc<Guest>,
    keeper: Arc<dyn Keeper>,
    config: CopyConfig,
    /// Who follows the volumes of a container.
    followers: Mutex<HashMap<String, Vec<JoinHandle<()>>>>,
}

/// Prefix of what sandbox-parent keeps for a container's volumes.
fn prefix(container: &str) -> String {
    format!("copy/{container}/")
}

impl Volumes {
    /// Of a pod with this guest.
    pub fn new(pod: &str, guest: Arc<Guest>, keeper: Arc<dyn Keeper>, config: CopyConfig) -> Self {
        Self { pod: pod.into(), guest, keeper, config, followers: Mutex::default() }
    }

    fn followers(&self) -> MutexGuard<'_, HashMap<String, Vec<JoinHandle<()>>>> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the volumes of a new container, one after the other.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] for one that is too large, or has what cannot be copied; the guest's.
    pub async fn copy(self: &Arc<Self>, container: &str, wanted: Vec<Wanted>) -> Result<()> {
        for (volume, one) in (0..).zip(wanted) {
            let Wanted { source, path, rule } = one;
            let refused = |why: &dyn std::fmt::Display| {
                Error::FailedPrecondition(format!(
                    "volume {path:.200?} {why}: it would have to be copied into this pod's machine, \
                     which has no share; use a smaller volume or volumeMode: Block, raise the limit, \
                     or use a runtime with share = \"virtiofs\""
                ))
            };
            let source = Arc::new(source);
            let (entries, _) = self.read(&source).await?.map_err(|error| refused(&error))?;
            let first = read::messages(container, volume, entries);
            let sum = sum(&first);
            self.put(first).await?;
            if rule == Rule::Once {
                continue;
            }
            let name = format!("{}m{volume}", prefix(container));
            self.keeper.keep(&name, source.as_fd()).await?;
            if rule == Rule::Follow {
                self.follow(container, volume, source, Some(sum));
            }
        }
        Ok(())
    }

    /// Goes on with what an earlier daemon has followed.
    pub async fn resume(self: &Arc<Self>, container: &str, copied: &[Copied]) {
        for one in copied.iter().filter(|one| one.rule == Rule::Follow) {
            let name = format!("{}m{}", prefix(container), one.volume);
            match self.keeper.fetch(&name).await {
                Ok(Some(source)) => self.follow(container, one.volume, Arc::new(source), None),
                other => {
                    let error = other.err().map(|error| error.chain());
                    tracing::warn!(sandbox = self.pod, container, volume = ?one.path, error,
                        "changes of a volume are not seen any more");
                }
            }
        }
    }

    /// Brings back what a container that has ended has left in its termination log, and nothing else.
    pub async fn bring_back(&self, container: &str, copied: &[Copied]) {
        for one in copied.iter().filter(|one| one.rule == Rule::Back) {
            match self.bring_one(container, one.volume).await {
                // Its machine has ended, and what it had to say with it.
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => tracing::warn!(sandbox = self.pod, container, volume = ?one.path,
                    error = %error.chain(), "no termination log"),
            }
        }
    }

    async fn bring_one(&self, container: &str, volume: u32) -> Result<()> {
        let most = self.config.termination_log_bytes;
        let name = format!("{}m{volume}", prefix(container));
        let Some(file) = self.keeper.fetch(&name).await? else { return Ok(()) };
        let question = wire::TakeFileRequest {
            container: container.into(),
            volume,
            max_bytes: most,
            ..Default::default()
        };
        let answer: wire::TakeFileResponse =
            self.guest.call_again(service::GUEST, "TakeFile", &question).await?;
        if answer.data.len() as u64 > most {
            return Err(Error::ResourceExhausted(format!(
                "the guest answers {} bytes where it was asked for {most}",
                answer.data.len()
            )));
        }
        // The very file that was opened at Create: no name is looked at.
        blocking(move || write(&file, &answer.data)).await
    }

    /// Ends what is done for a container, and removes its copies.
    ///
    /// # Errors
    /// When sandbox-parent is lost.
    pub async fn remove(&self, container: &str) -> Result<()> {
        let followers = self.followers().remove(container).unwrap_or_default();
        followers.iter().for_each(JoinHandle::abort);
        let question = wire::DropFilesRequest { container: container.into(), ..Default::default() };
        let dropped: std::result::Result<wire::DropFilesResponse, _> =
            self.guest.call_again(service::GUEST, "DropFiles", &question).await;
        match dropped {
            Ok(_) | Err(GuestError::Gone) => {}
            // A guest that does not answer holds up no engine; its memory is the pod's own.
            Err(error) => {
                tracing::warn!(sandbox = self.pod, container, %error, "copies stay in the guest");
            }
        }
        self.keeper.forget(&prefix(container)).await
    }

    /// What there is to copy, and whether it is all there.
    async fn read(
        &self,
        source: &Arc<OwnedFd>,
    ) -> Result<read::Result<(Vec<wire::FileEntry>, bool)>> {
        let (source, config) = (source.clone(), self.config.clone());
        blocking(move || {
            Ok(read::read(&source, &config).map(|entries| (entries, is_whole(&source))))
        })
        .await
    }

    async fn put(
        &self,
        messages: Vec<wire::PutFilesRequest>,
    ) -> std::result::Result<(), GuestError> {
        for message in messages {
            let _: wire::PutFilesResponse =
                self.guest.call(service::GUEST, "PutFiles", &message).await?;
        }
        Ok(())
    }

    /// Follows a volume for as long as its container is there.
    fn follow(
        self: &Arc<Self>,
        container: &str,
        volume: u32,
        source: Arc<OwnedFd>,
        carried: Option<Sum>,
    ) {
        let (volumes, id) = (Arc::downgrade(self), container.to_owned());
        let gone = self.guest.clone();
        let follower = async move {
            let watched = match Watched::new(source.as_fd()) {
                Ok(watched) => watched,
                Err(error) => {
                    tracing::warn!(container = id, volume, %error,
                        "changes of a volume are not seen");
                    return;
                }
            };
            let mut carried = carried;
            // What changed before this began is seen as well.
            loop {
                let Some(volumes) = volumes.upgrade() else { return };
                let done = volumes.carry(&id, volume, &source, &mut carried).await;
                drop(volumes);
                let wait = async {
                    match done {
                        true => watched.changed().await,
                        false => drop(tokio::time::timeout(AGAIN, watched.changed()).await),
                    }
                };
                tokio::select! {
                    biased;
                    () = gone.gone() => return,
                    () = wait => {}
                }
                let quiet =
                    async { while tokio::time::timeout(QUIET, watched.changed()).await.is_ok() {} };
                let _ = tokio::time::timeout(LOUD, quiet).await;
            }
        };
        let follower = tokio::spawn(follower);
        self.followers().entry(container.to_owned()).or_default().push(follower);
    }

    /// Carries a volume into the guest that is not as it was. `false`: to be tried again.
    async fn carry(
        &self,
        container: &str,
        volume: u32,
        source: &Arc<OwnedFd>,
        carried: &mut Option<Sum>,
    ) -> bool {
        let read = match self.read(source).await {
            // kubelet takes the volume away: the container keeps what it has.
            Ok(Ok((_, false))) => return true,
            Ok(Ok((entries, true))) => Ok(entries),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.chain()),
        };
        let put = match read {
            Ok(entries) => {
                let messages = read::messages(container, volume, entries);
                let new = sum(&messages);
                if *carried == Some(new) {
                    return true;
                }
                match self.put(messages).await {
                    Ok(()) => {
                        *carried = Some(new);
                        tracing::debug!(
                            sandbox = self.pod,
                            container,
                            volume,
                            "a volume is renewed"
                        );
                        return true;
                    }
                    Err(GuestError::Gone) => return true,
                    Err(error) => error.to_string(),
                }
            }
            Err(why) => why,
        };
        tracing::warn!(
            sandbox = self.pod,
            container,
            volume,
            error = put,
            "a change of a volume is not in the guest: it has what it had"
        );
        false
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        let followers = self.followers.get_mut().unwrap_or_else(PoisonError::into_inner);
        followers.values().flatten().for_each(JoinHandle::abort);
    }
}

fn sum(messages: &[wire::PutFilesRequest]) -> Sum {
    let mut hash = Sha256::new();
    for message in messages {
        // Of what we have made ourselves.
        hash.update(message.write_to_bytes().unwrap_or_default());
    }
    hash.finalize().into()
}

/// Replaces what is in a file that is open (`O_PATH`).
fn write(file: &OwnedFd, data: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::internal("write a termination log", error);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let mut file: File = options.open(proc_path(file.as_fd())).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::FailedPrecondition("a termination log is no file any more".into()));
    }
    file.set_len(0).and_then(|()| file.write_all(data)).map_err(failed)
}
