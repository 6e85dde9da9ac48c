//! Connections: to daemons' sockets and to pods' Task sockets, in ttrpc.

use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_protos::admin as api;
use kuasar_protos::admin_ttrpc::AdminClient;
use kuasar_protos::controller_ttrpc::ControllerClient;
use kuasar_protos::shim::shim_async::TaskClient;
use tokio::net::UnixStream;

use crate::daemons::Daemon;
use crate::error::{Error, Result};
use crate::output;

/// A daemon that answers.
#[derive(Clone)]
pub struct Client {
    /// Its kind, in its own words.
    pub kind: String,
    /// Its socket.
    pub address: PathBuf,
    /// What it says of itself.
    pub info: api::InfoResponse,
    connection: ttrpc::r#async::Client,
    timeout: Duration,
}

/// Connects to a socket whose path may be of any length.
///
/// # Errors
/// Those of open(2) and connect(2).
pub async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let handle = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    UnixStream::connect(format!("/proc/self/fd/{}", handle.as_raw_fd())).await
}

async fn ttrpc_client(path: &Path) -> std::io::Result<ttrpc::r#async::Client> {
    let socket = ttrpc::asynchronous::transport::Socket::new(connect(path).await?);
    Ok(ttrpc::r#async::Client::new(socket))
}

/// Why a first call got no answer.
fn unreachable(address: &Path, why: impl Into<String>) -> Error {
    Error::Unreachable { address: address.to_owned(), why: why.into() }
}

impl Client {
    /// Connects and asks who is there; `timeout` is that of all calls.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub async fn dial(daemon: &Daemon, timeout: Duration) -> Result<Self> {
        let address = &daemon.address;
        let start = if daemon.kind.is_empty() {
            "is it started?".to_owned()
        } else {
            format!("start it: systemctl start kuasar-{}", daemon.kind)
        };
        let connection = ttrpc_client(address).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                unreachable(address, "permission denied: run this as root")
            }
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                unreachable(address, start.clone())
            }
            _ => unreachable(address, error.to_string()),
        })?;
        let admin = AdminClient::new(connection.clone());
        let patience = timeout.min(Duration::from_secs(5));
        let q = api::InfoRequest::new();
        let asked = admin.info(ttrpc::context::with_duration(patience), &q);
        // While no daemon runs, its socket may be kept: a connection is no answer.
        let info = match tokio::time::timeout(patience, asked).await {
            Ok(Ok(info)) => info,
            Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                let text = "is a sandboxer of this version running there?";
                return Err(unreachable(address, format!("{}: {text}", status.message)));
            }
            Ok(Err(error)) => return Err(unreachable(address, error.to_string())),
            Err(_) => return Err(unreachable(address, format!("it says nothing: {start}"))),
        };
        Ok(Self { kind: info.kind.clone(), address: address.clone(), info, connection, timeout })
    }

    /// The daemon's Admin service.
    pub fn admin(&self) -> AdminClient {
        AdminClient::new(self.connection.clone())
    }

    /// The daemon's sandbox Controller.
    pub fn controller(&self) -> ControllerClient {
        ControllerClient::new(self.connection.clone())
    }

    /// The deadline of a usual call.
    pub fn context(&self) -> ttrpc::context::Context {
        ttrpc::context::with_duration(self.timeout)
    }

    /// All its sandboxes.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn sandboxes(&self) -> Result<Vec<api::Sandbox>> {
        let mut all = Vec::new();
        let mut q = api::ListRequest::new();
        loop {
            let page = self.admin().list(self.context(), &q).await?;
            let last = page.sandboxes.last().map(|s| s.id.clone());
            all.extend(page.sandboxes);
            match last {
                Some(last) if page.more => q.after = last,
                _ => return Ok(all),
            }
        }
    }
}

/// A call that may take as long as it likes.
pub fn patient() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(0)
}

/// The Task service of a pod, by the address that its Start has answered.
///
/// # Errors
/// [`Error::Failed`] for an address that is no unix socket; those of connect(2).
pub async fn tasks(address: &str) -> Result<TaskClient> {
    let path = address.strip_prefix("ttrpc+").unwrap_or(address).strip_prefix("unix://");
    let Some(path) = path.filter(|path| !path.is_empty()) else {
        return Err(Error::Failed(match address {
            "" => "the pod has no Task socket: it was not started, or has ended".into(),
            other => format!("the pod's Task socket {other:?} is not on this host"),
        }));
    };
    let client = ttrpc_client(Path::new(path)).await;
    Ok(TaskClient::new(client.map_err(Error::at("connect to", Path::new(path)))?))
}

/// Dials daemons side by side. Those that do not answer are told on standard error; an error when
/// none does.
///
/// # Errors
/// [`Error::Unreachable`] of the first; [`Error::NotFound`] when there is no daemon to dial.
pub async fn dial_all(daemons: &[Daemon], timeout: Duration) -> Result<Vec<Client>> {
    let dialled = daemons.iter().map(|daemon| Client::dial(daemon, timeout));
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for client in futures::future::join_all(dialled).await {
        match client {
            Ok(client) => all.push(client),
            Err(error) => failed.push(error),
        }
    }
    if all.is_empty() {
        return Err(failed.into_iter().next().unwrap_or_else(|| {
            Error::NotFound(
                "no sandboxer is configured here: see /etc/kuasar, or name a socket with --address"
                    .into(),
            )
        }));
    }
    for error in failed {
        output::note(&format!("warning: {error}"));
    }
    Ok(all)
}
