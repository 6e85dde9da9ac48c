//! A process that is the container's from its first moment.
//!
//! A program that runs what its containers are made for (a WebAssembly engine) forks a process for
//! each of them. Where that process can be made in the container's new namespaces, it need not make
//! another one: it reads the spec, joins the namespaces that exist, and becomes the container.
//!
//! What the engine's process does beside it elsewhere is done by who asked for this one: it makes
//! the cgroup, on v2 before the fork (`CLONE_INTO_CGROUP`), on v1 at the same time, and then says
//! [`GO`](crate::place::GO); and it removes what is left when this process says that it has
//! failed, or ends. Nothing is written down of a container that no command will be run in: what starts
//! it, and ends it, knows it otherwise.

use std::io::{PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::CloneFlags;

use super::super::args::{Args, Command};
use super::super::workload::Workload;
use super::super::{Error, Result};
use super::{Traces, group_of, init, join_namespaces, open};

/// How this process was made.
#[derive(Debug)]
pub struct Entered {
    /// Its new namespaces. It is in them, but for the mount namespace.
    pub namespaces: CloneFlags,
    /// What its mount namespace may be made of: an empty one ([`make_room`](super::make_room)). The
    /// one that it is in, otherwise.
    pub room: Option<OwnedFd>,
    /// Gets one byte, the exit status that an engine would have: 0 when `start` is waited for.
    pub answer: PipeWriter,
    /// Says [`GO`](crate::place::GO) when the cgroup is there, which this process then enters; `None` when it
    /// was in it from the start.
    pub go: Option<PipeReader>,
}

/// Becomes the container that `args` says, whose process this one is already. Comes back only with
/// the reason why that cannot be.
pub fn run(
    args: &Args,
    log: Option<std::fs::File>,
    workload: Box<dyn Workload>,
    entered: Entered,
) -> (Option<std::fs::File>, PipeWriter, Error) {
    let Entered { namespaces, room, answer, go } = entered;
    let mut traces = Traces::default();
    let made = prepare(args, (namespaces, room), go, workload, &mut traces);
    match made {
        Ok((plan, prepared)) => {
            // Removed by who removes containers.
            traces.keep();
            init::run(&plan, prepared, init::Answer::Status { pipe: answer, log })
        }
        Err(error) => (log, answer, error),
    }
}

fn prepare(
    args: &Args,
    (namespaces, room): (CloneFlags, Option<OwnedFd>),
    go: Option<PipeReader>,
    workload: Box<dyn Workload>,
    traces: &mut Traces,
) -> Result<(super::Plan, init::Prepared)> {
    let Command::Create(create) = &args.command else {
        return Err(Error::Usage("only containers can be made so".into()));
    };
    let path = create.bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|error| Error::io(path.display(), error))?;
    let mut plan =
        super::plan(create, &text, true).map_err(|reason| super::super::create::not(&reason))?;
    let new = plan.new - CloneFlags::CLONE_NEWCGROUP;
    if new != namespaces || plan.join.iter().any(|(kind, _)| !may_join(*kind)) {
        return Err(Error::Other(format!(
            "this process was made for namespaces {namespaces:?}, and the spec has {new:?}"
        )));
    }
    let pid = own_pid()?;
    let opened = open(args, create, &mut plan, traces, true)?;
    let room = room.filter(|_| plan.is_portable());
    if room.is_none() {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)
            .map_err(|error| Error::io("a mount namespace", error))?;
    }
    if let Some(path) = &create.pid_file {
        std::fs::write(path, pid.to_string()).map_err(|error| Error::io(path.display(), error))?;
    }
    let wanted = plan.mounts.iter().any(|mount| mount.what == super::plan::What::Cgroup);
    let group = if wanted || go.is_some() { Some(group_of(&plan)?) } else { None };
    join_namespaces(&plan)?;
    let turn = go.map_or(init::Turn::Taken, init::Turn::Told);
    let prepared = init::Prepared::new(opened, group, turn, create, Some(workload));
    Ok((plan, init::Prepared { room, ..prepared }))
}

/// A PID namespace is joined by the children of who joins it; a user namespace is none of these
/// ([`super::user`]).
fn may_join(kind: CloneFlags) -> bool {
    !kind.intersects(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUSER)
}

/// The pid of this process as the procfs of its parent counts: in a new PID namespace it is 1 to
/// itself.
pub fn own_pid() -> Result<i32> {
    let link = std::fs::read_link(Path::new("/proc/self"));
    let pid = link.map_err(|error| Error::io("/proc/self", error))?;
    let pid = pid.to_str().and_then(|pid| pid.parse().ok());
    pid.ok_or_else(|| Error::Other("/proc/self is no pid".into()))
}
