//! The daemon: which one, and the calls to it. Blocking: one request and we end.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use kuasar_protos::endpoint as api;
use protobuf::Message;
use ttrpc::proto::Request;

use crate::Error;

/// Overrides of the daemons' sockets, by kind.
const CONFIG: &str = "/etc/kuasar/shim.toml";

/// containerd gives `delete` 5 seconds, see its `[timeouts]`.
const TIMEOUT: Duration = Duration::from_secs(4);

/// A resident sandboxer.
pub(crate) struct Daemon {
    socket: String,
}

/// The kind of sandbox in `containerd-shim-kuasar-<kind>-v<N>`.
pub(crate) fn kind(name: &str) -> Result<&str, Error> {
    let kind = name.strip_prefix("containerd-shim-kuasar-").and_then(|rest| {
        let (kind, version) = rest.rsplit_once("-v")?;
        let number = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit());
        let plain = kind.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        (number && plain && !kind.is_empty()).then_some(kind)
    });
    kind.ok_or_else(|| {
        Error::Usage(format!(
            "{name:?} does not say which sandboxer to use: install this program as \
             containerd-shim-kuasar-<kind>-v1"
        ))
    })
}

#[derive(serde::Deserialize, Default)]
struct Config {
    /// Kind to socket.
    #[serde(default)]
    sockets: HashMap<String, String>,
}

fn socket_of(kind: &str, env: Option<String>, config: &Path) -> Result<String, Error> {
    if let Some(socket) = env.filter(|s| !s.is_empty()) {
        return Ok(socket);
    }
    if let Ok(text) = std::fs::read_to_string(config) {
        let config: Config = toml::from_str(&text)
            .map_err(|e| Error::Usage(format!("{}: {e}", config.display())))?;
        if let Some(socket) = config.sockets.get(kind) {
            return Ok(socket.clone());
        }
    }
    Ok(format!("/run/kuasar-{kind}/sandboxer.sock"))
}

impl Daemon {
    /// The daemon for a program of this name.
    pub(crate) fn of(name: &str) -> Result<Self, Error> {
        let kind = kind(name)?;
        let variable = format!("KUASAR_{}_SOCKET", kind.to_uppercase().replace('-', "_"));
        let socket = socket_of(kind, std::env::var(variable).ok(), Path::new(CONFIG))?;
        Ok(Self { socket })
    }

    fn call<A: Message>(&self, method: &str, question: &impl Message) -> Result<A, Error> {
        let failed = |why: String| Error::Daemon { socket: self.socket.clone(), why };
        let client = ttrpc::Client::connect(&format!("unix://{}", self.socket))
            .map_err(|e| failed(format!("cannot connect, does it run? {e}")))?;
        let request = Request {
            service: "kuasar.sandbox.v1.Endpoint".into(),
            method: method.into(),
            payload: question.write_to_bytes().map_err(|e| failed(e.to_string()))?,
            timeout_nano: i64::try_from(TIMEOUT.as_nanos()).unwrap_or(i64::MAX),
            ..Default::default()
        };
        let answer = client.request(request).map_err(|e| match e {
            ttrpc::Error::RpcStatus(status) => failed(status.message),
            other => failed(other.to_string()),
        })?;
        A::parse_from_bytes(&answer.payload).map_err(|e| failed(e.to_string()))
    }

    /// Makes the socket of a sandbox that is about to be created.
    pub(crate) fn open(&self, id: &str, bundle: &Path, ns: &str) -> Result<String, Error> {
        let q = api::OpenRequest {
            sandbox_id: id.into(),
            bundle: bundle.display().to_string(),
            namespace: ns.into(),
            ..Default::default()
        };
        self.call("Open", &q).map(|a: api::OpenResponse| a.address)
    }

    /// The socket of a sandbox that exists.
    pub(crate) fn open_existing(&self, id: &str) -> Result<String, Error> {
        let q = api::OpenRequest { sandbox_id: id.into(), existing: true, ..Default::default() };
        self.call("Open", &q).map(|a: api::OpenResponse| a.address)
    }

    /// What is known of a container, or else of a sandbox of that id.
    pub(crate) fn probe(&self, id: &str) -> Result<api::ProbeResponse, Error> {
        let container = api::ProbeRequest { container_id: id.into(), ..Default::default() };
        let known: api::ProbeResponse = self.call("Probe", &container)?;
        if known.alive || known.exited_at.is_some() {
            return Ok(known);
        }
        self.call("Probe", &api::ProbeRequest { sandbox_id: id.into(), ..Default::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_name_says_which_daemon() {
        assert_eq!(kind("containerd-shim-kuasar-runc-v1").unwrap(), "runc");
        assert_eq!(kind("containerd-shim-kuasar-vmm-qemu-v12").unwrap(), "vmm-qemu");
        for bad in [
            "containerd-shim-runc-v2",
            "containerd-shim-kuasar-runc",
            "x",
            "containerd-shim-kuasar--v1",
            "containerd-shim-kuasar-a/b-v1",
        ] {
            assert!(kind(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn environment_goes_before_file_before_default() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shim.toml");
        assert_eq!(socket_of("runc", None, &file).unwrap(), "/run/kuasar-runc/sandboxer.sock");
        std::fs::write(&file, "[sockets]\nrunc = \"/a\"\n").unwrap();
        assert_eq!(socket_of("runc", None, &file).unwrap(), "/a");
        assert_eq!(socket_of("vmm", None, &file).unwrap(), "/run/kuasar-vmm/sandboxer.sock");
        assert_eq!(socket_of("runc", Some("/b".into()), &file).unwrap(), "/b");
        std::fs::write(&file, "sockets = 1").unwrap();
        assert!(socket_of("runc", None, &file).is_err());
    }
}
