//! Templates: a machine that was saved when its agent served, and from which pods start.
//!
//! ```text
//! first pod:  cold boot ─▶ in the background: boot a machine without share, vsock and NICs,
//!                          wait for its agent on the serial channel, save it, end it
//! later pods: restore ─▶ plug in share, vsock, NICs ─▶ the agent dials out, as after any boot
//! ```
//!
//! A VMM that plugs none of these in (Firecracker) saves a machine with its vsock and one NIC, whose tap
//! leads nowhere. The vsock loses its connections when it is restored; the NIC gets the tap of the copy's
//! pod, and from the guest the MAC address (module `nics`).
//!
//! **No secret is in it.** The machine is saved before any host has welcomed its agent: it has no
//! token, no pod and no entropy of a host's. Each copy is welcomed by itself, with a fresh token,
//! the time and entropy, before anything else happens in it. What copies share is what a kernel
//! draws before that: its boot id, and the address layout of the agent.
//!
//! **Never wrong, at worst slow.** A template is named by a digest of all that it was made from:
//! the bytes of kernel and image, the VMM's program and configuration, the size of the machine. Beside
//! it lie the digests of its own files, which are compared before a daemon uses it for the first
//! time. What does not fit is removed, and the pod boots cold; so does a pod whose copy fails.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_sandbox::sandboxer::{TemplateInfo, TemplateJob};
use kuasar_host::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::net::UnixStream;
use vmm_common::handshake::{PROTOCOL, Ready, read_json};
use vmm_common::mux::Mux;

use crate::channel::{Listener, uds};
use crate::guest::Waiting;
use crate::vmm::{Channel, Console, Error, Feature, Features, Result, Root, VmSpec, Vmm};

/// Kind of the record beside a template's files, and its version.
const RECORD: (&str, u32) = ("vm-template", 1);
/// The record's file.
const FILE: &str = "template";
/// Suffix of a directory in which a template is being made.
const UNFINISHED: &str = ".new";
/// After a failure nobody tries again for so long.
const PAUSE: Duration = Duration::from_secs(600);
/// Beginning of the names of machines that become templates.
pub const PREFIX: &str = "template-";

/// Whether pods start from templates: `[template]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateConfig {
    /// They do, where VMM and machine can.
    pub enabled: bool,
    /// Where they are kept: the memory of a guest each. `templates` in the state directory when
    /// unset.
    pub dir: Option<PathBuf>,
    /// Templates at most, one for each size of machine; the oldest goes.
    pub most: usize,
    /// How long a copy may take until its agent serves; then the pod boots cold.
    #[serde(with = "kuasar_daemon::common::duration")]
    pub ready: Duration,
    /// Machines that are kept ready for pods of the default size; 0 keeps none.
    pub pool: u32,
    /// Pause between two machines that are made for the pool.
    #[serde(with = "kuasar_daemon::common::duration")]
    pub refill: Duration,
}

impl Default for TemplateConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            dir: None,
            most: 4,
            ready: Duration::from_secs(10),
            pool: 0,
            refill: Duration::from_secs(1),
        }
    }
}

/// What is durable of a template, beside what its driver has written.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    /// Digest of what it was made from.
    key: String,
    /// Digests of its files, by name.
    files: std::collections::BTreeMap<String, String>,
}

/// A file, by everything that changes with its content.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Identity {
    fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        let changed = (meta.ctime(), meta.ctime_nsec());
        Ok(Self { device: meta.dev(), inode: meta.ino(), size: meta.size(), changed })
    }
}

/// Bytes that are looked at together.
const BLOCK: u64 = 256 << 10;

/// Digest of a file's content: of its length, and of each block that is not all zeros with its place.
/// The memory of a guest is mostly zeros, and its file mostly holes, which are not read.
fn content(file: &mut File) -> std::io::Result<String> {
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let mut at = 0;
    while at < length {
        let from = i64::try_from(at).map_err(std::io::Error::other)?;
        at = match nix::unistd::lseek(&*file, from, nix::unistd::Whence::SeekData) {
            Ok(data) => u64::try_from(data).map_err(std::io::Error::other)? / BLOCK * BLOCK,
            // No data behind this.
            Err(nix::errno::Errno::ENXIO) => break,
            // A file system that does not know of holes.
            Err(nix::errno::Errno::EINVAL) => at,
            Err(error) => return Err(error.into()),
        };
        file.seek(SeekFrom::Start(at))?;
        let mut block = Vec::new();
        Read::by_ref(file).take(BLOCK).read_to_end(&mut block)?;
        if block.iter().any(|byte| *byte != 0) {
            hash.update(at.to_le_bytes());
            hash.update(&block);
        }
        at += BLOCK;
    }
    Ok(hex(&hash.finalize()))
}

#[derive(Debug, Default)]
struct State {
    /// Digests of files that did not change since.
    digests: HashMap<Identity, String>,
    /// Failures, by key.
    failed: HashMap<String, Instant>,
    /// One is being made.
    busy: bool,
}

/// The templates of a daemon.
#[derive(Debug)]
pub struct Templates {
    dir: PathBuf,
    state: Mutex<State>,
}

/// The turn to make a template; given back when it is dropped.
#[derive(Debug)]
pub struct Turn(Arc<Templates>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().busy = false;
    }
}

fn io(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let text = format!("{what} {}", path.display());
    move |source| Error::Io { what: text, source }
}

impl Templates {
    /// Those in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, state: Mutex::default() }
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Digest of a file, computed once for as long as it does not change. Blocks.
    fn digest(&self, path: &Path) -> Result<String> {
        let mut file = File::open(path).map_err(io("open", path))?;
        let identity = Identity::of(&file).map_err(io("look at", path))?;
        if let Some(known) = self.state().digests.get(&identity) {
            return Ok(known.clone());
        }
        let digest = content(&mut file).map_err(io("read", path))?;
        let mut state = self.state();
        // Files that are long gone are the only ones that pile up.
        if state.digests.len() > 64 {
            state.digests.clear();
        }
        state.digests.insert(identity, digest.clone());
        Ok(digest)
    }

    /// Name of the template for a machine like `spec`. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`] when kernel or image cannot be read; the driver's.
    pub fn key(&self, vmm: &dyn Vmm, spec: &VmSpec) -> Result<String> {
        let root = match &spec.boot.root {
            Root::Initrd(path) => path,
            Root::Image { disk, .. } => &disk.path,
        };
        let parts = [
            vmm.name(),
            vmm.identity()?,
            env!("CARGO_PKG_VERSION").to_owned(),
            self.digest(&spec.boot.kernel)?,
            self.digest(root)?,
            format!("{:?}", spec.boot.params),
            format!("{:?} {:?} {} {}", spec.cpus, spec.memory_mib, spec.hugepages, spec.entropy),
            format!("{:?}", vmm.copies(spec.hugepages).ok()),
        ];
        let mut hash = Sha256::new();
        for part in parts {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        Ok(hex(&hash.finalize()))
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(key)
    }

    /// The template of this name, if there is one and it is whole. One that is not is removed.
    /// Blocks.
    pub fn find(&self, key: &str) -> Option<PathBuf> {
        let dir = self.path(key);
        if !dir.is_dir() {
            return None;
        }
        match self.check(&dir, key) {
            Ok(()) => Some(dir),
            Err(error) => {
                tracing::warn!(key, %error, "a template is damaged: it is removed");
                self.reject(key);
                None
            }
        }
    }

    fn check(&self, dir: &Path, key: &str) -> Result<()> {
        let (kind, version) = RECORD;
        let was: Description = kuasar_host::record::read(&dir.join(FILE), kind, version)?;
        if was.key != key {
            return Err(Error::State("it is another template's".into()));
        }
        for (name, digest) in &was.files {
            if name.contains('/') || self.digest(&dir.join(name))? != *digest {
                return Err(Error::State(format!("its file {name:.40?} has changed")));
            }
        }
        Ok(())
    }

    /// Removes a template that was of no use; none is made again for a while.
    pub fn reject(&self, key: &str) {
        let _ = std::fs::remove_dir_all(self.path(key));
        self.state().failed.insert(key.to_owned(), Instant::now());
    }

    /// The turn to make the template of this name, unless another is being made, or this could
    /// not be made a short while ago.
    pub fn turn(self: &Arc<Self>, key: &str) -> Option<Turn> {
        let mut state = self.state();
        state.failed.retain(|_, at| at.elapsed() < PAUSE);
        if state.busy || state.failed.contains_key(key) || self.path(key).exists() {
            return None;
        }
        state.busy = true;
        drop(state);
        Some(Turn(self.clone()))
    }

    /// Makes the template `key` of a machine like `spec`: `spec` has the template's own
    /// directory, name and cgroup. Its agent says READY at `listener`, where there is one, else on its
    /// serial port. Ends the machine in any case.
    ///
    /// # Errors
    /// What went wrong; nothing is left then.
    pub async fn make(
        &self,
        vmm: &dyn Vmm,
        spec: &VmSpec,
        listener: Option<&Listener>,
        key: &str,
        limit: Duration,
        most: usize,
    ) -> Result<()> {
        let unfinished = self.dir.join(format!("{key}{UNFINISHED}"));
        let _ = std::fs::remove_dir_all(&unfinished);
        kuasar_host::record::private_dir(&unfinished)?;
        let vm = vmm.spawn(spec).await?;
        let saved = async {
            // An agent that has dialled waits for its answer when it is saved: where its connection is gone
            // in a copy, it is told so, and dials the copy's host.
            let _agent = tokio::select! {
                biased;
                exit = vm.wait() => Err(Error::Ended {
                    program: "the machine".into(),
                    status: exit?.status,
                    said: crate::vmm::console::tail(&spec.console.log, 300),
                }),
                ready = tokio::time::timeout(limit, ready(spec, listener)) => ready.unwrap_or_else(|_| {
                    Err(Error::Deadline { what: "the template's agent".into(), limit })
                }),
            }?;
            vm.snapshot(&unfinished).await
        };
        let saved = saved.await;
        let stopped = vm.stop(Duration::ZERO).await;
        vm.release().await;
        let finished = saved.and(stopped.map(drop)).and_then(|()| self.finish(&unfinished, key));
        match &finished {
            Ok(()) => self.prune(key, most),
            Err(_) => {
                let _ = std::fs::remove_dir_all(&unfinished);
                self.state().failed.insert(key.to_owned(), Instant::now());
            }
        }
        finished
    }

    /// Describes what was saved, and gives it its name.
    fn finish(&self, unfinished: &Path, key: &str) -> Result<()> {
        let mut files = std::collections::BTreeMap::new();
        for entry in std::fs::read_dir(unfinished).map_err(io("list", unfinished))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            files.insert(name, self.digest(&entry.path())?);
        }
        let (kind, version) = RECORD;
        let description = Description { key: key.to_owned(), files };
        kuasar_host::record::write(&unfinished.join(FILE), kind, version, &description)?;
        let dir = self.path(key);
        std::fs::rename(unfinished, &dir).map_err(io("name", &dir))
    }

    /// Removes the oldest, so that there are `most`.
    fn prune(&self, newest: &str, most: usize) {
        let mut all: Vec<(std::time::SystemTime, PathBuf)> = std::fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name() != newest)
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        all.sort();
        let more = (all.len() + 1).saturating_sub(most.max(1));
        for (_, path) in all.into_iter().take(more) {
            let _ = std::fs::remove_dir_all(path);
        }
    }

    /// What there is, for an operator; digests are not looked at. Blocks.
    pub fn list(&self) -> Vec<TemplateInfo> {
        let size = |dir: &Path| -> u64 {
            let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
            files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
        };
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut all: Vec<TemplateInfo> = entries
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let key = name.strip_suffix(UNFINISHED).unwrap_or(&name).to_owned();
                let (finished, problem) = (key == name, None);
                let made_at = entry.metadata().ok()?.modified().ok()?;
                let bytes = size(&entry.path());
                Some(TemplateInfo { key, bytes, made_at, finished, problem })
            })
            .collect();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }

    /// The same after a [`TemplateJob`]. A damaged template stays: that it is damaged is the answer.
    /// Blocks.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a key that no template has.
    pub fn work(&self, what: &TemplateJob) -> Result<Vec<TemplateInfo>> {
        let mut all = self.list();
        let (TemplateJob::Verify(wanted) | TemplateJob::Remove(wanted)) = what else {
            return Ok(all);
        };
        // From the list, so that nobody names a path.
        let found = all.iter_mut().find(|one| one.finished && one.key == *wanted);
        let Some(found) = found else {
            return Err(Error::Invalid(format!("no template is named {wanted:.80?}")));
        };
        let dir = self.path(&found.key);
        if let TemplateJob::Remove(key) = what {
            std::fs::remove_dir_all(&dir).map_err(io("remove", &dir))?;
            all.retain(|one| one.key != *key || !one.finished);
        } else if let Err(error) = self.check(&dir, wanted) {
            found.problem = Some(error.chain());
        }
        Ok(all)
    }

    /// Removes what a daemon that died in the middle has left.
    pub fn sweep(&self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(UNFINISHED) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Waits until the agent says that it serves. It gets no answer, so it waits for a host when it is saved:
/// by vsock on the connection that is answered here, on the serial channel without one.
async fn ready(spec: &VmSpec, listener: Option<&Listener>) -> Result<Option<Waiting>> {
    if let Some(listener) = listener {
        let agent = Waiting::accept(listener).await;
        return agent.map(Some).map_err(|error| Error::State(error.to_string()));
    }
    let Channel::Serial { socket, .. } = &spec.channel else {
        return Err(Error::Invalid("a template is made with a serial channel".into()));
    };
    let port = UnixStream::connect(socket).await.map_err(io("connect to", socket))?;
    let number = crate::guest::random_hex(8).map_err(io("read", Path::new("/dev/urandom")))?;
    let mux = Mux::host(u64::from_str_radix(&number, 16).unwrap_or(1));
    let said = async {
        let mut stream = loop {
            let incoming = mux.next().await;
            if incoming.port == vmm_common::port::READY {
                break incoming.accept();
            }
        };
        read_json(&mut stream).await.map_err(|error| Error::State(error.to_string()))
    };
    let ready: Ready = tokio::select! {
        said = said => said?,
        _ = mux.run(port) => return Err(Error::State("the serial port has ended".into())),
    };
    if ready.protocol != PROTOCOL {
        return Err(Error::State(format!("its agent speaks version {}", ready.protocol)));
    }
    Ok(None)
}

/// The machine that becomes the template of machines like `spec`. `dir` is its directory, and
/// `cgroups` are the entrances of its cgroup. Where `features` have no serial port, it has the channel of
/// its copies.
pub fn machine(
    spec: &VmSpec,
    key: &str,
    dir: &Path,
    cgroups: Vec<PathBuf>,
    features: Features,
) -> VmSpec {
    let channel = match spec.channel {
        Channel::HybridVsock { cid, .. } if !features.has(Feature::Serial) => {
            Channel::HybridVsock { cid, uds: uds(dir) }
        }
        _ => Channel::Serial { socket: dir.join("serial.sock"), console: false, uds: None },
    };
    VmSpec {
        id: format!("{PREFIX}{}", key.get(..12).unwrap_or(key)),
        dir: dir.to_owned(),
        shares: Vec::new(),
        nics: Vec::new(),
        disks: Vec::new(),
        channel,
        console: Console { log: dir.join("console.log"), limit: spec.console.limit },
        netns: None,
        cgroups,
        ..spec.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(templates: &Templates, key: &str) -> PathBuf {
        let dir = templates.dir.join(format!("{key}{UNFINISHED}"));
        kuasar_host::record::private_dir(&dir).unwrap();
        std::fs::write(dir.join("state"), key).unwrap();
        templates.finish(&dir, key).unwrap();
        templates.path(key)
    }

    #[test]
    fn a_hole_and_zeros_are_the_same_content_and_its_place_counts() {
        let dir = tempfile::tempdir().unwrap();
        let digest = |name: &str, length: u64, parts: &[(u64, &[u8])]| {
            use std::os::unix::fs::FileExt;
            let path = dir.path().join(name);
            let file = File::create_new(&path).unwrap();
            file.set_len(length).unwrap();
            parts.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
            content(&mut File::open(&path).unwrap()).unwrap()
        };
        let zeros = vec![0; 3 << 20];
        let (length, at) = (16 << 20, (5 << 20) + 12345);
        let holes = digest("holes", length, &[(at, b"x")]);
        assert_eq!(holes, digest("zeros", length, &[(4 << 20, &zeros), (at, b"x")]));
        let others = [
            digest("empty", length, &[]),
            digest("longer", length + 1, &[(at, b"x")]),
            digest("later", length, &[(at + 1, b"x")]),
            digest("other block", length, &[(at + BLOCK, b"x")]),
            digest("no file", 0, &[]),
        ];
        assert!(!others.contains(&holes), "{others:?}");
    }

    #[test]
    fn a_changed_a_torn_and_a_strangers_template_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let templates = Arc::new(Templates::new(dir.path().to_owned()));
        let whole = made(&templates, "a");
        assert_eq!(templates.find("a"), Some(whole.clone()));
        // The same length, and another byte.
        std::fs::write(whole.join("state"), "b").unwrap();
        assert_eq!(templates.find("a"), None);
        assert!(!whole.exists());
        let torn = made(&templates, "c");
        std::fs::write(torn.join("state"), "").unwrap();
        assert_eq!(templates.find("c"), None);
        std::fs::rename(made(&templates, "d"), templates.path("e")).unwrap();
        assert_eq!(templates.find("e"), None);
        let nameless = made(&templates, "f");
        std::fs::remove_file(nameless.join(FILE)).unwrap();
        assert_eq!(templates.find("f"), None);
        // None of them is tried again at once.
        for key in ["a", "c", "e", "f"] {
            assert!(templates.turn(key).is_none(), "{key}");
        }
        assert!(templates.turn("g").is_some());
    }

    #[test]
    fn another_kernel_image_size_or_configuration_is_another_template() {
        use crate::vmm::helpers::HelpersConfig;
        use crate::vmm::process::{Launcher, Local};
        use crate::vmm::qemu::{Accel, Qemu, QemuConfig};
        use crate::vmm::{Boot, Range};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::new(dir.path().join("templates"));
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let spec = VmSpec {
            id: "pod".into(),
            dir: dir.path().join("pod"),
            cpus: Range::fixed(1),
            memory_mib: Range::fixed(128),
            hugepages: false,
            boot: Boot {
                kernel: file("kernel", "kernel"),
                root: Root::Initrd(file("initrd", "initrd")),
                params: vec!["quiet".into()],
            },
            shares: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            channel: Channel::None,
            entropy: true,
            console: Console { log: PathBuf::new(), limit: 0 },
            netns: None,
            cgroups: Vec::new(),
        };
        let program = file("qemu", "qemu");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, mode).unwrap();
        let launcher = Launcher::new(Arc::new(Local::new().unwrap()), None);
        let qemu = |root_ports| {
            let path = program.clone();
            let config =
                QemuConfig { path, accel: Accel::Kvm, root_ports, ..QemuConfig::default() };
            Qemu::new(config, HelpersConfig::default(), launcher.clone())
        };
        let key = |vmm: &Qemu, spec: &VmSpec| templates.key(vmm, spec).unwrap();
        let (vmm, first) = (qemu(8), key(&qemu(8), &spec));
        let other_pod = VmSpec { id: "other".into(), dir: "/other".into(), ..spec.clone() };
        assert_eq!(key(&vmm, &other_pod), first);
        let mut all = vec![first];
        all.push(key(&qemu(7), &spec));
        all.push(key(&vmm, &VmSpec { memory_mib: Range::fixed(129), ..spec.clone() }));
        all.push(key(&vmm, &VmSpec { cpus: Range { at_boot: 1, most: 2 }, ..spec.clone() }));
        let mut params = spec.clone();
        params.boot.params.push("debug".into());
        all.push(key(&vmm, &params));
        // The same paths and lengths, with other bytes in them.
        file("kernel", "KERNEL");
        all.push(key(&vmm, &spec));
        file("initrd", "INITRD");
        all.push(key(&vmm, &spec));
        file("qemu", "another qemu");
        all.push(key(&vmm, &spec));
        let different: std::collections::BTreeSet<&String> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "{all:?}");
    }

    #[test]
    fn one_is_made_at_a_time_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let templates = Arc::new(Templates::new(dir.path().to_owned()));
        let turn = templates.turn("a").unwrap();
        assert!(templates.turn("b").is_none());
        drop(turn);
        for (n, key) in ["a", "b", "c"].into_iter().enumerate() {
            let path = made(&templates, key);
            let at = std::time::UNIX_EPOCH + Duration::from_secs(n as u64);
            File::open(path).unwrap().set_modified(at).unwrap();
        }
        templates.prune("c", 2);
        let there = |key: &str| templates.path(key).exists();
        assert_eq!(["a", "b", "c"].map(there), [false, true, true]);
        std::fs::create_dir(dir.path().join("d.new")).unwrap();
        let told = templates.list();
        let all: Vec<(&str, bool)> = told.iter().map(|t| (t.key.as_str(), t.finished)).collect();
        assert_eq!(all, [("b", true), ("c", true), ("d", false)]);
        assert!(told.iter().all(|t| t.finished == (t.bytes > 0)), "{told:?}");
        let verify = |key: &str| templates.work(&TemplateJob::Verify(key.into()));
        assert!(verify("b").unwrap().iter().all(|t| t.problem.is_none()));
        std::fs::write(templates.path("b").join("state"), "x").unwrap();
        assert!(verify("b").unwrap()[0].problem.is_some() && there("b"));
        for bad in ["a", "d", "../c", ""] {
            assert!(verify(bad).is_err(), "{bad}");
        }
        assert_eq!(templates.work(&TemplateJob::Remove("b".into())).unwrap().len(), 2);
        assert!(!there("b"));
        templates.sweep();
        assert!(!dir.path().join("d.new").exists() && there("c"));
    }
}
