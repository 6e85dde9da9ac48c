//! Where random numbers come from in a container.
//!
//! In a static program the crate `getrandom` finds no function of the C library, and reads
//! `/dev/urandom` instead, which is not there in a container. It opens the file once: so that is
//! done by the zygote, and containers keep the descriptor. Only that: were a generator seeded
//! here, all containers would have the same numbers. Generators belong to threads, so another
//! thread uses one and ends.

use std::os::fd::AsRawFd;
use std::path::Path;

/// Lowest number that the descriptor gets: above those of a new process.
const FROM: i32 = 200;

/// Has the source opened; answers its descriptor, or `None` where none is needed. To be called
/// while there is one thread; there is one when it returns.
pub fn open() -> Result<Option<i32>, String> {
    let wrap = |error: std::io::Error| format!("random numbers: {error}");
    let null = std::fs::File::open("/dev/null").map_err(wrap)?;
    // Lower numbers are taken for a moment.
    let mut taken = Vec::new();
    loop {
        let next = null.try_clone().map_err(wrap)?;
        let number = next.as_raw_fd();
        if number >= FROM {
            break;
        }
        taken.push(next);
    }
    let used = std::thread::spawn(|| {
        use wasmtime_wasi::Rng;
        wasmtime_wasi::thread_rng().next_u64()
    });
    used.join().map_err(|_| "random numbers: there are none".to_owned())?;
    drop((taken, null));
    let listed = std::fs::read_dir("/proc/self/fd").map_err(wrap)?;
    Ok(listed.flatten().find_map(|entry| {
        let to = std::fs::read_link(entry.path()).ok()?;
        let number = entry.file_name().to_str()?.parse().ok()?;
        (to == Path::new("/dev/urandom") && number >= FROM).then_some(number)
    }))
}
