//! The resident daemon: its configuration, and the parts that only this sandboxer has.

use std::sync::Arc;

use anyhow::Context;
use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::common::CommonConfig;
use kuasar_daemon::logging::LevelHandle;
use kuasar_daemon::resident::{self, Setup};
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_oci::selfexe::SelfExe;
use kuasar_pod::NamespaceSandboxer;

use crate::cli::Runsc;
use crate::config::Config;
use crate::flavor::Gvisor;

/// Where gVisor's own state goes, below the state directory: a short name, because the paths of
/// control sockets in it may only have 107 bytes.
const STATE: &str = "r";

/// Runs the daemon until it is told to end.
pub async fn run(
    setup: Setup,
    args: DaemonArgs,
    config: Config,
    level: LevelHandle,
) -> anyhow::Result<()> {
    let exe =
        SelfExe::open("gvisor-sandboxer").context("make an unwritable handle of this program")?;
    let cgroups = Arc::new(Layout::detect()?);
    let dir = setup.dir.clone();
    let config = Live::new(config);
    let make = {
        let (config, program) = (config.clone(), exe.path());
        move |parts: &resident::Parts| {
            let state = dir.join(STATE);
            kuasar_host::record::private_dir(&state).map_err(|error| error.to_string())?;
            let runsc = Runsc::new(parts.parent.clone(), config.clone(), state, program);
            let flavor = Gvisor::new(config, Arc::new(runsc), cgroups.clone());
            Ok(NamespaceSandboxer::new(flavor, parts, cgroups, dir))
        }
    };
    let reload = move || {
        // Everything is checked, the log level too, before anything counts.
        let (common, new) = Config::load(args.config.as_deref())?;
        config.set(new);
        let log_level = args.log_level.clone().or(common.log_level);
        Ok(CommonConfig { log_level, ..common })
    };
    resident::run(setup, level, make, reload).await?;
    // Holds the program that sandbox-parent runs until nobody can ask for it.
    drop(exe);
    Ok(())
}
