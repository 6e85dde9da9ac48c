//! Compiled code for a module: from the cache, or by the compiler, a process that has given up
//! everything before it reads the module (`wasm-worker compile`).
//!
//! A module that several containers want at the same time is compiled once. Nobody else waits for
//! it: the compiler is another process, and the digest of a module is made on a thread of its own.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_task::error::{Error, Result};
use kuasar_host::live::Live;
use kuasar_host::{hex, process};
use kuasar_oci::processes::{Failure, new_cookie};
use sandbox_parent::client::{Parent, Spawn};
use tokio::sync::Semaphore;
use wasm_common::wire::Hello;
use wasm_image::{Program, shown};

use crate::cache::{Cache, Draft};
use crate::config::Config;
use crate::verify::{Identity, Sum, digest};

/// What code is called that neither counts nor can be interrupted.
pub const PLAIN: &str = "plain";
/// Most digests of modules that are remembered.
const MAX_SUMS: usize = 4096;
/// Most characters of a compiler's complaint.
const MAX_WORDS: u64 = 2000;

/// Runs the compiler.
#[async_trait]
pub trait Run: Send + Sync {
    /// Runs that of `engine` with these standard streams and words behind `compile`; answers its
    /// exit status, or `None` when it did not end within `patience` and was killed.
    async fn run(
        &self,
        engine: &str,
        streams: [BorrowedFd<'_>; 3],
        words: Vec<String>,
        patience: Duration,
    ) -> std::result::Result<Option<u32>, Failure>;
}

/// By sandbox-parent.
pub struct ByParent {
    /// sandbox-parent.
    pub parent: Parent,
    /// By engine: path by which it can execute the worker, or why there is none.
    pub programs: BTreeMap<&'static str, std::result::Result<String, String>>,
}

#[async_trait]
impl Run for ByParent {
    async fn run(
        &self,
        engine: &str,
        streams: [BorrowedFd<'_>; 3],
        words: Vec<String>,
        patience: Duration,
    ) -> std::result::Result<Option<u32>, Failure> {
        let cookie = new_cookie();
        let program = self.programs.get(engine).cloned();
        let program = program.unwrap_or_else(|| Err(format!("there is no engine {engine:?}")))?;
        let mut argv = vec![program, "compile".into()];
        argv.extend(words);
        let fds = streams.map(Some).to_vec();
        let spawned = self.parent.spawn(Spawn { argv, env: Vec::new(), fds, cookie }).await?;
        let ended = tokio::time::timeout(patience, self.parent.exit_of(cookie)).await;
        if ended.is_err() {
            // It may have ended just now.
            let _ = process::pidfd_signal(spawned.pidfd.as_fd(), libc::SIGKILL);
            let _ = self.parent.exit_of(cookie).await;
        }
        self.parent.acknowledge(cookie).await;
        Ok(match ended {
            Ok(exit) => Some(exit?.status),
            Err(_) => None,
        })
    }
}

type Flights = HashMap<String, Arc<tokio::sync::Mutex<()>>>;

/// Compiles, and remembers.
pub struct Compiler {
    config: Live<Config>,
    run: Arc<dyn Run>,
    cache: Mutex<Option<Arc<Cache>>>,
    /// Digests of modules by the layers that they are in and their identity.
    sums: Mutex<HashMap<(String, Identity), Sum>>,
    flights: Mutex<Flights>,
    jobs: Semaphore,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cannot(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => Error::ResourceExhausted(format!(
            "{what}: {error}: make room where cache.dir is, or set a smaller cache.size"
        )),
        _ => Error::internal(what, error),
    }
}

impl Compiler {
    /// With the configuration as it is at each call; how many work at the same time is read once.
    pub fn new(config: Live<Config>, run: Arc<dyn Run>) -> Self {
        let jobs = Semaphore::new(config.get().compiler.jobs);
        Self {
            config,
            run,
            cache: Mutex::default(),
            sums: Mutex::default(),
            flights: Mutex::default(),
            jobs,
        }
    }

    fn cache(&self) -> Result<Arc<Cache>> {
        let mut slot = lock(&self.cache);
        if let Some(cache) = slot.as_ref() {
            return Ok(cache.clone());
        }
        let dir = self.config.get().cache.dir.clone();
        let cache = Cache::open(&dir).map_err(cannot("open the cache of compiled code"))?;
        Ok(slot.insert(Arc::new(cache)).clone())
    }

    /// Code of one variant for a program of an image whose rootfs is made of `layers`, and the
    /// module's digest.
    ///
    /// # Errors
    /// When it cannot be compiled: `InvalidArgument` says what is wrong with it.
    pub async fn artifact(
        &self,
        hello: &Hello,
        program: Program,
        layers: &str,
        variant: &str,
    ) -> Result<(File, String)> {
        let sum = hex(&self.sum(&program, layers).await?);
        let code = self.code(hello, program, &sum, variant).await?;
        Ok((code, sum))
    }

    /// The digest of a program that is not compiled.
    ///
    /// # Errors
    /// When it cannot be read, or is too large.
    pub async fn digest(&self, program: &Program, layers: &str) -> Result<String> {
        Ok(hex(&self.sum(program, layers).await?))
    }

    async fn code(
        &self,
        hello: &Hello,
        program: Program,
        sum: &str,
        variant: &str,
    ) -> Result<File> {
        let mut name = format!("{sum}-{}-{}-{}", hello.engine, hello.version, hello.settings);
        if variant != PLAIN {
            name = format!("{name}-{variant}");
        }
        let cache = self.cache()?;
        if let Some(code) = find(&cache, &name).await? {
            return Ok(code);
        }
        let flight = lock(&self.flights).entry(name.clone()).or_default().clone();
        let result = {
            let _turn = flight.lock().await;
            match find(&cache, &name).await? {
                Some(code) => Ok(code),
                None => self.compile(&cache, &name, program, &hello.engine, variant).await,
            }
        };
        let mut flights = lock(&self.flights);
        // Ours, and the table's: nobody else is on the way.
        if Arc::strong_count(&flight) <= 2 {
            flights.remove(&name);
        }
        result
    }

    /// The digest of a module; read once for each file of each image.
    async fn sum(&self, program: &Program, layers: &str) -> Result<Sum> {
        let identity = Identity::of(&program.file).map_err(cannot("look at the module"))?;
        let max = self.config.get().compiler.max_module;
        if identity.size() > max {
            return Err(Error::InvalidArgument(format!(
                "exec: {} has {} bytes: at most {max} are compiled (compiler.max_module)",
                shown(program.path.as_os_str()),
                identity.size()
            )));
        }
        let key = (layers.to_owned(), identity.clone().in_layers());
        // Without layers nothing tells two file systems apart.
        let known = lock(&self.sums).get(&key).copied().filter(|_| !layers.is_empty());
        if let Some(sum) = known {
            return Ok(sum);
        }
        let file = program.file.try_clone().map_err(cannot("read the module"))?;
        let work = tokio::task::spawn_blocking(move || digest(&file, max));
        let sum = work.await.map_err(|error| Error::internal("worker", error))?;
        let sum = sum.map_err(cannot("read the module"))?;
        let mut sums = lock(&self.sums);
        if sums.len() >= MAX_SUMS {
            sums.clear();
        }
        sums.insert(key, sum);
        Ok(sum)
    }

    async fn compile(
        &self,
        cache: &Arc<Cache>,
        name: &str,
        program: Program,
        engine: &str,
        variant: &str,
    ) -> Result<File> {
        let config = self.config.get();
        let limit = &config.compiler;
        let _job = self.jobs.acquire().await.map_err(|e| Error::internal("compiler", e))?;
        let begun = Instant::now();
        let draft = cache.draft().map_err(cannot("write compiled code"))?;
        let words = words().map_err(cannot("make a file for the compiler's words"))?;
        let limits = format!("{},{},{}", limit.memory, limit.timeout.as_secs().max(1), limit.uid);
        let streams = [program.file.as_fd(), draft.file.as_fd(), words.as_fd()];
        rewind(&program.file).map_err(cannot("read the module"))?;
        let mut arguments = vec![limits, variant.to_owned()];
        arguments.extend(config.worker_words(engine));
        let ended = self.run.run(engine, streams, arguments, limit.timeout).await;
        let ended = ended.map_err(|error| Error::internal("run the compiler", error))?;
        let module = shown(program.path.as_os_str());
        match ended {
            Some(0) => {}
            None | Some(TIME_OUT | KILLED) => {
                return Err(Error::InvalidArgument(format!(
                    "exec: {module} is not compiled within {:?} (compiler.timeout)",
                    limit.timeout
                )));
            }
            Some(status) => return Err(complaint(&module, status, words)),
        }
        let (cache, name, size) = (cache.clone(), name.to_owned(), config.cache.size);
        let code = tokio::task::spawn_blocking(move || keep(&cache, &name, &draft, size)).await;
        let code = code.map_err(|error| Error::internal("worker", error))?;
        let code = code.map_err(cannot("keep compiled code"))?;
        tracing::info!(module, took = ?begun.elapsed(), "compiled");
        kuasar_daemon::metrics::observe("wasm_compile", begun.elapsed());
        Ok(code)
    }
}

/// 128 + SIGXCPU.
const TIME_OUT: u32 = 128 + libc::SIGXCPU as u32;
/// 128 + SIGKILL: the hard limit of processor time.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

fn keep(cache: &Cache, name: &str, draft: &Draft, size: u64) -> std::io::Result<File> {
    let code = cache.commit(name, draft)?;
    cache.shrink(size, name);
    Ok(code)
}

/// What is known is opened here; what has to be read first, on another thread.
async fn find(cache: &Arc<Cache>, name: &str) -> Result<Option<File>> {
    let wrap = cannot("read compiled code");
    if let Some(code) = cache.known(name).map_err(&wrap)? {
        return Ok(Some(code));
    }
    let (cache, name) = (cache.clone(), name.to_owned());
    let work = tokio::task::spawn_blocking(move || cache.get(&name)).await;
    work.map_err(|error| Error::internal("worker", error))?.map_err(wrap)
}

fn rewind(mut file: &File) -> std::io::Result<()> {
    use std::io::Seek;
    file.rewind()
}

fn words() -> std::io::Result<OwnedFd> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    Ok(memfd_create("compiler", MFdFlags::MFD_CLOEXEC)?)
}

/// What the compiler has said, bounded and in one line: part of it are the module's words.
fn complaint(module: &str, status: u32, words: OwnedFd) -> Error {
    let file = File::from(words);
    let mut text = String::new();
    if rewind(&file).is_ok() {
        // What is no text is not shown.
        let _ = file.take(MAX_WORDS).read_to_string(&mut text);
    }
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let text = text.trim().trim_start_matches("wasm-worker: ");
    let text = text.trim_start_matches("wasm-worker-wasmedge: ").trim();
    if text.contains("No space left") {
        return Error::ResourceExhausted(format!(
            "{text}: make room where cache.dir is, or set a smaller cache.size"
        ));
    }
    let text = if text.is_empty() { "it has said nothing" } else { text };
    Error::InvalidArgument(format!("exec: {module} cannot be compiled (status {status}): {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_not_the_images_fault() {
        let error = cannot("write")(std::io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(matches!(error, Error::ResourceExhausted(_)));
    }
}
