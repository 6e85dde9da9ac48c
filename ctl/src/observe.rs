//! What goes on: `events`, `metrics`, `logs`, `console`.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_protos::admin as api;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Client, connect};
use crate::error::{Error, Result};
use crate::output::{self, Format, moment, rfc3339, short};
use crate::pods;

/// How long one question for events waits, in milliseconds.
const WAIT: u32 = 20_000;
/// Between two looks at a file that is followed, and at a daemon that is away.
const LOOK: Duration = Duration::from_millis(250);
/// Largest answer of a metrics endpoint, in bytes.
const MOST_METRICS: u64 = 16 << 20;

/// What `events` shows.
#[derive(Debug, clap::Args)]
pub struct EventsArgs {
    /// Begin with the events that the daemons still have
    #[arg(long)]
    pub since_start: bool,
    /// End when there is nothing new
    #[arg(long)]
    pub no_follow: bool,
    /// Only events of this pod: id or beginning of it
    #[arg(long, value_name = "ID")]
    pub pod: Option<String>,
}

fn event_value(kind: &str, e: &api::Event) -> Value {
    json!({
        "number": e.number,
        "at": rfc3339(moment(e.at.as_ref())),
        "sandboxer": kind,
        "namespace": e.namespace,
        "pod": e.sandbox_id,
        "topic": e.topic,
        "container": e.container_id,
        "exec": e.exec_id,
        "pid": e.pid,
        "exitStatus": e.exit_status,
    })
}

fn event_line(kind: &str, e: &api::Event) -> String {
    let at = rfc3339(moment(e.at.as_ref())).unwrap_or_default();
    let mut line = format!("{at} {kind} {} {}", e.topic, short(&e.sandbox_id));
    let ended = e.topic.ends_with("/exit") || e.topic.ends_with("/stopped");
    for (word, text) in [
        ("container", short(&e.container_id)),
        ("exec", short(&e.exec_id)),
        ("pid", if e.pid == 0 { String::new() } else { e.pid.to_string() }),
        ("status", if ended { e.exit_status.to_string() } else { String::new() }),
    ] {
        if !text.is_empty() {
            line.push_str(&format!(" {word}={text}"));
        }
    }
    output::clean(&line) + "\n"
}

/// `events` of one daemon; over its restarts when it is followed.
async fn follow(mut client: Client, args: &EventsArgs, format: Format) -> Result<()> {
    let begin = api::EventsRequest { newest: !args.since_start, ..Default::default() };
    let mut after = match args.since_start {
        true => 0,
        false => client.admin().events(client.context(), &begin).await?.last,
    };
    loop {
        let wait_ms = if args.no_follow { 0 } else { WAIT };
        let q = api::EventsRequest { after, wait_ms, ..Default::default() };
        let patience = ttrpc::context::with_duration(Duration::from_secs(40));
        let told = match client.admin().events(patience, &q).await {
            Ok(told) => told,
            Err(error @ ttrpc::Error::RpcStatus(_)) => return Err(error.into()),
            Err(error) if args.no_follow => return Err(error.into()),
            Err(_) => {
                output::note(&format!(
                    "warning: {}-sandboxer is away, waiting for it",
                    client.kind
                ));
                client = again(&client).await;
                continue;
            }
        };
        if told.missed > 0 {
            output::note(&format!("warning: {} events are lost, they came too fast", told.missed));
        }
        for event in &told.events {
            if args.pod.as_ref().is_some_and(|pod| !event.sandbox_id.starts_with(pod.as_str())) {
                continue;
            }
            match format {
                Format::Json => output::json_line(&event_value(&client.kind, event))?,
                Format::Table => output::print(&event_line(&client.kind, event))?,
            }
        }
        let empty = told.events.is_empty();
        after = told.last;
        if empty && args.no_follow {
            return Ok(());
        }
    }
}

/// The same daemon, when it is back.
async fn again(client: &Client) -> Client {
    let daemon = crate::daemons::Daemon {
        kind: client.kind.clone(),
        address: client.address.clone(),
        dir: PathBuf::new(),
        config: None,
        problem: None,
    };
    loop {
        if let Ok(client) = Client::dial(&daemon, Duration::from_secs(10)).await {
            return client;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// `events`.
///
/// # Errors
/// The daemons'.
pub async fn events(clients: &[Client], args: &EventsArgs, format: Format) -> Result<()> {
    let all = clients.iter().map(|client| follow(client.clone(), args, format));
    futures::future::try_join_all(all).await.map(drop)
}

/// The text of a daemon's metrics.
///
/// # Errors
/// When its endpoint is off or does not answer.
pub async fn metrics_of(client: &Client) -> Result<String> {
    let address = &client.info.metrics;
    let failed = |e: std::io::Error| Error::io(format!("metrics at {address}"))(e);
    if address.is_empty() {
        let text = format!("{}-sandboxer serves no metrics: metrics_listen is empty", client.kind);
        return Err(Error::Failed(text));
    }
    let ask = async {
        let question = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let mut answer = Vec::new();
        if address.starts_with('/') {
            let mut socket = connect(Path::new(address)).await?;
            socket.write_all(question).await?;
            socket.take(MOST_METRICS).read_to_end(&mut answer).await?;
        } else {
            let mut socket = tokio::net::TcpStream::connect(address.as_str()).await?;
            socket.write_all(question).await?;
            socket.take(MOST_METRICS).read_to_end(&mut answer).await?;
        }
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(10), ask).await;
    let answer =
        answer.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())).map_err(failed)?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(Error::Failed(format!("metrics at {address}: it answered no metrics"))),
    }
}

/// Samples of a metrics text: name, labels, value.
pub fn samples(text: &str) -> Vec<(String, BTreeMap<String, String>, f64)> {
    let mut all = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((what, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f64>() else { continue };
        let (name, labels) = what.split_once('{').unwrap_or((what, ""));
        let labels = labels.strip_suffix('}').unwrap_or(labels);
        let pairs = labels.split("\",").filter_map(|pair| {
            let (name, value) = pair.split_once("=\"")?;
            Some((name.to_owned(), value.strip_suffix('"').unwrap_or(value).to_owned()))
        });
        all.push((name.to_owned(), pairs.collect(), value));
    }
    all
}

/// `metrics`: the daemons' own text, or its samples as JSON.
///
/// # Errors
/// When a daemon serves none.
pub async fn metrics(clients: &[Client], format: Format) -> Result<()> {
    let mut all = Vec::new();
    for client in clients {
        let text = metrics_of(client).await?;
        match format {
            Format::Table => output::print(&text)?,
            Format::Json => all.extend(samples(&text).into_iter().map(
                |(name, labels, value)| json!({ "name": name, "labels": labels, "value": value }),
            )),
        }
    }
    if format == Format::Json { output::json(&all.into()) } else { Ok(()) }
}

/// What `logs` shows.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// Go on with what is written from now
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "NUMBER")]
    pub tail: Option<usize>,
    /// Show the time of each line
    #[arg(short, long)]
    pub timestamps: bool,
    /// Container, by name or id; needed when several run in the pod
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// Pod: id, beginning of an id, name or namespace/name; or a container's id
    pub pod: String,
}

/// The newest log file of a container, as the engine has written it: `<name>/<attempt>.log`, or
/// `<name>.log`, in the pod's log directory.
fn log_file(directory: &str, name: &str) -> Result<PathBuf> {
    if directory.is_empty() {
        return Err(Error::NotFound(
            "the pod's engine keeps no logs: only kubelet's and CRI's pods have a log directory"
                .into(),
        ));
    }
    let dir = Path::new(directory);
    let newest = std::fs::read_dir(dir.join(name)).into_iter().flatten().flatten();
    let newest = newest
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "log"))
        .max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok());
    let plain = dir.join(format!("{name}.log"));
    newest.or_else(|| plain.is_file().then_some(plain)).ok_or_else(|| {
        Error::NotFound(format!("there is no log of container {name} in {}", dir.display()))
    })
}

/// A line of CRI's log format: time, stream, tag, text. What is no such line is shown as it is.
fn shown(line: &str, timestamps: bool, partial: &mut bool) -> String {
    let parts: Vec<&str> = line.splitn(4, ' ').collect();
    let [time, "stdout" | "stderr", tag, text] = parts.as_slice() else {
        return format!("{line}\n");
    };
    let time = if timestamps && !*partial { format!("{time} ") } else { String::new() };
    *partial = *tag == "P";
    format!("{time}{text}{}", if *partial { "" } else { "\n" })
}

/// `logs`.
///
/// # Errors
/// [`Error::NotFound`] when the engine keeps none.
pub async fn logs(clients: &[Client], args: &LogsArgs, format: Format) -> Result<()> {
    let (pod, named) = pods::find(clients, &args.pod).await?;
    let container = named.as_deref().or(args.container.as_deref());
    let container = match (container, pod.sandbox.containers.as_slice()) {
        (None, [only]) => only,
        (container, _) => pod.container(container)?,
    };
    let name = crate::bundle::name(container)
        .ok_or_else(|| Error::NotFound("the container has no name in CRI".into()))?;
    let path = log_file(&pod.sandbox.log_directory, &name)?;
    let mut partial = false;
    let mut write = |line: &str| match format {
        Format::Table => output::print(&shown(line, args.timestamps, &mut partial)),
        Format::Json => {
            let parts: Vec<&str> = line.splitn(4, ' ').collect();
            output::json_line(&match parts.as_slice() {
                [time, stream, tag, text] => {
                    json!({ "time": time, "stream": stream, "partial": *tag == "P", "text": text })
                }
                _ => json!({ "text": line }),
            })
        }
    };
    follow_file(&path, args.tail, args.follow, &mut write).await
}

/// The lines of a file, and what is added to it or to one that takes its place.
async fn follow_file(
    path: &Path,
    tail: Option<usize>,
    follow: bool,
    write: &mut impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let open = || std::fs::File::open(path).map_err(Error::at("open", path));
    let mut file = open()?;
    let mut pending = Vec::new();
    let mut first = true;
    loop {
        let mut new = Vec::new();
        file.read_to_end(&mut new).map_err(Error::at("read", path))?;
        pending.extend(new);
        let whole = pending.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let rest = pending.split_off(whole);
        let text = String::from_utf8_lossy(&pending).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let skip = tail.filter(|_| first).map_or(0, |most| lines.len().saturating_sub(most));
        for line in lines.into_iter().skip(skip) {
            write(line)?;
        }
        (pending, first) = (rest, false);
        if !follow {
            return if pending.is_empty() {
                Ok(())
            } else {
                write(&String::from_utf8_lossy(&pending))
            };
        }
        tokio::time::sleep(LOOK).await;
        // Rotated, or cut off.
        let meta = file.metadata().map_err(Error::at("look at", path))?;
        let there = std::fs::metadata(path).ok();
        if there.as_ref().is_some_and(|there| there.ino() != meta.ino()) {
            let mut last = Vec::new();
            file.read_to_end(&mut last).map_err(Error::at("read", path))?;
            pending.extend(last);
            file = open()?;
        } else if file.stream_position().is_ok_and(|at| at > meta.len()) {
            file.seek(SeekFrom::Start(0)).map_err(Error::at("read", path))?;
        }
    }
}

/// What `console` shows.
#[derive(Debug, clap::Args)]
pub struct ConsoleArgs {
    /// Go on with what is written from now
    #[arg(short, long)]
    pub follow: bool,
    /// Pod: id, beginning of an id, name or namespace/name
    pub pod: String,
}

/// `console`: what a machine's kernel and agent have written. To be in a guest is `exec`'s work, or
/// `debug`'s.
///
/// # Errors
/// The daemon's where pods have no console.
pub async fn console(clients: &[Client], args: &ConsoleArgs) -> Result<()> {
    let (pod, _) = pods::find(clients, &args.pod).await?;
    let q = api::ConsoleRequest { sandbox_id: pod.sandbox.id.clone(), ..Default::default() };
    let path = PathBuf::from(pod.client.admin().console(pod.client.context(), &q).await?.path);
    // The guest writes this: nothing of it may steer our terminal.
    let mut write = |line: &str| output::print(&format!("{}\n", output::clean(line)));
    let older = path
        .with_file_name(format!("{}.1", path.file_name().unwrap_or_default().to_string_lossy()));
    if older.is_file() {
        follow_file(&older, None, false, &mut write).await?;
    }
    follow_file(&path, None, args.follow, &mut write).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_their_labels() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"b c\"} 3\nb 0.5\nnonsense\n";
        let all = samples(text);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].0.as_str(), all[0].1["y"].as_str(), all[0].2), ("a", "b c", 3.0));
        assert_eq!((all[1].0.as_str(), all[1].2), ("b", 0.5));
    }

    #[test]
    fn pieces_of_a_line_are_joined() {
        let mut partial = false;
        let mut all = String::new();
        for line in ["t stdout P one ", "t stdout F two", "t stderr F three", "other"] {
            all.push_str(&shown(line, false, &mut partial));
        }
        assert_eq!(all, "one two\nthree\nother\n");
        assert_eq!(shown("t stdout F x", true, &mut partial), "t x\n");
    }

    #[test]
    fn the_newest_log_of_a_container_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        assert!(log_file("", "a").is_err() && log_file(root, "a").is_err());
        std::fs::write(dir.path().join("a.log"), "").unwrap();
        assert_eq!(log_file(root, "a").unwrap(), dir.path().join("a.log"));
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/0.log"), "").unwrap();
        assert_eq!(log_file(root, "a").unwrap(), dir.path().join("a/0.log"));
    }

    #[tokio::test]
    async fn the_last_lines_of_a_file_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "1\n2\n3\nhalf").unwrap();
        let mut all = Vec::new();
        let mut write = |line: &str| -> Result<()> {
            all.push(line.to_owned());
            Ok(())
        };
        follow_file(&path, Some(2), false, &mut write).await.unwrap();
        assert_eq!(all, ["2", "3", "half"]);
    }
}
