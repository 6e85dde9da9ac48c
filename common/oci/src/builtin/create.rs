//! `oci create`: a container by [`super::direct`], or else by libcontainer.

use std::error::Error as _;
use std::io::Write;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use serde::Deserialize;
use serde_json::{Value, json};

use super::args::{Args, Create};
use super::payload::Payload;
use super::workload::Workload;
use super::{Error, Result};
use crate::mapping::{Mapping, host_id};

/// The parts of the spec that are looked at here.
#[derive(Deserialize)]
struct Bundle {
    process: Process,
    #[serde(default)]
    linux: Linux,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    user: User,
}

#[derive(Deserialize, Default)]
struct User {
    #[serde(default)]
    uid: u32,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Linux {
    /// Go writes an empty list as `null` at times.
    uid_mappings: Option<Vec<Mapping>>,
    cgroups_path: Option<String>,
    resources: Option<Value>,
}

impl Bundle {
    /// The uid of the process as the host sees it.
    fn host_uid(&self) -> u32 {
        let uid = self.process.user.uid;
        let mappings = self.linux.uid_mappings.as_deref().unwrap_or_default();
        host_id(mappings, uid).unwrap_or(uid)
    }
}

/// Makes the container; its process waits for `start`. Why libcontainer makes it goes to `log`.
pub fn run(
    args: &Args,
    create: &Create,
    log: Option<&mut std::fs::File>,
    workload: Option<Box<dyn Workload>>,
) -> Result<()> {
    let path = create.bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|error| Error::io(path.display(), error))?;
    match super::direct::plan(create, &text, workload.is_some()) {
        Ok(plan) => super::direct::run(args, create, plan, workload),
        // libcontainer knows of programs alone.
        Err(reason) if workload.is_some() => Err(not(&reason)),
        Err(reason) => {
            if let Some(log) = log {
                let line = json!({ "level": "info", "msg": format!("by libcontainer: {reason}") });
                // It is for people who ask why.
                let _ = writeln!(log, "{line}");
            }
            let bundle: Bundle =
                serde_json::from_slice(&text).map_err(|error| Error::io(path.display(), error))?;
            libcontainer(args, create, &bundle)
        }
    }
}

/// Why a container cannot be made whose process becomes a workload.
pub fn not(reason: &super::direct::Reason) -> Error {
    Error::Other(format!(
        "a container that runs no program of its image cannot have this: {reason}"
    ))
}

fn libcontainer(args: &Args, create: &Create, bundle: &Bundle) -> Result<()> {
    if create.console_socket.is_none() {
        super::console::own_streams(bundle.host_uid());
    }
    let mut builder = ContainerBuilder::new(args.id.clone(), SyscallType::default())
        .with_root_path(&args.root)
        .map_err(|error| explain(&error))?
        .with_executor(Payload)
        .with_preserved_fds(create.preserve_fds)
        .with_console_socket(create.console_socket.as_ref());
    builder = builder.with_pid_file(create.pid_file.as_ref()).map_err(|error| explain(&error))?;
    builder
        .as_init(&create.bundle)
        .with_systemd(create.systemd)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map(drop)
        .map_err(|error| explain(&error))?;
    // On cgroup v2 libcontainer is built to enforce no device rules. The container's process still
    // waits for `start`.
    let Some(path) = bundle.linux.cgroups_path.as_deref().filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let rules = super::direct::device_rules(bundle.linux.resources.as_ref());
    kuasar_host::cgroup::Cgroup::open(path)
        .and_then(|group| group.restrict_devices(&rules))
        .map_err(|error| Error::io("devices", error))
}

/// libcontainer's error with its causes, without the layers that only say "it failed", and with
/// our payload's own words first when they are the cause.
pub fn explain(error: &libcontainer::error::LibcontainerError) -> Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    match text.find("exec: ") {
        Some(at) => {
            let words = text.get(at..).unwrap_or(&text);
            Error::Process(words.trim_end_matches(['"', ')', ' ']).replace("\\\"", "\""))
        }
        None => Error::Other(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_is_of_the_user_as_the_host_sees_it() {
        let uid = |mappings: Value| {
            let text = json!({"process": {"user": {"uid": 7}}, "linux": {"uidMappings": mappings}});
            serde_json::from_value::<Bundle>(text).map(|bundle| bundle.host_uid()).unwrap()
        };
        assert_eq!(uid(Value::Null), 7);
        assert_eq!(uid(json!([{"containerID": 5, "hostID": 100, "size": 9, "other": 1}])), 102);
        assert_eq!(uid(json!([{"containerID": 0, "hostID": 100, "size": 7}])), 7);
    }
}
