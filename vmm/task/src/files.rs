//! Copies of the host's files, for containers of a pod without a share.
//!
//! A volume is a directory or a file at `/run/kuasar/files/<container>/m<N>`, in a tmpfs. It is built
//! beside that place, from the pieces that the host sends, and shown when it is whole.
//!
//! A volume that is there already is renewed as kubelet renews its own: the new directory, whose name
//! begins with `..`, is put beside the old one, and then `..data` leads to the new one from one moment to
//! the next. The directory that containers have mounted stays the same, and no reader sees a half.
//!
//! Containers may write into a volume. So nothing below one is ever followed, and nothing but its first
//! level is changed once it is shown.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use containerd_task::error::{Error, Result};
use containerd_task::host::blocking;
use kuasar_host::mount::{Mount, mount_all};
use kuasar_host::safe_path::{Root, open_beneath, proc_path};
use kuasar_host::xattr;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, readlinkat, renameat};
use nix::sys::stat::{Mode, fchmod, fstat, fstatat, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, linkat, symlinkat, unlinkat};
use vmm_common::guest::{FileEntry, PutFilesRequest, TakeFileRequest, file_entry::Kind};
use vmm_common::{DEBUG_FILES, FILES_PATH};

use crate::limits;

/// Where volumes are built. No id begins like that, neither a container's nor a debug session's.
const BUILD: &str = ".new";
/// A volume within its place below [`BUILD`].
const IT: &str = "it";
/// The link of a volume of kubelet's that leads to its contents.
const DATA: &str = "..data";

/// The copies.
pub struct Files {
    base: PathBuf,
    /// Whether the tmpfs is there; one change at a time.
    turn: tokio::sync::Mutex<bool>,
}

impl Default for Files {
    fn default() -> Self {
        Self { base: FILES_PATH.into(), turn: tokio::sync::Mutex::default() }
    }
}

fn failed<E>(what: &'static str) -> impl FnOnce(E) -> Error
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |error| Error::internal(what, error)
}

/// Container and name of a volume.
fn place(container: &str, volume: u32) -> Result<String> {
    let id = container.strip_prefix(DEBUG_FILES).unwrap_or(container);
    kuasar_host::id::check("container", id)
        .map_err(|error| Error::InvalidArgument(error.to_string()))?;
    if volume >= limits::COPIES {
        let text = format!("a container has at most {} copied volumes", limits::COPIES);
        return Err(Error::ResourceExhausted(text));
    }
    Ok(format!("m{volume}"))
}

impl Files {
    /// Takes pieces of a volume, and shows it after the last.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for names that lead elsewhere; of the kernel, such as that the
    /// guest's memory is full.
    pub async fn put(&self, question: PutFilesRequest) -> Result<()> {
        if question.entries.len() > limits::FILES {
            let text = format!("more than {} files in one message", limits::FILES);
            return Err(Error::ResourceExhausted(text));
        }
        let mut mounted = self.turn.lock().await;
        let (base, there) = (self.base.clone(), *mounted);
        blocking(move || {
            if !there {
                mount(&base)?;
            }
            put(&base, &question)
        })
        .await?;
        *mounted = true;
        Ok(())
    }

    /// The end of what is in a volume that is one file.
    ///
    /// # Errors
    /// [`Error::NotFound`] where there is none.
    pub async fn take(&self, question: TakeFileRequest) -> Result<Vec<u8>> {
        let name = place(&question.container, question.volume)?;
        let path = Path::new(&question.container).join(name);
        let most = question.max_bytes.min(limits::TAKEN);
        let _turn = self.turn.lock().await;
        let base = self.base.clone();
        blocking(move || {
            let none = |_| Error::NotFound("there is no such file".into());
            let root = Root::open(&base).map_err(none)?;
            let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOFOLLOW;
            let file = std::fs::File::from(root.open_file(&path, flags).map_err(none)?);
            let meta = file.metadata().map_err(failed("look at a file"))?;
            if !meta.is_file() {
                return Err(Error::InvalidArgument("the volume is no file".into()));
            }
            let from = meta.len().saturating_sub(most);
            let mut data = vec![0; usize::try_from(meta.len() - from).unwrap_or(0)];
            let mut read = 0;
            while let Some(rest) = data.get_mut(read..).filter(|rest| !rest.is_empty()) {
                match file.read_at(rest, from + read as u64).map_err(failed("read a file"))? {
                    0 => break,
                    n => read += n,
                }
            }
            data.truncate(read);
            Ok(data)
        })
        .await
    }

    /// Removes the volumes of a container that is deleted.
    ///
    /// # Errors
    /// Of the kernel.
    pub async fn remove(&self, container: String) -> Result<()> {
        place(&container, 0)?;
        let _turn = self.turn.lock().await;
        let base = self.base.clone();
        blocking(move || {
            let Ok(root) = Root::open(&base) else { return Ok(()) };
            let what = failed("remove a container's files");
            root.remove_tree(Path::new(&container)).map_err(what)?;
            let unfinished = std::fs::read_dir(base.join(BUILD)).into_iter().flatten().flatten();
            // No id has a comma.
            let of = |name: &OsStr| {
                name.to_str()
                    .and_then(|name| name.split_once(','))
                    .is_some_and(|n| n.0 == container)
            };
            for entry in unfinished.filter(|entry| of(&entry.file_name())) {
                let path = Path::new(BUILD).join(entry.file_name());
                root.remove_tree(&path).map_err(failed("remove a container's files"))?;
            }
            Ok(())
        })
        .await
    }
}

/// Its own file system: half of the guest's memory is the most that copies take.
fn mount(base: &Path) -> Result<()> {
    if base != Path::new(FILES_PATH) {
        return Ok(());
    }
    kuasar_host::record::private_dir(base).map_err(failed("make the directory of files"))?;
    let tmpfs = Mount {
        kind: "tmpfs".into(),
        source: "files".into(),
        target: String::new(),
        options: ["nosuid", "nodev", "mode=0711"].map(str::to_owned).to_vec(),
    };
    mount_all(&[tmpfs], base).map_err(failed("mount a tmpfs for files"))
}

fn put(base: &Path, question: &PutFilesRequest) -> Result<()> {
    let name = place(&question.container, question.volume)?;
    let root = Root::open(base).map_err(failed("open the directory of files"))?;
    let build = PathBuf::from(format!("{BUILD}/{},{name}", question.container));
    if question.first {
        root.remove_tree(&build).map_err(failed("remove an unfinished volume"))?;
        root.mkdir_all(&build, 0o700).map_err(failed("make a volume"))?;
    }
    let build_dir = directory(root.as_fd(), &build)
        .map_err(|_| Error::FailedPrecondition("the volume has no beginning".into()))?;
    for entry in &question.entries {
        write(build_dir.as_fd(), entry)?;
    }
    if question.last {
        let dir = root.mkdir_all(Path::new(&question.container), 0o711);
        let dir = dir.map_err(failed("make the container's directory"))?;
        show(build_dir.as_fd(), dir.as_fd(), &name)?;
        root.remove_tree(&build).map_err(failed("remove what is left of a volume"))?;
    }
    Ok(())
}

fn directory(at: BorrowedFd<'_>, path: &Path) -> kuasar_host::Result<OwnedFd> {
    open_beneath(at, path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0)
}

/// Where an entry goes, below the place at which a volume is built.
fn path_of(bytes: &[u8]) -> Result<PathBuf> {
    let path = Path::new(OsStr::from_bytes(bytes));
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || bytes.contains(&0) || bytes.len() > libc::PATH_MAX as usize {
        return Err(Error::InvalidArgument(format!("{path:.200?} is no path below a volume")));
    }
    Ok(if bytes.is_empty() { IT.into() } else { Path::new(IT).join(path) })
}

/// The directory in which `path` is, and its name there.
fn parent<'a>(build: BorrowedFd<'_>, path: &'a Path) -> Result<(OwnedFd, &'a OsStr)> {
    let above = path.parent().filter(|above| !above.as_os_str().is_empty());
    let above = above.unwrap_or(Path::new("."));
    let dir = directory(build, above).map_err(|error| {
        Error::InvalidArgument(format!("{} has no directory: {error}", path.display()))
    })?;
    Ok((dir, path.file_name().unwrap_or_default()))
}

fn write(build: BorrowedFd<'_>, entry: &FileEntry) -> Result<()> {
    let path = path_of(&entry.path)?;
    let (dir, name) = parent(build, &path)?;
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    let mode = Mode::from_bits_truncate(entry.mode & 0o7777);
    let made = |error: Errno| Error::internal(format!("make {}", path.display()), error);
    match entry.kind.enum_value() {
        Ok(Kind::DIRECTORY) => {
            match mkdirat(&dir, name, Mode::S_IRWXU) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(made(error)),
            }
            let made_dir = directory(dir.as_fd(), Path::new(name)).map_err(failed("open it"))?;
            fchown(&made_dir, owner.0, owner.1).map_err(made)?;
            fchmod(&made_dir, mode).map_err(made)?;
            attributes(made_dir.as_fd(), &path, entry)
        }
        Ok(Kind::FILE) => {
            let flags = libc::O_WRONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
            // A mode without O_CREAT is an error of openat2.
            let (flags, mode_made) =
                if entry.offset == 0 { (flags | libc::O_CREAT, 0o600) } else { (flags, 0) };
            let file = open_beneath(dir.as_fd(), Path::new(name), flags, mode_made);
            let file = std::fs::File::from(file.map_err(failed("make a file"))?);
            file.write_all_at(&entry.data, entry.offset).map_err(|error| {
                Error::internal(format!("write {} in the guest's memory", path.display()), error)
            })?;
            fchown(&file, owner.0, owner.1).map_err(made)?;
            fchmod(&file, mode).map_err(made)?;
            // A capability is lost by writing and by a new owner: after both.
            attributes(file.as_fd(), &path, entry)?;
            let time = Duration::from_nanos(u64::try_from(entry.mtime_ns).unwrap_or(0));
            let time = TimeSpec::from_duration(time);
            futimens(&file, &time, &time).map_err(made)
        }
        Ok(Kind::SYMLINK) => {
            let target = text(&entry.data)?;
            match unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(made(error)),
            }
            symlinkat(target.as_c_str(), &dir, name).map_err(made)?;
            nix::unistd::fchownat(&dir, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(made)
        }
        Ok(Kind::LINK) => {
            let first = path_of(&entry.data)?;
            let (first_dir, first_name) = parent(build, &first)?;
            match linkat(&first_dir, first_name, &dir, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::EEXIST) => Ok(()),
                Err(error) => Err(made(error)),
            }
        }
        Err(number) => Err(Error::InvalidArgument(format!("there is no kind {number} of file"))),
    }
}

/// Gives a copy the extended attributes of what it is a copy of.
fn attributes(file: BorrowedFd<'_>, path: &Path, entry: &FileEntry) -> Result<()> {
    for one in &entry.attributes {
        let name = CString::new(one.name.as_slice())
            .map_err(|_| Error::InvalidArgument("an attribute with a null byte".into()))?;
        match xattr::set(file, &name, &one.value) {
            Ok(()) => {}
            // `user.*` on a tmpfs came with Linux 6.6.
            Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => {
                tracing::warn!(?path, ?name, "this kernel's tmpfs has no such attribute: left out");
            }
            Err(error) => {
                let what = format!("give {} the attribute {name:.260?}", path.display());
                return Err(Error::internal(what, error));
            }
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Result<CString> {
    if bytes.is_empty() || bytes.len() >= libc::PATH_MAX as usize {
        return Err(Error::InvalidArgument("a link leads nowhere, or too far".into()));
    }
    CString::new(bytes).map_err(|_| Error::InvalidArgument("a link with a null byte".into()))
}

/// Shows a whole volume in `dir` under `name`.
fn show(build: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &str) -> Result<()> {
    let put = |error: Errno| Error::internal("show a volume", error);
    let is_dir = |at: BorrowedFd<'_>, name: &str| {
        let stat = fstatat(at, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        stat.map(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
    };
    let new = is_dir(build, IT)
        .map_err(|_| Error::FailedPrecondition("the volume has nothing in it".into()))?;
    match is_dir(dir, name) {
        Ok(true) if new => {
            let open =
                |at, name: &str| directory(at, Path::new(name)).map_err(failed("open a volume"));
            renew(open(build, IT)?.as_fd(), open(dir, name)?.as_fd())
        }
        Ok(old) if old == new => renameat(build, IT, dir, name).map_err(put),
        Ok(_) => Err(Error::FailedPrecondition(
            "a volume does not become a directory, nor cease to be one".into(),
        )),
        Err(Errno::ENOENT) => renameat(build, IT, dir, name).map_err(put),
        Err(error) => Err(put(error)),
    }
}

fn names(dir: BorrowedFd<'_>) -> Result<Vec<std::ffi::OsString>> {
    let entries = std::fs::read_dir(proc_path(dir)).map_err(failed("read a volume"))?;
    Ok(entries.flatten().map(|entry| entry.file_name()).collect())
}

/// Makes the volume `old`, which containers have mounted, what `new` is.
fn renew(new: BorrowedFd<'_>, old: BorrowedFd<'_>) -> Result<()> {
    let put = |error: Errno| Error::internal("renew a volume", error);
    let stat = |at: BorrowedFd<'_>, name: &OsStr| {
        fstatat(at, name, AtFlags::AT_SYMLINK_NOFOLLOW).map(|stat| stat.st_mode & libc::S_IFMT)
    };
    let wanted = names(new)?;
    let hidden = |name: &&std::ffi::OsString| name.as_bytes().starts_with(b"..");
    // What `..data` will lead to is there before it does.
    for name in wanted.iter().filter(hidden).filter(|name| name.as_os_str() != DATA) {
        if stat(old, name) == Err(Errno::ENOENT) {
            renameat(new, name.as_os_str(), old, name.as_os_str()).map_err(put)?;
        }
    }
    for name in wanted.iter().filter(|name| name.as_os_str() == DATA || !hidden(name)) {
        let link = |at| readlinkat(at, name.as_os_str()).ok();
        if link(new).is_some() && link(new) == link(old) {
            continue;
        }
        let there = stat(old, name);
        if there == Ok(libc::S_IFDIR) || (there.is_ok() && stat(new, name) == Ok(libc::S_IFDIR)) {
            remove(old, name)?;
        }
        renameat(new, name.as_os_str(), old, name.as_os_str()).map_err(put)?;
    }
    for name in names(old)?.iter().filter(|name| !wanted.contains(name)) {
        remove(old, name)?;
    }
    let like = fstat(new).map_err(put)?;
    fchown(old, Some(Uid::from_raw(like.st_uid)), Some(Gid::from_raw(like.st_gid))).map_err(put)?;
    fchmod(old, Mode::from_bits_truncate(like.st_mode & 0o7777)).map_err(put)
}

fn remove(dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    let root = dir.try_clone_to_owned().map(Root::from_fd).map_err(failed("hold a volume"))?;
    root.remove_tree(Path::new(name)).map_err(failed("remove what a volume has no longer"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use vmm_common::guest::Attribute;

    use super::*;

    fn files() -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().to_owned();
        (dir, Files { base, turn: tokio::sync::Mutex::default() })
    }

    fn entry(kind: Kind, path: &str, data: &str) -> FileEntry {
        // SAFETY: plain calls.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        FileEntry {
            kind: kind.into(),
            path: path.into(),
            mode: if kind == Kind::DIRECTORY { 0o755 } else { 0o640 },
            uid,
            gid,
            data: data.into(),
            mtime_ns: 1_700_000_000_000_000_000,
            ..FileEntry::default()
        }
    }

    fn put(volume: u32, entries: Vec<FileEntry>) -> PutFilesRequest {
        let container = "c".to_owned();
        PutFilesRequest {
            container,
            volume,
            first: true,
            entries,
            last: true,
            ..Default::default()
        }
    }

    /// As kubelet has it, with these keys.
    fn kubelets(stamp: &str, keys: &[(&str, &str)]) -> Vec<FileEntry> {
        let mut all = vec![
            entry(Kind::DIRECTORY, "", ""),
            entry(Kind::DIRECTORY, stamp, ""),
            entry(Kind::SYMLINK, "..data", stamp),
        ];
        for (key, value) in keys {
            all.push(entry(Kind::FILE, &format!("{stamp}/{key}"), value));
            all.push(entry(Kind::SYMLINK, key, &format!("..data/{key}")));
        }
        all
    }

    #[tokio::test]
    async fn a_volume_is_shown_whole_and_renewed_in_its_place() {
        let (dir, files) = files();
        let at = |name: &str| dir.path().join("c/m0").join(name);
        let text = |name: &str| std::fs::read_to_string(at(name)).unwrap();
        let begun = PutFilesRequest { last: false, ..put(0, kubelets("..1", &[("a", "1")])) };
        files.put(begun.clone()).await.unwrap();
        assert!(!at("").exists());
        // Once more, as after a connection that broke.
        files.put(begun).await.unwrap();
        let rest = vec![entry(Kind::LINK, "..1/same", "..1/a")];
        files.put(PutFilesRequest { first: false, ..put(0, rest) }).await.unwrap();
        assert_eq!((text("a").as_str(), text("..1/same").as_str()), ("1", "1"));
        let meta = std::fs::metadata(at("..1/a")).unwrap();
        assert_eq!(
            (meta.permissions().mode() & 0o7777, meta.mtime(), meta.nlink()),
            (0o640, 1_700_000_000, 2)
        );
        let place = std::fs::metadata(at("")).unwrap().ino();
        // What a container has written there goes, and a link that it has planted is not followed.
        symlink("/etc", at("planted")).unwrap();
        symlink("/etc/passwd", at("b")).unwrap();
        files.put(put(0, kubelets("..2", &[("b", "2"), ("c", "3")]))).await.unwrap();
        assert_eq!((text("b").as_str(), text("c").as_str()), ("2", "3"));
        assert_eq!(std::fs::read_link(at("..data")).unwrap(), Path::new("..2"));
        assert_eq!(std::fs::metadata(at("")).unwrap().ino(), place);
        for gone in ["a", "..1", "planted"] {
            assert!(at(gone).symlink_metadata().is_err(), "{gone}");
        }
        // The same once more changes nothing.
        files.put(put(0, kubelets("..2", &[("b", "2"), ("c", "3")]))).await.unwrap();
        assert_eq!(text("b"), "2");
        files.remove("c".into()).await.unwrap();
        files.remove("c".into()).await.unwrap();
        assert!(!dir.path().join("c").exists());
        assert_eq!(std::fs::read_dir(dir.path().join(BUILD)).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_file_comes_in_pieces_and_its_attributes_with_the_last() {
        let (dir, files) = files();
        let piece = |offset, data: &str, attributes| FileEntry {
            offset,
            attributes,
            ..entry(Kind::FILE, "f", data)
        };
        let attribute = |name: &str, value: &[u8]| Attribute {
            name: name.into(),
            value: value.into(),
            ..Attribute::default()
        };
        let begun = vec![entry(Kind::DIRECTORY, "", ""), piece(0, "one ", Vec::new())];
        files.put(PutFilesRequest { last: false, ..put(0, begun) }).await.unwrap();
        let mut all = vec![attribute("user.kind", b"1\0\xff")];
        // SAFETY: a plain call.
        let is_root = unsafe { libc::geteuid() } == 0;
        // VFS_CAP_REVISION_2 with CAP_NET_BIND_SERVICE, effective.
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        if is_root {
            all.push(attribute("security.capability", &capability));
        }
        let rest = vec![piece(4, "two", all)];
        files.put(PutFilesRequest { first: false, ..put(0, rest) }).await.unwrap();
        let path = dir.path().join("c/m0/f");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
        assert_eq!(std::fs::metadata(&path).unwrap().mtime(), 1_700_000_000);
        let file = std::fs::File::open(&path).unwrap();
        let get = |name| xattr::get(file.as_fd(), name).unwrap();
        match get(c"user.kind") {
            Some(value) => assert_eq!(value, b"1\0\xff"),
            None => eprintln!("skipped: no attributes of users on {}", dir.path().display()),
        }
        assert_eq!(get(c"security.capability"), is_root.then(|| capability.to_vec()));
        let bad = piece(0, "", vec![attribute("user.a\0b", b"")]);
        let error = files.put(put(1, vec![entry(Kind::DIRECTORY, "", ""), bad])).await;
        assert!(matches!(error, Err(Error::InvalidArgument(_))));
    }

    #[tokio::test]
    async fn no_name_leads_out_of_a_volume() {
        let (dir, files) = files();
        let out = tempfile::tempdir().unwrap();
        let out_of = out.path().to_str().unwrap();
        for path in ["../x", "/x", "a/../../x", "./x", "a\0b"] {
            let entries = vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::FILE, path, "x")];
            let error = files.put(put(0, entries)).await.unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{path}: {error}");
        }
        let through = vec![
            entry(Kind::DIRECTORY, "", ""),
            entry(Kind::SYMLINK, "l", out_of),
            entry(Kind::FILE, "l/x", "x"),
        ];
        assert!(files.put(put(0, through)).await.is_err());
        let linked = vec![entry(Kind::DIRECTORY, "", ""), entry(Kind::LINK, "l", "../../../x")];
        assert!(files.put(put(0, linked)).await.is_err());
        for container in ["", "../c", ".new", ".debug-", ".debug-../c", ".debug-.debug-c"] {
            let question = PutFilesRequest { container: container.into(), ..put(0, Vec::new()) };
            assert!(files.put(question).await.is_err());
            assert!(files.remove(container.into()).await.is_err());
        }
        assert!(files.put(put(limits::COPIES, Vec::new())).await.is_err());
        let no_beginning = PutFilesRequest { first: false, ..put(7, Vec::new()) };
        assert!(matches!(files.put(no_beginning).await, Err(Error::FailedPrecondition(_))));
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
        assert!(!dir.path().join("x").exists());
    }

    #[tokio::test]
    async fn a_debug_sessions_files_are_not_those_of_a_container_of_its_name() {
        let (dir, files) = files();
        let debug = format!("{DEBUG_FILES}c");
        for container in ["c", &debug] {
            let question = put(0, vec![entry(Kind::FILE, "", container)]);
            files.put(PutFilesRequest { container: container.into(), ..question }).await.unwrap();
        }
        let text = |id: &str| std::fs::read_to_string(dir.path().join(id).join("m0")).unwrap();
        assert_eq!((text("c"), text(&debug)), ("c".to_owned(), debug.clone()));
        files.remove(debug.clone()).await.unwrap();
        assert!(dir.path().join("c/m0").exists() && !dir.path().join(&debug).exists());
    }

    #[tokio::test]
    async fn of_a_file_its_end_is_answered_and_nothing_but_a_file() {
        let (dir, files) = files();
        files.put(put(0, vec![entry(Kind::FILE, "", "")])).await.unwrap();
        let at = dir.path().join("c/m0");
        std::fs::write(&at, "0123456789").unwrap();
        let take =
            |max_bytes| TakeFileRequest { container: "c".into(), max_bytes, ..Default::default() };
        assert_eq!(files.take(take(4)).await.unwrap(), b"6789");
        assert_eq!(files.take(take(0)).await.unwrap(), b"");
        assert_eq!(files.take(take(u64::MAX)).await.unwrap(), b"0123456789");
        std::fs::remove_file(&at).unwrap();
        symlink("/etc/passwd", &at).unwrap();
        assert!(matches!(files.take(take(4)).await, Err(Error::NotFound(_))));
        std::fs::remove_file(&at).unwrap();
        std::fs::create_dir(&at).unwrap();
        assert!(files.take(take(4)).await.is_err());
    }
}
