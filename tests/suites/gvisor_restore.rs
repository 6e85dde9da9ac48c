//! Pods on gVisor that go on from a checkpoint, by the Task API: containerd 2.1 fails before it asks
//! a sandboxer to restore.

use std::time::Duration;

use kuasar_protos::runc_options::CheckpointOptions;
use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::wire::{self, Bundle};
use kuasar_tests::{leaks, on, switch, task, wait_for};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tonic::Code;

use crate::checkpoint::{COUNT, Image, fifo, number};
use crate::own_kernel::*;

const HANDLER: &str = "kuasar-gvisor";
const RESTORE: (&str, &str) = ("io.kuasar.gvisor.restore", "true");

/// Calls a method of the Task service of a pod.
macro_rules! call {
    ($pod:expr, $method:ident, $request:expr) => {{
        let socket = wire::task_socket(&$pod.id);
        task!(&socket, $method, $request)
    }};
}

/// A pod that waits for a checkpoint.
fn waiting(name: &str) -> Pod {
    let mut config = pod_config(name);
    config.annotations = annotations(&[RESTORE]);
    Pod::run(config)
}

/// A bundle whose container has this name for CRI, by which gVisor knows it again.
fn bundle(name: &str, args: &[&str]) -> Bundle {
    let mut bundle = Bundle::new(args);
    bundle.spec["annotations"] = serde_json::json!({ "io.kubernetes.cri.container-name": name });
    bundle.spec["linux"]["cgroupsPath"] = format!("/{}/{}", cgroup_root(), unique()).into();
    bundle
}

fn start(pod: &Pod, id: &str) -> Result<u32, tonic::Status> {
    let q = tasks::StartRequest { id: id.into(), ..Default::default() };
    call!(pod, start, q).map(|answer| answer.pid)
}

fn status(pod: &Pod, id: &str) -> String {
    let q = tasks::StateRequest { id: id.into(), ..Default::default() };
    format!("{:?}", call!(pod, state, q).unwrap().status)
}

fn kill(pod: &Pod, id: &str) {
    let q = tasks::KillRequest { id: id.into(), signal: 9, ..Default::default() };
    call!(pod, kill, q).unwrap();
}

fn wait(pod: &Pod, id: &str) -> u32 {
    let q = tasks::WaitRequest { id: id.into(), ..Default::default() };
    call!(pod, wait, q).unwrap().exit_status
}

fn delete(pod: &Pod, id: &str) {
    let q = tasks::DeleteRequest { id: id.into(), ..Default::default() };
    call!(pod, delete, q).unwrap();
}

fn checkpoint(pod: &Pod, id: &str, image: &Image, exit: bool) {
    let options = CheckpointOptions { exit, ..Default::default() };
    let q = wire::checkpoint_request(id, &image.text(), &options);
    call!(pod, checkpoint, q).unwrap();
}

fn exec(pod: &Pod, id: &str, args: &[&str]) -> u32 {
    let exec_id = format!("e{}", unique());
    let process = serde_json::json!({
        "user": { "uid": 0, "gid": 0 }, "args": args, "env": ["PATH=/bin"], "cwd": "/",
    });
    let spec = Any {
        type_url: wire::PROCESS.into(),
        value: process.to_string().into_bytes(),
        ..Any::default()
    };
    let socket = wire::task_socket(&pod.id);
    let q = tasks::ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.clone(),
        spec: MessageField::some(spec),
        ..Default::default()
    };
    task!(&socket, exec, q).unwrap();
    let q = tasks::StartRequest { id: id.into(), exec_id: exec_id.clone(), ..Default::default() };
    task!(&socket, start, q).unwrap();
    let q = tasks::WaitRequest { id: id.into(), exec_id: exec_id.clone(), ..Default::default() };
    let code = task!(&socket, wait, q).unwrap().exit_status;
    let q = tasks::DeleteRequest { id: id.into(), exec_id, ..Default::default() };
    task!(&socket, delete, q).unwrap();
    code
}

fn ip(pod: &Pod) -> String {
    let q = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    kuasar_tests::cri!(pod_sandbox_status, q).unwrap().status.unwrap().network.unwrap().ip
}

/// Two counters are checkpointed and go on in another pod; `between` their starts there.
fn there_and_back(between: impl Fn()) {
    let before = leaks::snapshot();
    let image = Image::new();
    let bundles = [bundle("one", &["sh", "-c", COUNT]), bundle("two", &["sh", "-c", COUNT])];
    let first = Pod::run(pod_config("gv-there"));
    let socket = wire::task_socket(&first.id);
    let mut last = [0, 0];
    let outputs = bundles.each_ref().map(|bundle| fifo(&bundle.dir));
    for (id, (bundle, (stdout, _))) in ["a", "b"].iter().zip(bundles.iter().zip(&outputs)) {
        let q = tasks::CreateTaskRequest { stdout: stdout.clone(), ..bundle.request(id) };
        task!(&socket, create, q).unwrap();
        start(&first, id).unwrap();
    }
    for ((_, mut lines), last) in outputs.into_iter().zip(&mut last) {
        while *last < 3 {
            *last = number(&mut lines);
        }
    }
    checkpoint(&first, "a", &image, true);
    // gVisor ends them without an error.
    assert_eq!((wait(&first, "a"), wait(&first, "b")), (0, 0));
    for id in ["a", "b"] {
        delete(&first, id);
    }
    wait_for("the pod is down", SOON, || first.state() == PodSandboxState::SandboxNotready as i32);
    first.remove().unwrap();

    let second = waiting("gv-back");
    let socket = wire::task_socket(&second.id);
    // The beginning of the sandbox's own id, which runsc would take for the sandbox itself.
    let own = info(&second, "gvisor").get("sandbox").unwrap().as_str().unwrap().to_owned();
    let (c, d) = (&own[..2], &own[..1]);
    let mut outputs = bundles.each_ref().map(|bundle| fifo(&bundle.dir));
    for (id, (bundle, (stdout, _))) in [c, d].iter().zip(bundles.iter().zip(&outputs)) {
        let q = tasks::CreateTaskRequest {
            stdout: stdout.clone(),
            checkpoint: image.text(),
            ..bundle.request(id)
        };
        task!(&socket, create, q).unwrap();
        assert!(status(&second, id).contains("CREATED"));
    }
    between();
    // In another order: they are known by their names.
    assert!(start(&second, d).unwrap() > 0);
    between();
    // It would be lost when the kernel of the checkpoint takes over.
    let early = bundle("early", &["true"]);
    task!(&socket, create, early.request("early")).unwrap();
    let refused = start(&second, "early").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("1 of 2"), "{refused}");
    delete(&second, "early");
    start(&second, c).unwrap();
    between();
    for ((_, lines), last) in outputs.iter_mut().zip(last) {
        // What was written after it was read last and before the checkpoint is not told again.
        let mut next = number(lines);
        assert!((last + 1..last + 50).contains(&next), "{next} after {last}");
        for _ in 0..5 {
            let n = number(lines);
            assert_eq!(n, next + 1);
            next = n;
        }
    }
    assert_eq!(exec(&second, c, &["sh", "-c", "exit 21"]), 21);
    // The addresses are the new pod's.
    let seen = format!("busybox ip addr | busybox grep -q {}", ip(&second));
    assert_eq!(exec(&second, d, &["sh", "-c", &seen]), 0);
    // The sandbox is one like any other from now on.
    let late = bundle("late", &["sh", "-c", "exit 22"]);
    task!(&socket, create, late.request("late")).unwrap();
    start(&second, "late").unwrap();
    assert_eq!(wait(&second, "late"), 22);
    kill(&second, c);
    assert_eq!(wait(&second, c), 137);
    delete(&second, c);
    second.remove().unwrap();
    leaks::assert_none(&before);
}

#[test]
fn a_pod_goes_on_from_a_checkpoint_in_another_pod() {
    let Some(_on) = on(HANDLER) else { return };
    there_and_back(|| {});
}

#[test]
fn a_restore_survives_kills_of_the_daemon_at_each_step() {
    let Some(_on) = on(HANDLER) else { return };
    there_and_back(|| {
        switch(&["daemon", "kill"], &[]);
        switch(&["daemon", "start"], &[]);
    });
}

#[test]
fn what_gvisor_cannot_restore_is_refused_in_words() {
    let Some(_on) = on(HANDLER) else { return };
    let before = leaks::snapshot();
    let image = Image::new();
    let counts = bundle("counts", &["sh", "-c", COUNT]);
    let running = Pod::run(pod_config("gv-runs"));
    let socket = wire::task_socket(&running.id);
    task!(&socket, create, counts.request("a")).unwrap();
    start(&running, "a").unwrap();
    checkpoint(&running, "a", &image, false);
    assert!(status(&running, "a").contains("RUNNING"));
    // gVisor's own words for it are "cannot restore a started container".
    let wanted = |checkpoint: &Image, id: &str| tasks::CreateTaskRequest {
        checkpoint: checkpoint.text(),
        ..counts.request(id)
    };
    let refused = task!(&socket, create, wanted(&image, "b")).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("io.kuasar.gvisor.restore"), "{refused}");

    let waits = waiting("gv-waits");
    let socket = wire::task_socket(&waits.id);
    let (empty, hostile) = (Image::new(), Image::new());
    std::os::unix::fs::symlink("/etc/shadow", hostile.0.join("checkpoint.img")).unwrap();
    for bad in [&empty, &hostile] {
        let refused = task!(&socket, create, wanted(bad, "b")).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    let q = tasks::CreateTaskRequest { terminal: true, ..wanted(&image, "b") };
    let refused = task!(&socket, create, q).unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
    // The checkpoint has one container.
    for id in ["b", "c"] {
        task!(&socket, create, wanted(&image, id)).unwrap();
    }
    start(&waits, "b").unwrap();
    let refused = start(&waits, "c").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert_eq!(exec(&waits, "b", &["true"]), 0);

    // A pod that waits runs any container, and then waits no more.
    let other = waiting("gv-other");
    let c = other.start(&["sh", "-c", "exit 8"]);
    assert_eq!(c.wait(), 8);
    let socket = wire::task_socket(&other.id);
    task!(&socket, create, wanted(&image, "b")).unwrap();
    let refused = start(&other, "b").unwrap_err();
    assert!(refused.message().contains("without a checkpoint"), "{refused}");
    // One for which nobody came.
    let alone = waiting("gv-alone");
    assert_eq!(alone.state(), PodSandboxState::SandboxReady as i32);
    for pod in [running, waits, other, alone] {
        pod.remove().unwrap();
    }
    leaks::assert_none(&before);
}

#[test]
fn a_damaged_checkpoint_ends_its_pod_alone() {
    let Some(_on) = on(HANDLER) else { return };
    let before = leaks::snapshot();
    let image = Image::new();
    let mut bytes = b"gVisorSF".to_vec();
    let text = br#"{"compression":"none","container_count":"2"}"#;
    bytes.extend((text.len() as u64).to_be_bytes());
    bytes.extend(text);
    bytes.extend([0x55; 4096]);
    std::fs::write(image.0.join("checkpoint.img"), bytes).unwrap();
    let fine = Pod::run(pod_config("gv-fine"));
    let c = fine.start(&["sleep", "1000"]);
    let pod = waiting("gv-damaged");
    let counts = bundle("counts", &["sh", "-c", COUNT]);
    let q = tasks::CreateTaskRequest { checkpoint: image.text(), ..counts.request("b") };
    call!(pod, create, q).unwrap();
    let refused = start(&pod, "b").unwrap_err();
    assert!(refused.message().contains("restore failed"), "{refused}");
    assert_eq!(wait(&pod, "b"), 255);
    assert!(c.is_running());
    wait_for("the damaged pod can be removed", Duration::from_secs(30), || pod.remove().is_ok());
    drop(fine);
    leaks::assert_none(&before);
}
