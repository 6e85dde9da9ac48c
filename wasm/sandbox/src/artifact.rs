//! Makes an ordinary image of an OCI artifact whose layer is WebAssembly itself.
//!
//! Such artifacts (configuration `application/vnd.wasm.config.v0+json` of the CNCF's guidance, layer
//! `application/wasm`) have no file system that containerd could unpack: what it calls a layer is
//! known by its media type, and what it calls an image by that of the configuration. An image with
//! the same module as its one file runs everywhere. Archives are OCI image layouts in a tar file, as
//! `ctr images export`, `skopeo` and `oras` write them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use wasm_common::kind::{Detected, detect};

use crate::verify::hex;

/// Media types of layers that are a module or a component.
const LAYERS: [&str; 3] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
];
/// Largest of the documents in an archive.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most entries of an archive.
const MAX_ENTRIES: usize = 10_000;
/// What a module is called that has no title.
const UNTITLED: &str = "module.wasm";

/// Reads the archive `from`, writes the archive `to` with an image called `name`. Modules have at
/// most `max` bytes.
///
/// # Errors
/// What is wrong with the archive, in words.
pub fn convert(from: &Path, to: &Path, name: &str, max: u64) -> Result<String, String> {
    let wrap = |error: std::io::Error| format!("{}: {error}", from.display());
    let blobs = entries(from, max).map_err(wrap)?;
    let layer = layer(&blobs)?;
    let module = layer.bytes;
    let Detected::Wasm(kind) = detect(module) else {
        return Err(format!("the layer {} is no WebAssembly", layer.digest));
    };
    let archive = image(module, &layer.title, name).map_err(|error| error.to_string())?;
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

struct Layer<'a> {
    digest: String,
    title: String,
    bytes: &'a [u8],
}

fn entries(path: &Path, max: u64) -> std::io::Result<HashMap<PathBuf, Vec<u8>>> {
    let mut blobs = HashMap::new();
    let mut left = max.saturating_add(MAX_DOCUMENT);
    for entry in tar::Archive::new(File::open(path)?).entries()?.take(MAX_ENTRIES) {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let size = entry.size();
        if size > left {
            return Err(std::io::Error::other(format!(
                "more than {max} bytes in it (compiler.max_module)"
            )));
        }
        left -= size;
        let name: PathBuf = entry.path()?.components().collect();
        let name = name.strip_prefix(".").map(Path::to_owned).unwrap_or(name);
        let mut bytes = Vec::new();
        entry.by_ref().take(size).read_to_end(&mut bytes)?;
        blobs.insert(name, bytes);
    }
    Ok(blobs)
}

/// A blob by its digest, which is compared.
fn blob<'a>(blobs: &'a HashMap<PathBuf, Vec<u8>>, of: &Value) -> Result<&'a [u8], String> {
    let digest = of.get("digest").and_then(Value::as_str).unwrap_or_default();
    let hash = digest
        .strip_prefix("sha256:")
        .filter(|hash| hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let hash = hash.ok_or_else(|| format!("{digest:.100?} is no digest of SHA-256"))?;
    let bytes = blobs.get(&Path::new("blobs/sha256").join(hash));
    let bytes = bytes.ok_or_else(|| format!("the archive has no blob {digest}"))?;
    if hex(&Sha256::digest(bytes).into()) != hash {
        return Err(format!("the blob {digest} is another one than its name says"));
    }
    Ok(bytes)
}

fn document(bytes: &[u8], what: &str) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("{what}: {error}"))
}

fn layer(blobs: &HashMap<PathBuf, Vec<u8>>) -> Result<Layer<'_>, String> {
    let list = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let index = blobs.get(Path::new("index.json")).ok_or("it is no OCI image layout")?;
    for entry in list(&document(index, "index.json")?, "manifests") {
        let manifest = document(blob(blobs, &entry)?, "manifest")?;
        let mut found = list(&manifest, "layers").into_iter().filter(|layer| {
            let kind = layer.get("mediaType").and_then(Value::as_str).unwrap_or_default();
            LAYERS.contains(&kind)
        });
        let Some(layer) = found.next() else { continue };
        if found.next().is_some() {
            return Err("it has several layers of WebAssembly: which one is the program?".into());
        }
        let title = layer.pointer("/annotations/org.opencontainers.image.title");
        let bytes = blob(blobs, &layer)?;
        let digest = layer.get("digest").and_then(Value::as_str).unwrap_or_default();
        let title = file_name(title.and_then(Value::as_str));
        return Ok(Layer { digest: digest.into(), title, bytes });
    }
    Err(format!("no layer is WebAssembly: known are {}", LAYERS.join(", ")))
}

/// A name of the artifact's as one of a file: its last part, where that is one.
fn file_name(title: Option<&str>) -> String {
    let last = title.and_then(|title| title.rsplit('/').next()).unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let usable =
        !last.is_empty() && last.len() <= 100 && !last.starts_with('.') && last.bytes().all(plain);
    if usable { last.to_owned() } else { UNTITLED.to_owned() }
}

fn add(tar: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    tar.append_data(&mut header, name, bytes)
}

/// An image layout with one image of one file.
fn image(module: &[u8], title: &str, name: &str) -> std::io::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, title, module)?;
    let layer = layer.into_inner()?;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let oci = |kind: &str| format!("application/vnd.oci.image.{kind}");
    let mut out = tar::Builder::new(Vec::new());
    let mut put = |bytes: Vec<u8>, kind: &str| -> std::io::Result<Value> {
        let hash = hex(&Sha256::digest(&bytes).into());
        add(&mut out, &format!("blobs/sha256/{hash}"), &bytes)?;
        let digest = format!("sha256:{hash}");
        Ok(json!({ "mediaType": oci(kind), "digest": digest, "size": bytes.len() }))
    };
    let layer = put(layer, "layer.v1.tar")?;
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": [format!("/{title}")] },
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
    use super::*;

    const MODULE: &[u8] = b"\0asm\x01\0\0\0";

    fn archive(kind: &str, title: &str, spoil: bool) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut put = |bytes: &[u8], spoil: bool| {
            let digest = hex(&Sha256::digest(bytes).into());
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

    fn converted(bytes: &[u8]) -> Result<HashMap<PathBuf, Vec<u8>>, String> {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("in.tar"), dir.path().join("out.tar"));
        std::fs::write(&from, bytes).unwrap();
        convert(&from, &to, "localhost/x:1", 1 << 20)?;
        Ok(entries(&to, 1 << 20).unwrap())
    }

    #[test]
    fn an_artifact_becomes_an_image_with_its_module_as_entrypoint() {
        let blobs = converted(&archive("application/wasm", "dir/app.wasm", false)).unwrap();
        let index = document(&blobs[Path::new("index.json")], "").unwrap();
        let entry = &index["manifests"][0];
        assert_eq!(entry["annotations"]["io.containerd.image.name"], "localhost/x:1");
        let manifest = document(blob(&blobs, entry).unwrap(), "").unwrap();
        let config = document(blob(&blobs, &manifest["config"]).unwrap(), "").unwrap();
        assert_eq!(config["config"]["Entrypoint"], json!(["/app.wasm"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = blob(&blobs, &manifest["layers"][0]).unwrap();
        let mut files = tar::Archive::new(layer);
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

    #[test]
    fn titles_become_names_of_files_of_the_root() {
        for (title, name) in [
            (Some("a.wasm"), "a.wasm"),
            (Some("../../etc/x"), "x"),
            (Some(".."), UNTITLED),
            (Some("a b"), UNTITLED),
            (Some(""), UNTITLED),
            (None, UNTITLED),
        ] {
            assert_eq!(file_name(title), name, "{title:?}");
        }
    }
}
