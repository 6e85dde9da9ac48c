//! The pod's user namespace, for a process that executes nothing ([`crate::builtin::workload`]).
//!
//! Such a process needs no right over its mounts: it gets none. Everything is made with the rights
//! of the host's root, in a mount namespace that the host's root owns, and the user namespace is
//! entered as the last step, before the process takes on its user. A program could mount in its
//! container then only if its mount namespace were the user namespace's, too: that is libcontainer's
//! and runc's order, to whom such containers are left.
//!
//! Files have their owners by id-mapped mounts, made with the mapping of that very namespace: the
//! root file system comes so, volumes are mapped here. What is new (a tmpfs) is made with the
//! host's numbers.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sched::CloneFlags;

use super::plan::{Mount, Reason, What, leave};
use super::spec;
use crate::mapping::{Mapping, host_id};

/// A user namespace that exists.
#[derive(Debug, PartialEq, Eq)]
pub struct User {
    /// Where it is.
    pub path: PathBuf,
    uids: Vec<Mapping>,
    gids: Vec<Mapping>,
}

impl User {
    /// Takes it, and what it maps, out of the spec.
    ///
    /// # Errors
    /// When there are mappings and no namespace that exists.
    pub fn of(
        join: &mut Vec<(CloneFlags, PathBuf)>,
        linux: &mut spec::Linux,
    ) -> Result<Option<Self>, Reason> {
        let uids = linux.uid_mappings.take().unwrap_or_default();
        let gids = linux.gid_mappings.take().unwrap_or_default();
        let at = join.iter().position(|(kind, _)| *kind == CloneFlags::CLONE_NEWUSER);
        let Some(at) = at else {
            if uids.is_empty() && gids.is_empty() {
                return Ok(None);
            }
            return leave("id mappings");
        };
        if uids.is_empty() || gids.is_empty() {
            return leave("a user namespace without its mappings");
        }
        let (_, path) = join.remove(at);
        Ok(Some(Self { path, uids, gids }))
    }

    /// The host's number of a user.
    pub fn uid(&self, uid: u32) -> Option<u32> {
        host_id(&self.uids, uid)
    }

    /// The host's number of a group.
    pub fn gid(&self, gid: u32) -> Option<u32> {
        host_id(&self.gids, gid)
    }

    /// Opens it.
    ///
    /// # Errors
    /// When there is none at the path.
    pub fn open(&self) -> kuasar_host::Result<OwnedFd> {
        kuasar_host::namespace::open_kind(&self.path, CloneFlags::CLONE_NEWUSER)
    }
}

/// Says whose the files of a mount are, by what the spec has of it.
///
/// # Errors
/// What cannot be done here.
pub fn map(user: Option<&User>, mount: &mut Mount, given: &spec::Mount) -> Result<(), Reason> {
    let uids = given.uid_mappings.as_deref().unwrap_or_default();
    let gids = given.gid_mappings.as_deref().unwrap_or_default();
    // The runtime specification: mappings alone are `idmap`.
    if mount.mapped.is_none() && !(uids.is_empty() && gids.is_empty()) {
        mount.mapped = Some(false);
    }
    let at = mount.at.display();
    let Some(user) = user else {
        return match mount.mapped {
            Some(_) => leave(format!("an id-mapped mount at {at} without a user namespace")),
            None => Ok(()),
        };
    };
    let pods = |given: &[Mapping], own: &[Mapping]| given.is_empty() || given == own;
    if !pods(uids, &user.uids) || !pods(gids, &user.gids) {
        return leave(format!("id mappings of the mount at {at} that are not the pod's"));
    }
    match &mut mount.what {
        What::New(_) | What::Cgroup if mount.mapped.is_some() => {
            leave(format!("an id-mapped mount at {at} of a new file system"))
        }
        What::New(parameters) if matches!(&*mount.kind, "tmpfs" | "devpts") => {
            own(user, parameters, mount.kind == "tmpfs").or_else(|id| {
                leave(format!("the owner {id} of the mount at {at}, who is not mapped"))
            })
        }
        _ => Ok(()),
    }
}

/// Puts the host's numbers in the place of the container's; the root of a tmpfs is the container's
/// root's where nobody is named.
fn own(
    user: &User,
    parameters: &mut Vec<(String, Option<String>)>,
    complete: bool,
) -> Result<(), String> {
    for (name, is_user) in [("uid", true), ("gid", false)] {
        let host = |id: u32| if is_user { user.uid(id) } else { user.gid(id) };
        let mut found = false;
        for (_, value) in parameters.iter_mut().filter(|(key, _)| key == name) {
            found = true;
            let text = value.clone().unwrap_or_default();
            let id = text.parse().ok().and_then(host).ok_or(text)?;
            *value = Some(id.to_string());
        }
        if !found && complete {
            let id = host(0).ok_or("0")?;
            parameters.push((name.to_owned(), Some(id.to_string())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Plan;
    use super::*;

    fn spec() -> Value {
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        json!({
            "process": {"args": ["x"], "cwd": "/"},
            "root": {"path": "/rootfs"},
            "mounts": [
                {"destination": "/data", "type": "bind", "source": "/s", "options": ["rbind"],
                 "uidMappings": ids, "gidMappings": ids},
                {"destination": "/own", "type": "tmpfs", "options": ["mode=1777", "gid=5"]},
                {"destination": "/plain", "type": "bind", "source": "/p", "options": ["rbind"]},
                {"destination": "/deep", "type": "bind", "source": "/p", "options": ["rbind", "ridmap"]},
            ],
            "linux": {
                "cgroupsPath": "/c", "uidMappings": ids, "gidMappings": ids,
                "namespaces": [{"type": "mount"}, {"type": "user", "path": "/proc/self/fd/5"}],
            }
        })
    }

    fn plan(spec: &Value) -> Result<Plan, Reason> {
        Plan::of(&serde_json::to_vec(spec).unwrap())
    }

    #[test]
    fn volumes_are_mapped_and_new_file_systems_belong_to_the_pods_users() {
        let plan = plan(&spec()).unwrap();
        let user = plan.user.unwrap();
        assert_eq!(user.path, std::path::Path::new("/proc/self/fd/5"));
        assert!(plan.join.is_empty());
        assert_eq!((user.uid(1000), user.gid(0)), (Some(101_000), Some(100_000)));
        assert_eq!((user.uid(65536), user.uid(u32::MAX)), (None, None));
        let mapped: Vec<_> = plan.mounts.iter().map(|mount| mount.mapped).collect();
        assert_eq!(mapped, [Some(false), None, None, Some(true)]);
        let pair = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
        let parameters = vec![pair("mode", "1777"), pair("gid", "100005"), pair("uid", "100000")];
        assert_eq!(plan.mounts[1].what, What::New(parameters));
    }

    #[test]
    fn another_mapping_than_the_pods_is_left_alone() {
        let other = json!([{"containerID": 0, "hostID": 7, "size": 1}]);
        for (pointer, value) in [
            ("/mounts/0/uidMappings", other.clone()),
            ("/mounts/0/gidMappings", other),
            ("/mounts/1/options", json!(["uid=70000"])),
            ("/mounts/1/options", json!(["idmap"])),
            ("/linux/uidMappings", Value::Null),
            ("/linux/namespaces", json!([{"type": "mount"}])),
            ("/linux/namespaces", json!([{"type": "mount"}, {"type": "user"}])),
        ] {
            let mut changed = spec();
            *changed.pointer_mut(pointer).unwrap() = value.clone();
            assert!(plan(&changed).is_err(), "{pointer} {value}");
        }
    }
}
