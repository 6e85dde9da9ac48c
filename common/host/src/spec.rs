//! Lossless edits of an OCI runtime spec.
//!
//! The spec stays the JSON value that it came as, so fields that this program has never heard of
//! reach the engine unchanged. (A typed spec that is parsed and written again drops them; upstream
//! lost `unified`, time offsets and id-mapped mounts that way.)

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{Context, Error, Result};

/// Largest spec that is read by default, in bytes. Its depth is bounded by the parser (128).
pub const MAX_SPEC: u64 = 4 << 20;

/// An OCI runtime spec.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec(Map<String, Value>);

/// Kinds of Linux namespaces as the spec names them.
pub const NAMESPACES: [&str; 8] =
    ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];

impl Spec {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] when it is no JSON object or too large.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_bounded(path, MAX_SPEC)
    }

    /// As [`Self::load`], with another bound in bytes.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_bounded(path: &Path, max: u64) -> Result<Self> {
        let context = || format!("cannot read {}", path.display());
        let mut text = Vec::new();
        let file = std::fs::File::open(path).context(context)?;
        file.take(max.saturating_add(1)).read_to_end(&mut text).context(context)?;
        if text.len() as u64 > max {
            return Err(Error::Invalid(format!("{} is larger than {max} bytes", path.display())));
        }
        Self::parse(&text)
            .map_err(|e| Error::Invalid(format!("{} is no OCI spec: {e}", path.display())))
    }

    /// Parses a spec and checks the parts that are edited here.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the JSON pointer.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let value: Value =
            serde_json::from_slice(text).map_err(|e| Error::Invalid(format!("bad JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(Error::Invalid("/: expected an object".into()));
        };
        let spec = Self(map);
        let expect = |pointer: &str, ok: fn(&Value) -> bool, what: &str| match spec.get(pointer) {
            Some(v) if !ok(v) && !v.is_null() => {
                Err(Error::Invalid(format!("{pointer}: expected {what}")))
            }
            _ => Ok(()),
        };
        for p in ["/process", "/root", "/linux", "/annotations", "/linux/resources"] {
            expect(p, Value::is_object, "an object")?;
        }
        for p in ["/mounts", "/linux/namespaces", "/process/args"] {
            expect(p, Value::is_array, "an array")?;
        }
        for p in ["/root/path", "/linux/cgroupsPath", "/hostname"] {
            expect(p, Value::is_string, "a string")?;
        }
        for (list, keys) in [
            ("/mounts", &["destination", "type", "source"][..]),
            ("/linux/namespaces", &["type", "path"][..]),
        ] {
            let entries = spec.get(list).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            for (i, entry) in entries.iter().enumerate() {
                let Some(entry) = entry.as_object() else {
                    return Err(Error::Invalid(format!("{list}/{i}: expected an object")));
                };
                for key in keys {
                    if entry.get(*key).is_some_and(|v| !v.is_string() && !v.is_null()) {
                        return Err(Error::Invalid(format!("{list}/{i}/{key}: expected a string")));
                    }
                }
            }
        }
        Ok(spec)
    }

    /// Writes `config.json` by rename, mode 0600.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        crate::record::write_file(path, &self.to_vec(), 0o600)
    }

    /// The JSON text.
    pub fn to_vec(&self) -> Vec<u8> {
        // A map of JSON values always serialises.
        serde_json::to_vec(&self.0).unwrap_or_default()
    }

    /// The value at a pointer such as `/linux/cgroupsPath`.
    pub fn get(&self, pointer: &str) -> Option<&Value> {
        let mut parts = pointer.strip_prefix('/')?.splitn(2, '/');
        let first = self.0.get(parts.next()?)?;
        match parts.next() {
            Some(rest) => first.pointer(&format!("/{rest}")),
            None => Some(first),
        }
    }

    fn str(&self, pointer: &str) -> Option<&str> {
        self.get(pointer)?.as_str()
    }

    /// `linux.cgroupsPath`.
    pub fn cgroups_path(&self) -> Option<&str> {
        self.str("/linux/cgroupsPath").filter(|s| !s.is_empty())
    }

    /// An annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.get("/annotations")?.get(key)?.as_str()
    }

    /// `root.path`.
    pub fn root(&self) -> Option<&str> {
        self.str("/root/path")
    }

    /// Sets `root.path`, keeping `readonly`.
    pub fn set_root(&mut self, path: &str) {
        edit_object(&mut self.0, "root", |r| r.insert("path".into(), json!(path)));
    }

    /// Sets `hostname`; an empty one removes it.
    pub fn set_hostname(&mut self, name: &str) {
        if name.is_empty() {
            self.0.remove("hostname");
        } else {
            self.0.insert("hostname".into(), json!(name));
        }
    }

    /// All annotations that are strings.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        let map = self.get("/annotations").and_then(Value::as_object);
        map.into_iter().flatten().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?)))
    }

    /// Sets an annotation.
    pub fn set_annotation(&mut self, key: &str, value: &str) {
        edit_object(&mut self.0, "annotations", |a| a.insert(key.into(), json!(value)));
    }

    /// `process`.
    pub fn process(&self) -> Option<&Map<String, Value>> {
        self.get("/process")?.as_object()
    }

    /// Makes `process`, if there is one, have a terminal or none, whatever the bundle says.
    pub fn set_terminal(&mut self, terminal: bool) {
        if let Some(Value::Object(process)) = self.0.get_mut("process") {
            set_terminal(process, terminal, None);
        }
    }

    /// `linux.resources`.
    pub fn resources(&self) -> Option<&Map<String, Value>> {
        self.get("/linux/resources")?.as_object()
    }

    /// `mounts`, in order.
    pub fn mounts(&self) -> &[Value] {
        self.get("/mounts").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// Whether `root.readonly` is set.
    pub fn root_readonly(&self) -> bool {
        self.get("/root/readonly").and_then(Value::as_bool).unwrap_or(false)
    }

    /// Sets `linux.cgroupsPath`.
    pub fn set_cgroups_path(&mut self, path: &str) {
        edit_object(&mut self.0, "linux", |l| l.insert("cgroupsPath".into(), json!(path)));
    }

    /// Sets the value at a JSON pointer, making the objects on the way to it.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the pointer where something else than an object is on the way.
    pub fn set(&mut self, pointer: &str, value: Value) -> Result<()> {
        let (mut map, mut at) = (&mut self.0, String::new());
        let mut keys = pointer.trim_start_matches('/').split('/').peekable();
        while let Some(key) = keys.next() {
            let key = key.replace("~1", "/").replace("~0", "~");
            at = format!("{at}/{key}");
            if keys.peek().is_none() {
                map.insert(key, value);
                return Ok(());
            }
            let slot = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
            if slot.is_null() {
                *slot = Value::Object(Map::new());
            }
            map = slot
                .as_object_mut()
                .ok_or_else(|| Error::Invalid(format!("{at}: expected an object")))?;
        }
        Ok(())
    }

    /// Removes the value at a JSON pointer and answers it.
    pub fn remove(&mut self, pointer: &str) -> Option<Value> {
        let (parent, key) = pointer.rsplit_once('/')?;
        let key = key.replace("~1", "/").replace("~0", "~");
        if parent.is_empty() {
            return self.0.remove(&key);
        }
        let mut parts = parent.strip_prefix('/')?.splitn(2, '/');
        let first = self.0.get_mut(parts.next()?)?;
        let holder = match parts.next() {
            Some(rest) => first.pointer_mut(&format!("/{rest}"))?,
            None => first,
        };
        holder.as_object_mut()?.remove(&key)
    }

    /// Path of a namespace: `None` when the spec does not list it, `Some("")` for a new one.
    pub fn namespace(&self, kind: &str) -> Option<&str> {
        let list = self.get("/linux/namespaces")?.as_array()?;
        let ns = list.iter().find(|n| n.get("type").and_then(Value::as_str) == Some(kind))?;
        Some(ns.get("path").and_then(Value::as_str).unwrap_or_default())
    }

    /// Lists the namespace: joined at `path`, or a new one for an empty path.
    pub fn set_namespace(&mut self, kind: &str, path: &str) {
        self.remove_namespace(kind);
        let ns = if path.is_empty() {
            json!({ "type": kind })
        } else {
            json!({ "type": kind, "path": path })
        };
        edit_object(&mut self.0, "linux", |l| edit_array(l, "namespaces", |a| a.push(ns)));
    }

    /// Unlists the namespace: the container stays in the engine's.
    pub fn remove_namespace(&mut self, kind: &str) {
        let other = |n: &Value| n.get("type").and_then(Value::as_str) != Some(kind);
        edit_object(&mut self.0, "linux", |l| edit_array(l, "namespaces", |a| a.retain(other)));
    }

    /// The mount at a destination.
    pub fn mount(&self, destination: &str) -> Option<&Value> {
        let at = |m: &&Value| m.get("destination").and_then(Value::as_str) == Some(destination);
        self.get("/mounts")?.as_array()?.iter().find(at)
    }

    /// Whether something is mounted at a destination.
    pub fn has_mount(&self, destination: &str) -> bool {
        self.mount(destination).is_some()
    }

    /// Adds a mount behind the others.
    pub fn add_mount(&mut self, kind: &str, source: &str, destination: &str, options: &[&str]) {
        let new = mount_value(kind, source, destination, options);
        edit_array(&mut self.0, "mounts", |mounts| mounts.push(new));
    }

    /// Puts another mount in place of the one at `destination`, or adds it.
    pub fn replace_mount(&mut self, kind: &str, source: &str, destination: &str, options: &[&str]) {
        let new = mount_value(kind, source, destination, options);
        let at = |m: &Value| m.get("destination").and_then(Value::as_str) == Some(destination);
        edit_array(&mut self.0, "mounts", |mounts| match mounts.iter_mut().find(|m| at(m)) {
            Some(m) => *m = new,
            None => mounts.push(new),
        });
    }

    /// Removes the mounts at a destination.
    pub fn remove_mount(&mut self, destination: &str) {
        let other = |m: &Value| m.get("destination").and_then(Value::as_str) != Some(destination);
        edit_array(&mut self.0, "mounts", |mounts| mounts.retain(other));
    }

    /// Mutable access for edits that have no method of their own.
    pub fn value_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.0
    }
}

fn mount_value(kind: &str, source: &str, destination: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// Makes a `process` object, of a container or of an exec, agree with the streams that it gets: with
/// a terminal, of this width and height if they are known, or without one.
pub fn set_terminal(process: &mut Map<String, Value>, terminal: bool, size: Option<(u16, u16)>) {
    process.insert("terminal".into(), json!(terminal));
    match (terminal, size) {
        (true, Some((width, height))) => {
            process.insert("consoleSize".into(), json!({ "width": width, "height": height }));
        }
        (true, None) => {}
        (false, _) => drop(process.remove("consoleSize")),
    }
}

/// Edits the object at `key`, making one where there is none.
fn edit_object<R>(
    map: &mut Map<String, Value>,
    key: &str,
    edit: impl FnOnce(&mut Map<String, Value>) -> R,
) {
    let mut inner = match map.get_mut(key).map(Value::take) {
        Some(Value::Object(inner)) => inner,
        _ => Map::new(),
    };
    edit(&mut inner);
    map.insert(key.into(), Value::Object(inner));
}

/// Edits the array at `key`, making one where there is none.
fn edit_array<R>(map: &mut Map<String, Value>, key: &str, edit: impl FnOnce(&mut Vec<Value>) -> R) {
    let mut inner = match map.get_mut(key).map(Value::take) {
        Some(Value::Array(inner)) => inner,
        _ => Vec::new(),
    };
    edit(&mut inner);
    map.insert(key.into(), Value::Array(inner));
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"ociVersion":"9.9","future":{"a":[1]},"hostname":"x",
        "root":{"path":"rootfs","readonly":true,"new":1},
        "mounts":[{"destination":"/dev/shm","type":"tmpfs","source":"shm","idmap":7}],
        "linux":{"namespaces":[{"type":"pid"},{"type":"ipc","path":"/proc/0/ns/ipc"}],"later":{}}}"#;

    #[test]
    fn fields_that_nobody_knows_survive() {
        let mut s = Spec::parse(TEXT.as_bytes()).unwrap();
        s.set_root("/r");
        s.set_namespace("ipc", "/ns/ipc");
        s.add_mount("bind", "/a", "/b", &["rbind"]);
        let v: Value = serde_json::from_slice(&s.to_vec()).unwrap();
        assert_eq!(v["future"]["a"][0], 1);
        assert_eq!(v["root"], json!({"path": "/r", "readonly": true, "new": 1}));
        assert_eq!(v["mounts"][0]["idmap"], 7);
        assert_eq!(v["linux"]["later"], json!({}));
        assert_eq!(s.namespace("ipc"), Some("/ns/ipc"));
        assert_eq!(s.namespace("pid"), Some(""));
        assert_eq!(s.namespace("user"), None);
    }

    #[test]
    fn a_wrong_type_is_named_by_its_pointer() {
        let e = Spec::parse(br#"{"linux":{"namespaces":{}}}"#).unwrap_err().to_string();
        assert!(e.contains("/linux/namespaces"), "{e}");
        assert!(Spec::parse(b"[]").is_err());
        assert!(Spec::parse(b"{").is_err());
    }

    #[test]
    fn a_wrong_entry_of_a_list_is_named_too() {
        for (text, pointer) in [
            (&br#"{"mounts":[{},7]}"#[..], "/mounts/1"),
            (br#"{"linux":{"namespaces":[{"type":1}]}}"#, "/linux/namespaces/0/type"),
        ] {
            let e = Spec::parse(text).unwrap_err().to_string();
            assert!(e.contains(pointer), "{e}");
        }
    }

    #[test]
    fn a_process_has_the_terminal_that_was_asked_for_whatever_the_bundle_says() {
        let parse = |text: &str| Spec::parse(text.as_bytes()).unwrap();
        let size = r#"{"process":{"consoleSize":{"width":1,"height":2}}}"#;
        let mut spec = parse(size);
        spec.set_terminal(true);
        assert_eq!(spec.get("/process/terminal"), Some(&json!(true)));
        assert_eq!(spec.get("/process/consoleSize/width"), Some(&json!(1)));
        spec.set_terminal(false);
        assert_eq!(spec.process(), json!({ "terminal": false }).as_object());
        let mut process = Map::new();
        set_terminal(&mut process, true, Some((80, 24)));
        let wanted = json!({ "terminal": true, "consoleSize": { "width": 80, "height": 24 } });
        assert_eq!(Value::Object(process), wanted);
        // What is missing is refused by whoever needs it.
        let mut none = parse("{}");
        none.set_terminal(true);
        assert_eq!(none.process(), None);
    }

    #[test]
    fn values_are_set_and_removed_by_pointer() {
        let mut s = Spec::parse(TEXT.as_bytes()).unwrap();
        s.set("/linux/sysctl/net.a~1b", json!("1")).unwrap();
        assert_eq!(s.get("/linux/sysctl").unwrap()["net.a/b"], "1");
        assert!(s.set("/hostname/x", json!(1)).unwrap_err().to_string().contains("/hostname"));
        assert_eq!(s.remove("/root/new"), Some(json!(1)));
        assert_eq!(s.remove("/hostname"), Some(json!("x")));
        assert_eq!(s.remove("/nothing/here"), None);
        s.remove_mount("/dev/shm");
        assert!(!s.has_mount("/dev/shm"));
        s.set_annotation("a", "b");
        assert_eq!(s.annotations().collect::<Vec<_>>(), [("a", "b")]);
    }

    #[test]
    fn deep_nesting_is_refused_and_does_not_overflow() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(matches!(Spec::parse(deep.as_bytes()), Err(Error::Invalid(_))));
    }
}
