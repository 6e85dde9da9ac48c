//! What a running gVisor sandbox is told to do with its containers: pause, resume, other limits, a
//! checkpoint; and streams that containerd takes from the daemon instead of FIFOs.

use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{bed, leaks, on, task, wait_for, wire};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

const SOON: Duration = Duration::from_secs(60);
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";

fn lines(c: &Container) -> usize {
    String::from_utf8_lossy(&c.logged("stdout")).lines().count()
}

#[test]
fn a_paused_pod_stands_still_until_it_is_resumed() {
    let Some(_on) = on("kuasar-gvisor") else { return };
    let pod = Pod::run(pod_config("gv-pause"));
    let c = pod.start(&["sh", "-c", COUNT]);
    wait_for("it counts", SOON, || lines(&c) > 2);
    let socket = wire::task_socket(&pod.id);
    let q = tasks::PauseRequest { id: c.id.clone(), ..Default::default() };
    task!(&socket, pause, q).unwrap();
    let q = tasks::StateRequest { id: c.id.clone(), ..Default::default() };
    let state = task!(&socket, state, q.clone()).unwrap();
    assert_eq!(state.status.enum_value().map(|s| format!("{s:?}")), Ok("PAUSED".into()));
    // What was on its way arrives; nothing new comes.
    std::thread::sleep(Duration::from_millis(300));
    let before = lines(&c);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(lines(&c), before);
    let q = tasks::ResumeRequest { id: c.id.clone(), ..Default::default() };
    task!(&socket, resume, q).unwrap();
    wait_for("it counts again", SOON, || lines(&c) > before);
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
}

#[test]
fn other_limits_are_taken_and_the_container_goes_on() {
    let Some(_on) = on("kuasar-gvisor") else { return };
    let pod = Pod::run(pod_config("gv-update"));
    let c = pod.start(&["sh", "-c", COUNT]);
    wait_for("it counts", SOON, || lines(&c) > 2);
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: br#"{"memory":{"limit":268435456},"cpu":{"shares":512}}"#.to_vec(),
        ..Default::default()
    };
    let q = tasks::UpdateTaskRequest {
        id: c.id.clone(),
        resources: MessageField::some(resources),
        ..Default::default()
    };
    let socket = wire::task_socket(&pod.id);
    task!(&socket, update, q).unwrap();
    let before = lines(&c);
    wait_for("it goes on", SOON, || lines(&c) > before);
}

#[test]
fn a_checkpoint_is_written_and_the_container_goes_on() {
    let Some(_on) = on("kuasar-gvisor") else { return };
    let pod = Pod::run(pod_config("gv-checkpoint"));
    let c = pod.start(&["sh", "-c", COUNT]);
    wait_for("it counts", SOON, || lines(&c) > 2);
    let image = bed().join(format!("run/logs/gv-image-{}", unique()));
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&image).unwrap();
    let q = tasks::CheckpointTaskRequest {
        id: c.id.clone(),
        path: image.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let socket = wire::task_socket(&pod.id);
    let answer = task!(&socket, checkpoint, q);
    let names: Vec<String> = std::fs::read_dir(&image)
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let _ = std::fs::remove_dir_all(&image);
    answer.unwrap();
    assert!(names.iter().any(|name| name == "checkpoint.img"), "{names:?}");
    let before = lines(&c);
    wait_for("it goes on", SOON, || lines(&c) > before);
    assert_eq!(c.sh("echo in"), "in");
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
}

/// runsc takes an id for the beginning of one.
#[test]
fn containers_whose_ids_begin_alike_are_told_apart() {
    let Some(_on) = on("kuasar-gvisor") else { return };
    let before = leaks::snapshot();
    let (pod, other) = (Pod::run(pod_config("gv-alike")), Pod::run(pod_config("gv-alike2")));
    // In another pod too, and with a terminal, for which runsc looks a container up by its id.
    let sockets = [&other, &pod, &pod].map(|pod| wire::task_socket(&pod.id));
    let [a, b, c] = &sockets;
    let all = [(a, "web-10", false), (b, "web-1", true), (c, "web", true)];
    let mut bundles = Vec::new();
    for (socket, id, terminal) in all {
        let mut bundle = wire::Bundle::new(&["sh", "-c", "sleep 1000"]);
        bundle.spec["process"]["terminal"] = terminal.into();
        bundle.spec["linux"]["cgroupsPath"] = format!("/{}/{}", cgroup_root(), unique()).into();
        let (stdout, reader) = crate::checkpoint::fifo(&bundle.dir);
        let q = tasks::CreateTaskRequest { terminal, stdout, ..bundle.request(id) };
        task!(socket, create, q).unwrap();
        bundles.push((bundle, reader));
    }
    for (socket, id, _) in all.iter().rev() {
        let q = tasks::StartRequest { id: (*id).into(), ..Default::default() };
        task!(socket, start, q).unwrap();
    }
    // Only the one that is meant is killed.
    for (i, (socket, id, _)) in all.iter().enumerate().rev() {
        let id = (*id).to_owned();
        let q = tasks::KillRequest { id: id.clone(), signal: 9, ..Default::default() };
        task!(socket, kill, q).unwrap();
        let q = tasks::WaitRequest { id: id.clone(), ..Default::default() };
        assert_eq!(task!(socket, wait, q).unwrap().exit_status, 137, "{id}");
        let q = tasks::DeleteRequest { id: id.clone(), ..Default::default() };
        task!(socket, delete, q).unwrap();
        for (socket, id, _) in all.iter().take(i) {
            let q = tasks::StateRequest { id: (*id).into(), ..Default::default() };
            let state = task!(socket, state, q).unwrap();
            assert_eq!(format!("{:?}", state.status), "RUNNING", "{id}");
        }
    }
    for pod in [pod, other] {
        pod.remove().unwrap();
    }
    leaks::assert_none(&before);
}

#[test]
fn streams_carry_every_byte_of_containers_and_execs() {
    let Some(_on) = on("kuasar-gvisor-streaming") else { return };
    let pod = Pod::run(pod_config("gv-streams"));
    let c = pod.start(&["sh", "-c", "seq 1 50000; echo problem >&2; exit 3"]);
    assert_eq!(c.wait(), 3);
    let want: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(c.logged("stdout"), want.as_bytes());
    assert_eq!(c.logged("stderr"), b"problem\n");
    let c = pod.start(&["sleep", "1000"]);
    let (code, out, err) = c.exec(&["sh", "-c", "seq 1 20000 | tail -n 1; echo bad >&2; exit 9"]);
    assert_eq!((code, out.as_str(), err.as_str()), (9, "20000\n", "bad\n"));
}
