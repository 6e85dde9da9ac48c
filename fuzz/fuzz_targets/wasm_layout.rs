//! What an image consists of: whatever its archive, its manifest, its configuration or its layer says, what is found
//! is WebAssembly within its bound.
//!
//! The first byte says which of them the rest is; the others are good, and digests always are.
#![no_main]

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};

use kuasar_host::hex;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use wasm_common::kind::{Detected, detect};
use wasm_image::layout::{Archive, Blobs, layer, program};
use wasm_image::origin::origin;

const MAX: u64 = 1 << 16;

#[derive(Default)]
struct Shelf(HashMap<String, Vec<u8>>);

impl Shelf {
    fn put(&mut self, bytes: &[u8]) -> Value {
        let digest = format!("sha256:{}", hex(&Sha256::digest(bytes)));
        self.0.insert(digest.clone(), bytes.to_vec());
        json!({ "digest": digest })
    }
}

impl Blobs for Shelf {
    fn open(&self, digest: &str) -> Result<Box<dyn Read + '_>, String> {
        Ok(Box::new(self.0.get(digest).ok_or("no such blob")?.as_slice()))
    }
}

fn archive(data: &[u8]) -> Option<File> {
    let mut file = tempfile::tempfile().ok()?;
    file.write_all(data).ok()?;
    std::io::Seek::rewind(&mut file).ok()?;
    Some(file)
}

fn hold(blobs: &dyn Blobs, images: &[Value]) {
    for image in images.iter().take(16) {
        if let Ok(origin) = origin(blobs, image.clone()) {
            assert!(origin.platform.len() <= 65 && origin.platform.is_ascii());
        }
    }
    if let Ok(found) = program(blobs, images, MAX) {
        assert!(found.bytes.len() as u64 <= MAX);
        let artifact = layer(blobs, images, MAX).is_ok();
        assert!(artifact || matches!(detect(&found.bytes), Detected::Wasm(_)));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else { return };
    let mut shelf = Shelf::default();
    let config = json!({ "config": { "Cmd": ["m.wasm"] } }).to_string();
    match which % 4 {
        0 => {
            let Some(archive) = archive(data).and_then(|file| Archive::open(file).ok()) else {
                return;
            };
            if let Ok(images) = archive.images() {
                hold(&archive, &images);
            }
        }
        1 => {
            shelf.put(config.as_bytes());
            let image = shelf.put(data);
            hold(&shelf, &[image]);
        }
        which => {
            let (config, files) = match which {
                2 => (data, &b""[..]),
                _ => (config.as_bytes(), data),
            };
            let (config, files) = (shelf.put(config), shelf.put(files));
            let manifest = json!({ "config": config, "layers": [files] }).to_string();
            let image = shelf.put(manifest.as_bytes());
            hold(&shelf, &[image]);
        }
    }
});
