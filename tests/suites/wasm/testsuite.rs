//! The public programs of WASI's test suite, as containers, where `KUASAR_WASI_TESTSUITE` names a
//! directory with its `tests` (a checkout of WebAssembly/wasi-testsuite, branch `prod/testsuite-all`).
//!
//! A program is `NAME.wasm`; `NAME.json` beside it says what it is given, and what it is to do. The
//! directory that it wants is a volume, and its working directory: that is what a container has as a
//! preopened directory beside its root. Programs of WASI 0.3 are left: the suite's are of a release
//! candidate, whose interfaces are not those of 0.3.0.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use kuasar_tests::cri::*;
use serde_json::Value;

use super::*;

/// Where the suite is.
const VARIABLE: &str = "KUASAR_WASI_TESTSUITE";
const IMAGE_NAME: &str = "localhost/wasi-testsuite:latest";

/// What of the suite's is different here, and why: ends of the programs' names. All engines.
const CONTAINERS: &[(&str, &str)] = &[
    ("/environ_get-multiple-variables", ENVIRONMENT),
    ("/environ_sizes_get-multiple-variables", ENVIRONMENT),
    ("/environ_sizes_get-no-variables", ENVIRONMENT),
    ("/sock_shutdown-invalid_fd", "the third descriptor is a container's root, and not free"),
];
const ENVIRONMENT: &str = "a container has PATH and HOSTNAME in its environment";

/// The same with Wasmtime.
const WASMTIME: &[(&str, &str)] = &[(
    "/remove_directory_trailing_slashes",
    "Wasmtime removes no directory whose name has a slash at its end",
)];

/// The same with WasmEdge.
const WASMEDGE: &[(&str, &str)] = &[];

/// A program of the suite.
struct Program {
    /// Where it is in the suite, without its ending.
    name: String,
    /// What it is called in the image.
    file: String,
    path: PathBuf,
    /// What is said of it.
    spec: Value,
}

/// All below a directory, but for those that programs are given.
fn find(dir: &Path, top: &Path, all: &mut Vec<Program>) {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    for path in entries {
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !name.ends_with(".dir") {
            find(&path, top, all);
        } else if name.ends_with(".wasm") {
            let short = path.strip_prefix(top).unwrap().with_extension("");
            let name = short.to_str().unwrap().replace("testsuite/", "");
            let spec = std::fs::read(path.with_extension("json"));
            let spec = spec.map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap());
            all.push(Program {
                file: format!("{}.wasm", name.replace('/', "-")),
                name,
                path,
                spec,
            });
        }
    }
}

fn suite() -> Option<Vec<Program>> {
    let Some(dir) = std::env::var_os(VARIABLE) else {
        skip(&format!("{VARIABLE} is not set"));
        return None;
    };
    let top = PathBuf::from(dir).join("tests");
    let mut all = Vec::new();
    find(&top, &top, &mut all);
    assert!(!all.is_empty(), "{}: no programs", top.display());
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let files = bed().join(format!("run/wasi-testsuite-{}", unique()));
    std::fs::create_dir_all(&files).unwrap();
    for program in &all {
        std::fs::copy(&program.path, files.join(&program.file)).unwrap();
    }
    let archive = files.with_extension("tar");
    wasm::pack(IMAGE_NAME, &files, &archive);
    wasm::load(&archive, &[]);
    std::fs::remove_dir_all(files).unwrap();
    std::fs::remove_file(archive).unwrap();
    Some(all)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn strings(value: &Value) -> Vec<String> {
    let all = value.as_array().into_iter().flatten();
    all.map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// Runs a program; answers what is not as the suite wants it.
fn run(pod: &Pod, program: &Program) -> Result<(), String> {
    let spec = &program.spec;
    let mut words = vec![format!("/{}", program.file)];
    let dirs = strings(&spec["dirs"]);
    let args = strings(&spec["args"]);
    // It may be told how the directory is called, or know it.
    let told = dirs.iter().any(|dir| args.contains(dir));
    words.extend(args.into_iter().map(|arg| if dirs.contains(&arg) { ".".into() } else { arg }));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let volume = bed().join(format!("run/wasi-volume-{}", unique()));
    let container = pod.create_with(&words, |config| {
        // Some wait for it: open, and nobody writes.
        config.stdin = true;
        config.image = Some(ImageSpec { image: IMAGE_NAME.into(), ..Default::default() });
        for (key, value) in spec["env"].as_object().into_iter().flatten() {
            let value = value.as_str().unwrap().into();
            config.envs.push(KeyValue { key: key.clone(), value });
        }
        for dir in &dirs {
            copy(&program.path.with_file_name(dir), &volume.join(dir));
            config.mounts.push(Mount {
                host_path: volume.join(dir).to_str().unwrap().into(),
                container_path: format!("/{dir}"),
                ..Default::default()
            });
            if told {
                config.working_dir = format!("/{dir}");
            }
        }
    });
    let container = container.map_err(|error| error.message().to_owned())?;
    let ended = container.start().map_err(|error| error.message().to_owned());
    let ended = ended.and_then(|()| outcome(&container, spec));
    let _ = container.stop(0);
    container.remove().unwrap();
    let _ = std::fs::remove_dir_all(volume);
    ended
}

fn outcome(container: &Container, spec: &Value) -> Result<(), String> {
    let begun = std::time::Instant::now();
    while container.is_running() {
        if begun.elapsed() > SOON {
            return Err("it does not end".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let (code, wanted) = (container.status().exit_code, spec["exit_code"].as_i64().unwrap_or(0));
    if i64::from(code) != wanted {
        return Err(format!("exit status {code}, wanted {wanted}: {}", text(container, "stderr")));
    }
    for stream in ["stdout", "stderr"] {
        let (said, begins) = (text(container, stream), spec[stream].as_str().unwrap_or_default());
        if !said.starts_with(begins) {
            return Err(format!("{stream}: {said:?}, wanted {begins:?}"));
        }
    }
    Ok(())
}

/// Runs all that `wanted` takes; what differs is what is listed, and nothing else is.
fn hold(engine: &str, all: &[Program], wanted: impl Fn(&str) -> bool, lists: &[&[(&str, &str)]]) {
    let listed = |name: &str| {
        let mut all = lists.iter().copied().flatten();
        all.find(|(end, _)| name.ends_with(end)).map(|(_, reason)| *reason)
    };
    let pod = Pod::run(pod_config("wasi-testsuite"));
    let (mut good, mut report, mut counts) = (0, String::new(), BTreeMap::<String, usize>::new());
    for program in all.iter().filter(|program| wanted(&program.name)) {
        let name = &program.name;
        match (run(&pod, program), listed(name)) {
            (Ok(()), None) => good += 1,
            (Err(_), Some(reason)) => *counts.entry(reason.to_owned()).or_default() += 1,
            (Err(error), None) => writeln!(report, "{name}: {error}").unwrap(),
            (Ok(()), Some(_)) => writeln!(report, "{name}: is as the suite wants it").unwrap(),
        }
    }
    println!("{engine}: {good} as the suite wants it");
    for (reason, count) in counts {
        println!("{engine}: {count} {reason}");
    }
    assert!(report.is_empty(), "{engine}:\n{report}");
}

#[test]
fn programs_of_the_public_wasi_testsuite_do_what_it_says_on_wasmtime() {
    let Some(_on) = handler() else { return };
    let Some(all) = suite() else { return };
    hold("wasmtime", &all, |name| !name.contains("wasip3"), &[CONTAINERS, WASMTIME]);
}

#[test]
fn programs_of_the_public_wasi_testsuite_do_what_it_says_on_wasmedge() {
    let Some(_on) = edge() else { return };
    let Some(all) = suite() else { return };
    // It has no threads.
    let wanted = |name: &str| !name.contains("wasip3") && !name.contains("threads");
    hold("wasmedge", &all, wanted, &[CONTAINERS, WASMEDGE]);
}
