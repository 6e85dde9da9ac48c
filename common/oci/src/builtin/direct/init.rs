//! The container's first process, from its first moment to its payload.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use kuasar_host::cgroup::Cgroup;
use libcontainer::oci_spec::runtime::Process;
use nix::sched::CloneFlags;

use super::plan::Plan;
use super::seccomp::Filter;
use super::{Opened, explain, privileges, rootfs, sys};
use crate::builtin::args::Create;
use crate::builtin::workload::{Container, Workload};
use crate::builtin::{console, payload};
use crate::place::GO;

/// What the creating process has prepared.
pub struct Prepared {
    /// The host's procfs, checked to be one.
    pub proc: OwnedFd,
    /// Where `start` comes.
    pub listener: UnixListener,
    /// Who gets the terminal.
    pub console: Option<UnixStream>,
    /// The container's cgroup, where this process has to know it.
    pub group: Option<Cgroup>,
    /// How this process comes into it.
    pub turn: Turn,
    /// The compiled seccomp profile.
    pub filter: Option<Filter>,
    /// The empty mount namespace that this process's own is made of; without one it is in its own.
    pub room: Option<OwnedFd>,
    /// Program, arguments and environment.
    pub process: Process,
    /// The pod's user namespace.
    pub user: Option<OwnedFd>,
    /// Whether SELinux is on.
    pub selinux: bool,
    /// How many descriptors behind the standard streams the payload inherits.
    pub preserved: u32,
    /// What this process becomes in place of a program.
    pub workload: Option<Box<dyn Workload>>,
}

impl Prepared {
    /// With what was opened for it.
    pub(super) fn new(
        opened: Opened,
        group: Option<Cgroup>,
        turn: Turn,
        create: &Create,
        workload: Option<Box<dyn Workload>>,
    ) -> Self {
        let Opened { console, program, proc, listener, filter, user } = opened;
        Self {
            proc,
            listener,
            console,
            group,
            turn,
            filter,
            room: None,
            process: program,
            user,
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            preserved: u32::try_from(create.preserve_fds).unwrap_or(0),
            workload,
        }
    }
}

/// Who is told whether the container could be made.
pub enum Answer {
    /// The engine's process: [`READY`], or why not.
    Words(PipeWriter),
    /// Who has forked this process: the exit status that an engine would have; why not goes to the
    /// engine's log.
    Status {
        /// Gets one byte.
        pipe: PipeWriter,
        /// The log.
        log: Option<std::fs::File>,
    },
}

impl Answer {
    /// Tells it, and closes everything; answers whether somebody has been told that all is well.
    fn tell(self, outcome: Result<(), String>) -> bool {
        match (self, outcome) {
            (Self::Words(mut pipe), Ok(())) => pipe.write_all(&[READY]).is_ok(),
            (Self::Words(mut pipe), Err(reason)) => {
                // Nobody waits any more when it cannot be written.
                let _ = pipe.write_all(reason.as_bytes());
                false
            }
            (Self::Status { mut pipe, .. }, Ok(())) => pipe.write_all(&[0]).is_ok(),
            (Self::Status { mut pipe, mut log }, Err(reason)) => {
                crate::builtin::report(log.as_mut(), &super::said(reason).to_string());
                let _ = pipe.write_all(&[1]);
                false
            }
        }
    }
}

/// How the container's process comes into its cgroup.
pub enum Turn {
    /// It is in it, and in its cgroup namespace.
    Taken,
    /// By itself.
    Own,
    /// By itself, when who has made it has made the group and says [`GO`].
    Told(PipeReader),
}

impl Turn {
    /// Comes back when this process is in its group and its cgroup namespace.
    fn take(&mut self, plan: &Plan, group: Option<&Cgroup>) -> Result<(), String> {
        match std::mem::replace(self, Self::Taken) {
            Self::Taken => return Ok(()),
            Self::Own => {}
            Self::Told(mut pipe) => {
                let mut word = [0];
                if !matches!(pipe.read(&mut word), Ok(1)) || word != [GO] {
                    return Err("the container's cgroup was not made".into());
                }
            }
        }
        let group = group.ok_or("the container's cgroup is not known")?;
        group.enter().map_err(|error| explain("cannot join the cgroup", &error).to_string())?;
        enter_namespace(plan)
    }
}

/// A cgroup namespace: its root is the group that its maker is in, so not before.
fn enter_namespace(plan: &Plan) -> Result<(), String> {
    if !plan.new.contains(CloneFlags::CLONE_NEWCGROUP) {
        return Ok(());
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP)
        .map_err(|error| format!("cgroup namespace: {error}"))
}

/// First byte of the answer when everything is ready and `start` is waited for.
pub const READY: u8 = b'R';

/// Becomes the payload, after `start`. Never returns.
///
/// For a program the creation is answered when everything is done but the execve. A workload's is
/// answered at once: everything that the kernel makes of a container is made, and what it is
/// filled with, while the engine's client is on its way to start. What goes wrong then is
/// the answer to that, as for a program that cannot be executed. (A terminal is made before: who asked
/// for it waits for it.)
pub fn run(plan: &Plan, mut prepared: Prepared, answer: Answer) -> ! {
    let is_early = prepared.workload.is_some() && prepared.console.is_none();
    let outcome = if is_early { Ok(()) } else { prepare(plan, &mut prepared) };
    if answer.tell(outcome) {
        let ready = if is_early { prepare(plan, &mut prepared) } else { Ok(()) };
        let ready = ready.and_then(|()| get_ready(plan, &mut prepared));
        if let Some(starter) = started(&prepared.listener) {
            drop(prepared.listener);
            let filter = prepared.filter.as_ref();
            let reason = match (ready, late_filter(plan, filter), prepared.workload) {
                (Err(reason), ..) => {
                    // Who started us tells it.
                    let _ = write!(&starter, "{}", super::said(reason));
                    exit()
                }
                (Ok(()), Err(reason), _) => reason,
                // The connection to who started us ends with the execve: that tells.
                (Ok(()), Ok(()), None) => payload::execute(&prepared.process),
                (Ok(()), Ok(()), Some(workload)) => {
                    drop(starter);
                    workload.run()
                }
            };
            // Start has been answered: this is for who reads the container's output.
            let _ = writeln!(std::io::stderr(), "{reason}");
        }
    }
    exit()
}

/// A workload's own part of it.
fn get_ready(plan: &Plan, prepared: &mut Prepared) -> Result<(), String> {
    let Some(workload) = prepared.workload.as_mut() else { return Ok(()) };
    workload.prepare(&Container {
        args: prepared.process.args().as_deref().unwrap_or_default(),
        env: prepared.process.env().as_deref().unwrap_or_default(),
        cwd: &plan.spec.process.cwd,
        annotations: plan.spec.annotations.as_ref(),
        kept: &[prepared.listener.as_fd()],
    })
}

fn exit() -> ! {
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(255) }
}

/// Waits for `start`, and answers its connection (close-on-exec).
fn started(listener: &UnixListener) -> Option<UnixStream> {
    let mut words = Vec::new();
    // What is said does not matter, but that somebody has come and has said it all.
    let (stream, _) = listener.accept().ok()?;
    (&stream).take(64).read_to_end(&mut words).ok()?;
    Some(stream)
}

fn no_new_privileges(plan: &Plan) -> bool {
    plan.spec.process.no_new_privileges == Some(true)
}

/// With `noNewPrivileges` a filter needs no privilege, and is loaded as late as can be: the last
/// thing before the program, or before a workload touches anything of the image.
fn late_filter(plan: &Plan, filter: Option<&Filter>) -> Result<(), String> {
    match filter {
        Some(filter) if no_new_privileges(plan) => filter.load(),
        _ => Ok(()),
    }
}

fn prepare(plan: &Plan, prepared: &mut Prepared) -> Result<(), String> {
    let spec = &plan.spec;
    let process = &spec.process;
    nix::unistd::setsid().map_err(|error| format!("setsid: {error}"))?;
    match prepared.turn {
        Turn::Taken => enter_namespace(plan)?,
        Turn::Told(_) if !plan.is_charged() => {}
        Turn::Own | Turn::Told(_) => prepared.turn.take(plan, prepared.group.as_ref())?,
    }
    privileges::oom_score(plan, &prepared.proc)?;
    names(plan)?;
    // SAFETY: plain system call. Modes are what they are said to be.
    unsafe { libc::umask(0) };
    let (group, turn) = (prepared.group.as_ref(), &mut prepared.turn);
    let (users, room) = (prepared.user.as_ref(), prepared.room.take());
    let root = rootfs::build(plan, users, group, room.as_ref(), || turn.take(plan, group))?;
    drop(room);
    turn.take(plan, group)?;
    rootfs::enter(&root, plan.root)?;
    for (key, value) in spec.linux.sysctl.iter().flatten() {
        sysctl(&prepared.proc, key, value)?;
    }
    let null = rootfs::null(&root)?;
    if let Some(null) = &null {
        rootfs::own_null(null)?;
    }
    if let Some(socket) = &prepared.console {
        let size = process.console_size.map(|size| (size.width, size.height));
        let uid = process.user.uid;
        let owner = plan.user.as_ref().and_then(|user| user.uid(uid)).unwrap_or(uid);
        console::attach(socket, owner, size)?;
        rootfs::console(&root)?;
    }
    rootfs::close(&root, plan, null.as_ref())?;
    // A workload closes what it does not know: nothing of this function may be open by then.
    drop((root, null));
    home(plan, &mut prepared.process);
    // SAFETY: plain system call.
    unsafe { libc::umask(process.user.umask.unwrap_or(0o022)) };
    privileges::limits(plan)?;
    if no_new_privileges(plan) {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
            .map_err(|error| format!("PR_SET_NO_NEW_PRIVS: {error}"))?;
    }
    privileges::labels(plan, &prepared.proc, prepared.selinux)?;
    let cwd = Path::new(&process.cwd);
    let late = directory(cwd)?;
    if let Some(filter) = prepared.filter.as_ref().filter(|_| !no_new_privileges(plan)) {
        filter.load()?;
    }
    if let Some(user) = prepared.user.take() {
        // With all rights in there, which the next step gives up.
        nix::sched::setns(&user, CloneFlags::CLONE_NEWUSER)
            .map_err(|error| format!("enter the pod's user namespace: {error}"))?;
    }
    privileges::identity(plan)?;
    if late {
        nix::unistd::chdir(cwd)
            .map_err(|error| format!("chdir to cwd ({cwd:?}): {}", error.desc().to_lowercase()))?;
    }
    // A directory handle of the host would show here (CVE-2024-21626).
    std::env::current_dir().map_err(|_| {
        "current working directory is outside of container mount namespace root".to_owned()
    })?;
    // SAFETY: marks descriptors close-on-exec; nothing is closed yet.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 + prepared.preserved,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked != 0 {
        return Err(format!("close_range: {}", std::io::Error::last_os_error()));
    }
    let Some(workload) = &prepared.workload else {
        return payload::find(&prepared.process).map(drop);
    };
    match (workload.filter(), prepared.filter.take()) {
        (Some(own), _) if no_new_privileges(plan) => own.load(),
        (Some(_), _) => Err("noNewPrivileges is missing".into()),
        (None, filter) => late_filter(plan, filter.as_ref()),
    }
}

/// Names of a new UTS namespace.
fn names(plan: &Plan) -> Result<(), String> {
    if !plan.new.contains(CloneFlags::CLONE_NEWUTS) {
        return Ok(());
    }
    if let Some(name) = plan.spec.hostname.as_deref().filter(|name| !name.is_empty()) {
        // SAFETY: a valid buffer and its length.
        if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } != 0 {
            return Err(format!("hostname {name:?}: {}", std::io::Error::last_os_error()));
        }
    }
    if let Some(name) = plan.spec.domainname.as_deref().filter(|name| !name.is_empty()) {
        // SAFETY: a valid buffer and its length.
        if unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) } != 0 {
            return Err(format!("domainname {name:?}: {}", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// A sysctl of the namespaces that this process is in, through the host's procfs.
fn sysctl(proc: &OwnedFd, key: &str, value: &str) -> Result<(), String> {
    let path = format!("sys/{}", key.replace('.', "/"));
    if Path::new(&path).components().any(|part| part == std::path::Component::ParentDir) {
        return Err(format!("sysctl {key:?} is not allowed"));
    }
    privileges::write_proc(proc, &path, value)
        .map_err(|error| format!("sysctl {key} = {value:.100?}: {error}"))
}

/// Changes the directory as root; `true` when only the process's own user may.
fn directory(cwd: &Path) -> Result<bool, String> {
    if cwd.as_os_str().is_empty() {
        return Ok(false);
    }
    match nix::unistd::chdir(cwd) {
        Ok(()) => Ok(false),
        Err(nix::errno::Errno::EACCES | nix::errno::Errno::EPERM) => Ok(true),
        Err(error) => Err(format!(
            "chdir to cwd ({cwd:?}) set in config.json failed: {}",
            error.desc().to_lowercase()
        )),
    }
}

/// `HOME` of the user, as the container's passwd has it, where the spec names none.
fn home(plan: &Plan, process: &mut Process) {
    let given = plan.spec.process.env.iter().flatten().any(|entry| entry.starts_with("HOME="));
    if given {
        return;
    }
    let home = passwd(plan.spec.process.user.uid).unwrap_or_else(|| "/".into());
    let mut env = process.env().clone().unwrap_or_default();
    env.push(format!("HOME={home}"));
    process.set_env(Some(env));
}

fn passwd(uid: u32) -> Option<String> {
    use std::os::unix::fs::OpenOptionsExt;
    /// Most that is read of it.
    const MAX: u64 = 1 << 20;
    // The image's own: it may be a FIFO.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd")
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(MAX).read_to_end(&mut text).ok()?;
    home_of(&String::from_utf8_lossy(&text), uid)
}

fn home_of(text: &str, uid: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (found && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_found_by_number() {
        let text = "# x\nroot:x:0:0:r:/root:/bin/sh\nbad:x:1\nu:x:1000:5::/home/u:/bin/sh\n";
        assert_eq!(home_of(text, 0).unwrap(), "/root");
        assert_eq!(home_of(text, 1000).unwrap(), "/home/u");
        assert_eq!(home_of(text, 1), None);
    }
}
