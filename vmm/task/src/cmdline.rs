//! Options on the kernel's command line: `kuasar.NAME` or `kuasar.NAME=VALUE`.
//!
//! | option | meaning | default |
//! |---|---|---|
//! | `kuasar.log=LEVEL` | `error`, `warn`, `info`, `debug`, `trace`, to the kernel's log | `warn` |
//! | `kuasar.debug` | the same as `kuasar.log=debug`, and the kernel drops no lines of ours | off |
//! | `kuasar.debug_console` | the host may run programs beside the containers; see [`crate::debug`] | off |
//! | `kuasar.channel=WHICH` | `vsock`, `serial` (a port or a console), or `auto`: each that is there | `auto` |
//! | `kuasar.ready=PORT` | vsock port of the host at which it waits for our READY | 1023 |
//! | `kuasar.poweroff=HOW` | `poweroff`, `reboot`, or `auto`; see [`crate::power`] | `auto` |
//!
//! Nothing secret is ever there: containers can read `/proc/cmdline`.

use tracing::Level;

/// Longest command line that is looked at, in bytes (x86 allows 2048).
pub const MAX: usize = 4096;

/// Which way the host speaks to us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Channel {
    /// Each that there is.
    #[default]
    Auto,
    /// vsock alone.
    Vsock,
    /// The virtio-serial port alone.
    Serial,
}

/// How the machine is ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PowerOff {
    /// Whichever works on this machine.
    #[default]
    Auto,
    /// By the firmware.
    PowerOff,
    /// By a reset, which ends a VMM that was told not to reboot.
    Reboot,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Level of the log.
    pub level: Level,
    /// Whether the kernel may drop lines of ours.
    pub debug: bool,
    /// Whether the host may run programs beside the containers.
    pub debug_console: bool,
    /// Channel.
    pub channel: Channel,
    /// Port of the host, on vsock.
    pub ready: u32,
    /// End.
    pub poweroff: PowerOff,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            level: Level::WARN,
            debug: false,
            debug_console: false,
            channel: Channel::default(),
            ready: vmm_common::port::READY,
            poweroff: PowerOff::default(),
        }
    }
}

impl Options {
    /// Reads a command line. Unknown options and values are no error, because there is nobody to
    /// tell yet; they are answered, to be logged.
    pub fn parse(line: &[u8]) -> (Self, Vec<String>) {
        let line = String::from_utf8_lossy(line.get(..MAX).unwrap_or(line));
        let (mut options, mut unknown) = (Self::default(), Vec::new());
        for word in line.split_ascii_whitespace() {
            let Some(word) = word.strip_prefix("kuasar.") else { continue };
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let known = match name {
                "debug" if matches!(value, "" | "1" | "true" | "on") => {
                    options.debug = true;
                    options.level = options.level.max(Level::DEBUG);
                    true
                }
                "debug" => matches!(value, "0" | "false" | "off"),
                "debug_console" => match value {
                    "" | "1" | "true" | "on" => set(&mut options.debug_console, true),
                    "0" | "false" | "off" => set(&mut options.debug_console, false),
                    _ => false,
                },
                "log" => value.parse().map(|level| options.level = level).is_ok(),
                "channel" => match value {
                    "auto" => set(&mut options.channel, Channel::Auto),
                    "vsock" => set(&mut options.channel, Channel::Vsock),
                    "serial" => set(&mut options.channel, Channel::Serial),
                    _ => false,
                },
                "ready" => match value.parse() {
                    Ok(port) if port > 0 => set(&mut options.ready, port),
                    _ => false,
                },
                "poweroff" => match value {
                    "auto" => set(&mut options.poweroff, PowerOff::Auto),
                    "poweroff" => set(&mut options.poweroff, PowerOff::PowerOff),
                    "reboot" => set(&mut options.poweroff, PowerOff::Reboot),
                    _ => false,
                },
                _ => false,
            };
            if !known && unknown.len() < 8 {
                unknown.push(word.chars().take(64).collect());
            }
        }
        (options, unknown)
    }

    /// Those of this kernel.
    pub fn read() -> (Self, Vec<String>) {
        use std::io::Read;
        let mut line = Vec::new();
        if let Ok(file) = std::fs::File::open("/proc/cmdline") {
            // What cannot be read is as if it were not there.
            let _ = file.take(MAX as u64).read_to_end(&mut line);
        }
        Self::parse(&line)
    }
}

fn set<T>(slot: &mut T, value: T) -> bool {
    *slot = value;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_among_the_kernels_own() {
        let line = b"console=ttyS0 quiet kuasar.log=info kuasar.channel=serial panic=-1 kuasar.poweroff=reboot\n";
        let (options, unknown) = Options::parse(line);
        assert_eq!(options.level, Level::INFO);
        assert_eq!(options.channel, Channel::Serial);
        assert_eq!(options.poweroff, PowerOff::Reboot);
        assert!(!options.debug && unknown.is_empty());
        assert_eq!(options.ready, vmm_common::port::READY);
        assert_eq!(Options::parse(b"kuasar.ready=70000").0.ready, 70_000);
        for bad in [&b"kuasar.ready=0"[..], b"kuasar.ready=", b"kuasar.ready=-1"] {
            let (options, unknown) = Options::parse(bad);
            assert_eq!((options.ready, unknown.len()), (vmm_common::port::READY, 1));
        }
        let console = |line: &str| Options::parse(line.as_bytes()).0.debug_console;
        assert!(console("kuasar.debug_console") && console("kuasar.debug_console=on"));
        for off in ["", "kuasar.debug", "kuasar.debug_console=off", "kuasar.debug_console=2"] {
            assert!(!console(off), "{off}");
        }
        let (options, unknown) = Options::parse(b"kuasar.debug kuasar.moon=1 kuasar.log=loud");
        assert!(options.debug && options.level == Level::DEBUG);
        assert_eq!(unknown, ["moon=1", "log=loud"]);
    }

    #[test]
    fn no_command_line_is_too_odd() {
        let mut random = crate::testing::Random(1);
        for _ in 0..2000 {
            let mut line = random.bytes(600);
            if random.next().is_multiple_of(2) {
                line.extend(b" kuasar.");
                line.extend(random.bytes(40));
            }
            let (_, unknown) = Options::parse(&line);
            assert!(unknown.len() <= 8 && unknown.iter().all(|u| u.chars().count() <= 64));
        }
        Options::parse(&[b'k'; 100_000]);
    }
}
