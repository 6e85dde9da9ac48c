//! The resident daemon: its configuration, and the parts that only this sandboxer has.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::common::CommonConfig;
use kuasar_daemon::logging::LevelHandle;
use kuasar_daemon::resident::{self, Setup};
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_oci::engine::{Backend, Engines};
use kuasar_oci::selfexe::SelfExe;
use kuasar_pod::{Metrics, NamespaceSandboxer};

use crate::compile::{ByParent, Compiler};
use crate::config::Config;
use crate::flavor::Wasm;
use crate::payloads::WASMTIME;
use crate::worker::{self, Worker, Workers};

/// Runs the daemon until it is told to end.
pub async fn run(
    setup: Setup,
    args: DaemonArgs,
    config: Config,
    level: LevelHandle,
) -> anyhow::Result<()> {
    let exe =
        SelfExe::open("wasm-sandboxer").context("make an unwritable handle of this program")?;
    let program = config.worker_program().map_err(|error| anyhow::anyhow!(error))?;
    let worker = SelfExe::of(&program, "wasm-worker")
        .with_context(|| format!("make an unwritable handle of {}", program.display()))?;
    let cgroups = Arc::new(Layout::detect()?);
    let dir = setup.dir.clone();
    let settings = Live::new(config.engine_settings());
    let config = Live::new(config);
    let make = {
        let (config, settings) = (config.clone(), settings.clone());
        let kept = dir.join("seccomp").into_os_string().into_string();
        let kept = kept.map_err(|_| anyhow::anyhow!("the state directory is not UTF-8"))?;
        let engine =
            |program: String| vec![program, "oci".into(), "--seccomp-cache".into(), kept.clone()];
        let builtin = engine(exe.path());
        let warm = engine(worker::WARM.into());
        let program = worker.path();
        move |parts: &resident::Parts| {
            let worker = Worker::new(parts.parent.clone(), program.clone(), config.clone());
            let workers = Arc::new(Workers::new(parts.parent.clone(), worker));
            let engines = Arc::new(Engines::new(Backend {
                builtin: Some(builtin),
                relatives: BTreeMap::from([(WASMTIME.to_owned(), warm)]),
                observer: Arc::new(Metrics("wasm")),
                ..Backend::new(workers.clone(), settings)
            }));
            let run = Arc::new(ByParent { parent: parts.parent.clone(), program });
            let compiler = Arc::new(Compiler::new(config.clone(), run));
            let flavor = Wasm::new(config, engines, workers, compiler, cgroups.clone());
            Ok(NamespaceSandboxer::new(flavor, parts, cgroups, dir))
        }
    };
    let reload = move || {
        // Everything is checked, the log level too, before anything counts.
        let (common, new) = Config::load(args.config.as_deref())?;
        settings.set(new.engine_settings());
        config.set(new);
        let log_level = args.log_level.clone().or(common.log_level);
        Ok(CommonConfig { log_level, ..common })
    };
    resident::run(setup, level, make, reload).await?;
    // Hold the programs that sandbox-parent runs until nobody can ask for them.
    drop((exe, worker));
    Ok(())
}
