//! Prometheus metrics: a fixed set of names, counters and histograms behind atomics, and an
//! HTTP/1 endpoint on a unix socket or a loopback address.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Upper bounds of the buckets, in microseconds.
const BUCKETS: [u64; 14] = [
    250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 125_000, 250_000, 1_000_000,
    5_000_000, 30_000_000,
];

#[derive(Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    sum_us: AtomicU64,
    count: AtomicU64,
}

static PHASES: Mutex<BTreeMap<&'static str, &'static Histogram>> = Mutex::new(BTreeMap::new());

/// Books the duration of a phase. Names are constants of the program, so their number is bounded.
pub fn observe(phase: &'static str, took: Duration) {
    let histogram = {
        let mut all = PHASES.lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry(phase).or_insert_with(|| Box::leak(Box::default()))
    };
    let us = took.as_micros() as u64;
    histogram.sum_us.fetch_add(us, Ordering::Relaxed);
    histogram.count.fetch_add(1, Ordering::Relaxed);
    for (bucket, bound) in histogram.buckets.iter().zip(BUCKETS) {
        if us <= bound {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The text of all metrics; `gauges` are names and values of the moment.
pub fn render(sandboxer: &str, gauges: &[(&str, u64)]) -> String {
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
    for (name, value) in gauges {
        let _ = writeln!(out, "# TYPE kuasar_{name} gauge");
        let _ = writeln!(out, "kuasar_{name}{{sandboxer=\"{sandboxer}\"}} {value}");
    }
    out
}

/// Answers one HTTP/1 request with `text`; the request is bounded in size and time.
pub async fn answer<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S, text: String) {
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
    let (status, body) = if request.starts_with(b"GET /metrics") {
        ("200 OK", text)
    } else {
        ("404 Not Found", "metrics are at /metrics\n".to_owned())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    // A client that hangs up early has what it wanted.
    let _ = socket.write_all(head.as_bytes()).await;
    let _ = socket.write_all(body.as_bytes()).await;
    let _ = socket.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_lands_in_its_bucket_and_all_above() {
        observe("test_phase", Duration::from_micros(1500));
        let text = render("x", &[("sandboxes", 3)]);
        let labels = "sandboxer=\"x\",phase=\"test_phase\"";
        assert!(text.contains(&format!("_bucket{{{labels},le=\"0.001\"}} 0")), "{text}");
        assert!(text.contains(&format!("_bucket{{{labels},le=\"0.002\"}} 1")));
        assert!(text.contains(&format!("_bucket{{{labels},le=\"+Inf\"}} 1")));
        assert!(text.contains("kuasar_sandboxes{sandboxer=\"x\"} 3"));
    }
}
