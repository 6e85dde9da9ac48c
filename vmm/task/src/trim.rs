//! Pages of the program itself that only its start needed.
//!
//! The kernel maps sixteen pages for each that is touched (`fault_around_bytes`), and the start runs through
//! parts of the program that nothing uses later: half of what is mapped afterwards. Those mappings are let go
//! once. What is used again is mapped again from the same pages of the file, without a read; what is not is
//! no longer in use, and a machine whose root is a disk can have its memory back.

use nix::unistd::{SysconfVar, sysconf};

unsafe extern "C" {
    /// Where the program begins, and its code ends; by the linker.
    static __executable_start: u8;
    static etext: u8;
}

/// Lets go of the mapped pages of code and constants.
pub fn program() {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|n| usize::try_from(n).ok());
    let Some(page) = page.filter(|page| page.is_power_of_two()) else { return };
    // The addresses alone are used.
    let start = (&raw const __executable_start).addr().next_multiple_of(page);
    let end = (&raw const etext).addr() / page * page;
    let Some(length) = end.checked_sub(start) else { return };
    // SAFETY: from the program's first page to its last one of code there are read-only private
    // mappings of its file: what is dropped is the file's, and comes back as it was. (madvise(2)
    // refuses gaps with ENOMEM, after doing its work.)
    let done = unsafe {
        libc::madvise(std::ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED)
    };
    if done != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "the start's pages stay mapped");
    }
}
