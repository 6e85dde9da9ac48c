//! Pods without a share: small files and directories of the host are copied into the guest.
//!
//! | bind mount of the host | in the guest |
//! |---|---|
//! | a file | a copy, made at Create |
//! | kubelet's termination log: a writable file | a copy; its end is brought back when the container has ended |
//! | a directory that is read-only, or of a configMap, secret, projected or downwardAPI volume | a copy; renewed with its `..data`, where it has one |
//! | kubelet's `emptyDir` on disk | a tmpfs of the guest, one for the pod |
//! | any other directory | refused: what a container writes there would be lost |
//!
//! [`read`] reads on the host what is copied, within limits; [`changes`] tells when a volume changes;
//! [`volumes`] puts both together for the containers of a pod.

pub mod changes;
pub mod read;
pub mod volumes;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kuasar_host::inside::Want;
use nix::fcntl::readlinkat;
use serde::{Deserialize, Serialize};

/// The link of kubelet's volumes that leads to their contents.
const DATA: &str = "..data";
/// Components of the paths of kubelet's volumes whose contents are the cluster's.
const GIVEN: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// Component of the path of kubelet's `emptyDir` volumes.
pub(crate) const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Where kubelet mounts a container's termination log unless the pod says otherwise.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Files that are copied into guests without a share: `[copy]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CopyConfig {
    /// Bytes of the files of one volume.
    pub max_bytes: u64,
    /// Files, directories and links of one volume.
    pub max_files: u32,
    /// Bytes of an `emptyDir`, which is in the guest's memory; 0 is half of that.
    pub empty_dir_bytes: u64,
    /// Bytes of a termination log that come back: its end.
    pub termination_log_bytes: u64,
}

impl Default for CopyConfig {
    fn default() -> Self {
        Self {
            max_bytes: 4 << 20,
            max_files: 1024,
            empty_dir_bytes: 0,
            termination_log_bytes: 4096,
        }
    }
}

impl CopyConfig {
    /// Most bytes and files that a volume may have.
    const MOST: (u64, u32) = (256 << 20, 65_536);

    /// What is wrong with it, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check(&self) -> Result<(), String> {
        if self.max_bytes == 0 || self.max_bytes > Self::MOST.0 {
            return Err(format!("copy.max_bytes = {}: 1 to {}", self.max_bytes, Self::MOST.0));
        }
        if self.max_files == 0 || self.max_files > Self::MOST.1 {
            return Err(format!("copy.max_files = {}: 1 to {}", self.max_files, Self::MOST.1));
        }
        if self.termination_log_bytes > 1 << 20 {
            return Err(format!(
                "copy.termination_log_bytes = {}: at most {}",
                self.termination_log_bytes,
                1 << 20
            ));
        }
        Ok(())
    }
}

/// What becomes of a bind mount in a guest without a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Copied when the container is made.
    Once,
    /// The same, and renewed when the volume changes.
    Follow,
    /// Copied, and its end is brought back.
    Back,
    /// A directory of the guest's, one for the pod.
    EmptyDir,
}

/// A volume that is to be copied.
#[derive(Debug)]
pub struct Wanted {
    /// What is copied, opened once and for all.
    pub source: OwnedFd,
    /// Where that is, for messages.
    pub path: PathBuf,
    /// What becomes of it.
    pub rule: Rule,
}

/// A volume that was copied, in its container's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// Its number.
    pub volume: u32,
    /// Where it is on the host, for messages.
    pub path: PathBuf,
    /// What becomes of it.
    pub rule: Rule,
}

/// What becomes of the bind mount of `path`, which is open as `source`.
///
/// # Errors
/// A text that says why it cannot be, and the way out.
pub fn rule(
    (path, source): (&Path, BorrowedFd<'_>),
    destination: &str,
    kind: Want,
    read_only: bool,
) -> Result<Rule, String> {
    let has = |name: &str| path.components().any(|part| part.as_os_str() == name);
    if kind == Want::File {
        let back = !read_only && is_termination_log(path, destination);
        return Ok(if back { Rule::Back } else { Rule::Once });
    }
    let above = path.parent().and_then(Path::file_name);
    if above.is_some_and(|name| name == EMPTY_DIR) {
        return Ok(Rule::EmptyDir);
    }
    if read_only || GIVEN.into_iter().any(has) {
        let follow = readlinkat(source, DATA).is_ok();
        return Ok(if follow { Rule::Follow } else { Rule::Once });
    }
    Err(format!(
        "volume {path:.200?} for {destination:.200?} is a directory of the host that the container may \
         write to, and this pod's machine has no share: use an emptyDir, a volume with volumeMode: \
         Block, or readOnly: true to have it copied; or a runtime with share = \"virtiofs\"",
    ))
}

/// Whether kubelet reads this file after the container's end: it makes it in
/// `pods/<uid>/containers/<name>/`.
fn is_termination_log(path: &Path, destination: &str) -> bool {
    let parts: Vec<_> =
        path.components().rev().skip(1).take(4).map(|part| part.as_os_str()).collect();
    let kubelets = matches!(parts.as_slice(), [_, containers, _, pods]
        if *containers == "containers" && *pods == "pods");
    destination == TERMINATION_LOG || kubelets
}

/// Whether a followed volume still has contents: kubelet takes `..data` away first.
pub(crate) fn is_whole(source: &impl AsFd) -> bool {
    readlinkat(source.as_fd(), DATA).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_bind_mounts_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let with = dir.path().join("with");
        std::fs::create_dir(&with).unwrap();
        std::os::unix::fs::symlink("..1", with.join(DATA)).unwrap();
        let [with, without] = [with.as_path(), dir.path()].map(|path| {
            let opened: OwnedFd = std::fs::File::open(path).unwrap().into();
            opened
        });
        let of = |path: &str, to: &str, kind, read_only, fd: &OwnedFd| {
            rule((Path::new(path), fd.as_fd()), to, kind, read_only)
        };
        let file = |path: &str, to: &str, ro| of(path, to, Want::File, ro, &without).unwrap();
        assert_eq!(file("/run/x/resolv.conf", "/etc/resolv.conf", false), Rule::Once);
        assert_eq!(file("/x", TERMINATION_LOG, true), Rule::Once);
        assert_eq!(file("/x", TERMINATION_LOG, false), Rule::Back);
        let log = "/var/lib/kubelet/pods/u/containers/c/1a2b";
        assert_eq!(file(log, "/var/log/end", false), Rule::Back);
        assert_eq!(file("/var/lib/kubelet/pods/u/etc-hosts", "/etc/hosts", false), Rule::Once);
        let directory = |path: &str, ro, fd: &OwnedFd| of(path, "/d", Want::Directory, ro, fd);
        let kubelet = |name: &str| format!("/var/lib/kubelet/pods/u/volumes/{name}/v");
        for name in GIVEN {
            assert_eq!(directory(&kubelet(name), false, &with), Ok(Rule::Follow));
            assert_eq!(directory(&kubelet(name), true, &without), Ok(Rule::Once));
        }
        assert_eq!(directory(&kubelet(EMPTY_DIR), false, &without), Ok(Rule::EmptyDir));
        assert_eq!(directory("/data", true, &without), Ok(Rule::Once));
        assert_eq!(directory("/data", true, &with), Ok(Rule::Follow));
        let below = format!("{}/below", kubelet(EMPTY_DIR));
        for path in ["/data", "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v", &below] {
            let why = directory(path, false, &without).unwrap_err();
            assert!(why.contains(path) && why.contains("volumeMode: Block"), "{why}");
            assert!(!why.contains('\n'));
        }
    }

    #[test]
    fn limits_without_sense_are_named() {
        let check = |text: &str| toml::from_str::<CopyConfig>(text).unwrap().check();
        assert!(check("max_bytes = 0").unwrap_err().contains("copy.max_bytes"));
        assert!(check("max_files = 100000").unwrap_err().contains("copy.max_files"));
        let log = check("termination_log_bytes = 2000000").unwrap_err();
        assert!(log.contains("copy.termination_log_bytes"));
        CopyConfig::default().check().unwrap();
    }
}
