//! Reads a volume of the host that is to be copied: within limits, by descriptor, and without following
//! a link. What is neither file, directory nor link is refused.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kuasar_host::safe_path::{open_beneath, proc_path};
use kuasar_host::xattr;
use nix::fcntl::{AtFlags, readlinkat};
use nix::sys::stat::fstatat;
use vmm_common::guest::{Attribute, FileEntry, PutFilesRequest, file_entry::Kind};

use super::CopyConfig;

/// Directories in directories.
const MAX_DEPTH: usize = 32;
/// Bytes of files in one message to the guest.
const PIECE: usize = 256 << 10;
/// Bytes of the extended attributes of one file or directory, which are in one message.
const ATTRIBUTES: usize = 64 << 10;
/// Files in one message to the guest.
const FILES: usize = 256;
/// How often a volume is read again that changes meanwhile.
const TRIES: usize = 8;

/// Why a volume is not copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has more than the configuration allows; completes "volume … ".
    #[error("{0}")]
    TooLarge(String),
    /// Something in it cannot be copied; completes "volume … ".
    #[error("{0}")]
    Special(String),
    /// It changes all the time, or cannot be read.
    #[error("{0}")]
    Unreadable(String),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

fn unreadable(what: &Path, error: impl std::fmt::Display) -> Error {
    Error::Unreadable(format!("cannot be read: {}: {error}", what.display()))
}

/// A volume as it was at one moment: its entries, parents first. A file has all of its data.
///
/// # Errors
/// [`Error`].
pub fn read(source: &OwnedFd, config: &CopyConfig) -> Result<Vec<FileEntry>> {
    // kubelet's volumes change by one link: what was read between two looks at it is of one moment.
    let data = || readlinkat(source, super::DATA).ok();
    let mut tries = 0;
    loop {
        let before = data();
        let entries = read_once(source, config);
        tries += 1;
        match entries {
            Ok(entries) if data() == before => return Ok(entries),
            Err(error @ (Error::TooLarge(_) | Error::Special(_))) => return Err(error),
            // A directory went away under the reading.
            Err(error) if tries >= TRIES || data() == before => return Err(error),
            Ok(_) if tries >= TRIES => {
                return Err(Error::Unreadable("changes while it is read, again and again".into()));
            }
            _ => {}
        }
    }
}

fn read_once(source: &OwnedFd, config: &CopyConfig) -> Result<Vec<FileEntry>> {
    let mut reader = Reader { config, bytes: 0, names: HashMap::new(), entries: Vec::new() };
    let root = Path::new("");
    let meta = std::fs::metadata(proc_path(source.as_fd())).map_err(|e| unreadable(root, e))?;
    if meta.is_dir() {
        let dir = directory(source.as_fd(), Path::new(".")).map_err(|e| unreadable(root, e))?;
        reader.directory(&dir, root, 0)?;
    } else {
        // The very file: no name is looked at again.
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
        let file = options.read(true).open(proc_path(source.as_fd()));
        reader.file(file.map_err(|e| unreadable(root, e))?, root)?;
    }
    Ok(reader.entries)
}

fn directory(at: BorrowedFd<'_>, path: &Path) -> kuasar_host::Result<OwnedFd> {
    open_beneath(at, path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0)
}

struct Reader<'a> {
    config: &'a CopyConfig,
    bytes: u64,
    /// Files with several names: the first one, by device and inode.
    names: HashMap<(u64, u64), Vec<u8>>,
    entries: Vec<FileEntry>,
}

impl Reader<'_> {
    fn add(&mut self, entry: FileEntry) -> Result<()> {
        let most = self.config.max_files;
        if self.entries.len() >= usize::try_from(most).unwrap_or(usize::MAX) {
            return Err(Error::TooLarge(format!(
                "has more than {most} files, directories and links (copy.max_files)"
            )));
        }
        self.entries.push(entry);
        Ok(())
    }

    fn directory(&mut self, dir: &OwnedFd, path: &Path, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::Special(format!("is deeper than {MAX_DEPTH} directories")));
        }
        let at = proc_path(dir.as_fd());
        let meta = std::fs::metadata(&at).map_err(|e| unreadable(path, e))?;
        let attributes = self.attributes(dir.as_fd(), path)?;
        self.add(FileEntry { attributes, ..entry(Kind::DIRECTORY, path, &meta) })?;
        // Bounded, or a directory of millions would be in memory before it is refused.
        let most = usize::try_from(self.config.max_files).unwrap_or(usize::MAX);
        let names = std::fs::read_dir(&at).map_err(|e| unreadable(path, e))?.take(most + 1);
        let names: std::io::Result<Vec<OsString>> =
            names.map(|name| name.map(|name| name.file_name())).collect();
        let mut names = names.map_err(|e| unreadable(path, e))?;
        names.sort();
        for name in &names {
            let below = path.join(name);
            let stat = fstatat(dir, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
            let stat = stat.map_err(|e| unreadable(&below, e))?;
            match stat.st_mode & libc::S_IFMT {
                libc::S_IFDIR => {
                    let next = directory(dir.as_fd(), Path::new(name));
                    self.directory(&next.map_err(|e| unreadable(&below, e))?, &below, depth + 1)?;
                }
                libc::S_IFREG => {
                    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW;
                    let file = open_beneath(dir.as_fd(), Path::new(name), flags, 0);
                    self.file(file.map_err(|e| unreadable(&below, e))?.into(), &below)?;
                }
                libc::S_IFLNK => {
                    let target = readlinkat(dir, name.as_os_str());
                    let target = target.map_err(|e| unreadable(&below, e))?;
                    self.add(FileEntry {
                        kind: Kind::SYMLINK.into(),
                        path: below.as_os_str().as_bytes().to_vec(),
                        mode: 0o777,
                        uid: stat.st_uid,
                        gid: stat.st_gid,
                        data: target.into_vec(),
                        ..FileEntry::default()
                    })?;
                }
                _ => {
                    return Err(Error::Special(format!(
                        "has a socket, FIFO or device, which cannot be copied: {}",
                        below.display()
                    )));
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, file: std::fs::File, path: &Path) -> Result<()> {
        let meta = file.metadata().map_err(|e| unreadable(path, e))?;
        if !meta.is_file() {
            return Err(Error::Special(format!("has no file at {}", path.display())));
        }
        let bytes = path.as_os_str().as_bytes();
        let key = (meta.dev(), meta.ino());
        if let (true, Some(first)) = (meta.nlink() > 1, self.names.get(&key)) {
            let mut link = entry(Kind::LINK, path, &meta);
            link.data.clone_from(first);
            return self.add(link);
        }
        self.names.insert(key, bytes.to_vec());
        let attributes = self.attributes(file.as_fd(), path)?;
        let left = self.config.max_bytes.saturating_sub(self.bytes);
        let mut data = Vec::new();
        file.take(left.saturating_add(1))
            .read_to_end(&mut data)
            .map_err(|e| unreadable(path, e))?;
        let read = data.len() as u64;
        self.takes(read)?;
        self.add(FileEntry { data, attributes, ..entry(Kind::FILE, path, &meta) })
    }

    /// So many bytes more, if the volume may have them.
    fn takes(&mut self, bytes: u64) -> Result<()> {
        let most = self.config.max_bytes;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes <= most {
            return Ok(());
        }
        Err(Error::TooLarge(format!("has more than {most} bytes (copy.max_bytes)")))
    }

    /// The extended attributes that a program would see in a bind mount, and that mean the same in the
    /// guest: a program's own, and the capabilities of a file.
    fn attributes(&mut self, file: BorrowedFd<'_>, path: &Path) -> Result<Vec<Attribute>> {
        let mut all = Vec::new();
        let mut bytes = 0;
        for name in xattr::names(file).map_err(|e| unreadable(path, e))? {
            let wanted = name.to_bytes();
            if wanted != b"security.capability" && !wanted.starts_with(b"user.") {
                continue;
            }
            // It may have gone meanwhile.
            let value = xattr::get(file, &name).map_err(|e| unreadable(path, e))?;
            let Some(value) = value else { continue };
            bytes += wanted.len() + value.len();
            if bytes > ATTRIBUTES {
                return Err(Error::TooLarge(format!(
                    "has more than {ATTRIBUTES} bytes of extended attributes at {:.200?}",
                    path
                )));
            }
            all.push(Attribute { name: name.into_bytes(), value, ..Attribute::default() });
        }
        self.takes(bytes as u64)?;
        Ok(all)
    }
}

fn entry(kind: Kind, path: &Path, meta: &std::fs::Metadata) -> FileEntry {
    FileEntry {
        kind: kind.into(),
        path: path.as_os_str().as_bytes().to_vec(),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_ns: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        ..FileEntry::default()
    }
}

/// A volume in messages that a guest takes.
pub fn messages(container: &str, volume: u32, entries: Vec<FileEntry>) -> Vec<PutFilesRequest> {
    let empty = || PutFilesRequest { container: container.into(), volume, ..Default::default() };
    let mut all = vec![PutFilesRequest { first: true, ..empty() }];
    let mut bytes = 0;
    let mut put = |entry: FileEntry, all: &mut Vec<PutFilesRequest>| {
        let attributes = entry.attributes.iter().map(|one| one.name.len() + one.value.len());
        let size = entry.data.len() + attributes.sum::<usize>();
        let full = bytes + size > PIECE;
        if full || all.last().is_none_or(|last| last.entries.len() >= FILES) {
            all.push(empty());
            bytes = 0;
        }
        bytes += size;
        if let Some(last) = all.last_mut() {
            last.entries.push(entry);
        }
    };
    for mut entry in entries {
        let data = std::mem::take(&mut entry.data);
        if entry.kind.enum_value() != Ok(Kind::FILE) || data.len() <= PIECE {
            put(FileEntry { data, ..entry }, &mut all);
            continue;
        }
        let (mut offset, mut attributes) = (0, std::mem::take(&mut entry.attributes));
        for piece in data.chunks(PIECE) {
            let mut next = FileEntry { data: piece.to_vec(), offset, ..entry.clone() };
            offset += piece.len() as u64;
            if offset == data.len() as u64 {
                // Whatever is written after them would take a capability away again.
                next.attributes = std::mem::take(&mut attributes);
            }
            put(next, &mut all);
        }
    }
    if let Some(last) = all.last_mut() {
        last.last = true;
    }
    all
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_PATH);
        options.read(true).open(path).unwrap().into()
    }

    fn paths(entries: &[FileEntry]) -> Vec<String> {
        entries.iter().map(|e| String::from_utf8(e.path.clone()).unwrap()).collect()
    }

    #[test]
    fn a_volume_of_kubelets_is_read_as_it_stands_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("..2026")).unwrap();
        std::fs::write(at("..2026/key"), "value").unwrap();
        std::fs::set_permissions(at("..2026/key"), std::fs::Permissions::from_mode(0o640)).unwrap();
        std::fs::hard_link(at("..2026/key"), at("..2026/other")).unwrap();
        symlink("..2026", at("..data")).unwrap();
        symlink("..data/key", at("key")).unwrap();
        symlink("/etc/passwd", at("out")).unwrap();
        let entries = read(&open(dir.path()), &CopyConfig::default()).unwrap();
        let expected = ["", "..2026", "..2026/key", "..2026/other", "..data", "key", "out"];
        assert_eq!(paths(&entries), expected);
        let kinds: Vec<Kind> = entries.iter().map(|e| e.kind.enum_value().unwrap()).collect();
        assert_eq!(kinds[2..5], [Kind::FILE, Kind::LINK, Kind::SYMLINK]);
        assert_eq!((entries[2].mode, entries[2].data.as_slice()), (0o640, &b"value"[..]));
        assert_eq!(entries[3].data, b"..2026/key");
        assert_eq!(entries[6].data, b"/etc/passwd");
        // One file alone.
        let entries = read(&open(&at("..2026/key")), &CopyConfig::default()).unwrap();
        assert_eq!(
            (paths(&entries), entries[0].data.as_slice()),
            (vec![String::new()], &b"value"[..])
        );
    }

    #[test]
    fn what_is_too_much_or_no_file_is_refused_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..4 {
            std::fs::write(dir.path().join(format!("f{n}")), "12345").unwrap();
        }
        let with = |max_bytes, max_files| {
            read(&open(dir.path()), &CopyConfig { max_bytes, max_files, ..Default::default() })
        };
        assert_eq!(with(20, 5).unwrap().len(), 5);
        let error = with(19, 5).unwrap_err().to_string();
        assert!(error.contains("19 bytes (copy.max_bytes)"), "{error}");
        let error = with(20, 4).unwrap_err().to_string();
        assert!(error.contains("more than 4") && error.contains("copy.max_files"), "{error}");
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(with(20, 9), Err(Error::Special(text)) if text.ends_with("fifo")));
    }

    #[test]
    fn attributes_of_programs_are_read_and_count_and_go_with_the_last_piece() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "12345").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        if xattr::set(file.as_fd(), c"user.kind", &[7; 90]).is_err() {
            eprintln!("skipped: no attributes on {}", dir.path().display());
            return;
        }
        let with =
            |max_bytes| read(&open(dir.path()), &CopyConfig { max_bytes, ..Default::default() });
        let file = with(104).unwrap().pop().unwrap();
        let [one] = file.attributes.as_slice() else { panic!("{:?}", file.attributes) };
        assert_eq!((one.name.as_slice(), one.value.as_slice()), (&b"user.kind"[..], &[7; 90][..]));
        let error = with(103).unwrap_err().to_string();
        assert!(error.contains("103 bytes (copy.max_bytes)"), "{error}");
        let large = FileEntry { data: vec![1; 2 * PIECE + 1], ..file };
        let all = messages("c", 0, vec![large]);
        let given: Vec<usize> =
            all.iter().flat_map(|m| &m.entries).map(|e| e.attributes.len()).collect();
        assert_eq!(given, [0, 0, 1]);
    }

    #[test]
    fn messages_are_small_and_lose_nothing() {
        let file = |path: &str, size: usize| FileEntry {
            kind: Kind::FILE.into(),
            path: path.into(),
            data: vec![7; size],
            ..FileEntry::default()
        };
        let all = messages("c", 3, vec![file("a", 10), file("b", 3 * PIECE + 5), file("c", 0)]);
        assert!(all[0].first && all.last().unwrap().last);
        assert_eq!(all.iter().filter(|m| m.first || m.last).count(), 2);
        let mut whole: HashMap<Vec<u8>, usize> = HashMap::new();
        for message in &all {
            assert!(message.entries.iter().map(|e| e.data.len()).sum::<usize>() <= PIECE);
            for entry in &message.entries {
                let size = whole.entry(entry.path.clone()).or_default();
                assert_eq!(entry.offset, *size as u64);
                *size += entry.data.len();
            }
        }
        assert_eq!(whole.values().sum::<usize>(), 3 * PIECE + 15);
        assert_eq!(whole.len(), 3);
        let many = (0..1000).map(|n| file(&n.to_string(), 1)).collect();
        assert!(messages("c", 0, many).iter().all(|message| message.entries.len() <= FILES));
        assert!(messages("c", 0, Vec::new()).iter().all(|m| m.first && m.last));
    }
}
