//! Cloud Hypervisor (x86_64 and aarch64, KVM), by the API at its socket.
//!
//! The API's socket is made here, before the VMM exists, and passed as a descriptor; taps travel
//! with the requests that name them. Disks, kernel and the sockets of vsock and virtiofsd it opens
//! by path: see `disks` and the jail's view.

mod api;
mod config;
mod machine;
pub mod monitor;
mod snapshot;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::core::{EVENT_PIPE, need_kvm, or_last_words, work_dir};
use super::disks::{Disks, Placed};
use super::error::{Error, Result};
use super::helpers::{self, HelpersConfig};
use super::http::Http;
use super::process::{Fds, Launcher, Process, Program, text};
use super::spec::{
    Channel, Disk, DiskFormat, Nic, Root, ShareKind, VmSpec, check_socket, root_params,
};
use super::started::Started;
use super::{Feature, Features, Kind, Vm, VmState, Vmm, console, vsock};
use crate::jail::{Role, View};
use machine::{Machine, Private};

pub use config::CloudHypervisorConfig;

/// Memory that is plugged comes in pieces of this many MiB: sections of an x86_64 guest's memory.
const PLUGGABLE_MIB: u32 = 128;

/// Cloud Hypervisor with its configuration.
#[derive(Debug, Clone)]
pub struct CloudHypervisor {
    config: Arc<CloudHypervisorConfig>,
    helpers: HelpersConfig,
    launcher: Launcher,
}

/// A VMM that serves its API and has no machine yet.
struct Served {
    started: Started,
    process: Process,
    http: Http,
    disks: Disks,
    /// Sockets of the shares, in their order.
    shares: Vec<PathBuf>,
    events: std::os::fd::OwnedFd,
}

impl CloudHypervisor {
    /// Cloud Hypervisor, run by `launcher`.
    pub fn new(config: CloudHypervisorConfig, helpers: HelpersConfig, launcher: Launcher) -> Self {
        Self { config: Arc::new(config), helpers, launcher }
    }

    fn check(&self, spec: &VmSpec) -> Result<()> {
        spec.check()?;
        if spec.shares.iter().any(|share| share.kind == ShareKind::Ninep) {
            return Err(Vmm::cannot(self, Feature::Ninep));
        }
        match &spec.channel {
            Channel::Serial { .. } => return Err(Vmm::cannot(self, Feature::Serial)),
            Channel::KernelVsock { .. } => {
                return Err(Error::Unsupported {
                    vmm: self.name(),
                    what: "use the kernel's vsock".into(),
                    way_out: "use its own: a hybrid vsock channel".into(),
                });
            }
            Channel::None | Channel::HybridVsock { .. } => {}
        }
        need_kvm(self)
    }

    /// Starts helpers and VMM. `readable`: further files for the jail.
    async fn serve(&self, spec: &VmSpec, readable: &[PathBuf]) -> Result<Served> {
        self.check(spec)?;
        kuasar_host::record::private_dir(&spec.dir)?;
        let owner = self.launcher.owner();
        let work = work_dir(&spec.dir, owner)?;
        let mut started = Started::default();
        let disks = Disks::new(&spec.dir, owner)?;
        started.disks = Some(disks.clone());
        let mut view = View::new(Role::Vmm);
        view.readable.extend(readable.iter().cloned());
        let (helpers, launcher) = (&self.helpers, &self.launcher);
        let shares = helpers::virtiofsds_in(helpers, launcher, spec, &work, &mut started).await?;
        if let Channel::HybridVsock { uds, .. } = &spec.channel {
            vsock::prepare(uds, owner)?;
            super::core::remove(uds);
            view.writable.extend(uds.parent().map(Path::to_owned));
        }
        view.writable.push(work);
        view.readable.push(spec.boot.kernel.clone());
        view.readable.push(spec.boot.root.path().to_owned());
        view.shared_tree = disks.shown();
        view.devices.push("/dev/kvm".into());

        let socket = spec.dir.join("api.sock");
        check_socket(&socket, 0)?;
        let mut fds = Fds::default();
        let api = fds.push(vsock::private(&socket, None)?);
        started.files.push(socket.clone());
        let (events, events_w) = console::pair()?;
        let monitor = fds.push(events_w);
        let (console_r, console_w) = console::pair()?;
        let processes = self.launcher.processes().clone();
        started.forget = Some((processes.clone(), spec.id.clone()));
        console::begin(&*processes, &spec.id, console_r, &spec.console).await?;
        processes.keep(&format!("{}/{EVENT_PIPE}", spec.id), events.as_fd()).await?;
        let program = Program {
            name: "cloud-hypervisor".into(),
            argv: vec![
                text(&self.config.path)?,
                "--api-socket".into(),
                format!("fd={api}"),
                "--event-monitor".into(),
                format!("fd={monitor}"),
                "--seccomp".into(),
                if self.config.seccomp { "true" } else { "false" }.into(),
            ],
            stdout: Some(console_w.as_fd()),
            fds: &fds,
            view,
            netns: spec.netns.as_deref().map(AsFd::as_fd),
            cgroups: &spec.cgroups,
        };
        let process = self.launcher.run(program).await?;
        // Ours are duplicates; the VMM's end has to be the end of pipes and socket.
        drop((fds, console_w));
        let http = Http::new(Kind::CloudHypervisor, socket, api::PREFIX, self.config.timeout());
        Ok(Served { started, process, http, disks, shares, events })
    }

    /// Runs what makes the machine; on failure nothing is left.
    async fn make(
        &self,
        spec: &VmSpec,
        served: Served,
        made: impl AsyncFnOnce(&Served) -> Result<()>,
    ) -> Result<Machine> {
        let limit = self.config.timeout();
        let done = or_last_words(&served.process, limit, made(&served)).await;
        let Served { mut started, process, http, disks, events, .. } = served;
        if let Err(error) = done {
            started.processes.push(process);
            return Err(error);
        }
        let helpers = started.done();
        let own = Private::of(spec, self.config.balloon, self.launcher.owner());
        let machine = Machine::new(self.config.clone(), spec, own, process, helpers, http, disks);
        match machine.follow(events) {
            Ok(()) => Ok(machine),
            Err(error) => {
                // Its resets would be missed.
                machine.stop(std::time::Duration::ZERO).await?;
                machine.release().await;
                Err(error)
            }
        }
    }

    fn vm_config(&self, spec: &VmSpec, served: &Served) -> Result<(api::VmConfig, Vec<Placed>)> {
        let mut params = vec!["console=ttyS0".to_owned(), "panic=-1".into()];
        let mut disks = Vec::new();
        let mut placed = Vec::new();
        let initramfs = match &spec.boot.root {
            Root::Initrd(path) => Some(text(path)?),
            Root::Image { disk, fstype } => {
                if !disk.read_only {
                    return Err(Error::Invalid(
                        "the image that a guest boots from is read-only".into(),
                    ));
                }
                disks.push(disk_config(disk, &disk.path)?);
                params.extend(root_params(fstype));
                None
            }
        };
        params.extend(spec.boot.params.iter().cloned());
        for disk in &spec.disks {
            let at = served.disks.place(disk)?;
            disks.push(disk_config(disk, &at.path)?);
            placed.push(at);
        }
        let mut fs = Vec::new();
        for (share, socket) in spec.shares.iter().zip(&served.shares) {
            fs.push(api::Fs {
                id: format!("fs-{}", share.tag),
                tag: share.tag.clone(),
                socket: text(socket)?,
                num_queues: 1,
                queue_size: 1024,
            });
        }
        let vsock = match &spec.channel {
            Channel::HybridVsock { cid, uds } => Some(api::Vsock { cid: *cid, socket: text(uds)? }),
            _ => None,
        };
        let memory = spec.memory_mib;
        let more = (memory.most - memory.at_boot).next_multiple_of(PLUGGABLE_MIB);
        let config = api::VmConfig {
            cpus: api::Cpus { boot_vcpus: spec.cpus.at_boot, max_vcpus: spec.cpus.most },
            memory: api::Memory {
                size: u64::from(memory.at_boot) << 20,
                shared: !spec.shares.is_empty(),
                hugepages: spec.hugepages,
                hugepage_size: spec.hugepages.then_some(2 << 20),
                hotplug_method: (more > 0).then_some("VirtioMem"),
                hotplug_size: (more > 0).then_some(u64::from(more) << 20),
            },
            payload: api::Payload {
                kernel: text(&spec.boot.kernel)?,
                initramfs,
                cmdline: params.join(" "),
            },
            disks,
            fs,
            rng: spec.entropy.then_some(api::Rng { src: "/dev/urandom" }),
            balloon: self.config.balloon.then_some(api::Balloon {
                size: 0,
                deflate_on_oom: true,
                free_page_reporting: true,
            }),
            serial: api::Mode { mode: "Tty" },
            console: api::Mode { mode: "Off" },
            vsock,
            pvpanic: true,
        };
        Ok((config, placed))
    }
}

/// The argument for a disk at `path`.
pub(super) fn disk_config(disk: &Disk, path: &Path) -> Result<api::Disk> {
    Ok(api::Disk {
        id: disk.id.clone(),
        serial: disk.id.clone(),
        path: text(path)?,
        readonly: disk.read_only,
        image_type: match disk.format {
            DiskFormat::Raw => "Raw",
            DiskFormat::Qcow2 => "Qcow2",
        },
        backing_files: false,
    })
}

/// Adds a NIC, before the boot or after. Without an MTU: it would set that of the tap, which the
/// jail forbids, and which is right already; the guest is told its own with its network.
pub(super) async fn add_nic(http: &Http, nic: &Nic) -> Result<()> {
    if nic.tap.is_empty() {
        return Err(Error::Invalid(format!("{}: no descriptor of its tap device", nic.id)));
    }
    let net = api::Net { id: nic.id.clone(), mac: nic.mac_text(), num_queues: 2 * nic.tap.len() };
    http.put_with("/vm.add-net", &net, nic.tap.clone()).await
}

#[async_trait]
impl Vmm for CloudHypervisor {
    fn kind(&self) -> Kind {
        Kind::CloudHypervisor
    }

    fn name(&self) -> String {
        Kind::CloudHypervisor.to_string()
    }

    fn features(&self) -> Features {
        machine::features(self.config.balloon)
    }

    async fn spawn(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>> {
        let served = self.serve(spec, &[]).await?;
        let machine = self
            .make(spec, served, async |served| {
                let _: api::Ping = served.http.get("/vmm.ping").await?;
                let (config, placed) = self.vm_config(spec, served)?;
                served.http.put("/vm.create", &config).await?;
                for nic in &spec.nics {
                    add_nic(&served.http, nic).await?;
                }
                served.http.order("/vm.boot").await?;
                drop(placed);
                Ok(())
            })
            .await?;
        Ok(Arc::new(machine))
    }

    async fn restore(&self, spec: &VmSpec, snapshot: &Path) -> Result<Arc<dyn Vm>> {
        snapshot::restore(self, spec, snapshot).await
    }

    async fn reattach(&self, state: VmState) -> Result<Arc<dyn Vm>> {
        let processes = self.launcher.processes();
        Ok(Arc::new(Machine::reattach(self.config.clone(), state, processes).await?))
    }

    fn way_out(&self, feature: Feature) -> &'static str {
        machine::way_out(feature)
    }
}
