//! Execs: further processes in a container that runs.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use containerd_task::error::{Error, Result};
use containerd_task::runtime::{ProcessIo, Spawned};
use kuasar_oci::observer::Observer;
use kuasar_oci::spec::plain_process;
use kuasar_pod::Metrics;
use sandbox_parent::client::Parent;
use serde_json::{Map, Value};

use crate::runtime::{Containers, called, end_of, parent_error};
use crate::sentry::{Exec, Sentry};
use crate::spec;
use crate::urpc::{CallError, Connection};

impl Containers {
    pub(crate) async fn exec_inner(
        &self,
        container: &str,
        spec: &[u8],
        io: ProcessIo,
    ) -> Result<Spawned> {
        let begun = Instant::now();
        let mut process: Map<String, Value> = serde_json::from_slice(spec)
            .map_err(|error| Error::InvalidArgument(format!("the exec's process: {error}")))?;
        plain_process(&mut process).map_err(Error::InvalidArgument)?;
        let null = || {
            let file = std::fs::File::options().read(true).write(true).open("/dev/null");
            file.map(OwnedFd::from).map_err(|error| Error::internal("open /dev/null", error))
        };
        let (streams, terminal) = match io {
            ProcessIo::Streams { stdin, stdout, stderr } => {
                let or_null = |stream: Option<OwnedFd>| stream.map_or_else(null, Ok);
                ([or_null(stdin)?, or_null(stdout)?, or_null(stderr)?], None)
            }
            ProcessIo::Terminal { size } => {
                let (master, slave) = pty(size)?;
                let again =
                    || slave.try_clone().map_err(|error| Error::internal("make a terminal", error));
                ([again()?, again()?, slave], Some(master))
            }
        };
        let handle = Parent::new_cookie();
        let connection = self.sentry().dial().await.map_err(called("exec"))?;
        let name = self.kept(handle);
        // First of all: whoever comes after us finds out what was begun.
        self.parent()
            .keep(&name, connection.as_fd())
            .await
            .map_err(parent_error("keep the connection"))?;
        let [stdin, stdout, stderr] = &streams;
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let container = &self.name(container);
        let run = async {
            let pid =
                self.run_exec(&connection, container, &process, terminal.is_some(), fds).await?;
            Sentry::ask_end_of_exec(&connection, container, pid).await.map_err(called("exec"))?;
            Ok::<_, Error>(pid)
        };
        let pid = match run.await {
            Ok(pid) => pid,
            Err(error) => {
                let _ = self.parent().forget(&name).await;
                return Err(error);
            }
        };
        Metrics("gvisor").phase("engine_exec", begun.elapsed());
        Ok(Spawned { pid, handle, terminal, exit: Box::pin(end_of(connection)) })
    }

    async fn run_exec(
        &self,
        connection: &Connection,
        container: &str,
        process: &Map<String, Value>,
        terminal: bool,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<u32> {
        let texts = |name: &str| -> Vec<String> {
            let list = process.get(name).and_then(Value::as_array).into_iter().flatten();
            list.filter_map(|text| text.as_str().map(str::to_owned)).collect()
        };
        let user = |name: &str| {
            let id = process.get("user").and_then(|user| user.get(name));
            id.and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok()).unwrap_or(0)
        };
        let groups = process.get("user").and_then(|user| user.get("additionalGids"));
        let groups = groups.and_then(Value::as_array).into_iter().flatten();
        let exec = Exec {
            argv: texts("args"),
            envv: texts("env"),
            cwd: process.get("cwd").and_then(Value::as_str).unwrap_or("/").to_owned(),
            uid: user("uid"),
            gid: user("gid"),
            groups: groups
                .filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
                .collect(),
            no_new_privileges: process.get("noNewPrivileges") == Some(&Value::Bool(true)),
            capabilities: spec::capabilities(
                process,
                self.own.args.iter().any(|arg| arg == "--net-raw=true" || arg == "--net-raw"),
            ),
            terminal,
            fds: [0, 1, 2],
            container: container.to_owned(),
            ..Exec::default()
        };
        self.sentry().exec(connection, &exec, streams).await.map_err(|error| match error {
            CallError::Refused(words) => {
                let theirs = ["no such file", "permission denied", "not found", "exec format"];
                let text = format!("OCI runtime exec failed: runsc: {words}");
                match theirs.iter().any(|part| words.contains(part)) {
                    true => Error::InvalidArgument(text),
                    false => Error::FailedPrecondition(text),
                }
            }
            other => called("exec")(other),
        })
    }
}

/// A pty: master and slave.
fn pty(size: Option<(u16, u16)>) -> Result<(OwnedFd, OwnedFd)> {
    let wrap = |error: nix::Error| Error::internal("make a terminal", error);
    let (width, height) = size.unwrap_or_default();
    let window = libc::winsize { ws_col: width, ws_row: height, ws_xpixel: 0, ws_ypixel: 0 };
    let made = nix::pty::openpty(size.is_some().then_some(&window), None).map_err(wrap)?;
    for fd in [&made.master, &made.slave] {
        // SAFETY: a live descriptor and a flag.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(wrap(nix::Error::last()));
        }
    }
    Ok((made.master, made.slave))
}
