//! Every bound and deadline of the guest. They are constants because the guest has no
//! configuration but the kernel's command line, and the host is the one that is configured.

use std::time::Duration;

/// Connections that have not greeted yet, per port.
pub const GREETING: usize = 64;
/// How long a connection may take to greet.
pub const GREETING_TIME: Duration = Duration::from_secs(10);
/// Control connections at the same time: one, and those of daemons that are just restarting.
pub const CONTROL: usize = 8;
/// How long the host may take to answer READY.
pub const WELCOME_TIME: Duration = Duration::from_secs(30);
/// Longest pause between two attempts to reach the host.
pub const READY_PAUSE: Duration = Duration::from_secs(1);
/// Connections of an engine that calls us itself: it has some for each container.
pub const ENGINE: usize = 1024;
/// How long connections wait that cannot be accepted now.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Containers and execs that an engine may make.
pub const DECLARED: usize = 2048;
/// Containers of the pod.
pub const CONTAINERS: usize = 512;
/// Processes beside the first in a container.
pub const EXECS: usize = 1024;
/// How long an exit waits for its output to be handed over.
pub const DRAIN: Duration = Duration::from_secs(5);
/// Storages of the pod, and of one container.
pub const STORAGES: usize = 512;
/// Events that wait for the host.
pub const EVENTS: usize = 256;
/// Finished spans that wait for the host.
pub const SPANS: usize = 256;
/// Longest text of a warning that is sent to the host, in bytes.
pub const TEXT: usize = 1024;
/// Longest wait of a `NextEvents`.
pub const EVENTS_TIME: Duration = Duration::from_secs(600);
/// Port-forwards that wait for their stream, or have one.
pub const FORWARDS: usize = 256;
/// How long a port-forward waits for its stream.
pub const FORWARD_TIME: Duration = Duration::from_secs(30);
/// Debug sessions that wait for their stream, or have one.
pub const DEBUGS: usize = 8;
/// How long a debug session waits for its stream.
pub const DEBUG_TIME: Duration = Duration::from_secs(60);
/// Words of a debug session's program and arguments, and bytes of all of them.
pub const DEBUG_WORDS: (usize, usize) = (64, 32 << 10);
/// How long a debug session's program may take to end when its stream has.
pub const HANG_UP: Duration = Duration::from_secs(2);
/// How long a plugged device may take to appear.
pub const DEVICE_TIME: Duration = Duration::from_secs(10);
/// Between two looks for a vsock device of which the kernel has not told.
pub const VSOCK_TIME: Duration = Duration::from_secs(60);
/// Between two looks for a serial port of which the kernel has not told.
pub const PORT_TIME: Duration = Duration::from_secs(60);
/// How long plugged CPUs and memory may take to appear.
pub const ONLINE_TIME: Duration = Duration::from_secs(10);
/// Contents of one of the pod's files, in bytes.
pub const FILE: usize = 1 << 20;
/// Files, directories and links of one `PutFiles`.
pub const FILES: usize = 4096;
/// Volumes of a container that are copies of the host's files.
pub const COPIES: u32 = 1024;
/// Most that a `TakeFile` answers, in bytes.
pub const TAKEN: u64 = 1 << 20;
/// Sysctls, interfaces, routes, neighbours of one message.
pub const ENTRIES: usize = 1024;
/// Default size of the pod's `/dev/shm`, in bytes.
pub const SHM: u64 = 64 << 20;
/// Exits of strangers that are remembered for a `watch` that may come.
pub const EXITS: usize = 4096;
/// Exits and processes that somebody watches.
pub const WATCHED: usize = 65_536;
/// Longest grace of a shutdown.
pub const GRACE: Duration = Duration::from_secs(300);
/// How long killed processes may take to go at a shutdown.
pub const KILLED: Duration = Duration::from_secs(5);
/// Bytes of stack of a thread that does blocking work.
pub const STACK: usize = 512 << 10;
/// Threads that do blocking work at the same time.
pub const THREADS: usize = 16;
/// How long the answer to Shutdown has to leave.
pub const ANSWER: Duration = Duration::from_millis(20);
