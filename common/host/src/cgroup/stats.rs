//! Metrics of a group as containerd's messages.
//!
//! All parts of the v1 message are always present, also where the host lacks the controller:
//! iSulad reads through them without asking.

use std::fs;
use std::path::Path;

use kuasar_protos::shim::cgroups::metrics as v1;
use kuasar_protos::shim::cgroups_v2::metrics as v2;
use protobuf::{Message, MessageField};

use super::{Cgroup, Layout};

/// Type URL of v1 metrics. containerd accepts these two names exactly.
pub const V1_TYPE: &str = "io.containerd.cgroups.v1.Metrics";
/// Type URL of v2 metrics.
pub const V2_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// A file of `key value` lines, or of one value.
struct Flat(String);

impl Flat {
    fn read(dir: &Option<std::path::PathBuf>, file: &str) -> Self {
        let text = dir.as_ref().and_then(|d| fs::read_to_string(d.join(file)).ok());
        Self(text.unwrap_or_default())
    }
    fn get(&self, key: &str) -> u64 {
        let value = |l: &str| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok();
        self.0.lines().find_map(value).unwrap_or(0)
    }
    /// The one value; `max` is the largest number.
    fn value(&self) -> u64 {
        let t = self.0.trim();
        if t == "max" { u64::MAX } else { t.parse().unwrap_or(0) }
    }
}

impl Cgroup {
    /// Metrics in the flavour of the host: type URL and message.
    pub fn metrics(&self) -> (String, Vec<u8>) {
        match self.layout {
            Layout::V1(_) => self.metrics_v1(),
            Layout::V2(_) => (V2_TYPE.into(), self.unified().write_to_bytes().unwrap_or_default()),
        }
    }

    /// Metrics as the v1 message whatever the host has.
    pub fn metrics_v1(&self) -> (String, Vec<u8>) {
        let m = match self.layout {
            Layout::V1(_) => self.split(),
            Layout::V2(_) => from_unified(&self.unified()),
        };
        (V1_TYPE.into(), m.write_to_bytes().unwrap_or_default())
    }

    fn split(&self) -> v1::Metrics {
        let mut m = v1::Metrics::new();
        let pids = self.dir("pids");
        let p = m.pids.mut_or_insert_default();
        p.current = Flat::read(&pids, "pids.current").value();
        p.limit = match Flat::read(&pids, "pids.max").value() {
            u64::MAX => 0,
            n => n,
        };
        let acct = self.dir("cpuacct");
        let stat = Flat::read(&acct, "cpuacct.stat");
        let cpu = m.cpu.mut_or_insert_default();
        let usage = cpu.usage.mut_or_insert_default();
        usage.total = Flat::read(&acct, "cpuacct.usage").value();
        // USER_HZ is 100 on every platform that Linux calls generic; nanoseconds are wanted.
        usage.user = stat.get("user") * 10_000_000;
        usage.kernel = stat.get("system") * 10_000_000;
        let per_cpu = Flat::read(&acct, "cpuacct.usage_percpu");
        usage.per_cpu = per_cpu.0.split_whitespace().filter_map(|v| v.parse().ok()).collect();
        let stat = Flat::read(&self.dir("cpu"), "cpu.stat");
        let t = cpu.throttling.mut_or_insert_default();
        t.periods = stat.get("nr_periods");
        t.throttled_periods = stat.get("nr_throttled");
        t.throttled_time = stat.get("throttled_time");
        self.memory_v1(&mut m);
        let b = m.blkio.mut_or_insert_default();
        let blkio = self.dir("blkio");
        b.io_service_bytes_recursive = block(&blkio, "blkio.throttle.io_service_bytes_recursive");
        b.io_serviced_recursive = block(&blkio, "blkio.throttle.io_serviced_recursive");
        m.rdma = MessageField::some(v1::RdmaStat::new());
        m.cgroup_stats = MessageField::some(v1::CgroupStats::new());
        m
    }

    fn memory_v1(&self, m: &mut v1::Metrics) {
        let dir = self.dir("memory");
        let s = Flat::read(&dir, "memory.stat");
        let memory = m.memory.mut_or_insert_default();
        memory.cache = s.get("cache");
        memory.rss = s.get("rss");
        memory.rss_huge = s.get("rss_huge");
        memory.mapped_file = s.get("mapped_file");
        memory.dirty = s.get("dirty");
        memory.writeback = s.get("writeback");
        memory.pg_pg_in = s.get("pgpgin");
        memory.pg_pg_out = s.get("pgpgout");
        memory.pg_fault = s.get("pgfault");
        memory.pg_maj_fault = s.get("pgmajfault");
        memory.inactive_anon = s.get("inactive_anon");
        memory.active_anon = s.get("active_anon");
        memory.inactive_file = s.get("inactive_file");
        memory.active_file = s.get("active_file");
        memory.unevictable = s.get("unevictable");
        memory.hierarchical_memory_limit = s.get("hierarchical_memory_limit");
        memory.hierarchical_swap_limit = s.get("hierarchical_memsw_limit");
        memory.total_cache = s.get("total_cache");
        memory.total_rss = s.get("total_rss");
        memory.total_rss_huge = s.get("total_rss_huge");
        memory.total_mapped_file = s.get("total_mapped_file");
        memory.total_dirty = s.get("total_dirty");
        memory.total_writeback = s.get("total_writeback");
        memory.total_pg_pg_in = s.get("total_pgpgin");
        memory.total_pg_pg_out = s.get("total_pgpgout");
        memory.total_pg_fault = s.get("total_pgfault");
        memory.total_pg_maj_fault = s.get("total_pgmajfault");
        memory.total_inactive_anon = s.get("total_inactive_anon");
        memory.total_active_anon = s.get("total_active_anon");
        memory.total_inactive_file = s.get("total_inactive_file");
        memory.total_active_file = s.get("total_active_file");
        memory.total_unevictable = s.get("total_unevictable");
        let entry = |prefix: &str| {
            let mut e = v1::MemoryEntry::new();
            let file = |f: &str| Flat::read(&dir, &format!("{prefix}.{f}")).value();
            e.limit = file("limit_in_bytes");
            e.usage = file("usage_in_bytes");
            e.max = file("max_usage_in_bytes");
            e.failcnt = file("failcnt");
            MessageField::some(e)
        };
        memory.usage = entry("memory");
        memory.swap = entry("memory.memsw");
        memory.kernel = entry("memory.kmem");
        memory.kernel_tcp = entry("memory.kmem.tcp");
        let oom = Flat::read(&dir, "memory.oom_control");
        let o = m.memory_oom_control.mut_or_insert_default();
        o.oom_kill_disable = oom.get("oom_kill_disable");
        o.under_oom = oom.get("under_oom");
        o.oom_kill = oom.get("oom_kill");
    }

    fn unified(&self) -> v2::Metrics {
        let dir = self.dir("");
        let one = |f: &str| Flat::read(&dir, f).value();
        let mut m = v2::Metrics::new();
        let p = m.pids.mut_or_insert_default();
        p.current = one("pids.current");
        p.limit = one("pids.max");
        let s = Flat::read(&dir, "cpu.stat");
        let cpu = m.cpu.mut_or_insert_default();
        cpu.usage_usec = s.get("usage_usec");
        cpu.user_usec = s.get("user_usec");
        cpu.system_usec = s.get("system_usec");
        cpu.nr_periods = s.get("nr_periods");
        cpu.nr_throttled = s.get("nr_throttled");
        cpu.throttled_usec = s.get("throttled_usec");
        let s = Flat::read(&dir, "memory.stat");
        let memory = m.memory.mut_or_insert_default();
        memory.anon = s.get("anon");
        memory.file = s.get("file");
        memory.kernel_stack = s.get("kernel_stack");
        memory.slab = s.get("slab");
        memory.sock = s.get("sock");
        memory.shmem = s.get("shmem");
        memory.file_mapped = s.get("file_mapped");
        memory.file_dirty = s.get("file_dirty");
        memory.file_writeback = s.get("file_writeback");
        memory.anon_thp = s.get("anon_thp");
        memory.inactive_anon = s.get("inactive_anon");
        memory.active_anon = s.get("active_anon");
        memory.inactive_file = s.get("inactive_file");
        memory.active_file = s.get("active_file");
        memory.unevictable = s.get("unevictable");
        memory.slab_reclaimable = s.get("slab_reclaimable");
        memory.slab_unreclaimable = s.get("slab_unreclaimable");
        memory.pgfault = s.get("pgfault");
        memory.pgmajfault = s.get("pgmajfault");
        memory.usage = one("memory.current");
        memory.usage_limit = one("memory.max");
        memory.swap_usage = one("memory.swap.current");
        memory.swap_limit = one("memory.swap.max");
        memory.max_usage = one("memory.peak");
        let s = Flat::read(&dir, "memory.events");
        let e = m.memory_events.mut_or_insert_default();
        e.low = s.get("low");
        e.high = s.get("high");
        e.max = s.get("max");
        e.oom = s.get("oom");
        e.oom_kill = s.get("oom_kill");
        e.oom_group_kill = s.get("oom_group_kill");
        let io = m.io.mut_or_insert_default();
        for line in Flat::read(&dir, "io.stat").0.lines() {
            let mut words = line.split_whitespace();
            let Some((major, minor)) = words.next().and_then(device) else { continue };
            let mut entry = v2::IOEntry::new();
            (entry.major, entry.minor) = (major, minor);
            for (key, value) in words.filter_map(|w| w.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            io.usage.push(entry);
        }
        m
    }
}

fn device(word: &str) -> Option<(u64, u64)> {
    let (major, minor) = word.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn block(dir: &Option<std::path::PathBuf>, file: &str) -> Vec<v1::BlkIOEntry> {
    let line = |l: &str| {
        let mut words = l.split_whitespace();
        let (major, minor) = device(words.next()?)?;
        let mut e = v1::BlkIOEntry::new();
        (e.major, e.minor) = (major, minor);
        e.op = words.next()?.into();
        e.value = words.next()?.parse().ok()?;
        e.device = block_name(major, minor);
        Some(e)
    };
    Flat::read(dir, file).0.lines().filter_map(line).collect()
}

fn block_name(major: u64, minor: u64) -> String {
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok();
    let name = link.as_deref().and_then(Path::file_name);
    name.map(|n| format!("/dev/{}", n.to_string_lossy())).unwrap_or_default()
}

/// The nearest v1 message to v2 metrics, for engines that know no other.
fn from_unified(m: &v2::Metrics) -> v1::Metrics {
    let mut out = v1::Metrics::new();
    let p = out.pids.mut_or_insert_default();
    (p.current, p.limit) = (m.pids.current, m.pids.limit);
    let cpu = out.cpu.mut_or_insert_default();
    let usage = cpu.usage.mut_or_insert_default();
    usage.total = m.cpu.usage_usec * 1000;
    usage.user = m.cpu.user_usec * 1000;
    usage.kernel = m.cpu.system_usec * 1000;
    let t = cpu.throttling.mut_or_insert_default();
    t.periods = m.cpu.nr_periods;
    t.throttled_periods = m.cpu.nr_throttled;
    t.throttled_time = m.cpu.throttled_usec * 1000;
    let memory = out.memory.mut_or_insert_default();
    (memory.cache, memory.rss) = (m.memory.file, m.memory.anon);
    (memory.total_cache, memory.total_rss) = (m.memory.file, m.memory.anon);
    memory.total_inactive_file = m.memory.inactive_file;
    memory.inactive_file = m.memory.inactive_file;
    let u = memory.usage.mut_or_insert_default();
    (u.usage, u.limit, u.max) = (m.memory.usage, m.memory.usage_limit, m.memory.max_usage);
    let s = memory.swap.mut_or_insert_default();
    s.usage = m.memory.usage.saturating_add(m.memory.swap_usage);
    s.limit = m.memory.usage_limit.saturating_add(m.memory.swap_limit);
    memory.kernel = MessageField::some(v1::MemoryEntry::new());
    memory.kernel_tcp = MessageField::some(v1::MemoryEntry::new());
    out.memory_oom_control.mut_or_insert_default().oom_kill = m.memory_events.oom_kill;
    out.blkio = MessageField::some(v1::BlkIOStat::new());
    out.rdma = MessageField::some(v1::RdmaStat::new());
    out.cgroup_stats = MessageField::some(v1::CgroupStats::new());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_v1_message_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let v2 = Layout::V2(dir.path().into()).group("/a").unwrap();
        let v1 = Layout::V1(std::collections::BTreeMap::new()).group("/a").unwrap();
        for group in [v1, v2] {
            let (url, bytes) = group.metrics_v1();
            assert_eq!(url, V1_TYPE);
            let m = v1::Metrics::parse_from_bytes(&bytes).unwrap();
            assert!(m.pids.is_some() && m.cpu.usage.is_some() && m.cpu.throttling.is_some());
            assert!(m.memory.usage.is_some() && m.memory.swap.is_some());
            assert!(m.memory.kernel.is_some() && m.memory.kernel_tcp.is_some());
            assert!(m.blkio.is_some() && m.rdma.is_some() && m.memory_oom_control.is_some());
        }
    }
}
