//! What happens to containers is told to containerd, in order.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::{bed, ours, task, wire};
use serde_json::Value;

fn ctr(args: &[&str]) -> Command {
    let mut command = Command::new(bed().join("root/usr/bin/ctr"));
    command.arg("-a").arg(bed().join("run/containerd.sock")).args(["-n", "k8s.io"]).args(args);
    command
}

/// `ctr events`, line by line.
pub(crate) struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Events {
    pub(crate) fn follow() -> Self {
        let mut child = ctr(&["events"]).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let events = Self { child, lines };
        // It has subscribed as soon as it shows something.
        let until = Instant::now() + Duration::from_secs(20);
        while events.lines.recv_timeout(Duration::from_millis(100)).is_err() {
            assert!(Instant::now() < until, "no events at all");
            ctr(&["images", "label", "localhost/busybox:latest", "wake=up"]).output().unwrap();
        }
        events
    }

    /// Topics and bodies about this container, until one has the topic `last`.
    pub(crate) fn of(&self, container: &str, last: &str) -> Vec<(String, Value)> {
        let until = Instant::now() + Duration::from_secs(20);
        let mut all = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line =
                self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("no {last}: {all:#?}"));
            // Date, time, zone, zone's name, namespace, topic, JSON.
            let Some((head, body)) = line.split_once(" {") else { continue };
            let topic = head.rsplit(' ').next().unwrap_or_default().to_owned();
            let Ok(body) = serde_json::from_str::<Value>(&format!("{{{body}")) else { continue };
            if body["container_id"] != container || !topic.starts_with("/tasks/") {
                continue;
            }
            let done = topic == last;
            all.push((topic, body));
            if done {
                return all;
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_step_of_a_life_is_told_in_order() {
    if !ours() {
        return;
    }
    let events = Events::follow();
    let pod = Pod::run(pod_config("events"));
    let c = pod.start(&["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"]);
    assert_eq!(c.exec(&["sh", "-c", "exit 5"]).0, 5);
    let socket = wire::task_socket(&pod.id);
    let q = tasks::PauseRequest { id: c.id.clone(), ..Default::default() };
    task!(&socket, pause, q).unwrap();
    let q = tasks::StateRequest { id: c.id.clone(), ..Default::default() };
    let state = task!(&socket, state, q).unwrap().status.value();
    assert_eq!(state, 4, "PAUSED");
    let q = tasks::ResumeRequest { id: c.id.clone(), ..Default::default() };
    task!(&socket, resume, q).unwrap();
    c.stop(10).unwrap();
    assert_eq!(c.wait(), 3);
    let told = events.of(&c.id, "/tasks/delete");
    let topics: Vec<&str> = told.iter().map(|(topic, _)| topic.as_str()).collect();
    // The delete of an exec is told by CRI's own client, where it is: not asserted.
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    assert_eq!(topics, wanted);
    let exits: Vec<_> = told.iter().filter(|(t, _)| t == "/tasks/exit").map(|(_, b)| b).collect();
    assert_eq!((&exits[0]["exit_status"], &exits[1]["exit_status"]), (&5.into(), &3.into()));
    assert_ne!(exits[0]["id"], exits[1]["id"]);
    assert_eq!(exits[1]["id"], c.id.as_str());
    let (create, start) = (&told[0].1, &told[1].1);
    assert!(
        create["pid"].as_u64().unwrap() > 0 && create["pid"] == start["pid"],
        "{create} {start}"
    );
    assert!(create["bundle"].as_str().unwrap().contains(&c.id), "{create}");
}

#[test]
fn an_out_of_memory_kill_is_told_before_the_exit() {
    if !ours() {
        return;
    }
    let events = Events::follow();
    let pod = Pod::run(pod_config("oom"));
    let c = pod.start_with(&["tail", "/dev/zero"], |c| {
        let r = c.linux.as_mut().unwrap().resources.as_mut().unwrap();
        r.memory_limit_in_bytes = 16 << 20;
        r.memory_swap_limit_in_bytes = 16 << 20;
    });
    assert_eq!(c.wait(), 137);
    assert_eq!(c.status().reason, "OOMKilled");
    let told = events.of(&c.id, "/tasks/exit");
    assert!(told.iter().any(|(topic, _)| topic == "/tasks/oom"), "{told:#?}");
}

#[test]
fn events_of_the_time_without_containerd_are_told_when_it_is_back() {
    if !ours() {
        return;
    }
    let pod = Pod::run(pod_config("later"));
    let c = pod.start(&["sleep", "1000"]);
    let events = Events::follow();
    let daemon = kuasar_tests::daemon_pid();
    drop(events);
    kuasar_tests::switch(&["containerd", "kill"], &[]);
    std::fs::remove_file(bed().join("run/containerd.sock.ttrpc")).ok();
    kuasar_tests::switch(&["containerd", "start"], &[]);
    let events = Events::follow();
    assert_eq!(c.exec(&["true"]).0, 0);
    let told = events.of(&c.id, "/tasks/exit");
    assert!(told.iter().any(|(topic, _)| topic == "/tasks/exec-started"), "{told:#?}");
    assert_eq!(kuasar_tests::daemon_pid(), daemon);
}
