//! Which interfaces of WASI 0.3 a component has: what is refused where `wasmtime.wasi_0_3` is off. A fuzz target
//! includes this file.

use wasm_common::kind::{Detected, Kind, detect};
use wasmparser::{Parser, Payload};

/// How an interface of WASI 0.3 is named, behind `wasi:…/…`.
const VERSION: &str = "@0.3.";

/// Refuses a component of WASI 0.3.
///
/// # Errors
/// With the key that has to be on. What is no component is somebody else's to explain.
pub fn refuse(bytes: &[u8]) -> Result<(), String> {
    if detect(bytes) != Detected::Wasm(Kind::Component) {
        return Ok(());
    }
    match interface(bytes) {
        Some(name) => Err(format!(
            "it is of WASI 0.3 ({name:.100}), which runs where wasmtime.wasi_0_3 is on"
        )),
        None => Ok(()),
    }
}

/// An interface of WASI 0.3 that a component imports or exports itself.
fn interface(bytes: &[u8]) -> Option<String> {
    let mut depth = 0_u32;
    for payload in Parser::new(0).parse_all(bytes) {
        // What cannot be read has an end here: the compiler says what is wrong with it.
        match payload.ok()? {
            // They may be called as they like inside.
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                if let Some(name) = wanted(section.into_iter().flatten().map(|it| it.name.name)) {
                    return Some(name);
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                if let Some(name) = wanted(section.into_iter().flatten().map(|it| it.name.name)) {
                    return Some(name);
                }
            }
            _ => {}
        }
    }
    None
}

/// The first name of an interface of WASI 0.3.
fn wanted<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<String> {
    names.find(|name| name.starts_with("wasi:") && name.contains(VERSION)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(text: &str) -> Vec<u8> {
        wat::parse_str(format!("(component {text})")).unwrap()
    }

    #[test]
    fn a_component_of_wasi_0_3_is_refused_with_the_key() {
        for text in [
            r#"(import "wasi:random/random@0.3.0" (instance))"#,
            r#"(instance $i) (export "wasi:cli/run@0.3.1" (instance $i))"#,
        ] {
            let error = refuse(&component(text)).unwrap_err();
            assert!(error.contains("wasmtime.wasi_0_3") && error.contains("@0.3."), "{error}");
        }
        for text in [
            r#"(import "wasi:random/random@0.2.3" (instance))"#,
            r#"(import "other:thing/x@0.3.0" (instance))"#,
            // What it calls its own parts inside.
            r#"(component (import "wasi:random/random@0.3.0" (instance)))"#,
        ] {
            refuse(&component(text)).unwrap();
        }
        refuse(&wat::parse_str("(module)").unwrap()).unwrap();
        refuse(b"\0asm\x0d\0\x01\0\xff").unwrap();
        refuse(b"").unwrap();
    }
}
