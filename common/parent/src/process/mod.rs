//! The process itself: one thread, one `epoll`, no async runtime.
//!
//! Private memory is the measure here: nothing is allocated but what is kept (names, parked
//! requests, unsent bytes), and buffers of an idle connection are given back.

pub mod control;
pub mod relay;
pub mod reap;
pub mod spawn;
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

/// Sets what `ps` shows for this process.
pub fn set_title(title: &str) {
    let (at, room) = (TITLE.load(Ordering::Relaxed), TITLE_ROOM.load(Ordering::Relaxed));
    let mut name = [0u8; 16];
    for (to, from) in name.iter_mut().take(15).zip(title.bytes()) {
        *to = from;
    }
    // SAFETY: a null-terminated name; then writes within the memory of the arguments, which is
    // ours to overwrite and which nobody reads any more.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0);
        if !at.is_null() && room > 0 {
            std::ptr::write_bytes(at, 0, room);
            std::ptr::copy_nonoverlapping(title.as_ptr(), at, title.len().min(room - 1));
        }
    }
}
