//! Spans: what one request did, in which process, and when.
//!
//! A request brings a W3C trace context (`traceparent`) with it, or a new trace begins with it. While
//! it is worked on, its span is the thread's current one ([`Within`], [`Scope::enter`]); what is done
//! meanwhile becomes children of it ([`child`], [`past`]), and requests to others carry it on
//! ([`Scope::traceparent`]). Finished spans go to the process's one [`Sink`]. Without one, nothing
//! here allocates, keeps or measures anything: every function begins with one look at a flag.
//!
//! Not the `tracing` crate's spans: those would be made, and filtered, for logs at every request of
//! every daemon, and a subscriber that follows them costs a table of all that are open.

mod context;

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context as Waker, Poll};
use std::time::{Duration, SystemTime};

pub use context::{Context, random};

/// Name of the header (gRPC) and the metadata (ttrpc) with a trace context.
pub const TRACEPARENT: &str = "traceparent";
/// Most attributes of one span; more are left out.
pub const MAX_ATTRIBUTES: usize = 16;
/// Longest value or error text, in bytes; the rest is cut off.
pub const MAX_VALUE: usize = 256;

/// What a span stands for, with OTLP's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Work within the process.
    Internal = 1,
    /// A request that was answered.
    Server = 2,
    /// A request to somebody else.
    Client = 3,
}

/// A finished span.
#[derive(Debug, Clone)]
pub struct Finished {
    /// What was done.
    pub name: String,
    /// What it stands for.
    pub kind: Kind,
    /// Its trace and its own id.
    pub context: Context,
    /// The span that it belongs to.
    pub parent: Option<[u8; 8]>,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// What is to be known about it.
    pub attributes: Vec<(&'static str, String)>,
    /// Why it failed.
    pub error: Option<String>,
    /// The process that it ran in, when not this one; such as `vmm-task`.
    pub service: Option<&'static str>,
}

/// Where finished spans go.
pub trait Sink: Send + Sync {
    /// Takes one. Must not block.
    fn record(&self, span: Finished);

    /// Whether a request that comes without a trace begins one.
    fn begins(&self) -> bool {
        false
    }
}

static SINK: OnceLock<Box<dyn Sink>> = OnceLock::new();

thread_local! {
    static CURRENT: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// Sets the process's sink; the first one stays.
pub fn install(sink: Box<dyn Sink>) {
    let _ = SINK.set(sink);
}

/// Whether there is a sink.
pub fn enabled() -> bool {
    SINK.get().is_some()
}

/// Takes a span that was finished elsewhere.
pub fn record(span: Finished) {
    if let Some(sink) = SINK.get() {
        sink.record(span);
    }
}

/// Whether a call by this name is a request worth a trace of its own: those that change something. Wait
/// and its like are never followed, they would be open for days.
fn worth(method: &str) -> bool {
    matches!(
        method,
        "Create"
            | "Start"
            | "Stop"
            | "Shutdown"
            | "Update"
            | "Exec"
            | "Kill"
            | "Delete"
            | "Pause"
            | "Resume"
            | "Checkpoint"
            | "CreateSandbox"
            | "StartSandbox"
            | "StopSandbox"
            | "ShutdownSandbox"
    )
}

fn open_for_long(method: &str) -> bool {
    matches!(method, "Wait" | "WaitSandbox" | "Events" | "NextEvents" | "Connect" | "Spans")
}

#[derive(Debug)]
struct Data {
    name: String,
    kind: Kind,
    context: Context,
    parent: Option<[u8; 8]>,
    /// Whether the trace began here and may still become a part of another one.
    fresh: bool,
    start: SystemTime,
    attributes: Vec<(&'static str, String)>,
    error: Option<String>,
}

/// The place of a span that runs: what is done in it becomes its child. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Scope(Arc<Mutex<Data>>);

/// A span that runs; it ends when this is dropped.
#[derive(Debug)]
pub struct Span(Scope);

fn cut(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_VALUE);
    text.get(..end).unwrap_or_default().to_owned()
}

impl Scope {
    fn data(&self) -> MutexGuard<'_, Data> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its trace and id.
    pub fn context(&self) -> Context {
        self.data().context
    }

    /// What a request to somebody else carries.
    pub fn traceparent(&self) -> String {
        self.context().to_string()
    }

    /// Runs `work` with this as the thread's current span.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _back = Back(CURRENT.replace(Some(self.clone())));
        work()
    }

    /// Adds what is to be known about it.
    pub fn note(&self, key: &'static str, value: &str) {
        let mut data = self.data();
        if data.attributes.len() < MAX_ATTRIBUTES && !value.is_empty() {
            data.attributes.push((key, cut(value)));
        }
    }

    /// Says why it failed; the first reason stays.
    pub fn failed(&self, why: &str) {
        self.data().error.get_or_insert_with(|| cut(why));
    }
}

/// Puts the earlier current span back.
struct Back(Option<Scope>);

impl Drop for Back {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

impl Span {
    fn new(name: String, kind: Kind, context: Context, parent: Option<[u8; 8]>) -> Self {
        Self(Scope(Arc::new(Mutex::new(Data {
            name,
            kind,
            context,
            parent,
            fresh: false,
            start: SystemTime::now(),
            attributes: Vec::new(),
            error: None,
        }))))
    }

    /// Its place.
    pub fn scope(&self) -> &Scope {
        &self.0
    }

    /// When it began.
    pub fn start(&self) -> SystemTime {
        self.0.data().start
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let mut data = self.0.data();
        let done = Finished {
            name: std::mem::take(&mut data.name),
            kind: data.kind,
            context: data.context,
            parent: data.parent,
            start: data.start,
            end: SystemTime::now(),
            attributes: std::mem::take(&mut data.attributes),
            error: data.error.take(),
            service: None,
        };
        drop(data);
        record(done);
    }
}

/// The span of a request that has come, `service/method`. None when it is not to be followed: nobody
/// wants spans, the caller does not sample its trace, or it is no request of interest.
pub fn server(service: &str, method: &str, traceparent: Option<&str>) -> Option<Span> {
    let sink = SINK.get()?;
    if open_for_long(method) {
        return None;
    }
    let caller = traceparent.and_then(Context::parse);
    let (context, parent) = match caller {
        Some(caller) if caller.sampled => (caller.child(), Some(caller.span)),
        Some(_) => return None,
        None if worth(method) && sink.begins() => (Context::root(), None),
        None => return None,
    };
    let span = Span::new(cut(&format!("{service}/{method}")), Kind::Server, context, parent);
    span.0.data().fresh = parent.is_none();
    span.0.note("rpc.service", service);
    span.0.note("rpc.method", method);
    Some(span)
}

/// A part of the current span; none without one.
pub fn child(name: &str, kind: Kind) -> Option<Span> {
    let parent = current()?.context();
    Some(Span::new(cut(name), kind, parent.child(), Some(parent.span)))
}

/// A part of the current span that has just ended and took this long.
pub fn past(name: &str, took: Duration) {
    if let Some(span) = child(name, Kind::Internal) {
        let mut data = span.0.data();
        data.start = data.start.checked_sub(took).unwrap_or(data.start);
    }
}

/// The thread's current span, to take it elsewhere.
pub fn current() -> Option<Scope> {
    if !enabled() {
        return None;
    }
    CURRENT.with_borrow(Clone::clone)
}

/// Runs `work` as a part of what `scope` was taken from.
pub fn carry<T>(scope: Option<Scope>, work: impl FnOnce() -> T) -> T {
    match scope {
        Some(scope) => scope.enter(work),
        None => work(),
    }
}

/// Adds to what is known about the current span.
pub fn note(key: &'static str, value: &str) {
    if let Some(scope) = current() {
        scope.note(key, value);
    }
}

/// Says why the current span fails.
pub fn failed(why: &str) {
    if let Some(scope) = current() {
        scope.failed(why);
    }
}

/// Makes the current span, when its trace began with it, a part of `earlier`'s: an engine that passes
/// no trace calls several times for one purpose. Only before it has children.
pub fn join(earlier: Context) {
    if let Some(scope) = current() {
        let mut data = scope.data();
        if std::mem::take(&mut data.fresh) {
            data.context.trace = earlier.trace;
            data.parent = Some(earlier.span);
        }
    }
}

/// Work that is done with a span as the current one of whatever thread it is polled on.
#[derive(Debug)]
pub struct Within<F> {
    scope: Option<Scope>,
    work: F,
}

/// `work` within `scope`; without one, nothing but `work`.
pub fn within<F: Future + Unpin>(scope: Option<Scope>, work: F) -> Within<F> {
    Within { scope, work }
}

impl<F: Future + Unpin> Future for Within<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, waker: &mut Waker<'_>) -> Poll<F::Output> {
        let Self { scope, work } = &mut *self;
        match scope {
            Some(scope) => scope.enter(|| Pin::new(work).poll(waker)),
            None => Pin::new(work).poll(waker),
        }
    }
}

#[cfg(test)]
mod tests;
