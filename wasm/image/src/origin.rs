//! What kind of an image a container came from, by what the image says of itself.
//!
//! For Status: it is read in the resident daemon, so that documents have a closer bound than where
//! an image is to be run, and there is one in memory at a time.

use serde_json::Value;

use crate::layout::{Blobs, WASI, blob, document, fit, list};

/// Label of the configuration of an image that was made of an artifact: the digest of that one's manifest.
pub const ARTIFACT: &str = "io.kuasar.wasm.artifact";
/// Largest document.
const MAX_DOCUMENT: u64 = 256 << 10;
/// Most documents of one image: indexes and manifests that lead to its configuration.
const MAX_STEPS: usize = 8;
/// Longest part of a platform's name.
const MAX_NAME: usize = 32;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `artifact` where it was made of one, `wasi/wasm` where it is for WebAssembly, else `rootfs`.
    pub kind: &'static str,
    /// Its operating system and architecture, such as `linux/amd64`.
    pub platform: String,
}

/// Of the image whose name leads to `target`, an index or a manifest. Of an index it is the first
/// that fits best of those that are there, as containerd takes it.
///
/// # Errors
/// What is wrong with the image, in words.
pub fn origin(blobs: &dyn Blobs, target: Value) -> Result<Origin, String> {
    let mut open = vec![target];
    for _ in 0..MAX_STEPS {
        let next = open.pop().ok_or("it has no manifest for this machine or for WebAssembly")?;
        // The author of an index need not have given all that it names.
        let found = match blob(blobs, &next, MAX_DOCUMENT, "") {
            Err(_) if !open.is_empty() => continue,
            found => document(&found?, "manifest")?,
        };
        if let Some(config) = found.get("config") {
            return Ok(of(&document(&blob(blobs, config, MAX_DOCUMENT, "")?, "configuration")?));
        }
        let mut named: Vec<(u8, Value)> = list(&found, "manifests")
            .into_iter()
            .filter_map(|one| Some((fit(one.get("platform"))?, one)))
            .collect();
        // The best is taken from the end.
        named.sort_by_key(|(fit, _)| *fit);
        open.extend(named.into_iter().rev().map(|(_, one)| one));
        open.drain(..open.len().saturating_sub(MAX_STEPS));
    }
    Err("it has too many manifests".into())
}

/// What the configuration of an image says.
fn of(config: &Value) -> Origin {
    let part = |key: &str| {
        let text = config.get(key).and_then(Value::as_str).unwrap_or_default();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        // It is shown, and whoever has made the image has written it.
        let usable = !text.is_empty() && text.len() <= MAX_NAME && text.bytes().all(plain);
        if usable { text } else { "unknown" }
    };
    let (os, architecture) = (part("os"), part("architecture"));
    let made = config.pointer("/config/Labels").and_then(|labels| labels.get(ARTIFACT));
    let kind = if made.is_some_and(Value::is_string) {
        "artifact"
    } else if architecture == "wasm" && WASI.contains(&os) {
        "wasi/wasm"
    } else {
        "rootfs"
    };
    Origin { kind, platform: format!("{os}/{architecture}") }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::Read;

    use kuasar_host::hex;
    use serde_json::json;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::layout::architecture;

    #[derive(Default)]
    struct Memory(HashMap<String, Vec<u8>>);

    impl Memory {
        fn put(&mut self, bytes: &[u8]) -> Value {
            let digest = format!("sha256:{}", hex(&Sha256::digest(bytes)));
            self.0.insert(digest.clone(), bytes.to_owned());
            json!({ "digest": digest })
        }

        fn document(&mut self, value: &Value) -> Value {
            self.put(value.to_string().as_bytes())
        }

        /// An image's manifest.
        fn image(&mut self, config: &Value) -> Value {
            let config = self.document(config);
            self.document(&json!({ "config": config, "layers": [] }))
        }
    }

    impl Blobs for Memory {
        fn open(&self, digest: &str) -> Result<Box<dyn Read + '_>, String> {
            let blob = self.0.get(digest).ok_or("not found")?;
            Ok(Box::new(blob.as_slice()))
        }
    }

    fn platform(os: &str, architecture: &str) -> Value {
        json!({ "os": os, "architecture": architecture })
    }

    fn on(mut descriptor: Value, platform: Value) -> Value {
        descriptor["platform"] = platform;
        descriptor
    }

    #[test]
    fn an_image_is_told_by_its_configuration() {
        let mut blobs = Memory::default();
        let labelled = json!({ "os": "linux", "architecture": "amd64",
            "config": { "Labels": { ARTIFACT: "sha256:00" } } });
        for (config, kind, shown) in [
            (platform("linux", "amd64"), "rootfs", "linux/amd64"),
            (platform("wasi", "wasm"), "wasi/wasm", "wasi/wasm"),
            (platform("wasip1", "wasm"), "wasi/wasm", "wasip1/wasm"),
            (platform("linux", "wasm"), "rootfs", "linux/wasm"),
            (labelled, "artifact", "linux/amd64"),
        ] {
            let image = blobs.image(&config);
            let wanted = Origin { kind, platform: shown.into() };
            assert_eq!(origin(&blobs, image), Ok(wanted), "{config}");
        }
    }

    #[test]
    fn of_an_index_it_is_this_machines_else_webassemblys() {
        let mut blobs = Memory::default();
        let here = blobs.image(&platform("linux", architecture()));
        let wasm = blobs.image(&platform("wasi", "wasm"));
        let gone = json!({ "digest": format!("sha256:{}", "0".repeat(64)) });
        let other = on(gone.clone(), platform("linux", "s390x"));
        let here = on(here, platform("linux", architecture()));
        let wasm = on(wasm, platform("wasi", "wasm"));
        let missing = on(gone, platform("linux", architecture()));
        let mut of = |all: &[&Value]| {
            let index = blobs.document(&json!({ "manifests": all }));
            origin(&blobs, index).map(|origin| origin.kind)
        };
        assert_eq!(of(&[&other, &wasm, &here]), Ok("rootfs"));
        assert_eq!(of(&[&other, &wasm]), Ok("wasi/wasm"));
        assert_eq!(of(&[&missing, &wasm]), Ok("wasi/wasm"));
        assert!(of(&[&other]).unwrap_err().contains("no manifest"));
        assert!(of(&[&missing]).unwrap_err().contains("not found"));
    }

    #[test]
    fn hostile_documents_are_refused_or_shown_as_unknown() {
        let mut blobs = Memory::default();
        for config in [json!(7), json!([]), json!({ "os": ["linux"], "config": { "Labels": [] } })]
        {
            let image = blobs.image(&config);
            let origin = origin(&blobs, image).unwrap();
            assert_eq!((origin.kind, origin.platform.as_str()), ("rootfs", "unknown/unknown"));
        }
        let image = blobs.image(&platform("linux\n\u{1b}[2J", &"a".repeat(4000)));
        assert_eq!(origin(&blobs, image).unwrap().platform, "unknown/unknown");
        let text = blobs.put(b"\0not JSON");
        assert!(origin(&blobs, text).is_err());
        let deep = blobs.put("[".repeat(100_000).as_bytes());
        assert!(origin(&blobs, deep).is_err());
        let large = blobs.put(&vec![b' '; 300_000]);
        assert!(origin(&blobs, large).unwrap_err().contains("larger"));
        let path = json!({ "digest": "sha256:../../../etc/passwd" });
        assert!(origin(&blobs, path).unwrap_err().contains("no digest"));
        assert!(origin(&blobs, json!(null)).is_err());
        // One document is served in place of another.
        let (one, other) = (blobs.document(&json!({ "a": 1 })), blobs.document(&json!({ "b": 1 })));
        let name = |value: &Value| value["digest"].as_str().unwrap().to_owned();
        let bytes = blobs.0[&name(&other)].clone();
        blobs.0.insert(name(&one), bytes);
        assert!(origin(&blobs, one).unwrap_err().contains("another one"));
        // Indexes of indexes, each of many.
        let mut index = other;
        for _ in 0..20 {
            index = blobs.document(&json!({ "manifests": vec![&index; 500] }));
        }
        assert!(origin(&blobs, index).unwrap_err().contains("too many"));
    }
}
