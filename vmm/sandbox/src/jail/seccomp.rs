//! A deny-list of system calls, loaded beneath the filter that each program has of its own
//! (QEMU's `-sandbox`, virtiofsd's `--seccomp`; `vhost-device-vsock` has none). It holds what
//! only administrators and debuggers need: most would fail without capabilities anyway, and are
//! here so that a flaw in the kernel's check of one is out of reach.
//!
//! A denied call answers `EPERM`. A call by another architecture's numbers ends the program: it
//! would pass the list by (seccomp(2), "Caveats").

use nix::errno::Errno;

use super::Role;
use super::run::{Failed, Step};

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

/// Bit of the numbers of x32, which shares x86_64's architecture.
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

/// Where `struct seccomp_data` has the number and the architecture.
const NR: u32 = 0;
const ARCH_AT: u32 = 4;

/// Denied to all.
const DENIED: &[libc::c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_vhangup,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Denied to all but virtiofsd, which changes its root directory (`--sandbox=chroot`) and keeps
/// working directories per thread (`unshare(CLONE_FS)`).
const NOT_FOR_FILE_SERVERS: &[libc::c_long] = &[libc::SYS_chroot, libc::SYS_unshare];

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// The filter's program: classic BPF.
fn program(role: Role) -> Vec<libc::sock_filter> {
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let kill = statement(answer, libc::SECCOMP_RET_KILL_PROCESS);
    let deny = statement(answer, libc::SECCOMP_RET_ERRNO | Errno::EPERM as u32);
    let mut code = vec![statement(load, ARCH_AT), jump(equal, ARCH, 1, 0), kill];
    code.push(statement(load, NR));
    #[cfg(target_arch = "x86_64")]
    code.extend([jump(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, X32, 0, 1), kill]);
    let more: &[_] = if role == Role::FileServer { &[] } else { NOT_FOR_FILE_SERVERS };
    for number in DENIED.iter().chain(more) {
        code.extend([jump(equal, *number as u32, 0, 1), deny]);
    }
    code.push(statement(answer, libc::SECCOMP_RET_ALLOW));
    code
}

/// Loads it, for good. `no_new_privs` must be set.
pub(super) fn load(role: Role) -> Result<(), Failed> {
    let mut code = program(role);
    let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the structure and the program it points to are valid for the call.
    let r = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter)
    };
    Errno::result(r).step(|| "load the system call filter").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(role: Role, arch: u32, number: u32) -> u32 {
        let code = program(role);
        let (mut at, mut a) = (0, 0);
        loop {
            let line = code[at];
            at += 1;
            match u32::from(line.code) {
                c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    a = if line.k == NR { number } else { arch };
                }
                c if c == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    at += usize::from(if a == line.k { line.jt } else { line.jf });
                }
                c if c == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => {
                    at += usize::from(if a >= line.k { line.jt } else { line.jf });
                }
                _ => return line.k,
            }
        }
    }

    #[test]
    fn the_list_is_denied_other_architectures_end_the_program_and_the_rest_passes() {
        let deny = libc::SECCOMP_RET_ERRNO | Errno::EPERM as u32;
        for number in DENIED {
            assert_eq!(verdict(Role::Vmm, ARCH, *number as u32), deny);
        }
        assert_eq!(verdict(Role::Vmm, ARCH, libc::SYS_chroot as u32), deny);
        let allow = libc::SECCOMP_RET_ALLOW;
        assert_eq!(verdict(Role::FileServer, ARCH, libc::SYS_chroot as u32), allow);
        for number in [libc::SYS_read, libc::SYS_ioctl, libc::SYS_execve, libc::SYS_mmap] {
            assert_eq!(verdict(Role::Vmm, ARCH, number as u32), allow);
        }
        let kill = libc::SECCOMP_RET_KILL_PROCESS;
        assert_eq!(verdict(Role::Vmm, 0x4000_0003, libc::SYS_read as u32), kill);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(verdict(Role::Vmm, ARCH, X32 | libc::SYS_mount as u32), kill);
    }
}
