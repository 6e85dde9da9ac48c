//! `run`: a pod of one container with no engine at all. This program speaks the Sandbox and the Task
//! API to the daemon itself, shows the container's streams, answers its exit code, and leaves nothing.
//!
//! What it makes lies in one directory per run, named for its process, below the state directory. A
//! run that was killed is found by that name, and its pod by a label with the same words: `gc` removes
//! both.

mod image;
mod network;
mod spec;
mod unpack;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use kuasar_host::process::start_time;
use kuasar_protos::controller as sandbox;
use kuasar_protos::cri;
use kuasar_protos::shim::api as task;
use kuasar_protos::shim::types::mount::Mount;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

pub use image::{Image, Source};
pub use network::Netns;

use crate::client::{Client, patient, tasks};
use crate::error::{Error, Result};
use crate::exec::{unique, user};
use crate::output::Progress;
use crate::pods::{self, OWNER};
use crate::process::Process;
use crate::stdio::Streams;

/// containerd's namespace that our pods are in.
const NAMESPACE: &str = "kuasar-ctl";
/// Parent of our pods' cgroups.
const CGROUP: &str = "/kuasar-ctl";

static STATE_DIR: OnceLock<PathBuf> = OnceLock::new();

/// Sets the state directory, before anything uses it.
pub fn set_state_dir(path: PathBuf) {
    let _ = STATE_DIR.set(path);
}

/// The state directory, made if it is missing: private, on a tmpfs by default.
///
/// # Errors
/// When it cannot be made or belongs to somebody else.
pub fn state_dir() -> Result<PathBuf> {
    let dir = STATE_DIR.get().cloned().unwrap_or_else(|| "/run/kuasar-ctl".into());
    kuasar_host::record::private_dir(&dir)?;
    Ok(dir)
}

/// This process, in words that no later one has.
pub fn owner() -> String {
    let pid = std::process::id();
    format!("{pid}-{}", start_time(pid).unwrap_or(0))
}

/// Whether the process of an [`owner`] still runs. What cannot be read counts as alive.
pub fn is_alive(owner: &str) -> bool {
    let parsed = owner
        .split_once('-')
        .and_then(|(pid, started)| Some((pid.parse::<u32>().ok()?, started.parse::<u64>().ok()?)));
    parsed.is_none_or(|(pid, started)| start_time(pid) == Some(started))
}

/// Removes what runs that were killed have left in the state directory; answers the paths.
///
/// # Errors
/// When something of it stays.
pub fn leftovers(dry_run: bool) -> Result<Vec<String>> {
    let dir = state_dir()?;
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(Error::at("list", &dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut words = name.splitn(4, '-').skip(1);
        let (Some(pid), Some(started)) = (words.next(), words.next()) else { continue };
        if is_alive(&format!("{pid}-{started}")) {
            continue;
        }
        removed.push(entry.path().display().to_string());
        if !dry_run {
            remove(&entry.path())?;
        }
    }
    Ok(removed)
}

/// Removes a directory of a run, and the namespace that is mounted in it.
fn remove(dir: &Path) -> Result<()> {
    network::detach(&dir.join(network::FILE));
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::at("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// The directory of one run; it goes with this.
#[derive(Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// A new one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        let base = state_dir()?;
        let dir = tempfile::Builder::new().prefix(&format!("run-{}-", owner())).tempdir_in(&base);
        Ok(Self(dir.map_err(Error::at("make a directory in", &base))?.keep()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            crate::output::note(&format!("warning: {error}"));
        }
    }
}

/// The pod's network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// Its own, with nothing but a loopback.
    #[default]
    None,
    /// The host's. Pods in machines cannot have it.
    Host,
}

/// What `run` does.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Environment variable, may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// User, numeric
    #[arg(short, long, value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, u32)>,
    /// Directory or file of the host to show, may be repeated
    #[arg(short, long, value_name = "SOURCE:TARGET[:ro]", value_parser = volume)]
    pub volume: Vec<Volume>,
    /// The pod's network
    #[arg(long, value_enum, default_value_t)]
    pub network: Network,
    /// The pod's name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Memory limit of the pod, in MiB
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u32>,
    /// CPU limit of the pod
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<f64>,
    /// Annotation of the pod, may be repeated; it counts where the daemon allows it
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub annotation: Vec<(String, String)>,
    /// Runtime type, as a runtime handler of containerd would name it
    #[arg(long, value_name = "TYPE", default_value = "")]
    pub runtime: String,
    /// Image in a layout or archive that has several
    #[arg(long = "ref", value_name = "NAME")]
    pub reference: Option<String>,
    /// Most bytes that an image may have when it is unpacked
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 30)]
    pub max_image_size: u64,
    /// Seconds that the container may take to end after the first signal
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stop_timeout: u64,
    /// WebAssembly module, OCI layout, OCI archive (tar), or directory with a root file system
    pub source: PathBuf,
    /// Program and arguments, in place of the image's own; after a module only arguments. After `--`
    /// when the first begins with a `-`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// A bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub target: String,
    /// Not writable.
    pub read_only: bool,
}

fn volume(text: &str) -> std::result::Result<Volume, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, read_only) = match parts.as_slice() {
        [source, target] => (*source, *target, false),
        [source, target, "ro"] => (*source, *target, true),
        [source, target, "rw"] => (*source, *target, false),
        _ => return Err("say SOURCE:TARGET or SOURCE:TARGET:ro".into()),
    };
    if !target.starts_with('/') {
        return Err(format!("{target:?} is no absolute path"));
    }
    let source = std::fs::canonicalize(source).map_err(|e| format!("{source}: {e}"))?;
    Ok(Volume { source, target: target.into(), read_only })
}

fn pair(text: &str) -> std::result::Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("say NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

/// The pod to make.
pub struct PodSpec {
    /// Its id.
    pub id: String,
    config: cri::PodSandboxConfig,
    netns: String,
    runtime: String,
}

/// CPU period in microseconds.
const PERIOD: i64 = 100_000;

impl PodSpec {
    /// A pod with a network namespace, or with the host's network.
    pub fn new(name: Option<&str>, netns: Option<&Path>) -> Self {
        let id = unique("ctl");
        let mut config = cri::PodSandboxConfig::new();
        let metadata = config.metadata.mut_or_insert_default();
        metadata.name = name.unwrap_or(&id).into();
        metadata.namespace = NAMESPACE.into();
        metadata.uid.clone_from(&id);
        config.hostname = name.unwrap_or("kuasar-ctl").into();
        config.labels.insert(OWNER.into(), owner());
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = format!("{CGROUP}/{id}");
        let security = linux.security_context.mut_or_insert_default();
        let options = security.namespace_options.mut_or_insert_default();
        options.pid = cri::NamespaceMode::CONTAINER.into();
        if netns.is_none() {
            options.network = cri::NamespaceMode::NODE.into();
        }
        let netns = netns.map(|path| path.display().to_string()).unwrap_or_default();
        Self { id, config, netns, runtime: String::new() }
    }

    /// Limits of the pod.
    pub fn limit(&mut self, cpus: Option<f64>, memory_mib: Option<u32>) {
        let linux = self.config.linux.mut_or_insert_default();
        let resources = linux.resources.mut_or_insert_default();
        if let Some(cpus) = cpus.filter(|cpus| *cpus > 0.0) {
            resources.cpu_period = PERIOD;
            resources.cpu_quota = (cpus * PERIOD as f64) as i64;
        }
        if let Some(memory) = memory_mib {
            resources.memory_limit_in_bytes = i64::from(memory) << 20;
        }
    }

    /// Its runtime type, as a runtime handler of the engine would name it.
    pub fn set_runtime(&mut self, runtime: &str) {
        self.runtime = runtime.into();
    }

    /// Creates and starts it; answers the address of its Task service. Removing it is the caller's
    /// work, whatever this answers.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn start(&self, client: &Client) -> Result<String> {
        let mut context = patient();
        context.add("containerd-namespace-ttrpc".into(), NAMESPACE.into());
        let value = self.config.write_to_bytes().map_err(|e| Error::Failed(e.to_string()))?;
        let mut q = sandbox::ControllerCreateRequest {
            sandbox_id: self.id.clone(),
            netns_path: self.netns.clone(),
            options: MessageField::some(Any {
                type_url: "runtime.v1.PodSandboxConfig".into(),
                value,
                ..Any::default()
            }),
            ..Default::default()
        };
        let described = q.sandbox.mut_or_insert_default();
        described.sandbox_id.clone_from(&self.id);
        described.runtime.mut_or_insert_default().name.clone_from(&self.runtime);
        client.controller().create(context.clone(), &q).await?;
        let sandbox_id = self.id.clone();
        let q = sandbox::ControllerStartRequest { sandbox_id, ..Default::default() };
        Ok(client.controller().start(context, &q).await?.address)
    }

    /// Removes it, and the cgroup that was made for it.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove(&self, client: &Client) -> Result<()> {
        remove_pod(client, &self.id).await
    }
}

/// Removes a pod that a run has made, and the cgroup that was made for it.
///
/// # Errors
/// The daemon's.
pub async fn remove_pod(client: &Client, id: &str) -> Result<()> {
    pods::end(client, id, 0, true).await?;
    // The daemon leaves the parent to whoever has named it.
    if let Ok(layout) = kuasar_host::cgroup::Layout::detect()
        && let Ok(group) = layout.group(&format!("{CGROUP}/{id}"))
    {
        let _ = group.remove(Duration::from_secs(2));
        // The last one takes their parent along: rmdir(2) refuses it while others are there.
        for dir in layout.group(CGROUP).map(|parent| parent.dirs()).unwrap_or_default() {
            let _ = std::fs::remove_dir(dir);
        }
    }
    Ok(())
}

/// `run`: answers the container's exit code.
///
/// # Errors
/// What went wrong; nothing is left then either.
pub async fn run(client: &Client, args: &RunArgs) -> Result<u8> {
    let dir = RunDir::new()?;
    let netns = match args.network {
        Network::Host => None,
        Network::None => Some(Netns::new(dir.path())?),
    };
    let mut pod = PodSpec::new(args.name.as_deref(), netns.as_ref().map(Netns::path));
    pod.limit(args.cpus, args.memory);
    pod.set_runtime(&args.runtime);
    pod.config.annotations.extend(args.annotation.iter().cloned());
    let mut stopped = crate::process::Stopped::new()?;
    let ready = tokio::select! {
        ready = prepare(client, args, &pod, dir.path()) => ready,
        signal = stopped.next() => Err(Error::Exit(crate::process::code_of(signal))),
    };
    let ended = match ready {
        Ok((process, streams)) => {
            let ended = process.follow(streams, args.tty).await;
            let deleted = process.delete().await;
            ended.and_then(|code| deleted.map(|()| code))
        }
        Err(error) => Err(error),
    };
    let _progress = Progress::new("removing the pod");
    let removed = pod.remove(client).await;
    let code = ended?;
    removed?;
    Ok(code)
}

/// Everything up to the container's start.
async fn prepare(
    client: &Client,
    args: &RunArgs,
    pod: &PodSpec,
    dir: &Path,
) -> Result<(Process, Streams)> {
    let image = {
        let _progress = Progress::new("unpacking the image");
        let (source, to) = (args.source.clone(), dir.to_owned());
        let (reference, most) = (args.reference.clone(), args.max_image_size);
        let read = move || Source::detect(&source)?.read(&to, reference.as_deref(), most);
        let read = tokio::task::spawn_blocking(read).await;
        read.map_err(|e| Error::Failed(format!("unpacking: {e}")))??
    };
    let bundle = dir.join("bundle");
    kuasar_host::record::private_dir(&bundle)?;
    // What the rootfs is mounted on, as engines make it.
    kuasar_host::record::private_dir(&bundle.join("rootfs"))?;
    let container = unique("c");
    let netns = Some(pod.netns.as_str()).filter(|path| !path.is_empty());
    let text =
        spec::container(args, &image, netns, &format!("{CGROUP}/{}/{container}", pod.id), &pod.id)?;
    let path = bundle.join("config.json");
    std::fs::write(&path, text.to_string()).map_err(Error::at("write", &path))?;
    let address = {
        let _progress = Progress::new("starting the pod");
        pod.start(client).await?
    };
    let _progress = Progress::new("making the container");
    let streams = Streams::new(args.interactive, args.tty)?;
    let (stdin, stdout, stderr) = streams.paths();
    let rootfs = image.mounts(dir)?.into_iter().map(|(kind, source, options)| Mount {
        type_: kind,
        source,
        options,
        ..Mount::default()
    });
    let q = task::CreateTaskRequest {
        id: container.clone(),
        bundle: bundle.display().to_string(),
        rootfs: rootfs.collect(),
        terminal: args.tty,
        stdin,
        stdout,
        stderr,
        ..Default::default()
    };
    let tasks = tasks(&address).await?;
    tasks.create(patient(), &q).await.map_err(Error::from)?;
    let grace = Duration::from_secs(args.stop_timeout);
    Ok((Process { tasks, container, exec: String::new(), grace }, streams))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_told_from_a_later_process_with_its_pid() {
        assert!(is_alive(&owner()));
        let (pid, started) =
            owner().split_once('-').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let started: u64 = started.parse().unwrap();
        assert!(!is_alive(&format!("{pid}-{}", started + 1)));
        assert!(is_alive("what is this"));
    }

    #[test]
    fn volumes_and_annotations_are_checked() {
        let v = volume("/etc:/x:ro").unwrap();
        assert_eq!((v.target.as_str(), v.read_only), ("/x", true));
        for bad in ["/etc", "/etc:x", "/etc:/x:rx", "/nowhere/at/all:/x"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(pair("a").is_err());
    }

    #[test]
    fn limits_are_in_the_units_of_cri() {
        let mut pod = PodSpec::new(Some("x"), None);
        pod.limit(Some(1.5), Some(64));
        let r = &pod.config.linux.resources;
        assert_eq!(
            (r.cpu_quota, r.cpu_period, r.memory_limit_in_bytes),
            (150_000, PERIOD, 64 << 20)
        );
        assert_eq!(pod.config.labels.get(OWNER), Some(&owner()));
    }
}
