//! Archives that nobody vouches for: OCI archives and the layers of images.
//!
//! Nothing leaves its directory: file by file the tar crate checks that, and what it does not do
//! (whiteouts, devices) goes through descriptors that are opened beneath the directory.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};

use kuasar_host::safe_path::Root;
use nix::sys::stat::{Mode, SFlag, mknodat};
use tar::{Archive, EntryType};

use crate::error::{Error, Result};

/// Beginning of the names that remove something of a lower layer (OCI image spec, layer.md).
const WHITEOUT: &str = ".wh.";
/// The name that removes everything that lower layers have in its directory.
const OPAQUE: &str = ".wh..wh..opq";
/// Entries of one archive.
const MOST_ENTRIES: usize = 1_000_000;

/// A reader that fails, rather than ends, when there is more than allowed.
struct Bounded<'a, R> {
    inner: R,
    left: &'a mut u64,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        *self.left = self
            .left
            .checked_sub(n as u64)
            .ok_or_else(|| std::io::Error::other("it is larger than --max-image-size allows"))?;
        Ok(n)
    }
}

/// The bytes of a layer, whatever they are compressed with.
fn decompressed(mut file: File) -> Result<Box<dyn Read>> {
    let failed = |e: std::io::Error| Error::io("read a layer")(e);
    let mut magic = [0; 4];
    let n = file.read(&mut magic).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let file = BufReader::new(file);
    Ok(match magic.get(..n).unwrap_or_default() {
        // RFC 1952 and RFC 8878: the formats' own first bytes.
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(
            ruzstd::decoding::StreamingDecoder::new(file)
                .map_err(|e| Error::Failed(format!("zstd: {e}")))?,
        ),
        _ => Box::new(file),
    })
}

fn at(doing: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    Error::at(doing, path)
}

/// A path without its leading `/` and `./`; nothing when it leads upwards.
fn inside(path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(clean)
}

/// Unpacks the files of an OCI layout out of an archive; others are left. Blocks.
///
/// # Errors
/// When it is no such archive, or larger than `most` bytes.
pub fn layout(archive: &Path, to: &Path, most: u64) -> Result<()> {
    let mut left = most;
    let blobs = to.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(at("make", &blobs))?;
    let file = File::open(archive).map_err(at("open", archive))?;
    let reader = Bounded { inner: decompressed(file)?, left: &mut left };
    let mut tar = Archive::new(reader);
    let wrong =
        |e: std::io::Error| Error::Failed(format!("{} is no OCI archive: {e}", archive.display()));
    let mut found = false;
    for (n, entry) in tar.entries().map_err(wrong)?.enumerate() {
        let mut entry = entry.map_err(wrong)?;
        if n > MOST_ENTRIES {
            return Err(wrong(std::io::Error::other("it has too many files")));
        }
        let path = entry.path().map_err(wrong)?.into_owned();
        let Some(path) = inside(&path) else { continue };
        let name = path.to_string_lossy().into_owned();
        let hex = name.strip_prefix("blobs/sha256/");
        let wanted = name == "index.json"
            || name == "oci-layout"
            || hex.is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()) && !hex.is_empty());
        if !wanted || entry.header().entry_type() != EntryType::Regular {
            continue;
        }
        found |= name == "index.json";
        let target = to.join(&path);
        let mut file = File::create(&target).map_err(at("make", &target))?;
        std::io::copy(&mut entry, &mut file).map_err(wrong)?;
    }
    if found {
        return Ok(());
    }
    Err(wrong(std::io::Error::other("there is no index.json in it")))
}

/// Unpacks a layer for overlayfs into an empty directory; `left` is what of the image may still come.
/// Blocks.
///
/// # Errors
/// When it is damaged, leads outside, or is too large.
pub fn layer(blob: File, to: &Path, left: &mut u64) -> Result<()> {
    let root = Root::open(to)?;
    let mut tar = Archive::new(Bounded { inner: decompressed(blob)?, left });
    tar.set_preserve_permissions(true);
    tar.set_preserve_ownerships(nix::unistd::geteuid().is_root());
    tar.set_unpack_xattrs(true);
    tar.set_overwrite(true);
    // Directories get their times and modes at the end: a read-only one is to be filled first.
    let mut directories = Vec::new();
    let wrong = Error::io("a layer");
    for (n, entry) in tar.entries().map_err(wrong)?.enumerate() {
        let mut entry = entry.map_err(Error::io("a layer"))?;
        if n > MOST_ENTRIES {
            return Err(Error::Failed("it has too many files".into()));
        }
        let path = entry.path().map_err(Error::io("a name"))?.into_owned();
        let Some(path) = inside(&path) else {
            return Err(Error::Failed(format!("{:?} leads outside", path.display())));
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        if name == OPAQUE {
            opaque(&root, &parent)?;
        } else if let Some(gone) = name.strip_prefix(WHITEOUT) {
            device(&root, &parent, gone, SFlag::S_IFCHR, 0, 0)?;
        } else {
            match entry.header().entry_type() {
                EntryType::Directory => {
                    directories.push(entry_permissions(&root, &path, entry.header())?);
                }
                kind @ (EntryType::Char | EntryType::Block | EntryType::Fifo) => {
                    let header = entry.header();
                    let number = |n: std::io::Result<Option<u32>>| n.ok().flatten().unwrap_or(0);
                    let (major, minor) =
                        (number(header.device_major()), number(header.device_minor()));
                    let of = match kind {
                        EntryType::Char => SFlag::S_IFCHR,
                        EntryType::Block => SFlag::S_IFBLK,
                        _ => SFlag::S_IFIFO,
                    };
                    let mode = header.mode().unwrap_or(0o600) & 0o7777;
                    device(
                        &root,
                        &parent,
                        &name,
                        of,
                        nix::sys::stat::makedev(major.into(), minor.into()),
                        mode,
                    )?;
                }
                _ => {
                    let inside =
                        entry.unpack_in(to).map_err(Error::io(path.display().to_string()))?;
                    if !inside {
                        return Err(Error::Failed(format!("{:?} leads outside", path.display())));
                    }
                }
            }
        }
    }
    for (fd, mode, uid, gid) in directories.into_iter().rev() {
        let at = kuasar_host::safe_path::proc_path(fd.as_fd());
        if nix::unistd::geteuid().is_root() {
            let (uid, gid) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(gid));
            nix::unistd::chown(&at, Some(uid), Some(gid)).map_err(|e| at_error(e, &at))?;
        }
        std::fs::set_permissions(&at, std::os::unix::fs::PermissionsExt::from_mode(mode))
            .map_err(Error::at("set the mode of", &at))?;
    }
    Ok(())
}

fn at_error(errno: nix::Error, path: &Path) -> Error {
    Error::Io { what: format!("change {}", path.display()), source: errno.into() }
}

type Directory = (std::os::fd::OwnedFd, u32, u32, u32);

/// Makes a directory; what it is to look like in the end.
fn entry_permissions(root: &Root, path: &Path, header: &tar::Header) -> Result<Directory> {
    root.mkdir_all(path, 0o755)?;
    let fd = root.resolve(if path.as_os_str().is_empty() { Path::new(".") } else { path })?;
    let id = |n: std::io::Result<u64>| n.ok().and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let mode = header.mode().unwrap_or(0o755) & 0o7777;
    Ok((fd, mode, id(header.uid()), id(header.gid())))
}

/// A device node, which a whiteout is, too.
fn device(
    root: &Root,
    parent: &Path,
    name: &str,
    kind: SFlag,
    number: u64,
    mode: u32,
) -> Result<()> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(Error::Failed(format!("{name:?} is no name of a file")));
    }
    root.mkdir_all(parent, 0o755)?;
    let dir = root.resolve(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
    let _ = nix::unistd::unlinkat(&dir, name, nix::unistd::UnlinkatFlags::NoRemoveDir);
    mknodat(&dir, name, kind, Mode::from_bits_truncate(mode), number)
        .map_err(|e| at_error(e, &parent.join(name)))
}

/// Hides what lower layers have in a directory (Documentation/filesystems/overlayfs.rst).
fn opaque(root: &Root, parent: &Path) -> Result<()> {
    root.mkdir_all(parent, 0o755)?;
    let dir = root.resolve(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
    let path = format!("/proc/self/fd/{}\0", dir.as_raw_fd());
    let name = c"trusted.overlay.opaque";
    // SAFETY: both strings end with a NUL, and the value is one byte long.
    let r =
        unsafe { libc::setxattr(path.as_ptr().cast(), name.as_ptr(), b"y".as_ptr().cast(), 1, 0) };
    if r == 0 {
        return Ok(());
    }
    Err(Error::io(format!("mark {} as opaque", parent.display()))(std::io::Error::last_os_error()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    fn header(kind: EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        // What the tests run as: they need not be root.
        header.set_uid(nix::unistd::geteuid().as_raw().into());
        header.set_gid(nix::unistd::getegid().as_raw().into());
        header
    }

    /// An archive with these files; names are taken as they are.
    fn archive(files: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut all = tar::Builder::new(Vec::new());
        for (name, kind, text) in files {
            let link = matches!(kind, EntryType::Symlink | EntryType::Link);
            let mut header = header(*kind, if link { 0 } else { text.len() as u64 });
            // The crate would refuse bad names.
            let raw = header.as_gnu_mut().unwrap();
            raw.name[..name.len()].copy_from_slice(name.as_bytes());
            if link {
                raw.linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_cksum();
            all.append(&header, if link { &[] } else { text.as_bytes() }).unwrap();
        }
        all.into_inner().unwrap()
    }

    fn unpack(bytes: &[u8], to: &Path, mut left: u64) -> Result<()> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        layer(file, to, &mut left)
    }

    const FILE: EntryType = EntryType::Regular;

    #[test]
    fn a_layer_becomes_one_of_overlayfs() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("./etc/", EntryType::Directory, ""),
            ("etc/hosts", FILE, "hosts"),
            ("/bin/sh", FILE, "sh"),
            ("lib", EntryType::Symlink, "usr/lib"),
            ("etc/.wh.passwd", FILE, ""),
        ];
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&archive(&files)).unwrap();
        unpack(&packed.finish().unwrap(), dir.path(), 1 << 20).unwrap();
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((text("etc/hosts").as_str(), text("bin/sh").as_str()), ("hosts", "sh"));
        let gone = std::fs::symlink_metadata(dir.path().join("etc/passwd")).unwrap();
        assert!(gone.file_type().is_char_device(), "overlayfs knows a whiteout by that");
        assert!(std::fs::read_link(dir.path().join("lib")).is_ok());
    }

    #[test]
    fn nothing_leaves_its_directory() {
        let outside = tempfile::tempdir().unwrap();
        let victim = outside.path().join("victim");
        std::fs::write(&victim, "untouched").unwrap();
        let target = outside.path().to_str().unwrap();
        let by_link = format!("{target}/victim");
        for files in [
            vec![("../victim", FILE, "x")],
            vec![("a/../../victim", FILE, "x")],
            vec![("link", EntryType::Symlink, target), ("link/victim", FILE, "x")],
            vec![("link", EntryType::Symlink, target), ("link/.wh.victim", FILE, "")],
            vec![("link", EntryType::Symlink, target), ("link/victim", EntryType::Directory, "")],
            vec![("hard", EntryType::Link, by_link.as_str()), ("hard", FILE, "x")],
        ] {
            let dir = tempfile::tempdir().unwrap();
            // Refused, or done inside: never done outside.
            let _ = unpack(&archive(&files), dir.path(), 1 << 20);
            assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched", "{files:?}");
            assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1, "{files:?}");
        }
    }

    #[test]
    fn a_layer_is_not_larger_than_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let big = "x".repeat(100_000);
        let error = unpack(&archive(&[("big", FILE, &big)]), dir.path(), 10_000).unwrap_err();
        assert!(
            error.to_string().contains("big") || error.to_string().contains("larger"),
            "{error}"
        );
        assert!(unpack(b"this is no archive at all", dir.path(), 10_000).is_err());
    }
}
