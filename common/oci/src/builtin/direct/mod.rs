//! `oci create` by ourselves: one clone, few system calls.
//!
//! libcontainer does the same in some 3,000 system calls and three forks. It stays: for every spec
//! that has anything which is not done here ([`Plan::of`] decides, before anything is touched),
//! and for who asks for it by `--libcontainer`.
//!
//! # How
//! 1. This process reads the spec, joins the namespaces that exist, and prepares what costs time
//!    (the seccomp program).
//! 2. One `clone3` makes the container's process: in its new namespaces, a sibling of ours
//!    (`CLONE_PARENT`: who started us is to reap it). [`init`] is what it does.
//! 3. Meanwhile we make the cgroup with its limits and device rules, tell the process to enter it, and
//!    write the container's state. Then we wait for one word: ready, or why not.
//!
//! A program that forks the containers' processes itself has one process in place of two: see
//! [`entered`].
//!
//! On cgroup v2 the group is made first, and the process is in it from its first moment
//! (`CLONE_INTO_CGROUP`). On v1 a group is a directory in each of a dozen hierarchies, which takes
//! as long as the mounts: both are done side by side, and the process waits for its group, and enters
//! it, before the first thing that depends on it ([`init::Turn`]). Nobody else moves it there: that would
//! wait for all processors ([`Cgroup::entrances`]). Until then it runs nothing of the container's and
//! copies nothing of the image's, so that there is nothing to charge or to limit.
//!
//! Nothing in here follows a path of the container: see [`kuasar_host::inside`] and [`rootfs`].
//!
//! The state directory has what libcontainer's has (`state.json`, `youki_config.json`,
//! `notify.sock`), so that start, state, kill, delete and exec do not know which of the two has
//! made a container.

mod copy_up;
mod devices;
mod entered;
mod init;
mod plan;
mod privileges;
mod rehearsal;
mod room;
mod rootfs;
pub mod seccomp;
mod spec;
mod sys;
#[cfg(test)]
mod tests;
mod user;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_host::cgroup::{Cgroup, Layout};
use libcontainer::oci_spec::runtime::{Process, ProcessBuilder};
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use serde_json::Value;

use super::args::{Args, Create};
use super::workload::Workload;
use super::{Error, Result, console};
use crate::place::GO;
pub use entered::{Entered, own_pid, run as run_entered};
pub use plan::{Plan, Reason};
pub use rehearsal::rehearse;
pub use room::make as make_room;
pub use sys::clone_sibling;
use user::User;

/// The device rules of `linux.resources`, completed as [`mod@plan`] completes them.
pub fn device_rules(resources: Option<&serde_json::Value>) -> serde_json::Value {
    let given = resources.and_then(|resources| resources.get("devices"));
    let mut rules = given.and_then(|rules| rules.as_array().cloned()).unwrap_or_default();
    rules.extend(devices::allowed_rules());
    serde_json::Value::Array(rules)
}

/// How long processes may take to leave the cgroup of a container that could not be made.
const LEAVE: Duration = Duration::from_secs(2);

/// Whether this container is made here: the command line asks for nothing else, the kernel has all
/// it takes, and the spec has nothing that we do not know.
pub fn plan(create: &Create, text: &[u8], is_workload: bool) -> std::result::Result<Plan, Reason> {
    let leave = |why: &str| Err(Reason(why.into()));
    if create.libcontainer {
        return leave("asked for");
    }
    if create.systemd {
        return leave("systemd makes the cgroup");
    }
    if std::env::var_os("LISTEN_FDS").is_some() {
        return leave("LISTEN_FDS");
    }
    let plan = Plan::of(text)?;
    if plan.user.is_some() && !is_workload {
        return leave("a user namespace");
    }
    if !sys::supported() {
        return leave("this kernel has no mount_setattr");
    }
    Ok(plan)
}

/// What is made on the way, and removed again unless it is kept.
#[derive(Default)]
struct Traces {
    state: PathBuf,
    group: Option<Cgroup>,
}

impl Traces {
    fn keep(mut self) {
        self.group = None;
        self.state = PathBuf::new();
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // Best effort: the error that led here is what is reported.
        if !self.state.as_os_str().is_empty() {
            let _ = std::fs::remove_dir_all(&self.state);
        }
        if let Some(group) = &self.group {
            let _ = group.kill();
            let _ = group.remove(LEAVE);
        }
    }
}

/// What the container's process works with, whoever makes it.
struct Opened {
    console: Option<UnixStream>,
    program: Process,
    proc: OwnedFd,
    listener: UnixListener,
    filter: Option<seccomp::Filter>,
    user: Option<OwnedFd>,
}

/// Makes the state directory, opens everything that is outside of the container, and hides this
/// process from it.
fn open(
    args: &Args,
    create: &Create,
    plan: &mut Plan,
    traces: &mut Traces,
    is_workload: bool,
) -> Result<Opened> {
    // Its spec has the devices that it needs, if any: the image is not written to.
    plan.fill_dev &= !is_workload || plan.spec.process.terminal;
    let process = &mut plan.spec.process;
    let console = match (&create.console_socket, process.terminal) {
        (Some(path), true) => {
            Some(UnixStream::connect(path).map_err(|error| Error::io(path.display(), error))?)
        }
        (None, true) => return Err(Error::Usage("a terminal needs --console-socket".into())),
        _ => None,
    };
    let owner = plan.user.as_ref().map_or(Some(process.user.uid), |map| map.uid(process.user.uid));
    let owner = owner.ok_or_else(|| {
        let uid = process.user.uid;
        Error::Process(format!("user {uid} is not mapped in the pod's user namespace"))
    })?;
    if console.is_none() {
        console::own_streams(owner);
    }
    let program = ProcessBuilder::default()
        .args(process.args.take().unwrap_or_default())
        .env(process.env.clone().unwrap_or_default())
        .build()
        .map_err(|error| Error::io("process", error))?;
    let proc = proc_of_the_host()?;
    let user = plan.user.as_ref().map(User::open).transpose();
    let user = user.map_err(|error| explain("the pod's user namespace", &error))?;
    // SAFETY: plain system call. Before anything of a container may see this process.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(Error::os("PR_SET_DUMPABLE"));
    }
    traces.state = state_directory(args)?;
    let listener = listen(&traces.state)?;
    let filter = match &plan.spec.linux.seccomp {
        Some(profile) => {
            Some(seccomp::Filter::of(profile, create.cache.as_deref()).map_err(Error::Other)?)
        }
        None => None,
    };
    Ok(Opened { console, program, proc, listener, filter, user })
}

/// Joins the namespaces that exist.
fn join_namespaces(plan: &Plan) -> Result<()> {
    for (kind, path) in &plan.join {
        let namespace = kuasar_host::namespace::open_kind(path, *kind)
            .map_err(|error| Error::io("namespace", error))?;
        nix::sched::setns(&namespace, *kind)
            .map_err(|error| Error::io(format!("join namespace {}", path.display()), error))?;
    }
    Ok(())
}

/// The container's group, by this process's own view of the hierarchies.
fn group_of(plan: &Plan) -> Result<Cgroup> {
    Layout::detect_usual()
        .and_then(|layout| layout.group(&plan.cgroup))
        .map_err(|error| explain("cgroup", &error))
}

/// Makes the container; its process waits for `start`.
pub fn run(
    args: &Args,
    create: &Create,
    mut plan: Plan,
    workload: Option<Box<dyn Workload>>,
) -> Result<()> {
    let mut traces = Traces::default();
    let opened = open(args, create, &mut plan, &mut traces, workload.is_some())?;
    let group = group_of(&plan)?;
    let beside = is_beside(&plan, &group);
    if !beside {
        make_planned_group(&plan, &group, &mut traces)?;
    }
    join_namespaces(&plan)?;
    let directory = match group.layout() {
        Layout::V2(root) => Some(open_directory(&root.join(group.path()))?),
        Layout::V1(_) => None,
    };
    let (mut answer, writer) = std::io::pipe().map_err(|error| Error::io("pipe", error))?;
    let (told, tell) = std::io::pipe().map_err(|error| Error::io("pipe", error))?;
    let namespaces = plan.new - CloneFlags::CLONE_NEWCGROUP;
    let directory = directory.as_ref().map(AsFd::as_fd);
    let pid = sys::clone_sibling(namespaces.bits(), directory)
        .map_err(|error| Error::io("clone the container's process", error))?;
    if pid == 0 {
        // Not ours to undo in there.
        std::mem::drop((answer, tell));
        let turn = match (directory.is_some(), beside) {
            (true, _) => init::Turn::Taken,
            (false, false) => init::Turn::Own,
            (false, true) => init::Turn::Told(told),
        };
        let prepared = init::Prepared::new(opened, Some(group), turn, create, workload);
        init::run(&plan, prepared, init::Answer::Words(writer));
    }
    drop((writer, opened, told));
    // The process works meanwhile.
    let made = (|| {
        if beside {
            make_planned_group(&plan, &group, &mut traces)?;
            // It has gone when this fails, and has said why.
            let _ = (&tell).write_all(&[GO]);
        }
        save(args, create, &plan, &traces.state, pid)
    })();
    drop(tell);
    let mut words = Vec::new();
    answer.read_to_end(&mut words).map_err(|error| Error::io("wait for the process", error))?;
    made?;
    match words.as_slice() {
        [init::READY] => {}
        [] => return Err(Error::Other("the container's process has ended unexpectedly".into())),
        words => return Err(said(String::from_utf8_lossy(words).into_owned())),
    }
    if let Some(path) = &create.pid_file {
        std::fs::write(path, pid.to_string()).map_err(|error| Error::io(path.display(), error))?;
    }
    traces.keep();
    Ok(())
}

/// What the container's process says when it cannot be what it is to be.
fn said(words: String) -> Error {
    if words.starts_with("exec: ") { Error::Process(words) } else { Error::Other(words) }
}

fn proc_of_the_host() -> Result<OwnedFd> {
    let fd = open_directory(Path::new("/proc"))?;
    kuasar_host::safe_path::verify_procfs(fd.as_fd()).map_err(|error| Error::io("/proc", error))?;
    Ok(fd)
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty()).map_err(|error| Error::io(path.display(), error))
}

fn state_directory(args: &Args) -> Result<PathBuf> {
    let path = args.root.join(&args.id);
    let make = || std::fs::DirBuilder::new().mode(0o700).create(&path);
    let made = match make() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            kuasar_host::record::private_dir(&args.root)
                .map_err(|error| Error::io("state directory", error))?;
            make()
        }
        other => other,
    };
    match made {
        Ok(()) => Ok(path),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(Error::Other(format!("container {} exists", args.id)))
        }
        Err(error) => Err(Error::io(path.display(), error)),
    }
}

/// The socket that `start` connects to; reached through a descriptor, because a socket's path may
/// only have 107 bytes.
fn listen(state: &Path) -> Result<UnixListener> {
    let directory = open_directory(state)?;
    let path = kuasar_host::safe_path::proc_path(directory.as_fd()).join("notify.sock");
    UnixListener::bind(path).map_err(|error| Error::io("notify.sock", error))
}

/// Whether the group is made while the process is at work: on v1, and unless the process has
/// something to do before that is charged to its group, or has other rights than we have.
fn is_beside(plan: &Plan, group: &Cgroup) -> bool {
    let user = CloneFlags::CLONE_NEWUSER;
    matches!(group.layout(), Layout::V1(_))
        && !plan.is_charged()
        && !plan.new.contains(user)
        && plan.join.iter().all(|(kind, _)| *kind != user)
}

/// Makes the container's cgroup, with its limits and device rules.
fn make_planned_group(plan: &Plan, group: &Cgroup, traces: &mut Traces) -> Result<()> {
    let made = group.create().map_err(|error| explain("cgroup", &error))?;
    if made {
        traces.group = Some(group.clone());
    }
    limit(group, &plan.device_rules, &plan.resources)
}

fn limit(group: &Cgroup, devices: &Value, resources: &Value) -> Result<()> {
    group.set_devices(devices).map_err(|error| explain("devices", &error))?;
    let resources = serde_json::to_vec(resources).unwrap_or_default();
    group.update(&resources).map_err(|error| explain("resources", &error))
}

/// Makes a container's cgroup from `linux.resources` of its spec, for who makes the container's
/// process without us.
pub fn make_group(group: &Cgroup, resources: &Value) -> Result<()> {
    let mut resources = resources.clone();
    let devices = plan::split_resources(&mut resources).map_err(|reason| Error::Other(reason.0))?;
    group.create().map_err(|error| explain("cgroup", &error))?;
    limit(group, &devices, &resources)
}

/// An error of the host with its causes.
fn explain(what: &str, error: &kuasar_host::Error) -> Error {
    Error::Other(format!("{what}: {}", kuasar_host::chain(error)))
}

/// Writes what later commands read.
fn save(args: &Args, create: &Create, plan: &Plan, state: &Path, pid: i32) -> Result<()> {
    let bundle = std::path::absolute(&create.bundle)
        .map_err(|error| Error::io(create.bundle.display(), error))?;
    let text = serde_json::json!({
        "ociVersion": plan.spec.oci_version,
        "id": args.id,
        "status": "created",
        "pid": pid,
        "bundle": bundle,
        "annotations": plan.spec.annotations.as_ref(),
        "created": now(),
        "creator": 0,
        "useSystemd": false,
        "intelRdtDir": null,
        "engine": "direct",
    });
    let config = serde_json::json!({ "hooks": null, "cgroup_path": plan.cgroup });
    for (name, value) in [("state.json", text), ("youki_config.json", config)] {
        let path = state.join(name);
        // Whole or not at all is a matter of the directory here: it is removed on failure.
        std::fs::write(&path, value.to_string())
            .map_err(|error| Error::io(path.display(), error))?;
    }
    Ok(())
}

/// The time as RFC 3339 has it.
pub fn now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    let seconds = since.as_secs() as libc::time_t;
    // SAFETY: all-zero is a valid tm; both pointers are valid for the call.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&raw const seconds, &raw mut tm);
        tm
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        since.subsec_nanos()
    )
}
