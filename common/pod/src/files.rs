//! What a pod needs on the host before it starts: its `/etc` files, its `/dev/shm`, its cgroup; and what a
//! lost one has left mounted.

use std::path::Path;
use std::time::Duration;

use containerd_sandbox::error::{Error, Result};
use kuasar_host::cgroup::Layout;
use kuasar_host::{dns, record};
use kuasar_protos::cri::{LinuxContainerResources, NamespaceMode, PodSandboxConfig};
use serde_json::{Value, json};

use kuasar_oci::pod::Modes;

/// A kuasar-host error as the Controller answers it.
pub fn host(what: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let what = what.into();
    move |error| match error {
        kuasar_host::Error::Invalid(text) => Error::InvalidArgument(format!("{what}: {text}")),
        other => Error::internal(what, other),
    }
}

/// The hostname of a pod: its own, or the host's.
pub fn hostname(config: &PodSandboxConfig, modes: Modes) -> Result<String> {
    if modes.host_network || config.hostname.is_empty() {
        return std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|name| name.trim().to_owned())
            .map_err(|error| Error::internal("read the host's name", error));
    }
    let name = &config.hostname;
    if name.len() > 64 || name.chars().any(|c| c.is_control() || c.is_whitespace() || c == '/') {
        return Err(Error::InvalidArgument(format!(
            "hostname {name:?} is not allowed: at most 64 plain characters"
        )));
    }
    Ok(name.clone())
}

/// Writes `hostname`, `hosts` and `resolv.conf` into the sandbox's directory.
pub fn write_etc(dir: &Path, config: &PodSandboxConfig, modes: Modes) -> Result<()> {
    let write = |name: &str, text: &[u8]| {
        record::write_file(&dir.join(name), text, 0o644)
            .map_err(host(format!("write the pod's {name}")))
    };
    write("hostname", format!("{}\n", hostname(config, modes)?).as_bytes())?;
    // kubelet mounts its own; this one is for pods that come from elsewhere.
    let hosts = std::fs::read("/etc/hosts")
        .unwrap_or_else(|_| b"127.0.0.1 localhost\n::1 localhost\n".to_vec());
    write("hosts", &hosts)?;
    let asked = &config.dns_config;
    let text = dns::checked_resolv_conf(&asked.servers, &asked.searches, &asked.options)
        .map_err(host("dns_config"))?;
    match text {
        Some(text) => write("resolv.conf", text.as_bytes()),
        None => write("resolv.conf", &std::fs::read("/etc/resolv.conf").unwrap_or_default()),
    }
}

/// Unmounts what stands below the state directory `dir` and has no part that is the id of a pod that
/// is `known`: files of pods whose records are lost. Blocks.
///
/// # Errors
/// When the mounts cannot be listed, or one of those is busy.
pub fn unmount_lost(dir: &Path, known: &[String]) -> Result<()> {
    for mount in kuasar_host::mount::mounts_below(dir).map_err(host("list mounts"))? {
        let ours =
            mount.components().any(|part| known.iter().any(|id| part.as_os_str() == id.as_str()));
        if !ours && mount != dir {
            kuasar_host::mount::unmount(&mount).map_err(host("unmount a lost pod's files"))?;
        }
    }
    Ok(())
}

/// Mounts the pod's `/dev/shm`.
pub fn mount_shm(dir: &Path, size: u64) -> Result<()> {
    let shm = dir.join("shm");
    record::private_dir(&shm).map_err(host("make the pod's shm"))?;
    kuasar_host::mount::mount_shm(&shm, size).map_err(host("mount the pod's shm"))
}

/// The pod's cgroup, where kubelet has not made it.
///
/// # Errors
/// InvalidArgument for a `cgroup_parent` that is none.
pub fn missing_cgroup(layout: &Layout, config: &PodSandboxConfig) -> Result<Option<String>> {
    let path = &config.linux.cgroup_parent;
    if path.is_empty() {
        return Ok(None);
    }
    let group = layout.group(path).map_err(host("cgroup_parent"))?;
    Ok((!group.exists()).then(|| path.clone()))
}

/// Makes the pod's cgroup where kubelet has not; answers whether it was made now.
///
/// # Errors
/// As [`missing_cgroup`] and [`create_cgroup`].
pub fn make_cgroup(layout: &Layout, config: &PodSandboxConfig) -> Result<bool> {
    match missing_cgroup(layout, config)? {
        Some(_) => create_cgroup(layout, config),
        None => Ok(false),
    }
}

/// Makes the pod's cgroup, which is missing; answers whether it was made now. Limits are written
/// only then: otherwise kubelet owns them.
///
/// # Errors
/// When it cannot be made or limited: what there is of it is to be removed.
pub fn create_cgroup(layout: &Layout, config: &PodSandboxConfig) -> Result<bool> {
    let linux = &config.linux;
    let group = layout.group(&linux.cgroup_parent).map_err(host("cgroup_parent"))?;
    if !group.create().map_err(host("make the pod's cgroup"))? {
        return Ok(false);
    }
    if let Some(resources) = linux.resources.as_ref() {
        let text = oci_resources(resources, linux.overhead.as_ref()).to_string();
        group.update(text.as_bytes()).map_err(host("limit the pod's cgroup"))?;
    }
    Ok(true)
}

/// Name of the file with the path of the pod's cgroup, in the pod's directory.
const OWN_CGROUP: &str = "own-cgroup";

/// Notes beside the pod's record that its cgroup was made by us: where the record is lost, that is how
/// the group is found, and told from one of kubelet's.
///
/// # Errors
/// When it cannot be written.
pub fn note_cgroup(dir: &Path, path: &str) -> Result<()> {
    record::write_file(&dir.join(OWN_CGROUP), path.as_bytes(), 0o600)
        .map_err(host("note the pod's cgroup"))
}

/// Removes the cgroup that a lost pod's directory has a note of, as Stop does; not where one of
/// `held`, the cgroups of other pods' containers, is below it.
///
/// # Errors
/// When processes stay in it.
pub fn remove_noted_cgroup(layout: &Layout, dir: &Path, held: &[String]) -> Result<()> {
    let note = dir.join(OWN_CGROUP);
    let Ok(path) = std::fs::read_to_string(&note) else { return Ok(()) };
    let group = layout.group(&path).map_err(host("the pod's cgroup"))?;
    let below = |other: &String| {
        layout.group(other).is_ok_and(|other| other.path().starts_with(group.path()))
    };
    if !held.iter().any(below) {
        group.remove(Duration::from_secs(5)).map_err(host("remove the pod's cgroup"))?;
    }
    // A later pod may have the same cgroup: it is not to be removed again.
    let _ = std::fs::remove_file(note);
    Ok(())
}

/// CRI resources plus the overhead of the sandbox, as OCI `LinuxResources`.
pub fn oci_resources(
    resources: &LinuxContainerResources,
    overhead: Option<&LinuxContainerResources>,
) -> Value {
    let none = LinuxContainerResources::default();
    let extra = overhead.unwrap_or(&none);
    let mut memory = serde_json::Map::new();
    let mut cpu = serde_json::Map::new();
    let put = |map: &mut serde_json::Map<String, Value>, name: &str, base: i64, more: i64| {
        if base > 0 {
            map.insert(name.into(), json!(base.saturating_add(more.max(0))));
        }
    };
    put(&mut memory, "limit", resources.memory_limit_in_bytes, extra.memory_limit_in_bytes);
    put(&mut cpu, "quota", resources.cpu_quota, extra.cpu_quota);
    put(&mut cpu, "shares", resources.cpu_shares, extra.cpu_shares);
    put(&mut cpu, "period", resources.cpu_period, 0);
    for (name, text) in [("cpus", &resources.cpuset_cpus), ("mems", &resources.cpuset_mems)] {
        if !text.is_empty() {
            cpu.insert(name.into(), json!(text));
        }
    }
    let mut all = json!({ "memory": memory, "cpu": cpu });
    if !resources.unified.is_empty()
        && let Some(all) = all.as_object_mut()
    {
        all.insert("unified".into(), json!(resources.unified));
    }
    all
}

/// The `UpdatedResources` of containerd 2.3 (`{"overhead": …, "resources": …}`, each CRI's
/// `LinuxContainerResources` as Go writes it in JSON) as OCI `LinuxResources`.
pub fn updated_resources(json: &[u8]) -> Result<Value> {
    let value: Value = serde_json::from_slice(json)
        .map_err(|error| Error::InvalidArgument(format!("updated resources: {error}")))?;
    let part = |name: &str| {
        let other = format!(
            "{}{}",
            name.get(..1).unwrap_or_default().to_uppercase(),
            name.get(1..).unwrap_or_default()
        );
        value.get(name).or_else(|| value.get(&other)).map(cri_resources)
    };
    let resources = part("resources").unwrap_or_default();
    Ok(oci_resources(&resources, part("overhead").as_ref()))
}

fn cri_resources(value: &Value) -> LinuxContainerResources {
    let number = |name: &str| value.get(name).and_then(Value::as_i64).unwrap_or_default();
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut resources = LinuxContainerResources::new();
    resources.cpu_period = number("cpu_period");
    resources.cpu_quota = number("cpu_quota");
    resources.cpu_shares = number("cpu_shares");
    resources.memory_limit_in_bytes = number("memory_limit_in_bytes");
    resources.cpuset_cpus = text("cpuset_cpus");
    resources.cpuset_mems = text("cpuset_mems");
    resources
}

/// Whether a pod has a user namespace of its own.
pub fn has_userns(config: &PodSandboxConfig) -> bool {
    let options = &config.linux.security_context.namespace_options;
    options.userns_options.as_ref().is_some_and(|user| !user.uids.is_empty())
}

/// Refuses user namespaces that are not the pod's: containers cannot have one each, or another's.
/// Nor can a pod on the host's network: the namespace is the one that owns the pod's network
/// namespace, and its containers would silently run without.
pub fn check_userns(config: &PodSandboxConfig, netns_path: &str) -> Result<()> {
    let options = &config.linux.security_context.namespace_options;
    let Some(user) = options.userns_options.as_ref() else { return Ok(()) };
    let mapped = !user.uids.is_empty() || !user.gids.is_empty();
    match user.mode.enum_value() {
        Ok(NamespaceMode::POD) if mapped && netns_path.is_empty() => Err(Error::InvalidArgument(
            "a pod on the host's network cannot have a user namespace: containerd makes it \
                 together with the network namespace; set hostUsers: true or hostNetwork: false"
                .into(),
        )),
        Ok(NamespaceMode::POD | NamespaceMode::NODE) => Ok(()),
        other => Err(Error::InvalidArgument(format!(
            "user namespace mode {other:?} is not supported: use POD or NODE"
        ))),
    }
}

/// The sysctls of a pod, with containerd's two defaults for a pod network: unprivileged
/// processes may bind low ports and send echo requests.
pub fn sysctls(
    config: &PodSandboxConfig,
    modes: Modes,
    unprivileged: bool,
) -> Result<Vec<(String, String)>> {
    let mut list: Vec<(String, String)> = Vec::new();
    let linux = &config.linux;
    if unprivileged && !modes.host_network {
        list.push(("net.ipv4.ip_unprivileged_port_start".into(), "0".into()));
        let own_userns = has_userns(config);
        if !own_userns {
            list.push(("net.ipv4.ping_group_range".into(), "0 2147483647".into()));
        }
    }
    for (name, value) in &linux.sysctls {
        let plain = name.replace('/', ".");
        let of_ipc = plain.starts_with("fs.mqueue.")
            || plain.starts_with("kernel.shm")
            || plain.starts_with("kernel.msg")
            || plain == "kernel.sem";
        let allowed =
            (plain.starts_with("net.") && !modes.host_network) || (of_ipc && !modes.host_ipc);
        if !allowed {
            return Err(Error::InvalidArgument(format!(
                "sysctl {name:?} is not in a namespace of this pod: it would change the host"
            )));
        }
        list.retain(|(known, _)| *known != plain);
        list.push((plain, value.clone()));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_cgroup_parent_has_none_made() {
        let Ok(layout) = Layout::detect() else { return };
        let config = PodSandboxConfig::new();
        assert_eq!(missing_cgroup(&layout, &config).unwrap(), None);
        assert!(!make_cgroup(&layout, &config).unwrap());
    }

    const POD: Modes =
        Modes { host_network: false, host_ipc: false, host_pid: false, shared_pid: false };

    fn with_sysctl(name: &str) -> PodSandboxConfig {
        let mut config = PodSandboxConfig::new();
        config.linux.mut_or_insert_default().sysctls.insert(name.into(), "1".into());
        config
    }

    #[test]
    fn a_sysctl_of_the_host_is_refused() {
        assert!(sysctls(&with_sysctl("net.ipv4.ip_forward"), POD, false).is_ok());
        assert!(sysctls(&with_sysctl("kernel.shm_rmid_forced"), POD, false).is_ok());
        assert!(sysctls(&with_sysctl("vm.swappiness"), POD, false).is_err());
        assert!(sysctls(&with_sysctl("kernel.core_pattern"), POD, false).is_err());
        let host = Modes { host_network: true, host_ipc: true, ..POD };
        assert!(sysctls(&with_sysctl("net.ipv4.ip_forward"), host, false).is_err());
        assert!(sysctls(&with_sysctl("kernel.shm_rmid_forced"), host, false).is_err());
    }

    #[test]
    fn a_user_namespace_is_the_pods_or_the_hosts() {
        let with = |mode: NamespaceMode| {
            let mut config = PodSandboxConfig::new();
            let options =
                config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            let options = options.namespace_options.mut_or_insert_default();
            options.userns_options.mut_or_insert_default().mode = mode.into();
            check_userns(&config, "/run/netns/n")
        };
        assert!(with(NamespaceMode::POD).is_ok() && with(NamespaceMode::NODE).is_ok());
        assert!(with(NamespaceMode::CONTAINER).is_err() && with(NamespaceMode::TARGET).is_err());
        check_userns(&PodSandboxConfig::new(), "").unwrap();
    }

    #[test]
    fn a_pod_on_the_hosts_network_gets_no_user_namespace() {
        let mut config = PodSandboxConfig::new();
        let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        let user = options.namespace_options.mut_or_insert_default();
        let user = user.userns_options.mut_or_insert_default();
        user.mode = NamespaceMode::POD.into();
        check_userns(&config, "").unwrap();
        user_mapping(&mut config);
        check_userns(&config, "/run/netns/n").unwrap();
        let error = check_userns(&config, "").unwrap_err().to_string();
        assert!(error.contains("hostNetwork"), "{error}");
    }

    fn user_mapping(config: &mut PodSandboxConfig) {
        let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        let user = options.namespace_options.mut_or_insert_default();
        user.userns_options.mut_or_insert_default().uids.push(kuasar_protos::cri::IDMapping {
            host_id: 65536,
            length: 65536,
            ..Default::default()
        });
    }

    #[test]
    fn the_pod_overrides_the_defaults() {
        let list = sysctls(&with_sysctl("net.ipv4.ip_unprivileged_port_start"), POD, true).unwrap();
        assert_eq!(list.iter().filter(|(name, _)| name.ends_with("port_start")).count(), 1);
        assert!(list.contains(&("net.ipv4.ip_unprivileged_port_start".into(), "1".into())));
    }

    #[test]
    fn dns_values_cannot_add_lines() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = PodSandboxConfig::new();
        config
            .dns_config
            .mut_or_insert_default()
            .servers
            .push("1.1.1.1\nnameserver 6.6.6.6".into());
        assert!(write_etc(dir.path(), &config, POD).is_err());
    }

    #[test]
    fn dns_values_of_kubelet_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = PodSandboxConfig::new();
        let dns = config.dns_config.mut_or_insert_default();
        dns.servers.push("10.96.0.10".into());
        dns.searches = ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "a.example"]
            .map(Into::into)
            .into();
        dns.options = ["ndots:5", "edns0", "trust-ad"].map(Into::into).into();
        write_etc(dir.path(), &config, POD).unwrap();
        assert_eq!(
            std::fs::read_to_string(dir.path().join("resolv.conf")).unwrap(),
            "search ns.svc.cluster.local svc.cluster.local cluster.local a.example\n\
             nameserver 10.96.0.10\noptions ndots:5 edns0 trust-ad\n"
        );
    }

    #[test]
    fn overhead_is_added_to_the_limits() {
        let limits = |memory, quota| {
            let mut resources = LinuxContainerResources::new();
            (resources.memory_limit_in_bytes, resources.cpu_quota) = (memory, quota);
            resources
        };
        let value = oci_resources(&limits(100, 50), Some(&limits(11, 5)));
        assert_eq!(value["memory"]["limit"], 111);
        assert_eq!(value["cpu"]["quota"], 55);
    }
}
