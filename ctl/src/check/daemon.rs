//! Our daemons: configuration, directories and sockets, and whether they answer.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use kuasar_daemon::diagnosis;

use super::{Finding, State};
use crate::client::Client;
use crate::daemons::Daemon;
use crate::error::Error;

const AREA: &str = "sandboxers";

/// Everything about these daemons.
pub async fn findings(daemons: &[Daemon]) -> Vec<Finding> {
    let mut all = Vec::new();
    if daemons.is_empty() {
        let detail = "none is configured or running";
        let remedy = "make install, then systemctl enable --now kuasar-runc";
        all.push(Finding::other(State::Warning, AREA, "/etc/kuasar", detail, remedy));
    }
    all.extend(shared(daemons));
    for daemon in daemons {
        all.extend(one(daemon).await);
    }
    all
}

/// Two daemons that would serve one socket, or use one directory.
fn shared(daemons: &[Daemon]) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut users: BTreeMap<(&str, &Path), Vec<&str>> = BTreeMap::new();
    for daemon in daemons {
        users.entry(("listen", &daemon.address)).or_default().push(&daemon.kind);
        if daemon.config.is_some() {
            users.entry(("dir", &daemon.dir)).or_default().push(&daemon.kind);
        }
    }
    for ((key, path), kinds) in users.into_iter().filter(|(_, kinds)| kinds.len() > 1) {
        let problem = match key {
            "listen" => diagnosis::served_by_another(path),
            _ => diagnosis::used_by_another(path),
        };
        all.push(Finding::bad(AREA, kinds.join(" and "), problem));
    }
    all
}

fn permissions(path: &Path, what: &str, mode: u32) -> Option<Finding> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let shown = path.display().to_string();
    let found = meta.permissions().mode() & 0o777;
    let foreign = || diagnosis::owned_by_another(what, path, 0);
    let foreign = nix::unistd::geteuid().is_root().then(foreign).flatten();
    if let Some(problem) = diagnosis::open_to_others(what, path, mode).or(foreign) {
        return Some(Finding::bad(AREA, shown, problem));
    }
    Some(Finding::good(AREA, shown, format!("{what}, mode {found:04o}")))
}

async fn one(daemon: &Daemon) -> Vec<Finding> {
    let name = match daemon.kind.as_str() {
        "" => daemon.address.display().to_string(),
        kind => format!("{kind}-sandboxer"),
    };
    let mut all = Vec::new();
    if let Some(file) = &daemon.config {
        let shown = file.display().to_string();
        match crate::config::verdict(daemon).await {
            Ok(verdict) => {
                match &verdict.problem {
                    None => {
                        all.push(Finding::good(AREA, shown.clone(), "the configuration is good"))
                    }
                    // In the daemon's own words, which say what to do.
                    Some(problem) => {
                        all.push(Finding::other(State::Bad, AREA, name.clone(), problem, ""));
                    }
                }
                for warning in verdict.warnings {
                    all.push(Finding::other(State::Warning, AREA, name.clone(), warning, ""));
                }
            }
            Err(error) => {
                let detail = error.to_string();
                all.push(Finding::other(State::Bad, AREA, shown, detail, "reinstall the program"));
            }
        }
    }
    if daemon.config.is_some() {
        all.extend(permissions(&daemon.dir, "state directory", 0o700));
    }
    let unit = [
        "/etc/systemd/system",
        "/usr/local/lib/systemd/system",
        "/usr/lib/systemd/system",
        "/lib/systemd/system",
    ]
    .iter()
    .map(|dir| Path::new(dir).join(format!("kuasar-{}.service", daemon.kind)))
    .find(|path| path.is_file());
    if !daemon.kind.is_empty() {
        all.push(match unit {
            Some(path) => Finding::good(
                AREA,
                format!("kuasar-{}.service", daemon.kind),
                path.display().to_string(),
            ),
            None => Finding::other(
                State::Absent,
                AREA,
                format!("kuasar-{}.service", daemon.kind),
                "no unit is installed",
                "make install, where the host has systemd",
            ),
        });
    }
    match Client::dial(daemon, Duration::from_secs(5)).await {
        Ok(client) => {
            all.extend(permissions(&daemon.address, "socket", 0o600));
            let info = &client.info;
            if daemon.config.is_none() {
                all.extend(permissions(Path::new(&info.dir), "state directory", 0o700));
            }
            let detail = format!("version {} answers, {} pods", info.version, info.sandboxes);
            all.push(Finding::good(AREA, name.clone(), detail));
            if !daemon.kind.is_empty() && daemon.kind != client.kind {
                let problem = diagnosis::served_by_another(&daemon.address);
                all.push(Finding::bad(AREA, name.clone(), problem));
            }
            if info.version != env!("CARGO_PKG_VERSION") {
                let detail = format!(
                    "it is of version {}, this program of {}",
                    info.version,
                    env!("CARGO_PKG_VERSION")
                );
                let remedy = format!("systemctl restart kuasar-{}", client.kind);
                all.push(Finding::other(State::Warning, AREA, name.clone(), detail, remedy));
            }
            if !info.quarantined.is_empty() {
                let n = info.quarantined.len();
                let detail =
                    format!("{n} unreadable records are set aside in {}/quarantine", info.dir);
                let remedy = "look through them, then kuasar-ctl gc --quarantine";
                all.push(Finding::other(State::Warning, AREA, name, detail, remedy));
            }
        }
        Err(Error::Unreachable { why, .. }) => {
            let configured = daemon.config.is_some();
            let state = if configured { State::Bad } else { State::Absent };
            let detail = format!("does not answer at {}", daemon.address.display());
            all.push(Finding::other(state, AREA, name, detail, why));
        }
        Err(error) => {
            all.push(Finding::other(State::Bad, AREA, name, error.to_string(), "see its log"));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_daemons_on_one_socket_are_found() {
        let mut two =
            ["runc", "vmm"].map(|kind| crate::daemons::of_kind(kind, Path::new("/nowhere")));
        assert_eq!(shared(&two), []);
        two[1].address = two[0].address.clone();
        let found = shared(&two);
        assert_eq!((found.len(), found[0].state), (1, State::Bad));
        assert_eq!(found[0].what, "runc and vmm");
        assert!(found[0].detail.contains("another daemon serves /"), "{found:?}");
    }
}
