//! Firecracker (x86_64 and aarch64, KVM), by the API at its socket.
//!
//! It has no shared directories: a guest boots from an initramfs or a read-only disk, and
//! containers come as disks, put into empty drives that are there from the boot (`slots`). Taps
//! it opens by name, in the pod's network namespace; so they must be persistent, belong to the
//! jail's user, and be open nowhere else.
//!
//! Our jail does what its own jailer does (and more: a view of single files, a network and a PID
//! namespace, capabilities); Firecracker's sockets and files are in directories of its own in it.
//! Its seccomp filter is on beneath ours.

mod api;
mod config;
mod machine;
mod slots;
mod snapshot;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::core::{identity, need_kvm, need_raw, or_last_words, work_dir};
use super::disks::{Disks, Placed};
use super::error::{Error, Result};
use super::helpers::Watch;
use super::http::Http;
use super::process::{Fds, Launcher, Process, Program, text};
use super::spec::{Channel, Disk, Nic, Root, VmSpec, check_socket, root_params};
use super::started::Started;
use super::{CopyNics, Feature, Features, Kind, Vm, VmState, Vmm, console, vsock};
use crate::jail::{Role, View};
use machine::{Machine, Private};

pub use config::FirecrackerConfig;

/// Name of the drive that a guest boots from.
const ROOT: &str = "root";
/// Drives for later, at most.
const MAX_SLOTS: u8 = 16;

/// Firecracker with its configuration.
#[derive(Debug, Clone)]
pub struct Firecracker {
    config: Arc<FirecrackerConfig>,
    launcher: Launcher,
}

/// A VMM that serves its API and has no machine yet.
struct Served {
    started: Started,
    process: Process,
    http: Http,
    disks: Disks,
}

impl Firecracker {
    /// Firecracker, run by `launcher`.
    pub fn new(config: FirecrackerConfig, launcher: Launcher) -> Self {
        Self { config: Arc::new(config), launcher }
    }

    fn check(&self, spec: &VmSpec) -> Result<()> {
        spec.check()?;
        let unsupported = |what: &str, way_out: &str| Error::Unsupported {
            vmm: self.name(),
            what: what.into(),
            way_out: way_out.into(),
        };
        if !spec.shares.is_empty() {
            return Err(Vmm::cannot(self, Feature::Virtiofs));
        }
        match &spec.channel {
            Channel::Serial { .. } => return Err(Vmm::cannot(self, Feature::Serial)),
            Channel::KernelVsock { .. } => {
                return Err(unsupported(
                    "use the kernel's vsock",
                    "use its own: a hybrid vsock channel",
                ));
            }
            Channel::None | Channel::HybridVsock { .. } => {}
        }
        for disk in spec.disks.iter().chain(spec.boot.root.disk()) {
            need_raw(self.name(), disk)?;
        }
        if spec.cpus.most > spec.cpus.at_boot {
            return Err(Vmm::cannot(self, Feature::CpuResize));
        }
        if spec.memory_mib.most > spec.memory_mib.at_boot && !self.config.balloon {
            return Err(Vmm::cannot(self, Feature::MemoryResize));
        }
        if self.config.disk_slots.saturating_add(self.config.read_only_disk_slots) > MAX_SLOTS {
            return Err(Error::Invalid(format!(
                "firecracker: disk_slots and read_only_disk_slots are at most {MAX_SLOTS} together"
            )));
        }
        for nic in &spec.nics {
            tap_name(nic)?;
        }
        need_kvm(self)
    }

    /// Starts the VMM. `readable`: further files for the jail.
    async fn serve(&self, spec: &VmSpec, readable: &[PathBuf]) -> Result<Served> {
        self.check(spec)?;
        kuasar_host::record::private_dir(&spec.dir)?;
        let owner = self.launcher.owner();
        let work = work_dir(&spec.dir, owner)?;
        let socket = work.join("api.sock");
        check_socket(&socket, 0)?;
        super::core::remove(&socket);
        let mut started = Started::default();
        let disks = Disks::new(&spec.dir, owner)?;
        started.disks = Some(disks.clone());
        let mut view = View::new(Role::Vmm);
        view.readable.extend(readable.iter().cloned());
        if let Channel::HybridVsock { uds, .. } = &spec.channel {
            vsock::prepare(uds, owner)?;
            super::core::remove(uds);
            view.writable.extend(uds.parent().map(Path::to_owned));
        }
        view.readable.push(spec.boot.kernel.clone());
        view.readable.push(spec.boot.root.path().to_owned());
        let watch = Watch::new(&work)?;
        view.writable.push(work);
        view.shared_tree = disks.shown();
        view.devices.push("/dev/kvm".into());
        if !spec.nics.is_empty() {
            view.devices.push("/dev/net/tun".into());
        }
        let (console_r, console_w) = console::pair()?;
        let processes = self.launcher.processes().clone();
        started.forget = Some((processes.clone(), spec.id.clone()));
        console::begin(&*processes, &spec.id, console_r, &spec.console).await?;
        let fds = Fds::default();
        let mut argv = vec![
            text(&self.config.path)?,
            "--api-sock".into(),
            text(&socket)?,
            "--id".into(),
            instance_id(&spec.id),
            // To its standard error, so that its last words are kept.
            "--log-path".into(),
            "/proc/self/fd/2".into(),
            "--level".into(),
            "Warn".into(),
        ];
        if !self.config.seccomp {
            argv.push("--no-seccomp".into());
        }
        let program = Program {
            name: "firecracker".into(),
            argv,
            stdout: Some(console_w.as_fd()),
            fds: &fds,
            view,
            netns: spec.netns.as_deref().map(AsFd::as_fd),
            cgroups: &spec.cgroups,
        };
        let process = self.launcher.run(program).await?;
        drop(console_w);
        let limit = self.config.timeout();
        let serving = async {
            let waited = tokio::time::timeout(limit, watch.connect(&socket));
            let what = || Error::Deadline { what: "firecracker to serve its API".into(), limit };
            waited.await.map_err(|_| what())?.map(drop)
        };
        if let Err(error) = or_last_words(&process, limit, serving).await {
            started.processes.push(process);
            return Err(error);
        }
        let http = Http::new(Kind::Firecracker, socket, "", limit);
        Ok(Served { started, process, http, disks })
    }

    /// Runs what makes the machine; on failure nothing is left, and its tap can be opened again.
    async fn make(
        &self,
        spec: &VmSpec,
        served: Served,
        made: impl AsyncFnOnce(&Served) -> Result<Private>,
    ) -> Result<Machine> {
        let done = or_last_words(&served.process, self.config.timeout(), made(&served)).await;
        let Served { mut started, process, http, disks } = served;
        let own = match done {
            Ok(own) => own,
            Err(error) => {
                started.processes.push(process);
                started.undo().await;
                return Err(error);
            }
        };
        started.done();
        Ok(Machine::new(self.config.clone(), spec, own, process, http, disks))
    }

    /// Tells the VMM what the machine is made of.
    async fn configure(&self, spec: &VmSpec, served: &Served) -> Result<Private> {
        let http = &served.http;
        let mut own = Private::new(&self.config, self.launcher.owner());
        let machine = api::MachineConfig {
            vcpu_count: spec.cpus.at_boot,
            // What is more than at boot is held by the balloon.
            mem_size_mib: spec.memory_mib.most,
            huge_pages: spec.hugepages.then_some("2M"),
        };
        http.put("/machine-config", &machine).await?;
        let mut params = vec!["console=ttyS0".to_owned(), "reboot=k".into(), "panic=-1".into()];
        let initrd_path = match &spec.boot.root {
            Root::Initrd(path) => Some(text(path)?),
            Root::Image { disk, fstype } => {
                if !disk.read_only {
                    return Err(Error::Invalid(
                        "the image that a guest boots from is read-only".into(),
                    ));
                }
                // Firecracker adds the same root= once more.
                params.extend(root_params(fstype));
                add_drive(http, ROOT, true, true, &disk.path).await?;
                None
            }
        };
        if cfg!(target_arch = "x86_64") {
            // It gives its guests ACPI tables and no power to switch off: a reset is what ends it.
            params.push("kuasar.poweroff=reboot".into());
        }
        params.extend(spec.boot.params.iter().cloned());
        let boot = api::BootSource {
            kernel_image_path: text(&spec.boot.kernel)?,
            initrd_path,
            boot_args: params.join(" "),
        };
        http.put("/boot-source", &boot).await?;
        let mut held: Vec<Placed> = Vec::new();
        for disk in &spec.disks {
            let placed = self.cold_disk(http, &served.disks, disk, &mut own).await?;
            held.push(placed);
        }
        for slot in own.slots.all() {
            add_drive(http, &slot.drive, false, slot.read_only, Path::new(slots::EMPTY)).await?;
        }
        for nic in &spec.nics {
            let interface = api::NetworkInterface {
                iface_id: nic.id.clone(),
                guest_mac: nic.mac_text(),
                host_dev_name: tap_name(nic)?.into(),
            };
            http.put(&format!("/network-interfaces/{}", nic.id), &interface).await?;
            own.nics.push(nic.id.clone());
        }
        if let Channel::HybridVsock { cid, uds } = &spec.channel {
            let vsock = api::Vsock { guest_cid: *cid, uds_path: text(uds)? };
            http.put("/vsock", &vsock).await?;
        }
        if spec.entropy {
            http.put("/entropy", &api::Entropy {}).await?;
        }
        if self.config.balloon {
            let balloon = api::Balloon {
                amount_mib: spec.memory_mib.most - spec.memory_mib.at_boot,
                deflate_on_oom: true,
                stats_polling_interval_s: 1,
                free_page_reporting: true,
            };
            http.put("/balloon", &balloon).await?;
        }
        http.put("/actions", &api::Action { action_type: "InstanceStart" }).await?;
        drop(held);
        Ok(own)
    }

    async fn cold_disk(
        &self,
        http: &Http,
        disks: &Disks,
        disk: &Disk,
        own: &mut Private,
    ) -> Result<Placed> {
        let placed = disks.place(disk)?;
        add_drive(http, &disk.id, false, disk.read_only, &placed.path).await?;
        own.fixed.insert(disk.id.clone(), slots::serial(&placed.path)?);
        Ok(placed)
    }
}

async fn add_drive(http: &Http, id: &str, root: bool, read_only: bool, path: &Path) -> Result<()> {
    let drive = api::Drive {
        // The API's names have no '-'.
        drive_id: drive_id(id),
        is_root_device: root,
        is_read_only: read_only,
        path_on_host: text(path)?,
        cache_type: if read_only { "Unsafe" } else { "Writeback" },
    };
    http.put(&format!("/drives/{}", drive.drive_id), &drive).await
}

/// Firecracker's name of a drive: letters, digits and `_`. Ours have `-` as well.
fn drive_id(id: &str) -> String {
    id.replace('_', "__").replace('-', "_m")
}

/// Name of a NIC's tap.
fn tap_name(nic: &Nic) -> Result<&str> {
    match &nic.tap_name {
        Some((name, _)) if nic.tap.is_empty() => Ok(name),
        Some(_) => Err(Error::Invalid(format!(
            "{}: firecracker opens the tap itself, so nobody else may have it open",
            nic.id
        ))),
        None => Err(Error::Invalid(format!(
            "{}: firecracker opens taps by name, and this one has none",
            nic.id
        ))),
    }
}

/// Firecracker's `--id`: at most 64 letters, digits and `-`.
fn instance_id(id: &str) -> String {
    let good = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    id.chars().take(64).map(good).collect()
}

#[async_trait]
impl Vmm for Firecracker {
    fn kind(&self) -> Kind {
        Kind::Firecracker
    }

    fn name(&self) -> String {
        Kind::Firecracker.to_string()
    }

    fn features(&self) -> Features {
        machine::features(
            self.config.balloon,
            self.config.disk_slots > 0 || self.config.read_only_disk_slots > 0,
        )
    }

    fn opens_taps(&self) -> bool {
        true
    }

    fn identity(&self) -> Result<String> {
        identity(&self.config.path, &*self.config)
    }

    fn copies(&self, hugepages: bool) -> Result<CopyNics> {
        if hugepages {
            // It maps the file of a snapshot, and that is not made of any.
            return Err(Error::Unsupported {
                vmm: self.name(),
                what: "restore guests in huge pages".into(),
                way_out: "set size.hugepages = false".into(),
            });
        }
        Ok(CopyNics::Declared)
    }

    async fn spawn(&self, spec: &VmSpec) -> Result<Arc<dyn Vm>> {
        let served = self.serve(spec, &[]).await?;
        let machine =
            self.make(spec, served, async |served| self.configure(spec, served).await).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ones_that_firecracker_takes_and_stay_different() {
        assert_eq!(instance_id("a_b.c"), "a-b-c");
        assert_eq!(instance_id(&"x".repeat(100)).len(), 64);
        assert_eq!(drive_id("vol-1"), "vol_m1");
        assert_ne!(drive_id("vol-1"), drive_id("vol_m1"));
    }
}
