//! Prometheus metrics: a fixed set of names, counters and histograms behind atomics, and an
//! HTTP/1 endpoint on a unix socket or a loopback address.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Upper bounds of the buckets, in microseconds.
const BUCKETS: [u64; 21] = [
    250, 500, 750, 1_000, 1_500, 2_000, 3_000, 4_000, 6_000, 8_000, 10_000, 12_000, 16_000, 24_000,
    32_000, 64_000, 125_000, 250_000, 1_000_000, 5_000_000, 30_000_000,
];

#[derive(Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    sum_us: AtomicU64,
    count: AtomicU64,
}

static PHASES: Mutex<BTreeMap<&'static str, &'static Histogram>> = Mutex::new(BTreeMap::new());

/// Books the duration of a phase, which becomes a part of the current trace, too. Names are constants
/// of the program, so their number is bounded.
pub fn observe(phase: &'static str, took: Duration) {
    kuasar_trace::past(phase, took);
    book(phase, took);
}

/// [`observe`] for what is in the trace already.
pub(crate) fn book(phase: &'static str, took: Duration) {
    let histogram = {
        let mut all = PHASES.lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry(phase).or_insert_with(|| Box::leak(Box::default()))
    };
    crate::memory::touch();
    let us = took.as_micros() as u64;
    histogram.sum_us.fetch_add(us, Ordering::Relaxed);
    histogram.count.fetch_add(1, Ordering::Relaxed);
    for (bucket, bound) in histogram.buckets.iter().zip(BUCKETS) {
        if us <= bound {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The text of all metrics; `gauges` are names and values of the moment, `counters` (whose names end
/// in `_total`) have only grown.
pub fn render(sandboxer: &str, gauges: &[(&str, u64)], counters: &[(&str, u64)]) -> String {
    let mut out = String::new();
    out.push_str("# HELP kuasar_phase_seconds Time spent in one phase of a request.\n");
    out.push_str("# TYPE kuasar_phase_seconds histogram\n");
    let all = PHASES.lock().unwrap_or_else(PoisonError::into_inner);
    for (phase, h) in all.iter() {
        let labels = format!("sandboxer=\"{sandboxer}\",phase=\"{phase}\"");
        for (bucket, bound) in h.buckets.iter().zip(BUCKETS) {
            let n = bucket.load(Ordering::Relaxed);
            let le = bound as f64 / 1e6;
            // Writing to a String cannot fail.
            let _ = writeln!(out, "kuasar_phase_seconds_bucket{{{labels},le=\"{le}\"}} {n}");
        }
        let count = h.count.load(Ordering::Relaxed);
        let sum = h.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "kuasar_phase_seconds_bucket{{{labels},le=\"+Inf\"}} {count}");
        let _ = writeln!(out, "kuasar_phase_seconds_sum{{{labels}}} {sum}");
        let _ = writeln!(out, "kuasar_phase_seconds_count{{{labels}}} {count}");
    }
    for (kind, values) in [("gauge", gauges), ("counter", counters)] {
        for (name, value) in values {
            let _ = writeln!(out, "# TYPE {name} {kind}");
            let _ = writeln!(out, "{name}{{sandboxer=\"{sandboxer}\"}} {value}");
        }
    }
    out.push_str(&crate::registry::render());
    out
}

/// Books how long `work` took as `phase`, whatever came of it.
pub async fn timed<T>(phase: &'static str, work: impl Future<Output = T>) -> T {
    let begun = std::time::Instant::now();
    let result = work.await;
    observe(phase, begun.elapsed());
    result
}

/// Memory of a process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident pages, shared ones counted whole.
    pub rss: u64,
    /// Resident pages, shared ones counted by their share.
    pub pss: u64,
    /// Resident pages that nobody shares.
    pub private: u64,
}

/// Memory of a process (`/proc/<pid>/smaps_rollup`); `None` when it has ended or belongs to
/// somebody else. Costs the kernel a walk over its pages: ask when metrics are asked for.
pub fn process_memory(pid: u32) -> Option<ProcessMemory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let field = |name: &str| -> u64 {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    Some(ProcessMemory {
        rss: field("Rss:"),
        pss: field("Pss:"),
        private: field("Private_Clean:") + field("Private_Dirty:"),
    })
}

/// Connections that are answered at the same time.
const MAX_CONNECTIONS: usize = 8;

/// A loopback `address:port`; `None` for an absolute path.
fn loopback(address: &str) -> Result<Option<SocketAddr>, String> {
    match tcp(address)? {
        Some(to) if !to.ip().is_loopback() => {
            Err(format!("metrics address {address} is not the loopback"))
        }
        to => Ok(to),
    }
}

/// An `address:port`; `None` for an absolute path.
fn tcp(address: &str) -> Result<Option<SocketAddr>, String> {
    if address.starts_with('/') {
        return Ok(None);
    }
    let to = address.parse();
    to.map(Some).map_err(|_| format!("metrics address {address:?}: use a path or 127.0.0.1:port"))
}

/// What is wrong with an address for [`serve`].
///
/// # Errors
/// A text that says what would be right.
pub fn check(address: &str) -> Result<(), String> {
    loopback(address).map(drop)
}

/// Serves metrics on a unix socket (an absolute path, 0600) or a loopback `address:port`, until
/// the future is dropped. `text` is asked for each request.
///
/// # Errors
/// When it cannot listen, or for an address that is not the loopback: metrics name no pod, but tell
/// how many there are and what is done with them.
pub async fn serve<F, T>(address: &str, text: F) -> std::io::Result<()>
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = String> + Send + 'static,
{
    let invalid = |text| std::io::Error::new(std::io::ErrorKind::InvalidInput, text);
    loopback(address).map_err(invalid)?;
    Listener::bind(address)?.serve(text).await
}

/// A listening socket for [`Listener::serve`].
#[derive(Debug)]
pub enum Listener {
    /// Of a path.
    Unix(tokio::net::UnixListener),
    /// Of an address and a port.
    Tcp(tokio::net::TcpListener),
}

impl Listener {
    /// Listens on a unix socket (an absolute path, 0600) or on `address:port`, which may be one that
    /// others reach: who asks for that has decided it.
    ///
    /// # Errors
    /// Those of bind(2) and listen(2); `InvalidInput` for what is neither.
    pub fn bind(address: &str) -> std::io::Result<Self> {
        let invalid = |text| std::io::Error::new(std::io::ErrorKind::InvalidInput, text);
        match tcp(address).map_err(invalid)? {
            Some(to) => Self::inherited(std::net::TcpListener::bind(to)?.into()),
            None => {
                Self::inherited(kuasar_host::socket::bind_private(std::path::Path::new(address))?)
            }
        }
    }

    /// A socket that listens already, from a service manager for example (sd_listen_fds(3)).
    ///
    /// # Errors
    /// When it is none of those families.
    pub fn inherited(fd: OwnedFd) -> std::io::Result<Self> {
        use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
        let family = getsockname::<SockaddrStorage>(fd.as_raw_fd())?.family();
        Ok(match family {
            Some(AddressFamily::Unix) => {
                let listener = std::os::unix::net::UnixListener::from(fd);
                listener.set_nonblocking(true)?;
                Self::Unix(tokio::net::UnixListener::from_std(listener)?)
            }
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                let listener = std::net::TcpListener::from(fd);
                listener.set_nonblocking(true)?;
                Self::Tcp(tokio::net::TcpListener::from_std(listener)?)
            }
            _ => {
                let text = "a socket that is neither a unix socket nor of TCP";
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
            }
        })
    }

    /// Answers requests until the future is dropped; `text` is asked for each.
    ///
    /// # Errors
    /// None at present: what cannot be accepted is tried again.
    pub async fn serve<F, T>(self, text: F) -> std::io::Result<()>
    where
        F: Fn() -> T + Clone + Send + 'static,
        T: Future<Output = String> + Send + 'static,
    {
        let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
        loop {
            let (slot, text) = (slots.clone().acquire_owned().await, text.clone());
            let accepted = match &self {
                Self::Unix(listener) => listener.accept().await.map(|(socket, _)| {
                    tokio::spawn(async move { (answer(socket, text).await, drop(slot)) });
                }),
                Self::Tcp(listener) => listener.accept().await.map(|(socket, _)| {
                    tokio::spawn(async move { (answer(socket, text).await, drop(slot)) });
                }),
            };
            if accepted.is_err() {
                // Out of descriptors, for example; others will give some back.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Answers one HTTP/1 request with `text`; the request is bounded in size and time.
async fn answer<S, F, T>(mut socket: S, text: F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn() -> T,
    T: Future<Output = String>,
{
    let mut request = Vec::new();
    let read = async {
        let mut buf = [0u8; 1024];
        while request.len() < 8192 && !request.windows(4).any(|w| w == b"\r\n\r\n") {
            match socket.read(&mut buf).await {
                Ok(n) if n > 0 => request.extend_from_slice(buf.get(..n).unwrap_or_default()),
                _ => return false,
            }
        }
        true
    };
    if !matches!(tokio::time::timeout(Duration::from_secs(5), read).await, Ok(true)) {
        return;
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        (b"GET" | b"HEAD", b"/metrics") => ("200 OK", text().await),
        (b"GET" | b"HEAD", _) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "metrics are read with GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    let write = async {
        socket.write_all(head.as_bytes()).await?;
        if method != b"HEAD" {
            socket.write_all(body.as_bytes()).await?;
        }
        socket.shutdown().await
    };
    // A client that hangs up early has what it wanted; one that never reads is left.
    let _ = tokio::time::timeout(Duration::from_secs(5), write).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_lands_in_its_bucket_and_all_above() {
        observe("test_phase", Duration::from_micros(1600));
        let gauges = [("kuasar_sandboxes", 3)];
        let text = render("x", &gauges, &[("kuasar_lost_total", 4)]);
        let labels = "sandboxer=\"x\",phase=\"test_phase\"";
        assert!(text.contains(&format!("_bucket{{{labels},le=\"0.001\"}} 0")), "{text}");
        assert!(text.contains(&format!("_bucket{{{labels},le=\"0.002\"}} 1")));
        assert!(text.contains(&format!("_bucket{{{labels},le=\"+Inf\"}} 1")));
        assert!(
            text.contains("# TYPE kuasar_sandboxes gauge\nkuasar_sandboxes{sandboxer=\"x\"} 3")
        );
        assert!(text.contains("# TYPE kuasar_lost_total counter\nkuasar_lost_total{"), "{text}");
    }

    #[tokio::test]
    async fn metrics_are_served_on_a_private_socket_and_nowhere_public() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock").to_str().unwrap().to_owned();
        let at = path.clone();
        let server = tokio::spawn(async move { serve(&at, || async { "a 1\n".to_owned() }).await });
        let ask = async |request: &[u8]| {
            for _ in 0..500 {
                if let Ok(mut s) = tokio::net::UnixStream::connect(&path).await {
                    s.write_all(request).await.unwrap();
                    let mut text = String::new();
                    s.read_to_string(&mut text).await.unwrap();
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("nobody listens");
        };
        let text = ask(b"GET /metrics HTTP/1.1\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("\r\n\r\na 1\n"), "{text}");
        let text = ask(b"HEAD /metrics?x=1 HTTP/1.1\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("\r\n\r\n"), "{text}");
        for other in ["/other", "/metricsother"] {
            let text = ask(format!("GET {other} HTTP/1.1\r\n\r\n").as_bytes()).await;
            assert!(text.starts_with("HTTP/1.1 404"), "{other}: {text}");
        }
        assert!(ask(b"POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        server.abort();
        assert!(serve("0.0.0.0:0", async || String::new()).await.is_err());
    }

    #[test]
    fn our_own_memory_is_known() {
        let m = process_memory(std::process::id()).unwrap();
        assert!(m.rss >= m.pss && m.pss >= m.private && m.private > 0);
    }
}
