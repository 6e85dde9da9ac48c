//! What is known of each sandbox, on disk: `<dir>/sandboxes/<id>/sandbox.json`.
//!
//! Every change is written (temporary file, rename) before it is answered, so a daemon that is
//! killed anywhere finds either the state before or the state after a step. The directory is
//! meant for `/run`: what must survive is our process, not the host, so nothing is synced.
//!
//! The pod's configuration is stored as the protobuf bytes in base64: the parser keeps fields it
//! does not know, so a configuration of a newer Kubernetes comes back whole. Unknown fields of
//! the record itself are kept as well, for a daemon that is rolled back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kuasar_protos::cri::PodSandboxConfig;
use protobuf::Message;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sandboxer::{SandboxExit, SandboxSpec, Started};

const KIND: &str = "sandbox";
const VERSION: u32 = 1;
const FILE: &str = "sandbox.json";

/// Where a sandbox is in its life. A record in a phase that ends in `-ing` is an operation that
/// was not finished: recovery rolls it back (before Ready) or goes on with it (after).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// `Sandboxer::create` runs.
    Creating,
    /// Created, not started.
    Created,
    /// `Sandboxer::start` runs.
    Starting,
    /// It runs.
    Ready,
    /// `Sandboxer::stop` runs, or has failed and may be tried again.
    Stopping,
    /// It has ended; how is in the record.
    Stopped,
    /// `Sandboxer::remove` runs, or has failed and may be tried again.
    Removing,
}

impl Phase {
    /// The one transition function: whether `next` may follow.
    pub fn may_become(self, next: Self) -> bool {
        use Phase::{Created, Creating, Ready, Removing, Starting, Stopped, Stopping};
        match next {
            Creating => false,
            Created => self == Creating,
            Starting => self == Created,
            Ready => self == Starting,
            Stopping => matches!(self, Created | Ready | Stopping | Stopped),
            Stopped => matches!(self, Created | Ready | Stopping | Stopped),
            Removing => true,
        }
    }
}

/// Everything that is known of one sandbox. Readers get it as a whole, so they never see half of
/// a change.
#[derive(Debug, Clone)]
pub struct Record {
    /// What it was created with.
    pub spec: Arc<SandboxSpec>,
    /// Where it is in its life.
    pub phase: Phase,
    /// When Create was called.
    pub created_at: SystemTime,
    /// What Start answered; empty before.
    pub started: Started,
    /// Address of the pod's endpoint; empty before Start.
    pub address: String,
    /// How it ended.
    pub exit: Option<SandboxExit>,
    /// Whether `Sandboxer::stop` has succeeded.
    pub cleared: bool,
    /// The sandboxer's own state.
    pub state: serde_json::Value,
    /// Its bundle, when containerd runs it through the shim binary.
    pub bundle: Option<PathBuf>,
    /// What a newer version has written.
    pub rest: serde_json::Map<String, serde_json::Value>,
}

impl Record {
    /// A new sandbox.
    pub fn new(spec: SandboxSpec, bundle: Option<PathBuf>) -> Self {
        Self {
            spec: Arc::new(spec),
            phase: Phase::Creating,
            created_at: SystemTime::now(),
            started: Started::default(),
            address: String::new(),
            exit: None,
            cleared: false,
            state: serde_json::Value::Null,
            bundle,
            rest: serde_json::Map::new(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    id: String,
    phase: Phase,
    created_at: SystemTime,
    config: String,
    netns_path: String,
    runtime: String,
    namespace: String,
    labels: BTreeMap<String, String>,
    extensions: BTreeMap<String, (String, String)>,
    pid: u32,
    started_labels: BTreeMap<String, String>,
    own_address: Option<String>,
    started_spec: Option<String>,
    address: String,
    exit: Option<SandboxExit>,
    cleared: bool,
    state: serde_json::Value,
    bundle: Option<PathBuf>,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

fn to_stored(r: &Record) -> Result<Stored> {
    let config = r
        .spec
        .config
        .write_to_bytes()
        .map_err(|e| Error::internal("cannot serialise the pod configuration", e))?;
    let extensions = r.spec.extensions.iter();
    Ok(Stored {
        id: r.spec.id.clone(),
        phase: r.phase,
        created_at: r.created_at,
        config: STANDARD.encode(config),
        netns_path: r.spec.netns_path.clone(),
        runtime: r.spec.runtime.clone(),
        namespace: r.spec.namespace.clone(),
        labels: r.spec.labels.clone(),
        extensions: extensions
            .map(|(k, (url, value))| (k.clone(), (url.clone(), STANDARD.encode(value))))
            .collect(),
        pid: r.started.pid,
        started_labels: r.started.labels.clone(),
        own_address: r.started.address.clone(),
        started_spec: r.started.spec.as_ref().map(|s| STANDARD.encode(s)),
        address: r.address.clone(),
        exit: r.exit,
        cleared: r.cleared,
        state: r.state.clone(),
        bundle: r.bundle.clone(),
        rest: r.rest.clone(),
    })
}

fn from_stored(s: Stored) -> std::result::Result<Record, Box<dyn std::error::Error + Send + Sync>> {
    let mut extensions = BTreeMap::new();
    for (key, (url, value)) in s.extensions {
        extensions.insert(key, (url, STANDARD.decode(value)?));
    }
    let spec = SandboxSpec {
        config: PodSandboxConfig::parse_from_bytes(&STANDARD.decode(s.config)?)?,
        id: s.id,
        netns_path: s.netns_path,
        runtime: s.runtime,
        labels: s.labels,
        extensions,
        namespace: s.namespace,
    };
    Ok(Record {
        spec: Arc::new(spec),
        phase: s.phase,
        created_at: s.created_at,
        started: Started {
            pid: s.pid,
            labels: s.started_labels,
            address: s.own_address,
            spec: s.started_spec.map(|t| STANDARD.decode(t)).transpose()?,
        },
        address: s.address,
        exit: s.exit,
        cleared: s.cleared,
        state: s.state,
        bundle: s.bundle,
        rest: s.rest,
    })
}

/// What the directory has.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The sandboxes that this program can take up.
    pub records: Vec<Record>,
    /// Ids of those that a newer program has recorded: nothing of theirs is to be touched.
    pub newer: Vec<String>,
}

/// The directory of all records.
#[derive(Debug)]
pub struct Store {
    sandboxes: PathBuf,
    quarantine: PathBuf,
    max_quarantine: usize,
}

impl Store {
    /// Opens the store below `dir`, making its directories.
    ///
    /// # Errors
    /// When a directory cannot be made or belongs to somebody else.
    pub fn open(dir: &Path, max_quarantine: usize) -> Result<Self> {
        let private = |path: &Path| {
            kuasar_host::record::private_dir(path)
                .map_err(|e| Error::internal("cannot open the state directory", e))
        };
        private(dir)?;
        let (sandboxes, quarantine) = (dir.join("sandboxes"), dir.join("quarantine"));
        private(&sandboxes)?;
        private(&quarantine)?;
        Ok(Self { sandboxes, quarantine, max_quarantine })
    }

    /// The directory of one sandbox.
    pub fn dir(&self, id: &str) -> PathBuf {
        self.sandboxes.join(id)
    }

    /// Whether there is a record with this id, of whatever version.
    pub fn has(&self, id: &str) -> bool {
        self.dir(id).join(FILE).exists()
    }

    /// Makes the directory of a new sandbox, 0700, and writes its first record.
    ///
    /// # Errors
    /// When it cannot be written; nothing is left then.
    pub fn create(&self, record: &Record) -> Result<()> {
        let dir = self.dir(&record.spec.id);
        kuasar_host::record::private_dir(&dir)
            .map_err(|e| Error::internal("cannot make the sandbox' directory", e))?;
        self.write(record).inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir); // The first error is the one to report.
        })
    }

    /// Writes a record; it is durable when this returns.
    ///
    /// # Errors
    /// When it cannot be written; the older one is still there.
    pub fn write(&self, record: &Record) -> Result<()> {
        let path = self.dir(&record.spec.id).join(FILE);
        kuasar_host::record::write(&path, KIND, VERSION, &to_stored(record)?)
            .map_err(|e| Error::internal("cannot write the sandbox' record", e))
    }

    /// Names of the records in quarantine.
    pub fn quarantined(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.quarantine).into_iter().flatten().flatten();
        let mut all: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        all.sort();
        all
    }

    /// Removes what is in quarantine now; answers the names of it.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn empty_quarantine(&self) -> Result<Vec<String>> {
        let root = kuasar_host::safe_path::Root::open(&self.quarantine)
            .map_err(|e| Error::internal("open the quarantine", e))?;
        let all = self.quarantined();
        for name in &all {
            root.remove_tree(Path::new(name))
                .map_err(|e| Error::internal(format!("remove {name} from the quarantine"), e))?;
        }
        Ok(all)
    }

    /// Removes a sandbox' directory. The record goes first: a directory without one is a
    /// removal that was not finished.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        let dir = self.dir(id);
        let absent = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
        for done in [fs::remove_file(dir.join(FILE)), fs::remove_dir_all(&dir)] {
            match done {
                Err(e) if !absent(&e) => {
                    return Err(Error::internal(format!("cannot remove {}", dir.display()), e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads all records. A torn or foreign one is put into quarantine and the rest is read; one
    /// of a newer version stays where it is, for the program that wrote it.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    pub fn load(&self) -> Result<Loaded> {
        let read = |e| Error::internal(format!("cannot read {}", self.sandboxes.display()), e);
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.sandboxes).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.path().join(FILE).exists() && entry.path().is_dir() {
                tracing::info!(sandbox = name, "finishing a removal that was interrupted");
                if let Err(e) = fs::remove_dir_all(entry.path()) {
                    tracing::warn!(sandbox = name, "cannot remove its directory: {e}");
                }
                continue;
            }
            match self.read(&entry.path(), &name) {
                Ok(record) => loaded.records.push(record),
                Err(e) if is_too_new(&*e) => {
                    tracing::error!(
                        sandbox = name,
                        "it is left alone, with its processes: {e}; start the newer version again"
                    );
                    loaded.newer.push(name);
                }
                Err(e) => self.set_aside(&entry.path(), &name, &*e),
            }
        }
        Ok(loaded)
    }

    fn read(
        &self,
        dir: &Path,
        name: &str,
    ) -> std::result::Result<Record, Box<dyn std::error::Error + Send + Sync>> {
        let stored: Stored = kuasar_host::record::read(&dir.join(FILE), KIND, VERSION)?;
        kuasar_host::id::check("sandbox", &stored.id)?;
        if stored.id != name {
            return Err(format!("it is the record of {:?}", stored.id).into());
        }
        from_stored(stored)
    }

    fn set_aside(&self, dir: &Path, name: &str, why: &(dyn std::error::Error + Send + Sync)) {
        let held = fs::read_dir(&self.quarantine).map(Iterator::count).unwrap_or(0);
        let moved = if held >= self.max_quarantine {
            Err(std::io::Error::other("the quarantine is full: look through it and empty it"))
        } else {
            (0..=self.max_quarantine)
                .map(|n| self.quarantine.join(format!("{name}-{n}")))
                .find(|to| !to.exists())
                .ok_or_else(|| std::io::Error::other("no free name"))
                .and_then(|to| fs::rename(dir, &to).map(|()| to))
        };
        match moved {
            Ok(to) => tracing::error!(
                sandbox = name,
                quarantine = %to.display(),
                "its record cannot be used and was set aside: {why}"
            ),
            Err(e) => tracing::error!(
                sandbox = name,
                "its record cannot be used ({why}) and stays where it is: {e}"
            ),
        }
    }
}

fn is_too_new(e: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(e.downcast_ref::<kuasar_host::Error>(), Some(kuasar_host::Error::TooNew { .. }))
}
