//! The resident daemon: its configuration, and the parts that only this sandboxer has.

use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::common::CommonConfig;
use kuasar_daemon::logging::LevelHandle;
use kuasar_daemon::resident::{self, Setup};
use kuasar_host::cgroup::Layout;

use crate::config::Config;
use crate::engine::Engines;
use crate::sandboxer::RuncSandboxer;
use crate::selfexe::SelfExe;

/// Runs the daemon until it is told to end.
pub async fn run(
    setup: Setup,
    args: DaemonArgs,
    config: Config,
    level: LevelHandle,
) -> anyhow::Result<()> {
    let exe = SelfExe::open().context("make an unwritable handle of this program")?;
    let cgroups = Layout::detect()?;
    let dir = setup.dir.clone();
    let shared = Arc::new(RwLock::new(Arc::new(config)));
    let config = shared.clone();
    let make = |parts: &resident::Parts| {
        let engines = Engines::new(parts.parent.clone(), exe.path(), &dir, config.clone());
        Ok(RuncSandboxer::new(config.clone(), parts, engines, cgroups, dir))
    };
    let reload = move || {
        // Everything is checked, the log level too, before anything counts.
        let (common, new) = Config::load(args.config.as_deref())?;
        *shared.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        let log_level = args.log_level.clone().or(common.log_level);
        Ok(CommonConfig { log_level, ..common })
    };
    resident::run(setup, level, make, reload).await?;
    // Holds the engine's executable until nobody can ask for it.
    drop(exe);
    Ok(())
}
