//! What Cloud Hypervisor's API takes and answers, as far as it is used: version 1,
//! `vmm/src/api/openapi/cloud-hypervisor.yaml` of its sources.
//!
//! Image types are always named and backing files never followed (CVE-2026-45782).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Before each path.
pub const PREFIX: &str = "/api/v1";

/// `vm.create`.
#[derive(Debug, Serialize)]
pub struct VmConfig {
    pub cpus: Cpus,
    pub memory: Memory,
    pub payload: Payload,
    pub disks: Vec<Disk>,
    pub fs: Vec<Fs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<Rng>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    pub serial: Mode,
    pub console: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A device by which the guest's kernel tells of a panic.
    pub pvpanic: bool,
}

#[derive(Debug, Serialize)]
pub struct Cpus {
    pub boot_vcpus: u32,
    pub max_vcpus: u32,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
pub struct Memory {
    pub size: u64,
    /// For the processes that serve the guest's memory by vhost-user.
    pub shared: bool,
    pub hugepages: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_method: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
}

#[derive(Debug, Serialize)]
pub struct Payload {
    pub kernel: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<String>,
    pub cmdline: String,
}

/// Also the argument of `vm.add-disk`.
#[derive(Debug, Serialize)]
pub struct Disk {
    pub id: String,
    pub serial: String,
    pub path: String,
    pub readonly: bool,
    pub image_type: &'static str,
    pub backing_files: bool,
}

/// `vm.add-net`; the tap's descriptors travel with the request.
#[derive(Debug, Serialize)]
pub struct Net {
    pub id: String,
    pub mac: String,
    /// Two for each descriptor.
    pub num_queues: usize,
}

#[derive(Debug, Serialize)]
pub struct Fs {
    pub id: String,
    pub tag: String,
    pub socket: String,
    pub num_queues: u32,
    pub queue_size: u32,
}

#[derive(Debug, Serialize)]
pub struct Rng {
    pub src: &'static str,
}

#[derive(Debug, Serialize)]
pub struct Balloon {
    pub size: u64,
    pub deflate_on_oom: bool,
    pub free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
pub struct Mode {
    pub mode: &'static str,
}

#[derive(Debug, Serialize)]
pub struct Vsock {
    pub cid: u32,
    pub socket: String,
}

/// `vm.remove-device`.
#[derive(Debug, Serialize)]
pub struct RemoveDevice<'a> {
    pub id: &'a str,
}

/// `vm.resize`.
#[derive(Debug, Default, Serialize)]
pub struct Resize {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
}

/// `vm.snapshot`.
#[derive(Debug, Serialize)]
pub struct Snapshot {
    pub destination_url: String,
}

/// `vm.restore`.
#[derive(Debug, Serialize)]
pub struct Restore {
    pub source_url: String,
    pub net_fds: Vec<RestoredNet>,
}

#[derive(Debug, Serialize)]
pub struct RestoredNet {
    pub id: String,
    pub num_fds: usize,
}

/// `vmm.ping`.
#[derive(Debug, Deserialize)]
pub struct Ping {
    pub version: String,
}

/// `vm.info`.
#[derive(Debug, Deserialize)]
pub struct Info {
    pub config: InfoConfig,
    #[serde(default)]
    pub memory_actual_size: u64,
    #[serde(default)]
    pub device_tree: BTreeMap<String, Value>,
}

#[derive(Debug, Deserialize)]
pub struct InfoConfig {
    #[serde(default)]
    pub memory: Option<InfoMemory>,
    #[serde(default)]
    pub disks: Option<Vec<Named>>,
    #[serde(default)]
    pub net: Option<Vec<Named>>,
}

/// What a machine was asked to have, which its guest need not have taken or given yet.
#[derive(Debug, Deserialize)]
pub struct InfoMemory {
    pub size: u64,
    #[serde(default)]
    pub hotplugged_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub struct Named {
    #[serde(default)]
    pub id: Option<String>,
}

/// One of the objects that come out of `--event-monitor`.
#[derive(Debug, Deserialize)]
pub struct Event {
    pub source: String,
    pub event: String,
    #[serde(default)]
    pub properties: Option<BTreeMap<String, String>>,
}
