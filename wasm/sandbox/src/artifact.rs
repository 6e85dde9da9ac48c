//! Makes an ordinary image of an OCI artifact whose layer is WebAssembly itself.
//!
//! Such artifacts (configuration `application/vnd.wasm.config.v0+json` of the CNCF's guidance, layer
//! `application/wasm`) have no file system that containerd could unpack: what it calls a layer is
//! known by its media type, and what it calls an image by that of the configuration. An image with
//! the same module as its one file runs everywhere. Archives are OCI image layouts in a tar file, as
//! `ctr images export`, `skopeo` and `oras` write them.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use kuasar_host::hex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use wasm_common::kind::{Detected, detect};
use wasm_image::layout::{self, Archive, architecture};
use wasm_image::origin::ARTIFACT;

/// Reads the archive `from`, writes the archive `to` with an image called `name`. Modules have at
/// most `max` bytes.
///
/// # Errors
/// What is wrong with the archive, in words.
pub fn convert(from: &Path, to: &Path, name: &str, max: u64) -> Result<String, String> {
    let file = File::open(from).map_err(|error| format!("{}: {error}", from.display()))?;
    let archive = Archive::open(file)?;
    let layer = layout::layer(&archive, &archive.images()?, max)?;
    let Detected::Wasm(kind) = detect(&layer.bytes) else {
        return Err(format!("the layer {} is no WebAssembly", layer.digest));
    };
    let archive = image(&layer, name).map_err(|error| error.to_string())?;
    // Whole or not at all.
    let draft = to.with_extension("draft");
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(&archive)?;
        file.sync_all()?;
        std::fs::rename(&draft, to)
    };
    write().map_err(|error: std::io::Error| {
        let _ = std::fs::remove_file(&draft);
        format!("{}: {error}", to.display())
    })?;
    Ok(format!("{name}: {kind} /{}", layer.title))
}

fn add(tar: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    tar.append_data(&mut header, name, bytes)
}

/// An image layout with one image of one file.
fn image(of: &layout::Layer, name: &str) -> std::io::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, &of.title, &of.bytes)?;
    let layer = layer.into_inner()?;
    let oci = |kind: &str| format!("application/vnd.oci.image.{kind}");
    let mut out = tar::Builder::new(Vec::new());
    let mut put = |bytes: Vec<u8>, kind: &str| -> std::io::Result<Value> {
        let hash = hex(&Sha256::digest(&bytes));
        add(&mut out, &format!("blobs/sha256/{hash}"), &bytes)?;
        let digest = format!("sha256:{hash}");
        Ok(json!({ "mediaType": oci(kind), "digest": digest, "size": bytes.len() }))
    };
    let layer = put(layer, "layer.v1.tar")?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        // What it was made of, for Status.
        "config": { "Entrypoint": [format!("/{}", of.title)], "Labels": { ARTIFACT: of.manifest } },
        // The layer is not compressed, so that its digest is that of its content.
        "rootfs": { "type": "layers", "diff_ids": [layer.get("digest")] },
    });
    let config = put(config.to_string().into_bytes(), "config.v1+json")?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": oci("manifest.v1+json"),
        "config": config,
        "layers": [layer],
    });
    let mut manifest = put(manifest.to_string().into_bytes(), "manifest.v1+json")?;
    if let Some(fields) = manifest.as_object_mut() {
        fields.insert("annotations".into(), json!({ "io.containerd.image.name": name }));
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": oci("index.v1+json"),
        "manifests": [manifest],
    });
    add(&mut out, "index.json", index.to_string().as_bytes())?;
    add(&mut out, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    out.into_inner()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use wasm_image::layout::Blobs;

    use super::*;

    const MODULE: &[u8] = b"\0asm\x01\0\0\0";

    fn archive(kind: &str, title: &str, spoil: bool) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut put = |bytes: &[u8], spoil: bool| {
            let digest = hex(&Sha256::digest(bytes));
            let bytes = if spoil { b"spoilt" } else { bytes };
            add(&mut tar, &format!("blobs/sha256/{digest}"), bytes).unwrap();
            format!("sha256:{digest}")
        };
        let layer = put(MODULE, spoil);
        let manifest = json!({
            "config": { "mediaType": "application/vnd.wasm.config.v0+json" },
            "layers": [{ "mediaType": kind, "digest": layer,
                "annotations": { "org.opencontainers.image.title": title } }],
        });
        let manifest = put(manifest.to_string().as_bytes(), false);
        let index = json!({ "manifests": [{ "digest": manifest }] });
        add(&mut tar, "index.json", index.to_string().as_bytes()).unwrap();
        tar.into_inner().unwrap()
    }

    fn converted(bytes: &[u8]) -> Result<Archive, String> {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("in.tar"), dir.path().join("out.tar"));
        std::fs::write(&from, bytes).unwrap();
        convert(&from, &to, "localhost/x:1", 1 << 20)?;
        Ok(Archive::open(File::open(&to).unwrap()).unwrap())
    }

    fn blob(archive: &Archive, of: &Value) -> Vec<u8> {
        let mut bytes = Vec::new();
        let digest = of["digest"].as_str().unwrap();
        archive.open(digest).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_artifact_becomes_an_image_with_its_module_as_entrypoint() {
        let made = converted(&archive("application/wasm", "dir/app.wasm", false)).unwrap();
        let images = made.images().unwrap();
        assert_eq!(images[0]["annotations"]["io.containerd.image.name"], "localhost/x:1");
        let document = |of: &Value| -> Value { serde_json::from_slice(&blob(&made, of)).unwrap() };
        let manifest = document(&images[0]);
        let config = document(&manifest["config"]);
        assert_eq!(config["config"]["Entrypoint"], json!(["/app.wasm"]));
        let artifact = wasm_image::origin::origin(&made, images[0].clone()).unwrap();
        assert_eq!(artifact.kind, "artifact");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = blob(&made, &manifest["layers"][0]);
        let mut files = tar::Archive::new(layer.as_slice());
        let mut file = files.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(file.path().unwrap(), Path::new("app.wasm"));
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, MODULE);
    }

    #[test]
    fn what_is_no_artifact_is_said_so() {
        let error = converted(&archive("application/x", "a", false)).unwrap_err();
        assert!(error.contains("no layer is WebAssembly"), "{error}");
        let error = converted(&archive("application/wasm", "a", true)).unwrap_err();
        assert!(error.contains("another one than its name says"), "{error}");
        assert!(converted(b"").unwrap_err().contains("OCI image layout"));
        assert!(converted(&[7; 2000]).is_err());
    }
}
