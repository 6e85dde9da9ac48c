//! What a user namespace maps (`linux.uidMappings`, `linux.gidMappings` of the runtime specification).

use serde::Deserialize;

/// One of the mappings of a user namespace, or of a mount.
///
/// Fields that are not known are passed over, as the runtime specification demands of runtimes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Mapping {
    /// The first number inside.
    #[serde(rename = "containerID")]
    pub container: u32,
    /// The first number outside.
    #[serde(rename = "hostID")]
    pub host: u32,
    /// How many.
    pub size: u32,
}

/// The host's number of the user or group `id`; `None` when it is not mapped.
pub(crate) fn host_id(mappings: &[Mapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|map| {
        let offset = id.checked_sub(map.container).filter(|offset| *offset < map.size)?;
        map.host.checked_add(offset)
    })
}
