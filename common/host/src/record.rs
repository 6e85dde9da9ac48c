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

/// Writes a record to `path` (mode 0600), replacing an older one.
///
/// # Errors
/// [`Error::Io`], for example when the disk is full; the older record is then still there.
pub fn write<T: Serialize>(path: &Path, kind: &str, version: u32, data: &T) -> Result<()> {
    let text = serde_json::to_vec(&Envelope { kind, version, data })
        .map_err(|e| Error::Record(format!("cannot serialise a {kind} record: {e}")))?;
    write_file(path, &text, 0o600)
}

/// Writes a whole file by rename.
///
/// # Errors
/// [`Error::Io`]; nothing is left but the older file.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
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
        fs::rename(&new, path)
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
/// [`Error::Record`] for a torn or foreign record: quarantine it; [`Error::Io`] otherwise.
pub fn read<T: DeserializeOwned>(path: &Path, kind: &str, version: u32) -> Result<T> {
    let context = || format!("cannot read {}", path.display());
    let mut text = Vec::new();
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .context(context)?;
    file.take(MAX_RECORD).read_to_end(&mut text).context(context)?;
    let torn = |e| Error::Record(format!("{} is torn or foreign: {e}", path.display()));
    let head: Envelope<String, serde_json::Value> = serde_json::from_slice(&text).map_err(torn)?;
    if head.kind != kind || head.version > version {
        return Err(Error::Record(format!(
            "{} is a {} record of version {}, expected {kind} of at most {version}",
            path.display(),
            head.kind,
            head.version
        )));
    }
    serde_json::from_value(head.data).map_err(torn)
}

/// Makes a directory that only its owner may enter, 0700 from creation; an existing one must be
/// ours.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] when somebody else owns it or it is no directory.
pub fn private_dir(path: &Path) -> Result<()> {
    let context = || format!("cannot make {}", path.display());
    if let Some(parent) = path.parent()
        && !parent.exists()
    {
        fs::create_dir_all(parent).context(context)?;
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
        assert!(matches!(read::<Vec<u8>>(&path, "task", 2), Err(Error::Record(_))));
        assert!(matches!(read::<Vec<u8>>(&path, "pod", 1), Err(Error::Record(_))));
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(read::<Vec<u8>>(&path, "pod", 2), Err(Error::Record(_))));
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
}
