//! What a container needs of the host before its guest hears of it: root file system, volumes,
//! disks, a spec in the guest's terms, and a record of all that.
//!
//! `<sandbox>/containers/<id>/meta.json` has what later calls need; whatever else there is can be
//! found by path.

use std::path::{Path, PathBuf};

use containerd_task::error::{Error, Result};
use containerd_task::host::remove_dir;
use containerd_task::runtime::CreateContainer;
use kuasar_host::mount::{Mount, tree};
use kuasar_host::record;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm_common::{ROOTS_PATH, SHARE_PATH};

use crate::block::{self, Disks, StorageConfig};
use crate::config::Sharing;
use crate::copy::{Copied, Wanted};
use crate::growth::Limits;
use crate::share::ShareTree;
use crate::spec::{self, Needs};

/// What a container's later calls need.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Meta {
    /// Pid of its first process in the guest.
    pub pid: u32,
    /// Disks of the machine that it has.
    pub disks: Vec<block::Used>,
    /// Volumes that were copied into the guest.
    pub copies: Vec<Copied>,
    /// For the size of the machine.
    pub limits: Limits,
}

/// What was prepared for a container.
pub(crate) struct Prepared {
    /// For the guest.
    pub spec: Vec<u8>,
    /// Where the guest sees the root file system, unless it is a disk.
    pub root: String,
    pub needs: Needs,
    /// Not plugged in yet.
    pub disks: block::Opened,
    /// What is recorded.
    pub meta: Meta,
}

/// The host's side of a pod's containers.
#[derive(Debug)]
pub(crate) struct Host {
    pod_dir: PathBuf,
    pid: u32,
    storage: StorageConfig,
    sharing: Sharing,
    pub share: ShareTree,
    pub disks: Disks,
}

fn host(what: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let what = what.into();
    move |error| match error {
        kuasar_host::Error::Invalid(text) => Error::InvalidArgument(format!("{what}: {text}")),
        other => Error::internal(what, other),
    }
}

impl Host {
    /// Of the pod whose private directory is `dir` and whose pid Start has answered.
    pub fn new(
        dir: &Path,
        pid: u32,
        disks: Disks,
        storage: StorageConfig,
        sharing: Sharing,
    ) -> Self {
        Self { pod_dir: dir.to_owned(), pid, storage, sharing, share: ShareTree::new(dir), disks }
    }

    /// A container's private directory.
    pub fn dir(&self, id: &str) -> PathBuf {
        self.pod_dir.join("containers").join(id)
    }

    /// A container's record.
    ///
    /// # Errors
    /// [`Error::NotFound`] without one.
    pub fn meta(&self, id: &str) -> Result<Meta> {
        let path = self.dir(id).join("meta.json");
        let text = std::fs::read(&path)
            .map_err(|_| Error::NotFound(format!("container {id} does not exist")))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::internal(format!("read {}", path.display()), error))
    }

    /// Writes a container's record.
    ///
    /// # Errors
    /// Of the host.
    pub fn save(&self, id: &str, meta: &Meta) -> Result<()> {
        let text =
            serde_json::to_vec(meta).map_err(|error| Error::internal("write meta.json", error))?;
        record::write_file(&self.dir(id).join("meta.json"), &text, 0o600)
            .map_err(host("write meta.json"))
    }

    /// Removes what is left of a container whose disks are out of the machine. Idempotent.
    ///
    /// # Errors
    /// When something stays mounted.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.share.remove_container(id)?;
        remove_dir(&self.dir(id))
    }

    /// The image of a root file system that goes to the guest as a disk.
    fn image(&self, mounts: &[Mount]) -> Result<Option<block::Image>> {
        let Some(image) = block::Image::of(mounts)? else { return Ok(None) };
        let known = self.storage.filesystems.contains(&image.fstype);
        let disk = self.disks.pluggable() && known && self.storage.block_rootfs;
        if !disk && !image.file && self.sharing.copying.is_none() {
            // The host mounts it, and shares the files.
            return Ok(None);
        }
        let what = format!("rootfs image {}", image.source.display());
        if !self.disks.pluggable() {
            return Err(self.disks.cannot(&format!(
                "{what} has to be a disk (or use a snapshotter of directories, as overlayfs)"
            )));
        }
        if !known {
            return Err(Error::Unimplemented(format!(
                "{what} is {:.40}, which guests here do not mount: use a guest kernel that has it, \
                 and name it in storage.filesystems",
                image.fstype
            )));
        }
        Ok(Some(image))
    }

    /// Prepares root file system, volumes and spec; synchronous work in one go.
    ///
    /// # Errors
    /// Of what the container asks for, and of the host: then [`Host::remove`] undoes it.
    pub fn prepare(&self, request: &CreateContainer, terminal: bool) -> Result<Prepared> {
        let id = &request.id;
        let dir = self.dir(id);
        record::private_dir(&dir).map_err(host("make the container's directory"))?;
        self.save(id, &Meta::default())?;
        let source = request.bundle.join("config.json");
        let mut loaded = kuasar_host::spec::Spec::load(&source).map_err(host("read the bundle"))?;
        loaded.set_terminal(terminal);
        let mut value = std::mem::take(loaded.value_mut());
        let (place, root) = self.place_of_root(id)?;
        let needs = spec::edit(&mut value, (id, &root), self.pid, self.sharing.copying.as_ref())?;
        if let (Some(first), false) = (needs.blocks.first(), self.disks.pluggable()) {
            return Err(self.disks.cannot(&format!("block volume {:.200}", first.path)));
        }
        let image = self.image(&request.rootfs)?;
        if image.is_none() && self.sharing.copying.is_some() {
            return Err(Error::FailedPrecondition(
                "the container's root file system is a directory of the host, and this pod's machine \
                 has no share: give this runtime a block snapshotter (snapshotter = \"blockfile\"), or \
                 use a VMM with shares and share = \"virtiofs\""
                    .into(),
            ));
        }
        if image.is_none() {
            self.share.add_rootfs((id, &place), &request.rootfs, &request.bundle)?;
        }
        let disks = block::Opened::open(id, image, needs.blocks.clone())?;
        for (number, volume) in needs.volumes.iter().enumerate() {
            let flags = tree::Flags {
                recursive: volume.recursive,
                read_only: volume.read_only,
                no_devices: true,
            };
            let how = (volume.kind, volume.follows);
            self.share.add_volume(id, number, &volume.source, how, flags)?;
        }
        // Before the machine has them: whoever comes after a crash knows what to take out.
        let copied = |(volume, one): (u32, &Wanted)| Copied {
            volume,
            path: one.path.clone(),
            rule: one.rule,
        };
        let copies = (0..).zip(&needs.copies).map(copied).collect();
        let resources = value.get("linux").and_then(|linux| linux.get("resources"));
        let resources = resources.and_then(Value::as_object);
        let limits = resources.map(|all| Limits::default().or(all)).unwrap_or_default();
        let meta = Meta { disks: disks.used(), copies, limits, ..Meta::default() };
        self.save(id, &meta)?;
        let spec =
            serde_json::to_vec(&value).map_err(|error| Error::internal("write the spec", error))?;
        Ok(Prepared { spec, root, needs, disks, meta })
    }

    /// Name of the directory in the pod's tree that gets a container's root file system, and where the
    /// guest sees it. In a share that is cached for good a name is never used again: the guest may
    /// know it still.
    fn place_of_root(&self, id: &str) -> Result<(String, String)> {
        if !self.sharing.roots {
            return Ok((id.to_owned(), spec::rootfs(SHARE_PATH, id)));
        }
        let unique = crate::guest::random_hex(8);
        let unique = unique.map_err(|error| Error::internal("name the rootfs", error))?;
        let place = ShareTree::unique(id, &unique);
        let root = spec::rootfs(ROOTS_PATH, &place);
        Ok((place, root))
    }

    /// Ids of the containers that have a private directory.
    pub fn containers(&self) -> impl Iterator<Item = String> + use<> {
        let entries = std::fs::read_dir(self.pod_dir.join("containers")).into_iter().flatten();
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok())
    }

    /// Records of the containers other than `id`.
    fn others(&self, id: &str) -> impl Iterator<Item = Meta> {
        self.containers().filter(move |name| name != id).filter_map(|name| self.meta(&name).ok())
    }

    /// Disks that containers other than `id` have.
    pub fn disks_of_others(&self, id: &str) -> Vec<block::Used> {
        self.others(id).flat_map(|meta| meta.disks).collect()
    }

    /// Limits of the containers other than `id`.
    pub fn limits_of_others(&self, id: &str) -> impl Iterator<Item = Limits> {
        self.others(id).map(|meta| meta.limits)
    }
}
