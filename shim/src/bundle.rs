//! What a bundle says: is it a sandbox' or a container's, and which containerd made it.

use std::io::Read;
use std::path::Path;

use kuasar_protos::shim::bootstrap_api::BootstrapParams;
use protobuf::Message;
use serde_json::Value;

use crate::Error;

/// Largest file or message that is read.
const MOST: u64 = 16 << 20;

/// Id and namespace from standard input.
pub(crate) fn bootstrap_params() -> Result<(String, String), Error> {
    let mut text = Vec::new();
    std::io::stdin()
        .take(MOST)
        .read_to_end(&mut text)
        .map_err(|source| Error::Io { what: "cannot read standard input", source })?;
    let params = BootstrapParams::parse_from_bytes(&text)
        .map_err(|e| Error::Usage(format!("standard input is no BootstrapParams: {e}")))?;
    if params.instance_id.is_empty() {
        return Err(Error::Usage("neither -id nor standard input names an id".into()));
    }
    Ok((params.instance_id, params.namespace))
}

/// The sandbox of a container's bundle, or nothing for a sandbox' own bundle.
pub(crate) fn sandbox_of(bundle: &Path, id: &str) -> Result<Option<String>, Error> {
    if let Ok(text) = std::fs::read_to_string(bundle.join("sandbox")) {
        let sandbox = text.trim();
        return Ok((!sandbox.is_empty() && sandbox != id).then(|| sandbox.to_owned()));
    }
    let path = bundle.join("config.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(None) };
    let spec: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::Bundle(format!("{} is no OCI spec: {e}", path.display())))?;
    let note =
        |key: &str| spec.get("annotations")?.get(format!("io.kubernetes.cri.{key}"))?.as_str();
    match (note("container-type"), note("sandbox-id")) {
        (Some("container"), Some(sandbox)) => Ok(Some(sandbox.to_owned())),
        // A pause container: the daemon makes a sandbox of it.
        _ => Ok(None),
    }
}

/// The version of the answer to `start`. containerd 1.7 keeps the bundles of sandboxes with those
/// of tasks and refuses 3; 2.x has a directory of its own for them.
pub(crate) fn bootstrap_version(bundle: &Path) -> u32 {
    let old = bundle.components().any(|c| c.as_os_str() == "io.containerd.runtime.v2.task");
    if old { 2 } else { 3 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_names_its_sandbox_by_file_or_annotation() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(sandbox_of(dir.path(), "a").unwrap(), None);
        let config = dir.path().join("config.json");
        let spec = |kind: &str| {
            format!(
                r#"{{"annotations":{{"io.kubernetes.cri.container-type":"{kind}",
                "io.kubernetes.cri.sandbox-id":"pod"}}}}"#
            )
        };
        std::fs::write(&config, spec("container")).unwrap();
        assert_eq!(sandbox_of(dir.path(), "a").unwrap().as_deref(), Some("pod"));
        std::fs::write(&config, spec("sandbox")).unwrap();
        assert_eq!(sandbox_of(dir.path(), "pod").unwrap(), None);
        std::fs::write(&config, "{").unwrap();
        assert!(sandbox_of(dir.path(), "a").is_err());
        std::fs::write(dir.path().join("sandbox"), "pod2\n").unwrap();
        assert_eq!(sandbox_of(dir.path(), "a").unwrap().as_deref(), Some("pod2"));
    }

    #[test]
    fn containerd_1_7_gets_version_2() {
        let old = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/a";
        let new = "/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io/a";
        assert_eq!(bootstrap_version(Path::new(old)), 2);
        assert_eq!(bootstrap_version(Path::new(new)), 3);
    }
}
