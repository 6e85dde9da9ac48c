//! Places for disks that come while a Firecracker runs.
//!
//! Firecracker has no hot-plug that a guest would notice by itself (that of its PCI machines wants
//! the guest to rescan the bus). But a drive from the boot may change its file, and the guest is
//! told of the new size. So a machine starts with empty drives, over `/dev/null`: there in every
//! jail, at the same path, also when a snapshot is restored.
//!
//! The guest reads as serial number what Firecracker makes up of device and inode number of the
//! opened file, not the drive's id.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::error::{Doing, Error, Result};

/// File of an empty drive.
pub(super) const EMPTY: &str = "/dev/null";
/// Bytes of a serial number (virtio 1.2, 5.2.6.1).
const SERIAL: usize = 20;

/// A drive from the boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slot {
    /// Firecracker's name of the drive.
    pub drive: String,
    pub read_only: bool,
    /// Which disk is in it, and the serial number that the guest reads.
    pub disk: Option<(String, String)>,
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slots(Vec<Slot>);

impl Slots {
    pub fn new(writable: u8, read_only: u8) -> Self {
        let slot =
            |kind: &str, n, read_only| Slot { drive: format!("{kind}{n}"), read_only, disk: None };
        let writable = (0..writable).map(|n| slot("rw", n, false));
        Self(writable.chain((0..read_only).map(|n| slot("ro", n, true))).collect())
    }

    pub fn all(&self) -> &[Slot] {
        &self.0
    }

    /// Takes a place for a disk; answers the drive's name.
    pub fn take(&mut self, id: &str, read_only: bool) -> Result<String> {
        if self.find(id).is_some() {
            return Err(Error::DeviceExists(id.into()));
        }
        let mut free = self.0.iter_mut();
        let slot = free.find(|slot| slot.disk.is_none() && slot.read_only == read_only);
        let slot = slot.ok_or_else(|| {
            let (what, key) = if read_only {
                ("read-only", "read_only_disk_slots")
            } else {
                ("writable", "disk_slots")
            };
            Error::Exhausted(format!(
                "every place for a {what} disk of this machine is taken: set firecracker.{key}"
            ))
        })?;
        slot.disk = Some((id.into(), String::new()));
        Ok(slot.drive.clone())
    }

    pub fn free(&mut self, id: &str) {
        let slots = self.0.iter_mut();
        for slot in slots.filter(|slot| slot.disk.as_ref().is_some_and(|(disk, _)| disk == id)) {
            slot.disk = None;
        }
    }

    pub fn set_serial(&mut self, id: &str, serial: String) {
        let disks = self.0.iter_mut().filter_map(|slot| slot.disk.as_mut());
        for disk in disks.filter(|(disk, _)| disk == id) {
            disk.1 = serial.clone();
        }
    }

    pub fn find(&self, id: &str) -> Option<&Slot> {
        self.0.iter().find(|slot| slot.disk.as_ref().is_some_and(|(disk, _)| disk == id))
    }

    pub fn serial(&self, id: &str) -> Option<&str> {
        let disks = self.0.iter().filter_map(|slot| slot.disk.as_ref());
        disks.filter(|(disk, _)| disk == id).map(|(_, serial)| serial.as_str()).next()
    }

    /// Takes over what the VMM says: `disk` of a drive, none when it is empty.
    pub fn correct(&mut self, drive: &str, disk: Option<(String, String)>) {
        for slot in self.0.iter_mut().filter(|slot| slot.drive == drive) {
            if slot.disk.as_ref().map(|(id, _)| id) != disk.as_ref().map(|(id, _)| id) {
                tracing::info!(drive, was = ?slot.disk, is = ?disk, "another disk than recorded");
                slot.disk = disk.clone();
            }
        }
    }
}

/// The serial number that a guest reads of a drive over the file at `path`.
pub(super) fn serial(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).doing(|| format!("look at {}", path.display()))?;
    let mut text = format!("{}{}{}", meta.dev(), meta.rdev(), meta.ino());
    text.truncate(SERIAL);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_given_back_and_run_out() {
        let mut slots = Slots::new(2, 1);
        assert_eq!(slots.take("a", false).unwrap(), "rw0");
        assert_eq!(slots.take("b", false).unwrap(), "rw1");
        assert!(matches!(slots.take("a", false), Err(Error::DeviceExists(_))));
        assert!(
            matches!(slots.take("c", false), Err(Error::Exhausted(text)) if text.contains("disk_slots"))
        );
        assert_eq!(slots.take("c", true).unwrap(), "ro0");
        slots.set_serial("b", "77".into());
        assert_eq!(slots.serial("b"), Some("77"));
        slots.free("a");
        assert!(slots.find("a").is_none());
        // A crash came between a plug and its record, and between an unplug and its.
        slots.correct("rw0", Some(("d".into(), "78".into())));
        slots.correct("rw1", None);
        assert_eq!(slots.serial("d"), Some("78"));
        assert!(slots.find("b").is_none());
    }

    #[test]
    fn a_serial_number_fits_into_virtios_field() {
        assert!(serial(Path::new("/dev/null")).unwrap().len() <= SERIAL);
        assert!(serial(Path::new("/nowhere")).is_err());
    }
}
