//! Every fuzz target builds, and holds for a few inputs, which are the same in each run.
#![allow(missing_docs, unused_attributes, clippy::unwrap_used, clippy::indexing_slicing)] // as in fuzz/

macro_rules! targets {
    ($($name:ident: $path:literal, $seeds:expr;)*) => {
        $(#[path = $path] mod $name;)*
        const NAMES: &[&str] = &[$(stringify!($name)),*];
        mod holds {
            $(#[test] fn $name() { super::holds_for(&$seeds, super::$name::fuzz); })*
        }
    };
}

targets! {
    answer: "../../../fuzz/fuzz_targets/answer.rs", [b"HTTP/1.1 200 OK\r\n\r\n"];
    dial: "../../../fuzz/fuzz_targets/dial.rs", [b"OK 1024\n"];
    events: "../../../fuzz/fuzz_targets/events.rs", [b"\x07{\"source\": \"vm\", \"event\": \"shutdown\"}\n\n"];
    frames: "../../../fuzz/fuzz_targets/frames.rs", [b""];
    greeting: "../../../fuzz/fuzz_targets/greeting.rs", [b"OK 1024\n"];
    http: "../../../fuzz/fuzz_targets/http.rs", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"];
    monitor: "../../../fuzz/fuzz_targets/monitor.rs", [b"\x00{\"return\": {}}\n"];
    spans: "../../../fuzz/fuzz_targets/spans.rs", [b""];
    wasm_image: "../../../fuzz/fuzz_targets/wasm_image.rs", [b"/app\0/link/bin/m.wasm\0/\0/"];
    wasm_interface: "../../../fuzz/fuzz_targets/wasm_interface.rs", [b"\0asm\x0d\0\x01\0"];
    wasm_kind: "../../../fuzz/fuzz_targets/wasm_kind.rs", [b"\0asm\x01\0\0\0"];
    wasm_layout: "../../../fuzz/fuzz_targets/wasm_layout.rs", [b"\x01{\"layers\": []}"];
    wasm_needs: "../../../fuzz/fuzz_targets/wasm_needs.rs", [b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0"];
    words: "../../../fuzz/fuzz_targets/words.rs", [b"\x1b[31m"];
}

/// Inputs of each target beside its seeds.
const INPUTS: usize = 40;

fn holds_for(seeds: &[&[u8]], target: impl Fn(&[u8])) {
    // Marsaglia's xorshift64.
    let mut number = 0x6b75_6173_6172_u64;
    let mut next = || {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number
    };
    for seed in seeds {
        target(seed);
    }
    for round in 0..INPUTS {
        let mut bytes = seeds[round % seeds.len()].to_vec();
        for _ in 0..next() % 64 {
            let byte = next().to_le_bytes()[0];
            let at = usize::try_from(next()).unwrap() % (bytes.len() + 1);
            match next() % 3 {
                0 => bytes.insert(at, byte),
                1 if at < bytes.len() => bytes[at] = byte,
                _ => bytes.truncate(at.max(1)),
            }
        }
        target(&bytes);
    }
}

#[test]
fn every_target_is_here_and_in_the_manifest() {
    let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut files: Vec<String> = std::fs::read_dir(fuzz.join("fuzz_targets"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(files, NAMES);
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for name in NAMES {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
    }
}
