//! `vmm-task debug`: becomes a session's program, within its cgroup and terminal.
//!
//! The reaper starts programs by posix_spawn(3), which can do neither.

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use kuasar_host::cgroup::Cgroup;

/// First argument of this program for it.
pub const WORD: &str = "debug";
/// Argument for a program with a terminal.
const TERMINAL: &str = "--terminal";
/// What follows is the program's.
const PROGRAM: &str = "--";

/// The command line for it; `exe` is this program.
pub(super) fn command(
    exe: &str,
    terminal: bool,
    group: Option<&Cgroup>,
    argv: &[String],
) -> Vec<String> {
    let entrances = group.map(Cgroup::entrances).unwrap_or_default();
    let mut all = vec![exe.to_owned(), WORD.into()];
    all.extend(terminal.then(|| TERMINAL.to_owned()));
    all.extend(entrances.iter().map(|path| path.display().to_string()));
    all.push(PROGRAM.into());
    all.extend(argv.iter().cloned());
    all
}

/// The environment of a program: what is beside it comes first.
pub(super) fn environment(argv: &[String]) -> Vec<String> {
    let beside = argv.first().and_then(|program| Path::new(program).parent());
    let beside = beside.unwrap_or(Path::new("/")).display();
    vec![
        format!("PATH={beside}:/usr/sbin:/usr/bin:/sbin:/bin"),
        "HOME=/".into(),
        "TERM=linux".into(),
    ]
}

/// Becomes the program that its arguments name.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    let Err(error) = run(arguments);
    // On the session's own output.
    eprintln!("debug: {error}");
    ExitCode::from(127)
}

fn run(
    mut arguments: impl Iterator<Item = String>,
) -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    loop {
        match arguments.next().ok_or("no program")?.as_str() {
            PROGRAM => break,
            TERMINAL => {
                // SAFETY: plain integers; we lead a session and have no terminal yet.
                if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } != 0 {
                    return Err(format!("no terminal: {}", io::Error::last_os_error()).into());
                }
            }
            entrance => std::fs::write(entrance, "0")?,
        }
    }
    let argv: Vec<CString> = arguments.map(CString::new).collect::<Result<_, _>>()?;
    let program = argv.first().ok_or("no program")?;
    let failed = |error| format!("{}: {error}", program.to_string_lossy());
    Ok(nix::unistd::execv(program, &argv).map_err(failed)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_finds_what_was_put_beside_it() {
        let argv = ["/run/x/busybox", "sh", "--", "-c"].map(str::to_owned);
        assert_eq!(environment(&argv)[0], "PATH=/run/x:/usr/sbin:/usr/bin:/sbin:/bin");
        let all = command("/exe", true, None, &argv);
        assert_eq!(all[..4], ["/exe", WORD, TERMINAL, PROGRAM].map(str::to_owned));
        assert_eq!(all[4..], argv);
    }

    #[test]
    fn without_a_program_it_fails() {
        for words in [&[][..], &[PROGRAM], &[PROGRAM, "/no/such/program"], &["/no/such/group"]] {
            assert!(run(words.iter().map(|word| (*word).to_owned())).is_err(), "{words:?}");
        }
    }
}
