//! Generates messages and ttrpc services from `proto/`, in Rust alone: no `protoc` is needed.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = Path::new(&env::var("OUT_DIR")?).join("protos");
    fs::create_dir_all(&out)?;
    Codegen::new()
        .inputs([
            "proto/types.proto",
            "proto/controller.proto",
            "proto/streaming.proto",
            "proto/transfer.proto",
            "proto/cri.proto",
            "proto/endpoint.proto",
            "proto/images.proto",
            "proto/content.proto",
            "proto/admin.proto",
            "proto/otlp.proto",
            "proto/runc_options.proto",
        ])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()?;
    // `include!` cannot take inner attributes: rust-lang/rust#18810.
    for entry in fs::read_dir(&out)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let kept: Vec<&str> =
            text.lines().filter(|l| !l.starts_with("#![") && !l.starts_with("//!")).collect();
        fs::write(&path, kept.join("\n"))?;
    }
    Ok(())
}
