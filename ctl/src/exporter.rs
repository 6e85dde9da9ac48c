//! `metrics --listen`: one Prometheus endpoint for all daemons of a node.
//!
//! The daemons' own endpoints are unix sockets that only root can open, so that their metrics are
//! nobody's business by default. Prometheus reads TCP, and wants one address for a node: this program
//! asks the daemons, at each request and side by side, and answers with what all of them said.
//!
//! The hard part is that texts cannot simply be put one behind the other. The exposition format wants
//! the samples of one metric together, below one `TYPE` line, and no two samples of the same name and
//! labels. [`Families`] sorts them so, and gives every sample the label of its daemon.
//!
//! A daemon that does not answer within [`MetricsArgs::daemon_timeout`] holds up nobody: its
//! `kuasar_daemon_up` is 0, and the others' metrics are there.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use kuasar_daemon::metrics::Listener;

use crate::args::Wanted;
use crate::client::Client;
use crate::daemons::{self, Daemon};
use crate::error::{Error, Result};
use crate::{observe, output};

/// Whether a daemon answers.
const UP: &str = "kuasar_daemon_up";
/// First descriptor that a service manager hands over: sd_listen_fds(3).
const FIRST_FD: i32 = 3;
/// Most of them that are taken.
const MOST_FDS: i32 = 16;

/// What `metrics` does.
#[derive(Debug, Clone, clap::Args)]
pub struct MetricsArgs {
    /// Serve the metrics of all daemons in place of printing them: at ADDRESS:PORT, at the path of a
    /// unix socket, or at fd://, the sockets that systemd hands over. May be repeated
    #[arg(long, value_name = "WHERE")]
    pub listen: Vec<String>,
    /// Seconds that a daemon may take to answer one request of --listen. Shorter than Prometheus'
    /// scrape_timeout, which is 10
    #[arg(long, value_name = "SECONDS", default_value_t = 4)]
    pub daemon_timeout: u64,
}

/// The samples of several texts, by metric.
#[derive(Debug, Default)]
struct Families {
    all: BTreeMap<String, Family>,
}

#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    samples: Vec<String>,
}

/// Whether a sample belongs to a metric: histograms and summaries have samples of other names.
fn belongs(sample: &str, family: &str) -> bool {
    sample
        .strip_prefix(family)
        .is_some_and(|rest| matches!(rest, "" | "_bucket" | "_sum" | "_count"))
}

impl Families {
    /// Takes in the text of a daemon, whose samples get these labels when they lack them.
    fn add(&mut self, text: &str, labels: &[(&str, &str)]) {
        let mut current = String::new();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (word, name, rest) = (words.next(), words.next(), words.next());
                let (Some(word), Some(name), Some(rest)) = (word, name, rest) else { continue };
                let family = self.all.entry(name.to_owned()).or_default();
                match word {
                    "HELP" if family.help.is_empty() => rest.clone_into(&mut family.help),
                    "TYPE" if family.kind.is_empty() => rest.clone_into(&mut family.kind),
                    _ => {}
                }
                name.clone_into(&mut current);
                continue;
            }
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            let (name, rest) = line.split_at(end);
            if name.is_empty() || rest.is_empty() {
                continue;
            }
            if !belongs(name, &current) {
                name.clone_into(&mut current);
            }
            let family = self.all.entry(current.clone()).or_default();
            family.samples.push(format!("{name}{}", labelled(rest, labels)));
        }
    }

    /// The text of all.
    fn render(&self) -> String {
        let mut out = String::new();
        for (name, family) in self.all.iter().filter(|(_, family)| !family.samples.is_empty()) {
            // Writing to a String cannot fail.
            if !family.help.is_empty() {
                let _ = writeln!(out, "# HELP {name} {}", family.help);
            }
            if !family.kind.is_empty() {
                let _ = writeln!(out, "# TYPE {name} {}", family.kind);
            }
            for sample in &family.samples {
                let _ = writeln!(out, "{sample}");
            }
        }
        out
    }
}

/// What follows a sample's name, with these labels before the others.
fn labelled(rest: &str, labels: &[(&str, &str)]) -> String {
    let (inner, value) = match rest.strip_prefix('{').and_then(|rest| rest.rsplit_once('}')) {
        Some((inner, value)) => (inner, value),
        None => ("", rest),
    };
    let has = |name: &str| {
        let at = format!("{name}=\"");
        inner.starts_with(&at) || inner.contains(&format!(",{at}"))
    };
    let new = labels.iter().filter(|(name, _)| !has(name));
    let mut all: Vec<String> =
        new.map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    if !inner.is_empty() {
        all.push(inner.to_owned());
    }
    match all.is_empty() {
        true => value.to_owned(),
        false => format!("{{{}}}{value}", all.join(",")),
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Whether systemd starts this kind's daemon with the host.
fn enabled(kind: &str) -> bool {
    ["multi-user", "kuasar"].iter().any(|target| {
        let link = format!("/etc/systemd/system/{target}.target.wants/kuasar-{kind}.service");
        Path::new(&link).symlink_metadata().is_ok()
    })
}

/// The daemons that are to run here. A package that was installed brings a configuration; the daemon
/// counts when it was started since, or is started with the host, or when it was named.
fn expected(wanted: &Wanted) -> Result<Vec<Daemon>> {
    let kind = wanted.kind.as_deref();
    let named = kind.is_some() || !wanted.addresses.is_empty();
    let all = daemons::find(&wanted.config_dir, &wanted.addresses, kind)?;
    let counts = |daemon: &Daemon| named || daemon.address.exists() || enabled(&daemon.kind);
    Ok(all.into_iter().filter(counts).collect())
}

/// A daemon's kind and metrics. Without them when it does not answer, or serves none.
async fn asked(daemon: &Daemon, patience: Duration) -> (String, Option<String>) {
    let ask = async {
        let client = Client::dial(daemon, patience).await?;
        Ok::<_, Error>((client.kind.clone(), observe::metrics_of(&client).await?))
    };
    match tokio::time::timeout(patience, ask).await {
        Ok(Ok((kind, text))) => (kind, Some(text)),
        _ => (daemon.kind.clone(), None),
    }
}

/// The metrics of these daemons, in one text.
async fn collect(all: &[Daemon], patience: Duration) -> String {
    let answers = futures::future::join_all(all.iter().map(|daemon| asked(daemon, patience))).await;
    let mut families = Families::default();
    let help = "Whether the daemon has answered with its metrics.";
    families.add(&format!("# HELP {UP} {help}\n# TYPE {UP} gauge\n"), &[]);
    let kinds: Vec<String> = answers.iter().map(|(kind, _)| kind.clone()).collect();
    for (daemon, (kind, text)) in all.iter().zip(&answers) {
        let socket = daemon.address.display().to_string();
        let mut labels = vec![("sandboxer", kind.as_str())];
        // Two daemons of one kind would give the same samples twice.
        if kinds.iter().filter(|other| *other == kind).count() > 1 {
            labels.push(("socket", &socket));
        }
        let up = u8::from(text.is_some());
        families.add(&format!("{UP} {up}\n"), &labels);
        families.add(text.as_deref().unwrap_or_default(), &labels);
    }
    families.render()
}

/// The listening sockets that a service manager has handed over: sd_listen_fds(3).
fn handed_over() -> Result<Vec<OwnedFd>> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let ours = number("LISTEN_PID") == i32::try_from(std::process::id()).ok();
    let count = number("LISTEN_FDS").filter(|_| ours).unwrap_or_default();
    if !(1..=MOST_FDS).contains(&count) {
        let text = "--listen fd://: no sockets were handed over. Start it by kuasar-metrics.socket, \
                    or say an address, such as 127.0.0.1:9755";
        return Err(Error::Usage(text.into()));
    }
    let mut all = Vec::new();
    for fd in FIRST_FD..FIRST_FD + count {
        // SAFETY: the service manager has opened these descriptors for this process (LISTEN_PID is
        // ours), and nothing else of this program takes them: this is called once, before it opens
        // anything that it would keep by number.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
            .map_err(|e| Error::io("--listen fd://")(e.into()))?;
        all.push(fd);
    }
    Ok(all)
}

/// Sockets for every `--listen`, and the paths that are to be removed at the end.
fn listeners(args: &MetricsArgs) -> Result<(Vec<Listener>, Vec<&str>)> {
    let (mut all, mut paths) = (Vec::new(), Vec::new());
    for at in &args.listen {
        let failed = || Error::io(format!("--listen {at}"));
        if at == "fd://" {
            for fd in handed_over()? {
                all.push(Listener::inherited(fd).map_err(failed())?);
            }
            continue;
        }
        let at = at.strip_prefix("unix://").unwrap_or(at);
        all.push(Listener::bind(at).map_err(failed())?);
        if at.starts_with('/') {
            paths.push(at);
        }
    }
    Ok((all, paths))
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot listen.
pub async fn serve(wanted: Wanted, args: &MetricsArgs) -> Result<()> {
    // A wrong --sandboxer is told now, and not at each request.
    let daemons = expected(&wanted)?;
    let (listeners, paths) = listeners(args)?;
    let kinds: Vec<&str> = daemons.iter().map(|daemon| daemon.kind.as_str()).collect();
    output::note(&format!(
        "metrics are served at {}, of these sandboxers so far: {}",
        args.listen.join(", "),
        if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") }
    ));
    let patience = Duration::from_secs(args.daemon_timeout.max(1));
    let wanted = std::sync::Arc::new(wanted);
    let text = move || {
        let wanted = wanted.clone();
        async move {
            // Looked for each time: a sandboxer may be installed or configured anew meanwhile.
            let all = expected(&wanted).unwrap_or_default();
            collect(&all, patience).await
        }
    };
    let all = listeners.into_iter().map(|listener| listener.serve(text.clone()));
    let served = futures::future::try_join_all(all);
    let failed = Error::io("signals");
    let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(failed)?;
    let done = tokio::select! {
        done = served => done.map(drop).map_err(Error::io("serve metrics")),
        _ = end.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    for path in paths {
        let _ = std::fs::remove_file(path);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_joined_metric_by_metric() {
        let mut all = Families::default();
        let of = |kind: &str| {
            format!(
                "# HELP k_seconds Time.\n# TYPE k_seconds histogram\n\
                 k_seconds_bucket{{sandboxer=\"{kind}\",le=\"+Inf\"}} 1\n\
                 k_seconds_sum{{sandboxer=\"{kind}\"}} 0.5\nk_seconds_count{{sandboxer=\"{kind}\"}} 1\n\
                 # TYPE k_pods gauge\nk_pods 3\n"
            )
        };
        all.add(&of("a"), &[("sandboxer", "a")]);
        all.add(&of("b"), &[("sandboxer", "b")]);
        let text = all.render();
        assert_eq!(
            text,
            "# TYPE k_pods gauge\nk_pods{sandboxer=\"a\"} 3\nk_pods{sandboxer=\"b\"} 3\n\
             # HELP k_seconds Time.\n# TYPE k_seconds histogram\n\
             k_seconds_bucket{sandboxer=\"a\",le=\"+Inf\"} 1\nk_seconds_sum{sandboxer=\"a\"} 0.5\n\
             k_seconds_count{sandboxer=\"a\"} 1\n\
             k_seconds_bucket{sandboxer=\"b\",le=\"+Inf\"} 1\nk_seconds_sum{sandboxer=\"b\"} 0.5\n\
             k_seconds_count{sandboxer=\"b\"} 1\n"
        );
    }

    #[test]
    fn labels_are_added_where_they_lack() {
        let labels = [("sandboxer", "a"), ("socket", "/x\"y")];
        assert_eq!(labelled(" 3", &labels), "{sandboxer=\"a\",socket=\"/x\\\"y\"} 3");
        assert_eq!(
            labelled("{sandboxer=\"b\",text=\"}\"} 3", &labels),
            "{socket=\"/x\\\"y\",sandboxer=\"b\",text=\"}\"} 3"
        );
        assert_eq!(labelled("{} 3", &[]), " 3");
    }

    #[test]
    fn nonsense_is_left_out() {
        let mut all = Families::default();
        all.add("\n#\n# TYPE\nalone\n{} 1\n# TYPE empty gauge\na 1\n", &[]);
        assert_eq!(all.render(), "a 1\n");
    }

    #[tokio::test]
    async fn a_daemon_that_is_away_or_silent_is_down() {
        let dir = tempfile::tempdir().unwrap();
        let silent = dir.path().join("silent.sock");
        let _kept = std::os::unix::net::UnixListener::bind(&silent).unwrap();
        let daemon = |kind: &str, address: &Path| Daemon {
            kind: kind.into(),
            address: address.into(),
            dir: dir.path().into(),
            config: None,
            problem: None,
        };
        let all = [daemon("runc", &dir.path().join("none")), daemon("vmm", &silent)];
        let begun = std::time::Instant::now();
        let text = collect(&all, Duration::from_millis(300)).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(text.contains("# TYPE kuasar_daemon_up gauge\n"), "{text}");
        for kind in ["runc", "vmm"] {
            assert!(
                text.contains(&format!("kuasar_daemon_up{{sandboxer=\"{kind}\"}} 0\n")),
                "{text}"
            );
        }
        let twice = [daemon("runc", &dir.path().join("1")), daemon("runc", &dir.path().join("2"))];
        let text = collect(&twice, Duration::from_millis(300)).await;
        assert_eq!(
            text.matches("kuasar_daemon_up{sandboxer=\"runc\",socket=\"").count(),
            2,
            "{text}"
        );
    }
}
