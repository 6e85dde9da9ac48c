//! PID 1 of the guests of the conformance suite: says that it is ready, then does what single
//! lines tell it, over vsock or over the virtio-serial port. Only `std`, so that `rustc` alone
//! builds it, static.
//!
//! `echo TEXT`, `disks` (serial:name …), `nics` (MAC …), `cpus`, `memory` (MiB), `mount TAG TYPE`,
//! `read PATH`, `write PATH TEXT`, `log TEXT`, `online`, `poweroff`, `panic`. Each is answered by one line.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::undocumented_unsafe_blocks,
    clippy::suspicious_open_options
)] // a test's guest: if it panics, the guest ends and the test says so

use std::ffi::CString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

mod c {
    unsafe extern "C" {
        pub fn mount(
            from: *const i8,
            to: *const i8,
            kind: *const i8,
            flags: u64,
            data: *const u8,
        ) -> i32;
        pub fn reboot(how: i32) -> i32;
        pub fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
        pub fn bind(fd: i32, address: *const Vm, size: u32) -> i32;
        pub fn listen(fd: i32, backlog: i32) -> i32;
        pub fn connect(fd: i32, address: *const Vm, size: u32) -> i32;
        pub fn accept(fd: i32, address: *mut u8, size: *mut u32) -> i32;
        pub fn ioctl(fd: i32, request: u64, argument: *mut u8) -> i32;
        pub fn tcgetattr(fd: i32, to: *mut Termios) -> i32;
        pub fn tcsetattr(fd: i32, when: i32, from: *const Termios) -> i32;
        pub fn cfmakeraw(attributes: *mut Termios);
    }
    /// `struct termios`, which has 60 bytes.
    #[repr(C)]
    pub struct Termios(pub [u32; 16]);
    /// `struct sockaddr_vm`.
    #[repr(C)]
    pub struct Vm {
        pub family: u16,
        pub reserved: u16,
        pub port: u32,
        pub cid: u32,
        pub zero: [u8; 4],
    }
}

const READY: u32 = 1023;
const CONTROL: u32 = 1024;
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;

fn mount(from: &str, to: &str, kind: &str) -> Result<(), String> {
    let _ = fs::create_dir_all(to);
    let c = |s: &str| CString::new(s).unwrap();
    let r = unsafe {
        c::mount(c(from).as_ptr(), c(to).as_ptr(), c(kind).as_ptr(), 0, std::ptr::null())
    };
    if r == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().to_string()) }
}

fn address(cid: u32, port: u32) -> c::Vm {
    c::Vm { family: 40, reserved: 0, port, cid, zero: [0; 4] }
}

fn vsock() -> OwnedFd {
    let fd = unsafe { c::socket(40, 1, 0) };
    assert!(fd >= 0, "vsock: {}", std::io::Error::last_os_error());
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn first_line(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or_default().trim().into()
}

fn names(dir: &str) -> Vec<String> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    all.sort();
    all
}

fn online() -> String {
    for cpu in names("/sys/devices/system/cpu") {
        let file = format!("/sys/devices/system/cpu/{cpu}/online");
        if first_line(&file) == "0" {
            let _ = fs::write(&file, "1");
        }
    }
    first_line("/sys/devices/system/cpu/online")
}

/// Gives the interface with MAC address `from` another, and an IPv4 address, sets it up, and echoes there.
fn net(from: &str, to: &str, ip: &str) -> Result<(), String> {
    let dir = "/sys/class/net";
    let has = |name: &&String| first_line(format!("{dir}/{name}/address")) == from;
    let all = names(dir);
    let name = all.iter().find(has).ok_or("no such interface")?;
    let socket = std::net::UdpSocket::bind("0.0.0.0:7").map_err(|error| error.to_string())?;
    let mac = to.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap());
    let ip: std::net::Ipv4Addr = ip.parse().unwrap();
    // `struct ifreq`: the name, then a family and an address, or flags.
    let set = |request: u64, what: &[u8]| {
        let mut ifreq = [0; 40];
        ifreq[..name.len()].copy_from_slice(name.as_bytes());
        ifreq[16..16 + what.len()].copy_from_slice(what);
        match unsafe { c::ioctl(socket.as_raw_fd(), request, ifreq.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(format!("{request:#x}: {}", std::io::Error::last_os_error())),
        }
    };
    // SIOCSIFHWADDR with ARPHRD_ETHER, SIOCSIFADDR with AF_INET, SIOCSIFFLAGS with IFF_UP.
    set(0x8924, &[1, 0].into_iter().chain(mac).collect::<Vec<u8>>())?;
    set(0x8916, &[2, 0, 0, 0].into_iter().chain(ip.octets()).collect::<Vec<u8>>())?;
    set(0x8914, &[1, 0])?;
    std::thread::spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((n, peer)) = socket.recv_from(&mut packet) {
            let _ = socket.send_to(&packet[..n], peer);
        }
    });
    Ok(())
}

fn obey(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["echo", ..] => line[5..].to_owned(),
        ["disks"] => names("/sys/block")
            .iter()
            .map(|name| format!("{}:{name}", first_line(format!("/sys/block/{name}/serial"))))
            .collect::<Vec<_>>()
            .join(" "),
        ["nics"] => names("/sys/class/net")
            .iter()
            .map(|name| first_line(format!("/sys/class/net/{name}/address")))
            .collect::<Vec<_>>()
            .join(" "),
        ["net", from, to, ip] => match net(from, to, ip) {
            Ok(()) => "ok".into(),
            Err(error) => error,
        },
        ["cpus"] => first_line("/sys/devices/system/cpu/online"),
        ["online"] => online(),
        ["memory"] => {
            let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
            let kib = |key: &str| {
                text.lines()
                    .find_map(|line| {
                        line.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok()
                    })
                    .unwrap_or_default()
            };
            // Not what there is in all: of that a balloon that gives way takes nothing away.
            format!("{}", kib("MemAvailable:") / 1024)
        }
        ["mount", tag, kind] => match mount(tag, &format!("/run/{tag}"), kind) {
            Ok(()) => "ok".into(),
            Err(error) => error,
        },
        ["read", path] => {
            let mut bytes = [0; 4096];
            match fs::File::open(path).and_then(|mut file| file.read(&mut bytes)) {
                Ok(n) => {
                    String::from_utf8_lossy(&bytes[..n]).lines().next().unwrap_or_default().into()
                }
                Err(error) => error.to_string(),
            }
        }
        ["log", text] => {
            log(text);
            "ok".into()
        }
        ["write", path, text] => {
            match fs::OpenOptions::new().write(true).create(true).open(path).and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            }) {
                Ok(()) => "ok".into(),
                Err(error) => error.to_string(),
            }
        }
        ["panic"] => {
            let _ = fs::write("/proc/sysrq-trigger", "c");
            "did not".into()
        }
        ["poweroff"] => {
            // RB_POWER_OFF where there is firmware for it; RB_AUTOBOOT, which the VMM makes its
            // exit, where there is none. Firecracker has ACPI tables, and no power to switch off.
            let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
            let firmware =
                Path::new("/sys/firmware/acpi").exists() && !line.contains("reboot=k");
            unsafe { c::reboot(if firmware { 0x4321_fedc } else { 0x0123_4567 }) };
            "did not".into()
        }
        _ => "what?".into(),
    }
}

fn serve(stream: fs::File) {
    let Ok(mut answers) = stream.try_clone() else { return };
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        if writeln!(answers, "{}", obey(line.trim())).is_err() {
            return;
        }
    }
}

fn over_vsock() {
    let listener = vsock();
    let size = std::mem::size_of::<c::Vm>() as u32;
    unsafe {
        assert!(c::bind(listener.as_raw_fd(), &address(ANY, CONTROL), size) == 0, "bind");
        assert!(c::listen(listener.as_raw_fd(), 16) == 0, "listen");
    }
    let host = vsock();
    let r = unsafe { c::connect(host.as_raw_fd(), &address(HOST, READY), size) };
    assert!(r == 0, "dial: {}", std::io::Error::last_os_error());
    let mut host = fs::File::from(host);
    host.write_all(b"{\"version\":1,\"agent\":\"probe\"}\n").unwrap();
    let mut welcome = String::new();
    BufReader::new(host.try_clone().unwrap()).read_line(&mut welcome).unwrap();
    host.write_all(b"{\"ok\":true}\n").unwrap();
    drop(host);
    loop {
        let fd =
            unsafe { c::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
        if fd >= 0 {
            let stream = fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            std::thread::spawn(move || serve(stream));
        }
    }
}

fn over_serial() {
    let named = names("/sys/class/virtio-ports").into_iter().find(|port| {
        first_line(format!("/sys/class/virtio-ports/{port}/name")) == "org.kuasar.agent.0"
    });
    let open = |name: &str| fs::OpenOptions::new().read(true).write(true).open(name);
    // A StratoVirt microvm's only port is a console: it has our name, but is opened as a terminal alone.
    let (mut stream, console) = match named.map(|port| open(&format!("/dev/{port}"))) {
        Some(Ok(port)) => (port, false),
        _ => (open("/dev/hvc0").unwrap(), true),
    };
    if console {
        let mut raw = c::Termios([0; 16]);
        unsafe {
            c::tcgetattr(stream.as_raw_fd(), &mut raw);
            c::cfmakeraw(&mut raw);
            c::tcsetattr(stream.as_raw_fd(), 0, &raw);
        }
    }
    let _ = stream.write_all(b"{\"version\":1,\"agent\":\"probe\"}\n");
    loop {
        // A read ends at once while the host is away.
        serve(stream.try_clone().unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// To the console, by the kernel's log: one that the kernel prints to may refuse what programs write.
fn log(text: &str) {
    let _ = fs::write("/dev/kmsg", format!("<3>{text}\n"));
}

fn main() {
    for (kind, to) in
        [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run")]
    {
        let _ = mount(kind, to, kind);
    }
    // Memory that is plugged in is used.
    let _ = fs::write("/sys/devices/system/memory/auto_online_blocks", "online");
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    log(&format!("probe: {}", line.trim()));
    if line.contains("probe.channel=serial") {
        over_serial();
    } else if line.contains("probe.channel=vsock") {
        over_vsock();
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
