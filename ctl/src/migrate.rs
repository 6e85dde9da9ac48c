//! `config migrate`: from a configuration of upstream Kuasar's vmm-sandboxer to one of ours.
//!
//! Each key of upstream either has a place here, or a comment that says why it has none. Nothing is
//! dropped in silence.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use toml::{Table, Value};

/// Tables of ours in the order in which they are written; the first is the top level.
const ORDER: [&str; 7] = ["", "guest", "size", "helpers", "qemu", "cloud_hypervisor", "stratovirt"];

/// Why a key of upstream has no place here.
fn meaningless(path: &str, key: &str) -> Option<&'static str> {
    Some(match key {
        "enable_tracing" => "traces are not exported by this version",
        "debug" if path == "hypervisor.task" => {
            "there is no debug shell in the guest: use kuasar-ctl exec, or kuasar-ctl console"
        }
        "debug" | "log_level" | "syslog" => "the daemon's log_level counts for all its programs",
        "image_path" | "initrd_path" => {
            "the image holds upstream's agent, which speaks another protocol: use the image of this \
             version (make guest), or set guest.image or guest.initrd to one that you have made of it"
        }
        "firmware" | "firmware_path" => "guests boot their kernel directly, without firmware",
        "enable_mem_prealloc" | "mem_prealloc" => {
            "memory is given when it is used; size.hugepages sets it aside"
        }
        "entropy_source" => "guests get entropy from the host's getrandom",
        "machine_accelerators" | "cpu_features" => "set qemu.accel and qemu.cpu",
        "default_bridges" => "set qemu.root_ports, which devices are plugged into",
        "mem_slots" | "mem_offset" | "memory_path" | "file_backend_mem_path" => {
            "memory is resized by a balloon"
        }
        "enable_vhost_user_store" | "enable_swap" | "enable_iothreads" => "there is no such switch",
        "msize_9p" | "virtio_9p_direct_io" | "virtio_9p_multidevs" => {
            "files are shared by virtiofs only"
        }
        "block_device_driver" | "disable_nvdimm" => {
            "disks are virtio-blk, or what the machine takes"
        }
        "use_vsock" => "the way to the guest is chosen by what the host has",
        "socket_path" => "sockets are in the state directory",
        _ => return None,
    })
}

struct Migration {
    vmm: String,
    ours: BTreeMap<&'static str, Vec<(String, Value)>>,
    notes: Vec<String>,
}

/// Which VMM upstream was built for: one program each.
fn vmm_of(hypervisor: &Table) -> Option<&'static str> {
    let text = |key: &str| hypervisor.get(key).and_then(Value::as_str).unwrap_or_default();
    let has = |keys: &[&str]| keys.iter().any(|key| hypervisor.contains_key(*key));
    let path = text("path");
    if has(&["qemu_path", "share_fs", "msize_9p", "cpu_model", "default_bridges"]) {
        Some("qemu")
    } else if path.contains("stratovirt")
        || has(&["virtiofsd_conf"])
        || text("machine_type").contains("mem-share")
    {
        Some("stratovirt")
    } else if path.contains("cloud-hypervisor") || has(&["virtiofsd", "task"]) {
        Some("cloud-hypervisor")
    } else {
        None
    }
}

impl Migration {
    fn set(&mut self, table: &'static str, key: &str, value: Value) {
        self.ours.entry(table).or_default().push((key.to_owned(), value));
    }

    fn note(&mut self, path: &str, key: &str, value: &Value, why: &str) {
        self.notes.push(format!("{path}.{key} = {value}: {why}"));
    }

    fn driver(&self) -> &'static str {
        match self.vmm.as_str() {
            "qemu" => "qemu",
            "stratovirt" => "stratovirt",
            _ => "cloud_hypervisor",
        }
    }

    fn key(&mut self, path: &str, key: &str, value: &Value) {
        let text = value.as_str().unwrap_or_default();
        let number = value.as_integer().unwrap_or(0);
        let driver = self.driver();
        match (path, key) {
            ("sandbox", "log_level") => self.set("", "log_level", value.clone()),
            ("hypervisor", "vcpus") if number > 0 => self.set("size", "cpus", value.clone()),
            ("hypervisor", "default_max_vcpus") if number > 0 => {
                self.set("size", "max_cpus", number.min(255).into());
            }
            ("hypervisor", "default_max_vcpus") => {
                self.note(path, key, value, "size.max_cpus is at its default");
            }
            ("hypervisor", "memory_in_mb") if number > 0 => {
                self.set("size", "memory_mib", value.clone());
            }
            ("hypervisor", "hugepages") => self.set("size", "hugepages", value.clone()),
            ("hypervisor", "kernel_path") => {
                let why = "upstream's kernel may lack what this agent needs (cgroup v2, overlayfs, \
                           erofs, virtiofs): this version's own is taken; set guest.kernel to keep it";
                self.note(path, key, value, why);
            }
            ("hypervisor", "kernel_params") => self.params(text, value),
            ("hypervisor", "path" | "qemu_path") => self.set(driver, "path", value.clone()),
            ("hypervisor", "cpu_model") => self.set("qemu", "cpu", value.clone()),
            ("hypervisor", "machine_type") => self.machine(text, value),
            ("hypervisor", "share_fs") if text == "VirtioFS" => {}
            ("hypervisor", "share_fs") => {
                self.note(path, key, value, "files are shared by virtiofs only");
            }
            ("hypervisor.virtiofsd" | "hypervisor.virtiofsd_conf", "path") => {
                if text.contains("vhost_user_fs") {
                    let why = "StratoVirt's own file server is not used: helpers.virtiofsd is";
                    self.note(path, key, value, why);
                } else {
                    self.set("helpers", "virtiofsd", value.clone());
                }
            }
            ("hypervisor.virtiofsd", "cache") => self.set("helpers", "cache", value.clone()),
            ("hypervisor.virtiofsd", "thread_pool_size") if number > 0 => {
                self.set("helpers", "threads", value.clone());
            }
            _ => {
                let why = meaningless(path, key).unwrap_or("this key is not known here");
                self.note(path, key, value, why);
            }
        }
    }

    /// Parameters for the kernel; those for upstream's agent go.
    fn params(&mut self, text: &str, value: &Value) {
        let (agent, kernel): (Vec<&str>, Vec<&str>) =
            text.split_whitespace().partition(|word| word.starts_with("task."));
        if !agent.is_empty() {
            let why = format!("{} is for upstream's agent", agent.join(" "));
            self.note("hypervisor", "kernel_params", value, &why);
        }
        if !kernel.is_empty() {
            let words = kernel.into_iter().map(|word| Value::String(word.into())).collect();
            self.set("guest", "params", Value::Array(words));
        }
    }

    fn machine(&mut self, text: &str, value: &Value) {
        let kind = text.split(',').next().unwrap_or_default();
        match (self.vmm.as_str(), kind) {
            ("qemu", "virt" | "q35" | "microvm") => self.set("qemu", "machine", kind.into()),
            ("qemu", "pc") => {
                self.note("hypervisor", "machine_type", value, "q35 takes the place of pc");
                self.set("qemu", "machine", "q35".into());
            }
            _ => self.note("hypervisor", "machine_type", value, "the machine type is fixed"),
        }
    }

    fn table(&mut self, path: &str, table: &Table) {
        for (key, value) in table {
            match value {
                Value::Table(inner) => {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    self.table(&path, inner);
                }
                value => self.key(path, key, value),
            }
        }
    }

    fn text(&self) -> String {
        let mut out = String::from(
            "# Configuration of vmm-sandboxer, written by `kuasar-ctl config migrate` from one of upstream\n\
             # Kuasar. What is not here is at its default.\n\
             #\n\
             # Upstream's socket was /run/vmm-sandboxer.sock, unless its command line said otherwise:\n\
             # containerd is to be told ours (kuasar-ctl check --fix), or set `listen` to the old one.\n",
        );
        if !self.notes.is_empty() {
            out.push_str("#\n# What means nothing here:\n");
            for note in &self.notes {
                // A value may be of several lines.
                let note = note.split_whitespace().collect::<Vec<_>>().join(" ");
                let _ = writeln!(out, "#   {note}");
            }
        }
        for table in ORDER {
            let Some(keys) = self.ours.get(table) else { continue };
            out.push('\n');
            if !table.is_empty() {
                let _ = writeln!(out, "[{table}]");
            }
            for (key, value) in keys {
                let _ = writeln!(out, "{key} = {value}");
            }
        }
        out
    }
}

/// Our text for upstream's.
///
/// # Errors
/// A text that says what to do.
pub fn migrate(upstream: &str, vmm: Option<&str>) -> Result<String, String> {
    let upstream: Table = upstream.parse().map_err(|e: toml::de::Error| e.to_string())?;
    let hypervisor = upstream.get("hypervisor").and_then(Value::as_table);
    let hypervisor =
        hypervisor.ok_or("this is no configuration of upstream Kuasar: it has no [hypervisor]")?;
    let vmm = vmm.or_else(|| vmm_of(hypervisor)).ok_or(
        "nothing in it says which VMM it is for: add --vmm qemu, cloud-hypervisor or stratovirt",
    )?;
    let mut migration = Migration { vmm: vmm.to_owned(), ours: BTreeMap::new(), notes: Vec::new() };
    migration.set("", "vmm", vmm.into());
    migration.table("", &upstream);
    Ok(migration.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys that upstream documents, with its defaults.
    pub const CLOUD_HYPERVISOR: &str = "[sandbox]\nlog_level = 'info'\nenable_tracing = false\n\
        [hypervisor]\npath = '/usr/local/bin/cloud-hypervisor'\nvcpus = 1\nmemory_in_mb = 1024\n\
        kernel_path = '/var/lib/kuasar/vmlinux.bin'\nimage_path = '/var/lib/kuasar/kuasar.img'\n\
        initrd_path = ''\nkernel_params = 'console=hvc0 task.log_level=debug'\nhugepages = true\n\
        entropy_source = '/dev/urandom'\n[hypervisor.task]\ndebug = false\nenable_tracing = false\n\
        [hypervisor.virtiofsd]\npath = '/usr/local/bin/virtiofsd'\nlog_level = 'info'\ncache = 'never'\n\
        thread_pool_size = 4\nsyslog = true\n";

    fn read(text: &str) -> Table {
        text.parse().unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    #[test]
    fn every_key_of_cloud_hypervisor_has_its_place_or_its_reason() {
        let text = migrate(CLOUD_HYPERVISOR, None).unwrap();
        let ours = read(&text);
        assert_eq!(ours["vmm"].as_str(), Some("cloud-hypervisor"));
        assert_eq!(ours["size"]["memory_mib"].as_integer(), Some(1024));
        assert_eq!(ours["size"]["hugepages"].as_bool(), Some(true));
        assert_eq!(ours["guest"]["params"][0].as_str(), Some("console=hvc0"));
        assert_eq!(ours["helpers"]["threads"].as_integer(), Some(4));
        assert_eq!(
            ours["cloud_hypervisor"]["path"].as_str(),
            Some("/usr/local/bin/cloud-hypervisor")
        );
        for key in [
            "sandbox.enable_tracing",
            "hypervisor.kernel_path",
            "hypervisor.image_path",
            "hypervisor.initrd_path",
            "hypervisor.entropy_source",
            "hypervisor.task.debug",
            "hypervisor.virtiofsd.syslog",
        ] {
            assert!(text.contains(&format!("#   {key} = ")), "{key}: {text}");
        }
        assert!(!text.contains("not known here"), "{text}");
    }

    #[test]
    fn qemu_and_stratovirt_are_told_by_their_keys() {
        let qemu = "[hypervisor]\nqemu_path = '/usr/bin/qemu'\nmachine_type = 'pc'\ncpu_model = 'host'\n\
            machine_accelerators = ''\ndefault_bridges = 1\ndefault_max_vcpus = 8\nmem_slots = 1\n\
            mem_offset = 0\nmemory_path = ''\nfile_backend_mem_path = ''\nmem_prealloc = false\n\
            enable_vhost_user_store = false\nenable_swap = false\nmsize_9p = 8192\n\
            virtio_9p_direct_io = false\nvirtio_9p_multidevs = ''\nenable_iothreads = false\n\
            block_device_driver = 'VirtioBlk'\ndisable_nvdimm = true\nshare_fs = 'Virtio9P'\n\
            use_vsock = true\nfirmware_path = ''\ncpu_features = ''\n";
        let text = migrate(qemu, None).unwrap();
        let ours = read(&text);
        assert_eq!(ours["vmm"].as_str(), Some("qemu"));
        assert_eq!(ours["qemu"]["machine"].as_str(), Some("q35"));
        assert_eq!(ours["size"]["max_cpus"].as_integer(), Some(8));
        assert!(!text.contains("not known here"), "{text}");
        let strato = "[hypervisor]\npath = '/usr/bin/stratovirt'\nmachine_type = 'virt,mem-share=on'\n\
            debug = true\nenable_mem_prealloc = false\n[hypervisor.virtiofsd_conf]\n\
            path = '/usr/bin/vhost_user_fs'\n";
        let text = migrate(strato, None).unwrap();
        assert_eq!(read(&text)["stratovirt"]["path"].as_str(), Some("/usr/bin/stratovirt"));
        assert!(text.contains("StratoVirt's own file server"), "{text}");
        assert!(!text.contains("not known here"), "{text}");
    }

    #[test]
    fn what_nobody_knows_is_said() {
        let text =
            migrate("[hypervisor]\nwonder = \"a\\nb\"\n[new]\nx = 1\n", Some("qemu")).unwrap();
        read(&text);
        assert!(text.contains("hypervisor.wonder = ") && text.contains("new.x = 1"), "{text}");
        assert!(migrate("[hypervisor]\nvcpus = 1", None).unwrap_err().contains("--vmm"));
        assert!(migrate("[limits]\n", None).unwrap_err().contains("no [hypervisor]"));
        assert!(migrate("x = [", None).is_err());
    }
}
