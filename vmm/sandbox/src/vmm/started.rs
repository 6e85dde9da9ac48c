//! What a start has made so far, to be undone when it fails.

use std::path::PathBuf;
use std::sync::Arc;

use super::Processes;
use super::disks::Disks;
use super::process::Process;

/// Undone when it is dropped with something in it.
#[derive(Default)]
pub(super) struct Started {
    /// Processes that run.
    pub processes: Vec<Process>,
    /// Names of kept descriptors: who keeps them, and the machine's id.
    pub forget: Option<(Arc<dyn Processes>, String)>,
    /// The machine's disks.
    pub disks: Option<Disks>,
    /// Files.
    pub files: Vec<PathBuf>,
}

impl Started {
    /// The start has come to its end: what was made stays. Answers the processes.
    pub fn done(mut self) -> Vec<Process> {
        (self.forget, self.disks) = (None, None);
        self.files.clear();
        std::mem::take(&mut self.processes)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let processes = std::mem::take(&mut self.processes);
        let forget = self.forget.take();
        for process in &processes {
            process.signal(libc::SIGKILL);
        }
        if let Some(disks) = &self.disks {
            disks.release();
        }
        self.files.iter().for_each(|path| super::core::remove(path));
        if processes.is_empty() && forget.is_none() {
            return;
        }
        tokio::spawn(async move {
            for process in processes {
                if let Err(error) = process.kill().await {
                    tracing::error!(%error, "a process of a failed start is left");
                }
                process.acknowledge().await;
            }
            if let Some((processes, id)) = forget {
                super::core::forget_pipes(&*processes, &id).await;
            }
        });
    }
}
