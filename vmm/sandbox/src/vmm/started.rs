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

    /// Undoes it before it answers: for one whose machine is started another way next, with the same
    /// names and taps.
    pub async fn undo(mut self) {
        if let Some(rest) = self.begin_to_undo() {
            rest.await;
        }
    }

    /// Undoes what needs no waiting; answers what does.
    fn begin_to_undo(&mut self) -> Option<impl Future<Output = ()> + Send + use<>> {
        let processes = std::mem::take(&mut self.processes);
        let forget = self.forget.take();
        for process in &processes {
            process.signal(libc::SIGKILL);
        }
        if let Some(disks) = self.disks.take() {
            disks.release();
        }
        self.files.drain(..).for_each(|path| super::core::remove(&path));
        if processes.is_empty() && forget.is_none() {
            return None;
        }
        Some(async move {
            for process in processes {
                if let Err(error) = process.kill().await {
                    tracing::error!(%error, "a process of a failed start is left");
                }
                process.acknowledge().await;
            }
            if let Some((processes, id)) = forget {
                super::core::forget_pipes(&*processes, &id).await;
            }
        })
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(rest) = self.begin_to_undo() {
            tokio::spawn(rest);
        }
    }
}
