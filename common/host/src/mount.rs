//! Mounts by system call.
//!
//! containerd hands a rootfs over as a list of mounts. Overlay options with many layers outgrow
//! the page that `mount(2)` copies, so overlay goes through `fsopen`/`fsconfig`, where each
//! layer is a call of its own, and falls back to `mount(2)` on kernels without.

pub mod idmap;
mod overlay;
pub mod tree;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

use crate::{Context, Error, Result};
pub use idmap::IdMap;

/// A mount in `mount(8)`'s terms, as engines hand it over (`containerd.types.Mount`).
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mount {
    /// Filesystem type (`overlay`, `bind`, `ext4`, `erofs`, …).
    pub kind: String,
    /// Device, directory or other source.
    pub source: String,
    /// Target below the directory given to [`mount_all`]; empty for the directory itself.
    pub target: String,
    /// Options.
    pub options: Vec<String>,
}

/// `MS_NOSYMFOLLOW` of linux/mount.h, Linux 5.10.
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

/// Most bytes of data that `mount(2)` copies, its null byte included.
const PAGE: usize = 4096;

/// Flags, propagation and data of a list of options.
fn parse_options(options: &[String]) -> (MsFlags, MsFlags, Vec<&str>) {
    let (mut flags, mut propagation, mut data) = (MsFlags::empty(), MsFlags::empty(), Vec::new());
    for o in options {
        let (set, flag) = match o.as_str() {
            "ro" => (true, MsFlags::MS_RDONLY),
            "rw" => (false, MsFlags::MS_RDONLY),
            "nosuid" => (true, MsFlags::MS_NOSUID),
            "suid" => (false, MsFlags::MS_NOSUID),
            "nodev" => (true, MsFlags::MS_NODEV),
            "dev" => (false, MsFlags::MS_NODEV),
            "noexec" => (true, MsFlags::MS_NOEXEC),
            "exec" => (false, MsFlags::MS_NOEXEC),
            "sync" => (true, MsFlags::MS_SYNCHRONOUS),
            "async" => (false, MsFlags::MS_SYNCHRONOUS),
            "dirsync" => (true, MsFlags::MS_DIRSYNC),
            "noatime" => (true, MsFlags::MS_NOATIME),
            "atime" => (false, MsFlags::MS_NOATIME),
            "nodiratime" => (true, MsFlags::MS_NODIRATIME),
            "diratime" => (false, MsFlags::MS_NODIRATIME),
            "relatime" => (true, MsFlags::MS_RELATIME),
            "norelatime" => (false, MsFlags::MS_RELATIME),
            "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
            "lazytime" => (true, MsFlags::MS_LAZYTIME),
            "nolazytime" => (false, MsFlags::MS_LAZYTIME),
            "nosymfollow" => (true, NOSYMFOLLOW),
            "symfollow" => (false, NOSYMFOLLOW),
            "silent" => (true, MsFlags::MS_SILENT),
            "loud" => (false, MsFlags::MS_SILENT),
            "strictatime" => (true, MsFlags::MS_STRICTATIME),
            "bind" => (true, MsFlags::MS_BIND),
            "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
            "defaults" => (true, MsFlags::empty()),
            "shared" | "rshared" | "slave" | "rslave" | "private" | "rprivate" | "unbindable"
            | "runbindable" => {
                propagation = match o.trim_start_matches('r') {
                    "shared" => MsFlags::MS_SHARED,
                    "slave" => MsFlags::MS_SLAVE,
                    "private" => MsFlags::MS_PRIVATE,
                    _ => MsFlags::MS_UNBINDABLE,
                };
                if o.starts_with('r') {
                    propagation |= MsFlags::MS_REC;
                }
                continue;
            }
            other => {
                data.push(other);
                continue;
            }
        };
        flags.set(flag, set);
    }
    (flags, propagation, data)
}

/// Mounts a list in order on (or below) `dir`. When one fails, those before it are undone.
///
/// # Errors
/// [`Error::Io`] naming the mount, [`Error::Invalid`] for a target outside `dir`,
/// [`Error::Unsupported`] for an option that needs a mount helper.
pub fn mount_all(mounts: &[Mount], dir: &Path) -> Result<()> {
    mount_all_mapped(mounts, dir, None)
}

/// The same; mounts with containerd's `uidmap=` and `gidmap=` options are id-mapped by `map`.
///
/// # Errors
/// As [`mount_all`]; [`Error::Unsupported`] for those options without `map`, or when this kernel
/// or the filesystem cannot do it.
pub fn mount_all_mapped(mounts: &[Mount], dir: &Path, map: Option<IdMap<'_>>) -> Result<()> {
    for (i, m) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(m, dir, map) {
            for m in mounts.iter().take(i).rev() {
                // Undo what was mounted; the first error is the one to report.
                let _ = unmount(&dir.join(m.target.trim_start_matches('/')));
            }
            return Err(e);
        }
    }
    Ok(())
}

/// Refuses what only containerd's mount manager or a mount helper can do.
fn check_options(m: &Mount, mapped: bool) -> Result<()> {
    let help = "let containerd 2.2 or later do this mount, or use another snapshotter";
    for o in &m.options {
        let key = o.split('=').next().unwrap_or_default();
        if matches!(key, "loop" | "offset" | "sizelimit") || key.starts_with("X-containerd.") {
            return Err(Error::Unsupported(format!("mount option {o:?} needs a helper: {help}")));
        }
        let mapping = matches!(key, "uidmap" | "gidmap") && !mapped;
        if mapping || matches!(key, "idmap" | "ridmap" | "uidmapping" | "gidmapping") {
            return Err(Error::Unsupported(format!(
                "mount option {o:?} asks for an id-mapped mount, and the pod has no user namespace"
            )));
        }
    }
    let kind = m.kind.as_str();
    if kind.contains('/') || kind.starts_with("fuse.") || kind.starts_with("fuse3.") {
        return Err(Error::Unsupported(format!("mount type {kind:?} needs a helper: {help}")));
    }
    if m.source.contains('\0') || m.options.iter().any(|o| o.contains('\0')) {
        return Err(Error::Invalid("a mount contains a null byte".into()));
    }
    Ok(())
}

/// The mount point of `m`, resolved inside `dir` and kept by descriptor: a link in a container's
/// tree cannot turn it elsewhere (CVE-2021-30465).
fn target(m: &Mount, dir: &Path) -> Result<OwnedFd> {
    let rel = Path::new(m.target.trim_start_matches('/'));
    if rel.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
        return Err(Error::Invalid(format!("mount target {:?} leaves the rootfs", m.target)));
    }
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(dir, flags, nix::sys::stat::Mode::empty())
        .context(|| format!("cannot open mount point {}", dir.display()))?;
    if rel.as_os_str().is_empty() {
        return Ok(root);
    }
    crate::safe_path::open_in_root(root.as_fd(), rel, libc::O_PATH)
}

fn mount_one(m: &Mount, dir: &Path, map: Option<IdMap<'_>>) -> Result<()> {
    check_options(m, map.is_some())?;
    let at = target(m, dir)?;
    let path = crate::safe_path::proc_path(at.as_fd());
    let (flags, propagation, mut data) = parse_options(&m.options);
    let is_mapping = |o: &&str| o.starts_with("uidmap=") || o.starts_with("gidmap=");
    let map = map.filter(|_| data.iter().any(is_mapping));
    data.retain(|o| !is_mapping(o));
    if let Some(map) = map {
        return mount_mapped(m, dir, &map, (flags, propagation, data));
    }
    let shown = dir.join(m.target.trim_start_matches('/'));
    let what = || format!("cannot mount {} {} on {}", m.kind, m.source, shown.display());
    let made = m.kind == "overlay" && {
        match overlay::mount(at.as_fd(), &m.source, flags, &data) {
            Ok(()) => true,
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => false,
            Err(e) => return Err(e).context(what),
        }
    };
    if !made {
        let bind = flags.contains(MsFlags::MS_BIND);
        let text = data.join(",");
        if text.len() >= PAGE && m.kind == "overlay" {
            overlay::mount_relative(at.as_fd(), &m.source, flags, &data).context(what)?;
        } else {
            let source = Some(m.source.as_str()).filter(|s| !s.is_empty());
            let kind = (!bind).then_some(m.kind.as_str());
            let text = (!bind && !text.is_empty()).then_some(text.as_str());
            nix::mount::mount(source, &path, kind, flags, text).context(what)?;
        }
    }
    // `at` is what lies below the new mount; from now on the top is meant.
    let top = if m.target.is_empty() { at_path(dir) } else { target(m, dir) };
    let finished = top.and_then(|top| {
        let path = crate::safe_path::proc_path(top.as_fd());
        finish(&path, flags, propagation).context(what)
    });
    if finished.is_err() {
        // Half of a mount must not stay (a volume would be writable that was asked for read-only).
        let _ = unmount(&shown);
    }
    finished
}

/// An overlay of id-mapped layers (what is copied up belongs to the pod's users by itself), or an
/// id-mapped bind.
fn mount_mapped(
    m: &Mount,
    dir: &Path,
    map: &IdMap<'_>,
    (flags, propagation, data): (MsFlags, MsFlags, Vec<&str>),
) -> Result<()> {
    let what = || format!("cannot make an id-mapped mount of {} {}", m.kind, m.source);
    if m.kind == "overlay" {
        let lower = data.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap_or_default();
        // They go again when the overlay is there.
        let (_layers, names) = idmap::Layers::mount(lower, map).context(what)?;
        let kept = m
            .options
            .iter()
            .filter(|o| !["lowerdir=", "uidmap=", "gidmap="].iter().any(|key| o.starts_with(key)));
        let options = kept.cloned().chain([format!("lowerdir={names}")]).collect();
        return mount_one(&Mount { options, ..m.clone() }, dir, None);
    }
    if !flags.contains(MsFlags::MS_BIND) {
        return Err(Error::Unsupported(format!(
            "{}: only overlay and bind mounts are id-mapped here: use such a snapshotter, or a \
             pod without a user namespace",
            what()
        )));
    }
    let recursive = flags.contains(MsFlags::MS_REC);
    let tree = idmap::clone_mapped(Path::new(&m.source), map.userns, recursive).context(what)?;
    overlay::attach(&tree, &target(m, dir)?).context(what)?;
    let top = target(m, dir)?;
    let path = crate::safe_path::proc_path(top.as_fd());
    finish(&path, flags, propagation).context(what).inspect_err(|_| {
        let _ = unmount(&dir.join(m.target.trim_start_matches('/')));
    })
}

fn at_path(dir: &Path) -> Result<OwnedFd> {
    target(&Mount::default(), dir)
}

/// What takes calls of its own: flags of a bind mount, and propagation.
fn finish(path: &Path, flags: MsFlags, propagation: MsFlags) -> nix::Result<()> {
    let none = None::<&str>;
    // The kernel ignores other flags on the first bind.
    let extra = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if flags.contains(MsFlags::MS_BIND) && !extra.is_empty() {
        let again = (flags | MsFlags::MS_REMOUNT) - MsFlags::MS_REC;
        match nix::mount::mount(none, path, none, again, none) {
            // In a user namespace flags of the source are locked: they must be given again.
            Err(nix::Error::EPERM) => {
                let kept =
                    MsFlags::from_bits_truncate(nix::sys::statvfs::statvfs(path)?.flags().bits())
                        & (MsFlags::MS_RDONLY
                            | MsFlags::MS_NOSUID
                            | MsFlags::MS_NODEV
                            | MsFlags::MS_NOEXEC
                            | MsFlags::MS_NOATIME
                            | MsFlags::MS_NODIRATIME);
                nix::mount::mount(none, path, none, again | kept, none)?;
            }
            other => other?,
        }
    }
    if !propagation.is_empty() {
        nix::mount::mount(none, path, none, propagation, none)?;
    }
    Ok(())
}

/// A tmpfs of a fixed size, as for a pod's `/dev/shm`.
///
/// # Errors
/// [`Error::Io`].
pub fn mount_shm(dir: &Path, bytes: u64) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("mode=1777,size={bytes}");
    nix::mount::mount(Some("shm"), dir, Some("tmpfs"), flags, Some(data.as_str()))
        .context(|| format!("cannot mount a tmpfs on {}", dir.display()))
}

/// Mount points at or below `dir`, in mount order.
///
/// # Errors
/// [`Error::Io`] when mountinfo cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/thread-self/mountinfo")
        .context(|| "cannot read mountinfo")?;
    let at = |line: &str| line.split(' ').nth(4).map(unescape);
    Ok(text.lines().filter_map(at).filter(|p| p.starts_with(dir)).collect())
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
pub(crate) fn unescape(s: &str) -> PathBuf {
    let mut out = Vec::with_capacity(s.len());
    let mut bytes = s.bytes();
    while let Some(b) = bytes.next() {
        if b != b'\\' {
            out.push(b);
            continue;
        }
        let digit = |b: Option<u8>| b.map_or(0, |b| b.wrapping_sub(b'0') & 7);
        let (x, y, z) = (digit(bytes.next()), digit(bytes.next()), digit(bytes.next()));
        out.push((x << 6) | (y << 3) | z);
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(out))
}

/// Unmounts `dir` alone, if it is a mount point.
///
/// # Errors
/// [`Error::Io`].
pub fn unmount(dir: &Path) -> Result<()> {
    match nix::mount::umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(e) => Err(e).context(|| format!("cannot unmount {}", dir.display())),
    }
}

/// Unmounts everything at and below `dir`, last mounted first. Nothing mounted is no error.
///
/// # Errors
/// [`Error::Io`].
pub fn unmount_below(dir: &Path) -> Result<()> {
    for p in mounts_below(dir)?.iter().rev() {
        unmount(p)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_apart() {
        let o: Vec<String> =
            ["ro", "rbind", "rprivate", "size=64k"].iter().map(ToString::to_string).collect();
        let (flags, propagation, data) = parse_options(&o);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        assert_eq!(data, ["size=64k"]);
    }

    #[test]
    fn a_target_cannot_leave_the_rootfs() {
        let m = Mount { kind: "bind".into(), target: "../x".into(), ..Mount::default() };
        assert!(matches!(mount_all(&[m], Path::new("/tmp")), Err(Error::Invalid(_))));
    }

    #[test]
    fn mountinfo_is_unescaped() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new("/a b\\c"));
    }

    #[test]
    fn what_needs_a_helper_is_refused_with_the_way_out() {
        for o in ["loop", "X-containerd.mkfs.size=1", "uidmapping=0:1:2", "ridmap"] {
            let m = Mount { kind: "ext4".into(), options: vec![o.into()], ..Mount::default() };
            assert!(
                matches!(mount_all(&[m], Path::new("/tmp")), Err(Error::Unsupported(_))),
                "{o}"
            );
        }
    }

    /// `/proc/self` is the process; a thread's own mounts are in `/proc/thread-self`.
    fn mounted(path: &Path) -> bool {
        let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        text.lines().any(|l| l.split(' ').nth(4).map(unescape).as_deref() == Some(path))
    }

    fn mount(kind: &str, source: &Path, target: &str, options: &[String]) -> Mount {
        let source = source.to_str().unwrap().into();
        Mount { kind: kind.into(), source, target: target.into(), options: options.into() }
    }

    #[test]
    fn more_layers_than_a_page_of_options_are_mounted() {
        crate::testing::apart(|dir| {
            mount_shm(dir, 1 << 20).unwrap();
            let at = |s: String| {
                let p = dir.join(s);
                std::fs::create_dir_all(&p).unwrap();
                p.to_str().unwrap().to_owned()
            };
            // overlayfs stops at 500 layers; 120 long names are far beyond a page.
            let lower: Vec<String> =
                (0..120).map(|i| at(format!("{}{i}", "l".repeat(60)))).collect();
            std::fs::write(Path::new(&lower[119]).join("deep"), "x").unwrap();
            let (upper, work, target) = (at("u".into()), at("w".into()), at("t".into()));
            let options = [
                format!("lowerdir={}", lower.join(":")),
                format!("upperdir={upper}"),
                format!("workdir={work}"),
            ];
            assert!(options[0].len() > PAGE);
            let m = mount("overlay", Path::new("overlay"), "", &options);
            mount_all(&[m], Path::new(&target)).unwrap();
            assert_eq!(std::fs::read(Path::new(&target).join("deep")).unwrap(), b"x");
            unmount_below(Path::new(&target)).unwrap();
            assert!(!mounted(Path::new(&target)));
            // The way of older kernels reads from a common directory. 30 layers of that fit.
            let data = [format!("lowerdir={}", lower[90..].join(":"))];
            let data: Vec<&str> = data.iter().map(String::as_str).collect();
            let fd = at_path(Path::new(&target)).unwrap();
            overlay::mount_relative(fd.as_fd(), "overlay", MsFlags::MS_RDONLY, &data).unwrap();
            assert!(Path::new(&target).join("deep").exists());
            unmount(Path::new(&target)).unwrap();
        });
    }

    #[test]
    fn a_bind_is_read_only_and_a_failure_undoes_the_first_mounts() {
        crate::testing::apart(|_| {
            let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let ro = ["rbind".into(), "ro".into(), "rprivate".into()];
            let bind = mount("bind", a.path(), "", &ro);
            mount_all(std::slice::from_ref(&bind), b.path()).unwrap();
            let e = std::fs::write(b.path().join("x"), "x").unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::EROFS));
            unmount(b.path()).unwrap();
            let bad = mount("bind", Path::new("/no/such"), "", &ro);
            assert!(mount_all(&[bind, bad], b.path()).is_err());
            assert!(!mounted(b.path()));
        });
    }

    #[test]
    fn a_planted_link_does_not_move_a_mount_out_of_the_rootfs() {
        crate::testing::apart(|_| {
            let (root, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            std::os::unix::fs::symlink(out.path(), root.path().join("data")).unwrap();
            let tmpfs = mount("tmpfs", Path::new("tmpfs"), "/data", &[]);
            assert!(mount_all(&[tmpfs], root.path()).is_err());
            assert!(!mounted(out.path()));
        });
    }
}
