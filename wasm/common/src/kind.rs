//! What a file is, by its first eight bytes.
//!
//! WebAssembly core specification, binary format of modules: magic `\0asm`, then version 1 as four
//! bytes. Component model: the same magic, then a version of two bytes and a layer of two bytes,
//! which is 1 for a component.

use serde::{Deserialize, Serialize};

/// How many bytes [`detect`] wants.
pub const HEADER: usize = 8;

const MAGIC: [u8; 4] = *b"\0asm";

/// What a WebAssembly file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A core module; with WASI preview 1 it is a program.
    Module,
    /// A component; with WASI 0.2 it is a program or a server of requests.
    Component,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Module => "module",
            Self::Component => "component",
        })
    }
}

/// What the first bytes of a file say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detected {
    /// WebAssembly of a version that is known.
    Wasm(Kind),
    /// WebAssembly of another version.
    Unknown {
        /// Version field.
        version: u16,
        /// Layer field.
        layer: u16,
    },
    /// WebAssembly that ends within its header.
    Truncated,
    /// Something else.
    Other,
}

/// Says what a file is that begins with `bytes`, the first [`HEADER`] of it or all that there are.
pub fn detect(bytes: &[u8]) -> Detected {
    match *bytes {
        [a, b, c, d, v0, v1, l0, l1, ..] if [a, b, c, d] == MAGIC => {
            match (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([l0, l1])) {
                (1, 0) => Detected::Wasm(Kind::Module),
                // 0x0d is what all tools write until the component model's 1.0.
                (0x0d, 1) => Detected::Wasm(Kind::Component),
                (version, layer) => Detected::Unknown { version, layer },
            }
        }
        _ if bytes.starts_with(&MAGIC) => Detected::Truncated,
        _ => Detected::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        assert_eq!(detect(b"\0asm\x01\0\0\0rest"), Detected::Wasm(Kind::Module));
        assert_eq!(detect(b"\0asm\x0d\0\x01\0"), Detected::Wasm(Kind::Component));
        assert_eq!(detect(b"\0asm\x02\0\0\0"), Detected::Unknown { version: 2, layer: 0 });
        assert_eq!(detect(b"\0asm\x01"), Detected::Truncated);
        assert_eq!(detect(b"\x7fELF\x02\x01\x01\0"), Detected::Other);
        assert_eq!(detect(b""), Detected::Other);
        assert_eq!(detect(b"\0as"), Detected::Other);
    }

    #[test]
    fn no_bytes_do_harm() {
        // Every pair of one byte changed and a length cut.
        let good = *b"\0asm\x0d\0\x01\0";
        for at in 0..HEADER {
            for value in 0..=255 {
                let mut bytes = good;
                bytes[at] = value;
                for length in 0..=HEADER {
                    let _ = detect(&bytes[..length]);
                }
            }
        }
    }
}
