//! What a module asks for, as far as it has to be known before it is instantiated: the library says
//! it only then, when the module's own start function runs.

use wasmparser::{ExternalKind, MemoryType, Parser, Payload, TypeRef};

/// Why a component is not run.
pub const NO_COMPONENTS: &str =
    "components do not run on WasmEdge here: use the engine wasmtime for them";

/// What is asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Pages of the largest memory.
    pub pages: u64,
    /// Functions that are imported: module and name.
    pub functions: Vec<(String, String)>,
    /// Whether there is a function `_start`.
    pub starts: bool,
}

/// Reads a module.
///
/// # Errors
/// When it is none.
pub fn needs(bytes: &[u8]) -> Result<Needs, String> {
    let mut needs = Needs::default();
    let wrap = |error: wasmparser::BinaryReaderError| error.to_string();
    let mut memory = |memory: MemoryType| needs.pages = needs.pages.max(memory.initial);
    let (mut functions, mut starts) = (Vec::new(), false);
    for payload in Parser::new(0).parse_all(bytes) {
        match payload.map_err(wrap)? {
            Payload::MemorySection(section) => {
                for one in section {
                    memory(one.map_err(wrap)?);
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import.map_err(wrap)?;
                    match import.ty {
                        TypeRef::Func(_) => {
                            functions.push((import.module.to_owned(), import.name.to_owned()));
                        }
                        TypeRef::Memory(one) => memory(one),
                        _ => {}
                    }
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export.map_err(wrap)?;
                    starts |= export.kind == ExternalKind::Func && export.name == "_start";
                }
            }
            _ => {}
        }
    }
    Ok(Needs { functions, starts, ..needs })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Header; one type; an import of a function; a memory of two pages; an export of `_start`.
    const MODULE: &[u8] = b"\0asm\x01\0\0\0\
        \x01\x04\x01\x60\0\0\
        \x02\x07\x01\x01e\x01f\0\0\
        \x05\x03\x01\0\x02\
        \x07\x0a\x01\x06_start\0\0";

    #[test]
    fn what_a_module_asks_for_is_read() {
        let needs = needs(MODULE).unwrap();
        assert_eq!((needs.pages, needs.starts), (2, true));
        assert_eq!(needs.functions, [("e".to_owned(), "f".to_owned())]);
    }

    #[test]
    fn no_bytes_do_harm() {
        for at in 0..MODULE.len() {
            let _ = needs(&MODULE[..at]);
            for bit in 0..8 {
                let mut bytes = MODULE.to_vec();
                bytes[at] ^= 1 << bit;
                let _ = needs(&bytes);
            }
        }
    }
}
