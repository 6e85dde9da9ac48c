//! Device rules. On cgroup v2 they are a BPF program of type `cgroup_device` (Linux 4.15) attached
//! to the group; v1 has the files `devices.allow` and `devices.deny`.
//!
//! The rules of an OCI spec are a list in which the last match wins. The program looks at them
//! from the last to the first and ends at the first that matches; what nothing matches is denied.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use serde_json::Value;

use super::{Cgroup, Layout};
use crate::{Context, Error, Result};

// linux/bpf.h: commands, types, instruction classes.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;
const LDX_W: u8 = 0x61;
const ALU_AND_K: u8 = 0x54;
const ALU_RSH_K: u8 = 0x74;
const ALU_MOV_X: u8 = 0xbc;
const ALU64_MOV_K: u8 = 0xb7;
const JNE_K: u8 = 0x55;
const JNE32_K: u8 = 0x56;
const JEQ_K: u8 = 0x15;
const EXIT: u8 = 0x95;

/// `BPF_DEVCG_ACC_*` and `BPF_DEVCG_DEV_*`.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// Most rules; beyond, the program would not fit the kernel's bound of 4096 instructions.
const MAX_RULES: usize = 400;

/// One rule of `linux.resources.devices`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    /// `None` is both kinds.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    /// Reads a list as the OCI spec has it.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the rule.
    pub fn list(devices: &Value) -> Result<Vec<Self>> {
        let all = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        if all.len() > MAX_RULES {
            let text = format!("{} device rules: at most {MAX_RULES} are possible", all.len());
            return Err(Error::Invalid(text));
        }
        all.iter().map(Self::one).collect()
    }

    fn one(rule: &Value) -> Result<Self> {
        let bad = || Error::Invalid(format!("device rule {rule} is not understood"));
        let text = |key: &str| rule.get(key).and_then(Value::as_str);
        let kind = match text("type") {
            None | Some("" | "a") => None,
            Some("b") => Some(BLOCK),
            Some("c" | "u") => Some(CHAR),
            Some(_) => return Err(bad()),
        };
        let number = |key: &str| match rule.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(n) => match n.as_i64() {
                Some(-1) => Ok(None),
                Some(n) => u32::try_from(n).map(Some).map_err(|_| bad()),
                None => Err(bad()),
            },
        };
        let letters = text("access").filter(|a| !a.is_empty()).unwrap_or("rwm");
        let mut access = 0;
        for letter in letters.chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(bad()),
            };
        }
        let allow = rule.get("allow").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { allow, kind, major: number("major")?, minor: number("minor")?, access })
    }

    /// The instructions for this rule; a jump of a condition that fails leads behind them.
    fn code(&self) -> Vec<Insn> {
        let mut code = Vec::new();
        let mut jumps = Vec::new();
        let mut unless = |code: &mut Vec<Insn>, register: u8, value: u32, op: u8| {
            jumps.push(code.len());
            code.push(Insn::new(op, register, 0, value as i32));
        };
        if let Some(kind) = self.kind {
            unless(&mut code, TYPE, kind, JNE_K);
        }
        if self.access != READ | WRITE | MKNOD {
            code.push(Insn::new(ALU_MOV_X, SPARE, ACCESS, 0));
            if self.allow {
                // All of what is asked for has to be allowed …
                let others = (READ | WRITE | MKNOD) & !self.access;
                code.push(Insn::new(ALU_AND_K, SPARE, 0, others as i32));
                unless(&mut code, SPARE, 0, JNE_K);
            } else {
                // … and one denied part is enough.
                code.push(Insn::new(ALU_AND_K, SPARE, 0, self.access as i32));
                unless(&mut code, SPARE, 0, JEQ_K);
            }
        }
        // 32 bits: an immediate is sign-extended, a major of more than 31 bits is not.
        for (register, value) in [(MAJOR, self.major), (MINOR, self.minor)] {
            if let Some(value) = value {
                unless(&mut code, register, value, JNE32_K);
            }
        }
        code.push(Insn::new(ALU64_MOV_K, 0, 0, i32::from(self.allow)));
        code.push(Insn::new(EXIT, 0, 0, 0));
        let end = code.len();
        for at in jumps {
            if let Some(insn) = code.get_mut(at) {
                insn.offset = (end - at - 1) as i16;
            }
        }
        code
    }
}

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Insn {
    op: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    value: i32,
}

const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SPARE: u8 = 6;

impl Insn {
    const fn new(op: u8, to: u8, from: u8, value: i32) -> Self {
        let registers =
            if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
        Self { op, registers, offset: 0, value }
    }

    /// Loads a word of `struct bpf_cgroup_dev_ctx` (access and type, major, minor).
    const fn load(to: u8, offset: i16) -> Self {
        Self { offset, ..Self::new(LDX_W, to, CONTEXT, 0) }
    }
}

fn program(rules: &[Rule]) -> Vec<Insn> {
    let mut code = vec![
        Insn::load(TYPE, 0),
        Insn::new(ALU_MOV_X, ACCESS, TYPE, 0),
        Insn::new(ALU_AND_K, TYPE, 0, 0xffff),
        Insn::new(ALU_RSH_K, ACCESS, 0, 16),
        Insn::load(MAJOR, 4),
        Insn::load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        code.extend(rule.code());
        if rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.access == 7 {
            // It matches everything: the verifier refuses code that cannot be reached.
            return code;
        }
    }
    code.extend([Insn::new(ALU64_MOV_K, 0, 0, 0), Insn::new(EXIT, 0, 0, 0)]);
    code
}

fn bpf(command: libc::c_int, attr: &[u32]) -> io::Result<i32> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` of this size; pointers in it live across
    // the call.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

fn load(code: &[Insn]) -> io::Result<OwnedFd> {
    let halves = |address: usize| [(address as u64) as u32, ((address as u64) >> 32) as u32];
    let license = c"Apache-2.0";
    let [code_low, code_high] = halves(code.as_ptr() as usize);
    let [license_low, license_high] = halves(license.as_ptr() as usize);
    // prog_type, insn_cnt, insns, license; the rest is zero: no log.
    let mut attr = [0u32; 18];
    let words = [
        PROG_TYPE_CGROUP_DEVICE,
        code.len() as u32,
        code_low,
        code_high,
        license_low,
        license_high,
    ];
    attr.iter_mut().zip(words).for_each(|(to, from)| *to = from);
    if cfg!(target_endian = "big") {
        attr.swap(2, 3);
        attr.swap(4, 5);
    }
    let fd = bpf(BPF_PROG_LOAD, &attr)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(directory: &Path, rules: &[Rule]) -> io::Result<()> {
    let group = std::fs::File::open(directory)?;
    let program = load(&program(rules))?;
    let target = group.as_raw_fd() as u32;
    bpf(BPF_PROG_ATTACH, &[target, program.as_raw_fd() as u32, ATTACH_CGROUP_DEVICE, ALLOW_MULTI])
        .map(drop)
}

impl Rule {
    /// The lines that say the same to v1, where each changes what the lines before have left.
    fn lines(&self) -> Vec<String> {
        if self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == READ | WRITE | MKNOD
        {
            return vec!["a".into()];
        }
        let number = |n: Option<u32>| n.map_or_else(|| "*".into(), |n| n.to_string());
        let letters: String = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
            .iter()
            .filter(|(bit, _)| self.access & bit != 0)
            .map(|(_, letter)| *letter)
            .collect();
        // To v1 `a` is everything, whatever stands behind it.
        [(BLOCK, 'b'), (CHAR, 'c')]
            .iter()
            .filter(|(kind, _)| self.kind.is_none_or(|k| k == *kind))
            .map(|(_, letter)| {
                format!("{letter} {}:{} {letters}", number(self.major), number(self.minor))
            })
            .collect()
    }
}

impl Cgroup {
    /// Puts device rules on a new group that has no processes and no groups below it: v1 and v2.
    ///
    /// # Errors
    /// As [`Self::restrict_devices`].
    pub fn set_devices(&self, devices: &Value) -> Result<()> {
        if self.layout().is_v2() {
            return self.restrict_devices(devices);
        }
        let rules = Rule::list(devices)?;
        let Some(dir) = self.dir("devices").filter(|dir| dir.is_dir()) else { return Ok(()) };
        // There is a dozen of rules: either file is opened once.
        let (mut allow, mut deny) = (None, None);
        for rule in &rules {
            let (name, open) = if rule.allow {
                ("devices.allow", &mut allow)
            } else {
                ("devices.deny", &mut deny)
            };
            let path = dir.join(name);
            let file = match open {
                Some(file) => file,
                None => {
                    let made = std::fs::OpenOptions::new().write(true).open(&path);
                    open.insert(made.context(|| format!("cannot open {}", path.display()))?)
                }
            };
            for line in rule.lines() {
                file.write_all(line.as_bytes())
                    .context(|| format!("cannot write {line:?} to {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Enforces device rules on v2; the program lives as long as the group. On v1 nothing is done:
    /// there the engine has written them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for rules that cannot be read, [`Error::Io`] when the kernel refuses.
    pub fn restrict_devices(&self, devices: &Value) -> Result<()> {
        let Layout::V2(root) = self.layout() else { return Ok(()) };
        let rules = Rule::list(devices)?;
        let directory = root.join(self.path());
        attach(&directory, &rules)
            .context(|| format!("cannot enforce device rules on {}", directory.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use serde_json::json;

    use super::*;

    #[test]
    fn rules_are_read_strictly() {
        let list = |v: Value| Rule::list(&v);
        let all = list(json!([{ "allow": false, "access": "rwm" }])).unwrap();
        assert_eq!(all, [Rule { allow: false, kind: None, major: None, minor: None, access: 7 }]);
        assert_eq!(list(Value::Null).unwrap(), []);
        for bad in [
            json!([{ "type": "x" }]),
            json!([{ "access": "rz" }]),
            json!([{ "major": "8" }]),
            json!([{ "minor": -2 }]),
            json!([{ "major": 5_000_000_000u64 }]),
        ] {
            assert!(list(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_as_v1_has_them() {
        let rules = Rule::list(&json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw" },
            { "allow": true, "major": 9, "access": "m" },
        ]));
        let lines: Vec<_> = rules.unwrap().iter().flat_map(Rule::lines).collect();
        assert_eq!(lines, ["a", "c 1:3 rw", "b 9:* m", "c 9:* m"]);
    }

    /// A group of the unified hierarchy, removed at the end.
    struct Group(std::path::PathBuf);

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir(&self.0);
        }
    }

    fn unified() -> Option<std::path::PathBuf> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let line = text.lines().find(|l| l.contains(" - cgroup2 "))?;
        Some(line.split(' ').nth(4)?.into())
    }

    #[test]
    fn the_kernel_enforces_them() {
        let Some(root) = unified().filter(|_| nix::unistd::geteuid().is_root()) else {
            return eprintln!("skipped: needs root and a cgroup v2 hierarchy");
        };
        let group = Group(root.join(format!("kuasar-devices-{}", std::process::id())));
        if let Err(e) = std::fs::create_dir(&group.0) {
            return eprintln!("skipped: no cgroup can be made here: {e}");
        }
        let rules = Rule::list(&json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 5, "access": "r" },
            { "allow": true, "type": "c", "major": 1, "minor": 9, "access": "rw" },
            { "allow": false, "type": "c", "major": 1, "minor": 9, "access": "w" },
        ]))
        .unwrap();
        attach(&group.0, &rules).unwrap();
        let mut shell =
            Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::fs::write(group.0.join("cgroup.procs"), shell.id().to_string()).unwrap();
        let script = "t() { if eval \"$2\" 2>/dev/null; then echo $1 yes; else echo $1 no; fi; }\n\
            t null-w 'true > /dev/null'\n t zero-r 'true < /dev/zero'\n t zero-w 'true > /dev/zero'\n\
            t full-r 'true < /dev/full'\n t urandom-r 'true < /dev/urandom'\n t urandom-w 'true > /dev/urandom'\n";
        shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let out = shell.wait_with_output().unwrap();
        // `2>/dev/null` is allowed: else every line would say no.
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "null-w yes\nzero-r yes\nzero-w no\nfull-r no\nurandom-r yes\nurandom-w no\n"
        );
    }
}
