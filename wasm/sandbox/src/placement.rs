//! Where the process of a container is: its cgroup is made here, while the process that the worker
//! has forked makes the rest by itself.
//!
//! * cgroup v2: the group is made first, and the process is in it from its first moment.
//! * v1: a group is a directory in each of a dozen hierarchies, which takes as long as the mounts.
//!   Both are done at the same time; the process waits for its group, and enters it by itself, before it
//!   touches anything of the image.
//!
//! What was made of a container that cannot be is removed with the container.

use std::io::Write;
use std::os::fd::OwnedFd;

use kuasar_host::cgroup::Layout;
use kuasar_oci::builtin::{self, GO};
use kuasar_oci::processes::{Failure, Place};
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
    /// Who makes the group, and tells the process then; `None` where it is made already.
    maker: Option<JoinHandle<Result<(), String>>>,
}

impl Placement {
    /// Begins with it.
    ///
    /// # Errors
    /// When the group cannot be made, as far as that is known by then.
    pub async fn begin(place: Place, cgroups: &Layout) -> Result<Self, Failure> {
        let group = cgroups.group(&place.cgroup)?;
        let namespaces = place.namespaces.bits();
        let words = |error: builtin::Error| error.to_string();
        if let Layout::V2(root) = cgroups {
            let directory = root.join(group.path());
            let made = move || {
                builtin::make_group(&group, &place.resources).map_err(words)?;
                let opened = std::fs::File::open(&directory);
                opened.map_err(|error| format!("{}: {error}", directory.display()))
            };
            let passed = tokio::task::spawn_blocking(made).await.map_err(|_| LOST)??;
            let entry = Entry { namespaces, grouped: true };
            return Ok(Self { entry, passed: Some(passed.into()), maker: None });
        }
        let (told, mut tell) = std::io::pipe()?;
        let work = move || {
            // Without a word the process sees its pipe end, and ends.
            builtin::make_group(&group, &place.resources).map_err(words)?;
            // There is none, or it has ended and has said why: that is what is told then.
            let _ = tell.write_all(&[GO]);
            Ok(())
        };
        let maker = Some(tokio::task::spawn_blocking(work));
        let entry = Entry { namespaces, grouped: false };
        Ok(Self { entry, passed: Some(told.into()), maker })
    }

    /// Comes back when the group is made, or nothing is made any more.
    pub async fn made(self) -> Result<(), String> {
        match self.maker {
            Some(maker) => maker.await.unwrap_or_else(|_| Err(LOST.into())),
            None => Ok(()),
        }
    }
}
