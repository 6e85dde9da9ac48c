//! `oci create`: a container by libcontainer.

use std::error::Error as _;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use serde::Deserialize;

use super::args::{Args, Create};
use super::payload::Payload;
use super::{Error, Result};

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
    #[serde(default)]
    uid_mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    #[serde(rename = "containerID")]
    container: u32,
    #[serde(rename = "hostID")]
    host: u32,
    size: u32,
}

impl Bundle {
    /// The uid of the process as the host sees it.
    fn host_uid(&self) -> u32 {
        let uid = self.process.user.uid;
        self.linux
            .uid_mappings
            .iter()
            .find_map(|map| {
                let offset = uid.checked_sub(map.container).filter(|offset| *offset < map.size)?;
                map.host.checked_add(offset)
            })
            .unwrap_or(uid)
    }
}

/// Makes the container; its process waits for `start`.
pub fn run(args: &Args, create: &Create) -> Result<()> {
    if create.console_socket.is_none() {
        let path = create.bundle.join("config.json");
        let text = std::fs::read(&path).map_err(|error| Error::io(path.display(), error))?;
        let bundle: Bundle =
            serde_json::from_slice(&text).map_err(|error| Error::io(path.display(), error))?;
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
        .map_err(|error| explain(&error))
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
