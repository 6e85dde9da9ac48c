//! User, groups and the five capability sets.

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::run::{Failed, Step};
use super::{Plan, Role};

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const VERSION: u32 = 0x2008_0522;
/// Numbers from linux/capability.h.
mod cap {
    pub const CHOWN: u32 = 0;
    pub const DAC_OVERRIDE: u32 = 1;
    pub const FOWNER: u32 = 3;
    pub const FSETID: u32 = 4;
    pub const SETGID: u32 = 6;
    pub const SETUID: u32 = 7;
    pub const SETPCAP: u32 = 8;
    pub const SYS_CHROOT: u32 = 18;
    pub const MKNOD: u32 = 27;
    pub const SETFCAP: u32 = 31;
    /// Capability numbers are below this in any kernel: two words of 32 bits.
    pub const END: u32 = 64;
}

/// What virtiofsd serves files with; the last two are for its own sandbox: it changes its root,
/// and empties its bounding set.
const FILE_SERVER: [u32; 10] = [
    cap::CHOWN,
    cap::DAC_OVERRIDE,
    cap::FOWNER,
    cap::FSETID,
    cap::SETGID,
    cap::SETUID,
    cap::MKNOD,
    cap::SETFCAP,
    cap::SYS_CHROOT,
    cap::SETPCAP,
];

/// What a VMM serves 9p with: files of every owner, in a root that has no others than the share's.
const SERVING_VMM: [u32; 4] = [cap::CHOWN, cap::DAC_OVERRIDE, cap::FOWNER, cap::FSETID];

/// User and group of the program.
pub(super) fn user(plan: &Plan) -> (u32, u32) {
    match plan.view.role {
        Role::FileServer => (0, 0),
        Role::Vmm | Role::ServingVmm | Role::VsockDevice => (plan.config.uid, plan.config.gid),
    }
}

/// The capabilities of a role, as a bit set.
fn kept(role: Role) -> u64 {
    let set = |all: &[u32]| all.iter().fold(0, |set, one| set | 1 << one);
    match role {
        Role::FileServer => set(&FILE_SERVER),
        Role::ServingVmm => set(&SERVING_VMM),
        Role::Vmm | Role::VsockDevice => 0,
    }
}

/// Takes the program's user and gives up all else, for good.
pub(super) fn give_up(plan: &Plan) -> Result<(), Failed> {
    let keep = kept(plan.view.role);
    let (uid, gid) = user(plan);
    if let Err((number, errno)) = kuasar_host::capability::bound(keep) {
        return Err(errno).step(|| format!("give up capability {number} for good"));
    }
    // SAFETY: integer arguments.
    let r = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    Errno::result(r).step(|| "clear the ambient capabilities")?;
    setgroups(&[]).step(|| "give up all groups")?;
    // A user who is not root keeps no capability through execve but ambient ones.
    let ambient = uid != 0 && keep != 0;
    if ambient {
        nix::sys::prctl::set_keepcaps(true).step(|| "keep capabilities as another user")?;
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(group, group, group).step(|| format!("become group {gid}"))?;
    setresuid(user, user, user).step(|| format!("become user {uid}"))?;
    set(keep, if ambient { keep } else { 0 }).step(|| "give up capabilities")?;
    for number in (0..cap::END).filter(|number| ambient && keep & 1 << number != 0) {
        // SAFETY: integer arguments.
        let r =
            unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) };
        Errno::result(r).step(|| format!("keep capability {number}"))?;
    }
    nix::sys::prctl::set_no_new_privs().step(|| "forbid new privileges")
}

/// `struct __user_cap_header_struct` (linux/capability.h).
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`: effective, permitted, inheritable; low word first.
#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets effective and permitted to `keep`, inheritable to `inherit`.
fn set(keep: u64, inherit: u64) -> nix::Result<()> {
    let mut header = Header { version: VERSION, pid: 0 };
    let word = |bits: u32, inheritable: u32| Data { effective: bits, permitted: bits, inheritable };
    let data =
        [word(keep as u32, inherit as u32), word((keep >> 32) as u32, (inherit >> 32) as u32)];
    // SAFETY: header and two data words, as version 3 wants them.
    let r = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    Errno::result(r).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_file_server_keeps_any_capability_and_never_an_administrators() {
        assert_eq!(kept(Role::Vmm), 0);
        assert_eq!(kept(Role::VsockDevice), 0);
        assert_eq!(kept(Role::ServingVmm), 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4);
        let kept = kept(Role::FileServer);
        // NET_ADMIN, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN, DAC_READ_SEARCH, BPF.
        for number in [12, 16, 17, 19, 21, 2, 39] {
            assert_eq!(kept & 1 << number, 0, "{number}");
        }
        assert_eq!(kept.count_ones(), 10);
    }
}
