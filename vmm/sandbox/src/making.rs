//! Making templates: a machine beside those of the pods, with a directory, a cgroup and a user of
//! its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use containerd_sandbox::error::{Error, Result, blocking};
use kuasar_pod::files::host;

use crate::config::Config;
use crate::drivers::Machinery;
use crate::errors::{chain, machine};
use crate::sandboxer::CGROUP;
use crate::template::{self, Turn};
use crate::vmm::{Feature, Features, Kind, VmSpec, Vmm};

/// The template of a machine: its name, and where it is when there is one.
pub(crate) struct Template {
    pub key: String,
    pub dir: Option<PathBuf>,
}

/// Whether pods can start from copies of such machines: what a template does not have is plugged in
/// after its copy has begun to run.
pub(crate) fn can_be_copied(features: Features) -> bool {
    features.has(Feature::Snapshot) && features.has(Feature::NicHotplug)
}

impl Machinery {
    /// The template for a machine like `spec`, where there are templates.
    pub(crate) async fn template(
        &self,
        config: &Config,
        driver: &Arc<dyn Vmm>,
        spec: &VmSpec,
    ) -> Option<Template> {
        if !config.template.enabled || !can_be_copied(driver.features()) {
            return None;
        }
        let (templates, driver, spec) = (self.templates.clone(), driver.clone(), spec.clone());
        let found = blocking(move || {
            let key = templates.key(&*driver, &spec).map_err(machine)?;
            Ok(Template { dir: templates.find(&key), key })
        });
        match found.await {
            Ok(found) => Some(found),
            Err(error) => {
                tracing::warn!(error = %error.chain(), "pods start without templates");
                None
            }
        }
    }

    /// Makes the template `key` of a machine like `spec`. What comes of it is in the log.
    pub(crate) async fn make_template(
        self: Arc<Self>,
        turn: Turn,
        config: Arc<Config>,
        kind: Kind,
        spec: VmSpec,
        key: String,
    ) {
        let _turn = turn;
        // Not the pod's user: it is another machine, and it may outlive the pod.
        let name = format!("{}{key}", template::PREFIX);
        let begun = Instant::now();
        match self.try_template(&config, kind, &spec, &key, &name).await {
            Ok(()) => tracing::info!(key, took = ?begun.elapsed(), "a template is ready"),
            Err(error) => {
                tracing::warn!(key, error = %error.chain(), "no template: pods boot cold");
            }
        }
        let _ = std::fs::remove_dir_all(self.template_dir(&key));
        let removed = self.cgroups.group(&self.template_cgroup()).map_err(host("a cgroup"));
        let removed = match removed {
            Ok(group) => blocking(move || group.remove(CGROUP).map_err(host("remove it"))).await,
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(error = %error.chain(), "the cgroup of a template's machine is left");
        }
        self.users.release(&name);
    }

    async fn try_template(
        &self,
        config: &Config,
        kind: Kind,
        spec: &VmSpec,
        key: &str,
        name: &str,
    ) -> Result<()> {
        let (driver, _) = self.vmm(config, kind, self.user(name, config)?)?;
        let dir = self.template_dir(key);
        let group = self.cgroups.group(&self.template_cgroup());
        let group = group.map_err(host("the templates' cgroup"))?;
        group.create().map_err(host("make the templates' cgroup"))?;
        kuasar_host::record::private_dir(&dir).map_err(host("make the template's directory"))?;
        let spec = template::machine(spec, key, &dir, group.entrances());
        let (limit, most) = (config.guest_timeouts.boot, config.template.most);
        let made = self.templates.make(&*driver, &spec, key, limit, most);
        made.await.map_err(|error| Error::FailedPrecondition(chain(&error)))
    }

    fn template_dir(&self, key: &str) -> PathBuf {
        self.dir.join("vm").join(format!("t-{}", key.get(..8).unwrap_or(key)))
    }

    /// One for each state directory: two daemons on a host do not end each other's machines.
    fn template_cgroup(&self) -> String {
        let dir = self.dir.to_string_lossy().replace('/', "_");
        format!("/kuasar-vmm/template{dir}")
    }

    /// Ends and removes what a daemon that died while it made a template has left.
    pub(crate) fn sweep_templates(&self) -> Result<()> {
        self.templates.sweep();
        let group =
            self.cgroups.group(&self.template_cgroup()).map_err(host("the templates' cgroup"))?;
        if group.exists() {
            let _ = group.signal_all(libc::SIGKILL);
            group.remove(CGROUP).map_err(host("remove the templates' cgroup"))?;
        }
        let dirs = std::fs::read_dir(self.dir.join("vm")).into_iter().flatten().flatten();
        for entry in dirs.filter(|entry| entry.file_name().to_string_lossy().starts_with("t-")) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
        Ok(())
    }
}
