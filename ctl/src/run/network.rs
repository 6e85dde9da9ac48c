//! A pod's network namespace: new, with its loopback up, kept by a mount in the run's directory.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, Result};

/// Name of the mount point.
pub const FILE: &str = "netns";

/// A network namespace; its mount goes with this.
#[derive(Debug)]
pub struct Netns(PathBuf);

impl Netns {
    /// Makes it, mounted in `dir`.
    ///
    /// # Errors
    /// When this process may not.
    pub fn new(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        std::fs::write(&path, "").map_err(Error::at("make", &path))?;
        let at = path.clone();
        // On a thread of its own: nothing else of this program is to be in that namespace.
        let work = move || -> Result<()> {
            let failed = |what: &str| {
                let what = format!("{what} (are you root?)");
                move |e: nix::Error| Error::Io { what, source: e.into() }
            };
            unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make a network namespace"))?;
            kuasar_host::netlink::Netlink::open()?.set_lo_up()?;
            let (none, from) = (None::<&str>, "/proc/thread-self/ns/net");
            mount(Some(from), &at, none, MsFlags::MS_BIND, none)
                .map_err(failed("mount a network namespace"))
        };
        let made = Self(path);
        match std::thread::spawn(work).join() {
            Ok(done) => done.map(|()| made),
            Err(_) => Err(Error::Failed("making a network namespace panicked".into())),
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// Takes the mount away, if there is one.
pub fn detach(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
}
