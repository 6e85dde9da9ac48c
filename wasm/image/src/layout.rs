//! Images as they are distributed: manifests, a configuration and layers, each named by its digest.
//!
//! Blobs come from an archive (an OCI image layout in a tar file, as `ctr images export`, `skopeo` and
//! `oras` write it) or from whatever else has them by digest. None is believed before its digest is
//! compared, and none is read further than its bound.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kuasar_host::hex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::layers;

/// Media types of layers that are a module or a component.
pub const LAYERS: [&str; 3] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
];
/// Largest document: an index, a manifest or a configuration.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most entries of an archive.
const MAX_ENTRIES: usize = 10_000;
/// Most manifests that are looked at, of all indexes together.
const MAX_MANIFESTS: usize = 256;
/// Operating systems that images of WebAssembly are made for.
pub(crate) const WASI: [&str; 3] = ["wasi", "wasip1", "wasip2"];
/// What a module is called that has no title.
const UNTITLED: &str = "module.wasm";

/// Where blobs are.
pub trait Blobs {
    /// A blob from its beginning; `digest` is one of SHA-256.
    ///
    /// # Errors
    /// When there is none.
    fn open(&self, digest: &str) -> Result<Box<dyn Read + '_>, String>;
}

/// An image layout in a tar file, which is not unpacked.
#[derive(Debug)]
pub struct Archive {
    file: File,
    /// Where the content of each file is, and how long it is.
    places: HashMap<PathBuf, (u64, u64)>,
}

impl Archive {
    /// Reads what there is in it.
    ///
    /// # Errors
    /// When it is no such archive.
    pub fn open(file: File) -> Result<Self, String> {
        let wrong = |error: std::io::Error| format!("it is no OCI image layout: {error}");
        let mut places = HashMap::new();
        let mut tar = tar::Archive::new(&file);
        for entry in tar.entries_with_seek().map_err(wrong)?.take(MAX_ENTRIES) {
            let entry = entry.map_err(wrong)?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name: PathBuf = entry.path().map_err(wrong)?.components().collect();
            let name = name.strip_prefix(".").map(Path::to_owned).unwrap_or(name);
            places.insert(name, (entry.raw_file_position(), entry.size()));
        }
        Ok(Self { file, places })
    }

    fn entry(&self, name: &Path) -> Option<Part<'_>> {
        let (at, left) = self.places.get(name).copied()?;
        Some(Part { file: &self.file, at, left })
    }

    /// What it has: the descriptors of its index.
    ///
    /// # Errors
    /// When it has no index.
    pub fn images(&self) -> Result<Vec<Value>, String> {
        let index = self.entry(Path::new("index.json"));
        let index = index.ok_or("it is no OCI image layout: there is no index.json in it")?;
        let bytes = bounded(index, MAX_DOCUMENT).map_err(|error| format!("index.json: {error}"))?;
        Ok(list(&document(&bytes, "index.json")?, "manifests"))
    }
}

impl Blobs for Archive {
    fn open(&self, digest: &str) -> Result<Box<dyn Read + '_>, String> {
        let entry = self.entry(&Path::new("blobs/sha256").join(hash(digest)?));
        Ok(Box::new(entry.ok_or_else(|| format!("the archive has no blob {digest}"))?))
    }
}

/// A part of a file.
struct Part<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A blob that is compared with its digest when it has been read.
pub(crate) struct Checked<'a> {
    inner: Box<dyn Read + 'a>,
    hasher: Sha256,
    digest: String,
}

impl<'a> Checked<'a> {
    /// The blob of a descriptor.
    pub(crate) fn open(blobs: &'a dyn Blobs, of: &Value) -> Result<Self, String> {
        let digest = of.get("digest").and_then(Value::as_str).unwrap_or_default();
        hash(digest)?;
        let inner = blobs.open(digest)?;
        Ok(Self { inner, hasher: Sha256::new(), digest: digest.to_owned() })
    }

    /// Reads what is left, and compares.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        std::io::copy(&mut self, &mut std::io::sink())
            .map_err(|error| format!("read the blob {}: {error}", self.digest))?;
        let found = hex(&self.hasher.finalize());
        if self.digest.strip_prefix("sha256:") == Some(found.as_str()) {
            return Ok(());
        }
        Err(format!("the blob {} is another one than its name says", self.digest))
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }
}

/// The digits of a digest.
fn hash(digest: &str) -> Result<&str, String> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    digest
        .strip_prefix("sha256:")
        .filter(|hash| hash.len() == 64 && hash.bytes().all(lower))
        .ok_or_else(|| format!("{digest:.100?} is no digest of SHA-256"))
}

/// All bytes, where there are not more than `max`.
pub(crate) fn bounded(reader: impl Read, max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(std::io::Error::other(format!("it is larger than {max} bytes")));
    }
    Ok(bytes)
}

/// The bytes of a blob of at most `max`, a bound that `key` sets.
pub(crate) fn blob(blobs: &dyn Blobs, of: &Value, max: u64, key: &str) -> Result<Vec<u8>, String> {
    let mut blob = Checked::open(blobs, of)?;
    let bytes = bounded(&mut blob, max);
    let bytes = bytes.map_err(|error| format!("the blob {}: {error}{key}", blob.digest))?;
    blob.finish()?;
    Ok(bytes)
}

pub(crate) fn document(bytes: &[u8], what: &str) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("{what}: {error}"))
}

pub(crate) fn list(value: &Value, key: &str) -> Vec<Value> {
    value.get(key).and_then(Value::as_array).cloned().unwrap_or_default()
}

/// A module or component that an artifact consists of.
#[derive(Debug)]
pub struct Layer {
    /// Its digest.
    pub digest: String,
    /// That of the manifest that names it.
    pub manifest: String,
    /// Its name, as one of a file.
    pub title: String,
    /// Itself.
    pub bytes: Vec<u8>,
}

/// The layer of a manifest that is a module or a component, of at most `max` bytes; `None` where it has none.
fn layer_of(blobs: &dyn Blobs, manifest: &Manifest, max: u64) -> Result<Option<Layer>, String> {
    let mut found = list(&manifest.document, "layers").into_iter().filter(|layer| {
        let kind = layer.get("mediaType").and_then(Value::as_str).unwrap_or_default();
        LAYERS.contains(&kind)
    });
    let Some(layer) = found.next() else { return Ok(None) };
    if found.next().is_some() {
        return Err("it has several layers of WebAssembly: which one is the program?".into());
    }
    let title = layer.pointer("/annotations/org.opencontainers.image.title");
    let title = file_name(title.and_then(Value::as_str));
    let bytes = blob(blobs, &layer, max, " (compiler.max_module)")?;
    let digest = layer.get("digest").and_then(Value::as_str).unwrap_or_default();
    Ok(Some(Layer { digest: digest.into(), manifest: manifest.digest.clone(), title, bytes }))
}

/// The module or component that an artifact consists of, of at most `max` bytes.
///
/// # Errors
/// When none of these images is one.
pub fn layer(blobs: &dyn Blobs, images: &[Value], max: u64) -> Result<Layer, String> {
    for manifest in manifests(blobs, images)? {
        if let Some(layer) = layer_of(blobs, &manifest, max)? {
            return Ok(layer);
        }
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

/// A manifest that is there.
struct Manifest {
    /// How well its platform fits; 0 is best.
    fit: u8,
    digest: String,
    document: Value,
}

/// All manifests that are there. What an index names and its author has not given, such as another platform's, is left.
fn manifests(blobs: &dyn Blobs, images: &[Value]) -> Result<Vec<Manifest>, String> {
    let mut found = Vec::new();
    let mut missing = None;
    let mut open: Vec<Value> = images.iter().rev().cloned().collect();
    let mut left = MAX_MANIFESTS;
    while let Some(descriptor) = open.pop() {
        let Some(fit) = fit(descriptor.get("platform")) else { continue };
        left = left.checked_sub(1).ok_or("it has too many manifests")?;
        let opened = Checked::open(blobs, &descriptor).map(drop);
        if let Err(error) = opened {
            missing.get_or_insert(error);
            continue;
        }
        let document = document(&blob(blobs, &descriptor, MAX_DOCUMENT, "")?, "manifest")?;
        if document.get("manifests").is_some() {
            open.extend(list(&document, "manifests").into_iter().rev());
        } else {
            let digest = descriptor.get("digest").and_then(Value::as_str).unwrap_or_default();
            found.push(Manifest { fit, digest: digest.to_owned(), document });
        }
    }
    match missing {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

/// How well a platform fits; `None` for another machine's.
pub(crate) fn fit(platform: Option<&Value>) -> Option<u8> {
    let Some(platform) = platform else { return Some(2) };
    let text = |key: &str| platform.get(key).and_then(Value::as_str).unwrap_or_default();
    match (text("os"), text("architecture")) {
        ("linux", here) if here == architecture() => Some(0),
        (os, "wasm") if WASI.contains(&os) => Some(1),
        _ => None,
    }
}

/// This machine's, as images name it.
pub fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// The program of an image.
#[derive(Debug)]
pub struct Found {
    /// Its name, or where it is in the image.
    pub path: PathBuf,
    /// Itself.
    pub bytes: Vec<u8>,
}

/// What a container of an image runs that says nothing of a command: the layer of an artifact, or the file that the
/// entrypoint of an image names. Of several platforms it is this machine's, or WebAssembly's.
///
/// # Errors
/// When there is none, or it has more than `max` bytes.
pub fn program(blobs: &dyn Blobs, images: &[Value], max: u64) -> Result<Found, String> {
    let manifests = manifests(blobs, images)?;
    let best = manifests.iter().min_by_key(|manifest| manifest.fit);
    let manifest = best.ok_or("it has no manifest for this machine or for WebAssembly")?;
    if let Some(layer) = layer_of(blobs, manifest, max)? {
        return Ok(Found { path: layer.title.into(), bytes: layer.bytes });
    }
    let config = manifest.document.get("config").ok_or("its manifest names no configuration")?;
    let config = document(&blob(blobs, config, MAX_DOCUMENT, "")?, "configuration")?;
    let text = |key: &str| {
        let value = config.pointer("/config").and_then(|config| config.get(key));
        value.and_then(Value::as_str).filter(|text| !text.is_empty())
    };
    let all = |key: &str| config.get("config").map(|config| list(config, key)).unwrap_or_default();
    let args: Vec<Value> = all("Entrypoint").into_iter().chain(all("Cmd")).collect();
    // As containerd makes it of the image.
    let spec = json!({ "process": {
        "args": args, "cwd": text("WorkingDir").unwrap_or("/"), "env": all("Env"),
    }});
    let places = crate::places(&spec)?;
    layers::find(blobs, &list(&manifest.document, "layers"), &places, max)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn this_machines_platform_comes_before_webassemblys_and_others_do_not_come() {
        let of = |os: &str, architecture: &str| {
            fit(Some(&json!({ "os": os, "architecture": architecture })))
        };
        assert_eq!(of("linux", architecture()), Some(0));
        assert_eq!((of("wasi", "wasm"), of("wasip1", "wasm")), (Some(1), Some(1)));
        assert_eq!((of("linux", "s390x"), of("unknown", "unknown")), (None, None));
        assert_eq!(fit(None), Some(2));
    }
}
