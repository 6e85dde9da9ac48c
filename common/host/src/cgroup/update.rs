//! OCI `LinuxResources` onto a running group.

use serde_json::Value;

use super::{Cgroup, Layout, write};
use crate::{Error, Result};

impl Cgroup {
    /// Applies the resources that are given; others stay as they are.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a wrong JSON type, [`Error::Io`] when the kernel refuses a value.
    pub fn update(&self, resources: &[u8]) -> Result<()> {
        let r: Value = serde_json::from_slice(resources)
            .map_err(|e| Error::Invalid(format!("resources are no LinuxResources JSON: {e}")))?;
        let int = |p: &str| r.pointer(p).and_then(Value::as_i64);
        let text = |p: &str| r.pointer(p).and_then(Value::as_str).filter(|s| !s.is_empty());
        match self.layout {
            Layout::V1(_) => self.update_v1(&int, &text),
            Layout::V2(_) => self.update_v2(&r, &int, &text),
        }
    }

    fn set(&self, controller: &str, file: &str, value: &str) -> Result<()> {
        match self.dir(controller).filter(|d| d.is_dir()) {
            Some(dir) => write(&dir, file, value),
            None => Ok(()),
        }
    }

    fn update_v1<'a>(
        &self,
        int: &dyn Fn(&str) -> Option<i64>,
        text: &dyn Fn(&str) -> Option<&'a str>,
    ) -> Result<()> {
        if let Some(v) = int("/cpu/shares").filter(|v| *v > 0) {
            self.set("cpu", "cpu.shares", &v.to_string())?;
        }
        let (period, quota) = (int("/cpu/period").filter(|v| *v > 0), int("/cpu/quota"));
        if let Some(p) = period {
            // Period and quota are checked against each other: whichever order fits is taken.
            if self.set("cpu", "cpu.cfs_period_us", &p.to_string()).is_err()
                && let Some(q) = quota.filter(|q| *q != 0)
            {
                self.set("cpu", "cpu.cfs_quota_us", &q.to_string())?;
                self.set("cpu", "cpu.cfs_period_us", &p.to_string())?;
            }
        }
        if let Some(q) = quota.filter(|q| *q != 0) {
            self.set("cpu", "cpu.cfs_quota_us", &q.to_string())?;
        }
        for (p, f) in [("/cpu/cpus", "cpuset.cpus"), ("/cpu/mems", "cpuset.mems")] {
            if let Some(v) = text(p) {
                self.set("cpuset", f, v)?;
            }
        }
        let limit = int("/memory/limit").filter(|v| *v != 0);
        let swap = int("/memory/swap").filter(|v| *v != 0);
        const LIMIT: &str = "memory.limit_in_bytes";
        const SWAP: &str = "memory.memsw.limit_in_bytes";
        let has_swap = self.dir("memory").is_some_and(|d| d.join(SWAP).exists());
        match (limit, swap.filter(|_| has_swap)) {
            (Some(l), Some(s)) => {
                // The memory limit may never be above the sum: raise the sum first, lower it last.
                let current = self.dir("memory").and_then(|d| {
                    std::fs::read_to_string(d.join(SWAP)).ok()?.trim().parse::<i64>().ok()
                });
                let (l, s) = ((LIMIT, l.to_string()), (SWAP, s.to_string()));
                let raise = swap == Some(-1) || current.is_some_and(|c| swap > Some(c));
                let (first, second) = if raise { (s, l) } else { (l, s) };
                self.set("memory", first.0, &first.1)?;
                self.set("memory", second.0, &second.1)?;
            }
            (Some(l), None) => self.set("memory", LIMIT, &l.to_string())?,
            (None, Some(s)) => self.set("memory", SWAP, &s.to_string())?,
            (None, None) => {}
        }
        if let Some(v) = int("/memory/reservation").filter(|v| *v != 0) {
            self.set("memory", "memory.soft_limit_in_bytes", &v.to_string())?;
        }
        if let Some(v) = int("/pids/limit").filter(|v| *v != 0) {
            self.set("pids", "pids.max", &max(v))?;
        }
        if let Some(v) = int("/blockIO/weight").filter(|v| *v > 0) {
            self.set("blkio", "blkio.weight", &v.to_string())?;
        }
        Ok(())
    }

    fn update_v2<'a>(
        &self,
        r: &Value,
        int: &dyn Fn(&str) -> Option<i64>,
        text: &dyn Fn(&str) -> Option<&'a str>,
    ) -> Result<()> {
        if let Some(v) = int("/cpu/shares").filter(|v| *v > 0) {
            // runc's and crun's formula: 2..262144 onto 1..10000.
            let weight = 1 + ((v.clamp(2, 262_144) - 2) * 9999) / 262_142;
            self.set("cpu", "cpu.weight", &weight.to_string())?;
        }
        let (period, quota) = (int("/cpu/period").filter(|v| *v > 0), int("/cpu/quota"));
        if period.is_some() || quota.is_some_and(|q| q != 0) {
            let q = quota.filter(|q| *q > 0).map_or("max".into(), |q| q.to_string());
            self.set("cpu", "cpu.max", &format!("{q} {}", period.unwrap_or(100_000)))?;
        }
        for (p, f) in [("/cpu/cpus", "cpuset.cpus"), ("/cpu/mems", "cpuset.mems")] {
            if let Some(v) = text(p) {
                self.set("cpuset", f, v)?;
            }
        }
        let limit = int("/memory/limit").filter(|v| *v != 0);
        if let Some(l) = limit {
            self.set("memory", "memory.max", &max(l))?;
        }
        if let Some(s) = int("/memory/swap").filter(|v| *v != 0) {
            // OCI counts memory and swap together, v2 swap alone.
            let swap = if s < 0 { s } else { (s - limit.unwrap_or(0)).max(0) };
            self.set("memory", "memory.swap.max", &max(swap))?;
        }
        if let Some(v) = int("/memory/reservation").filter(|v| *v != 0) {
            self.set("memory", "memory.low", &max(v))?;
        }
        if let Some(v) = int("/pids/limit").filter(|v| *v != 0) {
            self.set("pids", "pids.max", &max(v))?;
        }
        for (key, value) in r.get("unified").and_then(Value::as_object).into_iter().flatten() {
            let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b));
            match value.as_str() {
                Some(v) if plain && key.contains('.') => self.set("", key, v)?,
                _ => return Err(Error::Invalid(format!("unified: {key:?} is not allowed"))),
            }
        }
        Ok(())
    }
}

fn max(v: i64) -> String {
    if v < 0 { "max".into() } else { v.to_string() }
}
