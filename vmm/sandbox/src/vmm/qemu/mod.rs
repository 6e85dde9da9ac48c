//! QEMU.
//!
//! `microvm` boots fastest and has no hot-plug; `q35` plugs disks and NICs into PCIe root ports
//! that are there from the boot. The monitor's socket is made and connected here, before QEMU
//! exists, and passed as a descriptor: QEMU answers as soon as it can, and nothing polls.
//!
//! A guest without ACPI powers off by resetting, which `-no-reboot` makes QEMU's exit.

mod argv;
mod config;
mod hotplug;
mod machine;
mod slots;
mod snapshot;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixStream;

use super::core::{abandon, identity, or_last_words};
use super::error::{Doing, Error, Result};
use super::helpers::{self, Helper, HelpersConfig};
use super::process::{Fds, Launcher, Process, Program};
use super::qmp::Qmp;
use super::spec::{Channel, Root, ShareKind, VmSpec, Way, check_socket};
use super::started::Started;
use super::{CopyNics, Feature, Features, Kind, Vm, VmState, Vmm, console, vhost, vsock};
use crate::jail::{Role, View};
use argv::Sockets;
use machine::Machine as QemuVm;

pub use config::{Accel, Chosen, Hotplug, Machine, QemuConfig};

/// QEMU with its configuration.
#[derive(Debug, Clone)]
pub struct Qemu {
    config: Arc<QemuConfig>,
    way: Way,
    helpers: HelpersConfig,
    launcher: Launcher,
}

/// Helpers that serve, with our ends of their sockets.
#[derive(Default)]
struct Served {
    /// First the virtiofsd of each share, in their order, then that of vsock.
    started: Started,
    shares: Vec<OwnedFd>,
    vsock: Option<OwnedFd>,
}

impl Qemu {
    /// QEMU, run by `launcher`. The first one with TCG measures the host's clock.
    pub fn new(mut config: QemuConfig, helpers: HelpersConfig, launcher: Launcher) -> Self {
        if config.accel == Accel::Tcg {
            config.clock_khz = vmm_common::clock::host_khz();
        }
        let way = config.way(&helpers.vsock);
        Self { config: Arc::new(config), way, helpers, launcher }
    }

    fn check(&self, spec: &VmSpec) -> Result<()> {
        spec.check()?;
        if let Channel::KernelVsock { .. } = spec.channel {
            vhost::there(&self.name())?;
        }
        if self.config.accel == Accel::Kvm && !Path::new("/dev/kvm").exists() {
            return Err(Error::Unsupported {
                vmm: self.name(),
                what: "use KVM".into(),
                way_out: "this host has no /dev/kvm: load the module, or set accel to tcg".into(),
            });
        }
        if self.config.root_ports > 32 {
            return Err(Error::Invalid("root_ports: at most 32".into()));
        }
        Ok(())
    }

    /// Starts helpers and QEMU; `incoming` lets it wait for a snapshot.
    async fn start(&self, spec: &VmSpec, incoming: bool) -> Result<QemuVm> {
        self.check(spec)?;
        let (spec, vhost) = vhost::reserve(spec)?;
        let spec = &*spec;
        let Served { mut started, shares, vsock } = self.serve(spec).await?;
        let (mut fds, mut sockets) = (Fds::default(), Sockets::default());
        sockets.shares = shares.into_iter().map(|socket| fds.push(socket)).collect();
        sockets.vsock = vsock.map(|socket| fds.push(socket));
        sockets.vhost = vhost.map(|device| fds.push(device));
        if let Channel::Serial { socket, uds, .. } = &spec.channel {
            sockets.serial = Some(fds.push(vsock::private(socket, None)?));
            if let Some(uds) = uds {
                let port = StdStream::connect(socket).doing(|| "connect to the serial port")?;
                let relay = helpers::relay(&self.helpers, &self.launcher, spec, port, uds);
                started.processes.push(relay.await?);
            }
        }
        let monitor = spec.dir.join("qmp.sock");
        check_socket(&monitor, 0)?;
        sockets.qmp = fds.push(vsock::private(&monitor, None)?);
        let connection = StdStream::connect(&monitor).doing(|| "connect to the monitor")?;

        let argv = argv::build(&self.config, spec, &mut fds, &sockets, incoming)?;
        let (console_r, console_w) = console::pair()?;
        let processes = self.launcher.processes().clone();
        started.forget = Some((processes.clone(), spec.id.clone()));
        console::begin(&*processes, &spec.id, console_r, &spec.console).await?;
        let program = Program {
            name: "qemu".into(),
            argv,
            stdout: Some(console_w.as_fd()),
            fds: &fds,
            view: self.view(spec),
            netns: spec.netns.as_deref().map(AsFd::as_fd),
            cgroups: &spec.cgroups,
        };
        let process = self.launcher.run(program).await?;
        // Ours are duplicates; QEMU's end has to be the end of the pipe and of the sockets.
        drop((fds, console_w));

        let qmp = self.greet(&process, connection);
        let qmp = match qmp.await {
            Ok(qmp) => qmp,
            Err(error) => {
                started.processes.push(process);
                return Err(error);
            }
        };
        Ok(QemuVm::new(self.config.clone(), spec, process, started.done(), qmp))
    }

    /// Starts the helpers, side by side.
    async fn serve(&self, spec: &VmSpec) -> Result<Served> {
        kuasar_host::record::private_dir(&spec.dir)?;
        let shares = spec.shares.iter().filter(|share| share.kind == ShareKind::Virtiofs);
        let shares =
            shares.map(|share| helpers::virtiofsd(&self.helpers, &self.launcher, spec, share));
        let vsock = async {
            match &spec.channel {
                Channel::HybridVsock { cid, uds } => {
                    let vsock = helpers::vsock(&self.helpers, &self.launcher, spec, *cid, uds);
                    vsock.await.map(Some)
                }
                _ => Ok(None),
            }
        };
        let (shares, vsock) = futures::join!(futures::future::join_all(shares), vsock);
        let mut served = Served::default();
        let mut failed = None;
        for helper in shares {
            match helper {
                Ok(Helper { process, socket }) => {
                    served.started.processes.push(process);
                    served.shares.push(socket);
                }
                Err(error) => failed = Some(error),
            }
        }
        match vsock {
            Ok(Some(Helper { process, socket })) => {
                served.started.processes.push(process);
                served.vsock = Some(socket);
            }
            Ok(None) => {}
            Err(error) => failed = Some(error),
        }
        // The guard ends those that did start.
        failed.map_or(Ok(served), Err)
    }

    /// Waits for the monitor, or for QEMU's last words.
    async fn greet(&self, process: &Process, connection: StdStream) -> Result<Qmp> {
        connection.set_nonblocking(true).doing(|| "configure a socket")?;
        let stream = UnixStream::from_std(connection).doing(|| "use a socket")?;
        let limit = self.config.timeout();
        or_last_words(process, limit, Qmp::new(Kind::Qemu, stream, limit)).await
    }

    /// What a jailed QEMU sees.
    fn view(&self, spec: &VmSpec) -> View {
        let mut view = View::new(Role::Vmm);
        view.readable.push(spec.boot.kernel.clone());
        if let Root::Initrd(path) = &spec.boot.root {
            view.readable.push(path.clone());
        }
        view.readable.extend(self.config.data_dirs.iter().cloned());
        if self.config.accel == Accel::Kvm {
            view.devices.push("/dev/kvm".into());
        }
        let mut ninep = spec.shares.iter().filter(|share| share.kind == ShareKind::Ninep);
        view.shared_tree = ninep.next().map(|share| share.dir.clone());
        if view.shared_tree.is_some() {
            view.role = Role::ServingVmm;
        }
        view
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn name(&self) -> String {
        format!("qemu {}", self.config.machine.as_str())
    }

    fn way(&self) -> Way {
        self.way
    }

    fn features(&self) -> Features {
        machine::features(&self.config)
    }

    fn identity(&self) -> Result<String> {
        identity(&self.config.path, &*self.config)
    }

    fn copies(&self, _: bool) -> Result<CopyNics> {
        match self.features().has(Feature::NicHotplug) {
            true => Ok(CopyNics::Plugged),
            // Nor could shares and vsock be plugged in.
            false => Err(Vmm::cannot(self, Feature::NicHotplug)),
        }
    }

    async fn spawn(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>> {
        let vm = self.start(spec, false).await?;
        match vm.settle_memory().await {
            Ok(()) => Ok(Arc::new(vm)),
            Err(error) => Err(abandon(&vm, error).await),
        }
    }

    async fn restore(&self, spec: &VmSpec, snapshot: &Path) -> Result<Arc<dyn Vm>> {
        snapshot::restore(self, spec, snapshot).await
    }

    async fn reattach(&self, state: VmState) -> Result<Arc<dyn Vm>> {
        let processes = self.launcher.processes();
        let vm = QemuVm::reattach(self.config.clone(), state, processes).await?;
        Ok(Arc::new(vm))
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        machine::way_out(feature)
    }
}
