//! The guest of the conformance suite: a kernel from the environment and an initramfs with one
//! program, `tests/probe/main.rs`, built here with nothing but `rustc`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The initramfs; built once for each run of the tests.
pub fn initramfs() -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT.get_or_init(build).clone()
}

fn build() -> Result<PathBuf, String> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("probe-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
    let program = dir.join("init");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/probe/main.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let built = Command::new(rustc)
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort"])
        .args(["-C", "strip=symbols", "-o"])
        .arg(&program)
        .arg(source)
        .output()
        .map_err(|e| format!("rustc: {e}"))?;
    if !built.status.success() {
        return Err(format!("the probe: {}", String::from_utf8_lossy(&built.stderr)));
    }
    if let Some(mkfs) = std::env::var_os("KUASAR_TEST_MKFS_EROFS") {
        return image(&dir, &program, &mkfs);
    }
    let mut archive = Vec::new();
    for name in ["dev", "proc", "sys", "run", "mnt"] {
        entry(&mut archive, name, 0o040_755, &[], (0, 0));
    }
    entry(&mut archive, "dev/console", 0o020_600, &[], (5, 1));
    entry(&mut archive, "init", 0o100_755, &fs::read(&program).map_err(|e| e.to_string())?, (0, 0));
    entry(&mut archive, "TRAILER!!!", 0, &[], (0, 0));
    let path = dir.join("initramfs");
    fs::write(&path, archive).map_err(|e| e.to_string())?;
    fs::remove_file(program).map_err(|e| e.to_string())?;
    Ok(path)
}

/// The same as an EROFS image, for kernels that take no initramfs.
fn image(dir: &Path, program: &Path, mkfs: &std::ffi::OsStr) -> Result<PathBuf, String> {
    let (tree, image) = (dir.join("tree"), dir.join("image.erofs"));
    for name in ["dev", "proc", "sys", "run", "mnt"] {
        fs::create_dir_all(tree.join(name)).map_err(|e| e.to_string())?;
    }
    fs::rename(program, tree.join("init")).map_err(|e| e.to_string())?;
    let made = Command::new(mkfs).arg("--quiet").arg(&image).arg(&tree).output();
    let made = made.map_err(|e| format!("mkfs.erofs: {e}"))?;
    fs::remove_dir_all(&tree).map_err(|e| e.to_string())?;
    if made.status.success() { Ok(image) } else { Err(format!("mkfs.erofs: {made:?}")) }
}

/// One file in cpio's "newc" format (Documentation/driver-api/early-userspace of Linux).
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
    let inode = archive.len() as u32 + 1;
    let size = content.len() as u32;
    let fields =
        [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
    archive.extend(b"070701");
    for field in fields {
        write!(archive, "{field:08x}").unwrap();
    }
    archive.extend(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    while !archive.len().is_multiple_of(4) {
        archive.push(0);
    }
}
