//! Making templates: a machine beside those of the pods, with a directory, a cgroup and a user of
//! its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use containerd_sandbox::error::{Error, Result, blocking};
use kuasar_pod::files::host;

use crate::channel;
use crate::config::Config;
use crate::drivers::{self, Machinery};
use crate::errors::{chain, machine, net};
use crate::nics;
use crate::sandboxer::CGROUP;
use crate::template::{self, Turn};
use crate::vmm::{CopyNics, Kind, VmSpec, Vmm};

/// The template of a machine: its name, and where it is when there is one from which it can start.
pub(crate) struct Template {
    pub key: String,
    pub dir: Option<PathBuf>,
}

/// Whether a machine like `spec` can start from its template; `None` where there is none. Where no NICs can
/// be plugged in a template has one, and so have its copies. A machine without any is of use all the same:
/// it is how a template is asked for (`kuasar-ctl template make`).
fn can_be_copied(driver: &dyn Vmm, spec: &VmSpec) -> Option<bool> {
    let nics = spec.nics.len();
    let one = match driver.copies(spec.hugepages) {
        Ok(CopyNics::Plugged) => return Some(true),
        Ok(CopyNics::Declared) => nics == 1,
        Err(error) => {
            tracing::debug!(sandbox = spec.id, %error, "it boots cold");
            return None;
        }
    };
    if !one {
        tracing::debug!(sandbox = spec.id, nics, "templates have one interface: it boots cold");
    }
    (nics <= 1).then_some(one)
}

impl Machinery {
    /// The template for a machine like `spec`, where there are templates.
    pub(crate) async fn template(
        &self,
        config: &Config,
        driver: &Arc<dyn Vmm>,
        spec: &VmSpec,
    ) -> Option<Template> {
        if !config.template.enabled {
            return None;
        }
        let fits = can_be_copied(&**driver, spec)?;
        let (templates, driver, spec) = (self.templates.clone(), driver.clone(), spec.clone());
        let found = blocking(move || {
            let key = templates.key(&*driver, &spec).map_err(machine)?;
            Ok(Template { dir: if fits { templates.find(&key) } else { None }, key })
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
        let (driver, launcher) = self.vmm(config, kind, self.user(name, config)?)?;
        let dir = self.template_dir(key);
        let group = self.cgroups.group(&self.template_cgroup());
        let group = group.map_err(host("the templates' cgroup"))?;
        group.create().map_err(host("make the templates' cgroup"))?;
        kuasar_host::record::private_dir(&dir).map_err(host("make the template's directory"))?;
        let mut spec = template::machine(spec, key, &dir, group.entrances(), driver.features());
        if matches!(driver.copies(spec.hugepages), Ok(CopyNics::Declared)) {
            let taps = drivers::taps(&*driver, &launcher);
            let (netns, nic) = blocking(move || nics::to_save(taps).map_err(net)).await?;
            (spec.netns, spec.nics) = (Some(Arc::new(netns)), vec![nic]);
        }
        let ready = match spec.channel.uds() {
            Some(_) => Some(channel::listen(&spec, launcher.owner())?.0),
            None => None,
        };
        let (limit, most) = (config.guest_timeouts.boot, config.template.most);
        let made = self.templates.make(&*driver, &spec, ready.as_ref(), key, limit, most);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{self, Taps};
    use crate::vmm::cloud_hypervisor::CloudHypervisor;
    use crate::vmm::firecracker::Firecracker;
    use crate::vmm::process::{Launcher, Local};
    use crate::vmm::qemu::{Machine, Qemu, QemuConfig};
    use crate::vmm::stratovirt::StratoVirt;
    use crate::vmm::{Channel, Nic};

    fn launcher() -> Launcher {
        Launcher::new(Arc::new(Local::new().unwrap()), None)
    }

    fn spec(nics: usize) -> VmSpec {
        let nic = |number| Nic {
            id: nics::id(number),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            tap: Vec::new(),
            tap_name: Some(("kuasar2".into(), None)),
        };
        VmSpec { nics: (0..nics).map(nic).collect(), ..crate::vmm::spec::tests::spec() }
    }

    #[tokio::test]
    async fn where_no_nics_are_plugged_in_pods_with_exactly_one_are_copies() {
        let qemu = |machine| {
            let config = QemuConfig { machine, ..QemuConfig::default() };
            Qemu::new(config, Default::default(), launcher())
        };
        let all: [(&dyn Vmm, _); 5] = [
            (&Firecracker::new(Default::default(), launcher()), [Some(false), Some(true), None]),
            (&qemu(Machine::Q35), [Some(true); 3]),
            (&qemu(Machine::Microvm), [None; 3]),
            (&CloudHypervisor::new(Default::default(), Default::default(), launcher()), [None; 3]),
            (&StratoVirt::new(Default::default(), Default::default(), launcher()), [None; 3]),
        ];
        for (driver, wanted) in all {
            let is = [0, 1, 2].map(|nics| can_be_copied(driver, &spec(nics)));
            assert_eq!(is, wanted, "{}", driver.name());
            let huge = VmSpec { hugepages: true, ..spec(1) };
            assert_eq!(can_be_copied(driver, &huge).is_some(), driver.name() == "qemu q35");
            // Who says no says what to do.
            if let Err(error) = driver.copies(false) {
                assert!(error.to_string().contains("q35"), "{error}");
            }
        }
    }

    #[tokio::test]
    async fn a_template_has_the_channel_of_its_copies_where_there_is_no_serial_port() {
        let dir = std::path::Path::new("/run/k/vm/t-1");
        let machine = |driver: &dyn Vmm| {
            template::machine(&spec(1), "0123456789abcdef", dir, Vec::new(), driver.features())
        };
        let firecracker = machine(&Firecracker::new(Default::default(), launcher()));
        let own = Channel::HybridVsock { cid: 3, uds: "/run/k/vm/t-1/v/s".into() };
        assert_eq!(firecracker.channel, own);
        assert_eq!((firecracker.id.as_str(), firecracker.nics.len()), ("template-0123456789ab", 0));
        let qemu = machine(&Qemu::new(Default::default(), Default::default(), launcher()));
        assert!(matches!(qemu.channel, Channel::Serial { uds: None, .. }), "{:?}", qemu.channel);
    }

    #[test]
    fn the_nic_that_is_saved_is_alone_and_takes_the_place_of_a_pods_first() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let (netns, nic) = nics::to_save(Taps::Named { owner: 70_001 }).unwrap();
        let netlink =
            kuasar_host::netlink::Netlink::open_in(std::os::fd::AsFd::as_fd(&netns)).unwrap();
        let links = netlink.links().unwrap().into_iter().filter(|link| link.kind == "tun");
        let names: Vec<String> = links.map(|link| link.name).collect();
        assert_eq!(nic.tap_name.as_ref().map(|(name, _)| vec![name.clone()]), Some(names));
        assert!(nic.tap.is_empty(), "nobody else has it open");
        assert!(!network::is_hosts(&netns));
        let interface = network::Interface {
            name: "eth0".into(),
            index: 2,
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1450,
            tap: "kuasar2".into(),
        };
        let joined = network::Joined { interface, tap: Vec::new() };
        let pods = nics::nic(nics::id(0), joined);
        assert_eq!(pods.id, nic.id);
        assert_ne!(pods.mac, nic.mac);
        assert_eq!(nic.mac[0] & 3, 2, "it is locally administered, and no group's");
        let mut told = vmm_common::guest::Network::new();
        told.interfaces.push(Default::default());
        nics::was_saved(&mut told);
        assert_eq!(told.interfaces[0].saved_mac, network::mac_text(&nic.mac));
    }
}
