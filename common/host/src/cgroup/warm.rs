//! Moving a process into a cgroup without the wait for all CPUs.
//!
//! Every write to `cgroup.procs` takes the kernel's `cgroup_threadgroup_rwsem` for writing. When
//! nobody has done so for a while, its first writer waits for an RCU grace period, 10 to 20 ms:
//! the largest part of making a container. (Hosts whose hierarchies are mounted with
//! `favordynmods`, Linux 6.0, have no such wait.) While writes follow each other faster than grace
//! periods, none of them waits. So around the start of a pod, when its containers are about to
//! come, a thread of its own writes to `cgroup.procs` what changes nothing: that this process is
//! where it is.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::Layout;

/// Well below a grace period.
const PERIOD: Duration = Duration::from_millis(4);

/// Keeps moves into cgroups fast for a while, when asked.
#[derive(Debug)]
pub struct Warmer {
    started: Instant,
    /// Milliseconds since `started` until which to go on.
    until: Arc<AtomicU64>,
    thread: OnceLock<Option<Thread>>,
    layout: Layout,
}

impl Warmer {
    /// For the hierarchies of `layout`. The thread is started when it is first needed.
    pub fn new(layout: &Layout) -> Self {
        Self {
            started: Instant::now(),
            until: Arc::default(),
            thread: OnceLock::new(),
            layout: layout.clone(),
        }
    }

    /// From now on, for `span`, moves do not wait. Returns at once; where it cannot be done moves
    /// are as slow as the kernel has them.
    pub fn keep(&self, span: Duration) {
        let end = (self.started.elapsed() + span).as_millis() as u64;
        self.until.fetch_max(end, Ordering::Relaxed);
        if let Some(thread) = self.thread.get_or_init(|| self.start()) {
            thread.unpark();
        }
    }

    fn start(&self) -> Option<Thread> {
        let mut procs = own_procs(&self.layout)?;
        let (started, until) = (self.started, self.until.clone());
        let work = move || {
            loop {
                while (started.elapsed().as_millis() as u64) < until.load(Ordering::Relaxed) {
                    if procs.write_all(b"0").is_err() {
                        return;
                    }
                    std::thread::sleep(PERIOD);
                }
                std::thread::park();
            }
        };
        let thread = std::thread::Builder::new().name("cgroup-warm".into()).stack_size(64 << 10);
        thread.spawn(work).ok().map(|handle| handle.thread().clone())
    }
}

/// `cgroup.procs` of the group that this process is in, in one hierarchy.
fn own_procs(layout: &Layout) -> Option<File> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let root = match layout {
            Layout::V1(all) => all.get(controllers.split(',').find(|c| !c.is_empty())?)?,
            Layout::V2(root) if controllers.is_empty() => root,
            Layout::V2(_) => return None,
        };
        let procs = root.join(path.trim_start_matches('/')).join("cgroup.procs");
        File::options().write(true).open(procs).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_changes_nothing_and_ends() {
        let cgroup = || std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = cgroup();
        let Ok(layout) = Layout::detect() else { return eprintln!("skipped: no cgroups") };
        let warmer = Warmer::new(&layout);
        warmer.keep(Duration::from_millis(20));
        warmer.keep(Duration::from_millis(1));
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(cgroup(), before);
        assert!(warmer.started.elapsed().as_millis() as u64 > warmer.until.load(Ordering::Relaxed));
    }
}
