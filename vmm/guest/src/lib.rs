//! The image of a microVM guest.
//!
//! A guest holds one program, `/init`, and the places where that program mounts something before it
//! can mount anything else: no shell, no library, no configuration. What an image holds is one list
//! ([`entries`]); the initramfs and the tree that becomes a disk image are both made from it, so they
//! cannot differ. With the kernel of a distribution its modules are in it, too.
//!
//! Two builds from the same program give the same bytes. Nothing of the building host gets in: order,
//! owners, modes, times, inode and device numbers are all given here.

mod cpio;

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Largest program that is put into an image, in bytes. One that is larger is a mistake (a debug
/// build, another file): each guest would hold it in memory.
pub const MAX_INIT: u64 = 64 << 20;

/// Most bytes of modules in an image.
pub const MAX_MODULES: u64 = 64 << 20;

/// The directory of modules in an image, known to `vmm-task` too (`vmm/task/src/modules.rs`).
const MODULES: &str = "modules";

/// The directories of an image: what `/init` mounts over (`dev`, `proc`, `run`, `sys`, `tmp`), and
/// `etc`, which it may. A disk image is mounted read-only, so none can be made later.
pub const DIRECTORIES: &[&str] = &["dev", "etc", "proc", "run", "sys", "tmp"];

/// Why an image was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program cannot be read.
    #[error("{}: {source}", path.display())]
    Init {
        /// The program.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The program is not what can be `/init` of a guest without libraries.
    #[error("{}: {reason}", path.display())]
    Unfit {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The image cannot be written.
    #[error("write {}: {source}", path.display())]
    Write {
        /// The image, or the file in its tree.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What stands at one path of an image. Everything belongs to root.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A directory with this mode.
    Directory(u32),
    /// A regular file with this mode and content.
    File(u32, &'a [u8]),
    /// A character device: mode, major and minor number.
    Device(u32, u32, u32),
}

/// One path of an image, relative to its root.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The path, without a leading slash.
    pub path: &'a str,
    /// What stands there.
    pub kind: Kind<'a>,
}

/// A module of the kernel that goes into an image.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Its file's path in the image, which says when it is loaded.
    path: String,
    content: Vec<u8>,
}

/// Everything an image holds, parents first, in the order of paths. `init` is the program's content;
/// `modules` are for the kernel of a distribution, ours has everything built in.
///
/// `/dev/console` is there because the kernel opens it as standard input, output and error of `/init`
/// before anything is mounted.
pub fn entries<'a>(init: &'a [u8], modules: &'a [Module]) -> Vec<Entry<'a>> {
    let mut list: Vec<Entry<'_>> = DIRECTORIES
        .iter()
        .map(|&path| Entry {
            path,
            kind: Kind::Directory(if path == "tmp" { 0o1777 } else { 0o755 }),
        })
        .collect();
    list.push(Entry { path: "dev/console", kind: Kind::Device(0o600, 5, 1) });
    list.push(Entry { path: "init", kind: Kind::File(0o755, init) });
    if !modules.is_empty() {
        list.push(Entry { path: MODULES, kind: Kind::Directory(0o755) });
        list.extend(
            modules.iter().map(|module| Entry {
                path: &module.path,
                kind: Kind::File(0o644, &module.content),
            }),
        );
    }
    list.sort_by_key(|e| e.path);
    list
}

/// Reads the program that is to be `/init` and makes sure that a guest can run it: a static ELF file
/// no larger than [`MAX_INIT`].
///
/// # Errors
/// [`Error::Init`] when it cannot be read, [`Error::Unfit`] when a guest could not run it.
pub fn read_init(path: &Path) -> Result<Vec<u8>, Error> {
    let unreadable = |source| Error::Init { path: path.into(), source };
    let unfit = |reason: String| Error::Unfit { path: path.into(), reason };
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(unfit("not a regular file".into()));
    }
    if meta.len() > MAX_INIT {
        return Err(unfit(format!(
            "{} bytes, more than the {MAX_INIT} that an image may hold",
            meta.len()
        )));
    }
    let mut init = Vec::new();
    file.take(MAX_INIT).read_to_end(&mut init).map_err(unreadable)?;
    match interpreter(&init) {
        None => Err(unfit("not a 64-bit little-endian ELF program".into())),
        Some(true) => Err(unfit("dynamically linked: an image holds no libraries".into())),
        Some(false) => Ok(init),
    }
}

/// Reads modules of a kernel, in the order in which they are to be loaded: each is a relocatable ELF
/// file, not compressed, and all together have no more than [`MAX_MODULES`] bytes.
///
/// # Errors
/// [`Error::Init`] when one cannot be read, [`Error::Unfit`] when one is no module that a kernel loads.
pub fn read_modules(paths: &[PathBuf]) -> Result<Vec<Module>, Error> {
    const ET_REL: [u8; 2] = [1, 0];
    let mut left = MAX_MODULES;
    let read = |(n, path): (usize, &PathBuf)| {
        let unreadable = |source| Error::Init { path: path.clone(), source };
        let unfit = |reason: &str| Error::Unfit { path: path.clone(), reason: reason.into() };
        let mut content = Vec::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(left + 1).read_to_end(&mut content).map_err(unreadable)?;
        left = left.checked_sub(content.len() as u64).ok_or_else(|| {
            unfit(&format!("all modules have more than {MAX_MODULES} bytes: each pod holds them"))
        })?;
        if !content.starts_with(b"\x7fELF\x02\x01") || content.get(16..18) != Some(&ET_REL) {
            return Err(unfit("not a module of a 64-bit kernel; if it is compressed, unpack it"));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(Module { path: format!("{MODULES}/{n:03}-{name}"), content })
    };
    paths.iter().enumerate().map(read).collect()
}

/// Whether an ELF program asks for a loader (has a PT_INTERP header); nothing when it is none.
fn interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
        bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let offset = usize::try_from(u64::from_le_bytes(number(elf, 32)?)).ok()?;
    let size = usize::from(u16::from_le_bytes(number(elf, 54)?));
    let count = usize::from(u16::from_le_bytes(number(elf, 56)?));
    for i in 0..count {
        let at = offset.checked_add(i.checked_mul(size)?)?;
        if u32::from_le_bytes(number(elf, at)?) == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

/// Writes the initramfs (a newc cpio archive, not compressed) and says how many bytes it has. The file
/// appears at once or not at all.
///
/// # Errors
/// [`Error::Write`].
pub fn write_initramfs(entries: &[Entry<'_>], path: &Path) -> Result<u64, Error> {
    let failed = |source| Error::Write { path: path.into(), source };
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let written = File::create(&part).and_then(|file| {
        let mut archive = cpio::Archive::new(io::BufWriter::new(file));
        for entry in entries {
            archive.add(entry)?;
        }
        let (mut out, length) = archive.finish()?;
        out.flush()?;
        out.get_ref().set_permissions(Permissions::from_mode(0o644))?;
        fs::rename(&part, path)?;
        Ok(length)
    });
    if written.is_err() {
        // what failed is reported, not that nothing was there to remove
        let _ = fs::remove_file(&part);
    }
    written.map_err(failed)
}

/// Lays the image out below `root`, an empty directory or one to be made, for a program that makes a
/// file system from a directory. Needs root, for the device.
///
/// # Errors
/// [`Error::Write`], also when something stands there already.
pub fn write_tree(entries: &[Entry<'_>], root: &Path) -> Result<(), Error> {
    let make = |path: &Path, kind: &Kind<'_>| -> io::Result<()> {
        let mode = match *kind {
            Kind::Directory(mode) => {
                fs::create_dir(path)?;
                mode
            }
            Kind::File(mode, content) => {
                File::create_new(path)?.write_all(content)?;
                mode
            }
            Kind::Device(mode, major, minor) => {
                let number = makedev(major.into(), minor.into());
                mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(mode), number)?;
                // a file system mounted nodev accepts the call on some kernels
                let made = fs::symlink_metadata(path)?;
                if !made.file_type().is_char_device() || made.rdev() != number {
                    return Err(io::Error::other("no device node can be made here"));
                }
                mode
            }
        };
        fs::set_permissions(path, Permissions::from_mode(mode))
    };
    if !root.is_dir() {
        make(root, &Kind::Directory(0o755))
            .map_err(|source| Error::Write { path: root.into(), source })?;
    }
    for entry in entries {
        let path = root.join(entry.path);
        make(&path, &entry.kind).map_err(|source| Error::Write { path, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A static ELF program, as far as headers go; with `interp`, one that wants a loader.
    fn elf(interp: bool) -> Vec<u8> {
        let mut e = vec![0; 64 + 56];
        e[..6].copy_from_slice(b"\x7fELF\x02\x01");
        e[32] = 64;
        e[54] = 56;
        e[56] = 1;
        e[64] = if interp { 3 } else { 1 };
        e
    }

    #[test]
    fn parents_come_first_and_nothing_else_is_there() {
        let init = elf(false);
        let list = entries(&init, &[]);
        let paths: Vec<_> = list.iter().map(|e| e.path).collect();
        assert_eq!(paths, ["dev", "dev/console", "etc", "init", "proc", "run", "sys", "tmp"]);
    }

    #[test]
    fn a_program_that_a_guest_cannot_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init");
        let refused = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            read_init(&path).unwrap_err().to_string()
        };
        assert!(refused(b"#!/bin/sh\n").contains("not a 64-bit"));
        assert!(refused(&elf(true)).contains("dynamically linked"));
        // headers that point outside the file
        let mut torn = elf(false);
        torn[32..40].fill(0xff);
        assert!(refused(&torn).contains("not a 64-bit"));
        fs::write(&path, elf(false)).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(MAX_INIT + 1).unwrap();
        assert!(read_init(&path).unwrap_err().to_string().contains("more than"));
        assert!(read_init(dir.path()).unwrap_err().to_string().contains("not a regular file"));
    }

    /// A relocatable ELF file, as far as its header goes.
    fn module(mark: u8) -> Vec<u8> {
        let mut content = elf(false);
        content[16] = 1;
        content.push(mark);
        content
    }

    #[test]
    fn modules_keep_their_order_their_bytes_and_their_names() {
        let dir = tempfile::tempdir().unwrap();
        // Given in the order in which they need each other, which is not that of their names.
        let given: Vec<PathBuf> = ["z/vsock.ko", "a/virtio.ko", "a/vsock.ko"]
            .iter()
            .enumerate()
            .map(|(n, name)| {
                let path = dir.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, module(n as u8)).unwrap();
                path
            })
            .collect();
        let read = read_modules(&given).unwrap();
        let init = elf(false);
        let list = entries(&init, &read);
        let found: Vec<_> = list.iter().filter(|e| e.path.starts_with(MODULES)).collect();
        let paths: Vec<_> = found.iter().map(|e| e.path).collect();
        let names = ["000-vsock.ko", "001-virtio.ko", "002-vsock.ko"];
        let wanted: Vec<String> = names.iter().map(|name| format!("{MODULES}/{name}")).collect();
        assert_eq!(paths[0], MODULES);
        assert_eq!(paths[1..], wanted);
        for (n, entry) in found[1..].iter().enumerate() {
            assert_eq!(entry.kind, Kind::File(0o644, &module(n as u8)));
        }
        assert_eq!(read_modules(&[]).unwrap(), []);
    }

    #[test]
    fn what_is_no_module_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (good, path) = (dir.path().join("good.ko"), dir.path().join("bad.ko"));
        fs::write(&good, module(0)).unwrap();
        let refused = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            let error = read_modules(&[good.clone(), path.clone()]).unwrap_err();
            assert!(matches!(&error, Error::Unfit { path: at, .. } if *at == path), "{error:?}");
            error.to_string()
        };
        // A compressed one, a program, one of 32 bits, a torn header, nothing.
        let mut narrow = module(0);
        narrow[4] = 1;
        for content in [&b"\xfd7zXZ\0"[..], &elf(false), &narrow, &module(0)[..17], b""] {
            assert!(refused(content).contains("unpack it"), "{content:?}");
        }
        // All of them together are bounded, whatever one of them has.
        fs::write(&path, module(0)).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(MAX_MODULES - 10).unwrap();
        let text = read_modules(&[good.clone(), path.clone()]).unwrap_err().to_string();
        assert!(text.contains("more than"), "{text}");
        let missing = dir.path().join("missing.ko");
        let error = read_modules(&[good.clone(), missing]).unwrap_err();
        assert!(matches!(error, Error::Init { .. }), "{error:?}");
        let error = read_modules(&[good, dir.path().to_owned()]).unwrap_err();
        assert!(matches!(error, Error::Init { .. }), "{error:?}");
    }

    #[test]
    fn an_initramfs_that_cannot_be_written_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        assert!(write_initramfs(&entries(b"", &[]), &dir.path().join("out")).is_err());
        let left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["out"]);
    }
}
