//! Where programs come from: images, artifacts, the cache; and what is no program.

use std::path::{Path, PathBuf};
use std::time::Instant;

use kuasar_tests::cri::*;
use kuasar_tests::settings::{Settings, log};
use kuasar_tests::{bed, inside, leaks, switch};
use serde_json::{Value, json};

use super::*;

#[test]
fn what_is_no_program_is_explained_through_containerd() {
    let Some(_on) = handler() else { return };
    let before = leaks::snapshot();
    let pod = Pod::run(pod_config("wasm-bad"));
    // By Create and by Start. What else there is, and the codes: bad_input.rs.
    for (program, words) in [("/header.wasm", "truncated"), ("/import.wasm", "no_such_thing")] {
        let message = fails(&pod, &[program]);
        assert!(message.contains(words), "{program}: {message}");
    }
    // Links of an image that containerd has unpacked.
    for program in ["/outside-link.wasm", "/absolute-link.wasm"] {
        let message = fails(&pod, &[program]);
        assert!(message.contains("no such file"), "{program}: {message}");
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
    let module = path("files/sleep.wasm");
    tool(&["python3", script.to_str().unwrap(), name, &module, &artifact]);
    let program = kuasar_tests::programs().join("wasm-sandboxer");
    let program = program.to_str().unwrap();
    let said = tool(&[program, "image-of-artifact", &artifact, &archive, "--name", name]);
    assert!(said.contains("module /sleep.wasm"), "{said}");
    wasm::load(archive.as_ref(), &[]);
    let pod = Pod::run(pod_config("wasm-artifact"));
    let c = pod.start_with(&[], |config| {
        config.image = Some(ImageSpec { image: name.into(), ..Default::default() });
    });
    let expected = json!({ "name": name, "kind": "artifact", "platform": here() });
    assert_eq!(came_from(&pod, &c), expected);
    wait_for("it runs", SOON, || text(&c, "stdout") == "ready\n");
}

/// What Status says of the image of a container.
fn came_from(pod: &Pod, container: &Container) -> Value {
    info(pod)["modules"][&container.id]["image"].clone()
}

/// This machine's platform.
fn here() -> String {
    format!("linux/{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" })
}

#[test]
fn status_tells_of_an_images_kind_where_containerd_can_be_asked_and_does_not_wait_for_it() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-origin"));
    let c = start(&pod, &["/sleep.wasm"]);
    let expected = json!({ "name": wasm::IMAGE, "kind": "rootfs", "platform": "linux/amd64" });
    assert_eq!(came_from(&pod, &c), expected);
    let settings = Settings::open();
    let run = bed().join("run");
    let silent = run.join("silent.sock");
    let _ = std::fs::remove_file(&silent);
    // Connections are taken by the kernel, and nobody speaks.
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let key = |address: &Path| format!("containerd.address = \"{}\"", address.display());
    let ours = key(&run.join("containerd.sock"));
    assert!(settings.text.contains(&ours));
    for address in [run.join("none.sock"), silent.clone(), PathBuf::new()] {
        let text = settings.text.replace(&ours, &key(&address));
        settings.reload_as(&text, "configuration read again");
        // What is known already stays.
        assert_eq!(came_from(&pod, &c), expected, "{address:?}");
        let other = start(&pod, &["/sleep.wasm"]);
        let begun = Instant::now();
        let told = info(&pod)["modules"][&other.id].clone();
        assert!(begun.elapsed() < Duration::from_secs(4), "{address:?}: {:?}", begun.elapsed());
        assert_eq!(told["path"], "/sleep.wasm", "{address:?}");
        assert_eq!(told["image"], Value::Null, "{address:?}");
        other.stop(0).unwrap();
        other.remove().unwrap();
    }
    drop(settings);
    std::fs::remove_file(silent).unwrap();
}

/// Precompiles by the daemon's configuration; answers what that has said.
fn precompile(what: &str) -> String {
    let program = kuasar_tests::programs().join("wasm-sandboxer");
    let config = bed().join("etc/kuasar-wasm.toml");
    tool(&[program.to_str().unwrap(), "--config", config.to_str().unwrap(), "precompile", what])
}

#[test]
fn a_container_of_an_image_that_was_precompiled_waits_for_no_compiler() {
    let Some(_on) = handler() else { return };
    let pod = Pod::run(pod_config("wasm-precompiled"));
    for way in ["by its archive", "by its name", "not at all"] {
        let name = format!("localhost/wasm-precompiled:{}", unique());
        let dir = bed().join(format!("run/wasm-precompiled-{}", unique()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hello.wasm"), wasm::new_one("hello.wasm")).unwrap();
        let archive = dir.join("image.tar");
        wasm::pack(&name, &dir, &archive);
        // What is found by its name is in containerd's content store: nothing is unpacked for it.
        wasm::load(&archive, if way == "by its name" { &["--no-unpack"] } else { &[] });
        let (before, from) = (cached().len(), log().len());
        if way != "not at all" {
            let given = if way == "by its name" { &name } else { archive.to_str().unwrap() };
            let said = precompile(given);
            assert!(said.contains("\"/hello.wasm\" module"), "{way}: {said}");
            assert_eq!(cached().len(), before + 1, "{way}: {said}");
        }
        let c = pod.start_with(&[], |config| {
            config.image = Some(ImageSpec { image: name.clone(), ..Default::default() });
        });
        assert_eq!(c.wait(), 0, "{way}: {}", text(&c, "stderr"));
        assert_eq!(text(&c, "stdout"), "hello from wasm\n", "{way}");
        let logged = log()[from..].to_owned();
        assert_eq!(logged.contains(" compiled"), way == "not at all", "{way}: {logged}");
        // Under the same name: not a second time.
        assert_eq!(cached().len(), before + 1, "{way}");
        c.remove().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        assert!(wasm::ctr(&["images", "rm", &name]).status.success());
    }
}

#[test]
fn what_cannot_be_precompiled_is_explained() {
    let Some(_on) = handler() else { return };
    let program = kuasar_tests::programs().join("wasm-sandboxer");
    let config = bed().join("etc/kuasar-wasm.toml");
    let (program, config) = (program.to_str().unwrap(), config.to_str().unwrap());
    let files = bed().join("run/wasm/files");
    let garbage = files.join("garbage.wasm").display().to_string();
    for (what, words) in [
        ("localhost/no-such-image:1", "not found"),
        ("localhost/no-such-image:1", "images ls"),
        ("localhost/busybox:latest", "no module and no component"),
        (garbage.as_str(), "neither WebAssembly nor the archive of an image"),
    ] {
        let out = inside(&[program, "--config", config, "precompile", what]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(words), "{what}: {said}");
    }
}

#[test]
fn an_image_of_webassemblys_platform_runs_where_its_name_leads_to_a_manifest() {
    let Some(_on) = handler() else { return };
    let dir = bed().join(format!("run/wasm-platform-{}", unique()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hello.wasm"), wasm::new_one("hello.wasm")).unwrap();
    std::fs::write(dir.join("sleep.wasm"), wasm::new_one("sleep.wasm")).unwrap();
    let archive = dir.join("image.tar");
    let pod = Pod::run(pod_config("wasm-platform"));
    for (os, index) in [("wasi", false), ("wasip1", false), ("wasip1", true)] {
        let name = format!("localhost/wasm-platform:{}", unique());
        let mut variables = vec![("OS", os), ("ARCH", "wasm")];
        variables.extend(index.then_some(("INDEX", "1")));
        wasm::pack_as(&name, &dir, &archive, &variables);
        wasm::load(&archive, &["--local", "--platform", &format!("{os}/wasm")]);
        let image = Some(ImageSpec { image: name.clone(), ..Default::default() });
        // Either is an image to precompile.
        let said = precompile(&name);
        assert!(said.contains("\"/hello.wasm\" module"), "{said}");
        if index {
            let refused = pod.create_with(&[], |config| config.image = image.clone());
            let error = refused.err().expect("containerd takes it by now").to_string();
            assert!(error.contains("not found"), "{error}");
        } else {
            // Status tells of what runs: containerd has the rest deleted.
            let c = pod.start_with(&["/sleep.wasm"], |config| config.image = image.clone());
            let platform = format!("{os}/wasm");
            let expected = json!({ "name": name, "kind": "wasi/wasm", "platform": platform });
            assert_eq!(came_from(&pod, &c), expected);
            c.stop(0).unwrap();
            c.remove().unwrap();
            let c = pod.start_with(&[], |config| config.image = image.clone());
            assert_eq!(c.wait(), 0, "{os}: {}", text(&c, "stderr"));
            assert_eq!(text(&c, "stdout"), "hello from wasm\n", "{os}");
            c.remove().unwrap();
        }
        assert!(wasm::ctr(&["images", "rm", &name]).status.success());
    }
    std::fs::remove_dir_all(dir).unwrap();
}
