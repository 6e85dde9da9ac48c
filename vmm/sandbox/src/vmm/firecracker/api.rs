//! What Firecracker's API takes and answers, as far as it is used:
//! `src/firecracker/swagger/firecracker.yaml` of its sources.

use serde::{Deserialize, Serialize};

/// `PUT /machine-config`.
#[derive(Debug, Serialize)]
pub struct MachineConfig {
    pub vcpu_count: u32,
    pub mem_size_mib: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<&'static str>,
}

/// `PUT /boot-source`.
#[derive(Debug, Serialize)]
pub struct BootSource {
    pub kernel_image_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    pub boot_args: String,
}

/// `PUT /drives/{id}`.
#[derive(Debug, Serialize)]
pub struct Drive {
    pub drive_id: String,
    pub is_root_device: bool,
    pub is_read_only: bool,
    pub path_on_host: String,
    /// `Writeback` offers the guest a flush; the default would lose what it has synced.
    pub cache_type: &'static str,
}

/// `PATCH /drives/{id}`.
#[derive(Debug, Serialize)]
pub struct DriveUpdate<'a> {
    pub drive_id: &'a str,
    pub path_on_host: String,
}

/// `PUT /network-interfaces/{id}`.
#[derive(Debug, Serialize)]
pub struct NetworkInterface {
    pub iface_id: String,
    pub guest_mac: String,
    pub host_dev_name: String,
}

/// `PUT /vsock`.
#[derive(Debug, Serialize)]
pub struct Vsock {
    pub guest_cid: u32,
    pub uds_path: String,
}

/// `PUT /balloon`.
#[derive(Debug, Serialize)]
pub struct Balloon {
    pub amount_mib: u32,
    pub deflate_on_oom: bool,
    pub stats_polling_interval_s: u32,
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Debug, Serialize)]
pub struct BalloonUpdate {
    pub amount_mib: u32,
}

/// `GET /balloon/statistics`, as far as it is looked at.
#[derive(Debug, Deserialize)]
pub struct BalloonStatistics {
    pub actual_mib: u32,
}

/// `PUT /entropy`.
#[derive(Debug, Serialize)]
pub struct Entropy {}

/// `PUT /actions`.
#[derive(Debug, Serialize)]
pub struct Action {
    pub action_type: &'static str,
}

/// `PATCH /vm`.
#[derive(Debug, Serialize)]
pub struct VmUpdate {
    pub state: &'static str,
}

/// `PUT /snapshot/create`.
#[derive(Debug, Serialize)]
pub struct SnapshotCreate {
    pub snapshot_type: &'static str,
    pub snapshot_path: String,
    pub mem_file_path: String,
}

/// `PUT /snapshot/load`.
#[derive(Debug, Serialize)]
pub struct SnapshotLoad {
    pub snapshot_path: String,
    pub mem_backend: MemoryBackend,
    pub resume_vm: bool,
    pub network_overrides: Vec<NetworkOverride>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
}

#[derive(Debug, Serialize)]
pub struct MemoryBackend {
    pub backend_type: &'static str,
    pub backend_path: String,
}

#[derive(Debug, Serialize)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: String,
}

#[derive(Debug, Serialize)]
pub struct VsockOverride {
    pub uds_path: String,
}

/// `GET /version`.
#[derive(Debug, Deserialize)]
pub struct Version {
    pub firecracker_version: String,
}

/// `GET /vm/config`, as far as it is looked at.
#[derive(Debug, Deserialize)]
pub struct FullConfig {
    #[serde(default)]
    pub drives: Vec<ConfiguredDrive>,
}

#[derive(Debug, Deserialize)]
pub struct ConfiguredDrive {
    pub drive_id: String,
    #[serde(default)]
    pub path_on_host: Option<String>,
}
