//! Where the process of a container is: its cgroup is made here, while the process that the worker
//! has forked makes the rest by itself.
//!
//! * cgroup v2: the group is made first, and the process is in it from its first moment.
//! * v1: a group is a directory in each of a dozen hierarchies, which takes as long as the mounts.
//!   Both are done at the same time; the process waits for its group before it touches anything of
//!   the image.
//!
//! What was made of a container that cannot be is removed with the container.

use std::io::Write;
use std::os::fd::OwnedFd;

use kuasar_host::cgroup::{Cgroup, Layout};
use kuasar_host::process;
use kuasar_oci::builtin::{self, GO};
use kuasar_oci::processes::{Failure, Place};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use wasm_common::wire::Entry;

/// What is said when a thread has ended in another way than by coming back.
const LOST: &str = "make the container's cgroup: the thread has ended";

/// A place that is being made.
pub struct Placement {
    /// What the worker is told.
    pub entry: Entry,
    /// What goes to the worker with that.
    pub passed: Option<OwnedFd>,
    /// Moves the process that it is told of there; `None` where the process is there already.
    mover: Option<Mover>,
}

/// Who is told which process it is, and the thread that waits for that.
type Mover = (oneshot::Sender<u32>, JoinHandle<Result<(), String>>);

impl Placement {
    /// Begins with it.
    ///
    /// # Errors
    /// When the group cannot be made, as far as that is known by then.
    pub async fn begin(place: Place, cgroups: &Layout) -> Result<Self, Failure> {
        let group = cgroups.group(&place.cgroup)?;
        let namespaces = place.namespaces.bits();
        if let Layout::V2(root) = cgroups {
            let directory = root.join(group.path());
            let made = move || {
                builtin::make_group(&group, &place.resources).map_err(|error| error.to_string())?;
                let opened = std::fs::File::open(&directory);
                opened.map_err(|error| format!("{}: {error}", directory.display()))
            };
            let passed = tokio::task::spawn_blocking(made).await.map_err(|_| LOST)??;
            let entry = Entry { namespaces, grouped: true };
            return Ok(Self { entry, passed: Some(passed.into()), mover: None });
        }
        let (told, tell) = std::io::pipe()?;
        let (sender, pid) = oneshot::channel();
        let work = move || move_there(&group, &place, pid, tell);
        let thread = tokio::task::spawn_blocking(work);
        let entry = Entry { namespaces, grouped: false };
        Ok(Self { entry, passed: Some(told.into()), mover: Some((sender, thread)) })
    }

    /// There is no process; comes back when nothing is made any more.
    pub async fn give_up(self) {
        if let Some((sender, thread)) = self.mover {
            drop(sender);
            // What was made is removed with the container, whatever came of it.
            let _ = thread.await;
        }
    }

    /// The process is there; comes back when it is in its group. When it cannot be, it is told by the
    /// end of its pipe, and ends.
    pub fn go_on(self, pid: u32) -> impl Future<Output = Result<(), String>> {
        // It has ended when nobody listens, and says why.
        let thread = self.mover.map(|(sender, thread)| {
            let _ = sender.send(pid);
            thread
        });
        async move {
            match thread {
                Some(thread) => thread.await.unwrap_or_else(|_| Err(LOST.into())),
                None => Ok(()),
            }
        }
    }
}

fn move_there(
    group: &Cgroup,
    place: &Place,
    pid: oneshot::Receiver<u32>,
    mut tell: std::io::PipeWriter,
) -> Result<(), String> {
    let words = |error: builtin::Error| error.to_string();
    builtin::make_group(group, &place.resources).map_err(words)?;
    // There is none when the worker could not make it: that is what is told then.
    let Ok(pid) = pid.blocking_recv() else { return Ok(()) };
    let number = i32::try_from(pid).map_err(|error| error.to_string())?;
    match builtin::join(group, number) {
        Ok(()) => {}
        // It has ended, and has said why.
        Err(_) if process::pidfd_open(pid).is_err() => return Ok(()),
        Err(error) => return Err(error.to_string()),
    }
    // The same when it does not listen.
    let _ = tell.write_all(&[GO]);
    Ok(())
}
