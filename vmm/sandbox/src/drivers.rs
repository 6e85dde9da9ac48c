//! What machines are started with, whoever they are for: which driver, as which user, through which
//! jail.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use containerd_sandbox::error::{Error, Result};
use kuasar_host::cgroup::Layout;
use sandbox_parent::client::Parent;

use crate::config::Config;
use crate::jail::Users;
use crate::network::Taps;
use crate::template::Templates;
use crate::vmm::cloud_hypervisor::CloudHypervisor;
use crate::vmm::firecracker::Firecracker;
use crate::vmm::helpers::HelpersConfig;
use crate::vmm::qemu::{Qemu, QemuConfig};
use crate::vmm::stratovirt::StratoVirt;
use crate::vmm::{self, Launcher, Vmm};

/// How machines of this driver, started by this launcher, come by their taps.
pub(crate) fn taps(driver: &dyn Vmm, launcher: &Launcher) -> Taps {
    match driver.opens_taps() {
        true => Taps::Named { owner: launcher.owner().map_or(0, |(uid, _)| uid) },
        false => Taps::Held { queues: 1 },
    }
}

/// What pods, templates and the pool have in common to start machines.
pub struct Machinery {
    config: Arc<RwLock<Arc<Config>>>,
    pub(crate) parent: Parent,
    pub(crate) cgroups: Arc<Layout>,
    /// The daemon's state directory.
    pub(crate) dir: PathBuf,
    /// This program, which is the jailer, too.
    exe: PathBuf,
    pub(crate) templates: Arc<Templates>,
    pub(crate) users: Arc<Users>,
}

impl Machinery {
    /// Machines of a daemon whose state is below `dir`.
    pub(crate) fn new(
        config: Arc<RwLock<Arc<Config>>>,
        parent: Parent,
        cgroups: Layout,
        dir: PathBuf,
        exe: PathBuf,
    ) -> Self {
        let configured = config.read().unwrap_or_else(PoisonError::into_inner).clone();
        let templates = configured.template.dir.clone().unwrap_or_else(|| dir.join("templates"));
        Self {
            config,
            parent,
            cgroups: Arc::new(cgroups),
            dir,
            exe,
            templates: Arc::new(Templates::new(templates)),
            users: Arc::default(),
        }
    }

    /// The configuration as it is now.
    pub(crate) fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The user of machine `id`; `None` where all machines have the same.
    pub(crate) fn user(&self, id: &str, config: &Config) -> Result<Option<u32>> {
        let range = config.jail.uid_range;
        if range.1 == 0 || !config.jailed.0 {
            return Ok(None);
        }
        self.users.take(id, range).map(Some).ok_or_else(|| {
            Error::ResourceExhausted(format!(
                "all {} users of jail.uid_range belong to machines: make the range larger, or \
                 remove pods",
                range.1
            ))
        })
    }

    fn launcher(&self, config: &Config, user: Option<u32>) -> Launcher {
        let jail = config.jailed.0.then(|| {
            let mut jail = config.jail.clone();
            if let Some(user) = user {
                (jail.uid, jail.gid) = (user, user);
            }
            jail.jailer = vec![self.exe.display().to_string(), "jail".into()];
            jail
        });
        Launcher::new(Arc::new(self.parent.clone()), jail)
    }

    /// The driver of a VMM for a machine of `user`.
    pub(crate) fn vmm(
        &self,
        config: &Config,
        kind: vmm::Kind,
        user: Option<u32>,
    ) -> Result<(Arc<dyn Vmm>, Launcher)> {
        let launcher = self.launcher(config, user);
        let helpers = HelpersConfig { own: self.exe.clone(), ..config.helpers.clone() };
        match kind {
            vmm::Kind::Qemu => {
                let qemu = QemuConfig { copied: config.template.enabled, ..config.qemu.clone() };
                let qemu = Qemu::new(qemu, helpers, launcher.clone());
                Ok((Arc::new(qemu), launcher))
            }
            vmm::Kind::CloudHypervisor => {
                let config = config.cloud_hypervisor.clone();
                let vmm = CloudHypervisor::new(config, helpers, launcher.clone());
                Ok((Arc::new(vmm), launcher))
            }
            vmm::Kind::StratoVirt => {
                let vmm = StratoVirt::new(config.stratovirt.clone(), helpers, launcher.clone());
                Ok((Arc::new(vmm), launcher))
            }
            vmm::Kind::Firecracker => {
                let vmm = Firecracker::new(config.firecracker.clone(), launcher.clone());
                Ok((Arc::new(vmm), launcher))
            }
        }
    }
}
