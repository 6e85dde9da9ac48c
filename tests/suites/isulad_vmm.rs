//! iSulad, simulated ([`crate::isulad`]), with pods that are machines: its calls go to the real
//! `vmm-sandboxer`, and QEMU boots a real guest for each pod.

use std::io::{Read, Write};
use std::time::Duration;

use kuasar_protos::controller as api;
use kuasar_protos::shim::api as task;
use kuasar_tests::cri::runtime;
use kuasar_tests::wire::Bundle;
use kuasar_tests::{leaks, switch, wait_for};
use tonic::{Code, Status};

use crate::isulad::{Endpoint, Fifo, Isulad, SERVE, controller};
use crate::vmm::{Settings, kill, vmm_pid_of};
use crate::vmm_q35::q35;

/// A container from its announcement until it serves: what iSulad has made itself is there, and it
/// answers what iSulad asks of every container again and again.
fn serves(isulad: &mut Isulad, bundle: &Bundle) -> Fifo {
    let (dir, mut out, err) = isulad.prepare("c1", bundle);
    assert_ne!(isulad.create("c1", &dir, &out, &err), 0);
    isulad.start("c1", "").unwrap();
    let said = out.read_until("ready\n");
    for own in ["from-isulad\n", "10.9.9.9 from-isulad", "nameserver 10.9.9.53"] {
        assert!(said.contains(own), "{own:?} is not in {said:?}");
    }
    isulad.kill("c1", 0).unwrap();
    isulad.has_metrics_of_cgroup_v1("c1");
    out
}

/// Execs, which iSulad never deletes: taken off the list one is gone, and its name is free again.
fn execs(isulad: &mut Isulad) {
    let (status, text) =
        isulad.exec("c1", "probe", &["sh", "-c", "cat /dev/shm/mark; echo probed; exit 3"]);
    assert_eq!((status, text.as_str()), (3, "mine\nprobed\n"));
    assert_eq!(isulad.state("c1", "probe").unwrap_err().code(), Code::NotFound);
    std::fs::remove_file(isulad.dir.0.join("probe")).unwrap();
}

/// The network that the container sees.
fn interfaces(isulad: &mut Isulad) -> String {
    let (status, text) = isulad.exec("c1", "net", &["cat", "/proc/net/dev", "/proc/net/fib_trie"]);
    std::fs::remove_file(isulad.dir.0.join("net")).unwrap();
    assert_eq!(status, 0, "{text}");
    text
}

fn has_network(text: &str) -> bool {
    text.contains("eth0:") && text.contains("10.9.9.9")
}

/// iSulad's Wait for a pod: when it breaks off, Platform is asked until there is an answer, and then
/// Wait is called again. Answers how often that was so.
fn wait_for_pod(id: &str) -> usize {
    let mut broken = 0;
    loop {
        let q = api::ControllerWaitRequest { sandbox_id: id.into(), ..Default::default() };
        let ended: Result<api::ControllerWaitResponse, Status> =
            runtime().block_on(controller("Wait", q));
        match ended {
            Ok(_) => return broken,
            Err(error) => {
                assert_ne!(error.code(), Code::NotFound, "{error}");
                broken += 1;
            }
        }
        wait_for("Platform is answered", Duration::from_secs(30), || {
            let q = api::ControllerPlatformRequest { sandbox_id: id.into(), ..Default::default() };
            let answer: Result<api::ControllerPlatformResponse, Status> =
                runtime().block_on(controller("Platform", q));
            answer.is_ok()
        });
    }
}

/// iSulad restarts a container under its id. The guest may keep what it has read of a root file system: none
/// of it is seen in the next one, which has the same names in it.
fn an_id_is_used_again(isulad: &mut Isulad) {
    for mark in ["first", "other", "third"] {
        let bundle = Bundle::new(&["sh", "-c", "cat /etc/mark; ls /tmp; echo end"]);
        std::fs::write(bundle.rootfs().join("etc/mark"), format!("{mark}\n")).unwrap();
        std::fs::write(bundle.rootfs().join("tmp").join(mark), "").unwrap();
        let (dir, mut out, err) = isulad.prepare("again", &bundle);
        assert_ne!(isulad.create("again", &dir, &out, &err), 0);
        isulad.start("again", "").unwrap();
        assert_eq!(out.read_until("end\n"), format!("{mark}\n{mark}\nend\n"));
        assert_eq!(isulad.wait("again", ""), 0);
        isulad.clean("again");
        assert_eq!(isulad.state("again", "").unwrap_err().code(), Code::NotFound);
    }
}

#[test]
fn a_machine_with_hot_plug_lives_as_isulad_drives_it_over_kill_9_of_the_daemon() {
    let Some(_settings) = q35("") else { return };
    let before = leaks::snapshot();
    {
        let bundle = Bundle::new(&["sh", "-c", SERVE]);
        let mut isulad = Isulad::run_pod();
        assert!(matches!(isulad.endpoint, Endpoint::Unix(_)), "a form that lib-shim-v2 can dial");
        isulad.set_network_up();
        let mut out = serves(&mut isulad, &bundle);
        execs(&mut isulad);
        wait_for("the network that came after Start", Duration::from_secs(30), || {
            has_network(&interfaces(&mut isulad))
        });
        let (id, endpoint) = (isulad.id.clone(), isulad.endpoint.clone());
        let pod = std::thread::spawn(move || wait_for_pod(&id));
        let container = std::thread::spawn(move || {
            let q = task::WaitRequest { id: "c1".into(), ..Default::default() };
            endpoint.call::<_, task::WaitResponse>("containerd.task.v2.Task", "Wait", &q)
        });
        switch(&["daemon", "kill"], &[]);
        switch(&["daemon", "start"], &[]);
        isulad.kill("c1", 0).unwrap();
        execs(&mut isulad);
        // What had been announced before, and what is announced after.
        let second = Bundle::new(&["echo", "late"]);
        let (dir, mut late, err) = isulad.prepare("c2", &second);
        isulad.create("c2", &dir, &late, &err);
        isulad.start("c2", "").unwrap();
        late.read_until("late\n");
        assert_eq!(isulad.wait("c2", ""), 0);
        isulad.clean("c2");
        isulad.kill("c1", libc::SIGTERM).unwrap();
        assert_eq!(container.join().unwrap().unwrap().exit_status, 7);
        out.read_until("ended\n");
        isulad.clean("c1");
        isulad.remove_pod();
        assert!(pod.join().unwrap() > 0, "the Wait for the pod has broken off, and come back");
    }
    leaks::assert_none(&before);
}

#[test]
fn a_machine_without_hot_plug_lives_as_isulad_drives_it_with_its_network_first() {
    let Some(_settings) = Settings::with(str::to_owned) else { return };
    let before = leaks::snapshot();
    {
        let bundle = Bundle::new(&["sh", "-c", SERVE]);
        let mut isulad = Isulad::run_pod_with(true);
        let out = serves(&mut isulad, &bundle);
        execs(&mut isulad);
        let text = interfaces(&mut isulad);
        assert!(has_network(&text), "{text}");
        an_id_is_used_again(&mut isulad);
        isulad.input_and_terminal("c1");
        isulad.ends(out);
    }
    leaks::assert_none(&before);
}

/// What the guest's Task port does, and what it does not do for whoever dials it.
fn is_confined(isulad: &Isulad) {
    let Endpoint::Hybrid(uds, 1026) = &isulad.endpoint else { panic!("another endpoint") };
    let q = task::CreateTaskRequest { id: "stranger".into(), ..Default::default() };
    let refused = isulad.v2::<_, task::CreateTaskResponse>("Create", &q).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("not announced"), "{refused}");
    for (service, method) in
        [("kuasar.vmm.v1.Guest", "Info"), ("containerd.services.streaming.v1.Streaming", "Stream")]
    {
        let q = task::Empty::new();
        let refused = isulad.endpoint.call::<_, task::Empty>(service, method, &q).unwrap_err();
        assert!(refused.code() != Code::Ok && !refused.message().is_empty(), "{service}");
    }
    // The agent's own port wants the token as ever.
    for port in [1024, 1025] {
        let mut stream = Endpoint::Hybrid(uds.clone(), port).dial();
        stream.write_all(format!("KUASAR1 {} control\n", "0".repeat(64)).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("ERR wrong token"), "{port}: {answer:?}");
    }
}

#[test]
fn isulad_calls_the_guest_itself_and_kill_9_of_the_daemon_does_not_cut_it() {
    let guest = |text: &str| format!("task_endpoint = \"guest\"\n{text}");
    let Some(_settings) = Settings::with(guest) else { return };
    let before = leaks::snapshot();
    {
        let bundle = Bundle::new(&["sh", "-c", SERVE]);
        let mut isulad = Isulad::run_pod_with(true);
        is_confined(&isulad);
        let mut out = serves(&mut isulad, &bundle);
        let state = isulad.state("c1", "").unwrap();
        assert_eq!(state.stdout, out.text(), "streams are named as the engine names them");
        execs(&mut isulad);
        let text = interfaces(&mut isulad);
        assert!(has_network(&text), "{text}");

        isulad.input_and_terminal("c1");

        for method in ["Update", "Checkpoint"] {
            let q = task::UpdateTaskRequest { id: "c1".into(), ..Default::default() };
            let refused = isulad.v2::<_, task::Empty>(method, &q).unwrap_err();
            assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
        }

        let endpoint = isulad.endpoint.clone();
        let container = std::thread::spawn(move || {
            let q = task::WaitRequest { id: "c1".into(), ..Default::default() };
            endpoint.call::<_, task::WaitResponse>("containerd.task.v2.Task", "Wait", &q)
        });
        switch(&["daemon", "kill"], &[]);
        // Nobody is missed: calls go to the guest, and what is written waits.
        isulad.kill("c1", 0).unwrap();
        isulad.has_metrics_of_cgroup_v1("c1");
        isulad.kill("c1", libc::SIGTERM).unwrap();
        assert_eq!(container.join().unwrap().unwrap().exit_status, 7);
        switch(&["daemon", "start"], &[]);
        out.read_until("ended\n");
        isulad.clean("c1");
        assert_eq!(isulad.state("c1", "").unwrap_err().code(), Code::NotFound);

        // The next container, of the daemon that has just begun; its machine ends under it.
        let second = Bundle::new(&["sh", "-c", SERVE]);
        let mut out = serves(&mut isulad, &second);
        kill(vmm_pid_of(&isulad.id));
        out.read_to_end();
        assert_eq!(wait_for_pod(&isulad.id), 0);
        isulad.remove_pod();
    }
    leaks::assert_none(&before);
}
