//! For tests of this and of other crates: work that mounts, apart from the host.
#![allow(clippy::unwrap_used)] // only tests call it, whose failure a panic is

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread with a mount namespace of its own, out of which nothing spreads, and with
/// an empty directory; what is mounted below it goes with it. Without root it says so and does not.
pub fn apart(test: impl FnOnce(&Path) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
        crate::mount::unmount_below(dir.path()).unwrap();
    });
    thread.join().unwrap();
}
