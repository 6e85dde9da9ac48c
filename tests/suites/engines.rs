//! Every engine keeps the same promises: the built-in one in its two ways, runc and crun.

use std::sync::OnceLock;

use kuasar_tests::cri::*;
use kuasar_tests::wire::{Bundle, Direct};
use kuasar_tests::{bed, cri, handler, ours, skip};

/// The engines that run here; why another one does not is noted, and counted once for each test.
pub fn available() -> Vec<&'static str> {
    static CRUN: OnceLock<Result<(), String>> = OnceLock::new();
    let mut all = vec!["builtin", "libcontainer", "runc"];
    let crun = CRUN.get_or_init(|| {
        Direct::run_on("probe", "crun")
            .run_to_end(&Bundle::new(&["true"]))
            .map(drop)
            .map_err(|e| e.message().to_owned())
    });
    match crun {
        Ok(()) => all.push("crun"),
        // crun 1.8 refuses some hybrids of cgroup v1 and v2.
        Err(why) => skip(&format!("crun does not run here: {why}")),
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
        // crun 1.8 knows version 1.0 of the runtime spec alone, and containerd writes a later one.
        let probe = pod.create_with(&["true"], |_| {}).unwrap().start();
        if engine == "crun"
            && probe.as_ref().is_err_and(|e| e.message().contains("unknown version"))
        {
            skip("crun of this release takes no spec of containerd 2");
            continue;
        }
        probe.unwrap();
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
        assert_eq!(
            (c.logged("stdout"), c.logged("stderr")),
            (b"out\n".to_vec(), b"err\n".to_vec())
        );
    });
}

/// What the built-in engine is for: the containers that containerd asks for every day are made by
/// itself, and libcontainer is not needed.
#[test]
fn the_builtin_engine_makes_usual_containers_itself() {
    each("direct", |engine, pod| {
        if !matches!(engine, "builtin" | "libcontainer") {
            return;
        }
        let plain = pod.start(&["sleep", "1000"]);
        let terminal = pod.start_with(&["sleep", "1000"], |c| c.tty = true);
        for container in [&plain, &terminal] {
            let below = format!("run/kuasar-runc/sandboxes/{}/containers", pod.id);
            let state = bed().join(below).join(&container.id).join("engine").join(&container.id);
            // Its directory is a mount of the bed's own namespace.
            let state = format!("{}{}", kuasar_tests::root().display(), state.display());
            let text = std::fs::read_to_string(format!("{state}/state.json")).unwrap();
            assert_eq!(text.contains("\"engine\":\"direct\""), engine == "builtin", "{text}");
        }
    });
}

#[test]
fn every_engine_gives_a_terminal() {
    each("terminal", |engine, pod| {
        let c = pod
            .start_with(&["sh", "-c", "test -t 0 && test -t 1 && tty; exit 4"], |c| c.tty = true);
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
        // runc and crun can, where there is CRIU: suite `checkpoint`.
        if !matches!(engine, "builtin" | "libcontainer") {
            return;
        }
        let c = pod.start(&["sleep", "1000"]);
        let location = format!("{}/checkpoint.tar", pod.config.log_directory);
        let q = CheckpointContainerRequest { container_id: c.id.clone(), location, timeout: 10 };
        let e = cri!(checkpoint_container, q).expect_err("the built-in engine makes none");
        assert!(e.message().contains("built-in engine"), "{engine}: {e}");
        assert!(c.is_running(), "{engine}");
        // It was frozen for it, and is not any more.
        assert_eq!(c.sh("echo on"), "on", "{engine}");
    });
}
