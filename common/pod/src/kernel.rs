//! What pods with an application kernel of their own have in common, whichever it is: one process
//! tree per pod, in a cgroup below the pod's, with a socket whose path has to be short.

use std::path::Path;

use containerd_sandbox::error::{Error, Result};
use containerd_sandbox::sandboxer::SandboxSpec;
use kuasar_host::{cgroup, record};
use kuasar_protos::cri::PodSandboxConfig;
use serde_json::json;

use crate::files::{self, host};

/// A short id for a pod's sockets, whose paths may only have 107 bytes.
#[must_use]
pub fn short_id(id: &str) -> String {
    // FNV-1a: names come from root, and one that is taken is refused.
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// Refuses what only the host's kernel has: user namespaces, and sysctls other than those that the
/// operator lets pass without effect. `kernel` is its name, for people.
///
/// # Errors
/// InvalidArgument, which says what to change.
pub fn check(kernel: &str, config: &PodSandboxConfig, ignored_sysctls: &[String]) -> Result<()> {
    if files::has_userns(config) {
        return Err(Error::InvalidArgument(format!(
            "pods with a user namespace do not run on {kernel}, which has users of its own: \
             hostUsers: true"
        )));
    }
    let mut asked = config.linux.sysctls.keys();
    if let Some(name) = asked.find(|name| !ignored_sysctls.contains(name)) {
        return Err(Error::InvalidArgument(format!(
            "sysctl {name:.100} cannot be set on {kernel}: remove it from the pod, or name it in \
             ignored_sysctls"
        )));
    }
    Ok(())
}

/// Path of the cgroup of the kernel's own processes.
#[must_use]
pub fn cgroup(sandbox: &SandboxSpec) -> String {
    match sandbox.config.linux.cgroup_parent.as_str() {
        "" => format!("/kuasar/{}/sandbox", sandbox.id),
        parent => format!("{}/{}", cgroup::expand_systemd(parent), sandbox.id),
    }
}

/// Writes the record by which the kernel's processes are found whatever happens: as if they were
/// a container, whose name no container can have.
///
/// # Errors
/// When it cannot be written.
pub fn write_record(sandbox: &Path, name: &str, cgroup: &str) -> Result<()> {
    let dir = sandbox.join("containers").join(name);
    record::private_dir(&dir).map_err(host("make the sandbox's record"))?;
    let text = json!({ "cgroup": cgroup }).to_string();
    record::write_file(&dir.join("meta.json"), text.as_bytes(), 0o600)
        .map_err(host("write the sandbox's record"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_id_is_a_good_name_and_tells_pods_apart() {
        let (a, b) = (short_id("pod-a"), short_id("pod-b"));
        assert_ne!(a, b);
        assert!(a.len() == 16 && a.chars().all(|c| c.is_ascii_hexdigit()));
    }

    #[test]
    fn what_the_kernel_does_not_have_is_refused_by_name() {
        let mut config = PodSandboxConfig::new();
        check("Kern", &config, &[]).unwrap();
        let sysctls = &mut config.linux.mut_or_insert_default().sysctls;
        sysctls.insert("net.core.somaxconn".into(), "1".into());
        let words = check("Kern", &config, &[]).unwrap_err().to_string();
        assert!(words.contains("net.core.somaxconn") && words.contains("Kern"), "{words}");
        check("Kern", &config, &["net.core.somaxconn".into()]).unwrap();
    }
}
