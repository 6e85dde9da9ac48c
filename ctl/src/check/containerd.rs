//! containerd: its version, and whether its configuration and our daemons' sockets fit.

use std::collections::BTreeMap;
use std::path::Path;

use kuasar_daemon::diagnosis::{self, Containerd};
use toml::{Table, Value};

use super::{Finding, State};
use crate::daemons::Daemon;

const AREA: &str = "engines of pods";

/// What of containerd's configuration is about us.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Config {
    /// Proxy plugins of type `sandbox`: name and socket.
    pub proxies: BTreeMap<String, String>,
    /// Runtime handlers: name, type and sandboxer.
    pub runtimes: BTreeMap<String, (String, String)>,
    /// Handlers with a table of options.
    pub with_options: Vec<String>,
    /// Format of the file.
    pub version: i64,
}

/// Reads containerd's configuration; `Ok` of nothing when there is none.
///
/// # Errors
/// A text on one line.
pub fn read(path: &Path) -> Result<Option<Config>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    let mut table = parse(&text, path)?;
    // `imports` are read after the file, one pattern of names each.
    let imports = table.get("imports").and_then(Value::as_array).cloned().unwrap_or_default();
    for import in imports.iter().filter_map(Value::as_str) {
        let import = path.parent().unwrap_or(Path::new("/")).join(import);
        for file in matching(&import) {
            if let Ok(text) = std::fs::read_to_string(&file) {
                merge(&mut table, parse(&text, &file)?);
            }
        }
    }
    Ok(Some(config_of(&table)))
}

fn parse(text: &str, path: &Path) -> Result<Table, String> {
    text.parse().map_err(|e: toml::de::Error| {
        let words: Vec<&str> = e.message().split_whitespace().collect();
        format!("{}: {}", path.display(), words.join(" "))
    })
}

/// Files of `dir/*.toml`, or the one that is named.
fn matching(pattern: &Path) -> Vec<std::path::PathBuf> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(end) = name.strip_prefix('*') else { return vec![pattern.to_owned()] };
    let entries = std::fs::read_dir(pattern.parent().unwrap_or(Path::new("/")));
    let paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
    let mut all: Vec<_> = paths.filter(|p| p.to_string_lossy().ends_with(end)).collect();
    all.sort();
    all
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(a)), Value::Table(b)) => merge(a, b),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

fn config_of(table: &Table) -> Config {
    let text = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let mut config = Config {
        version: table.get("version").and_then(Value::as_integer).unwrap_or(1),
        ..Config::default()
    };
    for (name, proxy) in table.get("proxy_plugins").and_then(Value::as_table).into_iter().flatten()
    {
        if text(proxy, "type") == "sandbox" {
            config.proxies.insert(name.clone(), text(proxy, "address"));
        }
    }
    let plugins = table.get("plugins").and_then(Value::as_table);
    // Format 3, and formats 1 and 2.
    for plugin in ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"] {
        let runtimes = plugins.and_then(|p| p.get(plugin)?.get("containerd")?.get("runtimes"));
        for (name, runtime) in runtimes.and_then(Value::as_table).into_iter().flatten() {
            let sandboxer = [text(runtime, "sandboxer"), text(runtime, "sandbox_mode")];
            let sandboxer = sandboxer.into_iter().find(|s| !s.is_empty()).unwrap_or_default();
            config.runtimes.insert(name.clone(), (text(runtime, "runtime_type"), sandboxer));
            if runtime.get("options").and_then(Value::as_table).is_some_and(|o| !o.is_empty()) {
                config.with_options.push(name.clone());
            }
        }
    }
    config
}

/// The stanzas that a configuration lacks for these daemons, ready to be pasted.
pub fn stanzas(daemons: &[Daemon], config: Option<&Option<Config>>) -> String {
    let nothing = Config::default();
    let config = config.and_then(Option::as_ref).unwrap_or(&nothing);
    let mut out = String::new();
    for daemon in daemons.iter().filter(|daemon| !daemon.kind.is_empty()) {
        let name = format!("kuasar-{}", daemon.kind);
        let address = daemon.address.display().to_string();
        let proxy = config.proxies.iter().find(|(_, socket)| **socket == address);
        let plugin = proxy.map_or(name.clone(), |(plugin, _)| plugin.clone());
        if proxy.is_none() {
            out.push_str(&format!(
                "[proxy_plugins.{name}]\n  type = \"sandbox\"\n  address = \"{address}\"\n\n"
            ));
        }
        if !config.runtimes.values().any(|(_, sandboxer)| *sandboxer == plugin) {
            out.push_str(&format!(
                "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}]\n  \
                 runtime_type = \"io.containerd.{name}.v1\"\n  sandboxer = \"{plugin}\"\n\n"
            ));
        }
    }
    out
}

/// Everything about containerd.
pub async fn findings(
    daemons: &[Daemon],
    path: &Path,
    config: Result<Option<Config>, String>,
) -> Vec<Finding> {
    let mut all = vec![version().await];
    all.extend(configuration(daemons, path, config));
    all
}

async fn version() -> Finding {
    let what = "containerd";
    match diagnosis::installed_containerd().await {
        None => {
            let remedy = "apt install containerd (2.1 or later)";
            Finding::other(State::Warning, AREA, what, "not in PATH", remedy)
        }
        Some(Containerd::Good(version)) => Finding::good(AREA, what, version),
        Some(Containerd::Limited(p)) => {
            Finding::other(State::Warning, AREA, what, p.detail, p.remedy)
        }
        Some(Containerd::TooOld(problem)) => Finding::bad(AREA, what, problem),
    }
}

fn configuration(
    daemons: &[Daemon],
    path: &Path,
    config: Result<Option<Config>, String>,
) -> Vec<Finding> {
    let what = path.display().to_string();
    let fix = "kuasar-ctl check --fix, paste what it prints, systemctl restart containerd";
    let config = match config {
        Ok(Some(config)) => config,
        Ok(None) => {
            let installed = kuasar_host::process::find_program(Path::new("containerd")).is_some();
            let state = if installed { State::Warning } else { State::Absent };
            return vec![Finding::other(state, AREA, what, "there is none", fix)];
        }
        Err(why) => {
            return vec![Finding::other(State::Bad, AREA, what, why, "correct the file")];
        }
    };
    let mut all = Vec::new();
    let mut shims = std::collections::BTreeSet::new();
    let mut say = |state, detail: String, remedy: &str| {
        all.push(Finding::other(state, AREA, what.clone(), detail, remedy));
    };
    for (plugin, socket) in &config.proxies {
        if plugin.starts_with("kuasar") && !served(Path::new(socket)) {
            say(
                State::Bad,
                format!("proxy plugin {plugin} names {socket}, where nobody listens"),
                "set its address to the daemon's listen, or start the daemon",
            );
        }
    }
    for (name, (kind, sandboxer)) in &config.runtimes {
        let proxied = config.proxies.contains_key(sandboxer);
        if sandboxer.starts_with("kuasar") && !proxied {
            say(
                State::Bad,
                format!("runtime {name} has sandboxer {sandboxer:?}, which is no proxy plugin"),
                fix,
            );
        }
        let ours = kind.starts_with("io.containerd.kuasar-");
        if ours && sandboxer.is_empty() {
            say(
                State::Warning,
                format!(
                    "runtime {name} has no sandboxer: pods run as plain CRI has them, without \
                     user namespaces and each with a process for its PID namespace"
                ),
                "add sandboxer = \"kuasar-<kind>\" (or \"shim\") to it",
            );
        }
        if ours && config.with_options.contains(name) {
            say(
                State::Bad,
                format!("runtime {name} has options, which containerd 2.1 cannot pass to {kind}"),
                "remove its options table",
            );
        }
        if let Some(shim) = shim_of(kind).filter(|_| ours)
            && crate::config::program(&shim).is_none()
        {
            shims.insert(shim);
        }
    }
    for shim in shims {
        say(
            State::Bad,
            format!("{shim} is not in PATH: a restart of containerd loses containers"),
            "make install",
        );
    }
    for daemon in daemons.iter().filter(|d| !d.kind.is_empty()) {
        let address = daemon.address.display().to_string();
        let plugin = config.proxies.iter().find(|(_, socket)| **socket == address);
        match plugin {
            None => say(State::Warning, format!("it has no proxy plugin for {address}"), fix),
            Some((plugin, _)) => {
                if config.runtimes.values().any(|(_, sandboxer)| sandboxer == plugin) {
                    say(State::Good, format!("{plugin} is used"), "");
                } else {
                    say(State::Warning, format!("no runtime uses the proxy plugin {plugin}"), fix);
                }
            }
        }
    }
    all
}

/// Whether somebody listens there; what cannot be told counts as yes.
pub(super) fn served(socket: &Path) -> bool {
    kuasar_host::socket::is_served(socket).unwrap_or(true)
}

/// `io.containerd.kuasar-runc.v1` is looked up as `containerd-shim-kuasar-runc-v1`.
pub(super) fn shim_of(kind: &str) -> Option<String> {
    let rest = kind.strip_prefix("io.containerd.")?;
    let (name, version) = rest.rsplit_once('.')?;
    Some(format!("containerd-shim-{name}-{version}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "version = 3\n[proxy_plugins.kuasar-runc]\ntype = 'sandbox'\n\
        address = '/run/kuasar-runc/sandboxer.sock'\n\
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kuasar-runc]\n\
        runtime_type = 'io.containerd.kuasar-runc.v1'\nsandboxer = 'kuasar-runc'\n";

    fn runc() -> Vec<Daemon> {
        vec![crate::daemons::of_kind("runc", Path::new("/nowhere"))]
    }

    fn of(text: &str) -> Config {
        config_of(&text.parse().unwrap())
    }

    #[test]
    fn what_is_pasted_is_what_was_missing() {
        let daemons = runc();
        let text = stanzas(&daemons, None);
        let pasted = of(&text);
        assert_eq!(stanzas(&daemons, Some(&Some(pasted))), "");
        assert_eq!(stanzas(&daemons, Some(&Some(of(GOOD)))), "");
        let half = GOOD.split("[plugins").next().unwrap();
        let rest = stanzas(&daemons, Some(&Some(of(half))));
        assert!(rest.starts_with("[plugins.") && !rest.contains("proxy_plugins"), "{rest}");
    }

    #[test]
    fn what_does_not_fit_is_bad_and_says_so_once() {
        let path = Path::new("/c.toml");
        let bad = |text: &str| -> Vec<String> {
            let all = configuration(&runc(), path, Ok(Some(of(text))));
            all.into_iter()
                .filter(|f| f.state == State::Bad && !f.detail.contains("is not in PATH"))
                .filter(|f| !f.detail.contains("/run/kuasar-runc/sandboxer.sock, where nobody"))
                .map(|f| f.detail)
                .collect()
        };
        assert_eq!(bad(GOOD), Vec::<String>::new());
        let other = GOOD.replace("/run/kuasar-runc/sandboxer.sock", "/nowhere/runc-sandboxer.sock");
        assert!(bad(&other)[0].contains("nobody listens"));
        let typo = GOOD.replace("sandboxer = 'kuasar-runc'", "sandboxer = 'kuasar-rnc'");
        assert!(bad(&typo)[0].contains("is no proxy plugin"));
        let none = GOOD.replace("sandboxer = 'kuasar-runc'\n", "");
        assert_eq!(bad(&none), Vec::<String>::new());
        let all = configuration(&runc(), path, Ok(Some(of(&none))));
        let told = all.iter().any(|f| {
            f.state == State::Warning && f.detail.contains("runtime kuasar-runc has no sandboxer")
        });
        assert!(told, "{all:?}");
        let options = format!(
            "{GOOD}[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kuasar-runc.options]\na = 1\n"
        );
        assert!(bad(&options)[0].contains("remove") || bad(&options)[0].contains("options"));
        assert!(matches!(read(Path::new("/nowhere/c.toml")), Ok(None)));
    }

    #[test]
    fn imports_are_read_after_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        std::fs::write(&main, "version = 3\nimports = ['conf.d/*.toml']\n").unwrap();
        std::fs::write(dir.path().join("conf.d/k.toml"), GOOD).unwrap();
        assert_eq!(read(&main).unwrap().unwrap().proxies.len(), 1);
        std::fs::write(&main, "x = [").unwrap();
        assert!(!read(&main).unwrap_err().contains('\n'));
    }
}
