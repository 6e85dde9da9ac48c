//! Pods of WebAssembly: real containerd, real Wasmtime; the programs are assembled by the tests.

mod bad_input;
mod confinement;
mod control;
mod images;
mod limits;
mod nn;
mod programs;
mod testsuite;
mod users;
mod wasip3;
mod wasmedge;

use std::time::Duration;

use kuasar_tests::cri::*;
use kuasar_tests::{Chosen, bed, cri, inside, on, skip, wait_for, wasm};

const HANDLER: &str = "kuasar-wasm";
const EDGE: &str = "kuasar-wasmedge";
const SOON: Duration = Duration::from_secs(30);

fn handler() -> Option<Chosen> {
    let chosen = on(HANDLER)?;
    wasm::import();
    Some(chosen)
}

/// WasmEdge in place of Wasmtime, where the bed has it.
fn edge() -> Option<Chosen> {
    let chosen = on(EDGE)?;
    if !bed().join("bin/wasm-worker-wasmedge").exists() {
        skip("no WasmEdge in the test bed");
        return None;
    }
    wasm::import();
    Some(chosen)
}

/// Tries the same with each engine that there is.
fn with_engines(test: impl Fn(&'static str)) {
    if let Some(_on) = handler() {
        test("wasmtime");
    }
    if let Some(_on) = edge() {
        test("wasmedge");
    }
}

/// The process of this name that belongs to this bed.
fn named(wanted: &str) -> Option<u32> {
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        (name.trim() == wanted && parent_is_ours(pid)).then_some(pid)
    })
}

fn parent_is_ours(pid: u32) -> bool {
    let parent = parent(pid).unwrap_or_default();
    kuasar_tests::is_ours(&std::fs::read_link(format!("/proc/{parent}/exe")).unwrap_or_default())
}

fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn image(config: &mut ContainerConfig) {
    config.image = Some(ImageSpec { image: wasm::IMAGE.into(), ..Default::default() });
}

fn start(pod: &Pod, command: &[&str]) -> Container {
    pod.start_with(command, image)
}

fn text(container: &Container, stream: &str) -> String {
    String::from_utf8_lossy(&container.logged(stream)).into_owned()
}

/// Creates and starts a container that is to fail; answers the message.
fn fails(pod: &Pod, command: &[&str]) -> String {
    let container = match pod.create_with(command, image) {
        Ok(container) => container,
        Err(error) => return error.to_string(),
    };
    let error = container.start().expect_err("it starts");
    container.remove().unwrap();
    error.to_string()
}

/// Members of the entry that the sandboxer adds to a verbose status.
fn info(pod: &Pod) -> serde_json::Value {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let answer = cri!(pod_sandbox_status, q).unwrap();
    serde_json::from_str(answer.info.get("wasm").unwrap()).unwrap()
}

fn address(pod: &Pod) -> String {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    cri!(pod_sandbox_status, q).unwrap().status.unwrap().network.unwrap().ip
}

fn http(address: &str, port: u16) -> Option<String> {
    let url = format!("http://{address}:{port}/");
    let busybox = bed().join("src/busybox");
    let out = inside(&[busybox.to_str().unwrap(), "wget", "-q", "-O", "-", "-T", "5", &url]);
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn limited(bytes: i64) -> impl FnOnce(&mut ContainerConfig) {
    move |config| {
        image(config);
        let linux = config.linux.as_mut().unwrap();
        linux.resources =
            Some(LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() });
    }
}
