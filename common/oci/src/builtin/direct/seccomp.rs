//! Seccomp filters: compiled by libseccomp, kept, loaded by ourselves.
//!
//! Compiling a container's usual profile takes libseccomp some milliseconds, and nearly every
//! container has the same. So the program that comes out is kept in a directory of the daemon's
//! (0700, root's) under a hash of the profile. The file holds the profile, too: another one with
//! the same hash is not mistaken for it.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::Path;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};

use serde::Deserialize;

use super::spec::Argument;
pub use super::spec::Seccomp;
use super::sys;

/// First bytes of a kept program; changed whenever what a profile means here changes.
const MAGIC: &[u8] = b"kuasar-seccomp-2\n";
/// Most bytes that are read of a kept program. The kernel takes 4096 instructions of 8 bytes.
const MAX_KEPT: u64 = 1 << 20;

/// A filter that can be loaded.
#[derive(Debug)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u64,
}

fn action(name: &str, errno: Option<u32>) -> Result<ScmpAction, String> {
    let value = match errno {
        Some(errno) => i32::try_from(errno).map_err(|_| format!("errno {errno}"))?,
        None => libc::EPERM,
    };
    ScmpAction::from_str(name, Some(value)).map_err(|_| format!("seccomp action {name:.40?}"))
}

fn flags(names: &Option<Vec<String>>) -> Result<u64, String> {
    names.iter().flatten().try_fold(0, |flags, name| match name.as_str() {
        // There is one thread.
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | libc::SECCOMP_FILTER_FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        other => Err(format!("seccomp flag {other:.60?}")),
    })
}

fn architecture(name: &str) -> Result<ScmpArch, String> {
    name.parse().map_err(|_| format!("seccomp architecture {name:.40?}"))
}

fn condition(argument: &Argument) -> Result<ScmpArgCompare, String> {
    let (op, value) = match argument.op.as_str() {
        "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, argument.value),
        "SCMP_CMP_LT" => (ScmpCompareOp::Less, argument.value),
        "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, argument.value),
        "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, argument.value),
        "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, argument.value),
        "SCMP_CMP_GT" => (ScmpCompareOp::Greater, argument.value),
        // The mask is the first value, what is left after it the second.
        "SCMP_CMP_MASKED_EQ" => (ScmpCompareOp::MaskedEqual(argument.value), argument.value_two),
        other => return Err(format!("seccomp comparison {other:.40?}")),
    };
    Ok(ScmpArgCompare::new(argument.index, op, value))
}

/// Whether this profile can be compiled here, without compiling it.
pub fn check(profile: &Seccomp) -> Result<(), String> {
    let plain = |name: &str, errno| match action(name, errno)? {
        ScmpAction::Notify => Err("a seccomp listener".to_owned()),
        _ => Ok(()),
    };
    plain(&profile.default_action, profile.default_errno_ret)?;
    flags(&profile.flags)?;
    profile.architectures.iter().flatten().try_for_each(|name| architecture(name).map(drop))?;
    for rule in profile.syscalls.iter().flatten() {
        plain(&rule.action, rule.errno_ret)?;
        rule.args.iter().flatten().try_for_each(|argument| condition(argument).map(drop))?;
    }
    Ok(())
}

impl Filter {
    /// The filter of a profile: a kept one of `cache`, or compiled now and kept there.
    pub fn of(profile: &Seccomp, cache: Option<&Path>) -> Result<Self, String> {
        let text = serde_json::to_vec(profile).map_err(|error| error.to_string())?;
        let mut hasher = std::hash::DefaultHasher::new();
        text.hash(&mut hasher);
        let file = cache.map(|dir| dir.join(format!("{:016x}.bpf", hasher.finish())));
        let flags = flags(&profile.flags)?;
        if let Some(bytes) = file.as_deref().and_then(|file| kept(file, &text)) {
            return Ok(Self { program: instructions(&bytes), flags });
        }
        let bytes = compile(profile)?;
        if let Some(file) = &file {
            // Nothing is lost without it but time.
            let _ = keep(file, &text, &bytes);
        }
        Ok(Self { program: instructions(&bytes), flags })
    }

    /// The filter of a profile as `linux.seccomp` of a spec has it.
    ///
    /// # Errors
    /// What is wrong with the profile.
    pub fn compile(profile: &serde_json::Value) -> Result<Self, String> {
        let profile = Seccomp::deserialize(profile).map_err(|error| error.to_string())?;
        check(&profile)?;
        Ok(Self { program: instructions(&compile(&profile)?), flags: flags(&profile.flags)? })
    }

    /// Filters this process from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn load(&self) -> Result<(), String> {
        sys::load_seccomp(&self.program, self.flags)
            .map_err(|error| format!("cannot load the seccomp profile: {error}"))
    }
}

fn instructions(bytes: &[u8]) -> Vec<libc::sock_filter> {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect()
}

/// A kept program of exactly this profile.
fn kept(file: &Path, text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file).ok()?.take(MAX_KEPT).read_to_end(&mut bytes).ok()?;
    let rest = bytes.strip_prefix(MAGIC)?;
    let (len, rest) = rest.split_first_chunk::<8>()?;
    let at = usize::try_from(u64::from_le_bytes(*len)).ok()?;
    let (profile, program) = rest.split_at_checked(at)?;
    let whole = !program.is_empty() && program.len() % 8 == 0;
    (profile == text && whole).then(|| program.to_vec())
}

fn keep(file: &Path, text: &[u8], program: &[u8]) -> Result<(), kuasar_host::Error> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
    bytes.extend(program);
    if let Some(dir) = file.parent() {
        kuasar_host::record::private_dir(dir)?;
    }
    kuasar_host::record::write_file(file, &bytes, 0o600)
}

/// libseccomp's work.
fn compile(profile: &Seccomp) -> Result<Vec<u8>, String> {
    let other = |what: &str| {
        let what = what.to_owned();
        move |error: libseccomp::error::SeccompError| format!("seccomp profile: {what}: {error}")
    };
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let mut filter = ScmpFilterContext::new(default).map_err(other("default action"))?;
    // A tree of comparisons in place of a row. Every system call passes through it, and the kernel runs
    // it for every number there is when it is loaded. Before libseccomp 2.5 there are only rows.
    let _ = filter.set_ctl_optimize(2);
    for name in profile.architectures.iter().flatten() {
        filter.add_arch(architecture(name)?).map_err(other(name))?;
    }
    // A name may be in many rules; its number is looked up once.
    let mut numbers: HashMap<&str, Option<ScmpSyscall>> = HashMap::new();
    for rule in profile.syscalls.iter().flatten() {
        let action = action(&rule.action, rule.errno_ret)?;
        if action == default {
            continue;
        }
        let conditions =
            rule.args.iter().flatten().map(condition).collect::<Result<Vec<_>, _>>()?;
        // libseccomp compares an argument once per rule: two conditions on one are two rules, as
        // runc has it.
        let indices: std::collections::BTreeSet<_> =
            rule.args.iter().flatten().map(|argument| argument.index).collect();
        let apart = indices.len() < conditions.len();
        for name in &rule.names {
            let number = numbers.entry(name).or_insert_with(|| ScmpSyscall::from_name(name).ok());
            // A name that this libseccomp does not know is no system call of this machine.
            let Some(number) = *number else { continue };
            let added = if conditions.is_empty() {
                filter.add_rule(action, number).map(drop)
            } else if apart {
                conditions.iter().try_for_each(|condition| {
                    let one = std::slice::from_ref(condition);
                    filter.add_rule_conditional(action, number, one).map(drop)
                })
            } else {
                filter.add_rule_conditional(action, number, &conditions).map(drop)
            };
            added.map_err(other(name))?;
        }
    }
    // SAFETY: a constant name; the result is ours when it is not negative.
    let fd = unsafe { libc::memfd_create(c"seccomp".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(format!("memfd: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made it for us.
    let mut file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    filter.export_bpf(file.as_fd()).map_err(other("export"))?;
    let mut program = Vec::new();
    file.flush()
        .and_then(|()| file.rewind())
        .and_then(|()| file.read_to_end(&mut program).map(drop))
        .map_err(|error| format!("seccomp profile: {error}"))?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: serde_json::Value) -> Seccomp {
        serde_json::from_value(text).unwrap()
    }

    fn denies_mkdir() -> Seccomp {
        profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
                {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "args": [
                    {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                    {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}
            ]
        }))
    }

    #[test]
    fn a_filter_is_kept_and_does_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("seccomp");
        let first = Filter::of(&denies_mkdir(), Some(&cache)).unwrap();
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
        let again = Filter::of(&denies_mkdir(), Some(&cache)).unwrap();
        let plain = |filter: &Filter| {
            filter.program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect::<Vec<_>>()
        };
        assert_eq!(plain(&first), plain(&again));
        // The filter holds for this thread alone, and forever.
        let made = std::thread::spawn(move || {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).unwrap();
            again.load().unwrap();
            std::fs::create_dir("/tmp/kuasar-never").unwrap_err().raw_os_error()
        });
        assert_eq!(made.join().unwrap(), Some(95));
    }

    #[test]
    fn another_profile_is_not_mistaken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.bpf");
        keep(&file, b"one", &[1; 16]).unwrap();
        assert_eq!(kept(&file, b"one").unwrap(), [1; 16]);
        assert!(kept(&file, b"two").is_none());
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 3]).unwrap();
        assert!(kept(&file, b"one").is_none());
    }

    #[test]
    fn what_needs_a_listener_or_is_unknown_is_not_for_us() {
        for (key, value) in [
            ("defaultAction", serde_json::json!("SCMP_ACT_NOTIFY")),
            ("defaultAction", serde_json::json!("SCMP_ACT_NEW")),
            ("flags", serde_json::json!(["SECCOMP_FILTER_FLAG_NEW"])),
            ("architectures", serde_json::json!(["SCMP_ARCH_NEW"])),
            (
                "syscalls",
                serde_json::json!([{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_NEW"}]}]),
            ),
        ] {
            let mut text = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW"});
            text[key] = value;
            assert!(check(&profile(text.clone())).is_err(), "{text}");
        }
        check(&denies_mkdir()).unwrap();
    }
}
