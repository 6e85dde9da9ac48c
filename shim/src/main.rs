//! `containerd-shim-kuasar-<kind>-v<N>`: one program under several names.
//!
//! A sandboxer is a resident daemon, so there is no shim to run. containerd still wants a binary
//! that matches `runtime_type`: without it running containers are lost when it restarts
//! (engine-contract §2.5), and with `sandboxer = "shim"` it asks the binary for the socket of
//! each pod (§8.2). This program answers and ends; it never starts, stops or kills anything.
//!
//! containerd reads standard output and error of `start` together, so nothing but the answer is
//! printed there.

mod args;
mod bundle;
mod daemon;

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use args::{Action, Args};
use daemon::Daemon;
use kuasar_protos::shim::api::DeleteResponse;
use kuasar_protos::shim::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};

/// Why the shim could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// The bundle does not say what it must.
    #[error("{0}")]
    Bundle(String),
    /// The daemon cannot be reached or has refused.
    #[error("sandboxer at {socket}: {why}")]
    Daemon {
        /// Its socket.
        socket: String,
        /// What went wrong.
        why: String,
    },
    /// Standard input or output, or a file.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

fn main() -> ExitCode {
    let mut words = std::env::args();
    let program = words.next().unwrap_or_default();
    let done = Args::parse(words).and_then(|args| run(&program, &args));
    match done {
        Ok(answer) => match std::io::stdout().write_all(&answer) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE, // Nobody reads it.
        },
        Err(e) => {
            eprintln!("{}: {e}", name(&program));
            ExitCode::FAILURE
        }
    }
}

/// The program's name without its directory.
fn name(program: &str) -> &str {
    Path::new(program).file_name().and_then(|n| n.to_str()).unwrap_or("containerd-shim-kuasar")
}

fn run(program: &str, args: &Args) -> Result<Vec<u8>, Error> {
    let name = name(program);
    match args.action {
        Action::Version => {
            Ok(format!("{name}:\n  Version:  {}\n", env!("CARGO_PKG_VERSION")).into_bytes())
        }
        Action::Info => info(name),
        Action::Start => start(&Daemon::of(name)?, args),
        Action::Delete => delete(&Daemon::of(name)?, args),
    }
}

/// What containerd wants to know of the runtime. Its request says nothing that we need.
fn info(name: &str) -> Result<Vec<u8>, Error> {
    let mut request = Vec::new();
    // A closed or endless standard input is not worth a failure.
    let _ = std::io::stdin().take(1 << 20).read_to_end(&mut request);
    let kind = daemon::kind(name)?;
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": {
                "v1": matches!(kind, "runc" | "gvisor" | "quark" | "wasm"), "v2": true },
            "mountExtensions": { "idmap": { "enabled": false } }
        },
        "annotations": { "io.kuasar.kind": kind }
    });
    let answer = RuntimeInfo {
        name: format!("io.containerd.kuasar-{kind}.v1"),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".into(),
            value: features.to_string().into_bytes(),
            ..Default::default()
        }),
        annotations: [("io.kuasar.kind".to_owned(), kind.to_owned())].into(),
        ..Default::default()
    };
    bytes(&answer)
}

fn bytes(message: &impl Message) -> Result<Vec<u8>, Error> {
    message
        .write_to_bytes()
        .map_err(|e| Error::Io { what: "cannot serialise", source: std::io::Error::other(e) })
}

/// Answers the pod's address: a new socket for a sandbox, the existing one for a container.
fn start(daemon: &Daemon, args: &Args) -> Result<Vec<u8>, Error> {
    let bundle = args.bundle()?;
    let mut id = args.id.clone();
    let mut namespace = args.namespace.clone();
    if id.is_empty() {
        // containerd 2.3 and later send the parameters on standard input as well.
        (id, namespace) = bundle::bootstrap_params()?;
    }
    let address = match bundle::sandbox_of(&bundle, &id)? {
        Some(sandbox) => daemon.open_existing(&sandbox)?,
        None => daemon.open(&id, &bundle, &namespace)?,
    };
    // containerd 1.7 looks for the pod's address in the sandbox' bundle when it starts a container, and
    // for each container's in its own when it was restarted.
    std::fs::write(bundle.join("address"), &address)
        .map_err(|source| Error::Io { what: "cannot write the address file", source })?;
    let version = bundle::bootstrap_version(&bundle);
    let answer = serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" });
    Ok(answer.to_string().into_bytes())
}

/// Says how a container has ended, as far as the daemon knows. This also runs after every normal
/// delete and when a connection is lost while the pod lives: it must change nothing.
fn delete(daemon: &Daemon, args: &Args) -> Result<Vec<u8>, Error> {
    let known = daemon.probe(&args.id).unwrap_or_else(|e| {
        eprintln!("{e}"); // Standard error is a log here.
        Default::default()
    });
    let mut answer = DeleteResponse { pid: known.pid, ..Default::default() };
    match known.exited_at.into_option() {
        Some(at) => {
            answer.exit_status = known.exit_status;
            answer.exited_at = MessageField::some(at);
        }
        None => {
            // containerd knows 255 as "unknown"; anything else would be a guess.
            answer.exit_status = 255;
            answer.exited_at = MessageField::some(Timestamp::from(SystemTime::now()));
        }
    }
    bytes(&answer)
}
