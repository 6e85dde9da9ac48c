//! A fake of the VMMs' protocols: Cloud Hypervisor's and Firecracker's API, StratoVirt's QMP. It
//! runs no guest. It answers in the order and with the words of the real ones (Cloud Hypervisor 53,
//! Firecracker 1.17, StratoVirt 2.5) and writes down what it was asked. Only `std`, so that `rustc`
//! alone builds it.
//!
//! Beside the program, under its own name: `….log` takes a line for each request; `….conf` may hold
//! lines `refuse PATH`, `die PATH`, `hang PATH`, for a request with that path or command, and
//! `reset`: the guest resets itself when it was booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::undocumented_unsafe_blocks
)] // a test's program: if it panics, the test says so

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct State {
    created: bool,
    running: bool,
    paused: bool,
    devices: Vec<(String, String)>,
    nics: Vec<(String, String)>,
    leaving: Vec<String>,
    balloon: u64,
    nodes: Vec<String>,
}

struct Fake {
    me: String,
    rules: Vec<(String, String)>,
    state: Mutex<State>,
    monitor: Mutex<Option<File>>,
}

/// The text of a field of some JSON; enough for what our own client writes.
fn field(body: &str, name: &str) -> Option<String> {
    let rest = &body[body.find(&format!("\"{name}\":"))? + name.len() + 3..];
    let rest = rest.trim_start();
    match rest.strip_prefix('"') {
        Some(text) => Some(text[..text.find('"')?].to_owned()),
        None => Some(rest[..rest.find([',', '}', ']'])?].trim().to_owned()),
    }
}

impl Fake {
    fn log(&self, line: &str) {
        let path = format!("{}.log", self.me);
        let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        writeln!(file, "{line}").unwrap();
    }

    fn rule(&self, what: &str, path: &str) -> bool {
        self.rules.iter().any(|(rule, on)| rule == what && on == path)
    }

    /// What the configuration wants of a request: whether it is to be refused.
    fn obey(&self, path: &str) -> bool {
        if self.rule("die", path) {
            eprintln!("fake: cannot go on at {path}");
            std::process::exit(1);
        }
        while self.rule("hang", path) {
            std::thread::park();
        }
        self.rule("refuse", path)
    }

    fn event(&self, event: &str) {
        if let Some(file) = &mut *self.monitor.lock().unwrap() {
            let time = "\"timestamp\": {\"secs\": 1, \"nanos\": 2}";
            let text = format!(
                "{{\n  {time},\n  \"source\": \"vm\",\n  \"event\": \"{event}\",\n  \
                 \"properties\": null\n}}\n\n"
            );
            file.write_all(text.as_bytes()).unwrap();
        }
    }
}

type Answer = (u16, String);

fn ok() -> Answer {
    (204, String::new())
}

fn cloud_hypervisor(fake: &Fake, method: &str, path: &str, body: &str) -> Answer {
    let fail = |text: &str| (500, format!("[\"The request failed\",\"{text}\"]"));
    let mut state = fake.state.lock().unwrap();
    let not_created = || fail("VM is not created");
    let with_body = matches!(
        path,
        "/vm.create"
            | "/vm.add-disk"
            | "/vm.add-net"
            | "/vm.remove-device"
            | "/vm.resize"
            | "/vm.snapshot"
            | "/vm.restore"
    );
    if method == "PUT" && with_body == body.is_empty() {
        return (400, "[\"Bad Request\"]".into());
    }
    match (method, path) {
        ("GET", "/vmm.ping") => (200, "{\"version\":\"53.0\",\"pid\":1}".into()),
        ("PUT", "/vm.create") if state.created => fail("VM is already created"),
        ("PUT", "/vm.create") => {
            state.created = true;
            if let Some(at) = body.find("\"vsock\":") {
                let socket = field(&body[at..], "socket").unwrap();
                std::mem::forget(UnixListener::bind(socket).unwrap());
            }
            ok()
        }
        ("GET", "/vm.info") if state.created => {
            let leaving = std::mem::take(&mut state.leaving);
            state.devices.retain(|(id, _)| !leaving.contains(id));
            let ids: Vec<&str> = state.devices.iter().map(|(id, _)| id.as_str()).collect();
            let disks: Vec<String> = ids.iter().map(|id| format!("{{\"id\":\"{id}\"}}")).collect();
            let tree: Vec<String> =
                ids.iter().map(|id| format!("\"_virtio-pci-{id}\":{{}}")).collect();
            let memory = state.balloon;
            (
                200,
                format!(
                    "{{\"config\":{{\"disks\":[{}],\"net\":null,\
                     \"memory\":{{\"size\":0,\"hotplugged_size\":{memory}}}}},\"state\":\"Running\",\
                     \"memory_actual_size\":{memory},\"device_tree\":{{{}}}}}",
                    disks.join(","),
                    tree.join(",")
                ),
            )
        }
        ("PUT", "/vm.restore") if !state.created => {
            let source = field(body, "source_url").unwrap();
            let dir = source.strip_prefix("file://").unwrap().to_owned();
            for name in ["config.json", "state.json", "memory-ranges"] {
                if let Err(error) = fs::read(format!("{dir}/{name}")) {
                    return fail(&format!("{name}: {error}"));
                }
            }
            (state.created, state.running, state.paused) = (true, true, true);
            ok()
        }
        ("PUT", "/vmm.shutdown") => std::process::exit(0),
        _ if !state.created => not_created(),
        ("PUT", "/vm.boot") if state.running => fail("VM is already running"),
        ("PUT", "/vm.boot") => {
            state.running = true;
            drop(state);
            fake.event("booted");
            if fake.rule("reset", "") {
                fake.event("rebooting");
            }
            ok()
        }
        ("PUT", "/vm.add-disk" | "/vm.add-net") => {
            let id = field(body, "id").unwrap();
            let path = field(body, "path").unwrap_or_default();
            if !path.is_empty() && File::open(&path).is_err() {
                return fail("Cannot open disk path");
            }
            state.devices.push((id, path));
            (200, "{\"id\":\"x\",\"bdf\":\"0000:00:06.0\"}".into())
        }
        ("PUT", "/vm.remove-device") => {
            let id = field(body, "id").unwrap();
            if !state.devices.iter().any(|(device, _)| device == &id) {
                return fail("Invalid identifier");
            }
            state.leaving.push(id);
            ok()
        }
        ("PUT", "/vm.resize") => {
            if let Some(bytes) = field(body, "desired_ram") {
                let bytes = bytes.parse().unwrap();
                if state.balloon == bytes {
                    return fail("new size and requested_size are identical");
                }
                state.balloon = bytes;
            }
            ok()
        }
        ("PUT", "/vm.pause") if state.running && !state.paused => {
            state.paused = true;
            ok()
        }
        ("PUT", "/vm.resume") if state.paused => {
            state.paused = false;
            ok()
        }
        ("PUT", "/vm.snapshot") if state.paused => {
            let url = field(body, "destination_url").unwrap();
            let dir = url.strip_prefix("file://").unwrap();
            fs::write(format!("{dir}/config.json"), "{\"vsock\":{\"cid\":3,\"socket\":\"/old\"}}")
                .unwrap();
            fs::write(format!("{dir}/state.json"), "{}").unwrap();
            fs::write(format!("{dir}/memory-ranges"), [0; 4096]).unwrap();
            ok()
        }
        ("PUT", "/vm.pause" | "/vm.resume" | "/vm.snapshot") => fail("VM is in a wrong state"),
        _ => (404, String::new()),
    }
}

fn firecracker(fake: &Fake, method: &str, path: &str, body: &str) -> Answer {
    let fail = |text: &str| (400, format!("{{\"fault_message\":\"{text}\"}}"));
    let mut state = fake.state.lock().unwrap();
    let started = state.running;
    let before = "The requested operation is not supported before starting the microVM.";
    let after = "The requested operation is not supported after starting the microVM.";
    match (method, path) {
        ("GET", "/version") => (200, "{\"firecracker_version\":\"1.17.0-dev\"}".into()),
        ("GET", "/vm/config") => {
            let drives: Vec<String> = state
                .devices
                .iter()
                .map(|(id, path)| format!("{{\"drive_id\":\"{id}\",\"path_on_host\":\"{path}\"}}"))
                .collect();
            (200, format!("{{\"drives\":[{}]}}", drives.join(",")))
        }
        ("PUT", "/snapshot/load") if started || state.created => {
            fail("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        }
        ("PUT", "/snapshot/load") => {
            for name in ["snapshot_path", "backend_path"] {
                if File::open(field(body, name).unwrap()).is_err() {
                    return fail("Cannot open the file");
                }
            }
            let saved = fs::read_to_string(field(body, "snapshot_path").unwrap()).unwrap();
            let devices = saved.lines().filter_map(|line| line.split_once(' '));
            let mut devices: Vec<(String, String)> =
                devices.map(|(id, path)| (id.into(), path.into())).collect();
            state.nics = devices.extract_if(.., |(id, _)| id.starts_with("net")).collect();
            state.devices = devices;
            let overrides = &body[body.find("\"network_overrides\":").unwrap()..];
            let overrides = &overrides[..overrides.find(']').unwrap()];
            for entry in overrides.split('{').skip(1) {
                let id = field(entry, "iface_id").unwrap();
                let Some(nic) = state.nics.iter_mut().find(|(nic, _)| nic == &id) else {
                    return fail("Unknown Network Device.");
                };
                nic.1 = field(entry, "host_dev_name").unwrap();
            }
            if let Some(at) = body.find("\"vsock_override\":") {
                let socket = field(&body[at..], "uds_path").unwrap();
                std::mem::forget(UnixListener::bind(socket).unwrap());
            }
            state.running = true;
            ok()
        }
        ("PUT", _) if started && path != "/snapshot/create" => fail(after),
        ("PUT", "/machine-config" | "/boot-source" | "/entropy" | "/balloon") => {
            state.created = true;
            ok()
        }
        ("PUT", "/vsock") => {
            std::mem::forget(UnixListener::bind(field(body, "uds_path").unwrap()).unwrap());
            ok()
        }
        ("PUT", _) if path.starts_with("/drives/") => {
            let (id, host) = (field(body, "drive_id").unwrap(), field(body, "path_on_host").unwrap());
            if path != format!("/drives/{id}") || id.contains('-') {
                return fail("The id from the path does not match the id from the body!");
            }
            if File::open(&host).is_err() {
                return fail("Unable to open the block device");
            }
            state.devices.push((id, host));
            ok()
        }
        ("PUT", _) if path.starts_with("/network-interfaces/") => {
            state.nics.push((field(body, "iface_id").unwrap(), field(body, "host_dev_name").unwrap()));
            ok()
        }
        ("PUT", "/actions") => {
            state.running = true;
            ok()
        }
        _ if !started => fail(before),
        ("PATCH", _) if path.starts_with("/drives/") => {
            let (id, host) = (field(body, "drive_id").unwrap(), field(body, "path_on_host").unwrap());
            if File::open(&host).is_err() {
                return fail("Error manipulating the backing file");
            }
            match state.devices.iter_mut().find(|(drive, _)| drive == &id) {
                Some(drive) => {
                    drive.1 = host;
                    ok()
                }
                None => fail("Invalid block device ID!"),
            }
        }
        ("PATCH", "/balloon") => {
            state.balloon = field(body, "amount_mib").unwrap().parse().unwrap();
            ok()
        }
        ("GET", "/balloon/statistics") => (200, format!("{{\"actual_mib\":{}}}", state.balloon)),
        ("PATCH", "/vm") => {
            state.paused = body.contains("Paused");
            ok()
        }
        ("PUT", "/snapshot/create") if state.paused => {
            let lines = state.devices.iter().chain(&state.nics).map(|(id, path)| format!("{id} {path}\n"));
            let text: String = lines.collect();
            fs::write(field(body, "snapshot_path").unwrap(), text).unwrap();
            fs::write(field(body, "mem_file_path").unwrap(), [0; 4096]).unwrap();
            ok()
        }
        ("PUT", "/snapshot/create") => fail("save/restore unavailable while running"),
        _ => fail("Invalid request method and/or path"),
    }
}

fn http(fake: &Fake, stream: UnixStream, firecrackers: bool) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let mut words = line.split_whitespace();
        let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let header = header.trim().to_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(n) = header.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let body = String::from_utf8(body).unwrap();
        fake.log(format!("{method} {path} {body}").trim());
        let path = path.strip_prefix("/api/v1").unwrap_or(&path);
        let (status, text) = match (fake.obey(path), firecrackers) {
            (true, true) => (400, "{\"fault_message\":\"the fake refuses\"}".into()),
            (true, false) => (500, "[\"The request failed\",\"the fake refuses\"]".into()),
            (false, true) => firecracker(fake, &method, path, &body),
            (false, false) => cloud_hypervisor(fake, &method, path, &body),
        };
        write!(
            writer,
            "HTTP/1.1 {status} X\r\nServer: fake\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )
        .ok()?;
    }
}

fn stratovirt(fake: &Fake, stream: UnixStream) -> Option<()> {
    let mut out = stream.try_clone().unwrap();
    let greeting = "{\"QMP\":{\"version\":{\"StratoVirt\":{\"micro\":1,\"minor\":0,\"major\":0},\
                    \"package\":\"\"},\"capabilities\":[]}}";
    writeln!(out, "{greeting}").ok()?;
    for line in BufReader::new(stream).lines() {
        let line = line.ok()?;
        let command = field(&line, "execute").unwrap();
        if command != "qmp_capabilities" {
            fake.log(&line);
        }
        // Ours comes behind the arguments, which may have one, too.
        let id = field(&line[line.rfind("\"id\":").unwrap()..], "id").unwrap();
        // The real one takes no number, and then answers without an id.
        let is_text = line.ends_with(&format!("\"id\":\"{id}\"}}"));
        let refuse = fake.obey(&command);
        let mut state = fake.state.lock().unwrap();
        let arguments = line.find("\"arguments\":").map_or("", |at| &line[at..]);
        let error = |text: &str| format!("\"error\":{{\"class\":\"GenericError\",\"desc\":\"{text}\"}}");
        let done = "\"return\":{}".to_owned();
        let answer = match command.as_str() {
            _ if !is_text => {
                writeln!(out, "{{{}}}", error("invalid type: integer, expected a string")).ok()?;
                continue;
            }
            _ if refuse => error("the fake refuses"),
            "query-status" => {
                let status = if state.paused { "paused" } else { "running" };
                let running = !state.paused;
                format!(
                    "\"return\":{{\"singlestep\":false,\"running\":{running},\"status\":\"{status}\"}}"
                )
            }
            "stop" | "cont" => {
                state.paused = command == "stop";
                let event = if state.paused { "STOP" } else { "RESUME" };
                writeln!(
                    out,
                    "{{\"event\":\"{event}\",\"data\":{{}},\"timestamp\":{{\"seconds\":1,\
                     \"microseconds\":2}}}}"
                )
                .ok()?;
                done
            }
            "blockdev-add" => {
                let node = field(arguments, "node-name").unwrap();
                if state.nodes.contains(&node) {
                    error(&format!("{node} is already registered."))
                } else if File::open(field(arguments, "filename").unwrap()).is_err() {
                    error("Failed to open file")
                } else {
                    state.nodes.push(node);
                    done
                }
            }
            "device_add" => {
                let (id, at) = (field(arguments, "id").unwrap(), field(arguments, "addr").unwrap());
                if state.devices.iter().any(|(_, taken)| taken == &at) {
                    error("The slot is occupied already.")
                } else {
                    state.devices.push((id, at));
                    done
                }
            }
            "device_del" => {
                let id = field(arguments, "id").unwrap();
                let there = state.nodes.contains(&id);
                state.nodes.retain(|node| node != &id);
                state.devices.retain(|(device, _)| device != &id);
                if there { done } else { error(&format!("Device {id} not found")) }
            }
            "migrate" => {
                let uri = field(arguments, "uri").unwrap();
                let dir = uri.strip_prefix("file:").unwrap();
                fs::write(format!("{dir}/state"), "state").unwrap();
                fs::write(format!("{dir}/memory"), [0; 4096]).unwrap();
                done
            }
            "query-migrate" => "\"return\":{\"status\":\"completed\"}".to_owned(),
            "quit" => {
                writeln!(out, "{{{done},\"id\":\"{id}\"}}").ok()?;
                std::process::exit(0);
            }
            "qmp_capabilities" => done,
            _ => error("not supported"),
        };
        writeln!(out, "{{{answer},\"id\":\"{id}\"}}").ok()?;
    }
    None
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let me = arguments[0].clone();
    let text = fs::read_to_string(format!("{me}.conf")).unwrap_or_default();
    let rules = text.lines().map(|line| line.split_once(' ').unwrap_or((line, "")));
    let rules = rules.map(|(rule, on)| (rule.to_owned(), on.to_owned())).collect();
    let after = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let fd = |text: &str| text.strip_prefix("fd=").unwrap().parse::<i32>().unwrap();
    let monitor = after("--event-monitor")
        .map(|text| unsafe { File::from_raw_fd(fd(&text)) });
    let fake = Arc::new(Fake {
        me,
        rules,
        state: Mutex::default(),
        monitor: Mutex::new(monitor),
    });
    fake.log(&format!("argv {}", arguments[1..].join(" ")));
    if fake.obey("start") {
        std::process::exit(2);
    }
    println!("fake: a console");
    let (listener, kind) = if let Some(socket) = after("--api-socket") {
        (unsafe { UnixListener::from_raw_fd(fd(&socket)) }, 0)
    } else if let Some(socket) = after("--api-sock") {
        (UnixListener::bind(socket).unwrap(), 1)
    } else {
        let socket = after("-qmp").expect("no socket");
        let path = socket.strip_prefix("unix:").unwrap().split(',').next().unwrap().to_owned();
        fake.state.lock().unwrap().paused = after("-incoming").is_some();
        for words in arguments.windows(2).filter(|words| words[0] == "-chardev") {
            if let Some(at) = words[1].strip_prefix("socket,id=agent,path=") {
                let path = at.split(',').next().unwrap();
                std::mem::forget(UnixListener::bind(path).unwrap());
            }
        }
        assert!(!Path::new(&path).exists());
        (UnixListener::bind(path).unwrap(), 2)
    };
    listener.set_nonblocking(false).unwrap();
    for stream in listener.incoming() {
        let (stream, fake) = (stream.unwrap(), fake.clone());
        std::thread::spawn(move || match kind {
            0 => http(&fake, stream, false),
            1 => http(&fake, stream, true),
            _ => stratovirt(&fake, stream),
        });
    }
}
