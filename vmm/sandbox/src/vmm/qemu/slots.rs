//! Which root port holds what. A port is taken from before the first command that plugs a device
//! until after the last one that takes it away, and given back on failure; after a restart the
//! table is corrected by what QEMU itself says ([`Slots::correct`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::error::{Error, Result};

/// What kind of device it is: what has to go with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DeviceKind {
    /// virtio-blk, two block nodes, a descriptor set.
    Disk,
    /// virtio-net and a netdev.
    Nic,
    /// A vhost-user device and its chardev.
    VhostUser,
}

/// A device that was plugged in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plugged {
    pub id: String,
    pub kind: DeviceKind,
}

/// The table of root ports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Slots {
    ports: u8,
    taken: BTreeMap<u8, Plugged>,
}

impl Slots {
    /// All free.
    pub fn new(ports: u8) -> Self {
        Self { ports, taken: BTreeMap::new() }
    }

    /// Takes the lowest free port.
    pub fn take(&mut self, id: &str, kind: DeviceKind) -> Result<u8> {
        if self.find(id).is_some() {
            return Err(Error::DeviceExists(id.into()));
        }
        let port =
            (0..self.ports).find(|port| !self.taken.contains_key(port)).ok_or_else(|| {
                Error::Exhausted(format!(
                    "all {} root ports are taken: set root_ports higher, or share more by virtiofs",
                    self.ports
                ))
            })?;
        self.taken.insert(port, Plugged { id: id.into(), kind });
        Ok(port)
    }

    /// Gives a port back.
    pub fn free(&mut self, id: &str) {
        self.taken.retain(|_, device| device.id != id);
    }

    /// The device of this name.
    pub fn find(&self, id: &str) -> Option<(u8, DeviceKind)> {
        self.taken
            .iter()
            .find(|(_, device)| device.id == id)
            .map(|(port, device)| (*port, device.kind))
    }

    /// Number of ports.
    pub fn ports(&self) -> u8 {
        self.ports
    }

    /// Number of devices.
    pub fn len(&self) -> usize {
        self.taken.len()
    }

    /// QEMU says which ports hold which device: that is how it is. Answers the devices that are
    /// not there (any more).
    pub fn correct(&mut self, found: BTreeMap<u8, Plugged>) -> Vec<Plugged> {
        let mut gone = Vec::new();
        for (port, device) in std::mem::replace(&mut self.taken, found) {
            if self.taken.get(&port) != Some(&device) {
                gone.push(device);
            }
        }
        gone
    }
}

/// QEMU's name of a plugged device: tells what it is, also to a daemon that has no record of it.
pub(super) fn qemu_id(id: &str, kind: DeviceKind) -> String {
    let letter = match kind {
        DeviceKind::Disk => 'd',
        DeviceKind::Nic => 'n',
        DeviceKind::VhostUser => 'v',
    };
    format!("hp-{letter}-{id}")
}

/// The other way round.
pub(super) fn from_qemu_id(name: &str) -> Option<(DeviceKind, &str)> {
    let (letter, id) = name.strip_prefix("hp-")?.split_once('-')?;
    let kind = match letter {
        "d" => DeviceKind::Disk,
        "n" => DeviceKind::Nic,
        "v" => DeviceKind::VhostUser,
        _ => return None,
    };
    Some((kind, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator (xorshift): the same sequence in each run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    #[test]
    fn no_port_is_ever_held_twice_or_lost() {
        for seed in 1..50 {
            let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
            let ports = 1 + random.below(8) as u8;
            let mut slots = Slots::new(ports);
            let mut model: BTreeMap<String, u8> = BTreeMap::new();
            for _ in 0..400 {
                let id = format!("d{}", random.below(12));
                match random.below(3) {
                    0 | 1 => match slots.take(&id, DeviceKind::Disk) {
                        Ok(port) => {
                            assert!(port < ports && !model.values().any(|held| *held == port));
                            assert!(model.insert(id, port).is_none());
                        }
                        Err(Error::DeviceExists(_)) => assert!(model.contains_key(&id)),
                        Err(Error::Exhausted(_)) => assert_eq!(model.len(), usize::from(ports)),
                        Err(other) => panic!("{other}"),
                    },
                    _ => {
                        slots.free(&id);
                        model.remove(&id);
                    }
                }
                assert_eq!(slots.len(), model.len());
                // What is written to a journal at any moment comes back the same.
                let text = serde_json::to_string(&slots).unwrap();
                assert_eq!(serde_json::from_str::<Slots>(&text).unwrap(), slots);
            }
        }
    }

    #[test]
    fn after_a_crash_qemu_is_right() {
        let mut slots = Slots::new(4);
        slots.take("gone", DeviceKind::Disk).unwrap();
        slots.take("kept", DeviceKind::Nic).unwrap();
        let plugged = |id: &str, kind| Plugged { id: id.into(), kind };
        let found = BTreeMap::from([
            (1, plugged("kept", DeviceKind::Nic)),
            (3, plugged("new", DeviceKind::Disk)),
        ]);
        let gone = slots.correct(found);
        assert_eq!(gone.iter().map(|d| d.id.as_str()).collect::<Vec<_>>(), ["gone"]);
        assert_eq!(slots.find("kept"), Some((1, DeviceKind::Nic)));
        assert_eq!(slots.find("new").map(|(port, _)| port), Some(3));
        assert_eq!(slots.take("next", DeviceKind::Disk).unwrap(), 0);
    }

    #[test]
    fn a_devices_name_in_qemu_tells_what_it_is() {
        for kind in [DeviceKind::Disk, DeviceKind::Nic, DeviceKind::VhostUser] {
            assert_eq!(from_qemu_id(&qemu_id("a-b", kind)), Some((kind, "a-b")));
        }
        assert_eq!(from_qemu_id("rp0"), None);
    }
}
