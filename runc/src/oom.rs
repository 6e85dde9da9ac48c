//! Tells when a container has had an out-of-memory kill.

use std::os::fd::OwnedFd;

use kuasar_host::cgroup::Cgroup;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// Watches a cgroup until nobody listens any more. The kernel's notification also comes for other
/// reasons (pressure, removal), so the counter of kills decides.
pub fn watch(cgroup: &Cgroup) -> Option<mpsc::Receiver<()>> {
    let fd = cgroup.oom_watch()?;
    // SAFETY: an OwnedFd answers the same descriptor until it is dropped.
    let fd = unsafe { AsyncFd::register(fd) }.ok()?;
    let (sender, receiver) = mpsc::channel(4);
    let cgroup = cgroup.clone();
    tokio::spawn(async move {
        let mut seen = 0;
        loop {
            let kills = cgroup.oom_kills();
            if kills > seen {
                seen = kills;
                if sender.send(()).await.is_err() {
                    return;
                }
            }
            if !cgroup.exists() {
                return;
            }
            tokio::select! {
                () = sender.closed() => return,
                ready = fd.readable() => match ready {
                    Ok(mut ready) => {
                        drain(fd.get_ref());
                        ready.clear_ready();
                    }
                    Err(_) => return,
                },
            }
        }
    });
    Some(receiver)
}

/// Reads away what made the descriptor readable (an eventfd's counter or inotify's events).
fn drain(fd: &OwnedFd) {
    let mut buffer = [0u8; 4096];
    while nix::unistd::read(fd, &mut buffer).is_ok_and(|count| count > 0) {}
}
