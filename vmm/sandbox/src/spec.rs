//! A container's OCI spec, from the host's terms into the guest's.
//!
//! The spec is edited as JSON, so that what we do not know stays. What names something of the
//! host either becomes something that the guest has, or goes:
//!
//! | of the host | in the guest |
//! |---|---|
//! | `root.path` | the container's root file system in the share |
//! | bind mounts of directories and files | volumes in the share; without one, copies ([`crate::copy`]) |
//! | bind mounts below `/dev`, `/proc`, `/sys` | the guest's own |
//! | memory `emptyDir`, huge pages | a tmpfs, a hugetlbfs in the guest, one for the pod |
//! | a tmpfs of the engine's for `/dev/shm` | the guest's `/dev/shm`, which is the pod's |
//! | paths of namespaces | none: the guest puts the pod's there. A process id names a guest's process |
//! | character devices | those that are the same on every Linux; others are refused, or left out of a privileged container |
//! | block devices | disks of the machine ([`crate::block`]); left out of a privileged container, which lists all of the host's |
//! | `cgroupsPath`, `cpuset`, device-bound I/O limits | none: the machine has its own |
//! | AppArmor, SELinux labels | none: the guest's kernel has no policy |
//! | hooks | none: their programs are on the host |
//!
//! Seccomp, capabilities, users, limits, sysctls, masked paths stay as they are.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kuasar_host::inside::Want;
use serde_json::{Map, Value, json};
use vmm_common::guest::Storage;
use vmm_common::{FILES_PATH, SHARE_PATH};

use crate::block;
use crate::copy::{self, CopyConfig, EMPTY_DIR, Rule};

/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` of linux/magic.h.
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;
/// Directory of the guest with storages of the pod.
const STORAGE: &str = "/run/kuasar/storage";
/// Where a pod's shared memory is, in containers and in the guest.
const SHM: &str = "/dev/shm";
/// The pod's PID namespace, as the guest understands it.
const POD_PID: &str = "/proc/0/ns/pid";
/// Most bind volumes of a container.
pub const MAX_VOLUMES: usize = 256;

/// Devices with the same numbers and meaning on every Linux: major, minor (`None`: all).
const COMMON_DEVICES: [(u64, Option<u64>); 5] =
    [(1, None), (5, None), (10, Some(200)), (10, Some(229)), (136, None)];

/// Why a container cannot run in a guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The spec is wrong.
    Invalid(String),
    /// The host's state, or what this pod is, does not allow it; the text names the way out.
    Impossible(String),
}

impl From<Refusal> for containerd_task::error::Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Invalid(text) => Self::InvalidArgument(text),
            Refusal::Impossible(text) => Self::FailedPrecondition(text),
        }
    }
}

/// A bind volume that has to be shown to the guest.
#[derive(Debug)]
pub struct Volume {
    /// What is bound, opened once and for all.
    pub source: OwnedFd,
    /// Directory or file.
    pub kind: Want,
    /// With what is mounted below.
    pub recursive: bool,
    /// Read-only.
    pub read_only: bool,
    /// What the host mounts below it later comes along.
    pub follows: bool,
}

/// What an edited spec needs.
#[derive(Debug, Default)]
pub struct Needs {
    /// Volumes: number N is `m<N>` of the container's share.
    pub volumes: Vec<Volume>,
    /// Volumes that are copied: number N is `m<N>` of the container's files. Only without a share.
    pub copies: Vec<copy::Wanted>,
    /// Limits of the copies; none with a share.
    copying: Option<CopyConfig>,
    /// Storages of the pod that the guest has to have.
    pub storages: Vec<Storage>,
    /// Raw block volumes.
    pub blocks: Vec<block::Volume>,
    /// What was left out, for the log.
    pub dropped: Vec<String>,
}

impl Needs {
    /// A storage of the pod, once; answers where it is in the guest.
    fn storage(&mut self, storage: Storage) -> String {
        let target = storage.target.clone();
        if self.storages.iter().all(|known| known.id != storage.id) {
            self.storages.push(storage);
        }
        target
    }
}

fn invalid(text: impl Into<String>) -> Refusal {
    Refusal::Invalid(text.into())
}

/// Where a root file system is in the guest: in the directory `place` of a share.
pub fn rootfs(share: &str, place: &str) -> String {
    format!("{share}/{place}/rootfs")
}

/// Edits `spec` for the guest, which sees the container's root file system at `root`. `sandbox_pid` is what Start answered as the pod's pid: a namespace
/// path with it (or with 0) means the pod's. `copying`: the pod has no share.
///
/// # Errors
/// [`Refusal`].
pub fn edit(
    spec: &mut Map<String, Value>,
    (container, root): (&str, &str),
    sandbox_pid: u32,
    copying: Option<&CopyConfig>,
) -> Result<Needs, Refusal> {
    let mut needs = Needs { copying: copying.cloned(), ..Needs::default() };
    object(spec, "root")?.insert("path".into(), json!(root));
    if !spec.contains_key("process") {
        return Err(invalid("config.json has no process"));
    }
    process(object(spec, "process")?)?;
    let privileged = is_privileged(spec);
    mounts(spec, container, &mut needs)?;
    if let Some(hooks) = spec.remove("hooks")
        && hooks.as_object().is_some_and(|hooks| !hooks.is_empty())
    {
        needs.dropped.push("hooks".into());
    }
    let linux = object(spec, "linux")?;
    namespaces(linux, sandbox_pid)?;
    devices(linux, privileged, &mut needs)?;
    for key in ["cgroupsPath", "mountLabel", "intelRdt", "uidMappings", "gidMappings"] {
        linux.remove(key);
    }
    if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
        self::resources(resources);
    }
    Ok(needs)
}

/// What of `process` (of a container or of an exec) is the host's.
///
/// # Errors
/// [`Refusal::Invalid`].
pub fn process(process: &mut Map<String, Value>) -> Result<(), Refusal> {
    for key in ["apparmorProfile", "selinuxLabel"] {
        process.remove(key);
    }
    match process.get("cwd").and_then(Value::as_str) {
        Some(cwd) if !cwd.starts_with('/') => {
            Err(invalid(format!("process.cwd {cwd:.100?} is not absolute")))
        }
        _ => Ok(()),
    }
}

/// What of `linux.resources` means nothing to a guest, or something else.
pub fn resources(resources: &mut Map<String, Value>) {
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        // Numbers of the host's CPUs and memory nodes.
        cpu.remove("cpus");
        cpu.remove("mems");
    }
    if let Some(io) = resources.get_mut("blockIO").and_then(Value::as_object_mut) {
        // Numbers of the host's disks.
        io.retain(|key, _| !key.starts_with("throttle") && key != "weightDevice");
    }
    // Huge pages are the guest's, and so is their count.
    for key in ["rdma", "network"] {
        resources.remove(key);
    }
}

fn object<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, Refusal> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut().ok_or_else(|| invalid(format!("config.json: {key} is not an object")))
}

fn array<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, Refusal> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut().ok_or_else(|| invalid(format!("config.json: {key} is not an array")))
}

/// A privileged container may use every device.
fn is_privileged(spec: &Map<String, Value>) -> bool {
    let rules = spec.get("linux").and_then(|linux| linux.pointer("/resources/devices"));
    let all = |rule: &Value| {
        rule.get("allow") == Some(&Value::Bool(true))
            && ["major", "minor"].iter().all(|key| rule.get(key).is_none_or(Value::is_null))
            && matches!(rule.get("type").and_then(Value::as_str), None | Some("" | "a"))
    };
    rules.and_then(Value::as_array).is_some_and(|rules| rules.iter().any(all))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn mounts(
    spec: &mut Map<String, Value>,
    container: &str,
    needs: &mut Needs,
) -> Result<(), Refusal> {
    for mount in array(spec, "mounts")? {
        let options: Vec<String> = match mount.get("options") {
            None | Some(Value::Null) => Vec::new(),
            Some(options) => serde_json::from_value(options.clone())
                .map_err(|_| invalid("config.json: a mount's options are no texts"))?,
        };
        let has = |name: &str| options.iter().any(|option| option == name);
        let recursive = has("rbind");
        if text(mount, "type") != "bind" && !recursive && !has("bind") {
            continue;
        }
        let mapped = mount.get("uidMappings").is_some_and(|map| !map.is_null());
        if mapped || has("idmap") || has("ridmap") {
            return Err(Refusal::Impossible(format!(
                "mount {:?} is to be id-mapped, which volumes of a VM cannot be: run the pod \
                 without a user namespace (the VM is a stronger border)",
                text(mount, "destination")
            )));
        }
        let source = text(mount, "source").to_owned();
        if source.is_empty() {
            return Err(invalid("config.json: a bind mount without source"));
        }
        let read_only = ["ro", "rro"].iter().any(|option| has(option));
        // Nothing of the guest comes back, so `shared` is what `slave` is.
        let follows = ["slave", "rslave", "shared", "rshared"].iter().any(|option| has(option));
        let place =
            place(&source, text(mount, "destination"), container, needs, |source, kind| Volume {
                source,
                kind,
                recursive,
                read_only,
                follows,
            })?;
        if let Some(mount) = mount.as_object_mut() {
            mount.insert("source".into(), json!(place));
        }
    }
    Ok(())
}

/// Where the source of a bind mount is in the guest.
fn place(
    source: &str,
    destination: &str,
    container: &str,
    needs: &mut Needs,
    volume: impl FnOnce(OwnedFd, Want) -> Volume,
) -> Result<String, Refusal> {
    let path = Path::new(source);
    if !path.is_absolute() {
        return Err(invalid(format!("mount source {source:.200?} is not absolute")));
    }
    // The guest has its own, and that of the host would be another machine's.
    if ["/dev", "/proc", "/sys"].iter().any(|own| path.starts_with(own)) {
        return Ok(source.to_owned());
    }
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    let opened: OwnedFd = opened
        .map_err(|error| invalid(format!("mount source {source:.200?} cannot be opened: {error}")))?
        .into();
    let stat = nix::sys::stat::fstat(&opened)
        .map_err(|error| invalid(format!("mount source {source:.200?}: {error}")))?;
    let what = match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            if let Some(storage) = pod_storage(path, &opened) {
                return Ok(needs.storage(storage));
            }
            // The engine's own for the pod, in memory: the guest has the pod's in its memory. A
            // directory of some tmpfs is not meant.
            let root = || {
                let above = nix::sys::stat::fstatat(&opened, "..", nix::fcntl::AtFlags::empty());
                above.is_ok_and(|above| above.st_dev != stat.st_dev)
            };
            if destination == SHM && magic(&opened) == Some(TMPFS) && root() {
                return Ok(SHM.to_owned());
            }
            Want::Directory
        }
        libc::S_IFREG => Want::File,
        kind => {
            let (what, way_out) = match kind {
                libc::S_IFSOCK => ("a socket", "the two kernels cannot speak through it: use TCP"),
                libc::S_IFIFO => ("a FIFO", "the two kernels cannot speak through it: use TCP"),
                libc::S_IFBLK => ("a block device", "use a volume with volumeMode: Block"),
                _ => ("a device", "it is the host's: use a pod without VM"),
            };
            return Err(Refusal::Impossible(format!(
                "volume {source:.200?} for {destination:.200?} is {what}: {way_out}"
            )));
        }
    };
    if needs.volumes.len() + needs.copies.len() >= MAX_VOLUMES {
        return Err(Refusal::Impossible(format!(
            "a container has at most {MAX_VOLUMES} volumes in a VM"
        )));
    }
    let volume = volume(opened, what);
    match needs.copying.clone() {
        Some(config) => copied(volume, path, destination, container, needs, &config),
        None => {
            let number = needs.volumes.len();
            needs.volumes.push(volume);
            Ok(format!("{SHARE_PATH}/{container}/m{number}"))
        }
    }
}

/// Where a volume is in a guest without a share.
fn copied(
    volume: Volume,
    path: &Path,
    destination: &str,
    container: &str,
    needs: &mut Needs,
    config: &CopyConfig,
) -> Result<String, Refusal> {
    let Volume { source, kind, read_only, .. } = volume;
    let rule = copy::rule((path, source.as_fd()), destination, kind, read_only);
    let rule = rule.map_err(Refusal::Impossible)?;
    if rule == Rule::EmptyDir {
        let stat = nix::sys::stat::fstat(&source)
            .map_err(|error| invalid(format!("mount source {path:.200?}: {error}")))?;
        let mut options = vec![
            "nosuid".to_owned(),
            "nodev".into(),
            format!("mode={:o}", stat.st_mode & 0o7777),
            format!("uid={}", stat.st_uid),
            format!("gid={}", stat.st_gid),
        ];
        if config.empty_dir_bytes > 0 {
            options.push(format!("size={}", config.empty_dir_bytes));
        }
        return Ok(needs.storage(storage(path, "tmpfs", options)));
    }
    let number = needs.copies.len();
    needs.copies.push(copy::Wanted { source, path: path.to_owned(), rule });
    Ok(format!("{FILES_PATH}/{container}/m{number}"))
}

/// Which filesystem something is on.
fn magic(opened: &OwnedFd) -> Option<i64> {
    let stat = nix::sys::statfs::fstatfs(opened.as_fd()).ok()?;
    #[allow(clippy::unnecessary_cast)] // the type differs between platforms
    Some(stat.filesystem_type().0 as i64)
}

/// Volumes that live in memory are made in the guest: its memory is the pod's.
fn pod_storage(path: &Path, opened: &OwnedFd) -> Option<Storage> {
    if !path.components().any(|part| part.as_os_str() == EMPTY_DIR) {
        return None;
    }
    let stat = nix::sys::statfs::fstatfs(opened.as_fd()).ok()?;
    let magic = magic(opened)?;
    let bytes = stat.blocks().saturating_mul(u64::try_from(stat.block_size()).unwrap_or(0));
    let (kind, options) = match magic {
        TMPFS => ("tmpfs", vec!["nosuid".into(), "nodev".into(), "mode=1777".into()]),
        HUGETLBFS => ("hugetlbfs", vec![format!("pagesize={}", stat.block_size())]),
        _ => return None,
    };
    let mut options: Vec<String> = options;
    if bytes > 0 {
        options.push(format!("size={bytes}"));
    }
    Some(storage(path, kind, options))
}

/// The storage of the guest's for a volume of the pod.
fn storage(path: &Path, kind: &str, options: Vec<String>) -> Storage {
    // FNV-1a: a name for the path, the same in every container of the pod.
    let hash = path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| {
        (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    });
    let id = format!("{kind}-{hash:016x}");
    Storage {
        target: format!("{STORAGE}/{id}"),
        id,
        kind: kind.into(),
        options,
        ..Storage::default()
    }
}

fn namespaces(linux: &mut Map<String, Value>, sandbox_pid: u32) -> Result<(), Refusal> {
    let list = array(linux, "namespaces")?;
    for entry in list.iter_mut() {
        let kind = text(entry, "type").to_owned();
        if !kuasar_host::spec::NAMESPACES.contains(&kind.as_str()) {
            return Err(invalid(format!("linux.namespaces: unknown type {kind:.40?}")));
        }
        let path = text(entry, "path").to_owned();
        let pid = path.strip_prefix("/proc/").and_then(|rest| rest.split('/').next());
        let pid = pid.and_then(|pid| pid.parse::<u32>().ok()).unwrap_or(0);
        let Some(entry) = entry.as_object_mut() else { continue };
        match kind.as_str() {
            "pid" if path.is_empty() => {}
            "pid" if pid == 0 || pid == sandbox_pid => {
                entry.insert("path".into(), json!(POD_PID));
            }
            // NamespaceMode_TARGET: another container's by its pid, which is the guest's number.
            "pid" => {
                entry.insert("path".into(), json!(format!("/proc/{pid}/ns/pid")));
            }
            _ => drop(entry.remove("path")),
        }
    }
    list.retain(|entry| text(entry, "type") != "user");
    // Whoever asks for the host's namespaces gets the pod's: the guest's own are its agent's.
    for kind in ["mount", "network", "ipc", "uts", "pid"] {
        if list.iter().all(|entry| text(entry, "type") != kind) {
            list.push(match kind {
                "pid" => json!({ "type": kind, "path": POD_PID }),
                _ => json!({ "type": kind }),
            });
        }
    }
    Ok(())
}

fn number(value: &Value, key: &str) -> Option<u64> {
    value.get(key).and_then(Value::as_u64)
}

/// What the cgroup's rules allow with a block device.
fn access(linux: &Map<String, Value>, major: u64, minor: u64) -> String {
    let rules = linux.get("resources").and_then(|resources| resources.get("devices"));
    let rules = rules.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let about = |rule: &&Value| {
        matches!(text(rule, "type"), "b" | "a" | "")
            && number(rule, "major").is_none_or(|number| number == major)
            && number(rule, "minor").is_none_or(|number| number == minor)
    };
    // In order, as the kernel takes them: a later one adds or takes away.
    let mut all = [false; 3];
    for rule in rules.iter().filter(about) {
        let allow = rule.get("allow") == Some(&Value::Bool(true));
        let letters = Some(text(rule, "access")).filter(|text| !text.is_empty()).unwrap_or("rwm");
        for (letter, one) in "rwm".chars().zip(&mut all) {
            if letters.contains(letter) {
                *one = allow;
            }
        }
    }
    "rwm".chars().zip(all).filter(|(_, has)| *has).map(|(letter, _)| letter).collect()
}

/// A raw block volume of the spec.
fn block_volume(linux: &Map<String, Value>, device: &Value) -> Result<block::Volume, Refusal> {
    let path = text(device, "path").to_owned();
    let wrong = || invalid(format!("linux.devices: {path:.100?} has no number, or a wrong one"));
    let of = |key: &str| number(device, key).and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong);
    let (major, minor) = (of("major")?, of("minor")?);
    let or = |key: &str, default: u32| {
        number(device, key).and_then(|n| u32::try_from(n).ok()).unwrap_or(default)
    };
    // Permission bits alone: containerd leaves the file's type in.
    let node = (or("fileMode", 0o660) & 0o7777, or("uid", 0), or("gid", 0));
    let access = access(linux, u64::from(major), u64::from(minor));
    Ok(block::Volume { major, minor, path, node, access })
}

fn devices(
    linux: &mut Map<String, Value>,
    privileged: bool,
    needs: &mut Needs,
) -> Result<(), Refusal> {
    let common = |device: &Value| {
        let (major, minor) = (number(device, "major"), number(device, "minor"));
        let character = matches!(text(device, "type"), "c" | "u");
        let known = |(known, one): &(u64, Option<u64>)| {
            Some(*known) == major && one.is_none_or(|one| Some(one) == minor)
        };
        text(device, "type") == "p" || (character && COMMON_DEVICES.iter().any(known))
    };
    let all = std::mem::take(array(linux, "devices")?);
    let (kept, others): (Vec<Value>, Vec<Value>) = all.into_iter().partition(common);
    *array(linux, "devices")? = kept;
    for device in &others {
        if privileged {
            continue;
        }
        if text(device, "type") != "b" {
            let path: String = text(device, "path").chars().take(100).collect();
            return Err(Refusal::Impossible(format!(
                "device {path:?} is the host's, which this VM cannot be given: use a pod without VM"
            )));
        }
        if needs.blocks.len() >= block::MAX_VOLUMES {
            return Err(Refusal::Impossible(format!(
                "a container has at most {} block volumes in a VM",
                block::MAX_VOLUMES
            )));
        }
        needs.blocks.push(block_volume(linux, device)?);
    }
    if privileged && !others.is_empty() {
        needs.dropped.push(format!("{} devices of the host", others.len()));
    }
    // Numbers of the host's disks are those of other disks in the guest.
    if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
        let hosts = |rule: &Value| text(rule, "type") == "b" && number(rule, "major").is_some();
        if resources.get("devices").is_some_and(Value::is_array) {
            array(resources, "devices")?.retain(|rule| !hosts(rule));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
