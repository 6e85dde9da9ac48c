//! `make guest`'s image, built twice: the same bytes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Builds an image in `dir` from `init` under this umask; gives back initramfs and disk image.
fn build(dir: &Path, init: &Path, umask: &str) -> [Vec<u8>; 2] {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("build.sh");
    let out = Command::new("sh")
        .args(["-c", "umask \"$0\"; exec \"$@\"", umask])
        .args([script.as_os_str(), OsStr::new("image"), init.as_os_str()])
        .env("GUEST", dir)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said = String::from_utf8(out.stdout).unwrap();
    ["initramfs.cpio", "guest.erofs"].map(|name| {
        let content = fs::read(dir.join(name)).unwrap();
        assert!(
            said.contains(&format!("{name}: {} bytes", content.len())),
            "the size of {name} is not told: {said}"
        );
        content
    })
}

/// Any static program: the loader of this system is one, as a rule.
fn program() -> Option<PathBuf> {
    let loader = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    loader.iter().map(PathBuf::from).find(|p| guest_image::read_init(p).is_ok())
}

#[test]
#[ignore = "needs root and mkfs.erofs"]
fn two_builds_of_an_image_are_the_same_bytes() {
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: not root, and the disk image holds a device node");
    }
    if !env::split_paths(&env::var_os("PATH").unwrap()).any(|p| p.join("mkfs.erofs").exists()) {
        return println!("skipped: no mkfs.erofs");
    }
    let Some(program) = program() else {
        return println!("skipped: no static program to put into an image");
    };
    let dir = tempfile::tempdir().unwrap();
    let mut images = Vec::new();
    // differing places, umasks, modes, times of the program
    for (name, umask, mode) in [("one", "022", 0o755), ("another-place", "077", 0o700)] {
        let place = dir.path().join(name);
        fs::create_dir(&place).unwrap();
        let init = place.join("program");
        fs::copy(&program, &init).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(mode)).unwrap();
        images.push(build(&place, &init, umask));
        let mut left: Vec<_> =
            fs::read_dir(&place).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["guest.erofs", "initramfs.cpio", "program"], "something was left behind");
    }
    assert!(images[0][0] == images[1][0], "the initramfs differs");
    assert!(images[0][1] == images[1][1], "the disk image differs");
}
