//! User, groups, capabilities, limits and labels of a process.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use super::plan::Plan;
use super::sys;

/// Writes a file below the host's procfs.
pub fn write_proc(proc: &OwnedFd, name: &str, text: &str) -> Result<(), String> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    nix::fcntl::openat(proc, name, flags, Mode::empty())
        .and_then(|fd| nix::unistd::write(&fd, text.as_bytes()))
        .map(drop)
        .map_err(|error| error.desc().to_lowercase())
}

/// `oomScoreAdj`.
pub fn oom_score(plan: &Plan, proc: &OwnedFd) -> Result<(), String> {
    match plan.spec.process.oom_score_adj {
        Some(score) => write_proc(proc, "self/oom_score_adj", &score.to_string())
            .map_err(|error| format!("oom_score_adj {score}: {error}")),
        None => Ok(()),
    }
}

/// `rlimits`.
pub fn limits(plan: &Plan) -> Result<(), String> {
    for (resource, limit) in &plan.rlimits {
        // SAFETY: a known resource and a valid structure.
        if unsafe { libc::setrlimit(*resource, limit) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(format!("rlimit {resource}: {error}"));
        }
    }
    Ok(())
}

/// What the coming execve runs under: the host's procfs is asked, which the container cannot have
/// replaced (CVE-2019-16884).
pub fn labels(plan: &Plan, proc: &OwnedFd, selinux: bool) -> Result<(), String> {
    let process = &plan.spec.process;
    let given = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
    if let Some(label) = given(&process.selinux_label).filter(|_| selinux) {
        write_proc(proc, "thread-self/attr/exec", &label)
            .map_err(|error| format!("SELinux label {label}: {error}"))?;
    }
    if let Some(profile) = given(&process.apparmor_profile) {
        let text = format!("exec {profile}");
        write_proc(proc, "thread-self/attr/apparmor/exec", &text)
            .or_else(|_| write_proc(proc, "thread-self/attr/exec", &text))
            .map_err(|error| format!("AppArmor profile {profile}: {error}"))?;
    }
    Ok(())
}

/// Takes on user and groups, and exactly the capabilities given: all five sets, whatever we had
/// (CVE-2022-27650).
pub fn identity(plan: &Plan) -> Result<(), String> {
    let user = &plan.spec.process.user;
    let sets = &plan.capabilities;
    kuasar_host::capability::bound(sets.bounding)
        .map_err(|(_, errno)| format!("bounding capabilities: {}", std::io::Error::from(errno)))?;
    let groups: Vec<Gid> =
        user.additional_gids.iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    match nix::unistd::setgroups(&groups) {
        Ok(()) => {}
        // A user namespace without setgroups: fine as long as nothing was asked for.
        Err(Errno::EPERM) if groups.is_empty() => {}
        Err(error) => return Err(format!("setgroups: {error}")),
    }
    let wrap = |error: std::io::Error| format!("capabilities: {error}");
    // Keeps the permitted set over setuid.
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).map_err(wrap)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    nix::unistd::setresgid(gid, gid, gid)
        .and_then(|()| nix::unistd::setresuid(uid, uid, uid))
        .map_err(|error| format!("cannot take on user {uid}:{gid}: {error}"))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).map_err(wrap)?;
    sys::set_capabilities(sets).map_err(wrap)?;
    let option = libc::PR_CAP_AMBIENT;
    sys::prctl(option, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0).map_err(wrap)?;
    for number in (0..64).filter(|number| sets.ambient & 1 << number != 0) {
        sys::prctl(option, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, number)
            .map_err(|error| format!("ambient capability {number}: {error}"))?;
    }
    Ok(())
}
