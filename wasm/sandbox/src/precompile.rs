//! `wasm-sandboxer precompile`: fills the cache before the first container comes.
//!
//! The cache knows modules by content, so that all that matters of an image is its program: of a file,
//! of an archive, or of containerd's own store. The code is made by the same compiler, under the same
//! name, as the daemon would.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kuasar_host::live::Live;
use kuasar_oci::processes::Failure;
use wasm_common::job::Budget;
use wasm_common::kind::{self, Detected};
use wasm_common::wire::{Hello, PROTOCOL};
use wasm_image::layout::{self, Archive, Found};
use wasm_image::{Program, shown};

use crate::compile::{Compiler, PLAIN, Run};
use crate::config::{Config, WASMEDGE};
use crate::containerd::Store;

/// As a child of this process, for the command line.
struct ByOurselves {
    engine: String,
    program: PathBuf,
}

#[async_trait]
impl Run for ByOurselves {
    async fn run(
        &self,
        engine: &str,
        streams: [BorrowedFd<'_>; 3],
        words: Vec<String>,
        patience: Duration,
    ) -> Result<Option<u32>, Failure> {
        debug_assert_eq!(engine, self.engine, "one engine at a time");
        let [stdin, stdout, stderr] =
            streams.map(|stream| stream.try_clone_to_owned().map(std::process::Stdio::from));
        let mut child = tokio::process::Command::new(&self.program)
            .arg("compile")
            .args(words)
            .env_clear()
            .stdin(stdin?)
            .stdout(stdout?)
            .stderr(stderr?)
            .kill_on_drop(true)
            .spawn()?;
        match tokio::time::timeout(patience, child.wait()).await {
            Ok(status) => {
                use std::os::unix::process::ExitStatusExt;
                let status = status?;
                let code = status.code().or(status.signal().map(|signal| 128 + signal));
                Ok(code.and_then(|code| u32::try_from(code).ok()).or(Some(255)))
            }
            Err(_) => {
                child.kill().await?;
                Ok(None)
            }
        }
    }
}

/// Where images are that are no files.
#[derive(Debug, Clone)]
pub struct Images {
    /// containerd's socket.
    pub address: PathBuf,
    /// Its namespace.
    pub namespace: String,
}

/// Compiles programs into the cache, for one engine: those of files (modules, components, archives of
/// images), and of images that containerd has.
///
/// # Errors
/// What is wrong with the first that cannot be compiled.
pub async fn precompile(
    config: &Config,
    engine: &str,
    all: &[PathBuf],
    images: &Images,
) -> Result<(), String> {
    let program = config.worker_program(engine)?;
    let out = std::process::Command::new(&program)
        .arg("version")
        .args(config.worker_words(engine))
        .output()
        .map_err(|error| format!("run {}: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let hello = hello(&text).ok_or_else(|| {
        let reason = String::from_utf8_lossy(&out.stderr);
        format!("{} has no version: {}", program.display(), reason.trim())
    })?;
    let run = Arc::new(ByOurselves { engine: engine.to_owned(), program });
    let compiler = Compiler::new(Live::new(config.clone()), run);
    for given in all {
        let wrap = |error: String| format!("{}: {error}", given.display());
        let program = find(given, images, config.compiler.max_module).await.map_err(wrap)?;
        let Detected::Wasm(kind) = program.what else {
            return Err(wrap(format!("no module and no component: {:?}", program.what)));
        };
        let begun = Instant::now();
        let variant = match engine {
            // Its code is always ended with its process.
            WASMEDGE => PLAIN.to_owned(),
            _ => config.variant(&Budget::default(), kind),
        };
        let place = if program.path == *given {
            String::new()
        } else {
            format!(" {}", shown(program.path.as_os_str()))
        };
        let made = compiler.artifact(&hello, program, "", &variant).await;
        made.map_err(|error| wrap(error.chain()))?;
        println!("{}:{place} {kind}, {:.1?}", given.display(), begun.elapsed());
    }
    Ok(())
}

/// The program that is meant.
async fn find(given: &Path, images: &Images, max: u64) -> Result<Program, String> {
    let file = match File::open(given) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return pulled(given, images, max).await.map_err(|reason| {
                format!("it is no file, and not found in containerd, either: {reason}")
            });
        }
        Err(error) => return Err(error.to_string()),
    };
    let mut header = Vec::new();
    (&file)
        .take(kind::HEADER as u64)
        .read_to_end(&mut header)
        .map_err(|error| error.to_string())?;
    let what = kind::detect(&header);
    if what == Detected::Other {
        // The header has moved the descriptor's position.
        (&file).rewind().map_err(|error| error.to_string())?;
        let archive = Archive::open(file).map_err(|reason| {
            format!("it is neither WebAssembly nor the archive of an image: {reason}")
        })?;
        return held(layout::program(&archive, &archive.images()?, max)?);
    }
    Ok(Program { file, path: given.to_owned(), what, shared: false })
}

/// The program of an image that containerd has.
async fn pulled(name: &Path, images: &Images, max: u64) -> Result<Program, String> {
    let name = name.to_str().ok_or("its name is no UTF-8")?.to_owned();
    if images.address.as_os_str().is_empty() {
        return Err("containerd.address is empty: name its socket by --containerd".into());
    }
    let store = Store::connect(&images.address, &images.namespace, None).await?;
    let target = store.image(&name).await.map_err(|reason| {
        let Images { address, namespace } = images;
        format!(
            "{reason}. Names are those of `ctr -a {} -n {namespace} images ls`; the archive that \
             `ctr images export` writes does as well",
            address.display()
        )
    })?;
    // Layers are read as they come, by code that waits.
    let work = tokio::task::spawn_blocking(move || layout::program(&store, &[target], max));
    held(work.await.map_err(|error| error.to_string())??)
}

/// A program that is in no file.
fn held(found: Found) -> Result<Program, String> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let what = kind::detect(&found.bytes);
    let make = || -> std::io::Result<File> {
        let mut file = File::from(memfd_create("module", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&found.bytes)?;
        Ok(file)
    };
    let file = make().map_err(|error| format!("hold it in memory: {error}"))?;
    Ok(Program { file, path: found.path, what, shared: false })
}

/// The worker's words on itself: `engine version (settings)`.
fn hello(text: &str) -> Option<Hello> {
    let mut words = text.split_whitespace();
    let (engine, version) = (words.next()?.to_owned(), words.next()?.to_owned());
    let settings = words.next()?.strip_prefix('(')?.strip_suffix(')')?.to_owned();
    Some(Hello { protocol: PROTOCOL, engine, version, settings })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workers_version_is_read() {
        let hello = hello("wasmtime 48 (00ff)\n").unwrap();
        assert_eq!((&*hello.engine, &*hello.version, &*hello.settings), ("wasmtime", "48", "00ff"));
        assert!(super::hello("wasmtime").is_none());
    }

    #[tokio::test]
    async fn what_is_neither_a_module_nor_an_image_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images { address: dir.path().join("none"), namespace: "k8s.io".into() };
        let text = dir.path().join("text");
        std::fs::write(&text, "this is no WebAssembly").unwrap();
        let error = find(&text, &images, 1000).await.unwrap_err();
        assert!(error.contains("neither WebAssembly nor the archive"), "{error}");
        let error = find(Path::new("localhost/no:1"), &images, 1000).await.unwrap_err();
        assert!(error.contains("no file") && error.contains("none"), "{error}");
    }
}
