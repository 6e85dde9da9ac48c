//! The resident daemon: its configuration, and the parts that only this sandboxer has.

use std::sync::Arc;

use kuasar_daemon::args::DaemonArgs;
use kuasar_daemon::common::CommonConfig;
use kuasar_daemon::logging::LevelHandle;
use kuasar_daemon::resident::{self, Setup};
use kuasar_host::cgroup::Layout;
use kuasar_host::live::Live;
use kuasar_pod::NamespaceSandboxer;

use crate::config::Config;
use crate::engine::Quark;
use crate::flavor::QuarkFlavor;

/// Where Quark's Task sockets are, below the state directory: a short name, because the path of a
/// socket may only have 107 bytes.
const SOCKETS: &str = "q";

/// Runs the daemon until it is told to end.
pub async fn run(
    setup: Setup,
    args: DaemonArgs,
    config: Config,
    level: LevelHandle,
) -> anyhow::Result<()> {
    let cgroups = Arc::new(Layout::detect()?);
    let dir = setup.dir.clone();
    let config = Live::new(config);
    let make = {
        let config = config.clone();
        move |parts: &resident::Parts| {
            let sockets = dir.join(SOCKETS);
            kuasar_host::record::private_dir(&sockets).map_err(|error| error.to_string())?;
            let quark = Quark::new(parts.parent.clone(), config.clone(), sockets);
            let flavor = QuarkFlavor::new(config, Arc::new(quark), cgroups.clone());
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
    Ok(())
}
