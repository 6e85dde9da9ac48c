//! Small daemons: what keeps glibc and tokio from holding memory that nobody uses.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::Notify;

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

/// How long the program's threads have to come to rest before its pages are given back.
const SETTLE: Duration = Duration::from_millis(5);

/// Gives back what an idle daemon does not need: free memory, and the pages of its program. Those
/// stay in the page cache and come back when they are used (a minor fault for 16 pages and more).
///
/// The pages are given back a moment later and by a thread of its own, which does nothing else: the
/// code by which a worker goes to rest is all over the program, and would be back at once.
pub fn trim() {
    static TRIMMER: LazyLock<Option<Thread>> = LazyLock::new(|| {
        let named = std::thread::Builder::new().name("trim".into()).stack_size(64 << 10);
        let thread = named.spawn(|| {
            loop {
                // It may wake without a reason: once too often does no harm.
                std::thread::park();
                std::thread::sleep(SETTLE);
                give_back();
            }
        });
        thread.ok().map(|handle| handle.thread().clone())
    });
    // SAFETY: malloc_trim takes no pointers and may be called at any time.
    unsafe { libc::malloc_trim(0) };
    match &*TRIMMER {
        Some(thread) => thread.unpark(),
        None => give_back(),
    }
}

fn give_back() {
    // SAFETY: the callback takes no data and keeps none.
    unsafe { libc::dl_iterate_phdr(Some(give_back_program), std::ptr::null_mut()) };
}

/// Gives back the segments of the program, the first object, that were never writable. (Others
/// are shown as read-only too, but hold what relocation has written there.)
unsafe extern "C" fn give_back_program(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    const PAGE: u64 = 4096;
    // SAFETY: dl_iterate_phdr(3) gives a valid object with `dlpi_phnum` headers.
    let (base, headers) = unsafe {
        let object = &*object;
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()))
    };
    for h in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let from = (base + h.p_vaddr) / PAGE * PAGE;
        let to = (base + h.p_vaddr + h.p_memsz) / PAGE * PAGE;
        if to > from {
            // SAFETY: all that is in this mapping is in the program's file.
            unsafe { libc::madvise(from as *mut _, (to - from) as usize, libc::MADV_DONTNEED) };
        }
    }
    1 // No other object.
}

static ACTIVE: AtomicU64 = AtomicU64::new(0);
static WAKE: Notify = Notify::const_new();

/// Something was done: [`trim_when_idle`] has to look again.
pub fn touch() {
    if ACTIVE.fetch_add(1, Ordering::Relaxed) == 0 {
        WAKE.notify_one();
    }
}

/// Trims whenever nothing has been done for `quiet`. Sleeps without a timer while idle.
pub async fn trim_when_idle(quiet: Duration) {
    loop {
        WAKE.notified().await;
        let mut seen = 0;
        loop {
            tokio::time::sleep(quiet).await;
            match ACTIVE.compare_exchange(seen, 0, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        trim();
    }
}

/// A runtime of two workers with small stacks, and helper threads that end before an idle daemon is
/// trimmed: their end, later, would bring the program's pages back.
///
/// # Errors
/// When threads cannot be made.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_keep_alive(Duration::from_millis(250))
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
}
