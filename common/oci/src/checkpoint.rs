//! Checkpoints by CRIU, which runc and crun run.
//!
//! **Standard streams.** A container has containerd's FIFOs themselves as its standard streams,
//! which lie in none of its mounts: CRIU must be told that they are external when it dumps, and
//! what to put in their place when it restores. Engines only do that for pipes. CRIU also reads a
//! configuration file that the annotation `org.criu.config` names; every container of an engine
//! with a command line gets one of ours (`annotate`), so that no image and no pod names another.
//!
//! **An image is not to be trusted.** containerd may have it from a registry. The container's
//! spec comes from the request alone. The image must be a flat directory of plain files: a link,
//! or anything else that is opened by name, could lead out of it. The one file of it that is read
//! here (`FILE`) is bounded and goes word by word through a grammar, because it becomes lines of
//! CRIU's configuration. What CRIU itself reads, memory, registers, credentials and capabilities
//! of the processes, is not checked by anybody.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use containerd_task::error::{Error, Result};
use kuasar_host::process::find_program;
use kuasar_host::{record, safe_path};
use kuasar_protos::runc_options::CheckpointOptions;
use protobuf::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::engine::Engine;
use containerd_task::host::internal;

/// CRIU's configuration file in a container's directory.
const CONF: &str = "criu.conf";
/// Where CRIU leaves its logs, in a container's directory.
const WORK: &str = "criu";
/// What we add to an image.
const FILE: &str = "kuasar.json";
/// Bytes that this file may have.
const MOST: u64 = 4096;
/// Files that an image may have.
const FILES: usize = 1 << 16;

/// What a restore must know of the checkpoint.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Notes {
    /// CRIU's names of standard input, output and error, where they were external.
    streams: [Option<String>; 3],
    tcp_established: bool,
    ext_unix_sk: bool,
    file_locks: bool,
}

/// Has CRIU read our configuration file, whatever a pod would have it read.
pub(crate) fn annotate(spec: &mut Value, dir: &Path) {
    let Some(spec) = spec.as_object_mut() else { return };
    let annotations = spec.entry("annotations").or_insert(Value::Null);
    if !annotations.is_object() {
        *annotations = Value::Object(Map::new());
    }
    if let Some(annotations) = annotations.as_object_mut() {
        annotations.insert("org.criu.config".into(), json!(dir.join(CONF)));
    }
}

/// Whether this engine can checkpoint and restore here.
pub(crate) fn possible(engine: &Engine) -> Result<()> {
    if engine.is_builtin() {
        return Err(Error::Unimplemented(
            "the built-in engine makes and restores no checkpoints: choose runc or crun for this \
             pod"
            .into(),
        ));
    }
    if find_program(Path::new("criu")).is_none() {
        return Err(Error::Unimplemented("checkpoints need criu, which is not installed".into()));
    }
    Ok(())
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(|word| (*word).to_owned()).collect()
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .filter(|_| path.is_absolute())
        .ok_or_else(|| Error::InvalidArgument(format!("{}: not an absolute path", path.display())))
}

/// The options of a checkpoint and where its image goes: a request names it beside them or in them.
///
/// # Errors
/// [`Error::InvalidArgument`] for options of another type.
pub fn asked(
    image: &Path,
    options: Option<(String, Vec<u8>)>,
) -> Result<(CheckpointOptions, PathBuf)> {
    let options = match options {
        Some((url, value)) if url.ends_with("containerd.runc.v1.CheckpointOptions") => {
            CheckpointOptions::parse_from_bytes(&value)
                .map_err(|error| Error::InvalidArgument(format!("checkpoint options: {error}")))?
        }
        Some((url, _)) if !url.is_empty() => {
            return Err(Error::InvalidArgument(format!(
                "options are a {url:.200}, expected containerd.runc.v1.CheckpointOptions"
            )));
        }
        _ => CheckpointOptions::new(),
    };
    let image = match image.to_str() {
        Some("") => PathBuf::from(&options.image_path),
        _ => image.to_owned(),
    };
    Ok((options, image))
}

/// The command line of a checkpoint into `image`, its configuration written; the image, and what
/// belongs into it afterwards.
pub(crate) fn dump(
    dir: &Path,
    id: &str,
    pid: u32,
    image: &Path,
    options: Option<(String, Vec<u8>)>,
) -> Result<(Vec<String>, PathBuf, Notes)> {
    let (options, image) = asked(image, options)?;
    let work = match options.work_path.as_str() {
        "" => dir.join(WORK),
        path => PathBuf::from(path),
    };
    let mut command = words(&["checkpoint", "--image-path", text(&image)?, "--work-path"]);
    command.push(text(&work)?.to_owned());
    let flags = [
        (!options.exit, "--leave-running"),
        (options.open_tcp, "--tcp-established"),
        (options.external_unix_sockets, "--ext-unix-sk"),
        (options.terminal, "--shell-job"),
        (options.file_locks, "--file-locks"),
    ];
    command.extend(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| (*flag).to_owned()));
    for namespace in &options.empty_namespaces {
        // A word of its own, but never an option.
        command.push(format!("--empty-ns={namespace}"));
    }
    if !options.cgroups_mode.is_empty() {
        command.push(format!("--manage-cgroups-mode={}", options.cgroups_mode));
    }
    command.push(id.to_owned());
    let notes = Notes {
        streams: external_streams(pid)?,
        tcp_established: options.open_tcp,
        ext_unix_sk: options.external_unix_sockets,
        file_locks: options.file_locks,
    };
    let lines = notes.streams.iter().flatten().map(|key| format!("external {key}\n"));
    configure(dir, &lines.collect::<String>())?;
    Ok((command, image, notes))
}

fn configure(dir: &Path, conf: &str) -> Result<()> {
    let mut conf = conf.to_owned();
    // CRIU stops the network by running iptables unless told otherwise; nftables it can do itself.
    if find_program(Path::new("iptables-restore")).is_none() {
        conf.push_str("network-lock nftables\n");
    }
    record::write_file(&dir.join(CONF), conf.as_bytes(), 0o600)
        .map_err(internal("write CRIU's configuration"))
}

/// Adds what a restore must know to an image that is complete.
pub(crate) fn finish(image: &Path, notes: &Notes) -> Result<()> {
    let wrap = |error| Error::internal(format!("write {FILE} into the checkpoint"), error);
    let text = serde_json::to_vec(notes).map_err(|error| wrap(std::io::Error::other(error)))?;
    let mut how = std::fs::OpenOptions::new();
    how.write(true).create_new(true).mode(0o600);
    let mut file = how.open(image.join(FILE)).map_err(wrap)?;
    file.write_all(&text).map_err(wrap)
}

/// CRIU's names of the standard streams that lie in none of the process's own mounts.
fn external_streams(pid: u32) -> Result<[Option<String>; 3]> {
    let wrap = |error| Error::internal("look at the container's standard streams", error);
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).map_err(wrap)?;
    let own: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').next()).collect();
    let mut streams = [None, None, None];
    for (fd, stream) in streams.iter_mut().enumerate() {
        let at = format!("/proc/{pid}/fd/{fd}");
        // Pipes and sockets have no path, and engines know what to do with them.
        let Ok(target) = std::fs::read_link(&at) else { continue };
        let Ok(kind) = std::fs::metadata(&at).map(|meta| meta.file_type()) else { continue };
        if !target.is_absolute() || !(kind.is_fifo() || kind.is_file()) {
            continue;
        }
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).map_err(wrap)?;
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().to_owned())
        };
        let (Some(mount), Some(inode)) = (field("mnt_id:"), field("ino:")) else { continue };
        let (Ok(number), Ok(inode)) = (mount.parse::<u32>(), inode.parse::<u64>()) else {
            continue;
        };
        if !own.contains(&mount.as_str()) {
            *stream = Some(format!("file[{number:x}:{inode:x}]"));
        }
    }
    Ok(streams)
}

/// The command line of a restore from `image`, without the streams' part, its configuration
/// written; `given` are the standard streams that the request has.
pub(crate) fn restore(dir: &Path, image: &Path, given: [bool; 3]) -> Result<Vec<String>> {
    let notes = check(image)?;
    let mut conf = String::new();
    for (fd, (key, given)) in notes.streams.iter().zip(given).enumerate() {
        let Some(key) = key else { continue };
        if !given {
            let name = ["standard input", "standard output", "standard error"];
            return Err(Error::InvalidArgument(format!(
                "the checkpoint has a {}, and the request has none",
                name.get(fd).unwrap_or(&"stream")
            )));
        }
        conf += &format!("inherit-fd fd[{fd}]:{key}\n");
    }
    configure(dir, &conf)?;
    let work = dir.join(WORK);
    let mut command = words(&["restore", "--detach", "--bundle", text(dir)?]);
    command.extend(words(&["--image-path", text(image)?, "--work-path", text(&work)?]));
    let flags = [
        (notes.tcp_established, "--tcp-established"),
        (notes.ext_unix_sk, "--ext-unix-sk"),
        (notes.file_locks, "--file-locks"),
    ];
    command.extend(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| (*flag).to_owned()));
    Ok(command)
}

/// Opens an image that somebody else may have made.
///
/// # Errors
/// [`Error::InvalidArgument`] for one that is not a flat directory of plain files.
pub fn open(image: &Path) -> Result<OwnedFd> {
    text(image)?;
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mut how = std::fs::OpenOptions::new();
    let opened = how.read(true).custom_flags(flags).open(image);
    let root = OwnedFd::from(opened.map_err(|e| bad(format!("{}: {e}", image.display())))?);
    let listed = std::fs::read_dir(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let listed = listed.map_err(|e| bad(e.to_string()))?;
    for (count, entry) in listed.enumerate() {
        let entry = entry.map_err(|e| bad(e.to_string()))?;
        // Of the entry itself: links are not followed.
        let kind = entry.file_type().map_err(|e| bad(e.to_string()))?;
        if !kind.is_file() {
            let name = entry.file_name();
            let name: String = name.to_string_lossy().chars().take(100).collect();
            return Err(bad(format!("{name:?} is no plain file, and a checkpoint has no other")));
        }
        if count >= FILES {
            return Err(bad(format!("it has more than {FILES} files")));
        }
    }
    Ok(root)
}

fn bad(text: String) -> Error {
    Error::InvalidArgument(format!("checkpoint: {text}"))
}

/// Looks at an image that somebody else may have made; answers what we once added to it.
///
/// # Errors
/// As [`open`].
pub(crate) fn check(image: &Path) -> Result<Notes> {
    let root = open(image)?;
    let Ok(file) = safe_path::open_beneath(root.as_fd(), Path::new(FILE), libc::O_RDONLY, 0) else {
        return Ok(Notes::default()); // Somebody else's: its streams were pipes.
    };
    let mut text = Vec::new();
    let read = std::fs::File::from(file).take(MOST + 1).read_to_end(&mut text);
    let read = read.map_err(|e| bad(format!("{FILE}: {e}")))?;
    if read as u64 > MOST {
        return Err(bad(format!("{FILE} has more than {MOST} bytes")));
    }
    let notes: Notes = serde_json::from_slice(&text).map_err(|e| bad(format!("{FILE}: {e}")))?;
    match notes.streams.iter().flatten().find(|key| !is_key(key)) {
        Some(key) => Err(bad(format!("{FILE}: {key:.100?} is no stream"))),
        None => Ok(notes),
    }
}

/// `file[<hexadecimal>:<hexadecimal>]`.
fn is_key(key: &str) -> bool {
    let inner = key.strip_prefix("file[").and_then(|rest| rest.strip_suffix(']'));
    let is_hex = |n: &str| {
        (1..=16).contains(&n.len()) && n.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    inner.and_then(|inner| inner.split_once(':')).is_some_and(|(m, i)| is_hex(m) && is_hex(i))
}

/// What CRIU says went wrong, from the log that it has left in the container's directory.
pub(crate) fn reason(dir: &Path, log: &str) -> Option<String> {
    let text = std::fs::read(dir.join(WORK).join(log)).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The first is the cause, the others follow from it; this one is none.
    let mut errors = text.lines().filter(|l| l.contains("Error (") && !l.contains("rlimit: "));
    let line = errors.next()?;
    Some(line.chars().filter(|c| !c.is_control()).take(500).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("core-1.img"), b"x").unwrap();
        dir
    }

    #[test]
    fn an_image_of_plain_files_is_taken_with_and_without_notes() {
        let image = image();
        assert_eq!(check(image.path()).unwrap(), Notes::default());
        let notes = Notes {
            streams: [None, Some("file[2b:6a2561]".into()), None],
            tcp_established: true,
            ..Notes::default()
        };
        finish(image.path(), &notes).unwrap();
        assert_eq!(check(image.path()).unwrap(), notes);
        let dir = tempfile::tempdir().unwrap();
        let command = restore(dir.path(), image.path(), [false, true, true]).unwrap();
        assert!(command.contains(&"--tcp-established".into()), "{command:?}");
        let conf = std::fs::read_to_string(dir.path().join(CONF)).unwrap();
        // How the network is stopped depends on what the host has.
        let lock = match find_program(Path::new("iptables-restore")) {
            Some(_) => "",
            None => "network-lock nftables\n",
        };
        assert_eq!(conf, format!("inherit-fd fd[1]:file[2b:6a2561]\n{lock}"));
        let refused = restore(dir.path(), image.path(), [true, false, true]);
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{refused:?}");
    }

    #[test]
    fn an_image_with_anything_that_leads_out_of_it_is_refused() {
        let refused = |image: &Path| {
            let answer = check(image);
            assert!(matches!(answer, Err(Error::InvalidArgument(_))), "{answer:?}");
        };
        let link = image();
        std::os::unix::fs::symlink("/etc/shadow", link.path().join("pages-1.img")).unwrap();
        refused(link.path());
        let parent = image();
        std::os::unix::fs::symlink("..", parent.path().join("parent")).unwrap();
        refused(parent.path());
        let fifo = image();
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::unistd::mkfifo(&fifo.path().join("files.img"), mode).unwrap();
        refused(fifo.path());
        let nested = image();
        std::fs::create_dir(nested.path().join("d")).unwrap();
        refused(nested.path());
        let own = image();
        std::os::unix::fs::symlink(own.path(), nested.path().join("l")).unwrap();
        refused(&nested.path().join("l"));
        refused(Path::new("relative"));
        refused(&own.path().join("none"));
    }

    #[test]
    fn notes_never_become_another_line_of_criu_s_configuration() {
        for key in [
            "file[1:2]\naction-script /tmp/x",
            "file[1:2] x",
            "file[1:]",
            "file[A:1]",
            "net[1]:x",
            "file[11111111111111111:1]",
            "",
        ] {
            let image = image();
            let notes = Notes { streams: [Some(key.into()), None, None], ..Notes::default() };
            finish(image.path(), &notes).unwrap();
            assert!(matches!(check(image.path()), Err(Error::InvalidArgument(_))), "{key:?}");
        }
        let image = image();
        std::fs::write(image.path().join(FILE), vec![b' '; 5000]).unwrap();
        assert!(matches!(check(image.path()), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn a_pod_cannot_choose_criu_s_configuration() {
        let mut spec = json!({ "annotations": { "org.criu.config": "/tmp/evil", "a": "b" } });
        annotate(&mut spec, Path::new("/d"));
        assert_eq!(spec["annotations"], json!({ "org.criu.config": "/d/criu.conf", "a": "b" }));
        let mut spec = json!({});
        annotate(&mut spec, Path::new("/d"));
        assert_eq!(spec["annotations"]["org.criu.config"], "/d/criu.conf");
    }

    #[test]
    fn options_become_flags_of_the_engine() {
        let dir = tempfile::tempdir().unwrap();
        let options = CheckpointOptions {
            exit: true,
            open_tcp: true,
            external_unix_sockets: true,
            terminal: true,
            file_locks: true,
            empty_namespaces: vec!["network".into()],
            cgroups_mode: "soft".into(),
            work_path: "/w".into(),
            ..CheckpointOptions::default()
        };
        let any = |options: &CheckpointOptions| {
            let url = "containerd.runc.v1.CheckpointOptions".to_owned();
            Some((url, options.write_to_bytes().unwrap()))
        };
        let (pid, at) = (std::process::id(), Path::new("/image"));
        let (command, _, _) = dump(dir.path(), "c", pid, at, any(&options)).unwrap();
        assert_eq!(
            command.join(" "),
            "checkpoint --image-path /image --work-path /w --tcp-established --ext-unix-sk \
             --shell-job --file-locks --empty-ns=network --manage-cgroups-mode=soft c"
        );
        let (command, _, _) = dump(dir.path(), "c", pid, at, None).unwrap();
        assert!(command.contains(&"--leave-running".to_owned()));
        let wrong = Some(("other.Options".to_owned(), Vec::new()));
        assert!(matches!(dump(dir.path(), "c", pid, at, wrong), Err(Error::InvalidArgument(_))));
    }
}
