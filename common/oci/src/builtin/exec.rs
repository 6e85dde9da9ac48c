//! `oci exec`: a further process in a running container.
//!
//! Not libcontainer's: its version 0.7 leaves out the container's seccomp section and the SELinux
//! label when a process joins. The order below is runc's, and each step has its place:
//!
//! 1. Outside: everything that belongs to the host is opened (log, pid file, console socket,
//!    `/proc`), because paths mean something else once the mount namespace is joined. The seccomp
//!    profile is compiled, or found compiled ([`super::direct::seccomp`]). We are not dumpable, nor is
//!    what is forked.
//! 2. The PID namespace is joined, which takes only children, and a sibling is forked. On cgroup v2
//!    it is made in the container's group (`CLONE_INTO_CGROUP`): a process that moves waits for an RCU
//!    grace period, some ten milliseconds. Before it joins other namespaces: what may be moved where
//!    is looked at in the cgroup namespace of who asks.
//! 3. The sibling takes on its limits and OOM score while it still may, enters groups of v1 by `tasks`,
//!    and joins all other namespaces that differ from ours at once, through a pidfd of the
//!    container's init: no path of the container is followed, and nobody in there can trace it
//!    or look at its descriptors. It makes its session and terminal, goes to its directory, loads
//!    seccomp (before capabilities are dropped, unless `noNewPrivileges` lets it wait until the end),
//!    takes on its user and its five capability sets, closes everything, and becomes the payload.
//! 4. A close-on-exec pipe tells: end of file is success, text is the reason of failure.
//!    Only then is the pid file written.
//!
//! The first two steps are over in a moment and wait for nobody. So one process can do them for one
//! exec after another ([`super::serve`]): it goes back to its own PID namespace each time.

use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    Capabilities, LinuxCapabilities, LinuxSeccomp, PosixRlimitType, Process,
};
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::CloneFlags;
use nix::unistd::{Gid, Uid};
use serde::Deserialize;
use serde_json::Value;

use super::args::{Args, Exec};
use super::direct::seccomp::Filter;
use super::direct::{clone_sibling, seccomp};
use super::{Error, Result, console, payload};
use crate::mapping::{Mapping, host_id};

/// The parts of the container's spec that an exec needs.
#[derive(Deserialize, Default)]
struct Container {
    #[serde(default)]
    linux: Linux,
}

#[derive(Deserialize, Default)]
struct Linux {
    seccomp: Option<Value>,
}

/// The container's seccomp profile.
enum Profile {
    /// One that we compile ourselves.
    Ours(Filter),
    /// One with parts that only libcontainer knows.
    Libcontainers(Box<LinuxSeccomp>),
}

/// The parts of libcontainer's state file that an exec needs.
#[derive(Deserialize)]
struct State {
    pid: Option<i32>,
    bundle: PathBuf,
}

/// Everything the child needs, made before the namespaces are joined.
struct Plan {
    id: String,
    process: Process,
    seccomp: Option<Profile>,
    console: Option<UnixStream>,
    /// What it gets in place of what is ours.
    given: Option<Given>,
    /// The host's uid of its user.
    uid: u32,
    /// Files by which it enters its groups.
    entrances: Vec<PathBuf>,
    /// The host's procfs.
    proc: OwnedFd,
    /// The container's init, and the namespaces of it that are still to be joined.
    init: OwnedFd,
    namespaces: CloneFlags,
}

/// What a process gets from who asks a process that stays.
pub struct Given {
    /// Its standard streams.
    pub streams: [OwnedFd; 3],
    /// Says when it may become its program.
    pub go: OwnedFd,
}

/// A process that is becoming its program.
pub struct Made {
    /// Its pid.
    pub pid: i32,
    /// Ends when it has become that, or says why it cannot.
    pub answer: PipeReader,
}

/// Where a process is that makes others in containers: looked at once.
pub struct Home {
    /// Its PID namespace, to which it goes back.
    pid: OwnedFd,
    /// Its namespaces: names, flags, and what the kernel calls them.
    namespaces: Vec<(&'static str, CloneFlags, PathBuf)>,
    /// Its cgroups, as the kernel lists them.
    cgroups: String,
    /// Its mounts, likewise: where the hierarchies are.
    mounts: String,
}

impl Home {
    /// That of this process.
    ///
    /// # Errors
    /// When there is no procfs.
    pub fn open() -> Result<Self> {
        let pid = File::open("/proc/self/ns/pid").map_err(|e| Error::io("own PID namespace", e))?;
        let namespaces = NAMESPACES.iter().filter_map(|(name, flag)| {
            // A kernel without this kind has it nowhere.
            let ours = std::fs::read_link(format!("/proc/self/ns/{name}")).ok()?;
            Some((*name, *flag, ours))
        });
        Ok(Self {
            pid: pid.into(),
            namespaces: namespaces.collect(),
            cgroups: std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(),
            mounts: std::fs::read_to_string("/proc/self/mountinfo")
                .map_err(|error| Error::io("mountinfo", error))?,
        })
    }

    /// New processes are made here again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn back(&self) -> Result<()> {
        // SAFETY: plain system call; the descriptor lives.
        match unsafe { libc::setns(self.pid.as_raw_fd(), libc::CLONE_NEWPID) } {
            0 => Ok(()),
            _ => Err(Error::os("back to the own PID namespace")),
        }
    }

    /// The namespaces of the container that are not ours already: joining one's own user namespace
    /// is an error, the others would be work for nothing.
    fn others(&self, pid: i32) -> Result<CloneFlags> {
        self.namespaces.iter().try_fold(CloneFlags::empty(), |flags, (name, flag, ours)| {
            let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{name}"))
                .map_err(|error| Error::io("the container is gone", error))?;
            Ok(if theirs == *ours { flags } else { flags | *flag })
        })
    }

    /// The cgroups that the container's init is in and we are not: the one of v2, and how those of v1
    /// are entered. The former may be a leaf into which init has moved itself, because the container's
    /// own top must be empty then.
    fn groups(&self, pid: i32, id: &str) -> Result<(Option<Group>, Vec<PathBuf>)> {
        let (mut group, mut entrances) = (None, Vec::new());
        let membership = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
            .map_err(|error| Error::io("the container is gone", error))?;
        for line in membership.lines() {
            if self.cgroups.lines().any(|mine| mine == line) {
                continue;
            }
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let Some(mount) = cgroup_mount(&self.mounts, controllers) else { continue };
            let dir = mount.join(path.trim_start_matches('/'));
            if controllers.is_empty() {
                let fd = File::open(&dir).map_err(|e| Error::Other(no_group(id, &dir, &e)))?;
                group = Some(Group { dir, fd: fd.into() });
            } else {
                // A process of one thread need not wait when it moves itself.
                entrances.push(dir.join("tasks"));
            }
        }
        Ok((group, entrances))
    }
}

/// All kinds of namespaces.
const NAMESPACES: [(&str, CloneFlags); 8] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("time", CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)),
];

/// Before anything of a container may see this process, or one that it forks.
///
/// # Errors
/// The kernel's.
pub fn hide() -> Result<()> {
    // SAFETY: plain system call.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(Error::os("PR_SET_DUMPABLE"));
    }
    Ok(())
}

/// Runs the process.
pub fn run(args: &Args, exec: &Exec) -> Result<()> {
    let mut pid_file = match &exec.pid_file {
        Some(path) => Some(File::create(path).map_err(|error| Error::io(path.display(), error))?),
        None => None,
    };
    hide()?;
    let Made { pid, mut answer } = make(args, exec, None, &Home::open()?)?;
    let mut reason = String::new();
    answer.read_to_string(&mut reason).map_err(|error| Error::io("exec", error))?;
    if !reason.is_empty() {
        return Err(Error::Process(reason));
    }
    if let Some(file) = &mut pid_file {
        write!(file, "{pid}").map_err(|error| Error::io("pid file", error))?;
    }
    Ok(())
}

/// Makes the process, a sibling of this one, with what is given or what is ours. What is forked next
/// would be in the container's PID namespace, too: see [`Home::back`].
pub fn make(args: &Args, exec: &Exec, given: Option<Given>, home: &Home) -> Result<Made> {
    let state: State = read(&args.root.join(&args.id).join("state.json"))?;
    let container: Container = read(&state.bundle.join("config.json"))?;
    let process: Process = read(&exec.process)?;
    let pid = state
        .pid
        .filter(|pid| *pid > 0)
        .ok_or_else(|| Error::Other(format!("container {} has no process", args.id)))?;
    let init = pidfd_open(pid)
        .map_err(|_| Error::Other(format!("container {} is not running", args.id)))?;
    let console = match (&exec.console_socket, process.terminal()) {
        (Some(path), Some(true)) => {
            Some(UnixStream::connect(path).map_err(|error| Error::io(path.display(), error))?)
        }
        (None, Some(true)) => {
            return Err(Error::Usage("a terminal needs --console-socket".into()));
        }
        _ => None,
    };
    let proc = File::open("/proc").map_err(|error| Error::io("/proc", error))?.into();
    let namespaces = home.others(pid)?;
    let (group, entrances) = home.groups(pid, &args.id)?;
    let seccomp = container.linux.seccomp.map(|profile| compile(&profile, exec.cache.as_deref()));
    let mut plan = Plan {
        id: args.id.clone(),
        seccomp: seccomp.transpose()?,
        uid: host_uid(pid, process.user().uid()),
        process,
        console,
        given,
        entrances,
        proc,
        init,
        namespaces: namespaces - CloneFlags::CLONE_NEWPID,
    };
    join(&plan.init, namespaces & CloneFlags::CLONE_NEWPID).map_err(Error::Other)?;
    let (answer, mut tell) = std::io::pipe().map_err(|error| Error::io("pipe", error))?;
    let child = fork_into(group, &mut plan)?;
    if child == 0 {
        drop(answer);
        if plan.given.is_some() {
            // Requests of others: not in a process that is about to be the container's.
            // SAFETY: nothing here uses the number any more.
            unsafe { libc::close(super::serve::SOCKET) };
        }
        let reason = become_process(&plan);
        // Either exec has closed this end, or the reader gets the reason.
        let _ = tell.write_all(reason.as_bytes());
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(255) };
    }
    Ok(Made { pid: child, answer })
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|error| Error::io(path.display(), error))?;
    serde_json::from_slice(&text).map_err(|error| Error::io(path.display(), error))
}

fn pidfd_open(pid: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is ours when it is not negative.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a new descriptor; descriptors fit an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn limits(process: &Process) -> std::result::Result<(), String> {
    if let Some(score) = process.oom_score_adj() {
        // Lowering it needs a capability that a nested host may not have; runc fails here, too.
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|error| format!("oom_score_adj: {error}"))?;
    }
    for limit in process.rlimits().iter().flatten() {
        let value = libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() };
        // SAFETY: a valid resource and a valid structure.
        if unsafe { libc::setrlimit(resource(limit.typ()), &raw const value) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(format!("rlimit {:?}: {error}", limit.typ()));
        }
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// Joins namespaces of the process that the pidfd stands for.
fn join(init: &OwnedFd, namespaces: CloneFlags) -> std::result::Result<(), String> {
    // SAFETY: plain system call; the pidfd lives.
    if !namespaces.is_empty() && unsafe { libc::setns(init.as_raw_fd(), namespaces.bits()) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(format!("cannot join the container's namespaces: {error}"));
    }
    Ok(())
}

/// Before anything is joined: what is wrong with a profile is told, and what is kept of it is the
/// host's.
fn compile(profile: &Value, cache: Option<&Path>) -> Result<Profile> {
    let ours = seccomp::Seccomp::deserialize(profile).ok();
    if let Some(ours) = ours.filter(|ours| seccomp::check(ours).is_ok()) {
        return Filter::of(&ours, cache).map(Profile::Ours).map_err(Error::Process);
    }
    let profile = LinuxSeccomp::deserialize(profile).map_err(|e| Error::io("linux.seccomp", e))?;
    if libcontainer::seccomp::is_notify(&profile) {
        return Err(Error::Process(
            "seccomp notification is not supported for exec by the built-in engine".into(),
        ));
    }
    Ok(Profile::Libcontainers(Box::new(profile)))
}

/// A cgroup of v2.
struct Group {
    dir: PathBuf,
    fd: OwnedFd,
}

fn no_group(id: &str, file: &Path, error: &std::io::Error) -> String {
    format!("cannot join the cgroup of container {id} ({}): {error}", file.display())
}

/// Where a hierarchy is mounted, from its controllers as `/proc/PID/cgroup` writes them (empty
/// for v2). Only mounts of the hierarchy's root count.
fn cgroup_mount(mountinfo: &str, controllers: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, _source, options) = (right.next()?, right.next()?, right.next()?);
        let right_one = if controllers.is_empty() {
            kind == "cgroup2"
        } else {
            kind == "cgroup"
                && controllers
                    .split(',')
                    .all(|controller| options.split(',').any(|option| option == controller))
        };
        (right_one && root == "/").then(|| PathBuf::from(point))
    })
}

/// The host's uid for a uid of the container.
fn host_uid(pid: i32, uid: u32) -> u32 {
    let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap_or_default();
    let mapping = |line: &str| {
        let mut numbers = line.split_whitespace().filter_map(|word| word.parse::<u32>().ok());
        let (container, host, size) = (numbers.next()?, numbers.next()?, numbers.next()?);
        Some(Mapping { container, host, size })
    };
    let mappings: Vec<Mapping> = map.lines().filter_map(mapping).collect();
    host_id(&mappings, uid).unwrap_or(uid)
}

/// fork() whose child belongs to our parent.
fn fork_sibling() -> Result<i32> {
    // SAFETY: clone without a stack is fork; this process has one thread.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        -1 => Err(Error::os("clone")),
        pid => Ok(pid as i32),
    }
}

/// The same in a group. On kernels before 5.7, and in groups of threads, the process has to move.
fn fork_into(group: Option<Group>, plan: &mut Plan) -> Result<i32> {
    let Some(Group { dir, fd }) = group else { return fork_sibling() };
    match clone_sibling(0, Some(fd.as_fd())) {
        // The group has as many processes as it may have.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Err(Error::io("clone", error)),
        Err(_) => {
            plan.entrances.push(dir.join("cgroup.procs"));
            fork_sibling()
        }
        made => made.map_err(|error| Error::io("clone", error)),
    }
}

/// Step 3 of the module text. Returns only the reason of failure.
fn become_process(plan: &Plan) -> String {
    match take_on(plan) {
        Ok(()) => payload::execute(&plan.process),
        Err(reason) => reason,
    }
}

fn take_on(plan: &Plan) -> std::result::Result<(), String> {
    let process = &plan.process;
    let user = process.user();
    let os = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
    place(plan)?;
    limits(process)?;
    for file in &plan.entrances {
        std::fs::write(file, "0").map_err(|error| no_group(&plan.id, file, &error))?;
    }
    if plan.console.is_none() {
        console::own_streams(plan.uid);
    }
    join(&plan.init, plan.namespaces)?;
    nix::unistd::setsid().map_err(|error| format!("setsid: {error}"))?;
    if plan.namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        // Root of the container's user namespace, before its own user is taken on.
        nix::unistd::setgid(Gid::from_raw(0)).map_err(|error| format!("setgid 0: {error}"))?;
        nix::unistd::setuid(Uid::from_raw(0)).map_err(|error| format!("setuid 0: {error}"))?;
    }
    if let Some(socket) = &plan.console {
        let size = process.console_size().map(|size| (size.width() as u16, size.height() as u16));
        console::attach(socket, user.uid(), size)?;
    }
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        // SAFETY: plain system call.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(os("PR_SET_NO_NEW_PRIVS"));
        }
    }
    labels(plan)?;
    if let Some(umask) = user.umask() {
        // SAFETY: plain system call.
        unsafe { libc::umask(umask) };
    }
    // Not later: the filter may forbid it.
    wait_for_go(plan)?;
    let late_chdir = chdir(process.cwd())?;
    if !no_new_privileges {
        filter(plan)?;
    }
    identity(process)?;
    if late_chdir {
        nix::unistd::chdir(process.cwd()).map_err(|error| {
            format!("chdir to cwd ({:?}): {}", process.cwd().display(), error.desc())
        })?;
    }
    // A directory handle of the host would show here (CVE-2024-21626).
    std::env::current_dir().map_err(|_| {
        "current working directory is outside of container mount namespace root".to_owned()
    })?;
    if no_new_privileges {
        filter(plan)?;
    }
    // SAFETY: marks everything but the standard streams close-on-exec; nothing is closed yet.
    if unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }
        != 0
    {
        return Err(os("close_range"));
    }
    Ok(())
}

/// Puts the standard streams where they belong.
fn place(plan: &Plan) -> std::result::Result<(), String> {
    for (number, fd) in (0..).zip(plan.given.iter().flat_map(|given| &given.streams)) {
        // SAFETY: onto the standard streams of this process, which has one thread.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(format!("dup2: {}", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Waits until whoever reaps this process knows it. Who is gone has nobody read this.
fn wait_for_go(plan: &Plan) -> std::result::Result<(), String> {
    let Some(given) = &plan.given else { return Ok(()) };
    match nix::unistd::read(&given.go, &mut [0]) {
        Ok(1) => Ok(()),
        Ok(_) => Err("nobody waits for it any more".into()),
        Err(error) => Err(format!("wait for its turn: {error}")),
    }
}

/// Changes the directory as root; `true` when only the process's own user may.
fn chdir(cwd: &Path) -> std::result::Result<bool, String> {
    if cwd.as_os_str().is_empty() {
        return Ok(false);
    }
    match nix::unistd::chdir(cwd) {
        Ok(()) => Ok(false),
        Err(nix::errno::Errno::EACCES | nix::errno::Errno::EPERM) => Ok(true),
        Err(error) => Err(format!(
            "chdir to cwd ({:?}) set in config.json failed: {}",
            cwd.display(),
            error.desc().to_lowercase()
        )),
    }
}

/// SELinux and AppArmor: through the host's procfs, which the container cannot have replaced.
fn labels(plan: &Plan) -> std::result::Result<(), String> {
    let proc = PathBuf::from(format!("/proc/self/fd/{}", plan.proc.as_raw_fd()));
    let write = |name: &str, text: &str| -> std::result::Result<(), String> {
        let fd = nix::fcntl::openat(
            &plan.proc,
            name,
            nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )
        .map_err(|error| format!("{} {name}: {error}", proc.display()))?;
        nix::unistd::write(&fd, text.as_bytes())
            .map(drop)
            .map_err(|error| format!("label {text}: {error}"))
    };
    if let Some(label) = plan.process.selinux_label().as_deref().filter(|l| !l.is_empty())
        && Path::new("/sys/fs/selinux/enforce").exists()
    {
        write("thread-self/attr/exec", label)?;
    }
    if let Some(profile) = plan.process.apparmor_profile().as_deref().filter(|p| !p.is_empty()) {
        let text = format!("exec {profile}");
        write("thread-self/attr/apparmor/exec", &text)
            .or_else(|_| write("thread-self/attr/exec", &text))?;
    }
    Ok(())
}

fn filter(plan: &Plan) -> std::result::Result<(), String> {
    match &plan.seccomp {
        None => Ok(()),
        Some(Profile::Ours(filter)) => filter.load(),
        Some(Profile::Libcontainers(profile)) => libcontainer::seccomp::initialize_seccomp(profile)
            .map(drop)
            .map_err(|error| format!("cannot load the seccomp profile: {error}")),
    }
}

/// Groups, ids and the five capability sets, each of them set, also when the spec leaves it out
/// (CVE-2022-27650).
fn identity(process: &Process) -> std::result::Result<(), String> {
    let user = process.user();
    let syscall = SyscallType::default().create_syscall();
    let groups: Vec<Gid> =
        user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    match nix::unistd::setgroups(&groups) {
        Ok(()) => {}
        // A user namespace without setgroups: fine as long as nothing was asked for.
        Err(nix::errno::Errno::EPERM) if groups.is_empty() => {}
        Err(error) => return Err(format!("setgroups: {error}")),
    }
    // Keeps the permitted set over setuid.
    // SAFETY: plain system call.
    unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) };
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    nix::unistd::setresgid(gid, gid, gid)
        .and_then(|()| nix::unistd::setresuid(uid, uid, uid))
        .map_err(|error| format!("cannot take on user {uid}:{gid}: {error}"))?;
    // SAFETY: plain system call.
    unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) };
    let Some(given) = process.capabilities() else { return Ok(()) };
    libcontainer::capabilities::reset_effective(syscall.as_ref())
        .and_then(|()| {
            libcontainer::capabilities::drop_privileges(&all_five(given), syscall.as_ref())
        })
        .map_err(|error| format!("capabilities: {error}"))
}

fn all_five(given: &LinuxCapabilities) -> LinuxCapabilities {
    let mut all = given.clone();
    let set = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
    all.set_bounding(set(given.bounding()))
        .set_effective(set(given.effective()))
        .set_permitted(set(given.permitted()))
        .set_inheritable(set(given.inheritable()))
        .set_ambient(set(given.ambient()));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 29 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
31 29 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
32 29 0:28 /inner /other rw - cgroup cgroup rw,memory
33 29 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 29 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
";

    #[test]
    fn hierarchies_are_found_by_their_controllers() {
        let at = |controllers| cgroup_mount(MOUNTS, controllers);
        assert_eq!(at("cpu,cpuacct").unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(at("memory").unwrap(), Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(at("").unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(at("name=systemd").unwrap(), Path::new("/sys/fs/cgroup/systemd"));
        assert_eq!(at("hugetlb"), None);
    }

    #[test]
    fn an_absent_capability_set_is_emptied() {
        let given: LinuxCapabilities =
            serde_json::from_str(r#"{"bounding":["CAP_CHOWN"]}"#).unwrap();
        let all = all_five(&given);
        assert_eq!(all.bounding().as_ref().unwrap().len(), 1);
        for set in [all.effective(), all.permitted(), all.inheritable(), all.ambient()] {
            assert!(set.as_ref().unwrap().is_empty());
        }
    }
}
