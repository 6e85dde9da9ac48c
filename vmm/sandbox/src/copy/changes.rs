//! Tells when a volume of kubelet's changes: one inotify instance for the daemon, because hosts allow few
//! of them to a user, with a watch for each directory.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kuasar_host::safe_path::proc_path;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// Who waits for one directory.
type Waiting = Vec<Weak<Notify>>;

/// The changes that somebody waits for.
#[derive(Debug)]
struct Changes {
    inotify: Inotify,
    waiting: Mutex<HashMap<WatchDescriptor, Waiting>>,
    /// Who reads them.
    reader: OnceLock<AbortHandle>,
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.reader.get().into_iter().for_each(AbortHandle::abort);
    }
}

/// A directory that is watched, until this is dropped.
#[derive(Debug)]
pub struct Watched {
    changes: Arc<Changes>,
    watch: WatchDescriptor,
    /// Each has its own, and keeps one change that came while nobody waited.
    told: Arc<Notify>,
}

impl Watched {
    /// Watches a directory. To be called within the runtime that waits for it.
    ///
    /// # Errors
    /// Of the kernel, such as too many watches (`fs.inotify.max_user_watches`).
    pub fn new(dir: BorrowedFd<'_>) -> std::io::Result<Self> {
        static ALL: OnceLock<Mutex<Weak<Changes>>> = OnceLock::new();
        let all = ALL.get_or_init(Mutex::default);
        let changes = {
            let mut known = all.lock().unwrap_or_else(PoisonError::into_inner);
            match known.upgrade() {
                Some(changes) => changes,
                None => {
                    let changes = Changes::begin()?;
                    *known = Arc::downgrade(&changes);
                    changes
                }
            }
        };
        let told = Arc::new(Notify::new());
        // Before the lock is released: a watch that ends now must not end ours.
        let mut waiting = changes.waiting();
        let flags = AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ONLYDIR;
        let watch = changes.inotify.add_watch(&proc_path(dir), flags)?;
        waiting.entry(watch).or_default().push(Arc::downgrade(&told));
        drop(waiting);
        Ok(Self { changes, watch, told })
    }

    /// Waits for a change since the last call.
    pub async fn changed(&self) {
        self.told.notified().await;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut waiting = self.changes.waiting();
        let Some(all) = waiting.get_mut(&self.watch) else { return };
        all.retain(|one| one.strong_count() > 0 && one.as_ptr() != Arc::as_ptr(&self.told));
        if all.is_empty() {
            waiting.remove(&self.watch);
            // Of a directory that is gone there is none.
            let _ = self.changes.inotify.rm_watch(self.watch);
        }
    }
}

impl Changes {
    fn begin() -> std::io::Result<Arc<Self>> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let seen: OwnedFd = inotify.as_fd().try_clone_to_owned()?;
        // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
        let seen = unsafe { AsyncFd::register(seen) }?;
        let changes =
            Arc::new(Self { inotify, waiting: Mutex::default(), reader: OnceLock::new() });
        let told = Arc::downgrade(&changes);
        let reader = tokio::spawn(async move {
            while let Ok(mut ready) = seen.readable().await {
                let Some(changes) = told.upgrade() else { return };
                changes.tell();
                ready.clear_ready();
            }
        });
        let _ = changes.reader.set(reader.abort_handle());
        Ok(changes)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        while let Ok(events) = self.inotify.read_events() {
            let waiting = self.waiting();
            for event in events {
                // Some were lost: anything may have changed.
                let lost = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                let those = waiting.iter().filter(|(watch, _)| lost || **watch == event.wd);
                let all = those.flat_map(|(_, all)| all).filter_map(Weak::upgrade);
                all.for_each(|one| one.notify_one());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn each_who_waits_is_told_and_what_came_before_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let opened = std::fs::File::open(dir.path()).unwrap();
        let (one, two) =
            (Watched::new(opened.as_fd()).unwrap(), Watched::new(opened.as_fd()).unwrap());
        std::os::unix::fs::symlink("..1", dir.path().join("..data_tmp")).unwrap();
        std::fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        let soon = |what: &Watched| {
            let told = what.told.clone();
            async move { tokio::time::timeout(Duration::from_secs(10), told.notified()).await }
        };
        soon(&one).await.unwrap();
        // The other one goes on when one ends.
        drop(one);
        soon(&two).await.unwrap();
        while tokio::time::timeout(Duration::from_millis(50), two.changed()).await.is_ok() {}
        std::fs::write(dir.path().join("new"), "").unwrap();
        soon(&two).await.unwrap();
        assert_eq!(two.changes.waiting().len(), 1);
        let changes = two.changes.clone();
        drop(two);
        assert!(changes.waiting().is_empty());
    }
}
