//! `oci start|kill|delete|state`: for use by hand and for containers with poststart or poststop
//! hooks. The daemon does these itself otherwise (see [`crate::engine`]).

use libcontainer::container::Container;
use libcontainer::error::LibcontainerError;
use libcontainer::signal::Signal;

use super::args::Args;
use super::create::explain;
use super::{Error, Result};

fn load(args: &Args) -> Result<Container> {
    let dir = args.root.join(&args.id);
    if !dir.exists() {
        return Err(Error::Other(format!("container {} does not exist", args.id)));
    }
    Container::load(dir).map_err(|error| explain(&error))
}

/// Lets the container's process run.
pub fn start(args: &Args) -> Result<()> {
    load(args)?.start().map_err(|error| explain(&error))
}

/// Sends a signal.
pub fn kill(args: &Args, number: i32, all: bool) -> Result<()> {
    let signal = Signal::try_from(number)
        .map_err(|_| Error::Usage(format!("unknown signal number {number}")))?;
    load(args)?.kill(signal, all).map_err(|error| match error {
        // In runc's words: its shim knows by them that the process has ended.
        LibcontainerError::IncorrectStatus(_) => Error::Other("container not running".into()),
        other => explain(&other),
    })
}

/// Removes the container.
pub fn delete(args: &Args, force: bool) -> Result<()> {
    if force && !args.root.join(&args.id).exists() {
        return Ok(());
    }
    load(args)?.delete(force).map_err(|error| explain(&error))
}

/// Prints the OCI state.
pub fn state(args: &Args) -> Result<()> {
    let mut container = load(args)?;
    container.refresh_status().map_err(|error| explain(&error))?;
    let text = serde_json::to_string_pretty(&container.state)
        .map_err(|error| Error::Other(error.to_string()))?;
    println!("{text}");
    Ok(())
}
