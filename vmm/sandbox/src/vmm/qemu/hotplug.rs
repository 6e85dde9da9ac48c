//! Changing a machine while it runs.
//!
//! Plugging in is a row of commands; when one fails those before it are taken back, last first.
//! Taking out is the guest's decision: the ports and descriptors are only given back when QEMU
//! has said that the device is gone.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use qapi::qmp::{self as commands, Event as QmpEvent};
use serde_json::{Map, Value, json};
use tokio::sync::broadcast::error::RecvError;

use super::super::core::{settle, stays};
use super::super::error::{Error, Result};
use super::super::qmp::Qmp;
use super::super::spec::{Disk, Nic, check_device_id};
use super::argv::{self, Device, port_name};
use super::machine::Machine;
use super::slots::{DeviceKind, qemu_id};

/// Descriptor sets of plugged disks have the number of their port and this. Those from the boot
/// are below.
const FIRST_SET: i64 = 1000;
/// How often the balloon's size is looked at between its events, which QEMU sends once a second.
const BALLOON: Duration = Duration::from_millis(100);
/// How long the balloon may stay the same until the guest has given, or taken, what it can.
const STILL: Duration = Duration::from_secs(1);

/// Commands that take back what was done.
#[derive(Default)]
struct Undo(Vec<(&'static str, Value)>);

impl Undo {
    fn later(&mut self, command: &'static str, arguments: Value) {
        self.0.push((command, arguments));
    }

    async fn now(self, qmp: &Qmp) {
        for (command, arguments) in self.0.into_iter().rev() {
            if let Err(error) = qmp.call(command, arguments, None).await {
                tracing::warn!(command, %error, "cannot take back part of a failed hot-plug");
            }
        }
    }
}

async fn add(qmp: &Qmp, device: Device, port: u8) -> Result<()> {
    let mut arguments = Map::new();
    arguments.insert("driver".into(), device.driver.into());
    arguments.insert("bus".into(), port_name(port).into());
    for (key, value) in device.options {
        // QMP wants the types that the command line reads from text.
        let value = match (key, value.as_str()) {
            ("host_mtu" | "vectors", number) => {
                number.parse::<u32>().map_or(Value::Null, Value::from)
            }
            ("mq", "on") => Value::Bool(true),
            _ => Value::String(value),
        };
        arguments.insert(key.into(), value);
    }
    qmp.call("device_add", Value::Object(arguments), None).await.map(drop)
}

impl Machine {
    fn take(&self, id: &str, kind: DeviceKind) -> Result<u8> {
        check_device_id(id)?;
        let mut state = self.core.locked();
        if state.1.fixed.iter().any(|fixed| fixed == id) {
            return Err(Error::DeviceExists(id.into()));
        }
        state.1.slots.take(id, kind)
    }

    /// Runs `plug`; gives the port back and undoes the rest when it fails.
    async fn plug<F>(&self, id: &str, kind: DeviceKind, plug: F) -> Result<()>
    where
        F: AsyncFnOnce(&Qmp, u8, &mut Undo) -> Result<()>,
    {
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        let port = self.take(id, kind)?;
        let mut undo = Undo::default();
        let done = plug(qmp, port, &mut undo).await;
        if done.is_err() {
            undo.now(qmp).await;
            self.core.locked().1.slots.free(id);
        }
        done
    }

    pub(super) async fn plug_disk(&self, disk: &Disk) -> Result<()> {
        let machine = self.core.locked().1.machine;
        let id = qemu_id(&disk.id, DeviceKind::Disk);
        self.plug(&disk.id, DeviceKind::Disk, async |qmp, port, undo| {
            let fdset = FIRST_SET + i64::from(port);
            // What a crash may have left of an earlier device in this port.
            let _ = qmp.call("remove-fd", json!({ "fdset-id": fdset }), None).await;
            let set = commands::add_fd { fdset_id: Some(fdset), opaque: None };
            qmp.execute_with(&set, Some(disk.file.as_fd())).await?;
            undo.later("remove-fd", json!({ "fdset-id": fdset }));
            let node = format!("blk-{id}");
            for json in argv::block_nodes(disk, &node, fdset) {
                let name = json.get("node-name").cloned().unwrap_or_default();
                qmp.call("blockdev-add", json, None).await?;
                undo.later("blockdev-del", json!({ "node-name": name }));
            }
            add(qmp, argv::disk_device(machine, disk, &id, &node), port).await
        })
        .await
    }

    pub(super) async fn plug_nic(&self, nic: &Nic) -> Result<()> {
        let machine = self.core.locked().1.machine;
        let id = qemu_id(&nic.id, DeviceKind::Nic);
        if nic.tap.is_empty() {
            return Err(Error::Invalid(format!("{}: no descriptor of its tap device", nic.id)));
        }
        self.plug(&nic.id, DeviceKind::Nic, async |qmp, port, undo| {
            let mut names = Vec::new();
            for (n, tap) in nic.tap.iter().enumerate() {
                let name = format!("{id}-{n}");
                pass(qmp, &name, tap.as_fd()).await?;
                names.push(name);
            }
            let netdev = format!("net-{id}");
            let key = if names.len() > 1 { "fds" } else { "fd" };
            let arguments = json!({ "type": "tap", "id": netdev, key: names.join(":") });
            // QEMU owns the descriptors with this command, and before it closes them by name.
            if let Err(error) = qmp.call("netdev_add", arguments, None).await {
                for name in names {
                    let _ = qmp.call("closefd", json!({ "fdname": name }), None).await;
                }
                return Err(error);
            }
            undo.later("netdev_del", json!({ "id": netdev }));
            add(qmp, argv::nic_device(machine, nic, &id, &netdev), port).await
        })
        .await
    }

    /// Plugs in a vhost-user device whose backend is connected at `socket`.
    pub(super) async fn plug_vhost_user(
        &self,
        id: &str,
        socket: BorrowedFd<'_>,
        device: impl FnOnce(&str, &str) -> Device,
    ) -> Result<()> {
        let name = qemu_id(id, DeviceKind::VhostUser);
        self.plug(id, DeviceKind::VhostUser, async |qmp, port, undo| {
            let chardev = format!("chr-{name}");
            pass(qmp, &chardev, socket).await?;
            let address = json!({ "type": "fd", "data": { "str": chardev } });
            let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
            let arguments = json!({ "id": chardev, "backend": backend });
            qmp.call("chardev-add", arguments, None).await?;
            undo.later("chardev-remove", json!({ "id": chardev }));
            add(qmp, device(&name, &chardev), port).await
        })
        .await
    }

    pub(super) async fn unplug(&self, id: &str) -> Result<()> {
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        if self.core.locked().1.fixed.iter().any(|fixed| fixed == id) {
            return Err(stays(id));
        }
        let found = self.core.locked().1.slots.find(id);
        let (port, kind) = found.ok_or_else(|| Error::NoDevice(id.into()))?;
        let name = qemu_id(id, kind);
        self.let_go(qmp, &name).await?;
        let node = format!("blk-{name}");
        let rest = match kind {
            DeviceKind::Disk => vec![
                ("blockdev-del", json!({ "node-name": node })),
                ("blockdev-del", json!({ "node-name": format!("{node}-file") })),
                ("remove-fd", json!({ "fdset-id": FIRST_SET + i64::from(port) })),
            ],
            DeviceKind::Nic => vec![("netdev_del", json!({ "id": format!("net-{name}") }))],
            DeviceKind::VhostUser => {
                vec![("chardev-remove", json!({ "id": format!("chr-{name}") }))]
            }
        };
        for (command, arguments) in rest {
            // The device is gone; what is left behind it is worth a line and no failure, but a
            // port whose names are still taken is not given to another device.
            match qmp.call(command, arguments, None).await {
                Ok(_) => {}
                Err(Error::Refused { reason, .. }) if is_missing(&reason) => {}
                Err(error) => return Err(error),
            }
        }
        self.core.locked().1.slots.free(id);
        Ok(())
    }

    /// Asks the guest for a device and waits until QEMU says that it is gone.
    async fn let_go(&self, qmp: &Qmp, name: &str) -> Result<()> {
        let mut events = qmp.events();
        match qmp.execute(&commands::device_del { id: name.into() }).await {
            Ok(_) => {}
            // An earlier call had no patience left: it went since, or is still on its way.
            Err(Error::Refused { reason, .. }) if is_missing(&reason) => return Ok(()),
            Err(Error::Refused { reason, .. }) if reason.contains("in the process of unplug") => {}
            Err(error) => return Err(error),
        }
        let limit = Duration::from_millis(self.config.unplug_timeout_ms);
        let gone = async {
            loop {
                match events.recv().await {
                    Ok(QmpEvent::DEVICE_DELETED { data, .. })
                        if data.device.as_deref() == Some(name) =>
                    {
                        return Ok(());
                    }
                    Ok(QmpEvent::DEVICE_UNPLUG_GUEST_ERROR { data, .. })
                        if data.device.as_deref() == Some(name) =>
                    {
                        return Err(Error::Refused {
                            vmm: super::Kind::Qemu,
                            command: "device_del".into(),
                            reason: "the guest does not let go of the device".into(),
                        });
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => {
                        let list = commands::qom_list { path: "/machine/peripheral".into() };
                        let there = qmp.execute(&list).await?;
                        if !there.iter().any(|entry| entry.name == name) {
                            return Ok(());
                        }
                    }
                    Err(RecvError::Closed) => return Err(Error::Gone),
                }
            }
        };
        tokio::time::timeout(limit, gone).await.map_err(|_| Error::Deadline {
            what: format!("the guest to let go of {name}"),
            limit,
        })?
    }

    pub(super) async fn set_cpus(&self, cpus: u32) -> Result<()> {
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        let most = self.core.locked().0.cpus.most;
        if cpus == 0 || cpus > most {
            return Err(Error::Invalid(format!("{cpus} CPUs: this machine has 1 to {most}")));
        }
        let slots = qmp.execute(&commands::query_hotpluggable_cpus {}).await?;
        let have = slots.iter().filter(|slot| slot.qom_path.is_some()).count();
        let want = cpus as usize;
        if want > have {
            // QEMU lists them last first.
            let free = slots.iter().rev().filter(|slot| slot.qom_path.is_none());
            for slot in free.take(want - have) {
                let Ok(Value::Object(mut arguments)) = serde_json::to_value(&slot.props) else {
                    continue;
                };
                let number = ["socket-id", "die-id", "core-id", "thread-id"]
                    .iter()
                    .filter_map(|key| arguments.get(*key)?.as_u64())
                    .map(|n| n.to_string())
                    .collect::<Vec<_>>()
                    .join("-");
                arguments.insert("driver".into(), slot.type_.clone().into());
                arguments.insert("id".into(), format!("cpu-{number}").into());
                qmp.call("device_add", Value::Object(arguments), None).await?;
            }
        } else {
            let added = slots.iter().filter_map(|slot| {
                slot.qom_path.as_deref()?.strip_prefix("/machine/peripheral/").map(str::to_owned)
            });
            let added: Vec<_> = added.take(have - want).collect();
            if added.len() < have - want {
                return Err(Error::Invalid(format!(
                    "{cpus} CPUs: those from the boot ({}) stay; the guest's cgroups limit",
                    have - added.len()
                )));
            }
            for id in added {
                self.let_go(qmp, &id).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn set_memory(&self, mib: u32) -> Result<u32> {
        let _turn = self.core.change.lock().await;
        let qmp = self.qmp()?;
        let most = self.core.locked().0.memory_mib.most;
        if mib == 0 || mib > most {
            return Err(Error::Invalid(format!("{mib} MiB: this machine has 1 to {most}")));
        }
        qmp.execute(&commands::balloon { value: i64::from(mib) << 20 }).await?;
        let limits = (STILL, Duration::from_millis(self.config.snapshot_timeout_ms));
        settle(mib, BALLOON, limits, || self.memory_now()).await
    }

    pub(super) async fn memory_now(&self) -> Result<u32> {
        let actual = self.qmp()?.execute(&commands::query_balloon {}).await?.actual >> 20;
        Ok(u32::try_from(actual).unwrap_or(u32::MAX))
    }
}

async fn pass(qmp: &Qmp, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
    qmp.execute_with(&commands::getfd { fdname: name.into() }, Some(fd)).await.map(drop)
}

/// QEMU has no error class for most of what is missing; its words have been these for ten years.
fn is_missing(reason: &str) -> bool {
    reason.contains("not found") || reason.contains("Failed to find")
}
