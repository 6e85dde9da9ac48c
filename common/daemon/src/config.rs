//! Configuration files.
//!
//! A file, the drop-ins `conf.d/*.toml` beside it, which all daemons of the directory share, and its
//! own, `<file>.d/*.toml`, each in the order of their names, are merged table by table, the last one
//! wins. A key that nobody knows is an error that names the nearest
//! one: a misspelt limit must not be silently without effect.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::common::CommonConfig;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is no TOML, or a value has the wrong type.
    #[error("{path}: {message}")]
    Syntax {
        /// The file, or all files when the merged value is wrong.
        path: String,
        /// Line, column and reason.
        message: String,
    },
    /// An unknown key.
    #[error("{path}: unknown key `{key}`: {}", remedy(nearest.as_deref()))]
    UnknownKey {
        /// The file, with the line where it is known.
        path: String,
        /// The key.
        key: String,
        /// The nearest known one.
        nearest: Option<String>,
    },
    /// A file of upstream Kuasar's vmm-sandboxer.
    #[error(
        "{path}: `{key}` is of upstream Kuasar, and means nothing here: kuasar-ctl config migrate {file}"
    )]
    Upstream {
        /// The file, with the line where it is known.
        path: String,
        /// The table.
        key: String,
        /// The file alone.
        file: String,
    },
}

/// Tables that only upstream's files have at their top level.
const UPSTREAM: [&str; 2] = ["sandbox", "hypervisor"];

fn remedy(nearest: Option<&str>) -> String {
    match nearest {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => "no key is like it: remove it".into(),
    }
}

/// Reads `file` (which must exist) and the drop-ins beside it; without a file the defaults.
///
/// # Errors
/// See [`ConfigError`].
pub fn load<T: DeserializeOwned>(file: Option<&Path>) -> Result<T, ConfigError> {
    let files = read(file)?;
    for (path, text) in &files {
        check_alone::<T>(path, text, &[], false)?;
    }
    finish(merged(&files)?, &files)
}

/// As [`load`], for a configuration that has [`CommonConfig`]'s keys beside its own.
///
/// # Errors
/// See [`ConfigError`].
pub fn load_with_common<T: DeserializeOwned>(
    file: Option<&Path>,
) -> Result<(CommonConfig, T), ConfigError> {
    let files = read(file)?;
    for (path, text) in &files {
        check_alone::<CommonConfig>(path, text, &CommonConfig::KEYS, true)?;
        check_alone::<T>(path, text, &CommonConfig::KEYS, false)?;
    }
    let (mut common, mut own) = (toml::Table::new(), toml::Table::new());
    for (key, value) in merged(&files)? {
        let shared = CommonConfig::KEYS.contains(&key.as_str());
        if shared { &mut common } else { &mut own }.insert(key, value);
    }
    Ok((finish(common, &files)?, finish(own, &files)?))
}

/// As [`load_with_common`], and checked; `adopt` has the daemon's own part take what it needs of the common
/// keys before.
///
/// # Errors
/// A text that names file, line and key.
pub fn load_checked<T: DeserializeOwned>(
    file: Option<&Path>,
    adopt: impl FnOnce(&CommonConfig, &mut T),
    check: impl FnOnce(&T) -> Result<(), String>,
) -> Result<(CommonConfig, T), String> {
    let loaded = load_with_common::<T>(file);
    let (common, mut own) = loaded.map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })?;
    adopt(&common, &mut own);
    common.check().and_then(|()| check(&own)).map_err(|reason| {
        let file = file.map(|file| format!("{}: ", file.display())).unwrap_or_default();
        format!("{file}{reason}")
    })?;
    Ok((common, own))
}

/// What `file` and the drop-ins beside it say together, unchecked; nothing without a file.
///
/// # Errors
/// See [`ConfigError`]; unknown keys are none here.
pub fn table(file: Option<&Path>) -> Result<toml::Table, ConfigError> {
    merged(&read(file)?)
}

/// Paths and texts, in the order in which they count.
fn read(file: Option<&Path>) -> Result<Vec<(PathBuf, String)>, ConfigError> {
    let Some(file) = file else { return Ok(Vec::new()) };
    let mut paths = vec![file.to_owned()];
    let shared = file.parent().unwrap_or(Path::new(".")).join("conf.d");
    for drop_ins in [shared, file.with_added_extension("d")] {
        match std::fs::read_dir(&drop_ins) {
            Ok(entries) => {
                let path = |e: std::io::Result<std::fs::DirEntry>| Some(e.ok()?.path());
                let toml = |p: &PathBuf| p.extension().is_some_and(|e| e == "toml");
                let mut more: Vec<PathBuf> = entries.filter_map(path).filter(toml).collect();
                more.sort();
                paths.extend(more);
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(ConfigError::Read { path: drop_ins, source }),
        }
    }
    let text = |path: PathBuf| match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(source) => Err(ConfigError::Read { path, source }),
    };
    paths.into_iter().map(text).collect()
}

/// Checks one file alone, while lines are still known. `shared` keys are looked at only, or left
/// out, as `only` says. What is missing in one file may be in another.
fn check_alone<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    shared: &[&str],
    only: bool,
) -> Result<(), ConfigError> {
    let mut upstream = None;
    let mut checked = toml::de::DeTable::parse(text).map(|mut table| {
        let keys: Vec<String> = table.get_ref().keys().map(|k| k.get_ref().to_string()).collect();
        upstream = keys.iter().find(|k| UPSTREAM.contains(&k.as_str())).cloned();
        for key in keys.iter().filter(|k| shared.contains(&k.as_str()) != only) {
            table.get_mut().remove(key.as_str());
        }
        T::deserialize(toml::de::Deserializer::from(table))
    });
    let error = match &mut checked {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(e)) | Err(e) => e,
    };
    if error.message().starts_with("missing field") {
        return Ok(());
    }
    error.set_input(Some(text));
    let line = error.span().map(|s| 1 + text.get(..s.start).unwrap_or(text).matches('\n').count());
    let at = match line {
        Some(line) => format!("{}:{line}", path.display()),
        None => path.display().to_string(),
    };
    let error = explain(error, &at, if only { &[] } else { shared });
    match (error, upstream) {
        (ConfigError::UnknownKey { path: at, key, .. }, Some(table)) if key == table => {
            Err(ConfigError::Upstream { path: at, key, file: path.display().to_string() })
        }
        (error, _) => Err(error),
    }
}

fn merged(files: &[(PathBuf, String)]) -> Result<toml::Table, ConfigError> {
    let mut all = toml::Table::new();
    for (path, text) in files {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            ConfigError::Syntax { path: path.display().to_string(), message: e.to_string() }
        })?;
        merge(&mut all, table);
    }
    Ok(all)
}

fn finish<T: DeserializeOwned>(
    table: toml::Table,
    files: &[(PathBuf, String)],
) -> Result<T, ConfigError> {
    let names: Vec<String> = files.iter().map(|(p, _)| p.display().to_string()).collect();
    T::deserialize(toml::Value::Table(table)).map_err(|e| explain(&e, &names.join(", "), &[]))
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(a)), toml::Value::Table(b)) => merge(a, b),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// serde says ``unknown field `x`, expected one of `a`, `b` ``: the candidates are in the text.
fn explain(e: &toml::de::Error, files: &str, more: &[&str]) -> ConfigError {
    let message = e.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field")
        && let Some(key) = quoted.next()
    {
        let nearest = quoted
            .chain(more.iter().copied())
            .map(|candidate| (distance(key, candidate), candidate))
            .min()
            .filter(|(d, candidate)| *d <= candidate.len().max(3) / 2)
            .map(|(_, candidate)| candidate.to_owned());
        return ConfigError::UnknownKey { path: files.into(), key: key.into(), nearest };
    }
    ConfigError::Syntax { path: files.into(), message: e.to_string() }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (y, above) in b.iter().zip(row.iter().skip(1)) {
            let cost = if x == *y { diagonal } else { 1 + diagonal.min(left).min(*above) };
            diagonal = *above;
            left = cost;
            next.push(cost);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Conf {
        log_level: String,
        shm_size: u64,
        engines: std::collections::BTreeMap<String, String>,
    }

    #[test]
    fn drop_ins_are_merged_table_by_table() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("c.toml.d")).unwrap();
        let main = dir.path().join("c.toml");
        std::fs::write(&main, "log_level = 'info'\n[engines]\na = '1'\nb = '2'\n").unwrap();
        std::fs::write(dir.path().join("c.toml.d/20.toml"), "[engines]\nb = '4'\n").unwrap();
        std::fs::write(dir.path().join("c.toml.d/10.toml"), "[engines]\nb = '3'\n").unwrap();
        // What all daemons of the directory share counts less than what is one's own.
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        let shared = "log_level = 'debug'\n[engines]\nb = '5'\n";
        std::fs::write(dir.path().join("conf.d/90.toml"), shared).unwrap();
        let c: Conf = load(Some(&main)).unwrap();
        assert_eq!(c.log_level, "debug");
        assert_eq!((c.engines["a"].as_str(), c.engines["b"].as_str()), ("1", "4"));
        assert_eq!(load::<Conf>(None).unwrap(), Conf::default());
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("c.toml");
        std::fs::write(&main, "shm_sise = 1").unwrap();
        let e = load::<Conf>(Some(&main)).unwrap_err().to_string();
        assert!(e.ends_with("c.toml:1: unknown key `shm_sise`: did you mean `shm_size`?"), "{e}");
        std::fs::write(&main, "shm_size = 'x'").unwrap();
        assert!(load::<Conf>(Some(&main)).unwrap_err().to_string().contains("c.toml"));
    }

    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Own {
        shm_size: u64,
    }

    #[test]
    fn shared_settings_stand_beside_a_daemons_own() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("c.toml.d")).unwrap();
        let main = dir.path().join("c.toml");
        std::fs::write(&main, "shm_size = 1\n[limits]\nmax_connections = 5\n").unwrap();
        let drop_in = dir.path().join("c.toml.d/10.toml");
        std::fs::write(&drop_in, "[timeouts]\nhello = '3s'\n").unwrap();
        let (common, own): (_, Own) = load_with_common(Some(&main)).unwrap();
        assert_eq!(own.shm_size, 1);
        assert_eq!(common.limits.max_connections, 5);
        assert_eq!(common.timeouts.hello.as_secs(), 3);
        for (text, expected) in [
            ("\nlog_levl = 'x'", "10.toml:2: unknown key `log_levl`: did you mean `log_level`?"),
            ("shm_siz = 1", "10.toml:1: unknown key `shm_siz`: did you mean `shm_size`?"),
            ("[limits]\nmax_conections = 1", "did you mean `max_connections`?"),
            ("[timeouts]\nstop = '5'", "10.toml:2"),
            ("\n\nshm_size = 'x'", "10.toml:3"),
            ("x = [", "10.toml"),
            (
                "quite_unlike_all = 1",
                "10.toml:1: unknown key `quite_unlike_all`: no key is like it",
            ),
            (
                "[sandbox]\nlog_level = 'info'\n[hypervisor]\nvcpus = 1",
                "is of upstream Kuasar, and means nothing here: kuasar-ctl config migrate /",
            ),
        ] {
            std::fs::write(&drop_in, text).unwrap();
            let e = load_with_common::<Own>(Some(&main)).unwrap_err().to_string();
            assert!(e.contains(expected), "{text:?}: {e}");
        }
    }
}
