//! `debug`: a program beside the containers of a pod that is a machine, in its guest.
//!
//! The daemon answers with a socket that takes one connection: our input one way, the program's output
//! the other. Its end is the session's, so that the end of our input alone is told by how many bytes it
//! had.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use kuasar_protos::admin as api;
use kuasar_protos::admin::steer_debug_request::What;
use tokio::signal::unix::{SignalKind, signal};

use crate::client::{Client, connect};
use crate::error::{Error, Result};
use crate::pods::{self, Pod};
use crate::process::{Stopped, code_of};
use crate::stdio::{self, RawTerminal};

/// How long the daemon may take: it copies a program into the guest first.
const OPENING: Duration = Duration::from_secs(60);

/// What `debug` does.
#[derive(Debug, clap::Args)]
pub struct DebugArgs {
    /// Pod: id, beginning of an id, name or namespace/name; or a container's id
    pub pod: String,
    /// Arguments of the configured program, in place of the configured ones (a shell); as in
    /// "sh -c 'dmesg | tail'"
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

/// Runs it until it ends, or we are told to.
///
/// # Errors
/// The daemon's: it is off, the pod is no machine, or does not run. [`Error::Exit`] when a signal has
/// ended us.
pub async fn debug(clients: &[Client], args: &DebugArgs) -> Result<()> {
    let (pod, _) = pods::find(clients, &args.pod).await?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let (width, height) = stdio::size().filter(|_| terminal).unwrap_or((80, 24));
    let q = api::DebugRequest {
        sandbox_id: pod.sandbox.id.clone(),
        args: args.args.clone(),
        terminal,
        width: width.into(),
        height: height.into(),
        ..Default::default()
    };
    let mut signals = Stopped::new()?;
    let patience = ttrpc::context::with_duration(OPENING);
    let opened = pod.client.admin().debug(patience, &q).await?;
    let path = Path::new(&opened.path);
    let socket = connect(path).await.map_err(Error::at("connect to", path))?;
    let session = Session { pod, id: opened.session };
    let _raw = if terminal { RawTerminal::enter()? } else { None };
    let resized = SignalKind::window_change();
    let mut resized = signal(resized).map_err(Error::io("handle signals"))?;
    let (from, to) = socket.into_split();
    let mut output = tokio::spawn(stdio::copy_out(from, std::io::stdout()));
    let mut input = Some(tokio::spawn(stdio::copy_in(to)));
    loop {
        let ended = async {
            match &mut input {
                Some(input) => input.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = &mut output => return Ok(()),
            signal = signals.next() => return Err(Error::Exit(code_of(signal))),
            _ = resized.recv() => if terminal {
                session.resize().await;
            },
            ended = ended => {
                input = None;
                if let Ok((to, bytes)) = ended {
                    session.steer(What::InputBytes(bytes)).await;
                    // Its end would be the session's.
                    to.forget();
                }
            }
        }
    }
}

struct Session {
    pod: Pod,
    id: String,
}

impl Session {
    async fn resize(&self) {
        if let Some((width, height)) = stdio::size() {
            let (width, height) = (width.into(), height.into());
            let size = api::TerminalSize { width, height, ..Default::default() };
            self.steer(What::Size(size)).await;
        }
    }

    async fn steer(&self, what: What) {
        let q = api::SteerDebugRequest {
            sandbox_id: self.pod.sandbox.id.clone(),
            session: self.id.clone(),
            what: Some(what),
            ..Default::default()
        };
        // It may have ended just now; its end is what we wait for anyway.
        let _ = self.pod.client.admin().steer_debug(self.pod.client.context(), &q).await;
    }
}
