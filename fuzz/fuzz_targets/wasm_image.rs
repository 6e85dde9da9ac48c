//! Where a container's program is: whatever its command, its working directory, its PATH and a link
//! in its image say, what is found is a file of the image.
//!
//! The input is four texts, divided by NUL: where a link leads, command, working directory, PATH.
#![no_main]

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use tempfile::TempDir;

fn tree() -> &'static TempDir {
    static TREE: OnceLock<TempDir> = OnceLock::new();
    TREE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/app/bin")).unwrap();
        std::fs::write(dir.path().join("root/app/bin/m.wasm"), b"\0asm\x01\0\0\0").unwrap();
        std::fs::write(dir.path().join("secret.wasm"), b"\0asm\x01\0\0\0").unwrap();
        dir
    })
}

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(4, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let (link, command, cwd, path) = (next(), next(), next(), next());
    let root: PathBuf = tree().path().join("root").canonicalize().unwrap();
    let at = root.join("link");
    let _ = std::fs::remove_file(&at);
    let _ = std::os::unix::fs::symlink(OsStr::from_bytes(link), &at);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let spec = json!({ "process": {
        "args": [text(command)], "cwd": text(cwd), "env": [format!("PATH={}", text(path))],
    }});
    if let Ok(Some(program)) = wasm_image::program(&root, &spec) {
        let fd = program.file.as_raw_fd();
        let found = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert!(found.starts_with(&root), "{found:?}");
    }
});
