//! `wasm-sandboxer`: pods whose containers are WebAssembly modules or components.
//!
//! One program with three faces: the resident daemon ([`daemon`]), the built-in OCI engine for
//! native containers beside them ([`kuasar_oci::builtin`]), and the operator's commands. What runs
//! WebAssembly is another program, `wasm-worker`: the daemon carries no compiler.

mod artifact;
mod cache;
mod compile;
mod config;
mod containerd;
mod control;
mod daemon;
mod flavor;
mod origins;
mod payloads;
mod precompile;
mod spec;
mod verify;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::program;
use kuasar_daemon::resident::Setup;

use crate::config::Config;
use crate::precompile::Images;

/// Pods whose containers are WebAssembly modules or components.
#[derive(Debug, Parser)]
#[command(name = "wasm-sandboxer", version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Compile the programs of files and images into the cache, so that their first containers start
    /// at once
    Precompile {
        /// Engine: wasmtime or wasmedge; code is the same for wasmtime-nn. Default: the configuration's
        #[arg(long)]
        engine: Option<String>,
        /// containerd's socket, for images that it has. Default: the configuration's `containerd.address`
        #[arg(long)]
        containerd: Option<PathBuf>,
        /// containerd's namespace of them
        #[arg(long, default_value = "k8s.io")]
        namespace: String,
        /// Modules, components, archives of images (OCI image layouts in a tar file), or names of
        /// images that containerd has
        #[arg(required = true, value_name = "IMAGE|FILE")]
        programs: Vec<PathBuf>,
    },
    /// Make an ordinary image of an OCI artifact whose layer is WebAssembly, which containerd does
    /// not unpack
    ImageOfArtifact {
        /// Archive of the artifact: an OCI image layout in a tar file
        from: PathBuf,
        /// Archive to write, for `ctr images import`
        to: PathBuf,
        /// Name of the image
        #[arg(long)]
        name: String,
    },
    #[command(flatten)]
    Common(program::Command),
}

fn main() -> ExitCode {
    // The engine first: it is on the hot path and wants nothing of what a daemon sets up.
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().map(String::as_str) == Some("oci") {
        let arguments = arguments.skip(1).collect();
        return kuasar_oci::builtin::main("wasm-sandboxer oci", arguments).into();
    }
    kuasar_daemon::memory::tune();
    program::end("wasm-sandboxer", run(Arguments::parse()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let given = arguments.daemon;
    let (common, config) = Config::load(given.config.as_deref()).map_err(|e| anyhow!(e))?;
    let setup = Setup::new("wasm", &given, common);
    match arguments.command {
        Some(Command::Common(command)) => return Ok(command.run(&setup)?),
        Some(Command::Precompile { engine, containerd, namespace, programs }) => {
            let engine = engine.unwrap_or_else(|| config.engine.clone());
            let address = containerd.unwrap_or_else(|| config.containerd.address.clone());
            let images = Images { address, namespace };
            return kuasar_daemon::memory::runtime()?
                .block_on(precompile::precompile(&config, &engine, &programs, &images))
                .map_err(|error| anyhow!(error));
        }
        Some(Command::ImageOfArtifact { from, to, name }) => {
            let max = config.compiler.max_module;
            let made = artifact::convert(&from, &to, &name, max).map_err(|e| anyhow!(e))?;
            println!("{made}");
            return Ok(());
        }
        None => {}
    }
    let Some(level) = program::prepare(&given, &setup)? else { return Ok(()) };
    kuasar_daemon::memory::runtime()?.block_on(daemon::run(setup, given, config, level))
}
