//! Containers and execs that an engine has announced before it asks for them.
//!
//! iSulad sends, in the Controller's Update, the whole list of what it is about to make, each time
//! that it changes (`extensions["tasks"]`, JSON). Its Task.Create then lacks what the list has: the
//! rootfs above all. containerd announces nothing, and nothing here concerns it.

use std::collections::HashMap;
use std::path::Path;

use kuasar_host::record;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::journal::Stdio;
use crate::runtime::{CreateContainer, Mount};

/// Key of the list among a sandbox's extensions.
pub const EXTENSION: &str = "tasks";

/// What is announced now, by container id.
#[derive(Debug, Default)]
pub struct Declared(HashMap<String, Task>);

#[derive(Debug, Deserialize)]
struct Task {
    #[serde(rename = "task_id")]
    id: String,
    spec: Option<Value>,
    rootfs: Option<Vec<Rootfs>>,
    stdin: Option<String>,
    stdout: Option<String>,
    stderr: Option<String>,
    processes: Option<Vec<Process>>,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    source: String,
    target: Option<String>,
    options: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct Process {
    #[serde(rename = "exec_id")]
    id: String,
    spec: Option<Value>,
    stdin: Option<String>,
    stdout: Option<String>,
    stderr: Option<String>,
}

fn stdio(
    stdin: Option<&String>,
    stdout: Option<&String>,
    stderr: Option<&String>,
    terminal: bool,
) -> Stdio {
    let text = |given: Option<&String>| given.cloned().unwrap_or_default();
    Stdio { stdin: text(stdin), stdout: text(stdout), stderr: text(stderr), terminal }
}

fn is_none(stdio: &Stdio) -> bool {
    stdio.stdin.is_empty() && stdio.stdout.is_empty() && stdio.stderr.is_empty()
}

impl From<&Rootfs> for Mount {
    fn from(given: &Rootfs) -> Self {
        let mut options = given.options.clone().unwrap_or_default();
        // iSulad names the type alone; mount(2) knows a bind mount by its flag.
        if given.kind == "bind" && !options.iter().any(|o| o == "bind" || o == "rbind") {
            options.insert(0, "rbind".into());
        }
        Self {
            kind: given.kind.clone(),
            source: given.source.clone(),
            target: given.target.clone().unwrap_or_default(),
            options,
        }
    }
}

impl Declared {
    /// Reads the list. An empty text is an empty list.
    ///
    /// # Errors
    /// InvalidArgument when it is none; a container that stands in it twice.
    pub fn parse(text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct List {
            tasks: Option<Vec<Task>>,
        }
        if text.is_empty() {
            return Ok(Self::default());
        }
        let bad = |what: &dyn std::fmt::Display| {
            Error::InvalidArgument(format!("extension {EXTENSION:?} of the sandbox: {what:.300}"))
        };
        let list: List = serde_json::from_slice(text).map_err(|e| bad(&e))?;
        let mut all = HashMap::new();
        for task in list.tasks.unwrap_or_default() {
            let id = task.id.clone();
            if all.insert(id.clone(), task).is_some() {
                return Err(bad(&format_args!("task {id:?} stands in it twice")));
            }
        }
        Ok(Self(all))
    }

    /// Containers and execs that are announced, each container (with an empty second name) before
    /// its execs.
    pub fn names(&self) -> std::collections::BTreeSet<(String, String)> {
        let mut all = std::collections::BTreeSet::new();
        for (id, task) in &self.0 {
            let execs = task.processes.iter().flatten().map(|process| process.id.clone());
            let execs = std::iter::once(String::new()).chain(execs);
            all.extend(execs.map(|exec| (id.clone(), exec)));
        }
        all
    }

    /// Whether a container's process or, where it is named, an exec is to have a terminal: its
    /// `spec` says so.
    pub fn is_terminal(&self, container: &str, exec: &str) -> bool {
        let process = if exec.is_empty() {
            let spec = self.0.get(container).and_then(|task| task.spec.as_ref());
            spec.and_then(|spec| spec.get("process"))
        } else {
            self.process(container, exec).and_then(|process| process.spec.as_ref())
        };
        let terminal = process.and_then(|process| process.get("terminal"));
        terminal.and_then(Value::as_bool).unwrap_or(false)
    }

    /// The streams of a container's process or, where it is named, of an exec.
    pub fn stdio(&self, container: &str, exec: &str) -> Stdio {
        let terminal = self.is_terminal(container, exec);
        let given = if exec.is_empty() {
            let task = self.0.get(container);
            task.map(|task| (task.stdin.as_ref(), task.stdout.as_ref(), task.stderr.as_ref()))
        } else {
            let one = self.process(container, exec);
            one.map(|one| (one.stdin.as_ref(), one.stdout.as_ref(), one.stderr.as_ref()))
        };
        let (stdin, stdout, stderr) = given.unwrap_or_default();
        stdio(stdin, stdout, stderr, terminal)
    }

    /// Whether nothing is announced.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this container is announced. Whoever announces (iSulad) calls no CloseIO: its
    /// processes' input ends when it closes its FIFO, which it has opened before.
    pub fn has(&self, container: &str) -> bool {
        self.0.contains_key(container)
    }

    /// Whether this exec is announced.
    pub fn has_exec(&self, container: &str, exec: &str) -> bool {
        self.process(container, exec).is_some()
    }

    fn process(&self, container: &str, exec: &str) -> Option<&Process> {
        self.0.get(container)?.processes.as_ref()?.iter().find(|p| p.id == exec)
    }

    /// Completes a Create: what it leaves empty is what was announced for the container. Where the
    /// bundle has no spec or no directory for the rootfs, they are made in it.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn complete(&self, request: &mut CreateContainer, given: &mut Stdio) -> Result<()> {
        let Some(task) = self.0.get(&request.id) else { return Ok(()) };
        if request.rootfs.is_empty() {
            request.rootfs = task.rootfs.iter().flatten().map(Mount::from).collect();
        }
        if is_none(given) {
            let terminal = given.terminal;
            *given =
                stdio(task.stdin.as_ref(), task.stdout.as_ref(), task.stderr.as_ref(), terminal);
        }
        fill_bundle(&request.bundle, task.spec.as_ref(), !request.rootfs.is_empty())
            .map_err(|e| Error::internal("complete the bundle", e))
    }

    /// What was announced for an exec: its OCI process (JSON) and its streams.
    pub fn exec(&self, container: &str, exec: &str, terminal: bool) -> Option<(String, Stdio)> {
        let process = self.process(container, exec)?;
        let (stdin, stdout, stderr) =
            (process.stdin.as_ref(), process.stdout.as_ref(), process.stderr.as_ref());
        Some((process.spec.as_ref()?.to_string(), stdio(stdin, stdout, stderr, terminal)))
    }
}

/// The bundle is the engine's: what is there stays as it is.
fn fill_bundle(bundle: &Path, spec: Option<&Value>, rootfs: bool) -> std::io::Result<()> {
    if rootfs {
        match std::fs::create_dir(bundle.join("rootfs")) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    let config = bundle.join("config.json");
    match spec {
        Some(spec) if !config.exists() => {
            record::write_file(&config, spec.to_string().as_bytes(), 0o600)
                .map_err(std::io::Error::other)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"tasks":[{"task_id":"c1","spec":{"ociVersion":"1.0.1"},
        "rootfs":[{"type":"bind","source":"/var/lib/isulad/merged"}],
        "stdin":"","stdout":"/fifo/out","stderr":"/fifo/err",
        "processes":[{"exec_id":"e1","spec":{"args":["ls"]},"stdout":"/fifo/e"}]}]}"#;

    fn request(bundle: &Path, id: &str) -> CreateContainer {
        CreateContainer {
            id: id.into(),
            bundle: bundle.to_owned(),
            rootfs: Vec::new(),
            terminal: false,
            checkpoint: None,
            options: None,
        }
    }

    #[test]
    fn what_a_create_lacks_is_what_was_announced() {
        let bundle = tempfile::tempdir().unwrap();
        let declared = Declared::parse(LIST.as_bytes()).unwrap();
        let (mut q, mut io) = (request(bundle.path(), "c1"), Stdio::default());
        declared.complete(&mut q, &mut io).unwrap();
        let [mount] = q.rootfs.as_slice() else { panic!("{:?}", q.rootfs) };
        assert_eq!(mount.source, "/var/lib/isulad/merged");
        assert_eq!(mount.options, ["rbind"]);
        assert_eq!((io.stdin.as_str(), io.stdout.as_str()), ("", "/fifo/out"));
        assert!(bundle.path().join("rootfs").is_dir());
        let spec = std::fs::read_to_string(bundle.path().join("config.json")).unwrap();
        assert_eq!(spec, r#"{"ociVersion":"1.0.1"}"#);
    }

    #[test]
    fn what_a_create_has_and_what_is_in_the_bundle_stays() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), "mine").unwrap();
        let declared = Declared::parse(LIST.as_bytes()).unwrap();
        let mut q = request(bundle.path(), "c1");
        q.rootfs = vec![Mount { kind: "overlay".into(), ..Mount::default() }];
        let mut io = Stdio { stdout: "/mine".into(), ..Stdio::default() };
        declared.complete(&mut q, &mut io).unwrap();
        assert_eq!(q.rootfs.len(), 1);
        assert_eq!((io.stdout.as_str(), io.stderr.as_str()), ("/mine", ""));
        let spec = std::fs::read_to_string(bundle.path().join("config.json")).unwrap();
        assert_eq!(spec, "mine");
        // One that nobody has announced.
        let mut other = request(bundle.path(), "c2");
        declared.complete(&mut other, &mut Stdio::default()).unwrap();
        assert!(other.rootfs.is_empty());
    }

    #[test]
    fn an_exec_is_found_by_its_container_and_its_id() {
        let declared = Declared::parse(LIST.as_bytes()).unwrap();
        let (spec, io) = declared.exec("c1", "e1", false).unwrap();
        assert_eq!((spec.as_str(), io.stdout.as_str()), (r#"{"args":["ls"]}"#, "/fifo/e"));
        assert!(declared.exec("c1", "e2", false).is_none());
        assert!(declared.exec("c2", "e1", false).is_none());
    }

    #[test]
    fn what_is_announced_can_be_listed_with_its_streams() {
        let text = LIST.replace(r#""args":["ls"]"#, r#""args":["sh"],"terminal":true"#);
        let declared = Declared::parse(text.as_bytes()).unwrap();
        let names: Vec<_> = declared.names().into_iter().collect();
        let name = |container: &str, exec: &str| (container.to_owned(), exec.to_owned());
        assert_eq!(names, [name("c1", ""), name("c1", "e1")]);
        assert_eq!(declared.stdio("c1", "").stderr, "/fifo/err");
        let exec = declared.stdio("c1", "e1");
        assert_eq!((exec.stdout.as_str(), exec.terminal), ("/fifo/e", true));
        assert_eq!(declared.stdio("c2", ""), Stdio::default());
        assert!(!declared.is_terminal("c1", "") && !declared.is_terminal("c1", "e2"));
    }

    #[test]
    fn a_list_that_is_none_is_refused_with_its_place() {
        for empty in ["", "{}", r#"{"tasks":null}"#, r#"{"tasks":[]}"#] {
            assert!(Declared::parse(empty.as_bytes()).unwrap().0.is_empty());
        }
        let said = |text: &str| Declared::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(said("[").contains("line 1"), "{}", said("["));
        assert!(said(r#"{"tasks":[{"spec":{}}]}"#).contains("task_id"));
        let twice = r#"{"tasks":[{"task_id":"a"},{"task_id":"a"}]}"#;
        assert!(said(twice).contains("twice"), "{}", said(twice));
    }
}
