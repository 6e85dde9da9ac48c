//! `vmm-task pod-init`: process 1 of a pod's shared PID namespace. It reaps, and nothing else.
//!
//! It keeps its capabilities: whoever has fewer may not look into it through `/proc/1`. What
//! could be seen there all the same is an empty directory.

use std::process::ExitCode;

/// The empty directory that it has as its root; made at Setup.
pub const ROOT: &str = "/run/kuasar/empty";

/// Runs until it is killed, which only a parent namespace can do.
pub fn main() -> ExitCode {
    if let Err(error) = prepare() {
        eprintln!("vmm-task pod-init: {error}");
        return ExitCode::FAILURE;
    }
    let mut children = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: out pointers of the right type; the set is initialised before it is used.
    unsafe {
        libc::sigemptyset(children.as_mut_ptr());
        libc::sigaddset(children.as_mut_ptr(), libc::SIGCHLD);
        // Blocked, so that it stays pending until it is waited for.
        libc::sigprocmask(libc::SIG_BLOCK, children.as_ptr(), std::ptr::null_mut());
    }
    loop {
        // SAFETY: a null status is allowed.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
        let mut signal = 0;
        // SAFETY: the set is initialised, the out pointer valid.
        unsafe { libc::sigwait(children.as_ptr(), &mut signal) };
    }
}

fn prepare() -> nix::Result<()> {
    nix::unistd::chroot(ROOT)?;
    nix::unistd::chdir("/")?;
    nix::sys::prctl::set_dumpable(false)?;
    nix::sys::prctl::set_name(c"pod-init")
}
