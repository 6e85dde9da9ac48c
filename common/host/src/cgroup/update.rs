//! OCI `LinuxResources` onto a running group.

use std::fs;

use serde_json::Value;

use super::{Cgroup, Layout, write};
use crate::{Error, Result};

/// Resources as they came, read by JSON pointer.
struct Resources(Value);

impl Resources {
    /// Takes resources; a value of a wrong type is told, not taken for one that is not given.
    fn parse(json: &[u8]) -> Result<Self> {
        const NUMBERS: [&str; 11] = [
            "/blockIO/weight",
            "/cpu/burst",
            "/cpu/idle",
            "/cpu/period",
            "/cpu/quota",
            "/cpu/shares",
            "/memory/limit",
            "/memory/reservation",
            "/memory/swap",
            "/memory/swappiness",
            "/pids/limit",
        ];
        let r: Value = serde_json::from_slice(json)
            .map_err(|e| Error::Invalid(format!("resources are no LinuxResources JSON: {e}")))?;
        if !r.is_object() {
            return Err(Error::Invalid("resources are no LinuxResources JSON object".into()));
        }
        let wrong = |pointer: &&&str, ok: fn(&Value) -> bool| {
            r.pointer(pointer).is_some_and(|v| !v.is_null() && !ok(v))
        };
        let integer: fn(&Value) -> bool = |v| v.is_i64() || v.is_u64();
        if let Some(p) = NUMBERS.iter().find(|p| wrong(p, integer)) {
            return Err(Error::Invalid(format!("resources: {p}: expected an integer")));
        }
        if let Some(p) = ["/cpu/cpus", "/cpu/mems"].iter().find(|p| wrong(p, Value::is_string)) {
            return Err(Error::Invalid(format!("resources: {p}: expected a string")));
        }
        Ok(Self(r))
    }

    fn int(&self, pointer: &str) -> Option<i64> {
        let v = self.0.pointer(pointer)?;
        // Limits above i64 are "no limit" in other words.
        v.as_i64().or_else(|| v.as_u64().map(|_| i64::MAX))
    }
    /// A value that is given and not 0; in the spec's Go types 0 means "not given".
    fn set(&self, pointer: &str) -> Option<i64> {
        self.int(pointer).filter(|v| *v != 0)
    }
    fn text(&self, pointer: &str) -> Option<&str> {
        self.0.pointer(pointer)?.as_str().filter(|s| !s.is_empty())
    }
    fn list(&self, pointer: &str) -> impl Iterator<Item = &Value> {
        self.0.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
    }
    /// `major:minor` and the value of one of its keys, of each device of a list.
    fn devices(&self, pointer: &str, key: &str) -> Vec<(String, u64)> {
        let one = |d: &Value| {
            let n = |k: &str| d.get(k).and_then(Value::as_u64);
            Some((format!("{}:{}", n("major")?, n("minor")?), n(key)?))
        };
        self.list(pointer).filter_map(one).collect()
    }
    /// Page size (`2MB`) and limit in bytes of each huge page limit.
    fn hugepages(&self) -> Result<Vec<(&str, u64)>> {
        let mut all = Vec::new();
        for (i, h) in self.list("/hugepageLimits").enumerate() {
            let size = h.get("pageSize").and_then(Value::as_str).unwrap_or_default();
            // The size becomes part of a file's name.
            if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return Err(Error::Invalid(format!("/hugepageLimits/{i}/pageSize: bad {size:?}")));
            }
            all.push((size, h.get("limit").and_then(Value::as_u64).unwrap_or(0)));
        }
        Ok(all)
    }
}

impl Cgroup {
    /// Applies the resources that are given; others stay as they are. A controller that the host
    /// lacks is skipped.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a wrong JSON type, [`Error::Io`] when the kernel refuses a value.
    pub fn update(&self, resources: &[u8]) -> Result<()> {
        let r = Resources::parse(resources)?;
        match self.layout {
            Layout::V1(_) => self.update_v1(&r),
            Layout::V2(_) => self.update_v2(&r),
        }
    }

    fn set(&self, controller: &str, file: &str, value: &str) -> Result<()> {
        match self.dir(controller).filter(|d| d.is_dir()) {
            Some(dir) => write(&dir, file, value),
            None => Ok(()),
        }
    }

    /// As [`Self::set`], but for a file that not every kernel has.
    fn set_if_there(&self, controller: &str, file: &str, value: &str) -> Result<()> {
        match self.dir(controller).filter(|d| d.join(file).exists()) {
            Some(dir) => write(&dir, file, value),
            None => Ok(()),
        }
    }

    fn text(&self, controller: &str, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.dir(controller)?.join(file)).ok()?.trim().to_owned())
    }

    fn update_v1(&self, r: &Resources) -> Result<()> {
        if r.0.get("unified").and_then(Value::as_object).is_some_and(|u| !u.is_empty()) {
            return Err(Error::Unsupported("`unified` resources need cgroup v2".into()));
        }
        if let Some(v) = r.int("/cpu/idle") {
            self.set_if_there("cpu", "cpu.idle", &v.to_string())?;
        }
        if let Some(v) = r.set("/cpu/shares").filter(|v| *v > 0) {
            self.set("cpu", "cpu.shares", &v.to_string())?;
        }
        self.bandwidth_v1(r)?;
        self.cpuset(r)?;
        self.limit_memory_v1(r)?;
        if let Some(v) = r.set("/pids/limit") {
            self.set("pids", "pids.max", &max(v))?;
        }
        self.block_v1(r)?;
        self.limit_hugepages(r, "limit_in_bytes")
    }

    /// What is reserved counts, too, where the kernel can count it: a mapping that is too large fails,
    /// instead of its use (SIGBUS). `file` is what the limit is called.
    fn limit_hugepages(&self, r: &Resources, file: &str) -> Result<()> {
        for (size, limit) in r.hugepages()? {
            let limit = limit.to_string();
            self.set("hugetlb", &format!("hugetlb.{size}.{file}"), &limit)?;
            self.set_if_there("hugetlb", &format!("hugetlb.{size}.rsvd.{file}"), &limit)?;
        }
        Ok(())
    }

    /// Quota, period and burst: the kernel checks them against each other, and against parent and
    /// children, at each write. Whichever order fits is taken.
    fn bandwidth_v1(&self, r: &Resources) -> Result<()> {
        let burst = r.int("/cpu/burst").map(|v| v.to_string());
        let early = burst.as_deref().map(|b| self.set_if_there("cpu", "cpu.cfs_burst_us", b));
        let quota = r.set("/cpu/quota").map(|v| v.to_string());
        let period = r.set("/cpu/period").filter(|v| *v > 0).map(|v| v.to_string());
        if let Some(p) = period
            && let Err(e) = self.set("cpu", "cpu.cfs_period_us", &p)
        {
            let Some(q) = &quota else { return Err(e) };
            self.set("cpu", "cpu.cfs_quota_us", q)?;
            self.set("cpu", "cpu.cfs_period_us", &p)?;
        }
        if let Some(q) = quota {
            self.set("cpu", "cpu.cfs_quota_us", &q)?;
        }
        match (early, burst) {
            (Some(Err(_)), Some(b)) => self.set_if_there("cpu", "cpu.cfs_burst_us", &b),
            _ => Ok(()),
        }
    }

    fn cpuset(&self, r: &Resources) -> Result<()> {
        for (p, f) in [("/cpu/cpus", "cpuset.cpus"), ("/cpu/mems", "cpuset.mems")] {
            if let Some(v) = r.text(p) {
                self.set("cpuset", f, v)?;
            }
        }
        Ok(())
    }

    fn limit_memory_v1(&self, r: &Resources) -> Result<()> {
        const LIMIT: &str = "memory.limit_in_bytes";
        const SWAP: &str = "memory.memsw.limit_in_bytes";
        let has_swap = self.dir("memory").is_some_and(|d| d.join(SWAP).exists());
        let (limit, mut swap) = (r.set("/memory/limit"), r.set("/memory/swap"));
        if limit == Some(-1) && swap.is_none() {
            // Without a memory limit the sum of both may not stay limited.
            swap = Some(-1);
        }
        match (limit, swap.filter(|_| has_swap)) {
            (Some(l), Some(s)) => {
                // The memory limit may never be above the sum: raise the sum first, lower it last.
                let current = self.text("memory", SWAP).and_then(|t| t.parse::<i64>().ok());
                let (l, v) = ((LIMIT, l.to_string()), (SWAP, s.to_string()));
                let raise = s == -1 || current.is_some_and(|c| s > c);
                let (first, second) = if raise { (v, l) } else { (l, v) };
                self.set("memory", first.0, &first.1)?;
                self.set("memory", second.0, &second.1)?;
            }
            (Some(l), None) => self.set("memory", LIMIT, &l.to_string())?,
            (None, Some(s)) => self.set("memory", SWAP, &s.to_string())?,
            (None, None) => {}
        }
        if let Some(v) = r.set("/memory/reservation") {
            self.set("memory", "memory.soft_limit_in_bytes", &v.to_string())?;
        }
        if let Some(v) = r.int("/memory/swappiness").filter(|v| (0..=100).contains(v)) {
            self.set_if_there("memory", "memory.swappiness", &v.to_string())?;
        }
        if r.0.pointer("/memory/disableOOMKiller").and_then(Value::as_bool) == Some(true) {
            self.set("memory", "memory.oom_control", "1")?;
        }
        Ok(())
    }

    fn block_v1(&self, r: &Resources) -> Result<()> {
        if let Some(v) = r.set("/blockIO/weight").filter(|v| *v > 0) {
            // BFQ's file since Linux 5.0; CFQ's before.
            let bfq = self.dir("blkio").is_some_and(|d| d.join("blkio.bfq.weight").exists());
            let file = if bfq { "blkio.bfq.weight" } else { "blkio.weight" };
            self.set_if_there("blkio", file, &v.to_string())?;
        }
        for (list, file) in [
            ("/blockIO/throttleReadBpsDevice", "blkio.throttle.read_bps_device"),
            ("/blockIO/throttleWriteBpsDevice", "blkio.throttle.write_bps_device"),
            ("/blockIO/throttleReadIOPSDevice", "blkio.throttle.read_iops_device"),
            ("/blockIO/throttleWriteIOPSDevice", "blkio.throttle.write_iops_device"),
        ] {
            for (device, rate) in r.devices(list, "rate") {
                self.set("blkio", file, &format!("{device} {rate}"))?;
            }
        }
        Ok(())
    }

    fn update_v2(&self, r: &Resources) -> Result<()> {
        if let Some(v) = r.int("/cpu/idle") {
            self.set_if_there("cpu", "cpu.idle", &v.to_string())?;
        }
        // The weight of an idle group cannot be written.
        if let Some(v) = r.set("/cpu/shares").filter(|v| *v > 0)
            && r.int("/cpu/idle") != Some(1)
        {
            self.set_if_there("cpu", "cpu.weight", &weight(v).to_string())?;
        }
        self.bandwidth_v2(r)?;
        self.cpuset(r)?;
        self.memory_v2(r)?;
        if let Some(v) = r.set("/pids/limit") {
            self.set("pids", "pids.max", &max(v))?;
        }
        self.block_v2(r)?;
        self.limit_hugepages(r, "max")?;
        for (key, value) in r.0.get("unified").and_then(Value::as_object).into_iter().flatten() {
            let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            // `cgroup.*` moves processes and controllers: that is not a resource.
            match value.as_str() {
                Some(v) if plain && key.contains('.') && !key.starts_with("cgroup.") => {
                    // Files with one line per device or key take one line per write.
                    for line in v.lines() {
                        self.set("", key, line)?;
                    }
                }
                _ => {
                    return Err(Error::Invalid(format!("/unified/{key}: not a resource file")));
                }
            }
        }
        Ok(())
    }

    fn bandwidth_v2(&self, r: &Resources) -> Result<()> {
        let burst = r.int("/cpu/burst").map(|v| v.to_string());
        let early = burst.as_deref().map(|b| self.set_if_there("cpu", "cpu.max.burst", b));
        let (period, quota) = (r.set("/cpu/period").filter(|v| *v > 0), r.set("/cpu/quota"));
        if period.is_some() || quota.is_some() {
            // What is not given stays: the kernel keeps the period itself, not the quota.
            let current = self.text("cpu", "cpu.max").unwrap_or_default();
            let kept = || current.split(' ').next().filter(|s| !s.is_empty()).map(str::to_owned);
            let q = match quota {
                Some(q) => max(q),
                None => kept().unwrap_or_else(|| "max".into()),
            };
            let p = period.map(|p| format!(" {p}")).unwrap_or_default();
            self.set("cpu", "cpu.max", &format!("{q}{p}"))?;
        }
        match (early, burst) {
            (Some(Err(_)), Some(b)) => self.set_if_there("cpu", "cpu.max.burst", &b),
            _ => Ok(()),
        }
    }

    fn memory_v2(&self, r: &Resources) -> Result<()> {
        let limit = r.set("/memory/limit");
        let swap = r.set("/memory/swap").or(if limit == Some(-1) { Some(-1) } else { None });
        if let Some(s) = swap {
            // OCI counts memory and swap together, v2 swap alone.
            let known = || self.text("memory", "memory.max")?.parse::<i64>().ok();
            let swap = match (s < 0, limit.filter(|l| *l > 0).or_else(known)) {
                (true, _) => -1,
                (false, Some(l)) if s >= l => s - l,
                (false, Some(_)) => {
                    return Err(Error::Invalid(
                        "/memory/swap: memory and swap together cannot be less than memory".into(),
                    ));
                }
                (false, None) => {
                    return Err(Error::Invalid(
                        "/memory/swap: a limit needs a memory limit too".into(),
                    ));
                }
            };
            // Kernels without swap accounting have no such file; without swap nothing is lost.
            self.set_if_there("memory", "memory.swap.max", &max(swap))?;
        }
        if let Some(l) = limit {
            self.set("memory", "memory.max", &max(l))?;
        }
        if let Some(v) = r.set("/memory/reservation") {
            self.set("memory", "memory.low", &max(v))?;
        }
        Ok(())
    }

    fn block_v2(&self, r: &Resources) -> Result<()> {
        if let Some(v) = r.set("/blockIO/weight").filter(|v| *v > 0) {
            // BFQ takes 1 to 1000 as v1 did; io.weight 1 to 10000.
            if self.dir("io").is_some_and(|d| d.join("io.bfq.weight").exists()) {
                self.set("io", "io.bfq.weight", &v.to_string())?;
            } else {
                let weight = 1 + ((v.clamp(10, 1000) - 10) * 9999) / 990;
                self.set_if_there("io", "io.weight", &format!("default {weight}"))?;
            }
        }
        for (list, key) in [
            ("/blockIO/throttleReadBpsDevice", "rbps"),
            ("/blockIO/throttleWriteBpsDevice", "wbps"),
            ("/blockIO/throttleReadIOPSDevice", "riops"),
            ("/blockIO/throttleWriteIOPSDevice", "wiops"),
        ] {
            for (device, rate) in r.devices(list, "rate") {
                let rate = if rate == 0 { "max".into() } else { rate.to_string() };
                self.set("io", "io.max", &format!("{device} {key}={rate}"))?;
            }
        }
        Ok(())
    }
}

fn max(v: i64) -> String {
    if v < 0 { "max".into() } else { v.to_string() }
}

/// v1's cpu shares as a v2 weight. The quadratic formula of runc 1.4 and crun 1.23, which maps
/// 2 → 1, 1024 → 100 and 262144 → 10000; the older linear one made 39 of the default 1024.
fn weight(shares: i64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let l = (shares as f64).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    10f64.powf(exponent).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A directory of empty files in a group's place.
    fn fake(dir: &Path, files: &[(&str, &str)]) -> Cgroup {
        let g = dir.join("g");
        fs::create_dir_all(&g).unwrap();
        for (name, text) in files {
            fs::write(g.join(name), text).unwrap();
        }
        Layout::V2(dir.into()).group("/g").unwrap()
    }

    fn read(dir: &Path, file: &str) -> String {
        fs::read_to_string(dir.join("g").join(file)).unwrap()
    }

    #[test]
    fn a_value_of_a_wrong_type_is_named() {
        let g = fake(tempfile::tempdir().unwrap().path(), &[]);
        for (text, pointer) in [
            (&br#"{"memory":{"limit":"much"}}"#[..], "/memory/limit"),
            (br#"{"cpu":{"quota":1.5}}"#, "/cpu/quota"),
            (br#"{"cpu":{"cpus":3}}"#, "/cpu/cpus"),
            (b"[]", "object"),
        ] {
            let e = g.update(text).unwrap_err();
            assert!(matches!(&e, Error::Invalid(t) if t.contains(pointer)), "{e}");
        }
        g.update(br#"{"cpu":{"quota":null}}"#).unwrap();
    }

    #[test]
    fn shares_become_the_weights_that_runc_gives() {
        let pairs = [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (1 << 40, 10_000)];
        for (shares, expected) in pairs {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn v2_files_get_what_the_spec_says() {
        let dir = tempfile::tempdir().unwrap();
        let there = [
            ("cpu.weight", ""),
            ("memory.swap.max", ""),
            ("cpu.max", "50000 100000"),
            ("hugetlb.2MB.rsvd.max", "max"),
        ];
        let g = fake(dir.path(), &there);
        g.update(
            br#"{"cpu":{"shares":1024,"period":20000},"memory":{"limit":100,"swap":150},
                "pids":{"limit":-1},"hugepageLimits":[{"pageSize":"2MB","limit":7}],
                "blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":5}]},
                "unified":{"memory.high":"9"}}"#,
        )
        .unwrap();
        for (file, text) in [
            ("cpu.weight", "100"),
            ("cpu.max", "50000 20000"),
            ("memory.max", "100"),
            ("memory.swap.max", "50"),
            ("pids.max", "max"),
            ("hugetlb.2MB.max", "7"),
            ("hugetlb.2MB.rsvd.max", "7"),
            ("io.max", "8:0 rbps=5"),
            ("memory.high", "9"),
        ] {
            assert_eq!(read(dir.path(), file), text, "{file}");
        }
    }

    #[test]
    fn resources_cannot_reach_other_files() {
        let dir = tempfile::tempdir().unwrap();
        let g = fake(dir.path(), &[]);
        for bad in [
            &br#"{"unified":{"../x.y":"1"}}"#[..],
            br#"{"unified":{"cgroup.procs":"1"}}"#,
            br#"{"hugepageLimits":[{"pageSize":"../a","limit":1}]}"#,
            br#"{"memory":{"limit":100,"swap":50}}"#,
            b"[]",
            b"{",
        ] {
            assert!(matches!(g.update(bad), Err(Error::Invalid(_))), "{bad:?}");
        }
    }
}
