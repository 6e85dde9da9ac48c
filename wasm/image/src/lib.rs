//! Where in a container's rootfs its program is, and what it is.
//!
//! The rootfs is the image's: every path is resolved inside it (`openat2`, `RESOLVE_IN_ROOT`), so
//! that `..`, absolute links and links out of it end in it. What is found is opened only when it
//! is a regular file: a FIFO would hold us up.
//!
//! The same of images that are not mounted, by their layers, is [`layout::program`]; what kind of an image one is,
//! [`origin::origin`].

mod layers;
pub mod layout;
pub mod origin;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kuasar_host::safe_path::{open_in_root, proc_path};
use serde_json::Value;
use wasm_common::kind::{self, Detected};

/// Used when the process has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most directories of a `PATH` that are looked at.
const MAX_DIRS: usize = 64;

/// A program of an image.
#[derive(Debug)]
pub struct Program {
    /// Open for reading.
    pub file: File,
    /// By which name it was found, inside the rootfs.
    pub path: PathBuf,
    /// What it is.
    pub what: Detected,
    /// Whether it is a shared object (`….so`), as WasmEdge's compiler makes them: no program that
    /// the kernel could execute.
    pub shared: bool,
}

/// The program of a container's spec; `None` when there is no such file.
///
/// # Errors
/// When the rootfs or the program cannot be read; the text is for the container's user.
pub fn program(rootfs: &Path, spec: &Value) -> Result<Option<Program>, String> {
    let places = places(spec)?;
    let root = File::open(rootfs)
        .map_err(|error| format!("cannot open the rootfs {}: {error}", rootfs.display()))?;
    for candidate in places {
        if let Some(file) = open(&root, &candidate)? {
            let bytes = header(&file, &candidate)?;
            let shared = candidate.extension().is_some_and(|ending| ending == "so")
                && is_shared_object(&bytes);
            let what = kind::detect(&bytes);
            return Ok(Some(Program { file, path: candidate, what, shared }));
        }
    }
    Ok(None)
}

/// Where the program of a container's spec may be, inside its rootfs.
fn places(spec: &Value) -> Result<Vec<PathBuf>, String> {
    let text = |pointer: &str| spec.pointer(pointer).and_then(Value::as_str);
    let Some(name) = text("/process/args/0").filter(|name| !name.is_empty()) else {
        return Err("exec: no command specified: the image has no entrypoint".into());
    };
    let cwd = text("/process/cwd").unwrap_or("/");
    let env = spec.pointer("/process/env").and_then(Value::as_array);
    let path = env
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="));
    Ok(candidates(name, cwd, path.unwrap_or(DEFAULT_PATH)))
}

/// Paths by which a name may be meant. Images of WebAssembly name a file beside their working
/// directory or in `/` as often as one of `PATH`.
fn candidates(name: &str, cwd: &str, path: &str) -> Vec<PathBuf> {
    let cwd = Path::new(cwd);
    if name.contains('/') {
        return vec![cwd.join(name)];
    }
    let dirs = path.split(':').take(MAX_DIRS).map(|dir| cwd.join(dir));
    dirs.chain([cwd.to_owned(), PathBuf::from("/")]).map(|dir| dir.join(name)).collect()
}

/// A regular file of the rootfs.
fn open(root: &File, path: &Path) -> Result<Option<File>, String> {
    let found: OwnedFd = match open_in_root(root.as_fd(), path, libc::O_PATH) {
        Ok(found) => found,
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(None);
        }
        Err(error) => {
            let reason = error.errno().map_or_else(
                || error.to_string(),
                |errno| std::io::Error::from_raw_os_error(errno).to_string(),
            );
            return Err(format!("exec: {}: {reason}", shown(path.as_os_str())));
        }
    };
    let file = File::from(found.try_clone().map_err(|error| error.to_string())?);
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Ok(None);
    }
    // By the descriptor that was looked at: whatever the path is by now.
    File::open(proc_path(found.as_fd()))
        .map(Some)
        .map_err(|error| format!("exec: {}: {error}", shown(path.as_os_str())))
}

/// Most bytes that are looked at.
const HEADER: u64 = 18;

/// ELF's magic, and `ET_DYN` as its type (System V ABI, ELF header).
fn is_shared_object(header: &[u8]) -> bool {
    header.starts_with(b"\x7fELF") && header.get(16..18) == Some(&[3, 0])
}

fn header(file: &File, path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(HEADER as usize);
    file.take(HEADER)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("exec: read {}: {error}", shown(path.as_os_str())))?;
    Ok(bytes)
}

/// A name of the image in an error's text: bounded, and without control characters.
pub fn shown(name: &OsStr) -> String {
    format!("{:.300?}", name.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;
    use wasm_common::kind::Kind;

    use super::*;

    fn spec(arg: &str, cwd: &str, path: &str) -> Value {
        json!({ "process": { "args": [arg], "cwd": cwd, "env": [format!("PATH={path}")] } })
    }

    fn rootfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/app/bin")).unwrap();
        let at = dir.path().join("root/app/bin/m.wasm");
        std::fs::write(at, b"\0asm\x01\0\0\0").unwrap();
        std::fs::write(dir.path().join("secret.wasm"), b"\0asm\x0d\0\x01\0").unwrap();
        dir
    }

    fn find(dir: &Path, arg: &str, cwd: &str, path: &str) -> Option<Program> {
        program(&dir.join("root"), &spec(arg, cwd, path)).unwrap()
    }

    #[test]
    fn a_program_is_found_as_a_shell_would_and_beside_the_working_directory() {
        let dir = rootfs();
        let module = Some(Detected::Wasm(Kind::Module));
        let what = |arg, cwd, path| find(dir.path(), arg, cwd, path).map(|found| found.what);
        assert_eq!(what("/app/bin/m.wasm", "/", "/bin"), module);
        assert_eq!(what("./bin/m.wasm", "/app", "/bin"), module);
        assert_eq!(what("m.wasm", "/", "/bin:/app/bin"), module);
        assert_eq!(what("m.wasm", "/app/bin", "/bin"), module);
        assert_eq!(what("m.wasm", "/", "/bin"), None);
        assert_eq!(what("/app", "/", "/bin"), None);
    }

    #[test]
    fn nothing_outside_of_the_rootfs_is_found() {
        let dir = rootfs();
        let outside = dir.path().join("secret.wasm");
        symlink(&outside, dir.path().join("root/absolute.wasm")).unwrap();
        symlink("../../../secret.wasm", dir.path().join("root/app/up.wasm")).unwrap();
        symlink("/app/bin/m.wasm", dir.path().join("root/inside.wasm")).unwrap();
        for arg in ["/absolute.wasm", "/app/up.wasm", "/../secret.wasm", "/../../secret.wasm"] {
            assert!(find(dir.path(), arg, "/", "/bin").is_none(), "{arg}");
        }
        // An absolute link of the image means its own root.
        let found = find(dir.path(), "/inside.wasm", "/", "/bin").unwrap();
        assert_eq!(found.what, Detected::Wasm(Kind::Module));
    }

    #[test]
    fn a_fifo_and_a_loop_hold_nobody_up() {
        let dir = rootfs();
        nix::unistd::mkfifo(&dir.path().join("root/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(find(dir.path(), "/fifo", "/", "/bin").is_none());
        symlink("/loop", dir.path().join("root/loop")).unwrap();
        let error = program(&dir.path().join("root"), &spec("/loop", "/", "")).unwrap_err();
        assert!(error.contains("symbolic links"), "{error}");
    }

    #[test]
    fn no_entrypoint_is_said_so() {
        let dir = rootfs();
        let error = program(dir.path(), &json!({ "process": { "args": [] } })).unwrap_err();
        assert!(error.contains("no entrypoint"));
    }

    /// Numbers that look random and are the same in each run (Marsaglia's xorshift64).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn pick<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
            all[usize::try_from(self.next()).unwrap() % all.len()]
        }
    }

    /// Where the kernel says that an open file is.
    fn place(file: &File) -> PathBuf {
        use std::os::fd::AsRawFd;
        std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
    }

    #[test]
    fn whatever_an_image_links_to_and_names_only_its_own_files_are_found() {
        const SEED: u64 = 0x6b75_6173_6172;
        let (mut found, mut numbers) = (0, Numbers(SEED));
        for round in 0..300 {
            let dir = rootfs();
            let root = dir.path().join("root").canonicalize().unwrap();
            let outside = dir.path().join("secret.wasm");
            let outside = outside.to_str().unwrap();
            let names = ["a", "b", "app/c", "app/bin/d", "app/bin"];
            let parts = ["..", ".", "a", "b", "app", "c", "bin", "m.wasm", "secret.wasm", "", "d"];
            let path = |numbers: &mut Numbers| match numbers.next() % 8 {
                0 => outside.to_owned(),
                1 => "/app/bin/m.wasm".to_owned(),
                2 => "\u{1}\u{fffd}".repeat(40),
                _ => {
                    let length = numbers.next() % 6;
                    let words: Vec<&str> = (0..length).map(|_| numbers.pick(&parts)).collect();
                    let lead = numbers.pick(&["", "/", "../../", "/../"]);
                    format!("{lead}{}", words.join("/"))
                }
            };
            for name in names {
                if numbers.next() % 2 == 0 {
                    // A name that is taken already stays what it is.
                    let _ = symlink(path(&mut numbers), root.join(name));
                }
            }
            for _ in 0..8 {
                let (arg, cwd) = (path(&mut numbers), path(&mut numbers));
                let dirs = format!("{}:{}", path(&mut numbers), path(&mut numbers));
                // An error is an answer, too.
                if let Ok(Some(program)) = program(&root, &spec(&arg, &cwd, &dirs)) {
                    let at = place(&program.file);
                    assert!(at.starts_with(&root), "round {round}: {arg:?} {cwd:?}: {at:?}");
                    found += 1;
                }
            }
        }
        assert!(found > 50, "the test finds too little to say anything: {found}");
    }

    #[test]
    fn no_header_does_harm() {
        let mut numbers = Numbers(1);
        let dir = rootfs();
        let at = dir.path().join("root/app/bin/m.wasm");
        let seeds: [&[u8]; 3] = [b"\0asm\x01\0\0\0", b"\0asm\x0d\0\x01\0", b"\x7fELF\x02\x01\x01"];
        for _ in 0..500 {
            let mut bytes = numbers.pick(&seeds).to_vec();
            bytes.resize(usize::try_from(numbers.next() % 24).unwrap(), 3);
            if let Some(byte) = bytes.first_mut().filter(|_| numbers.next().is_multiple_of(4)) {
                *byte = numbers.next().to_le_bytes()[0];
            }
            std::fs::write(&at, &bytes).unwrap();
            let program = find(dir.path(), "/app/bin/m.wasm", "/", "/").unwrap();
            assert_eq!(program.what, kind::detect(&bytes), "{bytes:?}");
            assert!(!program.shared);
        }
    }
}
