//! What a container's bundle, which its engine has made, says of it.

use std::path::Path;

use kuasar_protos::admin::Container;
use serde_json::Value;

use crate::error::{Error, Result};

/// Largest `config.json` that is read, in bytes.
const MOST: u64 = 8 << 20;

/// The OCI spec of a container.
///
/// # Errors
/// When it cannot be read.
pub fn spec(container: &Container) -> Result<Value> {
    use std::io::Read;
    let path = Path::new(&container.bundle).join("config.json");
    let mut text = Vec::new();
    let file = std::fs::File::open(&path).map_err(Error::at("open", &path))?;
    file.take(MOST).read_to_end(&mut text).map_err(Error::at("read", &path))?;
    serde_json::from_slice(&text).map_err(|e| Error::Failed(format!("{}: {e}", path.display())))
}

/// A container's name in its pod, as CRI's engines annotate it.
pub fn name(container: &Container) -> Option<String> {
    let spec = spec(container).ok()?;
    let name = spec.get("annotations")?.get("io.kubernetes.cri.container-name")?;
    name.as_str().map(str::to_owned)
}

/// The process of a new exec: the container's own with other arguments.
///
/// # Errors
/// When the bundle has none.
pub fn process(
    container: &Container,
    args: &[String],
    terminal: bool,
    env: &[String],
    cwd: Option<&str>,
    user: Option<(u32, u32)>,
) -> Result<Value> {
    let spec = spec(container)?;
    let Some(mut process) = spec.get("process").cloned() else {
        return Err(Error::Failed(format!("{}: no process", container.bundle)));
    };
    let Some(members) = process.as_object_mut() else {
        return Err(Error::Failed(format!("{}: process is no object", container.bundle)));
    };
    members.insert("args".into(), args.into());
    members.insert("terminal".into(), terminal.into());
    members.remove("consoleSize");
    members.remove("commandLine");
    if let Some(cwd) = cwd {
        members.insert("cwd".into(), cwd.into());
    }
    if let Some((uid, gid)) = user {
        members.insert("user".into(), serde_json::json!({ "uid": uid, "gid": gid }));
    }
    let all = members.entry("env").or_insert_with(|| Value::Array(Vec::new()));
    if let Some(all) = all.as_array_mut() {
        let given = env.iter().cloned();
        let term = (terminal && !env.iter().any(|e| e.starts_with("TERM=")))
            .then(|| format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".into())));
        all.extend(given.chain(term).map(Value::String));
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_is_the_containers_process_with_other_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "process": { "args": ["a"], "env": ["A=1"], "cwd": "/x", "user": { "uid": 3 } },
            "annotations": { "io.kubernetes.cri.container-name": "web" },
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bundle = dir.path().display().to_string();
        let container = Container { bundle, ..Default::default() };
        assert_eq!(name(&container).as_deref(), Some("web"));
        let p = process(&container, &["b".into()], false, &["B=2".into()], None, None).unwrap();
        assert_eq!(p["args"], serde_json::json!(["b"]));
        assert_eq!(p["env"], serde_json::json!(["A=1", "B=2"]));
        assert_eq!((&p["cwd"], &p["user"]["uid"]), (&"/x".into(), &3.into()));
        let p = process(&container, &[], true, &[], Some("/"), Some((1, 2))).unwrap();
        assert_eq!((&p["cwd"], &p["user"]["gid"]), (&"/".into(), &2.into()));
        assert!(p["env"][1].as_str().unwrap().starts_with("TERM="));
    }
}
