//! A collector of OpenTelemetry traces, as far as tests need one: it takes OTLP over HTTP on a loopback
//! port of the bed's network namespace and keeps the spans.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use kuasar_protos::otlp;
use protobuf::Message;

/// A span, and the program that it is from.
#[derive(Debug, Clone)]
pub struct Seen {
    pub service: String,
    pub span: otlp::Span,
}

impl Seen {
    /// The value of an attribute.
    pub fn attribute(&self, key: &str) -> Option<&str> {
        let found = self.span.attributes.iter().find(|a| a.key == key)?;
        Some(&found.value.string_value)
    }
}

/// Listens until the process ends.
#[derive(Clone)]
pub struct Collector {
    pub address: SocketAddr,
    spans: Arc<Mutex<Vec<Seen>>>,
}

impl Collector {
    /// Listens in the bed's network namespace.
    pub fn start() -> Self {
        let ns = std::fs::read_to_string(crate::bed().join("run/ns.pid")).unwrap();
        let net = std::fs::File::open(format!("/proc/{}/ns/net", ns.trim())).unwrap();
        let spans = Arc::<Mutex<Vec<Seen>>>::default();
        let (told, address) = std::sync::mpsc::channel();
        let kept = spans.clone();
        // A thread of its own: it stays in that namespace.
        std::thread::spawn(move || {
            nix::sched::setns(&net, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            told.send(listener.local_addr().unwrap()).unwrap();
            for stream in listener.incoming().flatten() {
                let kept = kept.clone();
                std::thread::spawn(move || serve(stream, &kept));
            }
        });
        Self { address: address.recv().unwrap(), spans }
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Seen> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those of a trace.
    pub fn of(&self, trace: &[u8]) -> Vec<Seen> {
        self.spans().into_iter().filter(|s| s.span.trace_id == trace).collect()
    }
}

/// Requests of one connection, one after the other.
fn serve(stream: TcpStream, kept: &Mutex<Vec<Seen>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let line = line.trim().to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let told = otlp::ExportTraceServiceRequest::parse_from_bytes(&body).unwrap();
        for resource in told.resource_spans {
            let name = resource.resource.attributes.iter().find(|a| a.key == "service.name");
            let service = name.map(|a| a.value.string_value.clone()).unwrap_or_default();
            let all = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend(all.map(|span| Seen { service: service.clone(), span }));
        }
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        (&stream).write_all(answer.as_bytes()).ok()?;
    }
}
