//! What is wrong with a program, by the Task API's own answers: a code that says whose fault it is, words that
//! say what to do, and nothing that is left.
//!
//! containerd's CRI hides the codes; so pods here are made without it, of bundles whose rootfs is a directory.

use std::os::unix::fs::symlink;
use std::path::Path;

use kuasar_protos::shim::api as task;
use kuasar_tests::cri::unique;
use kuasar_tests::settings::Settings;
use kuasar_tests::wire::{Bundle, Direct};
use kuasar_tests::{leaks, task, wasm};
use serde_json::json;
use tonic::{Code, Status};

use super::*;

/// A pod whose containers are named by files of [`wasm::programs`].
struct Bad {
    pod: Option<Direct>,
    before: leaks::Snapshot,
}

impl Bad {
    fn new(name: &str) -> Self {
        let before = leaks::snapshot();
        Self { pod: Some(Direct::run(name)), before }
    }

    fn pod(&self) -> &Direct {
        self.pod.as_ref().unwrap()
    }

    /// The answer to a container that is refused by Create, or by Start and then deleted; nothing is known of it
    /// any more.
    fn refused(&self, bundle: &Bundle) -> Status {
        let (socket, id) = (&self.pod().socket, format!("c{}", unique()));
        let created = task!(socket, create, bundle.request(&id));
        let error = match created {
            Err(error) => error,
            Ok(_) => {
                let q = task::StartRequest { id: id.clone(), ..Default::default() };
                let error = task!(socket, start, q).expect_err("it starts");
                let q = task::DeleteRequest { id: id.clone(), ..Default::default() };
                task!(socket, delete, q).unwrap();
                error
            }
        };
        let q = task::StateRequest { id, ..Default::default() };
        assert_eq!(task!(socket, state, q).unwrap_err().code(), Code::NotFound);
        error
    }

    /// The same of a program, whose answer is to have these words.
    fn refuses(&self, program: &str, code: Code, words: &str) {
        let error = self.refused(&bundle(&format!("/{program}")));
        assert_eq!(error.code(), code, "{program}: {error}");
        assert!(error.message().contains(words), "{program}: {error}");
    }

    /// A good program, and then nothing that is left of the bad ones.
    fn end(mut self) {
        assert_eq!(self.pod().run_to_end(&bundle("/exit7.wasm")).unwrap(), 7);
        drop(self.pod.take());
        leaks::assert_none(&self.before);
    }
}

/// A bundle with the program that its command names, where there is one.
fn bundle(command: &str) -> Bundle {
    let bundle = Bundle::new(&[command]);
    let name = Path::new(command).file_name().unwrap().to_str().unwrap().to_owned();
    if let Some(bytes) = wasm::programs().remove(name.as_str()) {
        std::fs::write(bundle.rootfs().join(name), bytes).unwrap();
    }
    bundle
}

fn limited_to(mut bundle: Bundle, bytes: i64) -> Bundle {
    bundle.spec["linux"]["resources"] = json!({ "memory": { "limit": bytes } });
    bundle
}

#[test]
fn what_is_no_webassembly_is_the_images_fault() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-no-wasm");
    for program in ["garbage.wasm", "empty.wasm"] {
        bad.refuses(program, Code::InvalidArgument, "permission denied");
    }
    bad.end();
}

#[test]
fn a_module_that_is_cut_off_or_of_another_version_is_the_images_fault() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-truncated");
    bad.refuses("header.wasm", Code::InvalidArgument, "truncated");
    bad.refuses("version.wasm", Code::InvalidArgument, "version 0x7");
    bad.refuses("truncated.wasm", Code::InvalidArgument, "cannot be compiled");
    bad.end();
}

#[test]
fn a_component_of_an_unknown_world_and_a_library_are_the_images_fault() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-world");
    bad.refuses("world.wasm", Code::InvalidArgument, "world is unknown");
    bad.refuses("library.wasm", Code::InvalidArgument, "_start");
    bad.end();
}

#[test]
fn imports_that_do_not_exist_are_named() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-import");
    bad.refuses("import.wasm", Code::InvalidArgument, "env::no_such_thing");
    bad.end();
}

#[test]
fn four_gibibytes_of_memory_are_refused_where_the_container_has_less() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-four");
    let error = bad.refused(&limited_to(bundle("/four.wasm"), 64 << 20));
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("67108864"), "{error}");
    bad.end();
}

/// Starts a program that does not end by itself, kills it, and answers its status.
fn killed(pod: &Direct, bundle: &Bundle) -> u32 {
    let id = format!("c{}", unique());
    task!(&pod.socket, create, bundle.request(&id)).unwrap();
    task!(&pod.socket, start, task::StartRequest { id: id.clone(), ..Default::default() }).unwrap();
    let q = task::StateRequest { id: id.clone(), ..Default::default() };
    let state = task!(&pod.socket, state, q).unwrap();
    assert_eq!(state.status.enum_value_or_default(), task::Status::RUNNING);
    let q = task::KillRequest { id: id.clone(), signal: 9, ..Default::default() };
    task!(&pod.socket, kill, q).unwrap();
    let q = task::WaitRequest { id: id.clone(), ..Default::default() };
    let status = task!(&pod.socket, wait, q).unwrap().exit_status;
    task!(&pod.socket, delete, task::DeleteRequest { id, ..Default::default() }).unwrap();
    status
}

#[test]
fn an_endless_loop_runs_until_it_is_killed() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-loop");
    assert_eq!(killed(bad.pod(), &bundle("/spin.wasm")), 137);
    bad.end();
}

#[test]
fn a_start_function_that_never_ends_holds_up_nobody() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-start");
    // It is part of the program: Start is answered before, and other containers run beside it.
    assert_eq!(killed(bad.pod(), &bundle("/start.wasm")), 137);
    bad.end();
}

#[test]
fn endless_recursion_is_a_trap() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-recursion");
    for program in ["/recurse.wasm", "/deep.wasm"] {
        assert_eq!(bad.pod().run_to_end(&bundle(program)).unwrap(), 134, "{program}");
    }
    bad.end();
}

#[test]
fn paths_lead_to_files_of_the_image_alone() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-paths");
    // The host has a module there, and the image has none.
    let host = kuasar_tests::bed().join("run/wasm/files/hello.wasm");
    assert!(host.is_file());
    for command in
        [host.to_str().unwrap().to_owned(), format!("/{}{}", "../".repeat(12), host.display())]
    {
        let bundle = Bundle::new(&[&command]);
        let error = bad.refused(&bundle);
        assert_eq!(error.code(), Code::InvalidArgument, "{command}: {error}");
        assert!(error.message().contains("no such file"), "{command}: {error}");
    }
    // What leads upwards is held in the root.
    let bundle = bundle(&format!("/{}exit7.wasm", "../".repeat(12)));
    assert_eq!(bad.pod().run_to_end(&bundle).unwrap(), 7);
    bad.end();
}

#[test]
fn links_lead_to_files_of_the_image_alone() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-links");
    let host = kuasar_tests::bed().join("run/wasm/files/hello.wasm");
    let upwards = format!("{}{}", "../".repeat(12), host.display());
    for to in [host.to_str().unwrap(), &upwards] {
        let bundle = Bundle::new(&["/link.wasm"]);
        symlink(to, bundle.rootfs().join("link.wasm")).unwrap();
        let error = bad.refused(&bundle);
        assert_eq!(error.code(), Code::InvalidArgument, "{to}: {error}");
        assert!(error.message().contains("no such file"), "{to}: {error}");
    }
    let bundle = bundle("/exit7.wasm");
    std::fs::rename(bundle.rootfs().join("exit7.wasm"), bundle.rootfs().join("etc/m.wasm"))
        .unwrap();
    symlink("/etc/m.wasm", bundle.rootfs().join("exit7.wasm")).unwrap();
    assert_eq!(bad.pod().run_to_end(&bundle).unwrap(), 7);
    bad.end();
}

#[test]
fn a_loop_of_links_is_the_images_fault() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-link-loop");
    let bundle = Bundle::new(&["/loop"]);
    symlink("/loop", bundle.rootfs().join("loop")).unwrap();
    let error = bad.refused(&bundle);
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("symbolic links"), "{error}");
    bad.end();
}

/// The daemon with these lines at the end of its configuration, as long as it is held.
fn with(settings: &Settings, from: &str, to: &str) {
    assert!(settings.text.contains(from), "{from}");
    settings.reload_as(&settings.text.replace(from, to), "configuration read again");
}

#[test]
fn a_module_that_takes_too_long_to_compile_is_refused_with_the_key() {
    let Some(_on) = handler() else { return };
    let settings = Settings::open();
    let bad = Bad::new("wasm-timeout");
    with(&settings, "timeout = \"20s\"", "timeout = \"1ms\"");
    let bundle = Bundle::new(&["/new.wasm"]);
    std::fs::write(bundle.rootfs().join("new.wasm"), wasm::new_one("compute.wasm")).unwrap();
    let error = bad.refused(&bundle);
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("compiler.timeout"), "{error}");
    drop(settings);
    // As soon as it may take longer, the same one runs.
    wait_for("it is compiled", SOON, || bad.pod().run_to_end(&bundle).ok() == Some(0));
    bad.end();
}

#[test]
fn a_module_that_is_too_large_is_refused_with_the_key() {
    let Some(_on) = handler() else { return };
    let settings = Settings::open();
    let bad = Bad::new("wasm-large");
    with(&settings, "[compiler]", "[compiler]\nmax_module = 100");
    let bundle = bundle("/hello.wasm");
    let error = bad.refused(&bundle);
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("compiler.max_module"), "{error}");
    drop(settings);
    wait_for("it is compiled", SOON, || bad.pod().run_to_end(&bundle).is_ok());
    bad.end();
}

#[test]
fn native_containers_that_are_off_are_refused_with_the_key() {
    let Some(_on) = handler() else { return };
    let settings = Settings::open();
    let bad = Bad::new("wasm-no-natives");
    assert_eq!(bad.pod().run_to_end(&Bundle::new(&["/bin/true"])).unwrap(), 0);
    settings.reload("native_containers = false", "configuration read again");
    for (command, words) in [("/bin/true", "native_containers"), ("/none", "no such file")] {
        let error = bad.refused(&Bundle::new(&[command]));
        assert_eq!(error.code(), Code::InvalidArgument, "{command}: {error}");
        assert!(error.message().contains(words), "{command}: {error}");
    }
    bad.refuses("garbage.wasm", Code::InvalidArgument, "native_containers");
    bad.end();
}

#[test]
fn native_code_of_an_image_is_refused_where_it_is_off_with_the_key() {
    let Some(_on) = edge() else { return };
    let settings = Settings::open();
    let before = leaks::snapshot();
    let pod = Direct::run_with("wasm-image-code", |config| {
        config.annotations.insert("io.kuasar.wasm.engine".into(), "wasmedge".into());
    });
    let bundle = Bundle::new(&["/exit7.so"]);
    let compiled = kuasar_tests::bed().join("run/wasm/files/exit7.so");
    std::fs::copy(compiled, bundle.rootfs().join("exit7.so")).unwrap();
    assert_eq!(pod.run_to_end(&bundle).unwrap(), 7);
    with(&settings, "image_code = true", "image_code = false");
    let error = pod.run_to_end(&bundle).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("wasmedge.image_code"), "{error}");
    drop((settings, pod));
    leaks::assert_none(&before);
}

#[test]
fn a_full_disk_is_nobodys_fault_and_is_said_so() {
    let Some(_on) = handler() else { return };
    let bad = Bad::new("wasm-full");
    let bundle = Bundle::new(&["/new.wasm"]);
    std::fs::write(bundle.rootfs().join("new.wasm"), wasm::new_one("hello.wasm")).unwrap();
    let dir = kuasar_tests::bed().join("run/wasm-cache");
    let dir = dir.to_str().unwrap();
    let full = inside(&["mount", "-t", "tmpfs", "-o", "size=8k,mode=0700", "tmpfs", dir]);
    assert!(full.status.success());
    let error = bad.pod().run_to_end(&bundle);
    let out = inside(&["ls", "-A", dir]);
    assert!(inside(&["umount", dir]).status.success());
    let error = error.expect_err("there is room");
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("make room where cache.dir is"), "{error}");
    let left = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!left.contains("draft") && !left.contains("cwasm"), "{left}");
    assert_eq!(bad.pod().run_to_end(&bundle).unwrap(), 0);
    bad.end();
}
