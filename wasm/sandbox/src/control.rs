//! What is done to running programs: as to any container, and their linear memories follow the container's limit.

use async_trait::async_trait;
use containerd_task::error::Result;
use kuasar_oci::control::{Control, OnHost, Target};
use serde_json::Value;

use crate::config::ENGINES;

/// Everything on the host; the memory limit also in the process itself, where its worker looks
/// (`wasm_process::memory`).
pub struct Following;

#[async_trait]
impl Control for Following {
    async fn update(&self, target: &Target<'_>, resources: &[u8]) -> Result<()> {
        OnHost.update(target, resources).await?;
        let engine = target.engine()?;
        if let Some(limit) = limit(resources).filter(|_| ENGINES.contains(&engine.name())) {
            // It has ended, at the worst: the cgroup's limit holds in any case.
            if let Err(error) = tell(target.pid, limit) {
                tracing::debug!(container = target.id, %error, "memory limit of the program");
            }
        }
        Ok(())
    }
}

/// A new memory limit, where there is one; nothing but a number above 0 is a bound.
fn limit(resources: &[u8]) -> Option<u64> {
    let resources: Value = serde_json::from_slice(resources).ok()?;
    let limit = resources.pointer("/memory/limit")?.as_i64()?;
    Some(u64::try_from(limit).ok().filter(|limit| *limit > 0).unwrap_or(libc::RLIM_INFINITY))
}

fn tell(pid: u32, limit: u64) -> std::io::Result<()> {
    let pid = i32::try_from(pid).map_err(std::io::Error::other)?;
    // A soft limit alone: the hard one stays where it is.
    let mut both = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `both` is a rlimit that lives as long as the call.
    let asked = unsafe { libc::prlimit(pid, libc::RLIMIT_RSS, std::ptr::null(), &raw mut both) };
    if asked != 0 {
        return Err(std::io::Error::last_os_error());
    }
    both.rlim_cur = limit.min(both.rlim_max);
    // SAFETY: as above, and nothing is written.
    let told =
        unsafe { libc::prlimit(pid, libc::RLIMIT_RSS, &raw const both, std::ptr::null_mut()) };
    if told != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_memory_limit_is_read_and_none_is_none() {
        let of = |text: &str| limit(text.as_bytes());
        assert_eq!(of(r#"{"memory": {"limit": 4096}}"#), Some(4096));
        assert_eq!(of(r#"{"memory": {"limit": -1}}"#), Some(libc::RLIM_INFINITY));
        assert_eq!(of(r#"{"cpu": {"shares": 2}}"#), None);
        assert_eq!(of("no JSON"), None);
    }
}
