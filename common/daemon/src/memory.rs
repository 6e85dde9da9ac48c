//! Small daemons: what keeps glibc and tokio from holding memory that nobody uses.

/// One arena, and free memory goes back early. Call first in `main`.
pub fn tune() {
    // SAFETY: mallopt only sets parameters; an unknown one is ignored.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TOP_PAD, 16 << 10);
    }
}

/// Gives free memory back to the kernel; cheap when there is none.
pub fn trim() {
    // SAFETY: malloc_trim takes no pointers and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

/// A runtime of two workers with small stacks, and helper threads that end when idle.
///
/// # Errors
/// When threads cannot be made.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_keep_alive(std::time::Duration::from_secs(2))
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
}
