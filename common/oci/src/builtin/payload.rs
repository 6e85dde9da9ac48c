//! The last step of every container process: find the executable and become it.
//!
//! libcontainer calls [`Payload`] in place of its default executor, [`super::exec`] calls the
//! functions directly. What differs from libcontainer's default:
//! * the SELinux label of the spec is applied (libcontainer 0.7 ignores it);
//! * `SIGPIPE` goes back to its default: the Rust runtime ignores it, and an ignored signal
//!   survives execve;
//! * the environment is the spec's, in its order, with its duplicates;
//! * errors read as runc's do, because users know those.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};

/// Used when the process has no `PATH`, as runc does it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The executor given to libcontainer.
#[derive(Clone, Debug)]
pub struct Payload;

impl Executor for Payload {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        if let Some(label) = process.selinux_label().as_deref().filter(|label| !label.is_empty()) {
            set_exec_label(Path::new("/proc"), label).map_err(ExecutorError::Other)?;
        }
        Err(ExecutorError::Other(execute(process)))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| ExecutorValidationError::ArgValidationError("no process".into()))?;
        find(process).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(
        &self,
        envs: std::collections::HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        // libcontainer adds HOME from the container's passwd here; `execute` takes all other
        // variables from the spec.
        if let Some(home) = envs.get("HOME") {
            // SAFETY: this process has one thread.
            unsafe { std::env::set_var("HOME", home) };
        }
        Ok(())
    }
}

/// Labels the coming execve. `proc` must be a procfs that the container does not control.
pub fn set_exec_label(proc: &Path, label: &str) -> Result<(), String> {
    let path = proc.join("thread-self/attr/exec");
    let is_procfs = nix::sys::statfs::statfs(proc)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC);
    if !is_procfs {
        return Err(format!("{} is not procfs: not writing a label there", proc.display()));
    }
    match std::fs::write(&path, label) {
        // SELinux is not on: the label means nothing here.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
        other => other.map_err(|error| format!("SELinux label {label}: {error}")),
    }
}

fn variable<'a>(process: &'a Process, name: &str) -> Option<&'a str> {
    process.env().as_ref()?.iter().rev().find_map(|entry| {
        let (key, value) = entry.split_once('=')?;
        (key == name).then_some(value)
    })
}

/// Where `args[0]` is, by the rules of execvp with the container's own `PATH`.
pub fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .filter(|name| !name.is_empty())
        .ok_or_else(|| "exec: no command specified".to_owned())?;
    if name.contains('/') {
        let path = Path::new(name);
        let meta = std::fs::metadata(path).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => format!("exec: {name:?}: stat {name}: no such file or directory"),
            Some(libc::EACCES) => format!("exec: {name:?}: permission denied"),
            Some(libc::ENOTDIR) => format!("exec: {name:?}: stat {name}: not a directory"),
            _ => format!("exec: {name:?}: {error}"),
        })?;
        if meta.is_dir() {
            return Err(format!("exec: {name:?}: is a directory"));
        }
        if !executable(path) {
            return Err(format!("exec: {name:?}: permission denied"));
        }
        return Ok(path.to_owned());
    }
    let mut denied = false;
    for dir in variable(process, "PATH").unwrap_or(DEFAULT_PATH).split(':') {
        let path = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() && executable(&path) => return Ok(path),
            Ok(meta) if meta.is_file() => denied = true,
            _ => {}
        }
    }
    Err(if denied {
        format!("exec: {name:?}: permission denied")
    } else {
        format!("exec: {name:?}: executable file not found in $PATH")
    })
}

fn executable(path: &Path) -> bool {
    // The effective ids count: this runs after setuid, and before it for the first check.
    nix::unistd::eaccess(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

fn c_string(text: &OsStr) -> Result<CString, String> {
    CString::new(text.as_bytes()).map_err(|_| format!("exec: {text:?} holds a NUL byte"))
}

/// Becomes the process of the spec. Returns only the reason why not.
pub fn execute(process: &Process) -> String {
    match prepare(process) {
        Ok((path, args, env)) => {
            reset_signals();
            let Err(error) = nix::unistd::execve(&path, &args, &env);
            let reason = match error {
                nix::errno::Errno::ENOEXEC => "exec format error".to_owned(),
                nix::errno::Errno::ENOENT => "no such file or directory".to_owned(),
                nix::errno::Errno::EACCES => "permission denied".to_owned(),
                other => other.desc().to_lowercase(),
            };
            format!("exec {}: {reason}", path.to_string_lossy())
        }
        Err(reason) => reason,
    }
}

type Image = (CString, Vec<CString>, Vec<CString>);

fn prepare(process: &Process) -> Result<Image, String> {
    let path = find(process)?;
    let args = process
        .args()
        .iter()
        .flatten()
        .map(|arg| c_string(OsStr::new(arg)))
        .collect::<Result<Vec<_>, _>>()?;
    let mut env = process
        .env()
        .iter()
        .flatten()
        .map(|entry| c_string(OsStr::new(entry)))
        .collect::<Result<Vec<_>, _>>()?;
    if variable(process, "HOME").is_none() {
        let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
        let mut entry = std::ffi::OsString::from("HOME=");
        entry.push(home);
        env.push(c_string(&entry)?);
    }
    Ok((c_string(path.as_os_str())?, args, env))
}

/// Default dispositions and an empty mask, as a login shell would have them.
fn reset_signals() {
    for number in 1..=64 {
        // SAFETY: plain system call; SIGKILL, SIGSTOP and glibc's own signals answer an error.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    let empty = nix::sys::signal::SigSet::empty();
    // Cannot fail with a valid set.
    let _ = nix::sys::signal::sigprocmask(
        nix::sys::signal::SigmaskHow::SIG_SETMASK,
        Some(&empty),
        None,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::ProcessBuilder;

    fn process(args: &[&str], env: &[&str]) -> Process {
        ProcessBuilder::default()
            .args(args.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
            .env(env.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
            .build()
            .unwrap()
    }

    #[test]
    fn errors_read_as_runc_writes_them() {
        assert_eq!(
            find(&process(&["foo-bar"], &["PATH=/bin"])).unwrap_err(),
            "exec: \"foo-bar\": executable file not found in $PATH"
        );
        assert_eq!(
            find(&process(&["/no/such"], &[])).unwrap_err(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(
            find(&process(&["/etc/passwd"], &[])).unwrap_err(),
            "exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(find(&process(&["/etc"], &[])).unwrap_err(), "exec: \"/etc\": is a directory");
    }

    #[test]
    fn the_last_path_entry_of_the_environment_wins() {
        let found = find(&process(&["sh"], &["PATH=/nowhere", "PATH=/bin:/usr/bin"])).unwrap();
        assert_eq!(found, Path::new("/bin/sh"));
    }

    #[test]
    fn a_label_is_only_written_to_procfs() {
        let dir = tempfile::tempdir().unwrap();
        assert!(set_exec_label(dir.path(), "x").unwrap_err().contains("not procfs"));
    }
}
