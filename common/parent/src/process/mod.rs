//! The process itself: one thread, one `epoll`, no async runtime, no allocation while it serves.
//!
//! Private memory is the measure here. What is kept are descriptors and rows of a few bytes in
//! [`memory`]; what a program or a namespace needs beyond that, a forked child allocates.

pub mod control;
pub mod memory;
pub mod namespaces;
pub mod reap;
pub mod relay;
pub mod requests;
pub mod spawn;
pub mod store;
pub mod sys;

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

static TITLE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static TITLE_ROOM: AtomicUsize = AtomicUsize::new(0);

/// Remembers the memory of the arguments, which `ps` shows.
///
/// # Safety
/// `argv` must be `main`'s argument vector of `argc` entries, which lies in one piece of memory.
pub unsafe fn remember_title(argc: i32, argv: *const *const libc::c_char) {
    if argc < 1 {
        return;
    }
    // SAFETY: `argv` has `argc` valid entries by contract; the kernel lays the strings out one
    // behind the other.
    unsafe {
        let first = *argv;
        let last = *argv.add(argc as usize - 1);
        let end = last.add(libc::strlen(last) + 1);
        TITLE.store(first as *mut u8, Ordering::Relaxed);
        TITLE_ROOM.store(end.offset_from(first).unsigned_abs(), Ordering::Relaxed);
    }
}

/// Sets what `ps` shows for this process, as far as the arguments have made room for it.
pub fn set_title(parts: &[&[u8]]) {
    let (at, room) = (TITLE.load(Ordering::Relaxed), TITLE_ROOM.load(Ordering::Relaxed));
    let bytes = || parts.iter().flat_map(|p| p.iter().copied());
    let mut name = [0u8; 16];
    name.iter_mut().take(15).zip(bytes()).for_each(|(to, from)| *to = from);
    // SAFETY: a null-terminated name; then the memory of the arguments, which is ours to
    // overwrite, which nobody reads any more, and which ends with a zero.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0);
        if !at.is_null() && room > 0 {
            let title = std::slice::from_raw_parts_mut(at, room - 1);
            title.iter_mut().zip(bytes().chain(std::iter::repeat(0))).for_each(|(to, b)| *to = b);
        }
    }
}
