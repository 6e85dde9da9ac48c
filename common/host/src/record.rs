//! Durable records: written to a temporary file and renamed, so that a reader sees the old or
//! the new one and never a half.
//!
//! A record is JSON: `{"kind": …, "version": …, "data": …}`. Readers keep unknown fields of
//! `data` by `#[serde(flatten)]`, so that an older daemon that writes a newer one's record back
//! loses nothing.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Context, Error, Result};

/// Largest record that is read, in bytes.
pub const MAX_RECORD: u64 = 16 << 20;

#[derive(Serialize, Deserialize)]
struct Envelope<K, T> {
    kind: K,
    version: u32,
    data: T,
}

/// Whether a write waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sync {
    /// The file survives the end of any process, not a power cut. For state on a tmpfs, and for
    /// what means nothing after a reboot.
    #[default]
    None,
    /// File and directory are on the disk when the call returns.
    Disk,
}

/// Writes a record to `path` (mode 0600), replacing an older one, without waiting for the disk.
///
/// # Errors
/// [`Error::Io`], for example when the disk is full; the older record is then still there.
pub fn write<T: Serialize>(path: &Path, kind: &str, version: u32, data: &T) -> Result<()> {
    write_sync(path, kind, version, data, Sync::None)
}

/// As [`write()`], with a choice of when to return.
///
/// # Errors
/// As [`write()`].
pub fn write_sync<T: Serialize>(
    path: &Path,
    kind: &str,
    version: u32,
    data: &T,
    sync: Sync,
) -> Result<()> {
    let text = serde_json::to_vec(&Envelope { kind, version, data })
        .map_err(|e| Error::Invalid(format!("cannot serialise a {kind} record: {e}")))?;
    replace(path, &text, 0o600, sync)
}

/// Writes a whole file by rename, without waiting for the disk.
///
/// # Errors
/// [`Error::Io`]; nothing is left but the older file.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    replace(path, bytes, mode, Sync::None)
}

fn replace(path: &Path, bytes: &[u8], mode: u32, sync: Sync) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = path.with_file_name(name);
    let written = (|| {
        let mut f = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&new)?;
        f.write_all(bytes)?;
        if sync == Sync::Disk {
            f.sync_all()?;
        }
        fs::rename(&new, path)?;
        match path.parent().filter(|_| sync == Sync::Disk) {
            // The name is only on the disk when its directory is.
            Some(dir) => fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    })();
    if written.is_err() {
        // The half-written file must not stay; the first error is the one to report.
        let _ = fs::remove_file(&new);
    }
    written.context(|| format!("cannot write {}", path.display()))
}

/// Reads a record of this kind and at most this version.
///
/// # Errors
/// [`Error::Torn`] or [`Error::Foreign`]: quarantine it; [`Error::TooNew`]: leave it to the newer
/// program; [`Error::Io`] otherwise.
pub fn read<T: DeserializeOwned>(path: &Path, kind: &str, version: u32) -> Result<T> {
    let context = || format!("cannot read {}", path.display());
    let foreign = |why: String| Error::Foreign(path.to_owned(), why);
    let mut text = Vec::new();
    let file = fs::OpenOptions::new()
        .read(true)
        // A FIFO in the place of the record must not hold recovery up.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .context(context)?;
    if !file.metadata().context(context)?.is_file() {
        return Err(foreign("it is no regular file".into()));
    }
    file.take(MAX_RECORD + 1).read_to_end(&mut text).context(context)?;
    if text.len() as u64 > MAX_RECORD {
        return Err(foreign(format!("it is larger than {MAX_RECORD} bytes")));
    }
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Error::Torn(path.to_owned(), e.to_string()))?;
    let head: Envelope<String, serde_json::Value> =
        serde_json::from_value(value).map_err(|e| foreign(e.to_string()))?;
    if head.kind != kind {
        // The kind comes from the file: show no more of it than a name has.
        let found: String = head.kind.chars().take(64).collect();
        return Err(foreign(format!("it is a {found:?} record, expected {kind:?}")));
    }
    if head.version > version {
        return Err(Error::TooNew { path: path.to_owned(), found: head.version, known: version });
    }
    serde_json::from_value(head.data).map_err(|e| foreign(e.to_string()))
}

/// Makes a directory that only its owner may enter, 0700 from creation, as are those above it that
/// are missing; an existing one must be ours.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] when somebody else owns it or it is no directory.
pub fn private_dir(path: &Path) -> Result<()> {
    let context = || format!("cannot make {}", path.display());
    if let Some(parent) = path.parent()
        && !parent.exists()
    {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).context(context)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e).context(context),
    }
    let meta = fs::symlink_metadata(path).context(context)?;
    if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Error::Invalid(format!(
            "{} exists and is no directory of ours: remove it or choose another",
            path.display()
        )));
    }
    if meta.mode() & 0o077 != 0 {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(path, mode).context(context)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_torn_one_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        write(&path, "pod", 2, &vec![1, 2, 3]).unwrap();
        assert_eq!(read::<Vec<u8>>(&path, "pod", 2).unwrap(), [1, 2, 3]);
        assert!(matches!(read::<Vec<u8>>(&path, "task", 2), Err(Error::Foreign(..))));
        assert!(matches!(read::<Vec<u8>>(&path, "pod", 1), Err(Error::TooNew { found: 2, .. })));
        assert!(matches!(read::<String>(&path, "pod", 2), Err(Error::Foreign(..))));
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(read::<Vec<u8>>(&path, "pod", 2), Err(Error::Torn(..))));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_private_directory_is_private_from_creation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        private_dir(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        private_dir(&path).unwrap();
    }

    #[test]
    fn every_cut_of_a_record_is_torn_and_a_fifo_does_not_hang() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        write_sync(&path, "pod", 1, &"x", Sync::Disk).unwrap();
        let text = fs::read(&path).unwrap();
        for n in 0..text.len() {
            fs::write(&path, &text[..n]).unwrap();
            assert!(matches!(read::<String>(&path, "pod", 1), Err(Error::Torn(..))), "{n}");
        }
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(read::<String>(&path, "pod", 1), Err(Error::Foreign(..))));
    }

    #[test]
    fn fields_of_a_newer_program_survive_being_written_back() {
        #[derive(Serialize, Deserialize)]
        struct Pod {
            id: String,
            #[serde(flatten)]
            more: serde_json::Map<String, serde_json::Value>,
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        write(&path, "pod", 1, &serde_json::json!({"id": "a", "later": [1]})).unwrap();
        let pod: Pod = read(&path, "pod", 1).unwrap();
        write(&path, "pod", 1, &pod).unwrap();
        assert_eq!(read::<serde_json::Value>(&path, "pod", 1).unwrap()["later"][0], 1);
    }

    #[test]
    fn a_private_directory_is_no_link_to_somebody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        assert!(matches!(private_dir(&link), Err(Error::Invalid(_))));
    }
}
