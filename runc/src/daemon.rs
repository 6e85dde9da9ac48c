//! The resident daemon: what is started in which order.
//!
//! Logs, memory, configuration; sandbox-parent (connected or started); recovery of every pod;
//! only then the socket, and the word to systemd. An engine that dialled earlier would take
//! pods that are not recovered yet for dead.
//!
//! On SIGTERM the daemon just ends: pods, their sockets and their processes belong to
//! sandbox-parent. SIGHUP reads the configuration again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, bail};
use containerd_sandbox::{Controller, ControllerOptions};
use containerd_task::events::EventSender;
use kuasar_daemon::logging::LevelHandle;
use kuasar_host::cgroup::Layout;
use sandbox_parent::client::{Parent, ParentOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::engine::Engines;
use crate::sandboxer::RuncSandboxer;
use crate::selfexe::SelfExe;
use crate::sockets::{ParentSockets, pump};

/// Where the daemon lives.
#[derive(Debug, Clone)]
pub struct Places {
    /// Socket that engines dial.
    pub listen: PathBuf,
    /// State directory.
    pub dir: PathBuf,
    /// Configuration file; its absence is fine unless it was named.
    pub config: Option<PathBuf>,
    /// Overrides the configuration's `log_level`.
    pub log_level: Option<String>,
}

/// Reads and checks the configuration.
pub fn load(places: &Places) -> anyhow::Result<Config> {
    let config: Config = kuasar_daemon::config::load(places.config.as_deref())?;
    if let Err(reason) = config.check() {
        bail!("configuration: {reason}");
    }
    Ok(config)
}

/// sandbox-parent's program: from the configuration, beside our own, or in `PATH`.
fn parent_binary(config: &Config) -> anyhow::Result<PathBuf> {
    if !config.parent_binary.as_os_str().is_empty() {
        return Ok(config.parent_binary.clone());
    }
    let beside = std::env::current_exe()?.with_file_name("sandbox-parent");
    if beside.is_file() {
        return Ok(beside);
    }
    crate::engine::find_program(Path::new("sandbox-parent"))
        .context("sandbox-parent is neither beside this program nor in PATH; set parent_binary")
}

/// Runs the daemon until it is told to end.
pub async fn run(places: Places, config: Config, level: LevelHandle) -> anyhow::Result<()> {
    kuasar_host::record::private_dir(&places.dir).context("state directory")?;
    let options = ParentOptions {
        dir: places.dir.clone(),
        binary: parent_binary(&config)?,
        timeout: Duration::from_secs(config.parent_timeout_secs),
        max_connections: config.max_connections,
    };
    let (parent, connections, fresh) = Parent::connect_or_spawn(&options).await?;
    tracing::info!(pid = parent.pid(), fresh, "sandbox-parent");
    let exe = SelfExe::open().context("make an unwritable handle of this program")?;
    let engines = Arc::new(Engines::new(
        parent.clone(),
        exe.path(),
        config.engines.clone(),
        config.limits(),
    ));
    let events = if config.events_address.is_empty() {
        EventSender::none()
    } else {
        EventSender::containerd(PathBuf::from(&config.events_address), 4096)
    };
    let cgroups = Arc::new(Layout::detect()?);
    let metrics_address = config.metrics_address.clone();
    let shared = Arc::new(RwLock::new(Arc::new(config)));
    let sandboxer = Arc::new(RuncSandboxer::new(
        shared.clone(),
        (parent.clone(), fresh),
        engines,
        cgroups,
        places.dir.clone(),
        events,
    ));
    let options = ControllerOptions {
        dir: places.dir.clone(),
        socket: places.listen.clone(),
        failpoint: Some(Arc::new(kuasar_daemon::failpoint::hit)),
        observer: Some(Arc::new(|rpc, _code, took| kuasar_daemon::metrics::observe(rpc, took))),
        ..ControllerOptions::default()
    };
    let sockets = Arc::new(ParentSockets::new(parent, fresh));
    let controller = Controller::new(options, sandboxer.clone(), sockets)?;
    tokio::spawn(pump(connections, controller.endpoints(), sandboxer));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    if !metrics_address.is_empty() {
        serve_metrics(&metrics_address, controller.clone()).await.context("metrics_address")?;
    }
    tokio::spawn(signals(places, shared, level, stop));
    tokio::spawn(kuasar_daemon::notify::watchdog(|| async { true }));
    let ready = || {
        tracing::info!("ready");
        kuasar_daemon::notify::send("READY=1");
        kuasar_daemon::memory::trim();
    };
    controller.serve(ready, stopped).await?;
    kuasar_daemon::notify::send("STOPPING=1");
    // Holds the engine's executable until nobody can ask for it.
    drop(exe);
    Ok(())
}

async fn signals(
    places: Places,
    config: Arc<RwLock<Arc<Config>>>,
    level: LevelHandle,
    stop: tokio::sync::watch::Sender<bool>,
) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut reload = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reload.recv() => match load(&places) {
                Ok(new) => {
                    kuasar_daemon::notify::reloading();
                    let wanted = places.log_level.as_deref().unwrap_or(&new.log_level);
                    if let Err(error) = level.set(wanted) {
                        tracing::error!(error, "keeping the old log level");
                    }
                    *config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
                    tracing::info!("configuration read again");
                    kuasar_daemon::notify::send("READY=1");
                }
                Err(error) => tracing::error!("keeping the old configuration: {error:#}"),
            },
        }
    }
    stop.send_replace(true);
    Ok(())
}

/// Serves Prometheus metrics on a socket path or a loopback address.
async fn serve_metrics(address: &str, controller: Controller) -> anyhow::Result<()> {
    let text = move || {
        let sandboxes = controller.sandboxes().len() as u64;
        kuasar_daemon::metrics::render("runc", &[("kuasar_sandboxes", sandboxes)])
    };
    if address.starts_with('/') {
        let fd = kuasar_daemon::listen::bind(Path::new(address))?;
        let listener = std::os::unix::net::UnixListener::from(fd);
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                kuasar_daemon::metrics::answer(socket, text()).await;
            }
        });
        return Ok(());
    }
    let address: std::net::SocketAddr = address.parse().context("neither a path nor address:port")?;
    if !address.ip().is_loopback() {
        bail!("{address} is not a loopback address");
    }
    let listener = tokio::net::TcpListener::bind(address).await?;
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            kuasar_daemon::metrics::answer(socket, text()).await;
        }
    });
    Ok(())
}
