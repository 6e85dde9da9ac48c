//! Configuration files.
//!
//! A file and the drop-ins `conf.d/*.toml` beside it, in the order of their names, are merged
//! table by table, the last one wins. A key that nobody knows is an error that names the nearest
//! one: a misspelt limit must not be silently without effect.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

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
    #[error("unknown key `{key}`{}", nearest.as_ref().map(|n| format!(": did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The key.
        key: String,
        /// The nearest known one.
        nearest: Option<String>,
    },
}

/// Reads `file` (which must exist) and the drop-ins beside it; without a file the defaults.
///
/// # Errors
/// See [`ConfigError`].
pub fn load<T: DeserializeOwned>(file: Option<&Path>) -> Result<T, ConfigError> {
    let mut merged = toml::Table::new();
    let mut names = Vec::new();
    if let Some(file) = file {
        let mut files = vec![file.to_owned()];
        let drop_ins = file.parent().unwrap_or(Path::new(".")).join("conf.d");
        let mut more: Vec<PathBuf> = std::fs::read_dir(drop_ins)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "toml"))
            .collect();
        more.sort();
        files.extend(more);
        for path in files {
            let text = std::fs::read_to_string(&path)
                .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
                ConfigError::Syntax { path: path.display().to_string(), message: e.to_string() }
            })?;
            merge(&mut merged, table);
            names.push(path.display().to_string());
        }
    }
    T::deserialize(toml::Value::Table(merged)).map_err(|e| explain(&e, &names.join(", ")))
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
fn explain(e: &toml::de::Error, files: &str) -> ConfigError {
    let message = e.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field")
        && let Some(key) = quoted.next()
    {
        let nearest = quoted
            .map(|candidate| (distance(key, candidate), candidate))
            .min()
            .filter(|(d, candidate)| *d <= candidate.len().max(3) / 2)
            .map(|(_, candidate)| candidate.to_owned());
        return ConfigError::UnknownKey { key: key.into(), nearest };
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
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        let main = dir.path().join("c.toml");
        std::fs::write(&main, "log_level = 'info'\n[engines]\na = '1'\nb = '2'\n").unwrap();
        std::fs::write(dir.path().join("conf.d/20.toml"), "[engines]\nb = '4'\n").unwrap();
        std::fs::write(dir.path().join("conf.d/10.toml"), "[engines]\nb = '3'\n").unwrap();
        let c: Conf = load(Some(&main)).unwrap();
        assert_eq!(c.log_level, "info");
        assert_eq!((c.engines["a"].as_str(), c.engines["b"].as_str()), ("1", "4"));
        assert_eq!(load::<Conf>(None).unwrap(), Conf::default());
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("c.toml");
        std::fs::write(&main, "shm_sise = 1").unwrap();
        let e = load::<Conf>(Some(&main)).unwrap_err().to_string();
        assert_eq!(e, "unknown key `shm_sise`: did you mean `shm_size`?");
        std::fs::write(&main, "shm_size = 'x'").unwrap();
        assert!(load::<Conf>(Some(&main)).unwrap_err().to_string().contains("c.toml"));
    }
}
