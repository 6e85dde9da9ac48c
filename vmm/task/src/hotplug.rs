//! CPUs and memory that were plugged after boot, and what the guest uses of what it has.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_task::error::{Error, Result};
use vmm_common::guest::UsageResponse;

use crate::limits;

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";

/// `cpu<N>` or `memory<N>` directories.
fn numbered(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let is_one = |name: &str| {
        let number = name.strip_prefix(prefix).unwrap_or_default();
        !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_one))
        .map(|entry| entry.path())
        .collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim_end().to_owned()).unwrap_or_default()
}

/// How many CPUs of a list such as `0-3,5`.
fn count(list: &str) -> u32 {
    let number = |text: &str| text.trim().parse::<u32>().ok();
    list.split(',')
        .filter_map(|part| match part.split_once('-') {
            Some((from, to)) => number(to)?.checked_sub(number(from)?)?.checked_add(1),
            None => number(part).map(|_| 1),
        })
        .fold(0, u32::saturating_add)
}

/// CPUs that are online.
pub fn cpus() -> u32 {
    count(&read(&Path::new(CPUS).join("online"))).max(1)
}

/// Sets every CPU online that is there; answers how many are.
fn cpus_online(sys: &Path) -> u32 {
    for cpu in numbered(sys, "cpu") {
        let online = cpu.join("online");
        // The first one often has no switch.
        if read(&online) == "0" {
            let _ = fs::write(&online, "1");
        }
    }
    count(&read(&sys.join("online")))
}

/// Sets every block of memory online that is there; answers how many bytes are.
fn memory_online(sys: &Path) -> Option<u64> {
    let size = u64::from_str_radix(&read(&sys.join("block_size_bytes")), 16).ok()?;
    let mut bytes = 0u64;
    for block in numbered(sys, "memory") {
        let state = block.join("state");
        if read(&state) == "offline" {
            let _ = fs::write(&state, "online_movable").or_else(|_| fs::write(&state, "online"));
        }
        if read(&state) == "online" {
            bytes = bytes.saturating_add(size);
        }
    }
    Some(bytes)
}

/// Sets CPUs and memory online, and waits until there is as much as is wanted (0: whatever there
/// is). Answers CPUs and bytes.
///
/// # Errors
/// [`Error::DeadlineExceeded`] when less has appeared.
pub async fn online(wanted_cpus: u32, wanted_memory: u64) -> Result<(u32, u64)> {
    let what = format!("{wanted_cpus} CPUs and {wanted_memory} bytes of memory");
    crate::uevent::wait_for(&what, limits::ONLINE_TIME, || {
        let cpus = cpus_online(Path::new(CPUS));
        // A kernel without memory hot-plug has no blocks.
        let memory = memory_online(Path::new(MEMORY)).unwrap_or_else(total_memory);
        let enough = cpus >= wanted_cpus && memory >= wanted_memory;
        Ok(enough.then_some((cpus, memory)))
    })
    .await
}

/// A value of /proc/meminfo or smaps_rollup, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory that the kernel manages, in bytes.
pub fn total_memory() -> u64 {
    kilobytes(&read(Path::new("/proc/meminfo")), "MemTotal").unwrap_or_default()
}

/// Nanoseconds of CPU of everything in the guest.
fn cpu_ns(stat: &str) -> u64 {
    // Ticks of user, nice, system, then idle and iowait, then irq, softirq; 100 a second.
    let line = stat.lines().next().unwrap_or_default();
    let ticks = line.split_ascii_whitespace().skip(1).map(|n| n.parse::<u64>().unwrap_or(0));
    let busy = ticks.take(7).enumerate().filter(|(i, _)| !matches!(i, 3 | 4)).map(|(_, n)| n);
    busy.fold(0, u64::saturating_add).saturating_mul(10_000_000)
}

/// What the guest uses. Blocks.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn usage() -> Result<UsageResponse> {
    let failed = |error| Error::internal("read /proc", error);
    let memory = fs::read_to_string("/proc/meminfo").map_err(failed)?;
    let stat = fs::read_to_string("/proc/stat").map_err(failed)?;
    let own = read(Path::new("/proc/self/smaps_rollup"));
    Ok(UsageResponse {
        memory_total: kilobytes(&memory, "MemTotal").unwrap_or_default(),
        memory_available: kilobytes(&memory, "MemAvailable").unwrap_or_default(),
        agent_pss: kilobytes(&own, "Pss").unwrap_or_default(),
        cpu_ns: cpu_ns(&stat),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_tables_are_read() {
        assert_eq!(count("0-3,5"), 5);
        assert_eq!(count("0"), 1);
        assert_eq!(count(""), 0);
        assert_eq!(count("3-1,x,0-4294967295,1-"), 0);
        let text = "MemTotal:  1024 kB\nMemAvailable: 512 kB\n";
        assert_eq!(kilobytes(text, "MemAvailable"), Some(512 << 10));
        assert_eq!(kilobytes(text, "Mem"), None);
        assert_eq!(cpu_ns("cpu  1 2 3 1000 50 4 5 0 0 0\n"), 150_000_000);
        assert_eq!(cpu_ns(""), 0);
    }

    #[test]
    fn what_is_offline_is_set_online() {
        let sys = tempfile::tempdir().unwrap();
        let at = |p: &str| sys.path().join(p);
        for (path, text) in [
            ("cpu0/x", ""),
            ("cpu1/online", "0\n"),
            ("cpufreq/online", "0\n"),
            ("online", "0-1\n"),
            ("memory0/state", "online\n"),
            ("memory32/state", "offline\n"),
            ("block_size_bytes", "8000000\n"),
        ] {
            fs::create_dir_all(at(path).parent().unwrap()).unwrap();
            fs::write(at(path), text).unwrap();
        }
        assert_eq!(cpus_online(sys.path()), 2);
        assert_eq!(read(&at("cpu1/online")), "1");
        assert_eq!(read(&at("cpufreq/online")), "0");
        assert_eq!(memory_online(sys.path()), Some(0x800_0000));
        assert_eq!(read(&at("memory32/state")), "online_movable");
    }

    #[test]
    fn this_machine_is_measured() {
        let usage = usage().unwrap();
        assert!(usage.memory_total >= usage.memory_available && usage.cpu_ns > 0);
        assert!(cpus() >= 1 && total_memory() > 0);
    }
}
