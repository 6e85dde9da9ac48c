//! How the sandboxer asks a warm worker for a process: packets over a pair of sockets.
//!
//! 1. The worker sends one [`Greeting`]: a [`Hello`] when it is warm, or why it cannot be.
//! 2. The sandboxer sends a [`Request`]: arguments, and descriptors beside it. The last descriptor
//!    is the writing end of a pipe; the one before it is what [`Entry`] says, if there is one.
//! 3. The new process writes its pid (four bytes, little endian) to the pipe, and at its end its
//!    exit status (one byte). A pipe that ends earlier is a process that was killed. The process
//!    of a container has no end then: it says 0 when it waits for Start.
//!
//! The worker never answers by itself: it is the only process that must not wait. When the
//! sandboxer's end is closed, it ends.

pub use kuasar_host::packet::{Error, MAX, MAX_FDS, receive, send};
use serde::{Deserialize, Serialize};

/// Variable of the warm process's environment: milliseconds without a request before it makes a spare
/// process. Not an argument: workers of another build start all the same.
pub const SPARE_AFTER: &str = "KUASAR_SPARE_AFTER";
/// The milliseconds, where nobody says.
pub const SPARE_AFTER_MS: u16 = 5;

/// What both ends have to be of: the two programs are installed together.
pub const PROTOCOL: u32 = 2;

/// First words of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`] of the worker.
    #[serde(default)]
    pub protocol: u32,
    /// Engine's name, such as `wasmtime`.
    pub engine: String,
    /// Its version.
    pub version: String,
    /// Stands for the engine's version and everything that compiled code depends on.
    pub settings: String,
}

/// First packet of a worker; the error is for people who install things.
pub type Greeting = std::result::Result<Hello, String>;

/// A process is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Arguments, without the program.
    pub argv: Vec<String>,
    /// Which of its descriptors, from 0 on, come with the packet; the others are `/dev/null`.
    pub given: Vec<bool>,
    /// The process is the container's itself, not one that makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Entry>,
}

/// How the process of a container is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its new namespaces: bits of clone(2).
    pub namespaces: i32,
    /// Whether the further descriptor is its cgroup's directory, in which it is from the start.
    /// Otherwise it is a pipe that says when the cgroup is there, which it then enters.
    pub grouped: bool,
}
