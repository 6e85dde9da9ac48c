//! The resident daemon: its configuration, and the parts that only this sandboxer has.

use std::sync::Arc;

use anyhow::Context;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::common::CommonConfig;
use kuasar_daemon::logging::LevelHandle;
use kuasar_daemon::resident::{self, Setup};
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_oci::engine::{Backend, Engines, Execs};
use kuasar_oci::execs::ExecServer;
use kuasar_oci::selfexe::SelfExe;
use kuasar_pod::{Metrics, NamespaceSandboxer};

use crate::config::Config;
use crate::flavor::Runc;

/// Runs the daemon until it is told to end.
pub async fn run(
    setup: Setup,
    args: DaemonArgs,
    config: Config,
    level: LevelHandle,
) -> anyhow::Result<()> {
    let exe =
        SelfExe::open("runc-sandboxer").context("make an unwritable handle of this program")?;
    let cgroups = Arc::new(Layout::detect()?);
    let dir = setup.dir.clone();
    let settings = Live::new(config.engine_settings());
    let config = Live::new(config);
    let make = {
        let (config, settings) = (config.clone(), settings.clone());
        let kept = dir.join("seccomp").into_os_string().into_string();
        let kept = kept.map_err(|_| anyhow::anyhow!("the state directory is not UTF-8"))?;
        let options = vec!["--seccomp-cache".to_owned(), kept];
        let mut builtin = vec![exe.path(), "oci".into()];
        builtin.extend(options.iter().cloned());
        let idle = config.get().exec_server_idle.as_secs();
        let server = vec![exe.path(), crate::EXECS.into(), idle.to_string()];
        move |parts: &resident::Parts| {
            let parent = Arc::new(parts.parent.clone());
            let execs = ExecServer::new(parent.clone(), server, options);
            let engines = Arc::new(Engines::new(Backend {
                builtin: Some(builtin),
                execs: (idle > 0).then(|| Arc::new(execs) as Arc<dyn Execs>),
                observer: Arc::new(Metrics("runc")),
                ..Backend::new(parent, settings)
            }));
            let flavor = Runc::new(config, engines, cgroups.clone());
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
    // Holds the engine's executable until nobody can ask for it.
    drop(exe);
    Ok(())
}
