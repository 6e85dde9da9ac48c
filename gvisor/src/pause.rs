//! The program of a pod's root container: it waits for ever and lets no zombie stay.
//!
//! gVisor wants a root container before others can join the sandbox. Its process is PID 1 of the
//! sandbox's PID namespace, so it has to reap what containers with a shared namespace leave
//! behind; a parent that ignores SIGCHLD need not even wait for that. This is so little that the
//! program is made here, instruction by instruction, and no image has to be pulled for it:
//!
//! ```text
//! rt_sigaction(SIGCHLD, {SIG_IGN}, NULL, 8); for (;;) pause();
//! ```

/// Size of an ELF64 file header, and of one program header.
const HEADERS: usize = 64 + 56;
/// Where the file is mapped.
const BASE: u64 = 0x40_0000;

#[cfg(target_arch = "x86_64")]
mod target {
    /// `EM_X86_64`.
    pub const MACHINE: u16 = 62;
    /// System calls 13 (rt_sigaction) and 34 (pause).
    pub const CODE: &[u8] = &[
        0xb8, 13, 0, 0, 0, // mov eax, 13
        0xbf, 17, 0, 0, 0, // mov edi, SIGCHLD
        0x48, 0x8d, 0x35, 19, 0, 0, 0, // lea rsi, [rip + 19]: behind the code
        0x31, 0xd2, // xor edx, edx
        0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
        0x0f, 0x05, // syscall
        0xb8, 34, 0, 0, 0, // again: mov eax, 34
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp again
    ];
}

#[cfg(target_arch = "aarch64")]
mod target {
    /// `EM_AARCH64`.
    pub const MACHINE: u16 = 183;
    /// System calls 134 (rt_sigaction) and 73 (ppoll, of nothing and without end).
    pub const CODE: &[u8] = &[
        0x20, 0x02, 0x80, 0xd2, // mov x0, #SIGCHLD
        0x61, 0x01, 0x00, 0x10, // adr x1, #44: behind the code
        0x02, 0x00, 0x80, 0xd2, // mov x2, #0
        0x03, 0x01, 0x80, 0xd2, // mov x3, #8
        0xc8, 0x10, 0x80, 0xd2, // mov x8, #134
        0x01, 0x00, 0x00, 0xd4, // svc #0
        0x00, 0x00, 0x80, 0xd2, // again: mov x0, #0
        0x01, 0x00, 0x80, 0xd2, // mov x1, #0; x2 is 0 still
        0x03, 0x00, 0x80, 0xd2, // mov x3, #0
        0x28, 0x09, 0x80, 0xd2, // mov x8, #73
        0x01, 0x00, 0x00, 0xd4, // svc #0
        0xfb, 0xff, 0xff, 0x17, // b again
    ];
}

/// `SIG_IGN`, no flags, no restorer, no mask.
const ACTION: [u64; 4] = [1, 0, 0, 0];

/// The program as a file.
pub fn program() -> Vec<u8> {
    let size = (HEADERS + target::CODE.len() + 32) as u64;
    let mut file = Vec::with_capacity(size as usize);
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut put = |bytes: &[u8]| file.extend(bytes);
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&target::MACHINE.to_le_bytes());
    put(&1u32.to_le_bytes());
    put(&(BASE + HEADERS as u64).to_le_bytes()); // entry
    put(&64u64.to_le_bytes()); // program headers
    put(&0u64.to_le_bytes()); // no section headers
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    put(&1u32.to_le_bytes()); // PT_LOAD
    put(&5u32.to_le_bytes()); // readable, executable
    for long in [0, BASE, BASE, size, size, 0x1000] {
        put(&long.to_le_bytes());
    }
    put(target::CODE);
    for word in ACTION {
        put(&word.to_le_bytes());
    }
    file
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn it_runs_ignores_children_and_ends_by_a_signal_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pause");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = std::process::Command::new(&path).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // Bit 16 of the ignored signals is SIGCHLD.
        let ignores = || {
            let text = std::fs::read_to_string(&status).unwrap();
            let mask = text.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
            u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << 16) != 0
        };
        while !ignores() {
            assert!(child.try_wait().unwrap().is_none(), "it has ended");
            assert!(std::time::Instant::now() < until, "it does not ignore SIGCHLD");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}
