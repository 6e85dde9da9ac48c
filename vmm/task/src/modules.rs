//! The modules of a distribution's kernel, which are in the guest's image (`guest-image --module`).
//!
//! Our own kernel has everything built in and no modules at all. A distribution's has neither virtio
//! nor overlayfs built in, so they are loaded before anything is mounted. There is no `modprobe`:
//! the image has them not compressed, in the order in which they need each other. An initramfs is
//! memory of the pod: each file is removed as soon as it is loaded.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::kmod::{ModuleInitFlags, finit_module};

/// Where an image has them: files that are loaded in the order of their names.
pub const DIR: &str = "/modules";
/// The kernel's switch, which cannot be turned back until the machine ends
/// (`Documentation/admin-guide/sysctl/kernel.rst`).
const NO_MORE: &str = "/proc/sys/kernel/modules_disabled";

/// Loads all that the image has. Answers what could not be loaded, with the reason: there is no log
/// to write to yet.
pub fn load() -> Vec<String> {
    let mut failed = Vec::new();
    for path in files(Path::new(DIR)) {
        let loaded = File::open(&path)
            .and_then(|file| Ok(finit_module(&file, c"", ModuleInitFlags::empty())?));
        // The kernel has it, in another module or built in.
        let there = |error: &std::io::Error| error.raw_os_error() == Some(libc::EEXIST);
        if let Err(error) = loaded
            && !there(&error)
        {
            failed.push(format!("{}: {error}", path.display()));
        }
        // Fails on a disk image, which is read-only and costs no memory.
        let _ = fs::remove_file(&path);
    }
    let _ = fs::remove_dir(DIR);
    failed
}

/// From now on nobody loads a module, whatever a container's capabilities are. Without effect on a
/// kernel that has no modules.
pub fn close() {
    let _ = fs::write(NO_MORE, "1\n");
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        assert!(files(&dir.path().join("none")).is_empty());
        for name in ["010-b.ko", "002-c.ko", "001-z.ko"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<_> = files(dir.path())
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["001-z.ko", "002-c.ko", "010-b.ko"]);
    }
}
