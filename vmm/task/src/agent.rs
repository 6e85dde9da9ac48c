//! The parts joined together, from the kernel's hand-over to the last breath.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use containerd_task::events::{Event, EventSender};
use containerd_task::journal::NoJournal;
use containerd_task::runtime::NoKeeper;
use containerd_task::{TaskOptions, TaskServer};
use futures::stream;
use tokio::sync::mpsc;

use crate::channel::{self, Control, Gate};
use crate::cmdline::{Channel, Options};
use crate::containers::GuestContainers;
use crate::debug::Debugs;
use crate::engine::Engine;
use crate::events::Events;
use crate::files::Files;
use crate::forward::Forwards;
use crate::guest::GuestService;
use crate::kmsg::Kmsg;
use crate::reaper::Reaper;
use crate::spans::Spans;
use crate::{boot, kmsg, limits, modules, power, serial};

/// Why PID 1 cannot do its duty.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs as PID 1; ends the machine when it cannot.
pub fn main() -> ! {
    let started_ns = boot::now_ns();
    let mut steps = boot::Steps::default();
    let mut options = Options::default();
    let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        run(started_ns, &mut steps, &mut options)
    }));
    match run {
        Ok(Ok(never)) => match never {},
        Ok(Err(error)) => tracing::error!("cannot serve: {error}"),
        // The hook has reported it.
        Err(_) => {}
    }
    power::end(options.poweroff)
}

fn run(
    started_ns: u64,
    steps: &mut boot::Steps,
    options: &mut Options,
) -> Result<Infallible, Failure> {
    // One arena: threads come and go, and their memory would not.
    // SAFETY: plain call before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: nobody else reads or writes the environment now.
    unsafe { std::env::set_var("PATH", "/usr/sbin:/usr/bin:/sbin:/bin") };
    let not_loaded = modules::load();
    steps.end_of("modules");
    let mounted = boot::mounts();
    steps.end_of("mounts");
    let (read, unknown) = Options::read();
    *options = read;
    if let Ok(file) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // It can only be set once, and this is the once.
        let _ = tracing::subscriber::set_global_default(Kmsg::new(file, options.level));
    }
    kmsg::report_panics();
    mounted.map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    })?;
    modules::close();
    for why in not_loaded {
        tracing::error!(why, "a module of the image cannot be loaded: is it of this kernel?");
    }
    for option in unknown {
        tracing::warn!(option, "the kernel's command line has an option that is not known");
    }
    steps.end_of("log and options");
    boot::limits(options.debug);
    steps.end_of("limits");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(limits::STACK)
        .max_blocking_threads(limits::THREADS)
        .thread_keep_alive(std::time::Duration::from_secs(1))
        .build()?;
    steps.end_of("runtime");
    runtime.block_on(serve(started_ns, steps, options.clone()))
}

async fn serve(
    started_ns: u64,
    steps: &mut boot::Steps,
    options: Options,
) -> Result<Infallible, Failure> {
    let reaper = Reaper::default();
    reaper.run()?;
    steps.end_of("reaper");
    let containers = Arc::new(GuestContainers::new(reaper.clone())?);
    let events = Arc::<Events>::default();
    let oom = events.clone();
    let sender = EventSender::call(move |event| {
        if let Event::Oom(oom_event) = event {
            oom.oom(&oom_event.container_id);
        }
    });
    let tasks = TaskServer::new(
        containers.clone(),
        Arc::new(NoKeeper),
        Arc::new(NoJournal),
        sender,
        TaskOptions {
            shim_pid: 1,
            max_containers: limits::CONTAINERS,
            max_execs: limits::EXECS,
            drain: limits::DRAIN,
            ..TaskOptions::default()
        },
    );
    let forwards = Arc::<Forwards>::default();
    let files = Arc::<Files>::default();
    let exe = containers.program();
    let debugs = Debugs::new(options.debug_console, reaper.clone(), files.clone(), exe);
    let (control, connections) = mpsc::channel(limits::CONTROL);
    let gate = Gate::new(tasks.clone(), forwards.clone(), debugs.clone(), control);
    let spans = Spans::default();
    kuasar_trace::install(Box::new(spans.clone()));
    let service = Arc::new(GuestService {
        spans,
        engine: Engine::new(tasks.clone()),
        containers,
        reaper,
        gate: gate.clone(),
        forwards,
        debugs,
        events,
        storages: Default::default(),
        files,
        poweroff: options.poweroff,
        started_ns,
        serving_ns: Default::default(),
        steps: Default::default(),
        settled: Default::default(),
        pod: Default::default(),
        pod_ready: Default::default(),
        ending: Default::default(),
        network: Default::default(),
    });
    let _server = ttrpc_server(connections, &tasks, &service).await?;
    steps.end_of("services");
    let vsock = options.channel != Channel::Serial;
    let serial = options.channel != Channel::Vsock;
    if vsock {
        // Also where there is no device yet: it may be plugged after a template was restored.
        match channel::listen(&gate) {
            Ok(()) => {}
            Err(error) if serial => tracing::info!(%error, "no vsock"),
            Err(error) => return Err(format!("no vsock: {error}").into()),
        }
    }
    steps.end_of("channel");
    service.serving_ns.store(boot::now_ns(), Ordering::Relaxed);
    *service.steps() = std::mem::take(steps);
    if !vsock || !channel::has_vsock() {
        // A machine that waits for its host may become a template, which is to have it done.
        service.settle();
    }
    let port = serial.then(|| tokio::spawn(serve_port(service.clone())));
    if vsock {
        // A machine of a template has no vsock device before it is restored: it is a copy then,
        // and the one that plugs the device in is its host.
        channel::wait_for_vsock().await?;
        let dial = || channel::dial_host(options.ready);
        channel::welcome(dial, || service.settle(), |welcome| service.welcomed(welcome)).await;
        // One that is there is served on; none is waited for any more.
        port.iter().for_each(tokio::task::JoinHandle::abort);
    }
    // Everything else is done by tasks that never end.
    std::future::pending().await
}

/// Serves the serial port, when there is one.
async fn serve_port(service: Arc<GuestService>) {
    let port = match serial::wait_for_port().await {
        Ok(port) => port,
        Err(error) => return tracing::error!(error = %error.chain(), "no serial port"),
    };
    let path = port.display().to_string();
    let (gate, engine) = (service.gate.clone(), service.engine.clone());
    service.settle();
    if let Err(error) = serial::serve(port, gate, engine, move |w| service.welcomed(w)) {
        tracing::error!(path, %error, "the serial port cannot be served");
    }
}

async fn ttrpc_server(
    connections: mpsc::Receiver<Control>,
    tasks: &Arc<TaskServer>,
    service: &Arc<GuestService>,
) -> Result<ttrpc::r#async::Server, Failure> {
    let connections = stream::unfold(connections, |mut queue| async move {
        queue.recv().await.map(|connection| (Ok::<_, std::io::Error>(connection), queue))
    });
    let listener = ttrpc::r#async::transport::Listener::new(connections);
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener)
        .register_service(tasks.tables())
        .register_service(service.services());
    server.start().await?;
    Ok(server)
}
