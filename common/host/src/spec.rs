//! Lossless edits of an OCI runtime spec.
//!
//! The spec stays the JSON value that it came as, so fields that this program has never heard of
//! reach the engine unchanged. (A typed spec that is parsed and written again drops them; upstream
//! lost `unified`, time offsets and id-mapped mounts that way.)

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{Context, Error, Result};

/// Largest spec that is read, in bytes.
pub const MAX_SPEC: u64 = 8 << 20;

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
        let context = || format!("cannot read {}", path.display());
        let mut text = Vec::new();
        let file = std::fs::File::open(path).context(context)?;
        file.take(MAX_SPEC + 1).read_to_end(&mut text).context(context)?;
        if text.len() as u64 > MAX_SPEC {
            return Err(Error::Invalid(format!(
                "{} is larger than {MAX_SPEC} bytes",
                path.display()
            )));
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
        Ok(spec)
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
        self.object("root").insert("path".into(), json!(path));
    }

    /// Sets `hostname`; an empty one removes it.
    pub fn set_hostname(&mut self, name: &str) {
        if name.is_empty() {
            self.0.remove("hostname");
        } else {
            self.0.insert("hostname".into(), json!(name));
        }
    }

    fn object(&mut self, key: &str) -> &mut Map<String, Value> {
        let slot = self.0.entry(key).or_insert(Value::Null);
        as_object(slot)
    }

    fn namespaces(&mut self) -> &mut Vec<Value> {
        as_array(self.object("linux").entry("namespaces").or_insert(Value::Null))
    }

    fn mounts(&mut self) -> &mut Vec<Value> {
        as_array(self.0.entry("mounts").or_insert(Value::Null))
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
        self.namespaces().push(ns);
    }

    /// Unlists the namespace: the container stays in the engine's.
    pub fn remove_namespace(&mut self, kind: &str) {
        self.namespaces().retain(|n| n.get("type").and_then(Value::as_str) != Some(kind));
    }

    /// The mount at a destination.
    pub fn mount(&self, destination: &str) -> Option<&Value> {
        let at = |m: &&Value| m.get("destination").and_then(Value::as_str) == Some(destination);
        self.get("/mounts")?.as_array()?.iter().find(at)
    }

    /// Adds a mount behind the others.
    pub fn add_mount(&mut self, kind: &str, source: &str, destination: &str, options: &[&str]) {
        self.mounts().push(json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        }));
    }

    /// Puts another mount in place of the one at `destination`, or adds it.
    pub fn replace_mount(&mut self, kind: &str, source: &str, destination: &str, options: &[&str]) {
        let new = json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        });
        let at = |m: &Value| m.get("destination").and_then(Value::as_str) == Some(destination);
        match self.mounts().iter_mut().find(|m| at(m)) {
            Some(m) => *m = new,
            None => self.mounts().push(new),
        }
    }

    /// Mutable access for edits that have no method of their own.
    pub fn value_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.0
    }
}

fn as_object(v: &mut Value) -> &mut Map<String, Value> {
    if !v.is_object() {
        *v = Value::Object(Map::new());
    }
    match v {
        Value::Object(m) => m,
        // Made one above; an unreachable arm that needs no panic.
        _ => Box::leak(Box::new(Map::new())),
    }
}

fn as_array(v: &mut Value) -> &mut Vec<Value> {
    if !v.is_array() {
        *v = Value::Array(Vec::new());
    }
    match v {
        Value::Array(a) => a,
        // Made one above; an unreachable arm that needs no panic.
        _ => Box::leak(Box::new(Vec::new())),
    }
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
}
