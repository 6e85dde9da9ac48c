//! What a process can do before it knows which container it will be.
//!
//! A process that was forked shares its memory with who has forked it, page by page, until it writes. Each
//! first write costs a fault and a copy. One that waits for its request does the same work before, on a spec
//! of its own, and has its pages when they are wanted.

use super::Plan;

/// About what containerd's CRI asks for.
const SPEC: &str = r#"{
  "ociVersion": "1.2.0",
  "process": {
    "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] },
    "args": ["/program.wasm", "--one", "--two"],
    "env": [
      "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
      "HOSTNAME=pod", "KUBERNETES_SERVICE_HOST=10.0.0.1", "KUBERNETES_SERVICE_PORT=443"
    ],
    "cwd": "/",
    "capabilities": {
      "bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]
    },
    "noNewPrivileges": true,
    "oomScoreAdj": 1000
  },
  "root": { "path": "/run/containerd/io.containerd.runtime.v2.task/k8s.io/container/rootfs" },
  "mounts": [
    { "destination": "/etc/hosts", "type": "bind", "source": "/run/pod/hosts",
      "options": ["rbind", "rprivate", "rw"] },
    { "destination": "/etc/hostname", "type": "bind", "source": "/run/pod/hostname",
      "options": ["rbind", "rprivate", "rw"] },
    { "destination": "/etc/resolv.conf", "type": "bind", "source": "/run/pod/resolv.conf",
      "options": ["rbind", "rprivate", "rw"] },
    { "destination": "/data", "type": "bind", "source": "/run/pod/data",
      "options": ["rbind", "rprivate", "ro"] }
  ],
  "annotations": {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-id": "0123456789012345678901234567890123456789012345678901234567890123",
    "io.kubernetes.cri.sandbox-name": "pod", "io.kubernetes.cri.sandbox-namespace": "default"
  },
  "linux": {
    "cgroupsPath": "/kubepods/burstable/pod/container",
    "namespaces": [
      { "type": "pid" }, { "type": "mount" }, { "type": "cgroup" },
      { "type": "ipc", "path": "/proc/1/ns/ipc" }, { "type": "uts", "path": "/proc/1/ns/uts" },
      { "type": "network", "path": "/run/netns/pod" }
    ],
    "resources": {
      "cpu": { "shares": 1024, "quota": 100000, "period": 100000 },
      "memory": { "limit": 134217728 }, "devices": [{ "allow": false, "access": "rwm" }]
    },
    "maskedPaths": ["/proc/kcore", "/proc/keys"], "readonlyPaths": ["/proc/bus", "/proc/sys"]
  }
}"#;

/// Reads a spec, and forgets it.
pub fn rehearse() {
    // Whether it could be made here does not matter.
    let _ = Plan::of(SPEC.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spec_is_one_that_would_be_made_here() {
        assert!(Plan::of(SPEC.as_bytes()).is_ok());
    }
}
