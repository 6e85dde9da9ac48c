//! Every engine keeps the same promises: the built-in one, runc and crun.

use kuasar_tests::cri::*;
use kuasar_tests::{bed, cri, handler, ours, skip};

/// The engines that run here. One that cannot is noted as skipped, once for each test that asks.
pub fn available() -> Vec<&'static str> {
    let mut all = vec!["builtin"];
    for (engine, program) in [("runc", "runc13"), ("crun", "crun")] {
        let works = std::process::Command::new(bed().join("bin").join(program))
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success());
        if works {
            all.push(engine);
        } else {
            skip(&format!("engine {engine} is not packaged for this release"));
        }
    }
    all
}

/// Runs `test` with a pod of each engine.
pub fn each(name: &str, test: impl Fn(&str, &Pod)) {
    if handler() != "kuasar-runc" {
        return skip("engines are a matter of kuasar-runc");
    }
    for engine in available() {
        println!("engine {engine}");
        let mut config = pod_config(name);
        config.annotations = annotations(&[("io.kuasar.runc.engine", engine)]);
        let pod = Pod::run(config);
        test(engine, &pod);
        pod.remove().unwrap();
    }
}

#[test]
fn every_engine_runs_a_container() {
    each("engine", |engine, pod| {
        let c = pod.start(&["sleep", "1000"]);
        assert_eq!(c.sh("hostname"), "engine", "{engine}");
        assert_eq!(c.exec(&["sh", "-c", "exit 5"]).0, 5, "{engine}");
        let (code, out, err) = c.exec(&["sh", "-c", "echo out; echo err >&2; kill -9 $$"]);
        assert_eq!((code, &*out, &*err), (137, "out\n", "err\n"), "{engine}");
        c.stop(0).unwrap();
        assert_eq!(c.wait(), 137, "{engine}");
        let c = pod.start(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!(c.wait(), 7, "{engine}");
        assert_eq!((c.logged("stdout"), c.logged("stderr")), (b"out\n".to_vec(), b"err\n".to_vec()));
    });
}

#[test]
fn every_engine_gives_a_terminal() {
    each("terminal", |engine, pod| {
        let c = pod.start_with(&["sh", "-c", "test -t 0 && test -t 1 && tty; exit 4"], |c| c.tty = true);
        assert_eq!(c.wait(), 4, "{engine}");
        let text = String::from_utf8_lossy(&c.logged("stdout")).into_owned();
        assert!(text.starts_with("/dev/"), "{engine}: {text:?}");
    });
}

#[test]
fn every_engine_explains_a_command_that_is_not_there() {
    each("nothing", |engine, pod| {
        let c = pod.create_with(&["/no/such/program"], |_| {}).unwrap();
        let e = c.start().unwrap_err();
        let text = e.message().to_lowercase();
        assert!(text.contains("no such file") || text.contains("not found"), "{engine}: {e}");
        // The pod has not suffered.
        assert_eq!(pod.start(&["sh", "-c", "exit 3"]).wait(), 3, "{engine}");
    });
}

#[test]
fn every_engine_shares_what_is_the_pods() {
    each("share", |engine, pod| {
        let (a, b) = (pod.start(&["sleep", "1000"]), pod.start(&["sleep", "1000"]));
        for ns in ["net", "ipc", "uts"] {
            let link = |c: &Container| c.sh(&format!("readlink /proc/self/ns/{ns}"));
            assert_eq!(link(&a), link(&b), "{engine}: {ns}");
        }
        a.sh("echo shared > /dev/shm/f");
        assert_eq!(b.sh("cat /dev/shm/f"), "shared", "{engine}");
    });
}

#[test]
fn a_checkpoint_without_support_is_refused_clearly() {
    if !ours() {
        return;
    }
    each("checkpoint", |engine, pod| {
        let c = pod.start(&["sleep", "1000"]);
        let location = format!("{}/checkpoint.tar", pod.config.log_directory);
        let q = CheckpointContainerRequest { container_id: c.id.clone(), location, timeout: 10 };
        let e = cri!(checkpoint_container, q).expect_err("there is no criu here");
        let told = e.message().contains("built-in engine") || e.message().contains("criu");
        assert!(told, "{engine}: {e}");
        assert!(c.is_running(), "{engine}");
        // It was frozen for it, and is not any more.
        assert_eq!(c.sh("echo on"), "on", "{engine}");
    });
}
