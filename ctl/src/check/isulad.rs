//! iSulad: whether its `daemon.json` and our daemons' sockets fit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::containerd::{served, shim_of};
use super::{Finding, State};
use crate::daemons::Daemon;

const AREA: &str = "engines of pods";

/// What of iSulad's configuration is about us.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Config {
    /// Whether it serves version 1 of CRI, without which it has no sandboxers.
    cri_v1: bool,
    /// Sandboxers by runtime handler: name and socket.
    sandboxers: BTreeMap<String, (String, String)>,
    /// Types by runtime handler.
    runtimes: BTreeMap<String, String>,
}

/// Reads iSulad's configuration; `Ok` of nothing when there is none.
///
/// # Errors
/// A text on one line.
pub fn read(path: &Path) -> Result<Option<Config>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    let value: Value =
        serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Some(config_of(&value)))
}

fn config_of(value: &Value) -> Config {
    let object = |key: &str| value.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
    let text = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let sandboxers = object("cri-sandboxers").into_iter();
    let runtimes = object("cri-runtimes").into_iter();
    Config {
        cri_v1: value.get("enable-cri-v1").and_then(Value::as_bool).unwrap_or(false),
        sandboxers: sandboxers
            .map(|(handler, one)| (handler, (text(&one, "name"), text(&one, "address"))))
            .collect(),
        runtimes: runtimes
            .map(|(handler, kind)| (handler, kind.as_str().unwrap_or_default().to_owned()))
            .collect(),
    }
}

/// What a configuration lacks for these daemons, to be merged into it; `None` when that is
/// nothing.
pub fn stanza(daemons: &[Daemon], config: Option<&Config>) -> Option<Value> {
    let nothing = Config::default();
    let config = config.unwrap_or(&nothing);
    let (mut sandboxers, mut runtimes) = (Map::new(), Map::new());
    for daemon in daemons.iter().filter(|daemon| !daemon.kind.is_empty()) {
        let name = format!("kuasar-{}", daemon.kind);
        let address = daemon.address.display().to_string();
        let known = config.sandboxers.iter().find(|(_, (_, socket))| *socket == address);
        if known.is_none() {
            sandboxers.insert(name.clone(), json!({ "name": name, "address": address }));
        }
        let handler = known.map_or(&name, |(handler, _)| handler);
        if !config.runtimes.contains_key(handler) {
            runtimes.insert(handler.clone(), json!(format!("io.containerd.{name}.v1")));
        }
    }
    let mut all = Map::new();
    if !config.cri_v1 && !daemons.is_empty() {
        all.insert("enable-cri-v1".into(), json!(true));
    }
    for (key, part) in [("cri-sandboxers", sandboxers), ("cri-runtimes", runtimes)] {
        if !part.is_empty() {
            all.insert(key.into(), Value::Object(part));
        }
    }
    (!all.is_empty()).then_some(Value::Object(all))
}

/// Whether iSulad is here.
pub fn is_installed() -> bool {
    kuasar_host::process::find_program(Path::new("isulad")).is_some()
}

/// Everything about iSulad.
pub fn findings(
    daemons: &[Daemon],
    path: &Path,
    config: Result<Option<Config>, String>,
) -> Vec<Finding> {
    let program = match kuasar_host::process::find_program(Path::new("isulad")) {
        Some(path) => Finding::good(AREA, "iSulad", path.display().to_string()),
        None => Finding::other(
            State::Absent,
            AREA,
            "iSulad",
            "not in PATH",
            "install iSulad, if it is wanted",
        ),
    };
    let mut all = vec![program];
    all.extend(configuration(daemons, path, config));
    all
}

fn configuration(
    daemons: &[Daemon],
    path: &Path,
    config: Result<Option<Config>, String>,
) -> Vec<Finding> {
    let what = path.display().to_string();
    let fix = "kuasar-ctl check --fix, merge what it prints into it, systemctl restart isulad";
    let config = match config {
        Ok(Some(config)) => config,
        Ok(None) if is_installed() => {
            return vec![Finding::other(State::Warning, AREA, what, "there is none", fix)];
        }
        // Nobody misses it.
        Ok(None) => return Vec::new(),
        Err(why) => {
            return vec![Finding::other(State::Bad, AREA, what, why, "correct the file")];
        }
    };
    let mut all = Vec::new();
    let mut say = |state, detail: String, remedy: &str| {
        all.push(Finding::other(state, AREA, what.clone(), detail, remedy));
    };
    let address = |daemon: &Daemon| daemon.address.display().to_string();
    let ours = |text: &str| text.starts_with("kuasar") || text.starts_with("io.containerd.kuasar-");
    let mut shims = BTreeSet::new();
    for (handler, (name, socket)) in &config.sandboxers {
        let known = daemons.iter().any(|daemon| address(daemon) == *socket);
        if !known && !ours(name) && !ours(handler) {
            continue;
        }
        if name.is_empty() || socket.is_empty() {
            let lacks = if name.is_empty() { "name" } else { "address" };
            say(State::Bad, format!("cri-sandboxers.{handler} has no {lacks}"), fix);
        } else if !served(Path::new(socket)) {
            say(
                State::Bad,
                format!("cri-sandboxers.{handler} names {socket}, where nobody listens"),
                "set its address to the daemon's listen, or start the daemon",
            );
        }
        if config.runtimes.get(handler).is_none_or(String::is_empty) {
            say(
                State::Bad,
                format!("handler {handler} has a sandboxer, and no type in cri-runtimes"),
                fix,
            );
        }
        if !config.cri_v1 {
            say(
                State::Bad,
                format!("enable-cri-v1 is not true: cri-sandboxers.{handler} is not heeded"),
                fix,
            );
        }
    }
    for (handler, kind) in config.runtimes.iter().filter(|(_, kind)| ours(kind)) {
        if !config.sandboxers.contains_key(handler) {
            say(
                State::Bad,
                format!("handler {handler} is a {kind}, and has no sandboxer in cri-sandboxers"),
                fix,
            );
        }
        match shim_of(kind) {
            Some(shim) if crate::config::program(&shim).is_none() => drop(shims.insert(shim)),
            Some(_) => {}
            None => say(
                State::Bad,
                format!("cri-runtimes.{handler} is {kind:?}, in which the version is missing"),
                "write it as io.containerd.kuasar-<kind>.v1",
            ),
        }
    }
    for shim in shims {
        say(
            State::Bad,
            format!("{shim} is not in PATH: iSulad looks for it before it starts a pod"),
            "make install",
        );
    }
    for daemon in daemons.iter().filter(|daemon| !daemon.kind.is_empty()) {
        let address = address(daemon);
        match config.sandboxers.iter().find(|(_, (_, socket))| *socket == address) {
            Some((handler, _)) => say(State::Good, format!("handler {handler} is {address}"), ""),
            None => say(State::Warning, format!("no handler for {address}"), fix),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemons() -> Vec<Daemon> {
        vec![crate::daemons::of_kind("vmm", Path::new("/nowhere"))]
    }

    fn good() -> Value {
        json!({
            "group": "isula",
            "enable-cri-v1": true,
            "cri-sandboxers": {
                "kuasar-vmm": { "name": "kuasar-vmm", "address": "/run/kuasar-vmm/sandboxer.sock" },
            },
            "cri-runtimes": { "kuasar-vmm": "io.containerd.kuasar-vmm.v1", "kata": "io.containerd.kata.v2" },
        })
    }

    /// Details of what is bad, but for what this host has not.
    fn bad(value: &Value) -> Vec<String> {
        let all = configuration(&daemons(), Path::new("/d.json"), Ok(Some(config_of(value))));
        all.into_iter()
            .filter(|f| f.state == State::Bad && !f.detail.contains("is not in PATH"))
            .filter(|f| !f.detail.contains("/run/kuasar-vmm/sandboxer.sock, where nobody"))
            .map(|f| f.detail)
            .collect()
    }

    #[test]
    fn what_is_merged_is_what_was_missing() {
        let daemons = daemons();
        let whole = stanza(&daemons, None).unwrap();
        assert_eq!(whole["cri-sandboxers"]["kuasar-vmm"], good()["cri-sandboxers"]["kuasar-vmm"]);
        assert_eq!(stanza(&daemons, Some(&config_of(&whole))), None);
        assert_eq!(stanza(&daemons, Some(&config_of(&good()))), None);
        // A handler of another name keeps it.
        let mut other = good();
        let one = other["cri-sandboxers"]["kuasar-vmm"].take();
        other["cri-sandboxers"] = json!({ "vm": one });
        let rest = stanza(&daemons, Some(&config_of(&other))).unwrap();
        assert_eq!(rest, json!({ "cri-runtimes": { "vm": "io.containerd.kuasar-vmm.v1" } }));
        assert_eq!(stanza(&[], Some(&Config::default())), None);
    }

    #[test]
    fn what_does_not_fit_is_bad_and_says_so_once() {
        assert_eq!(bad(&good()), Vec::<String>::new());
        let with = |change: &dyn Fn(&mut Value)| {
            let mut value = good();
            change(&mut value);
            bad(&value)
        };
        for (word, said) in [
            (
                "no sandboxer in cri-sandboxers",
                with(&|v| drop(v.as_object_mut().unwrap().remove("cri-sandboxers"))),
            ),
            (
                "no type in cri-runtimes",
                with(&|v| drop(v.as_object_mut().unwrap().remove("cri-runtimes"))),
            ),
            (
                "/nowhere/s.sock, where nobody listens",
                with(&|v| v["cri-sandboxers"]["kuasar-vmm"]["address"] = json!("/nowhere/s.sock")),
            ),
            ("has no name", with(&|v| v["cri-sandboxers"]["kuasar-vmm"]["name"] = json!(""))),
            (
                "has no address",
                with(&|v| v["cri-sandboxers"]["kuasar-vmm"] = json!({ "name": "kuasar-vmm" })),
            ),
            ("enable-cri-v1 is not true", with(&|v| v["enable-cri-v1"] = json!(false))),
            (
                "in which the version is missing",
                with(&|v| v["cri-runtimes"]["kuasar-vmm"] = json!("io.containerd.kuasar-vmm")),
            ),
        ] {
            assert_eq!(said.len(), 1, "{word}: {said:?}");
            assert!(said[0].contains(word), "{word}: {said:?}");
        }
        // What is another's is not ours to judge.
        let mut other = good();
        other["cri-sandboxers"]["other"] = json!({ "name": "x", "address": "/nowhere/x" });
        assert_eq!(bad(&other), Vec::<String>::new());
    }

    #[test]
    fn a_file_that_is_none_is_told_on_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("daemon.json");
        assert_eq!(read(&file), Ok(None));
        std::fs::write(&file, "{\n  \"group\": ,\n}").unwrap();
        let why = read(&file).unwrap_err();
        assert!(why.contains("daemon.json") && why.contains("line 2"), "{why}");
        assert!(!why.contains('\n'));
        let all = configuration(&daemons(), &file, Err(why));
        assert_eq!((all.len(), all[0].state), (1, State::Bad));
        std::fs::write(&file, good().to_string()).unwrap();
        assert_eq!(read(&file).unwrap().unwrap(), config_of(&good()));
    }
}
