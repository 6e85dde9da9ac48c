//! Root file systems and volumes, prepared on the host and shown to who makes the containers.
//!
//! A pod has a directory that is a mount of its own with shared propagation: what is attached below
//! it later appears in the mount namespaces of helpers and engines that were made before. Names
//! below it are made through descriptors and never followed: others may write there.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use containerd_task::error::{Error, Result};
use kuasar_host::inside::Want;
use kuasar_host::mount::{Mount, tree};
use kuasar_host::safe_path::Root;
use nix::mount::MsFlags;

/// An error of the host while `what` was done: what is invalid is the request's fault, and what the
/// host cannot do is Unimplemented.
pub fn failed(what: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let what = what.into();
    move |error| match error {
        kuasar_host::Error::Unsupported(text) => Error::Unimplemented(format!("{what}: {text}")),
        other => containerd_task::host::internal(what)(other),
    }
}

/// Makes a directory a mount of its own, with shared propagation.
///
/// # Errors
/// When a mount fails.
pub fn share(path: &Path) -> Result<()> {
    let system = |what: &'static str| move |error: nix::Error| Error::internal(what, error);
    let none = None::<&str>;
    nix::mount::mount(Some(path), path, none, MsFlags::MS_BIND, none)
        .map_err(system("mount the pod's tree"))?;
    // Out of whatever group the host's mount is in, and into one of its own.
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        nix::mount::mount(none, path, none, propagation, none)
            .map_err(system("share the pod's mounts"))?;
    }
    Ok(())
}

/// Shows a container's root file system at `rootfs` below `container`: its snapshotter's mounts,
/// made at `staging` where nobody else sees them, or what is at `ready` when there are none. Mounts
/// that come to it later on the host do not come along.
///
/// # Errors
/// When a mount fails: then something may still be mounted at `staging`.
pub fn show_rootfs(container: &Root, mounts: &[Mount], ready: &Path, staging: &Path) -> Result<()> {
    let from = if mounts.is_empty() {
        ready
    } else {
        kuasar_host::record::private_dir(staging).map_err(failed("make a mount point"))?;
        kuasar_host::mount::mount_all(mounts, staging).map_err(failed("mount the rootfs"))?;
        staging
    };
    let at = place(container, Path::new("rootfs"), Want::Directory)?;
    let flags = tree::Flags { recursive: true, no_devices: true, ..tree::Flags::default() };
    let copy = tree::copy(from, flags).map_err(failed("show the rootfs"))?;
    tree::set_propagation(&copy, libc::MS_PRIVATE).map_err(failed("show the rootfs"))?;
    tree::attach(&copy, at.as_fd()).map_err(failed("show the rootfs"))?;
    if !mounts.is_empty() {
        // The copy is enough.
        kuasar_host::mount::unmount_below(staging)
            .map_err(failed("unmount the rootfs' first place"))?;
    }
    Ok(())
}

/// Makes a mount point and opens it (`O_PATH`).
///
/// # Errors
/// When it cannot be made, or a file is there already.
pub fn place(dir: &Root, name: &Path, want: Want) -> Result<OwnedFd> {
    match want {
        Want::Directory => dir
            .mkdir_all(name, 0o755)
            .and_then(|root| root.resolve(Path::new(".")))
            .map_err(failed("make a mount point")),
        Want::File => {
            dir.create_file(name, 0o600).map_err(failed("make a mount point"))?;
            dir.open_file(name, libc::O_PATH | libc::O_NOFOLLOW)
                .map_err(failed("open a mount point"))
        }
    }
}
