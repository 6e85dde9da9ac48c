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
use crate::config::{Config, ENGINES, WASMEDGE, WASMTIME, WASMTIME_NN};
use crate::control::Following;
use crate::flavor::Wasm;
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
    // Held until nobody can ask for them.
    let mut handles = vec![exe];
    let mut programs = BTreeMap::new();
    for engine in ENGINES {
        let program = match config.worker_program(engine) {
            Ok(program) => {
                let handle = SelfExe::of(&program, "wasm-worker").with_context(|| {
                    format!("make an unwritable handle of {}", program.display())
                })?;
                let path = handle.path();
                handles.push(handle);
                Ok(path)
            }
            // Nothing works without this one.
            Err(error) if engine == WASMTIME => return Err(anyhow::anyhow!(error)),
            Err(error) => Err(error),
        };
        programs.insert(engine, program);
    }
    say_what_is_missing(&config, WASMEDGE, "WasmEdge", programs.get(WASMEDGE));
    say_what_is_missing(&config, WASMTIME_NN, "WASI-NN", programs.get(WASMTIME_NN));
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
        let own = handles.first().map(SelfExe::path).unwrap_or_default();
        let builtin = engine(own);
        let relatives = ENGINES.map(|name| (name.to_owned(), engine(worker::warm(name))));
        move |parts: &resident::Parts| {
            let worker = |(engine, program): (&&'static str, &Result<String, String>)| {
                Worker::new(parts.parent.clone(), engine, program.clone(), config.clone())
            };
            let all = programs.iter().map(worker).collect();
            let workers = Arc::new(Workers::new(parts.parent.clone(), all));
            let engines = Arc::new(Engines::new(Backend {
                builtin: Some(builtin),
                relatives: BTreeMap::from(relatives),
                observer: Arc::new(Metrics("wasm")),
                control: Arc::new(Following),
                ..Backend::new(workers.clone(), settings)
            }));
            let run = Arc::new(ByParent { parent: parts.parent.clone(), programs });
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
    drop(handles);
    Ok(())
}

/// Has the log say at the start whether an engine can run that loads a library, which people call
/// `name`. Whoever wants it is told again: it may be installed while we run.
fn say_what_is_missing(
    config: &Config,
    engine: &'static str,
    name: &'static str,
    program: Option<&Result<String, String>>,
) {
    let program = match program {
        Some(Ok(program)) => program.clone(),
        // It is built by who wants it.
        Some(Err(reason)) if engine == WASMTIME_NN => {
            tracing::info!(reason, "{name} is not here: pods that choose it will fail");
            return;
        }
        Some(Err(reason)) => {
            tracing::warn!(reason, "{name} cannot run: pods that choose it will fail");
            return;
        }
        None => return,
    };
    let words = config.worker_words(engine);
    tokio::spawn(async move {
        let mut command = tokio::process::Command::new(program);
        command.arg("version").args(words).env_clear().kill_on_drop(true);
        let limit = std::time::Duration::from_secs(30);
        match tokio::time::timeout(limit, command.output()).await {
            Ok(Ok(out)) if out.status.success() => {
                let version = String::from_utf8_lossy(&out.stdout).trim().to_owned();
                tracing::info!(version, "{name} is here");
            }
            Ok(Ok(out)) => {
                let reason = String::from_utf8_lossy(&out.stderr).trim().to_owned();
                tracing::warn!(reason, "{name} cannot run: pods that choose it will fail");
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "{name} cannot run: pods that choose it will fail");
            }
            Err(_) => tracing::warn!("{name} does not answer: pods that choose it may fail"),
        }
    });
}
