//! Where the first process of a container has to be, for who makes that process itself in place of a
//! program that does; and its cgroup, which is made here as soon as the place is known.
//!
//! * cgroup v2: the process is made in its group, which has to be there by then.
//! * v1: a group is a directory in each of a dozen hierarchies, which takes as long as the mounts.
//!   The process waits for its group, and enters it by itself, before it touches anything of the
//!   image.
//!
//! What was made of a container that cannot be is removed with the container, so not before
//! [`Place::made`] has come back.

use std::fs::File;
use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;

use kuasar_host::cgroup::{Cgroup, Layout};
use nix::sched::CloneFlags;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::processes::{Failure, new_cookie};

/// What is said to a container's process when its group is there, and it may enter it.
pub const GO: u8 = b'G';

/// What is said when a thread has ended in another way than by coming back.
const LOST: &str = "make the container's cgroup: the thread has ended";

/// A place, whose cgroup is being made.
#[derive(Debug)]
pub struct Place {
    /// Namespaces that are made for the process.
    pub namespaces: CloneFlags,
    /// Under which cookie its exit is kept by who makes it: as by
    /// [`Processes::watch`](crate::processes::Processes::watch), and before the command counts as ended.
    /// Who cannot do that says so in [`Spawned::watched`](crate::processes::Spawned::watched).
    pub cookie: u64,
    /// Where the process is told that it may enter its group.
    told: Option<PipeReader>,
    maker: Option<JoinHandle<Result<Option<File>, String>>>,
}

/// How a process comes into its group.
#[derive(Debug)]
pub enum Way {
    /// It is made in it (`CLONE_INTO_CGROUP`): the group's directory.
    Into(OwnedFd),
    /// It enters it when [`GO`] comes out of this pipe; a pipe that ends says that there is no group.
    Told(OwnedFd),
}

impl Place {
    /// Begins with the place of a spec; `None` when one process cannot get there by itself: the PID
    /// namespace of others is only entered by a fork, and a new user namespace has to be there before
    /// others. In the context of a tokio runtime.
    ///
    /// # Errors
    /// When the path of the group is none.
    pub fn begin(spec: &Value, cgroups: &Layout) -> Result<Option<Self>, Failure> {
        let Some(namespaces) = namespaces(spec) else { return Ok(None) };
        let linux = spec.get("linux");
        let path = linux.and_then(|linux| linux.get("cgroupsPath")).and_then(Value::as_str);
        let group = cgroups.group(path.unwrap_or_default())?;
        let resources = linux.and_then(|linux| linux.get("resources")).cloned();
        let (told, mut tell) = match cgroups {
            Layout::V2(_) => (None, None),
            Layout::V1(_) => {
                let (told, tell) = std::io::pipe()?;
                (Some(told), Some(tell))
            }
        };
        let work = move || {
            // Without a word the process sees its pipe end, and goes no further.
            make(&group, &resources.unwrap_or_default())?;
            if let Some(tell) = &mut tell {
                // The process may have ended; it has said why.
                let _ = tell.write_all(&[GO]);
            }
            let Layout::V2(root) = group.layout() else { return Ok(None) };
            let directory = root.join(group.path());
            let opened = File::open(&directory);
            opened.map(Some).map_err(|error| format!("{}: {error}", directory.display()))
        };
        let maker = Some(tokio::task::spawn_blocking(work));
        Ok(Some(Self { namespaces, cookie: new_cookie(), told, maker }))
    }

    /// How the process comes into its group; on v2 that has been made then. To be asked once.
    ///
    /// # Errors
    /// When it cannot be made, as far as that is known by then.
    pub async fn way(&mut self) -> Result<Way, Failure> {
        if let Some(told) = self.told.take() {
            return Ok(Way::Told(told.into()));
        }
        let maker = self.maker.take().ok_or(LOST)?;
        let directory = maker.await.map_err(|_| LOST)??;
        Ok(Way::Into(directory.ok_or(LOST)?.into()))
    }

    /// Comes back when the group is made, or nothing is made any more.
    ///
    /// # Errors
    /// Why it could not be made.
    pub async fn made(self) -> Result<(), String> {
        match self.maker {
            Some(maker) => maker.await.map_err(|_| LOST.to_owned())?.map(drop),
            None => Ok(()),
        }
    }
}

/// The same for one that may not be there.
///
/// # Errors
/// As [`Place::made`].
pub async fn made(place: Option<Place>) -> Result<(), String> {
    match place {
        Some(place) => place.made().await,
        None => Ok(()),
    }
}

/// Makes a group as the built-in engine does.
#[cfg(feature = "builtin")]
fn make(group: &Cgroup, resources: &Value) -> Result<(), String> {
    crate::builtin::make_group(group, resources).map_err(|error| error.to_string())
}

#[cfg(not(feature = "builtin"))]
fn make(_: &Cgroup, _: &Value) -> Result<(), String> {
    Err("this program is built without the built-in engine".into())
}

/// The new namespaces that a spec wants for a process which gets everywhere by itself.
fn namespaces(spec: &Value) -> Option<CloneFlags> {
    let mut new = CloneFlags::empty();
    let list = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    for namespace in list.into_iter().flatten() {
        let path = namespace.get("path").and_then(Value::as_str).unwrap_or_default();
        let kind = match namespace.get("type").and_then(Value::as_str)? {
            "mount" => CloneFlags::CLONE_NEWNS,
            "network" => CloneFlags::CLONE_NEWNET,
            "ipc" => CloneFlags::CLONE_NEWIPC,
            "uts" => CloneFlags::CLONE_NEWUTS,
            "pid" if path.is_empty() => CloneFlags::CLONE_NEWPID,
            // It comes after the cgroup.
            "cgroup" => continue,
            // It comes last: it is entered by a process that needs no right over the others.
            "user" if !path.is_empty() => continue,
            _ => return None,
        };
        if path.is_empty() {
            new |= kind;
        }
    }
    Some(new)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_process_gets_everywhere_but_into_anothers_pid_or_a_new_user_namespace() {
        let spec = |more: Value| {
            let mut list = vec![
                json!({ "type": "mount" }),
                json!({ "type": "cgroup" }),
                json!({ "type": "network", "path": "/n" }),
            ];
            list.push(more);
            json!({ "linux": { "namespaces": list } })
        };
        let new = namespaces(&spec(json!({ "type": "pid" }))).unwrap();
        assert_eq!(new, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID);
        let new = namespaces(&spec(json!({ "type": "user", "path": "/u" }))).unwrap();
        assert_eq!(new, CloneFlags::CLONE_NEWNS);
        for other in [json!({ "type": "pid", "path": "/p" }), json!({ "type": "user" })] {
            assert!(namespaces(&spec(other)).is_none());
        }
    }

    #[tokio::test]
    async fn a_group_that_cannot_be_made_is_told_to_both_sides() {
        let dir = tempfile::tempdir().unwrap();
        // No hierarchy: a file is where its root would be.
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let spec = json!({ "linux": { "cgroupsPath": "/a/b" } });
        let v1 = Layout::V1([("pids".to_owned(), file.clone())].into());
        let mut place = Place::begin(&spec, &v1).unwrap().unwrap();
        let Way::Told(told) = place.way().await.unwrap() else { panic!("not v1") };
        let mut word = Vec::new();
        std::io::Read::read_to_end(&mut File::from(told), &mut word).unwrap();
        assert!(word.is_empty());
        assert!(place.made().await.unwrap_err().contains("cgroup"));
        let mut place = Place::begin(&spec, &Layout::V2(file)).unwrap().unwrap();
        assert!(place.way().await.unwrap_err().to_string().contains("cgroup"));
    }
}
