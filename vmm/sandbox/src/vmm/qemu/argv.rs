//! QEMU's command line.
//!
//! Everything that QEMU would choose by itself is chosen here or switched off. Files that a guest
//! can influence (disk images) and sockets reach it as descriptors only; no image format is ever
//! probed and no backing file followed.

use vmm_common::clock;

use super::super::error::{Error, Result};
use super::super::process::{Fds, text};
use super::super::spec::{
    Channel, Disk, DiskFormat, Nic, Root, SERIAL_PORT, ShareKind, VmSpec, root_params,
};
use super::config::{Accel, Hotplug, Machine, QemuConfig};

/// virtio-mmio transports of a microvm without ACPI (hw/i386/microvm.c).
const MICROVM_SLOTS: usize = 8;
/// Root ports of one PCI slot: its functions.
const FUNCTIONS: u8 = 8;
/// First PCI slot of the root ports; the devices from the boot are below it.
const FIRST_PORT_SLOT: u8 = 0x10;
/// Everything that QEMU's own seccomp filter can deny.
const SECCOMP: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Numbers, in QEMU, of the sockets that were made for it.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// Listening, for QMP.
    pub qmp: i32,
    /// Connected to a virtiofsd, in the order of the virtiofs shares.
    pub shares: Vec<i32>,
    /// Connected to `vhost-device-vsock`.
    pub vsock: Option<i32>,
    /// Listening, for the serial channel.
    pub serial: Option<i32>,
    /// The host's vhost-vsock device, which has the guest's context id already.
    pub vhost: Option<i32>,
}

/// Options of a `-device`, or the arguments of QMP's `device_add`: driver first.
#[derive(Debug)]
pub(super) struct Device {
    pub driver: String,
    pub options: Vec<(&'static str, String)>,
}

impl Device {
    fn new(machine: Machine, name: &str, options: Vec<(&'static str, String)>) -> Self {
        let bus = if machine.pci() { "pci" } else { "device" };
        Self { driver: format!("{name}-{bus}"), options }
    }

    fn argument(&self) -> String {
        let mut text = self.driver.clone();
        for (key, value) in &self.options {
            text.push_str(&format!(",{key}={}", value.replace(',', ",,")));
        }
        text
    }
}

/// A disk's device; its block node has the name `node`.
pub(super) fn disk_device(machine: Machine, disk: &Disk, id: &str, node: &str) -> Device {
    let options = vec![
        ("id", id.to_owned()),
        ("drive", node.to_owned()),
        ("serial", disk.id.clone()),
        ("write-cache", "on".into()),
    ];
    Device::new(machine, "virtio-blk", options)
}

/// A NIC's device; its backend has the name `netdev`.
pub(super) fn nic_device(machine: Machine, nic: &Nic, id: &str, netdev: &str) -> Device {
    let mut options = vec![
        ("id", id.to_owned()),
        ("netdev", netdev.to_owned()),
        ("mac", nic.mac_text()),
        ("host_mtu", nic.mtu.to_string()),
    ];
    if machine.pci() {
        // No option ROM: nothing boots from the network, and the guest's start is quicker.
        options.push(("romfile", String::new()));
    }
    if nic.tap.len() > 1 {
        options.push(("mq", "on".into()));
        if machine.pci() {
            // One for each queue of each direction, one for the configuration, one for control.
            options.push(("vectors", (2 * nic.tap.len() + 2).to_string()));
        }
    }
    Device::new(machine, "virtio-net", options)
}

/// A share's device.
pub(super) fn share_device(machine: Machine, tag: &str, id: &str, chardev: &str) -> Device {
    let options =
        vec![("id", id.to_owned()), ("chardev", chardev.to_owned()), ("tag", tag.to_owned())];
    Device::new(machine, "vhost-user-fs", options)
}

/// The vsock device beside `vhost-device-vsock`.
pub(super) fn vsock_device(machine: Machine, id: &str, chardev: &str) -> Device {
    let options = vec![("id", id.to_owned()), ("chardev", chardev.to_owned())];
    Device::new(machine, "vhost-user-vsock", options)
}

/// The two block nodes of a disk whose descriptor is in set `fdset`: the file, and the format on
/// it, which has the name `node`.
pub(super) fn block_nodes(disk: &Disk, node: &str, fdset: i64) -> [serde_json::Value; 2] {
    let driver = if disk.block_device { "host_device" } else { "file" };
    let file = serde_json::json!({
        "driver": driver,
        "node-name": format!("{node}-file"),
        "filename": format!("/dev/fdset/{fdset}"),
        "read-only": disk.read_only,
        "auto-read-only": false,
        "discard": "unmap",
    });
    let mut format = serde_json::json!({
        "driver": disk.format.as_str(),
        "node-name": node,
        "file": format!("{node}-file"),
        "read-only": disk.read_only,
        "auto-read-only": false,
        "discard": "unmap",
    });
    if disk.format == DiskFormat::Qcow2
        && let Some(fields) = format.as_object_mut()
    {
        fields.insert("backing".into(), serde_json::Value::Null);
    }
    [file, format]
}

struct Line<'a> {
    argv: Vec<String>,
    fds: &'a mut Fds,
    machine: Machine,
    devices: usize,
    fdset: i64,
}

impl Line<'_> {
    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.argv.push(format!("-{name}"));
        self.argv.push(value.into());
    }

    fn flag(&mut self, name: &str) {
        self.argv.push(format!("-{name}"));
    }

    fn device(&mut self, device: &Device) {
        self.devices += 1;
        self.option("device", device.argument());
    }

    fn virtio(&mut self, name: &str, options: Vec<(&'static str, String)>) {
        self.device(&Device::new(self.machine, name, options));
    }

    fn disk(&mut self, disk: &Disk, id: &str) {
        let fd = self.fds.push_file(disk.file.clone());
        self.fdset += 1;
        let fdset = self.fdset;
        self.option("add-fd", format!("fd={fd},set={fdset}"));
        let node = format!("blk-{id}");
        for json in block_nodes(disk, &node, fdset) {
            self.option("blockdev", json.to_string());
        }
        self.device(&disk_device(self.machine, disk, id, &node));
    }

    fn nic(&mut self, nic: &Nic) -> Result<()> {
        if nic.tap.is_empty() {
            return Err(Error::Invalid(format!("{}: no descriptor of its tap device", nic.id)));
        }
        let numbers: Vec<String> =
            nic.tap.iter().map(|tap| self.fds.push(tap.clone()).to_string()).collect();
        let key = if numbers.len() > 1 { "fds" } else { "fd" };
        let netdev = format!("net-{}", nic.id);
        self.option("netdev", format!("tap,id={netdev},{key}={}", numbers.join(":")));
        self.device(&nic_device(self.machine, nic, &nic.id, &netdev));
        Ok(())
    }

    fn chardev(&mut self, id: &str, fd: i32, listens: bool) {
        let server = if listens { ",server=on,wait=off" } else { "" };
        self.option("chardev", format!("socket,id={id},fd={fd}{server}"));
    }
}

/// The command line for `spec`. Descriptors go into `fds`. `incoming`: wait for a snapshot.
pub(super) fn build(
    config: &QemuConfig,
    spec: &VmSpec,
    fds: &mut Fds,
    sockets: &Sockets,
    incoming: bool,
) -> Result<Vec<String>> {
    let machine = config.machine;
    let argv = vec![text(&config.path)?];
    let mut line = Line { argv, fds, machine, devices: 0, fdset: 0 };
    line.option("name", spec.id.clone());
    line.flag("no-user-config");
    line.flag("nodefaults");
    for dir in &config.data_dirs {
        line.option("L", text(dir)?);
    }
    line.option("display", "none");
    line.flag("no-reboot");
    line.option("sandbox", SECCOMP);
    computer(config, spec, &mut line);

    line.option("chardev", "stdio,id=console,signal=off");
    line.option("serial", "chardev:console");
    line.chardev("qmp", sockets.qmp, true);
    line.option("qmp", "chardev:qmp");

    boot(config, spec, &mut line)?;
    for disk in &spec.disks {
        line.disk(disk, &disk.id);
    }
    for nic in &spec.nics {
        line.nic(nic)?;
    }
    shares(spec, sockets, &mut line)?;
    channel(spec, sockets, &mut line)?;
    if spec.entropy {
        line.option("object", "rng-random,id=entropy,filename=/dev/urandom");
        line.virtio("virtio-rng", vec![("rng", "entropy".into())]);
    }
    if config.balloon {
        let options = vec![
            ("id", "balloon".into()),
            ("free-page-reporting", "on".into()),
            // The guest takes memory back from it rather than killing a process.
            ("deflate-on-oom", "on".into()),
        ];
        line.virtio("virtio-balloon", options);
    }
    if machine.pci() {
        ports(config, &mut line);
    } else if line.devices > MICROVM_SLOTS {
        return Err(Error::Exhausted(format!(
            "{} devices, and a qemu microvm has {MICROVM_SLOTS} places: use machine q35, or leave \
             out the balloon or the entropy source",
            line.devices
        )));
    }
    if incoming {
        line.option("incoming", "defer");
    }
    Ok(line.argv)
}

fn computer(config: &QemuConfig, spec: &VmSpec, line: &mut Line<'_>) {
    line.option(
        "machine",
        match config.machine {
            Machine::Microvm => "microvm,acpi=off,memory-backend=ram",
            Machine::Q35 => {
                "q35,memory-backend=ram,smm=off,vmport=off,usb=off,i8042=off,hpet=off,graphics=off"
            }
            Machine::Virt => "virt,memory-backend=ram,gic-version=max,usb=off",
        },
    );
    match config.machine {
        // Memory is shared, so virtio 1 only: legacy devices have the guest's byte order.
        Machine::Microvm => line.option("global", "virtio-mmio.force-legacy=false"),
        Machine::Q35 if config.hotplug == Hotplug::Native => {
            line.option("global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
        }
        Machine::Q35 | Machine::Virt => {}
    }
    let mut accel = config.accel.as_str().to_owned();
    if config.accel == Accel::Tcg && config.tcg_cache_mib > 0 {
        accel.push_str(&format!(",tb-size={}", config.tcg_cache_mib));
    }
    line.option("accel", accel);
    line.option("cpu", config.cpu());
    let (cpus, most) = (spec.cpus.at_boot, spec.cpus.most);
    line.option(
        "smp",
        if config.machine == Machine::Q35 && most > cpus {
            // One in each socket: some kernels take no CPU that comes later into a package that is
            // there (topology_register_apic).
            format!("cpus={cpus},maxcpus={most},sockets={most},cores=1,threads=1")
        } else {
            format!("cpus={cpus}")
        },
    );
    // What is more than at boot is held by the balloon.
    let size = spec.memory_mib.most;
    line.option("m", format!("size={size}M"));
    let huge = if spec.hugepages { ",hugetlb=on,hugetlbsize=2M" } else { "" };
    line.option("object", format!("memory-backend-memfd,id=ram,size={size}M,share=on{huge}"));
}

fn boot(config: &QemuConfig, spec: &VmSpec, line: &mut Line<'_>) -> Result<()> {
    line.option("kernel", text(&spec.boot.kernel)?);
    let mut params: Vec<String> = Vec::new();
    let console = if config.machine == Machine::Virt { "ttyAMA0" } else { "ttyS0" };
    params.push(format!("console={console}"));
    // The guest's reset is QEMU's end (-no-reboot), and how a guest without ACPI powers off.
    params.extend(["panic=-1".into()]);
    if config.machine != Machine::Virt {
        params.push("reboot=t".into());
        if config.accel == Accel::Tcg && spec.cpus.most == 1 {
            // Calibrating it takes a tenth of a second under TCG.
            params.push("nolapic_timer".into());
        }
    }
    if config.accel == Accel::Tcg {
        // virtiofsd writes guest memory behind TCG's back: code that TCG has translated from a page
        // stays in its cache when that page comes to hold a program read by virtiofs, and the
        // program then runs what was there before. A guest that writes every page it allocates
        // drops those translations itself.
        params.push("init_on_alloc=1".into());
        params.extend(clock::parameters(config.clock_khz));
    }
    match &spec.boot.root {
        Root::Initrd(path) => line.option("initrd", text(path)?),
        Root::Image { disk, fstype } => {
            if !disk.read_only {
                return Err(Error::Invalid(
                    "the image that a guest boots from is read-only".into(),
                ));
            }
            line.disk(disk, "root");
            params.extend(root_params(fstype));
        }
    }
    params.extend(spec.boot.params.iter().cloned());
    line.option("append", params.join(" "));
    Ok(())
}

fn shares(spec: &VmSpec, sockets: &Sockets, line: &mut Line<'_>) -> Result<()> {
    let mut served = sockets.shares.iter();
    for share in &spec.shares {
        match share.kind {
            ShareKind::Virtiofs => {
                let fd = served.next().ok_or(Error::Gone)?;
                let chardev = format!("fs-{}", share.tag);
                line.chardev(&chardev, *fd, false);
                let device =
                    share_device(line.machine, &share.tag, &format!("{chardev}-dev"), &chardev);
                line.device(&device);
            }
            ShareKind::Ninep => {
                let id = format!("ninep-{}", share.tag);
                let path = text(&share.dir)?.replace(',', ",,");
                let readonly = if share.read_only { ",readonly=on" } else { "" };
                line.option(
                    "fsdev",
                    format!(
                        "local,id={id},path={path},security_model=passthrough,multidevs=remap{readonly}"
                    ),
                );
                let options = vec![("fsdev", id), ("mount_tag", share.tag.clone())];
                line.virtio("virtio-9p", options);
            }
        }
    }
    Ok(())
}

fn channel(spec: &VmSpec, sockets: &Sockets, line: &mut Line<'_>) -> Result<()> {
    match &spec.channel {
        Channel::None => {}
        Channel::HybridVsock { .. } => {
            line.chardev("vsock", sockets.vsock.ok_or(Error::Gone)?, false);
            let device = vsock_device(line.machine, "vsock-dev", "vsock");
            line.device(&device);
        }
        Channel::KernelVsock { cid } => {
            let device = sockets.vhost.ok_or(Error::Gone)?;
            let options = vec![("guest-cid", cid.to_string()), ("vhostfd", device.to_string())];
            line.virtio("vhost-vsock", options);
        }
        Channel::Serial { console, .. } => {
            line.chardev("agent", sockets.serial.ok_or(Error::Gone)?, true);
            line.virtio("virtio-serial", vec![("max_ports", "2".into())]);
            // Number 0 is kept for a console, and is what a machine with one port alone has.
            let port = if *console { "virtconsole,nr=0" } else { "virtserialport" };
            line.option("device", format!("{port},chardev=agent,name={SERIAL_PORT}"));
        }
    }
    Ok(())
}

/// Name of a root port.
pub(super) fn port_name(port: u8) -> String {
    format!("rp{port}")
}

fn ports(config: &QemuConfig, line: &mut Line<'_>) {
    for port in 0..config.root_ports {
        let (slot, function) = (FIRST_PORT_SLOT + port / FUNCTIONS, port % FUNCTIONS);
        let multi = if function == 0 { ",multifunction=on" } else { "" };
        line.option(
            "device",
            format!(
                "pcie-root-port,id={},bus=pcie.0,chassis={n},slot={n},port={port},\
                 addr={slot:#x}.{function}{multi}",
                port_name(port),
                n = port + 1,
            ),
        );
    }
}

#[cfg(test)]
mod tests;
