//! Traces: finished spans are sent to an OpenTelemetry collector, by OTLP over HTTP.
//!
//! Off unless `[tracing]` names an endpoint: then nothing is measured, kept or run. A span that has
//! ended goes into a bounded queue and is never waited for: when the queue is full it is dropped and
//! counted, and so is what a collector does not take. One task sends, one request at a time.
//!
//! The OpenTelemetry SDK's crates are not used: with their exporter they bring a second HTTP stack, a
//! second protobuf implementation and several threads into a daemon that holds a hundred pods in some
//! 5 MB. What is sent is five messages of OTLP; hyper, which serves gRPC here, is the client.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use kuasar_host::duration;
use kuasar_protos::otlp;
use kuasar_trace::{Finished, Sink};
use protobuf::{Message, MessageField};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// Most spans that may be set to wait.
const MAX_QUEUE: u32 = 65_536;
/// Where a collector takes traces, when the endpoint names no path.
const PATH: &str = "/v1/traces";
/// A collector that fails is named in the log so often.
const COMPLAIN: Duration = Duration::from_secs(60);

static DROPPED: AtomicU64 = AtomicU64::new(0);
static SENT: AtomicU64 = AtomicU64::new(0);

/// `[tracing]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tracing {
    /// Where a collector takes OTLP over HTTP: `http://<address>:<port>[/path]`, the address a number
    /// or `localhost`, the path `/v1/traces` when none is given. Empty: no traces.
    pub endpoint: String,
    /// Part of the requests that come without a trace and get one of their own, from 0 to 1. Those that
    /// come with a trace are followed when their caller keeps it.
    pub sample: f64,
    /// Spans that wait to be sent; beyond, new ones are dropped and counted. Some 500 bytes each.
    pub max_queue: u32,
    /// Most spans of one request to the collector.
    pub max_batch: u32,
    /// Longest time that a span waits for others to be sent with.
    #[serde(with = "duration")]
    pub interval: Duration,
    /// How long a request to the collector may take.
    #[serde(with = "duration")]
    pub timeout: Duration,
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            sample: 1.0,
            max_queue: 2048,
            max_batch: 256,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
        }
    }
}

/// Where to send.
#[derive(Debug, Clone, PartialEq)]
struct Collector {
    address: SocketAddr,
    host: String,
    path: String,
}

fn collector(endpoint: &str) -> Result<Collector, String> {
    let wrong = |why: &str| {
        format!(
            "tracing.endpoint {endpoint:?}: {why}; write http://127.0.0.1:4318, or the address of a \
             collector that takes OTLP over HTTP"
        )
    };
    let uri: Uri = endpoint.parse().map_err(|e| wrong(&format!("{e}")))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(wrong("TLS is the collector's business: run one on the node")),
        _ => return Err(wrong("it must begin with http://")),
    }
    let authority = uri.authority().ok_or_else(|| wrong("no address"))?;
    let host = match authority.host() {
        "localhost" => "127.0.0.1",
        host => host.trim_matches(['[', ']']),
    };
    let ip =
        host.parse().map_err(|_| wrong("the address must be a number, names are not looked up"))?;
    let port = authority.port_u16().ok_or_else(|| wrong("no port"))?;
    let path = match uri.path_and_query().map(ToString::to_string) {
        None => PATH.to_owned(),
        Some(path) if path == "/" => PATH.to_owned(),
        Some(path) => path,
    };
    Ok(Collector { address: SocketAddr::new(ip, port), host: authority.to_string(), path })
}

impl Tracing {
    /// What is wrong with the values, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check(&self) -> Result<(), String> {
        if !self.endpoint.is_empty() {
            collector(&self.endpoint)?;
        }
        if !(0.0..=1.0).contains(&self.sample) {
            return Err(format!("tracing.sample = {}: from 0 to 1", self.sample));
        }
        if !(1..=MAX_QUEUE).contains(&self.max_queue) {
            return Err(format!("tracing.max_queue = {}: from 1 to {MAX_QUEUE}", self.max_queue));
        }
        if !(1..=self.max_queue).contains(&self.max_batch) {
            let queue = self.max_queue;
            return Err(format!(
                "tracing.max_batch = {}: from 1 to tracing.max_queue ({queue})",
                self.max_batch
            ));
        }
        for (key, value) in [("interval", self.interval), ("timeout", self.timeout)] {
            if value.is_zero() || value > Duration::from_secs(600) {
                return Err(format!("tracing.{key}: more than nothing and at most 10m"));
            }
        }
        Ok(())
    }
}

/// Counters for the metrics: spans sent, and dropped. None when traces are off.
pub fn counters() -> Option<(u64, u64)> {
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    kuasar_trace::enabled().then(|| (count(&SENT), count(&DROPPED)))
}

struct Queue {
    spans: mpsc::Sender<Finished>,
    sample: f64,
}

impl Sink for Queue {
    fn record(&self, span: Finished) {
        if self.spans.try_send(span).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn begins(&self) -> bool {
        let random = u32::from_ne_bytes(kuasar_trace::random());
        f64::from(random) / f64::from(u32::MAX) <= self.sample && self.sample > 0.0
    }
}

/// Ends what [`start`] has begun: what waits is sent, within a moment.
#[derive(Debug)]
pub struct Sender(Option<(tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<()>)>);

impl Sender {
    /// Sends what waits; not longer than `patience`.
    pub async fn finish(self, patience: Duration) {
        if let Some((end, task)) = self.0 {
            drop(end);
            let _ = tokio::time::timeout(patience, task).await;
        }
    }
}

/// Begins to send spans, if the configuration wants it. `service` names the program.
///
/// # Errors
/// A text that names the key.
pub fn start(config: &Tracing, service: &str) -> Result<Sender, String> {
    if config.endpoint.is_empty() {
        return Ok(Sender(None));
    }
    let collector = collector(&config.endpoint)?;
    let (spans, queue) = mpsc::channel(config.max_queue as usize);
    kuasar_trace::install(Box::new(Queue { spans, sample: config.sample }));
    let (end, ended) = tokio::sync::oneshot::channel();
    let exporter = Exporter {
        collector,
        service: service.to_owned(),
        config: config.clone(),
        complained: None,
        queue,
    };
    tracing::info!(endpoint = config.endpoint, "traces are sent");
    Ok(Sender(Some((end, tokio::spawn(exporter.run(ended))))))
}

struct Exporter {
    collector: Collector,
    service: String,
    config: Tracing,
    /// When the log was last told of a collector that fails.
    complained: Option<Instant>,
    queue: mpsc::Receiver<Finished>,
}

impl Exporter {
    async fn run(mut self, mut ended: tokio::sync::oneshot::Receiver<()>) {
        let most = self.config.max_batch as usize;
        let mut batch = Vec::new();
        loop {
            // With nothing to send it sleeps until there is something.
            let over = tokio::select! {
                first = self.queue.recv() => match first {
                    Some(first) => { batch.push(first); false }
                    None => true,
                },
                _ = &mut ended => true,
            };
            let until = tokio::time::Instant::now() + self.config.interval;
            while !over && batch.len() < most {
                tokio::select! {
                    span = self.queue.recv() => match span {
                        Some(span) => batch.push(span),
                        None => break,
                    },
                    () = tokio::time::sleep_until(until) => break,
                    _ = &mut ended, if !ended.is_terminated() => break,
                }
            }
            let over = over || ended.is_terminated();
            while over && batch.len() < self.config.max_queue as usize {
                let Ok(span) = self.queue.try_recv() else { break };
                batch.push(span);
            }
            if !batch.is_empty() {
                self.send(std::mem::take(&mut batch)).await;
            }
            if over {
                return;
            }
        }
    }

    async fn send(&mut self, batch: Vec<Finished>) {
        let count = batch.len() as u64;
        let sent = match message(&self.service, batch).write_to_bytes() {
            Ok(body) => {
                let post = post(&self.collector, body);
                tokio::time::timeout(self.config.timeout, post)
                    .await
                    .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.config.timeout)))
            }
            Err(error) => Err(error.to_string()),
        };
        match sent {
            Ok(()) => drop(SENT.fetch_add(count, Ordering::Relaxed)),
            Err(error) => {
                DROPPED.fetch_add(count, Ordering::Relaxed);
                self.complain(&error);
            }
        }
    }

    fn complain(&mut self, error: &str) {
        if self.complained.is_none_or(|last| last.elapsed() >= COMPLAIN) {
            self.complained = Some(Instant::now());
            let endpoint = &self.config.endpoint;
            tracing::warn!(
                endpoint,
                "spans are dropped, the collector does not take them: {error}"
            );
        }
    }
}

/// One request, on a connection of its own: between two of them lie seconds.
async fn post(to: &Collector, body: Vec<u8>) -> Result<(), String> {
    let text = |e: &dyn std::error::Error| e.to_string();
    let stream = tokio::net::TcpStream::connect(to.address).await.map_err(|e| text(&e))?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(8192)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| text(&e))?;
    let request = Request::post(&to.path)
        .header(header::HOST, &to.host)
        .header(header::CONTENT_TYPE, "application/x-protobuf")
        .header(header::CONNECTION, "close")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| text(&e))?;
    let answer = async {
        let answer = sender.send_request(request).await.map_err(|e| text(&e))?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            status => Err(format!("it answered {status}")),
        }
    };
    tokio::pin!(answer);
    // The connection drives the request, and may be over before the answer is looked at.
    tokio::select! {
        biased;
        answer = &mut answer => return answer,
        ended = connection => ended.map_err(|e| text(&e))?,
    }
    answer.await
}

fn nanos(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn attribute(key: &str, value: impl Into<String>) -> otlp::KeyValue {
    let value = otlp::AnyValue { string_value: value.into(), ..Default::default() };
    otlp::KeyValue { key: key.into(), value: MessageField::some(value), ..Default::default() }
}

fn span(done: Finished) -> otlp::Span {
    let status = done.error.map(|message| otlp::Status { message, code: 2, ..Default::default() });
    otlp::Span {
        trace_id: done.context.trace.into(),
        span_id: done.context.span.into(),
        parent_span_id: done.parent.map(Into::into).unwrap_or_default(),
        name: done.name,
        kind: done.kind as i32,
        start_time_unix_nano: nanos(done.start),
        end_time_unix_nano: nanos(done.end.max(done.start)),
        attributes: done.attributes.into_iter().map(|(k, v)| attribute(k, v)).collect(),
        status: status.into(),
        ..Default::default()
    }
}

/// Spans of this program and of those that have none of their own, by program.
fn message(service: &str, batch: Vec<Finished>) -> otlp::ExportTraceServiceRequest {
    let mut by_service: Vec<(&str, Vec<otlp::Span>)> = Vec::new();
    for done in batch {
        let name = done.service.unwrap_or(service);
        let done = span(done);
        match by_service.iter_mut().find(|(known, _)| *known == name) {
            Some((_, spans)) => spans.push(done),
            None => by_service.push((name, vec![done])),
        }
    }
    let version = env!("CARGO_PKG_VERSION");
    let of = |(name, spans): (&str, Vec<otlp::Span>)| otlp::ResourceSpans {
        resource: MessageField::some(otlp::Resource {
            attributes: vec![
                attribute("service.name", name),
                attribute("service.version", version),
            ],
            ..Default::default()
        }),
        scope_spans: vec![otlp::ScopeSpans {
            scope: MessageField::some(otlp::InstrumentationScope {
                name: "kuasar".into(),
                version: version.into(),
                ..Default::default()
            }),
            spans,
            ..Default::default()
        }],
        ..Default::default()
    };
    otlp::ExportTraceServiceRequest {
        resource_spans: by_service.into_iter().map(of).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kuasar_trace::{Context, Kind};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn one(name: &str) -> Finished {
        let now = SystemTime::now();
        Finished {
            name: name.into(),
            kind: Kind::Server,
            context: Context::root(),
            parent: None,
            start: now,
            end: now,
            attributes: vec![("k", "v".into())],
            error: Some("no".into()),
            service: None,
        }
    }

    #[test]
    fn endpoints_are_understood_or_explained() {
        let to = |text: &str| collector(text).map(|c| (c.address.to_string(), c.path));
        let at = |address: &str, path: &str| Ok((address.to_owned(), path.to_owned()));
        assert_eq!(to("http://127.0.0.1:4318"), at("127.0.0.1:4318", "/v1/traces"));
        assert_eq!(to("http://localhost:4318/"), at("127.0.0.1:4318", "/v1/traces"));
        assert_eq!(to("http://[::1]:4318/x?y=1"), at("[::1]:4318", "/x?y=1"));
        for bad in
            ["127.0.0.1:4318", "https://127.0.0.1:1", "http://a.example:1", "http://1.2.3.4", "x y"]
        {
            let error = to(bad).unwrap_err();
            assert!(error.contains("tracing.endpoint") && error.contains("4318"), "{error}");
        }
    }

    #[test]
    fn values_without_sense_are_named() {
        Tracing::default().check().unwrap();
        for (text, key) in [
            ("sample = 1.5", "tracing.sample"),
            ("sample = nan", "tracing.sample"),
            ("max_queue = 0", "tracing.max_queue"),
            ("max_batch = 5000", "tracing.max_batch"),
            ("interval = '0s'", "tracing.interval"),
            ("timeout = '11m'", "tracing.timeout"),
            ("endpoint = 'here'", "tracing.endpoint"),
        ] {
            let error = toml::from_str::<Tracing>(text).unwrap().check().unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    fn exporter(address: SocketAddr, queue: mpsc::Receiver<Finished>) -> Exporter {
        let config = Tracing {
            endpoint: format!("http://{address}"),
            interval: Duration::from_millis(20),
            timeout: Duration::from_millis(500),
            ..Tracing::default()
        };
        let collector = collector(&config.endpoint).unwrap();
        let service = "test-sandboxer".into();
        Exporter { collector, service, config, complained: None, queue }
    }

    #[tokio::test]
    async fn what_waits_is_sent_at_the_end_and_a_full_queue_waits_for_nobody() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (spans, queue) = mpsc::channel(3);
        let sink = Queue { spans, sample: 0.0 };
        assert!(!sink.begins());
        let before = DROPPED.load(Ordering::Relaxed);
        for n in 0..5 {
            sink.record(one(&n.to_string()));
        }
        assert_eq!(DROPPED.load(Ordering::Relaxed) - before, 2);
        let (end, ended) = tokio::sync::oneshot::channel();
        drop(end);
        let exporter = exporter(server.local_addr().unwrap(), queue);
        let sending = tokio::spawn(exporter.run(ended));
        let (mut stream, _) = server.accept().await.unwrap();
        let mut got = Vec::new();
        let head = loop {
            stream.read_buf(&mut got).await.unwrap();
            if let Some(end) = got.windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let text = String::from_utf8_lossy(&got[..head]).to_lowercase();
        assert!(text.starts_with("post /v1/traces http/1.1"), "{text}");
        assert!(text.contains("content-type: application/x-protobuf"), "{text}");
        let length = text.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap();
        let length: usize = length.parse().unwrap();
        while got.len() < head + length {
            stream.read_buf(&mut got).await.unwrap();
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        sending.await.unwrap();
        let told = otlp::ExportTraceServiceRequest::parse_from_bytes(&got[head..]).unwrap();
        let resource = &told.resource_spans[0];
        assert_eq!(resource.resource.attributes[0].value.string_value, "test-sandboxer");
        let spans = &resource.scope_spans[0].spans;
        let names: Vec<&str> = spans.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["0", "1", "2"]);
        assert_eq!((spans[0].status.code, spans[0].kind, spans[0].trace_id.len()), (2, 2, 16));
    }

    #[tokio::test]
    async fn a_collector_that_is_silent_or_away_costs_spans_and_no_time() {
        // It takes connections and says nothing.
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = server.local_addr().unwrap();
        for address in [silent, "127.0.0.1:9".parse().unwrap()] {
            let (spans, queue) = mpsc::channel(8);
            let (_end, ended) = tokio::sync::oneshot::channel();
            let before = DROPPED.load(Ordering::Relaxed);
            let sending = tokio::spawn(exporter(address, queue).run(ended));
            spans.try_send(one("lost")).unwrap();
            // Whoever has sent it is gone: the exporter ends when it is done.
            drop(spans);
            sending.await.unwrap();
            assert!(DROPPED.load(Ordering::Relaxed) > before);
        }
    }
}
