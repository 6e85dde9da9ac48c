//! Compiled code on disk.
//!
//! An entry is a file `<name>.cwasm`, and beside it `<name>.seal` ([`crate::verify`]). The name has
//! the module's digest and everything that compiled code depends on, so that an entry is never
//! wrong, only missing. It is used after its content was read and its seal compared; as long as
//! this process lives and the file has not changed since, that is not done again.
//!
//! Writers work in files of their own, which are renamed; the two renames of one entry are made
//! under a lock, so that two programs (the daemon and `precompile`) may write at the same time.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};

use crate::verify::{Identity, Key, Sum, digest};

const CODE: &str = "cwasm";
const SEAL: &str = "seal";
/// Files of writers that have ended without cleaning up are removed after this time.
const ABANDONED: Duration = Duration::from_secs(3600);
/// How often the time of an entry's last use is written down.
const TOUCH: Duration = Duration::from_secs(60);
/// Largest compiled code, as a bound for reading it.
const MAX: u64 = 4 << 30;

/// An open cache.
pub struct Cache {
    dir: PathBuf,
    key: Key,
    verified: Mutex<HashMap<String, (Identity, SystemTime)>>,
}

/// Code that is being written.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    /// Open for writing.
    pub file: File,
}

impl Drop for Draft {
    fn drop(&mut self) {
        // It is gone already when it was committed.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

fn open(path: &Path) -> std::io::Result<Option<File>> {
    match private().read(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn other(text: String) -> std::io::Error {
    std::io::Error::other(text)
}

impl Cache {
    /// Opens the cache in `dir`, or makes it.
    ///
    /// # Errors
    /// When the directory cannot be made or is not this user's alone.
    pub fn open(dir: &Path) -> std::io::Result<Self> {
        kuasar_host::record::private_dir(dir).map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            other(format!("{error}: {}", cause.unwrap_or_default()))
        })?;
        let cache = Self { key: key(dir)?, dir: dir.to_owned(), verified: Mutex::default() };
        cache.clear_abandoned();
        Ok(cache)
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<String, (Identity, SystemTime)>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: &str, kind: &str) -> PathBuf {
        self.dir.join(format!("{name}.{kind}"))
    }

    /// An entry that was verified, and has not changed since; costs little.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn known(&self, name: &str) -> std::io::Result<Option<File>> {
        let Some((seen, used)) = self.verified().get(name).cloned() else { return Ok(None) };
        let Some(file) = open(&self.path(name, CODE))? else { return Ok(None) };
        if Identity::of(&file)? != seen {
            return Ok(None);
        }
        if used.elapsed().is_ok_and(|since| since > TOUCH) {
            self.used(name, seen);
        }
        Ok(Some(file))
    }

    /// An entry, if there is one that is as it was written. Any other is removed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn get(&self, name: &str) -> std::io::Result<Option<File>> {
        let path = self.path(name, CODE);
        let Some(file) = open(&path)? else { return Ok(None) };
        let identity = Identity::of(&file)?;
        let sealed = self.sealed(name)?;
        let content = digest(&file, MAX)?;
        if sealed != Some(self.key.seal(name, &content)) || Identity::of(&file)? != identity {
            tracing::warn!(
                file = %path.display(),
                "compiled code is not as it was written: it is removed, and compiled again"
            );
            self.remove(name);
            return Ok(None);
        }
        self.used(name, identity);
        Ok(Some(file))
    }

    fn sealed(&self, name: &str) -> std::io::Result<Option<Sum>> {
        let mut bytes = Sum::default();
        match private().read(true).open(self.path(name, SEAL)) {
            Ok(mut file) => Ok(file.read_exact(&mut bytes).is_ok().then_some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes down that an entry is used: its seal's time is what [`Cache::shrink`] goes by.
    fn used(&self, name: &str, identity: Identity) {
        let now = SystemTime::now();
        // It only decides what is removed first.
        if let Ok(file) = private().write(true).open(self.path(name, SEAL)) {
            let _ = file.set_modified(now);
        }
        self.verified().insert(name.to_owned(), (identity, now));
    }

    fn remove(&self, name: &str) {
        self.verified().remove(name);
        for kind in [CODE, SEAL] {
            // What cannot be removed is found wanting again.
            let _ = std::fs::remove_file(self.path(name, kind));
        }
    }

    /// A file for new code.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn draft(&self) -> std::io::Result<Draft> {
        let unique = kuasar_oci::processes::new_cookie();
        let path = self.dir.join(format!("{unique:016x}.draft"));
        let file = private().read(true).write(true).create_new(true).open(&path)?;
        Ok(Draft { path, file })
    }

    /// Makes a draft the entry `name`; answers it, open for reading alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn commit(&self, name: &str, draft: &Draft) -> std::io::Result<File> {
        draft.file.sync_data()?;
        let content = digest(&draft.file, MAX)?;
        let seal = self.draft()?;
        (&seal.file).write_all(&self.key.seal(name, &content))?;
        let _lock = self.lock()?;
        std::fs::rename(&seal.path, self.path(name, SEAL))?;
        let path = self.path(name, CODE);
        std::fs::rename(&draft.path, &path)?;
        let file = private().read(true).open(path)?;
        self.used(name, Identity::of(&file)?);
        Ok(file)
    }

    fn lock(&self) -> std::io::Result<Flock<File>> {
        let file =
            private().write(true).create(true).truncate(false).open(self.dir.join("lock"))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
    }

    /// Removes what was not used for longest until at most `size` bytes are left; never `keep`.
    /// Code that runs stays in memory.
    pub fn shrink(&self, size: u64, keep: &str) {
        let Ok(_lock) = self.lock() else { return };
        let mut entries: Vec<(SystemTime, String, u64)> = Vec::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(name) = path.file_stem().and_then(|name| name.to_str()) else { continue };
            if path.extension().is_none_or(|kind| kind != CODE) {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            let used = std::fs::metadata(self.path(name, SEAL)).and_then(|seal| seal.modified());
            let used = used.unwrap_or(SystemTime::UNIX_EPOCH);
            entries.push((used, name.to_owned(), meta.blocks() * 512));
        }
        entries.sort();
        let mut total: u64 = entries.iter().map(|(_, _, bytes)| bytes).sum();
        for (_, name, bytes) in &entries {
            if total <= size {
                return;
            }
            if name != keep {
                self.remove(name);
                total -= bytes;
            }
        }
    }

    fn clear_abandoned(&self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let is_draft = entry.path().extension().is_some_and(|kind| kind == "draft");
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|at| at.elapsed());
            if is_draft && age.is_ok_and(|age| age.is_ok_and(|age| age > ABANDONED)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// The directory's key; made when there is none.
fn key(dir: &Path) -> std::io::Result<Key> {
    let path = dir.join("key");
    for _ in 0..2 {
        match private().read(true).open(&path) {
            Ok(mut file) => {
                let mut bytes = Sum::default();
                if file.read_exact(&mut bytes).is_ok() {
                    return Ok(Key::from_bytes(bytes));
                }
                // Torn: nothing that it has sealed counts any more.
                std::fs::remove_file(&path)?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let new = Key::random()?;
        let draft = dir.join(format!("{:016x}.draft", kuasar_oci::processes::new_cookie()));
        let mut file = private().write(true).create_new(true).open(&draft)?;
        let written = file.write_all(new.bytes()).and_then(|()| file.sync_data());
        // Another program may be first: then its key counts.
        let linked = written.and_then(|()| std::fs::hard_link(&draft, &path));
        let _ = std::fs::remove_file(&draft);
        match linked {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    let mut bytes = Sum::default();
    private().read(true).open(&path)?.read_exact(&mut bytes)?;
    Ok(Key::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(cache: &Cache, name: &str, bytes: &[u8]) {
        let draft = cache.draft().unwrap();
        (&draft.file).write_all(bytes).unwrap();
        cache.commit(name, &draft).unwrap();
    }

    fn got(cache: &Cache, name: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        cache.get(name).unwrap()?.read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn cache() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("cache");
        (dir, at)
    }

    #[test]
    fn code_is_found_again_by_another_process() {
        let (_dir, at) = cache();
        put(&Cache::open(&at).unwrap(), "a", b"code");
        let again = Cache::open(&at).unwrap();
        assert_eq!(got(&again, "a").unwrap(), b"code");
        assert!(got(&again, "b").is_none());
        assert_eq!(files(&at), ["a.cwasm", "a.seal", "key", "lock"]);
    }

    #[test]
    fn altered_code_is_never_used() {
        let (_dir, at) = cache();
        for by_the_same in [true, false] {
            let cache = Cache::open(&at).unwrap();
            put(&cache, "a", b"code");
            let other = Cache::open(&at).unwrap();
            assert!(got(&cache, "a").is_some());
            std::fs::write(at.join("a.cwasm"), b"evil").unwrap();
            assert!(got(if by_the_same { &cache } else { &other }, "a").is_none());
            assert!(!at.join("a.cwasm").exists(), "it is removed");
        }
    }

    #[test]
    fn code_under_another_name_or_without_seal_is_never_used() {
        let (_dir, at) = cache();
        let cache = Cache::open(&at).unwrap();
        put(&cache, "a", b"code");
        for kind in [CODE, SEAL] {
            std::fs::copy(cache.path("a", kind), cache.path("b", kind)).unwrap();
        }
        assert!(got(&cache, "b").is_none());
        std::fs::remove_file(cache.path("a", SEAL)).unwrap();
        assert!(got(&Cache::open(&at).unwrap(), "a").is_none());
    }

    #[test]
    fn a_link_in_place_of_code_is_not_followed() {
        let (_dir, at) = cache();
        let cache = Cache::open(&at).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", cache.path("a", CODE)).unwrap();
        assert!(cache.get("a").is_err());
    }

    #[test]
    fn writers_at_the_same_time_leave_one_good_entry() {
        let (_dir, at) = cache();
        Cache::open(&at).unwrap();
        std::thread::scope(|scope| {
            for n in 0..4u8 {
                let at = &at;
                scope.spawn(move || {
                    for _ in 0..8 {
                        let cache = Cache::open(at).unwrap();
                        put(&cache, "a", &[n; 10_000]);
                    }
                });
            }
        });
        let left = got(&Cache::open(&at).unwrap(), "a").unwrap();
        assert!(left.len() == 10_000 && left.iter().all(|byte| *byte == left[0]));
        assert_eq!(files(&at), ["a.cwasm", "a.seal", "key", "lock"]);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let (_dir, at) = cache();
        let cache = Cache::open(&at).unwrap();
        for (name, age) in [("old", 300), ("older", 400), ("new", 200)] {
            put(&cache, name, &[1; 40_000]);
            let used = SystemTime::now() - Duration::from_secs(age);
            let seal = OpenOptions::new().write(true).open(cache.path(name, SEAL)).unwrap();
            seal.set_modified(used).unwrap();
        }
        cache.shrink(100_000, "new");
        assert!(got(&cache, "older").is_none());
        assert!(got(&cache, "old").is_some() && got(&cache, "new").is_some());
        cache.shrink(0, "new");
        assert!(got(&cache, "new").is_some(), "what is about to be used stays");
    }

    #[test]
    fn a_draft_that_is_dropped_leaves_nothing() {
        let (_dir, at) = cache();
        let cache = Cache::open(&at).unwrap();
        drop(cache.draft().unwrap());
        assert_eq!(files(&at), ["key"]);
    }
}
