//! The Task API for engines that call the guest themselves.
//!
//! iSulad sends no token, so nobody greets on this port. What it can do is bounded in other ways:
//!
//! * It is listened on only where the host asked for it at Setup, it serves the Task API alone, and
//!   connections of others than the host are closed (the serial port has no other at its end).
//! * The engine makes what the host has declared, and nothing else. Its Create and Exec name that;
//!   of what they say besides, only the path of the bundle is kept, for State. Each declaration is
//!   good for one attempt.
//! * Checkpoints and changed resources, which the host would have to look at first, are refused.
//!
//! Streams are the host's connections, as for every process. They are known from the declaration
//! on, so that the host has joined them before the process is there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_task::TaskServer;
use containerd_task::error::{Error, Result};
use containerd_task::journal::Stdio;
use futures::stream;
use kuasar_protos::shim::api;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use ttrpc::r#async::{MethodHandler, Server, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};
use vmm_common::guest::{DeclareRequest, SetupRequest};
use vmm_common::handshake::StreamKind;
use vmm_common::{CONTAINER_TYPE, stream_address};

use crate::channel::{Control, Stream};
use crate::limits;

/// What an exec's process is sent as.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// How far a declaration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It may be used.
    Declared,
    /// It is being used.
    Making,
    /// There is such a process, or was.
    Made,
    /// It was taken back, or its attempt failed.
    Gone,
}

struct Entry {
    question: DeclareRequest,
    stage: watch::Sender<Stage>,
}

impl Entry {
    /// The streams that its process has, by the names under which the host connects to them.
    fn streams(&self) -> Stdio {
        let q = &self.question;
        let of = |given: &str, kind| match given {
            "" => String::new(),
            _ => stream_address(&q.container, &q.exec, kind),
        };
        if q.terminal {
            let both = stream_address(&q.container, &q.exec, StreamKind::Terminal);
            return Stdio {
                stdin: both.clone(),
                stdout: both,
                stderr: String::new(),
                terminal: true,
            };
        }
        Stdio {
            stdin: of(&q.stdin, StreamKind::Stdin),
            stdout: of(&q.stdout, StreamKind::Stdout),
            stderr: of(&q.stderr, StreamKind::Stderr),
            terminal: false,
        }
    }

    fn stage(&self) -> Stage {
        *self.stage.borrow()
    }
}

type Table = HashMap<(String, String), Arc<Entry>>;

/// What the host has declared, and the server for the engine.
pub struct Engine {
    tasks: Arc<TaskServer>,
    table: Mutex<Table>,
    /// Kept as long as we live.
    server: Mutex<Option<Server>>,
    /// Where connections get in, as many as there are places.
    door: Mutex<Option<(mpsc::Sender<Control>, Arc<Semaphore>)>>,
}

fn key(container: &str, exec: &str) -> (String, String) {
    (container.to_owned(), exec.to_owned())
}

fn named(container: &str, exec: &str) -> String {
    let exec = if exec.is_empty() { String::new() } else { format!(" exec {exec:.130}") };
    format!("container {container:.130}{exec}")
}

impl Engine {
    /// Nothing is declared, and nobody listens.
    pub fn new(tasks: Arc<TaskServer>) -> Arc<Self> {
        let (table, server, door) = (Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Self { tasks, table, server, door })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine may make this from now on.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when it has; [`Error::InvalidArgument`] for ids that are none.
    pub fn declare(&self, question: DeclareRequest) -> Result<()> {
        let invalid = |error: kuasar_host::Error| Error::InvalidArgument(error.to_string());
        kuasar_host::id::check("container", &question.container).map_err(invalid)?;
        if !question.exec.is_empty() {
            kuasar_host::id::check("exec", &question.exec).map_err(invalid)?;
        }
        let mut table = self.table();
        let key = key(&question.container, &question.exec);
        let old = table.get(&key).map(|entry| entry.stage());
        if matches!(old, Some(Stage::Making | Stage::Made)) {
            return Err(Error::AlreadyExists(format!("{} was made", named(&key.0, &key.1))));
        }
        if old.is_none() && table.len() >= limits::DECLARED {
            let text = format!("{} containers and execs are declared already", limits::DECLARED);
            return Err(Error::ResourceExhausted(text));
        }
        let entry = Entry { question, stage: watch::Sender::new(Stage::Declared) };
        self.tasks.streams().announce_raw(&entry.streams())?;
        if let Some(old) = table.insert(key, Arc::new(entry)) {
            old.stage.send_replace(Stage::Gone);
        }
        Ok(())
    }

    /// Takes a declaration back, and deletes what was made of it.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] while that runs or is being made.
    pub async fn withdraw(&self, container: &str, exec: &str) -> Result<()> {
        let of = |key: &(String, String)| key.0 == container && (exec.is_empty() || key.1 == exec);
        let busy = self.table().iter().any(|(key, e)| of(key) && e.stage() == Stage::Making);
        if busy {
            return Err(Error::FailedPrecondition(format!(
                "{} is being made",
                named(container, exec)
            )));
        }
        match self.tasks.delete(container, exec).await {
            Ok(_) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let gone: Vec<Arc<Entry>> = {
            let mut table = self.table();
            let keys: Vec<_> = table.keys().filter(|key| of(key)).cloned().collect();
            keys.iter().filter_map(|key| table.remove(key)).collect()
        };
        for entry in gone {
            if entry.stage.send_replace(Stage::Gone) == Stage::Declared {
                self.tasks.streams().forget_raw(&entry.streams());
            }
        }
        Ok(())
    }

    /// Waits until the engine has made what was declared.
    ///
    /// # Errors
    /// [`Error::NotFound`] when that cannot be (any more).
    pub async fn made(&self, container: &str, exec: &str) -> Result<()> {
        let none = || Error::NotFound(format!("{} is not declared", named(container, exec)));
        let entry = self.table().get(&key(container, exec)).cloned().ok_or_else(none)?;
        let mut stage = entry.stage.subscribe();
        let settled = stage.wait_for(|stage| matches!(stage, Stage::Made | Stage::Gone)).await;
        match settled.map(|stage| *stage) {
            Ok(Stage::Made) => Ok(()),
            _ => Err(none()),
        }
    }

    fn find(&self, container: &str, exec: &str) -> Option<Arc<Entry>> {
        self.table().get(&key(container, exec)).cloned()
    }

    fn claim(&self, container: &str, exec: &str) -> Result<Arc<Entry>> {
        let entry = self.find(container, exec).ok_or_else(|| {
            Error::FailedPrecondition(format!(
                "{} was not announced: engines that call the guest announce it to the sandboxer \
                 first, in Update",
                named(container, exec)
            ))
        })?;
        let claimed = entry.stage.send_if_modified(|stage| {
            let free = *stage == Stage::Declared;
            if free {
                *stage = Stage::Making;
            }
            free
        });
        if claimed {
            return Ok(entry);
        }
        Err(Error::AlreadyExists(format!("{} was made before", named(container, exec))))
    }

    fn settle(&self, entry: &Entry, made: bool) {
        if !made {
            self.table().remove(&key(&entry.question.container, &entry.question.exec));
        }
        entry.stage.send_replace(if made { Stage::Made } else { Stage::Gone });
    }

    /// The Task API as an engine may call it.
    fn services(self: &Arc<Self>) -> HashMap<String, Service> {
        let mut services = self.tasks.tables();
        for service in services.values_mut() {
            let methods = std::mem::take(&mut service.methods);
            service.methods = methods
                .into_iter()
                .map(|(name, inner)| {
                    let Some(what) = Method::of(&name) else { return (name, inner) };
                    let door = Door { what, inner: inner.into(), engine: self.clone() };
                    (name, Box::new(door) as Box<dyn MethodHandler + Send + Sync>)
                })
                .collect();
        }
        services
    }

    /// Listens where the host has asked for it; answers the port. Where there is no vsock, streams of
    /// the serial port come by [`Engine::offer`].
    ///
    /// # Errors
    /// When the port is taken, or the server cannot be started.
    pub async fn listen(self: &Arc<Self>, request: &SetupRequest) -> Result<u32> {
        let port = request.task_port;
        if port == 0 {
            return Ok(0);
        }
        let failed = |error: &dyn std::fmt::Display| {
            Error::internal(format!("listen on vsock port {port}"), error.to_string())
        };
        let (door, connections) = mpsc::channel(1);
        let slots = Arc::new(Semaphore::new(limits::ENGINE));
        match VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)) {
            Ok(listener) => drop(tokio::spawn(accept(listener, door.clone(), slots.clone()))),
            // A kernel without vsock: the host has reached us by the serial port.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            Err(error) => return Err(failed(&error)),
        }
        let connections = stream::unfold(connections, |mut queue| async move {
            queue.recv().await.map(|one| (Ok::<_, std::io::Error>(one), queue))
        });
        let mut server = Server::new()
            .add_listener(ttrpc::r#async::transport::Listener::new(connections))
            .register_service(self.services());
        server.start().await.map_err(|error| failed(&error))?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        *self.door.lock().unwrap_or_else(PoisonError::into_inner) = Some((door, slots));
        Ok(port)
    }

    /// A connection of the engine's that came another way than by vsock: accepted where the host has
    /// asked for that, else dropped.
    pub async fn offer<T, S: Stream>(&self, accept: impl FnOnce(T) -> S, connection: T) {
        let door = self.door.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((door, slots)) = door else { return };
        let_in(&door, &slots, || accept(connection)).await;
    }
}

/// Lets a connection of the engine's in, if there is a place.
async fn let_in<S: Stream>(
    door: &mpsc::Sender<Control>,
    slots: &Arc<Semaphore>,
    connection: impl FnOnce() -> S,
) {
    match slots.clone().try_acquire_owned() {
        Ok(slot) => drop(door.send(Control::new(connection(), slot)).await),
        Err(_) => tracing::warn!("too many connections of the engine: one was closed"),
    }
}

async fn accept(listener: VsockListener, door: mpsc::Sender<Control>, slots: Arc<Semaphore>) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                let_in(&door, &slots, || stream).await;
            }
            Ok((_, peer)) => {
                tracing::warn!(cid = peer.cid(), "not the host's: closed");
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept the engine's connections");
                // Out of descriptors: let some be closed first.
                tokio::time::sleep(limits::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Methods that are not passed on as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Create,
    Exec,
    State,
    Refused,
}

impl Method {
    fn of(name: &str) -> Option<Self> {
        match name {
            "Create" => Some(Self::Create),
            "Exec" => Some(Self::Exec),
            "State" => Some(Self::State),
            "Update" | "Checkpoint" => Some(Self::Refused),
            _ => None,
        }
    }
}

/// Between the engine and a method of the Task server.
struct Door {
    what: Method,
    inner: Arc<dyn MethodHandler + Send + Sync>,
    engine: Arc<Engine>,
}

fn read<Q: Message>(payload: &[u8]) -> Result<Q> {
    Q::parse_from_bytes(payload)
        .map_err(|e| Error::InvalidArgument(format!("the request cannot be read: {e}")))
}

fn write(message: &impl Message) -> Result<Vec<u8>> {
    message.write_to_bytes().map_err(|error| Error::internal("encode a message", error))
}

fn is_ok(answer: &ttrpc::Result<Response>) -> bool {
    answer.as_ref().is_ok_and(|answer| answer.status().code() == ttrpc::Code::OK)
}

/// The engine's request for a container, as the host has declared it.
fn create(entry: &Entry, payload: &[u8]) -> Result<Vec<u8>> {
    let asked: api::CreateTaskRequest = read(payload)?;
    let Stdio { stdin, stdout, stderr, terminal } = entry.streams();
    let value = write(entry.question.what.get_or_default())?;
    write(&api::CreateTaskRequest {
        id: asked.id,
        bundle: asked.bundle,
        terminal,
        stdin,
        stdout,
        stderr,
        options: MessageField::some(Any {
            type_url: CONTAINER_TYPE.into(),
            value,
            ..Any::default()
        }),
        ..api::CreateTaskRequest::default()
    })
}

/// The same for an exec.
fn exec(entry: &Entry) -> Result<Vec<u8>> {
    let Stdio { stdin, stdout, stderr, terminal } = entry.streams();
    let value = entry.question.process.clone();
    write(&api::ExecProcessRequest {
        id: entry.question.container.clone(),
        exec_id: entry.question.exec.clone(),
        terminal,
        stdin,
        stdout,
        stderr,
        spec: MessageField::some(Any { type_url: PROCESS.into(), value, ..Any::default() }),
        ..api::ExecProcessRequest::default()
    })
}

impl Door {
    async fn make(
        &self,
        entry: Arc<Entry>,
        payload: Result<Vec<u8>>,
        context: TtrpcContext,
        request: Request,
    ) -> Result<ttrpc::Result<Response>> {
        let payload = payload.inspect_err(|_| self.engine.settle(&entry, false))?;
        let (engine, inner) = (self.engine.clone(), self.inner.clone());
        // In a task of its own: an engine that hangs up leaves no declaration half used.
        let made = tokio::spawn(async move {
            let answer = inner.handler(context, Request { payload, ..request }).await;
            engine.settle(&entry, is_ok(&answer));
            answer
        });
        made.await.map_err(|error| Error::internal("making it panicked", error))
    }

    async fn call(
        &self,
        context: TtrpcContext,
        request: Request,
    ) -> Result<ttrpc::Result<Response>> {
        match self.what {
            Method::Create => {
                let asked: api::CreateTaskRequest = read(&request.payload)?;
                let entry = self.engine.claim(&asked.id, "")?;
                let payload = create(&entry, &request.payload);
                self.make(entry, payload, context, request).await
            }
            Method::Exec => {
                let asked: api::ExecProcessRequest = read(&request.payload)?;
                let entry = self.engine.claim(&asked.id, &asked.exec_id)?;
                let payload = exec(&entry);
                self.make(entry, payload, context, request).await
            }
            Method::State => {
                let mut answer = self.inner.handler(context, request).await;
                let good = is_ok(&answer);
                if let Some(answer) = answer.as_mut().ok().filter(|_| good) {
                    let mut state: api::StateResponse = read(&answer.payload)?;
                    if let Some(entry) = self.engine.find(&state.id, &state.exec_id) {
                        let q = &entry.question;
                        state.stdin.clone_from(&q.stdin);
                        state.stdout.clone_from(&q.stdout);
                        state.stderr.clone_from(&q.stderr);
                        answer.payload = write(&state)?;
                    }
                }
                Ok(answer)
            }
            Method::Refused => Err(Error::Unimplemented(format!(
                "{} is not for engines that call the guest themselves",
                request.method
            ))),
        }
    }
}

#[async_trait]
impl MethodHandler for Door {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        match self.call(context, request).await {
            Ok(answer) => answer,
            // As an answer: an error would be one of the transport.
            Err(error) => match ttrpc::Error::from(error) {
                ttrpc::Error::RpcStatus(status) => {
                    Ok(Response { status: MessageField::some(status), ..Response::default() })
                }
                other => Err(other),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_task::TaskOptions;
    use containerd_task::events::EventSender;
    use containerd_task::journal::NoJournal;
    use containerd_task::runtime::NoKeeper;
    use vmm_common::guest;

    fn engine() -> Arc<Engine> {
        Engine::new(TaskServer::new(
            Arc::new(containerd_task::testing::Nothing),
            Arc::new(NoKeeper),
            Arc::new(NoJournal),
            EventSender::none(),
            TaskOptions::default(),
        ))
    }

    fn question(container: &str, exec: &str) -> DeclareRequest {
        DeclareRequest {
            container: container.into(),
            exec: exec.into(),
            what: MessageField::some(guest::Container {
                rootfs: "/r".into(),
                ..Default::default()
            }),
            process: b"{}".to_vec(),
            stdout: "/fifo/out".into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn an_engine_makes_what_was_declared_as_it_was_declared_and_once() {
        let engine = engine();
        assert!(matches!(engine.claim("c1", ""), Err(Error::FailedPrecondition(_))));
        engine.declare(question("c1", "")).unwrap();
        // Another Update of a daemon that was not answered.
        engine.declare(question("c1", "")).unwrap();
        assert!(engine.tasks.streams().has_raw("c1//stdout"));
        let entry = engine.claim("c1", "").unwrap();
        let asked = api::CreateTaskRequest {
            id: "c1".into(),
            bundle: "/engines".into(),
            checkpoint: "/etc".into(),
            stdout: "/host/fifo".into(),
            stdin: "/host/in".into(),
            options: MessageField::some(Any { type_url: "evil".into(), ..Any::default() }),
            ..Default::default()
        };
        let told = create(&entry, &asked.write_to_bytes().unwrap()).unwrap();
        let told: api::CreateTaskRequest = read(&told).unwrap();
        assert_eq!((told.id.as_str(), told.bundle.as_str()), ("c1", "/engines"));
        assert_eq!(told.stdout, "vsock-stream://c1//stdout");
        assert!(told.stdin.is_empty() && told.checkpoint.is_empty() && told.rootfs.is_empty());
        assert_eq!(told.options.type_url, CONTAINER_TYPE);
        // While it is made, and afterwards, nobody makes it again or takes it away.
        assert!(matches!(engine.claim("c1", ""), Err(Error::AlreadyExists(_))));
        assert!(matches!(engine.declare(question("c1", "")), Err(Error::AlreadyExists(_))));
        assert!(matches!(engine.withdraw("c1", "").await, Err(Error::FailedPrecondition(_))));
        engine.settle(&entry, true);
        engine.made("c1", "").await.unwrap();
        assert!(matches!(engine.claim("c1", ""), Err(Error::AlreadyExists(_))));
    }

    #[tokio::test]
    async fn what_was_taken_back_or_has_failed_is_declared_no_longer() {
        let engine = engine();
        for exec in ["", "e1", "e2"] {
            engine.declare(question("c1", exec)).unwrap();
        }
        engine.declare(question("c2", "")).unwrap();
        engine.withdraw("c1", "e1").await.unwrap();
        assert!(!engine.tasks.streams().has_raw("c1/e1/stdout"));
        let waiting = tokio::spawn({
            let engine = engine.clone();
            async move { engine.made("c1", "e2").await }
        });
        tokio::task::yield_now().await;
        engine.withdraw("c1", "").await.unwrap();
        assert!(matches!(waiting.await.unwrap(), Err(Error::NotFound(_))));
        assert_eq!(engine.table().len(), 1);
        engine.withdraw("c1", "").await.unwrap();
        let failed = engine.claim("c2", "").unwrap();
        engine.settle(&failed, false);
        assert!(matches!(engine.made("c2", "").await, Err(Error::NotFound(_))));
        assert!(matches!(engine.claim("c2", ""), Err(Error::FailedPrecondition(_))));
    }

    #[tokio::test]
    async fn declarations_are_checked_and_bounded() {
        let engine = engine();
        for (container, exec) in [("", ""), ("../c", ""), ("c", "a/b")] {
            let refused = engine.declare(question(container, exec));
            assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{container:?} {exec:?}");
        }
        for n in 0..limits::DECLARED {
            engine.declare(question("c", &format!("e{n}"))).unwrap();
        }
        let refused = engine.declare(question("c", "more"));
        assert!(matches!(refused, Err(Error::ResourceExhausted(_))));
        engine.declare(question("c", "e0")).unwrap();
    }

    #[tokio::test]
    async fn the_engine_gets_the_task_api_and_of_it_what_it_may_call() {
        let services = engine().services();
        let mut names: Vec<_> = services.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["containerd.task.v2.Task", "containerd.task.v3.Task"]);
        for refused in ["Update", "Checkpoint"] {
            assert_eq!(Method::of(refused), Some(Method::Refused));
        }
        assert!(services.values().all(|service| service.methods.len() == 17));
    }
}
