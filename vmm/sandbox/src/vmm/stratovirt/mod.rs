//! StratoVirt (x86_64 and aarch64, KVM), machine `microvm`, by its dialect of QMP.
//!
//! What is different from QEMU: sockets and disks are opened by path; the guest's kernel is a
//! bzImage or a flat binary, which is made of an ELF file here (`kernel`); four places for disks and two for NICs are there from the boot, empty
//! or not. A disk may come into an empty one while the guest runs. A NIC may too, but the guest has
//! read the place's MAC address at its boot and does not read it again, so that is no hot-plug
//! here. vsock is the host kernel's alone; without it the agent is reached by a virtio console.
//!
//! A guest ends it by a reset as well as by a triple fault (`LightMachine::reset`).

mod argv;
mod config;
mod kernel;
mod machine;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixStream;

use super::core::{abandon, need_kvm, need_raw, or_last_words, work_dir};
use super::disks::Disks;
use super::error::{Doing, Error, Result};
use super::files::{lend, length};
use super::helpers::{self, HelpersConfig, Watch};
use super::process::{Fds, Launcher, Program, text};
use super::qmp::Qmp;
use super::spec::{Channel, ShareKind, VmSpec, Way, check_socket};
use super::started::Started;
use super::{Feature, Features, Kind, Vm, VmState, Vmm, console, vhost};
use crate::jail::{Role, View};
use argv::Places;
use machine::{Description, Machine, Private};

pub use config::{Chosen, StratoVirtConfig};

/// Places for disks of a microvm, that of its root among them (machine/src/micro_common/mod.rs).
const DISKS: usize = 4;
/// Places for NICs.
const NICS: usize = 2;
/// Least memory that it takes, in MiB.
const LEAST_MIB: u32 = 128;

/// StratoVirt with its configuration.
#[derive(Debug, Clone)]
pub struct StratoVirt {
    config: Arc<StratoVirtConfig>,
    helpers: HelpersConfig,
    launcher: Launcher,
}

impl StratoVirt {
    /// StratoVirt, run by `launcher`.
    pub fn new(config: StratoVirtConfig, helpers: HelpersConfig, launcher: Launcher) -> Self {
        Self { config: Arc::new(config), helpers, launcher }
    }

    fn check(&self, spec: &VmSpec) -> Result<()> {
        spec.check()?;
        let unsupported = |what: &str, way_out: &str| Error::Unsupported {
            vmm: self.name(),
            what: what.into(),
            way_out: way_out.into(),
        };
        if spec.shares.iter().any(|share| share.kind == ShareKind::Ninep) {
            return Err(Vmm::cannot(self, Feature::Ninep));
        }
        match &spec.channel {
            Channel::HybridVsock { .. } => return Err(Vmm::cannot(self, Feature::HybridVsock)),
            Channel::KernelVsock { .. } => vhost::there(&self.name())?,
            Channel::Serial { console: false, .. } => {
                return Err(unsupported(
                    "have a serial port that is no console",
                    "set channel = \"console\"",
                ));
            }
            _ => {}
        }
        let root = spec.boot.root.disk();
        for disk in spec.disks.iter().chain(root) {
            need_raw(self.name(), disk)?;
        }
        if spec.hugepages {
            return Err(unsupported(
                "use huge pages",
                "set size.hugepages = false, or use another VMM",
            ));
        }
        if spec.cpus.most > spec.cpus.at_boot {
            return Err(Vmm::cannot(self, Feature::CpuResize));
        }
        if spec.memory_mib.most > spec.memory_mib.at_boot && !self.config.balloon {
            return Err(Vmm::cannot(self, Feature::MemoryResize));
        }
        if spec.memory_mib.most < LEAST_MIB {
            return Err(Error::Invalid(format!(
                "{} MiB: stratovirt's machines have {LEAST_MIB} MiB or more",
                spec.memory_mib.most
            )));
        }
        if spec.disks.len() + usize::from(root.is_some()) > DISKS || spec.nics.len() > NICS {
            return Err(Error::Exhausted(format!(
                "a stratovirt microvm has places for {DISKS} disks and {NICS} interfaces"
            )));
        }
        if let Some(nic) = spec.nics.iter().find(|nic| nic.tap.len() != 1) {
            return Err(Error::Invalid(format!(
                "{}: {} descriptors of its tap device, and a stratovirt microvm takes one",
                nic.id,
                nic.tap.len()
            )));
        }
        need_kvm(self)
    }

    /// Starts helpers and VMM, from a snapshot with `incoming`.
    async fn start(&self, spec: &VmSpec, incoming: Option<&Path>) -> Result<Machine> {
        self.check(spec)?;
        let (spec, vhost) = vhost::reserve(spec)?;
        let spec = &*spec;
        kuasar_host::record::private_dir(&spec.dir)?;
        let owner = self.launcher.owner();
        let work = work_dir(&spec.dir, owner)?;
        let (monitor, serial) = (work.join("qmp.sock"), work.join("agent.sock"));
        for socket in [&monitor, &serial] {
            check_socket(socket, 0)?;
            super::core::remove(socket);
        }
        let mut started = Started::default();
        let disks = Disks::new(&spec.dir, owner)?;
        started.disks = Some(disks.clone());
        let mut view = View::new(Role::Vmm);
        let (helpers, launcher) = (&self.helpers, &self.launcher);
        let shares = helpers::virtiofsds_in(helpers, launcher, spec, &work, &mut started).await?;
        let mut placed = Vec::new();
        for disk in &spec.disks {
            placed.push(disks.place(disk)?);
        }
        let mut fds = Fds::default();
        let taps = spec.nics.iter().flat_map(|nic| nic.tap.first());
        let taps: Vec<i32> = taps.map(|tap| fds.push(tap.clone())).collect();
        let vhost = vhost.map(|device| fds.push(device));
        let wanted = self.config.kernel.as_ref().unwrap_or(&spec.boot.kernel).clone();
        let beside = spec.dir.parent().unwrap_or(&spec.dir).to_owned();
        let flattened = tokio::task::spawn_blocking(move || kernel::usable(&wanted, &beside));
        let kernel = flattened.await.map_err(std::io::Error::other).doing(|| "read a kernel")??;
        let argv = argv::build(
            &self.config,
            spec,
            &Places {
                kernel: &kernel,
                monitor: &monitor,
                serial: &serial,
                shares: &shares,
                disks: &placed.iter().map(|one| one.path.clone()).collect::<Vec<_>>(),
                taps: &taps,
                vhost,
                incoming,
            },
        )?;
        if let Channel::Serial { socket, .. } = &spec.channel
            && socket != &serial
        {
            super::core::remove(socket);
            std::os::unix::fs::symlink(&serial, socket)
                .doing(|| format!("make {}", socket.display()))?;
        }
        view.readable.push(kernel);
        view.readable.push(spec.boot.root.path().to_owned());
        if let Some(dir) = incoming {
            view.readable.extend(Description::FILES.map(|name| dir.join(name)));
        }
        view.devices.push("/dev/kvm".into());
        let watch = Watch::new(&work)?;
        view.writable.push(work);
        view.shared_tree = disks.shown();

        let (console_r, console_w) = console::pair()?;
        if let Some((uid, gid)) = owner {
            // It opens its standard output once more, by name.
            nix::unistd::fchown(&console_w, Some(uid.into()), Some(gid.into()))
                .doing(|| "hand over the console's pipe")?;
        }
        let processes = self.launcher.processes().clone();
        started.forget = Some((processes.clone(), spec.id.clone()));
        console::begin(&*processes, &spec.id, console_r, &spec.console).await?;
        let program = Program {
            name: "stratovirt".into(),
            argv,
            stdout: Some(console_w.as_fd()),
            fds: &fds,
            view,
            netns: spec.netns.as_deref().map(AsFd::as_fd),
            cgroups: &spec.cgroups,
        };
        let process = self.launcher.run(program).await?;
        drop((fds, console_w));
        let limit = self.config.timeout();
        let greeted = async {
            let waited = tokio::time::timeout(limit, watch.connect(&monitor));
            let what = || Error::Deadline { what: "stratovirt's monitor".into(), limit };
            let stream = waited.await.map_err(|_| what())??;
            stream.set_nonblocking(true).doing(|| "configure a socket")?;
            let stream = UnixStream::from_std(stream).doing(|| "use a socket")?;
            Qmp::new(Kind::StratoVirt, stream, limit).await
        };
        let qmp = match or_last_words(&process, limit, greeted).await {
            Ok(qmp) => qmp,
            Err(error) => {
                started.processes.push(process);
                return Err(error);
            }
        };
        if let Channel::Serial { uds: Some(uds), .. } = &spec.channel {
            let joined = async {
                let port = tokio::time::timeout(limit, watch.connect(&serial)).await;
                let what = || Error::Deadline { what: "stratovirt's console".into(), limit };
                let port = port.map_err(|_| what())??;
                helpers::relay(&self.helpers, &self.launcher, spec, port, uds).await
            };
            match or_last_words(&process, limit, joined).await {
                Ok(relay) => started.processes.push(relay),
                Err(error) => {
                    started.processes.push(process);
                    return Err(error);
                }
            }
        }
        drop(placed);
        let helpers = started.done();
        let own = Private::new(spec, self.config.balloon, owner);
        Ok(Machine::new(self.config.clone(), spec, own, process, helpers, qmp, disks))
    }
}

#[async_trait]
impl Vmm for StratoVirt {
    fn kind(&self) -> Kind {
        Kind::StratoVirt
    }

    fn name(&self) -> String {
        "stratovirt microvm".into()
    }

    fn way(&self) -> Way {
        match self.config.channel {
            Chosen::Vsock => Way::Vsock,
            Chosen::Auto if vhost::is_there() => Way::Vsock,
            Chosen::Auto | Chosen::Console => Way::Console,
        }
    }

    fn features(&self) -> Features {
        machine::features(self.config.balloon)
    }

    async fn spawn(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>> {
        let machine = self.start(spec, None).await?;
        match machine.settle_memory().await {
            Ok(()) => Ok(Arc::new(machine)),
            Err(error) => Err(abandon(&machine, error).await),
        }
    }

    async fn restore(&self, spec: &VmSpec, snapshot: &Path) -> Result<Arc<dyn Vm>> {
        let was = Description::read(snapshot)?;
        was.fits(spec)?;
        let mut base = spec.clone();
        base.disks.clear();
        let files = Description::FILES.map(|name| snapshot.join(name));
        for (path, was) in files.iter().zip(was.lengths) {
            if length(path)? != was {
                return Err(Error::State(format!("{} is torn", path.display())));
            }
            lend(path, self.launcher.owner())?;
        }
        let machine = self.start(&base, Some(snapshot)).await?;
        let more = async {
            machine.go_on().await?;
            for disk in &spec.disks {
                machine.attach_disk(disk).await?;
            }
            Ok(())
        };
        match more.await {
            Ok(()) => Ok(Arc::new(machine)),
            Err(error) => Err(abandon(&machine, error).await),
        }
    }

    async fn reattach(&self, state: VmState) -> Result<Arc<dyn Vm>> {
        let processes = self.launcher.processes();
        Ok(Arc::new(Machine::reattach(self.config.clone(), state, processes).await?))
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        machine::way_out(feature)
    }
}

/// Where a machine's monitor is.
fn monitor_of(dir: &Path) -> PathBuf {
    dir.join("w/qmp.sock")
}

/// A path as QMP wants it.
fn qmp_text(path: &Path) -> Result<String> {
    text(path)
}
