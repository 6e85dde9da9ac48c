//! What a container's process does for itself, whichever engine is in it.
//!
//! It was forked and executes nothing, so nothing is closed and no handler is gone by itself. A
//! container is a process: SIGKILL ends it. As the first process of a PID namespace it would not be
//! ended by SIGTERM without a handler, so that it has one; see [`on_signals`].

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use kuasar_oci::builtin::workload::Container;
use wasm_common::job::{self, Job};

/// What a trap is answered with: 128 + SIGABRT, as a program that ends itself.
pub const TRAPPED: i32 = 134;
/// What a program is answered with that has used up its budget: 128 + SIGXCPU.
pub const SPENT: i32 = 128 + libc::SIGXCPU;
/// Signals that end a program that does not handle them, and that people send for that.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];
/// How long a program that is interrupted may take to reach a point where it can be: compiled code
/// has one in each loop and function, a call to the host may have none.
const PATIENCE: Duration = Duration::from_millis(50);

/// The signal that is to end this process; 0 for none.
static ASKED: AtomicI32 = AtomicI32::new(0);
/// Makes the engine stop the program; has to be async-signal-safe.
static INTERRUPT: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// The job of a container that is being made.
///
/// # Errors
/// When its spec has none.
pub fn job(container: &Container<'_>) -> Result<Job, String> {
    let text = container.annotations.and_then(|all| all.get(job::ANNOTATION));
    Job::from_json(text.ok_or("the spec has no job for this engine")?)
}

/// Closes every descriptor from 3 on that is not in `keep`.
pub fn close_others(mut keep: Vec<i32>) {
    keep.retain(|fd| *fd >= 3);
    keep.sort_unstable();
    keep.dedup();
    let mut first = 3;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, i32::MAX);
}

fn close_range(first: i32, last: i32) {
    // SAFETY: what is closed belongs to the process that made this one, and is used by nobody here.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Ends the process with what was written.
pub fn exit(code: i32) -> ! {
    let _ = std::io::stdout().flush();
    // SAFETY: nothing has to be undone that the end of the process does not undo.
    unsafe { libc::_exit(code) }
}

/// Tells the container's log why its program was ended.
pub fn say(reason: &str) {
    // Nobody is left to tell when it cannot be written.
    let _ = writeln!(std::io::stderr(), "Error: {reason}");
}

/// From now on signals that people send to end a program do so, with 128 + number.
///
/// WASI has no signals, so that no program can have a handler. Without `interrupt` the process ends
/// on the spot. With it the program is stopped by its engine, as if it had trapped, and the process
/// by itself; should the program be inside of a call to the host, the process ends after
/// `PATIENCE`.
pub fn on_signals(interrupt: Option<Box<dyn Fn() + Send + Sync>>) {
    if let Some(interrupt) = interrupt {
        // Set once in the life of a process.
        let _ = INTERRUPT.set(interrupt);
        handle(libc::SIGALRM);
    }
    for signal in ENDING {
        handle(signal);
    }
}

/// Has the program stopped when this time has passed.
pub fn end_after(time: Duration) {
    handle(libc::SIGALRM);
    alarm(time);
}

/// The signal that has ended the program, if one has.
pub fn asked() -> Option<i32> {
    Some(ASKED.load(Ordering::Acquire)).filter(|signal| *signal != 0)
}

/// Exit code and words for a program that was ended by this signal.
pub fn ended_by(signal: i32) -> (i32, &'static str) {
    match signal {
        libc::SIGALRM => (SPENT, "its time budget is used up"),
        libc::SIGTERM => (128 + signal, "ended by SIGTERM"),
        _ => (128 + signal, "ended by a signal"),
    }
}

fn handle(signal: i32) {
    let handler = ended as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing that is not async-signal-safe.
    unsafe { libc::signal(signal, handler as usize) };
}

fn alarm(time: Duration) {
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: libc::suseconds_t::from(time.subsec_micros().max(1)),
    };
    let never = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let timer = libc::itimerval { it_interval: never, it_value: value };
    // SAFETY: a valid timer; the old one is not asked for. Async-signal-safe.
    unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0) };
}

extern "C" fn ended(signal: libc::c_int) {
    let first = ASKED.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
    if let (Ok(_), Some(interrupt)) = (first, INTERRUPT.get()) {
        interrupt();
        alarm(PATIENCE);
        return;
    }
    // What was asked for first counts.
    let (code, words) = ended_by(first.err().unwrap_or(signal));
    if code == SPENT {
        for part in ["Error: ", words, "\n"] {
            // SAFETY: async-signal-safe; a valid buffer.
            unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
        }
    }
    // SAFETY: async-signal-safe; what was written is in the kernel's hands.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_and_a_signal_have_codes_of_their_own() {
        assert_eq!(ended_by(libc::SIGTERM).0, 143);
        assert_eq!(ended_by(libc::SIGALRM), (152, "its time budget is used up"));
    }
}
