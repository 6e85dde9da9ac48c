//! Runs a program in a mount namespace of its own in which `/proc/sys/net` is empty.
//!
//! gVisor refuses to take a network over from the host's own namespace, and until August 2024 it
//! knew that one by the sysctl `net.core.rmem_default`. Since Linux 6.9 every network namespace
//! shows it, and these releases start no sandbox with a network. Nothing else below
//! `/proc/sys/net` matters to them: without the sysctl they do what they are asked.

use std::convert::Infallible;
use std::ffi::CString;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Does so with `words`, program first.
///
/// # Errors
/// Returns only if it cannot be done.
pub fn exec(words: &[String]) -> Result<Infallible, String> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("make a mount namespace: {error}"))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|error| format!("keep mounts to it: {error}"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), "/proc/sys/net", Some("tmpfs"), flags, none)
        .map_err(|error| format!("cover /proc/sys/net: {error}"))?;
    let words: Vec<CString> = words
        .iter()
        .map(|word| CString::new(word.as_str()))
        .collect::<Result<_, _>>()
        .map_err(|_| "an argument has a NUL in it".to_owned())?;
    let program = words.first().ok_or("no program")?;
    nix::unistd::execv(program, &words).map_err(|error| format!("run {program:?}: {error}"))
}
