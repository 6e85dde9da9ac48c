//! What the Task server must know again after a restart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kuasar_host::record;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::runtime::Exit;

const KIND: &str = "container";
const VERSION: u32 = 1;

/// State of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Made, not started.
    Created,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Has ended; its exit is known.
    Stopped,
}

/// stdio as the engine named it; State echoes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Path or URL of standard input, or empty.
    #[serde(default)]
    pub stdin: String,
    /// Path or URL of standard output, or empty.
    #[serde(default)]
    pub stdout: String,
    /// Path or URL of standard error, or empty.
    #[serde(default)]
    pub stderr: String,
    /// Whether the process has a terminal.
    #[serde(default)]
    pub terminal: bool,
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Pid; 0 for an exec that was not started.
    pub pid: u32,
    /// The runtime's handle for its exit.
    pub handle: u64,
    /// State.
    pub status: Status,
    /// How it ended.
    pub exit: Option<Exit>,
    /// stdio.
    pub stdio: Stdio,
    /// OCI process (JSON) of an exec that was not started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<String>,
    /// Whether stdin was closed.
    #[serde(default)]
    pub stdin_closed: bool,
}

/// A container and its processes; the init process has the empty exec id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Container id.
    pub id: String,
    /// containerd's bundle.
    pub bundle: PathBuf,
    /// Processes by exec id.
    pub processes: BTreeMap<String, ProcessRecord>,
    /// Out-of-memory kills that were published.
    #[serde(default)]
    pub oom_kills: u64,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// Where records are kept. Synchronous: they are small and lie on a tmpfs.
pub trait Journal: Send + Sync + 'static {
    /// Saves a record; durable when this returns.
    ///
    /// # Errors
    /// When it could not be written; the older one is still there.
    fn save(&self, record: &ContainerRecord) -> Result<()>;
    /// Removes a record; idempotent.
    fn remove(&self, id: &str);
    /// All records that can be read.
    fn load(&self) -> Vec<ContainerRecord>;
}

/// Remembers nothing: for a guest, whose server never restarts.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoJournal;

impl Journal for NoJournal {
    fn save(&self, _record: &ContainerRecord) -> Result<()> {
        Ok(())
    }
    fn remove(&self, _id: &str) {}
    fn load(&self) -> Vec<ContainerRecord> {
        Vec::new()
    }
}

/// One file per container in a private directory.
#[derive(Debug, Clone)]
pub struct FileJournal {
    dir: PathBuf,
}

impl FileJournal {
    /// Uses `dir`, which is made if it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(dir: &Path) -> Result<Self> {
        record::private_dir(dir).map_err(|e| Error::internal("cannot open the journal", e))?;
        Ok(Self { dir: dir.into() })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

impl Journal for FileJournal {
    fn save(&self, r: &ContainerRecord) -> Result<()> {
        record::write(&self.path(&r.id), KIND, VERSION, r)
            .map_err(|e| Error::internal(format!("cannot record container {}", r.id), e))
    }

    fn remove(&self, id: &str) {
        // A record that is not there is what is wanted.
        let _ = std::fs::remove_file(self.path(id));
    }

    fn load(&self) -> Vec<ContainerRecord> {
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "json") {
                // Half-written by a daemon that died.
                let _ = std::fs::remove_file(&path);
                continue;
            }
            match record::read::<ContainerRecord>(&path, KIND, VERSION) {
                Ok(r) if path == self.path(&r.id) => records.push(r),
                Ok(_) | Err(_) => {
                    let aside = path.with_extension("quarantined");
                    tracing::error!(path = %path.display(), "record of a container is unreadable: \
                        put aside, the container is given up");
                    let _ = std::fs::rename(&path, aside);
                }
            }
        }
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_record_costs_one_container() {
        let dir = tempfile::tempdir().unwrap();
        let j = FileJournal::new(dir.path()).unwrap();
        let r = |id: &str| ContainerRecord {
            id: id.into(),
            bundle: "/b".into(),
            processes: BTreeMap::new(),
            oom_kills: 0,
            other: BTreeMap::from([("future".into(), serde_json::json!(1))]),
        };
        j.save(&r("a")).unwrap();
        j.save(&r("b")).unwrap();
        std::fs::write(dir.path().join("b.json"), "{").unwrap();
        assert_eq!(j.load(), [r("a")]);
        j.remove("a");
        j.remove("a");
        assert!(j.load().is_empty());
    }
}
