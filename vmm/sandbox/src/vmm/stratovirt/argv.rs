//! StratoVirt's command line: QEMU's words, some with another meaning.

use std::path::Path;

use super::super::error::{Error, Result};
use super::super::process::text;
use super::super::spec::{Channel, Disk, Nic, Root, SERIAL_PORT, VmSpec, root_params};
use super::StratoVirtConfig;

/// Where things are that were made for it.
#[derive(Debug)]
pub(super) struct Places<'a> {
    /// The guest's kernel, not as an ELF file.
    pub kernel: &'a Path,
    pub monitor: &'a Path,
    /// Of the serial channel, where StratoVirt makes it.
    pub serial: &'a Path,
    /// Sockets of the shares, in their order.
    pub shares: &'a [std::path::PathBuf],
    /// The disks, in their order.
    pub disks: &'a [std::path::PathBuf],
    /// Numbers of the taps' descriptors, in the order of the NICs.
    pub taps: &'a [i32],
    /// Number of the host's vhost-vsock device, which has the guest's context id already.
    pub vhost: Option<i32>,
    /// Directory of a snapshot to start from.
    pub incoming: Option<&'a Path>,
}

/// Commas end a value, and there is no way to write one.
fn value(path: &Path) -> Result<String> {
    let text = text(path)?;
    if text.contains(',') {
        return Err(Error::Invalid(format!("{text}: stratovirt takes no path with a comma")));
    }
    Ok(text)
}

fn disk(argv: &mut Vec<String>, disk: &Disk, path: &Path) -> Result<()> {
    let (id, on) = (&disk.id, if disk.read_only { "on" } else { "off" });
    argv.extend([
        "-drive".into(),
        format!("file={},id={id},readonly={on},direct=off,format=raw", value(path)?),
        "-device".into(),
        format!("virtio-blk-device,drive={id},id={id},serial={id}"),
    ]);
    Ok(())
}

fn nic(argv: &mut Vec<String>, nic: &Nic, tap: i32) {
    let id = &nic.id;
    argv.extend([
        "-netdev".into(),
        format!("tap,id=net-{id},fd={tap}"),
        "-device".into(),
        format!("virtio-net-device,id={id},netdev=net-{id},mac={}", nic.mac_text()),
    ]);
}

pub(super) fn build(
    config: &StratoVirtConfig,
    spec: &VmSpec,
    places: &Places<'_>,
) -> Result<Vec<String>> {
    let mut argv = vec![text(&config.path)?];
    let share = if spec.shares.is_empty() { "off" } else { "on" };
    let mut option = |name: &str, value: String| argv.extend([format!("-{name}"), value]);
    option("name", spec.id.clone());
    option("machine", format!("microvm,dump-guest-core=off,mem-share={share}"));
    option("smp", spec.cpus.at_boot.to_string());
    // What is more than at boot is held by the balloon.
    option("m", format!("{}M", spec.memory_mib.most));
    option("qmp", format!("unix:{},server,nowait", value(places.monitor)?));
    // Its `stdio` wants a terminal, and its `chardev:` looks among devices that it reads later.
    option("serial", "file,path=/proc/self/fd/1".into());
    option("kernel", text(places.kernel)?);
    // A triple fault ends it, whatever else a guest without ACPI tries does not.
    let mut params =
        vec!["console=ttyS0".to_owned(), "reboot=t".into(), "panic=-1".into(), "pci=off".into()];
    if let Some(dir) = places.incoming {
        option("incoming", format!("file:{}", value(dir)?));
    }
    match &spec.boot.root {
        Root::Initrd(path) => option("initrd", text(path)?),
        Root::Image { disk: root, fstype } => {
            if !root.read_only {
                return Err(Error::Invalid(
                    "the image that a guest boots from is read-only".into(),
                ));
            }
            disk(&mut argv, root, &root.path)?;
            params.extend(root_params(fstype));
        }
    }
    params.extend(spec.boot.params.iter().cloned());
    argv.extend(["-append".into(), params.join(" ")]);
    for (one, path) in spec.disks.iter().zip(places.disks) {
        disk(&mut argv, one, path)?;
    }
    for (one, tap) in spec.nics.iter().zip(places.taps) {
        nic(&mut argv, one, *tap);
    }
    let mut option = |name: &str, value: String| argv.extend([format!("-{name}"), value]);
    for (share, socket) in spec.shares.iter().zip(places.shares) {
        let id = format!("fs-{}", share.tag);
        option("chardev", format!("socket,id={id},path={}", value(socket)?));
        option(
            "device",
            format!("vhost-user-fs-device,id={id}-dev,chardev={id},tag={}", share.tag),
        );
    }
    match &spec.channel {
        Channel::Serial { .. } => {
            option("device", "virtio-serial-device,id=channel".into());
            let socket = value(places.serial)?;
            option("chardev", format!("socket,id=agent,path={socket},server,nowait"));
            // A microvm has one port, number 0, which has to be a console: it has our name, but the
            // guest can open it as /dev/hvc0 alone (/dev/vport*p0 is ENXIO).
            option("device", format!("virtconsole,id={SERIAL_PORT},chardev=agent,nr=0"));
        }
        Channel::KernelVsock { cid } => {
            let device = places.vhost.ok_or(Error::Gone)?;
            let ids = format!("id=vsock,guest-cid={cid},vhostfd={device}");
            option("device", format!("vhost-vsock-device,{ids}"));
        }
        Channel::None | Channel::HybridVsock { .. } => {}
    }
    if spec.entropy {
        option("object", "rng-random,id=entropy,filename=/dev/urandom".into());
        option("device", "virtio-rng-device,id=rng,rng=entropy".into());
    }
    if config.balloon {
        option(
            "device",
            "virtio-balloon-device,id=balloon,deflate-on-oom=true,free-page-reporting=true".into(),
        );
    }
    if !config.seccomp {
        argv.push("-disable-seccomp".into());
    }
    Ok(argv)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::spec::tests::spec;

    fn line(config: &StratoVirtConfig, spec: &VmSpec) -> Result<String> {
        let places = Places {
            kernel: Path::new("/kernel"),
            monitor: Path::new("/w/qmp"),
            serial: Path::new("/w/serial"),
            shares: &["/w/fs".into()],
            disks: &[],
            taps: &[],
            vhost: Some(9),
            incoming: None,
        };
        Ok(build(config, spec, &places)?.join(" "))
    }

    #[test]
    fn the_filter_is_on_unless_it_was_switched_off_and_memory_is_shared_only_for_shares() {
        let config = StratoVirtConfig::default();
        let mut spec = spec();
        spec.channel = Channel::KernelVsock { cid: 5 };
        let all = line(&config, &spec).unwrap();
        assert!(all.contains("vhost-vsock-device,id=vsock,guest-cid=5,vhostfd=9"), "{all}");
        spec.channel = Channel::Serial { socket: "/s".into(), console: true, uds: None };
        let all = line(&config, &spec).unwrap();
        assert!(!all.contains("disable-seccomp"));
        assert!(all.contains("mem-share=off"));
        assert!(all.contains("virtconsole,id=org.kuasar.agent.0,chardev=agent,nr=0"));
        spec.shares.push(crate::vmm::Share {
            tag: "kuasar".into(),
            dir: "/d".into(),
            kind: crate::vmm::ShareKind::Virtiofs,
            read_only: false,
            cache: crate::vmm::Cache::default(),
        });
        let config = StratoVirtConfig { seccomp: false, ..config };
        let all = line(&config, &spec).unwrap();
        assert!(all.contains("mem-share=on") && all.ends_with("-disable-seccomp"), "{all}");
    }

    #[test]
    fn a_comma_cannot_add_an_option() {
        assert!(value(Path::new("/a,readonly=off")).is_err());
    }
}
