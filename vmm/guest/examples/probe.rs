//! The smallest `/init`: proves a guest kernel, and measures it, without the rest of the project.
//!
//! It says on the console that it runs, dials the host over vsock, reads a file of the share
//! `kuasar`, reports, waits for the host's answer and ends the machine.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::fd::{AsRawFd, OwnedFd},
};

use anyhow::Context;
use nix::{
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket},
        time::TimeValLike,
    },
    time::{ClockId, clock_gettime},
};

/// The host's context id and the port that the test listens on.
const HOST: (u32, u32) = (2, 1023);

fn micros() -> anyhow::Result<i64> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.num_microseconds())
}

fn attach(kind: &str, source: &str, at: &str) -> anyhow::Result<()> {
    mount(Some(source), at, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount {kind} at {at}"))
}

/// One value of /proc/meminfo, in kB.
fn meminfo(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .find_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn run() -> anyhow::Result<()> {
    let init = micros()?;
    println!("probe: init");
    let socket: OwnedFd =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST.0, HOST.1)).context("dial the host")?;
    let connected = micros()?;
    let mut host = fs::File::from(socket);
    host.write_all(b"hello\n")?;
    attach("proc", "proc", "/proc")?;
    attach("sysfs", "sysfs", "/sys")?;
    attach("cgroup2", "cgroup2", "/sys/fs/cgroup")?;
    attach("tmpfs", "tmpfs", "/tmp")?;
    let before = micros()?;
    fs::create_dir("/tmp/share")?;
    let share = match attach("virtiofs", "kuasar", "/tmp/share") {
        Ok(()) => fs::read_to_string("/tmp/share/hello").context("read the share")?,
        Err(e) => format!("{e:#}"),
    };
    let shared = micros()? - before;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    let clock =
        fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let (total, free) = (meminfo(&memory, "MemTotal"), meminfo(&memory, "MemFree"));
    let available = meminfo(&memory, "MemAvailable");
    writeln!(
        host,
        "init_us={init} connected_us={connected} share_us={shared} share={} total_kb={total} free_kb={free} \
         available_kb={available} clock={} release={} controllers={}",
        share.trim().replace(' ', "_"),
        clock.trim(),
        release.trim(),
        controllers.trim().replace(' ', ","),
    )?;
    let mut answer = String::new();
    BufReader::new(host).read_line(&mut answer)?;
    Ok(())
}

fn main() {
    if let Err(e) = run() {
        println!("probe: {e:#}");
    }
    // Only PID 1 of a guest may get here: anywhere else this would restart the machine that it runs on.
    if std::process::id() == 1 {
        let _ = reboot(RebootMode::RB_AUTOBOOT);
    }
}
