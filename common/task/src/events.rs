//! Task events for containerd.
//!
//! Publishing never holds up a request: events go to a bounded queue, and one task forwards them
//! over containerd's ttrpc socket, reconnecting for as long as the daemon lives. When containerd
//! is away for longer than the queue is long, the oldest are dropped and counted.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kuasar_protos::shim::shim::event::Envelope;
use kuasar_protos::shim::shim_async::EventsClient;
use kuasar_protos::shim::{api, events, topics};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::sync::Notify;

/// An event, before it is wrapped for the wire.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A container was created.
    Create(events::task::TaskCreate),
    /// Its init process runs.
    Start(events::task::TaskStart),
    /// A process has ended.
    Exit(events::task::TaskExit),
    /// The kernel killed one of its processes for want of memory.
    Oom(events::task::TaskOOM),
    /// It was deleted.
    Delete(events::task::TaskDelete),
    /// An exec was added.
    ExecAdded(events::task::TaskExecAdded),
    /// An exec runs.
    ExecStarted(events::task::TaskExecStarted),
    /// All processes are frozen.
    Paused(events::task::TaskPaused),
    /// They run again.
    Resumed(events::task::TaskResumed),
    /// A checkpoint was written.
    Checkpointed(events::task::TaskCheckpointed),
}

impl Event {
    /// containerd's topic of it.
    pub fn topic(&self) -> &'static str {
        self.encode().0
    }

    fn encode(&self) -> (&'static str, &'static str, Vec<u8>) {
        fn bytes(m: &impl Message) -> Vec<u8> {
            m.write_to_bytes().unwrap_or_default()
        }
        match self {
            Self::Create(m) => (topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate", bytes(m)),
            Self::Start(m) => (topics::TASK_START_EVENT_TOPIC, "TaskStart", bytes(m)),
            Self::Exit(m) => (topics::TASK_EXIT_EVENT_TOPIC, "TaskExit", bytes(m)),
            Self::Oom(m) => (topics::TASK_OOM_EVENT_TOPIC, "TaskOOM", bytes(m)),
            Self::Delete(m) => (topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete", bytes(m)),
            Self::ExecAdded(m) => (topics::TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded", bytes(m)),
            Self::ExecStarted(m) => {
                (topics::TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted", bytes(m))
            }
            Self::Paused(m) => (topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused", bytes(m)),
            Self::Resumed(m) => (topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed", bytes(m)),
            Self::Checkpointed(m) => {
                (topics::TASK_CHECKPOINTED_EVENT_TOPIC, "TaskCheckpointed", bytes(m))
            }
        }
    }
}

/// A protobuf timestamp.
pub fn timestamp(t: SystemTime) -> MessageField<Timestamp> {
    let d = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: d.as_secs() as i64,
        nanos: d.subsec_nanos() as i32,
        ..Timestamp::default()
    })
}

struct Queue {
    waiting: Mutex<VecDeque<Envelope>>,
    more: Notify,
    limit: usize,
    dropped: AtomicU64,
}

/// Sees each event of a sandbox beside the one that it is sent to: namespace, sandbox, event. Must
/// not block.
pub type Tap = Arc<dyn Fn(&str, &str, &Event) + Send + Sync>;

/// Takes events; cheap to clone.
#[derive(Clone)]
pub struct EventSender {
    sink: Sink,
    tap: Option<Tap>,
}

#[derive(Clone)]
enum Sink {
    Nowhere,
    Containerd(Arc<Queue>),
    Call(Arc<dyn Fn(&Event) + Send + Sync>),
}

impl EventSender {
    /// Events go nowhere: for tests, and for guests whose host publishes.
    pub fn none() -> Self {
        Self { sink: Sink::Nowhere, tap: None }
    }

    /// Publishes to containerd's ttrpc socket (usually
    /// `/run/containerd/containerd.sock.ttrpc`), keeping at most `limit` unsent events.
    pub fn containerd(socket: PathBuf, limit: usize) -> Self {
        let queue = Arc::new(Queue {
            waiting: Mutex::default(),
            more: Notify::new(),
            limit,
            dropped: AtomicU64::new(0),
        });
        tokio::spawn(forward(queue.clone(), socket));
        Self { sink: Sink::Containerd(queue), tap: None }
    }

    /// Calls `f` with each event, which must not block.
    pub fn call(f: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self { sink: Sink::Call(Arc::new(f)), tap: None }
    }

    /// The same, seen by `tap` too.
    #[must_use]
    pub fn tapped(self, tap: Tap) -> Self {
        Self { tap: Some(tap), ..self }
    }

    /// Queues an event of a sandbox.
    pub fn send(&self, namespace: &str, sandbox: &str, event: &Event) {
        if let Some(tap) = &self.tap {
            tap(namespace, sandbox, event);
        }
        let q = match &self.sink {
            Sink::Nowhere => return,
            Sink::Call(f) => return f(event),
            Sink::Containerd(queue) => queue,
        };
        let (topic, name, value) = event.encode();
        let mut envelope = Envelope::new();
        envelope.timestamp = timestamp(SystemTime::now());
        envelope.namespace = namespace.into();
        envelope.topic = topic.into();
        envelope.event = MessageField::some(Any {
            type_url: format!("containerd.events.{name}"),
            value,
            ..Any::default()
        });
        let mut waiting = q.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= q.limit {
            waiting.pop_front();
            q.dropped.fetch_add(1, Ordering::Relaxed);
        }
        waiting.push_back(envelope);
        drop(waiting);
        q.more.notify_one();
    }

    /// Events dropped because containerd was away for too long.
    pub fn dropped(&self) -> u64 {
        match &self.sink {
            Sink::Containerd(queue) => queue.dropped.load(Ordering::Relaxed),
            Sink::Nowhere | Sink::Call(_) => 0,
        }
    }
}

async fn forward(queue: Arc<Queue>, socket: PathBuf) {
    let address = format!("unix://{}", socket.display());
    let mut client: Option<EventsClient> = None;
    let mut pause = Duration::from_millis(50);
    loop {
        let next = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(envelope) = next else {
            queue.more.notified().await;
            continue;
        };
        if client.is_none() {
            client = ttrpc::r#async::Client::connect(&address).await.ok().map(EventsClient::new);
        }
        let mut request = api::ForwardRequest::new();
        request.envelope = MessageField::some(envelope.clone());
        let sent = match &client {
            Some(c) => {
                let timeout = ttrpc::context::with_duration(Duration::from_secs(5));
                match c.forward(timeout, &request).await {
                    Ok(_) => true,
                    // containerd has answered: sending it again would not help.
                    Err(ttrpc::Error::RpcStatus(s)) => {
                        tracing::warn!(topic = %envelope.topic, "event refused: {}", s.message());
                        true
                    }
                    Err(_) => false,
                }
            }
            None => false,
        };
        if sent {
            pause = Duration::from_millis(50);
            continue;
        }
        client = None;
        {
            let mut waiting = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() < queue.limit {
                waiting.push_front(envelope);
            } else {
                queue.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(3));
    }
}
