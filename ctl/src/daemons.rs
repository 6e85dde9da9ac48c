//! Which daemons there are: from their configuration files, their defaults, or `--address`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Kinds of sandboxers.
pub const KINDS: [&str; 5] = ["runc", "vmm", "gvisor", "quark", "wasm"];

/// A daemon that may run here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Kind of sandbox; empty when only its address was given.
    pub kind: String,
    /// Its socket.
    pub address: PathBuf,
    /// Its state directory, as configured.
    pub dir: PathBuf,
    /// Its configuration file, when there is one.
    pub config: Option<PathBuf>,
    /// What is wrong with that file.
    pub problem: Option<String>,
}

/// The daemon of a kind, as its file below `config_dir` says, or by default.
pub fn of_kind(kind: &str, config_dir: &Path) -> Daemon {
    let file = config_dir.join(format!("{kind}-sandboxer.toml"));
    let config = file.is_file().then_some(file);
    let (table, problem) = match kuasar_daemon::config::table(config.as_deref()) {
        Ok(table) => (table, None),
        Err(error) => (toml::Table::new(), Some(crate::config::explain(&error))),
    };
    let path = |key: &str| table.get(key).and_then(toml::Value::as_str).map(PathBuf::from);
    let dir = path("dir").unwrap_or_else(|| format!("/run/kuasar-{kind}").into());
    let address = path("listen").unwrap_or_else(|| dir.join("sandboxer.sock"));
    Daemon { kind: kind.into(), address, dir, config, problem }
}

/// All daemons that are configured or whose socket is there; with `addresses`
/// (`[KIND=]PATH`), these instead; with `kind`, that one alone.
///
/// # Errors
/// [`Error::Usage`] for a kind that there is not.
pub fn find(config_dir: &Path, addresses: &[String], kind: Option<&str>) -> Result<Vec<Daemon>> {
    if let Some(kind) = kind
        && !KINDS.contains(&kind)
        && addresses.is_empty()
    {
        let all = KINDS.join(", ");
        return Err(Error::Usage(format!("{kind:?} is no sandboxer: say one of {all}")));
    }
    let wanted =
        |daemon: &Daemon| kind.is_none_or(|kind| daemon.kind.is_empty() || daemon.kind == kind);
    if !addresses.is_empty() {
        let all = addresses.iter().map(|text| given(text));
        return Ok(all.filter(wanted).collect());
    }
    let all = KINDS.iter().map(|kind| of_kind(kind, config_dir)).filter(wanted);
    Ok(all
        .filter(|daemon| kind.is_some() || daemon.config.is_some() || daemon.address.exists())
        .collect())
}

fn given(text: &str) -> Daemon {
    let (kind, path) = match text.split_once('=') {
        Some((kind, path)) if !kind.contains('/') => (kind, path),
        _ => ("", text),
    };
    let address = PathBuf::from(path.strip_prefix("unix://").unwrap_or(path));
    Daemon {
        kind: kind.into(),
        dir: address.parent().unwrap_or(Path::new("/")).to_owned(),
        address,
        config: None,
        problem: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_come_from_the_file_its_drop_ins_or_the_default() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        std::fs::write(dir.path().join("runc-sandboxer.toml"), "dir = '/run/x'").unwrap();
        std::fs::write(dir.path().join("vmm-sandboxer.toml"), "listen = [").unwrap();
        let all = find(dir.path(), &[], None).unwrap();
        let kinds: Vec<&str> = all.iter().map(|d| d.kind.as_str()).collect();
        assert_eq!(kinds[..2], ["runc", "vmm"]);
        assert_eq!(all[0].address, Path::new("/run/x/sandboxer.sock"));
        assert!(all[1].problem.as_ref().unwrap().contains("vmm-sandboxer.toml"));
        std::fs::write(dir.path().join("conf.d/1.toml"), "listen = '/run/y.sock'").unwrap();
        let one = find(dir.path(), &[], Some("runc")).unwrap();
        assert_eq!(one[0].address, Path::new("/run/y.sock"));
        assert!(matches!(find(dir.path(), &[], Some("rnc")), Err(Error::Usage(_))));
    }

    #[test]
    fn addresses_replace_what_is_configured() {
        let all =
            find(Path::new("/nowhere"), &["wasm=unix:///a".into(), "/b=c".into()], None).unwrap();
        assert_eq!((all[0].kind.as_str(), all[0].address.as_path()), ("wasm", Path::new("/a")));
        assert_eq!((all[1].kind.as_str(), all[1].address.as_path()), ("", Path::new("/b=c")));
    }
}
