//! Where programs come from: images, artifacts, the cache; and what is no program.

use std::path::PathBuf;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, inside, leaks, switch};

use super::*;

#[test]
fn what_is_no_program_is_explained_and_leaves_nothing() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-bad"));
    for (program, words) in [
        ("/garbage.wasm", "permission denied"),
        ("/empty.wasm", "permission denied"),
        ("/header.wasm", "truncated"),
        ("/version.wasm", "version 0x7"),
        ("/truncated.wasm", "cannot be compiled"),
        ("/world.wasm", "world is unknown"),
        ("/import.wasm", "no_such_thing"),
        ("/library.wasm", "_start"),
        ("/nothing.wasm", "no such file"),
        ("/outside-link.wasm", "no such file"),
        ("/absolute-link.wasm", "no such file"),
        ("/../../../../../../../../no/such.wasm", "no such file"),
    ] {
        let message = fails(&pod, &[program]);
        assert!(message.contains(words), "{program}: {message}");
    }
    // A link that stays inside, and a path that would lead out and is held inside.
    assert_eq!(start(&pod, &["/inside-link.wasm"]).wait(), 0);
    assert_eq!(start(&pod, &["/../../../../../../../../app/hello.wasm"]).wait(), 0);
    pod.remove().unwrap();
    leaks::assert_none(&before);
}

fn cached() -> Vec<PathBuf> {
    let dir = kuasar_tests::root().join(bed().join("run/wasm-cache").strip_prefix("/").unwrap());
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let code = entries.map(|entry| entry.path());
    code.filter(|path| path.extension().is_some_and(|kind| kind == "cwasm")).collect()
}

#[test]
fn an_altered_cache_file_is_not_used() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-cache"));
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    let files = cached();
    assert!(!files.is_empty());
    for file in &files {
        let mut bytes = std::fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        std::fs::write(file, bytes).unwrap();
    }
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
    // Also by a daemon that has never seen the good one.
    for file in cached() {
        std::fs::write(file, b"evil").unwrap();
    }
    switch(&["daemon", "kill"], &[]);
    switch(&["daemon", "start"], &[]);
    assert_eq!(start(&pod, &["/exit7.wasm"]).wait(), 7);
}

#[test]
fn a_full_disk_is_said_so_and_leaves_nothing() {
    let Some(_on) = handler() else { return };
    let dir = bed().join("run/wasm-cache");
    let dir = dir.to_str().unwrap();
    let pod = Pod::run(pod_config("wasm-full"));
    assert_eq!(start(&pod, &["/ok.wasm"]).wait(), 0);
    let full = inside(&["mount", "-t", "tmpfs", "-o", "size=8k,mode=0700", "tmpfs", dir]);
    assert!(full.status.success());
    // The daemon has the directory by its path.
    let message = fails(&pod, &["/hello.wasm"]);
    let out = inside(&["ls", "-A", dir]);
    assert!(inside(&["umount", dir]).status.success());
    assert!(message.contains("No space left") || message.contains("make room"), "{message}");
    let left = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!left.contains("draft") && !left.contains("cwasm"), "{left}");
    assert_eq!(start(&pod, &["/hello.wasm"]).wait(), 0);
}

/// Runs a program in the bed; answers what it has printed.
fn tool(words: &[&str]) -> String {
    let out = inside(words);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{words:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

#[test]
fn an_oci_artifact_runs_as_the_image_that_is_made_of_it() {
    let Some(_on) = handler() else { return };
    let name = "localhost/wasm-artifact:latest";
    let files = bed().join("run/wasm");
    let path = |name: &str| files.join(name).to_str().unwrap().to_owned();
    let (artifact, archive) = (path("artifact.tar"), path("of-artifact.tar"));
    let script = kuasar_tests::top().join("tests/bed/wasmartifact.py");
    let module = path("files/hello.wasm");
    tool(&["python3", script.to_str().unwrap(), name, &module, &artifact]);
    let program = kuasar_tests::programs().join("wasm-sandboxer");
    let program = program.to_str().unwrap();
    let said = tool(&[program, "image-of-artifact", &artifact, &archive, "--name", name]);
    assert!(said.contains("module /hello.wasm"), "{said}");
    let ctr = bed().join("root/usr/bin/ctr");
    let socket = bed().join("run/containerd.sock");
    let (ctr, socket) = (ctr.to_str().unwrap(), socket.to_str().unwrap());
    tool(&[ctr, "-a", socket, "-n", "k8s.io", "images", "import", &archive]);
    let pod = Pod::run(pod_config("wasm-artifact"));
    let c = pod.start_with(&[], |config| {
        config.image = Some(ImageSpec { image: name.into(), ..Default::default() });
    });
    assert_eq!(c.wait(), 0);
    assert_eq!(text(&c, "stdout"), "hello from wasm\n");
}
