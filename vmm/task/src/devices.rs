//! Block devices of a container: nodes that its storages have made, under the guest's numbers.
//!
//! The host knows which disk a container is to have and what it may do with it; which number this
//! kernel gives the disk is known here alone, so the device's entry in the spec and its rule for
//! the cgroup are made here, from the node that was found by the disk's serial number.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use containerd_task::error::{Error, Result};
use serde_json::{Map, Value, json};
use vmm_common::guest::{Container, Device};

use crate::limits;

fn wrong(device: &Device, why: &str) -> Error {
    Error::InvalidArgument(format!("device {:.80?}: {why}", device.path))
}

/// The devices of a container, each of which is one of its storages.
///
/// # Errors
/// [`Error::InvalidArgument`] that says what is wrong.
pub fn check(container: &Container) -> Result<Vec<Device>> {
    if container.devices.len() > limits::STORAGES {
        return Err(Error::ResourceExhausted("the container has too many devices".into()));
    }
    for device in &container.devices {
        let of_a_disk = container.storages.iter().any(|storage| {
            storage.kind == "block" && storage.fstype.is_empty() && storage.target == device.node
        });
        if !of_a_disk {
            return Err(wrong(device, "no storage of the container makes its node"));
        }
        if !device.path.starts_with('/') || device.path.contains('\0') {
            return Err(wrong(device, "its path is not absolute"));
        }
        if !device.access.chars().all(|c| "rwm".contains(c)) || device.mode > 0o7777 {
            return Err(wrong(device, "its access or its mode is none"));
        }
    }
    Ok(container.devices.clone())
}

/// Puts them into the spec, with their numbers here.
///
/// # Errors
/// When a node is missing, or the spec is none.
pub fn add(spec: &mut Value, devices: &[Device]) -> Result<()> {
    for device in devices {
        let node = Path::new(&device.node);
        let meta = node
            .symlink_metadata()
            .map_err(|error| Error::internal(format!("look at {}", node.display()), error))?;
        if !meta.file_type().is_block_device() {
            return Err(wrong(device, "its node is no block device"));
        }
        put(spec, device, meta.rdev())?;
    }
    Ok(())
}

fn put(spec: &mut Value, device: &Device, number: u64) -> Result<()> {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let none = || wrong(device, "the spec is no object");
    let linux = object(spec.as_object_mut().ok_or_else(none)?, "linux").ok_or_else(none)?;
    // Whatever is there at this path is another machine's.
    let list = array(linux, "devices").ok_or_else(none)?;
    list.retain(|other| other.get("path").and_then(Value::as_str) != Some(&device.path));
    list.push(json!({
        "path": device.path, "type": "b", "major": major, "minor": minor,
        "fileMode": device.mode, "uid": device.uid, "gid": device.gid,
    }));
    if device.access.is_empty() {
        return Ok(());
    }
    let resources = object(linux, "resources").ok_or_else(none)?;
    array(resources, "devices").ok_or_else(none)?.push(json!({
        "allow": true, "type": "b", "major": major, "minor": minor, "access": device.access,
    }));
    Ok(())
}

fn object<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    let value = parent.entry(key).or_insert_with(|| json!({}));
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

fn array<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Vec<Value>> {
    let value = parent.entry(key).or_insert_with(|| json!([]));
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_common::guest::Storage;

    fn device() -> Device {
        Device {
            node: "/run/kuasar/devices/c-0".into(),
            path: "/dev/xvda".into(),
            mode: 0o660,
            uid: 5,
            gid: 6,
            access: "rw".into(),
            ..Default::default()
        }
    }

    fn container(device: Device) -> Container {
        let storage = Storage {
            id: "c-0".into(),
            kind: "block".into(),
            source: "serial:v8-0".into(),
            target: "/run/kuasar/devices/c-0".into(),
            ..Default::default()
        };
        Container { storages: vec![storage], devices: vec![device], ..Default::default() }
    }

    #[test]
    fn a_device_is_one_of_the_containers_own_storages() {
        assert_eq!(check(&container(device())).unwrap(), [device()]);
        let refused = |change: fn(&mut Container)| {
            let mut container = container(device());
            change(&mut container);
            assert!(matches!(check(&container), Err(Error::InvalidArgument(_))));
        };
        refused(|c| c.devices[0].node = "/dev/vda".into());
        refused(|c| c.storages[0].fstype = "ext4".into());
        refused(|c| c.storages[0].kind = "tmpfs".into());
        refused(|c| c.devices[0].path = "dev/x".into());
        refused(|c| c.devices[0].access = "rwx".into());
        refused(|c| c.devices[0].mode = 0o10_000);
    }

    #[test]
    fn entry_and_rule_have_the_guests_numbers() {
        let mut spec = json!({"linux": {
            "devices": [{"path": "/dev/xvda", "type": "b", "major": 8, "minor": 0}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }});
        put(&mut spec, &device(), nix::sys::stat::makedev(254, 16)).unwrap();
        assert_eq!(
            spec["linux"]["devices"],
            json!([{"path": "/dev/xvda", "type": "b", "major": 254, "minor": 16,
                "fileMode": 0o660, "uid": 5, "gid": 6}])
        );
        assert_eq!(
            spec["linux"]["resources"]["devices"][1],
            json!({"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rw"})
        );
        // One that may not be used is there all the same, without a rule.
        let mut bare = json!({"linux": null});
        put(&mut bare, &Device { access: String::new(), ..device() }, 0).unwrap();
        assert_eq!(bare["linux"]["devices"].as_array().unwrap().len(), 1);
        assert!(bare["linux"].get("resources").is_none());
        assert!(put(&mut json!([]), &device(), 0).is_err());
    }

    #[test]
    fn a_node_that_is_no_block_device_is_refused() {
        let mut spec = json!({});
        let device = Device { node: "/dev/null".into(), ..device() };
        assert!(matches!(add(&mut spec, &[device]), Err(Error::InvalidArgument(_))));
        assert_eq!(spec, json!({}));
    }
}
