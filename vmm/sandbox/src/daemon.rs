//! The resident daemon: its configuration, and the parts that only this sandboxer has.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::common::CommonConfig;
use kuasar_daemon::logging::LevelHandle;
use kuasar_daemon::resident::{self, Setup};
use kuasar_host::cgroup::Layout;

use crate::config::Config;
use crate::sandboxer::VmmSandboxer;

/// Runs the daemon until it is told to end.
///
/// # Errors
/// When it cannot serve, or sandbox-parent is lost.
pub async fn run(
    setup: Setup,
    args: DaemonArgs,
    config: Config,
    level: LevelHandle,
) -> anyhow::Result<()> {
    let exe: PathBuf = std::env::current_exe()?;
    let cgroups = Layout::detect()?;
    let dir = setup.dir.clone();
    if let Err(missing) = config.images(config.vmm.kind()) {
        // Pods say so, too; whoever starts the daemon is told at once.
        tracing::warn!("{missing}");
    }
    if config.qemu.accel == crate::vmm::qemu::Accel::Tcg {
        // Once, before anybody waits for a pod.
        vmm_common::clock::host_khz();
    }
    let shared = Arc::new(RwLock::new(Arc::new(config)));
    let config = shared.clone();
    let pool = Arc::new(OnceLock::new());
    let told = pool.clone();
    let make = |parts: &resident::Parts| {
        let sandboxer = VmmSandboxer::new(config.clone(), parts, cgroups, dir, exe);
        let _ = told.set(sandboxer.pool.clone());
        Ok(sandboxer)
    };
    let reload = move || {
        // Everything is checked, the log level too, before anything counts.
        let (common, new) = Config::load(args.config.as_deref())?;
        *shared.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        if let Some(pool) = pool.get() {
            pool.look();
        }
        let log_level = args.log_level.clone().or(common.log_level);
        Ok(CommonConfig { log_level, ..common })
    };
    resident::run(setup, level, make, reload).await?;
    Ok(())
}
