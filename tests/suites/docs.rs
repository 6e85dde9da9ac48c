//! What the documentation has people type or paste: every block of README.md and docs/ is taken out and
//! run, where it can run here, or held against what reads it. A command that nothing here can run is
//! counted as skipped, with its program.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use kuasar_tests::cri::*;
use kuasar_tests::{bed, inside, leaks, on, ours, programs, skip, top, wasm};

struct Block {
    at: String,
    language: String,
    text: String,
}

/// The fenced blocks of all pages.
fn blocks() -> Vec<Block> {
    let mut pages = vec![top().join("README.md"), top().join("CONTRIBUTING.md")];
    let all = std::fs::read_dir(top().join("docs")).unwrap();
    pages.extend(all.map(|e| e.unwrap().path()).filter(|p| p.extension() == Some("md".as_ref())));
    let mut blocks = Vec::new();
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        let mut open: Option<Block> = None;
        for (number, line) in text.lines().enumerate() {
            match (&mut open, line.strip_prefix("```")) {
                (None, Some(language)) => {
                    let at = page.strip_prefix(top()).unwrap().display();
                    let (at, language) = (format!("{at}:{}", number + 1), language.to_owned());
                    open = Some(Block { at, language, text: String::new() });
                }
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(block), None) => block.text += &format!("{line}\n"),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: a block has no end", page.display());
    }
    blocks
}

fn of(language: &str) -> Vec<Block> {
    let found: Vec<_> = blocks().into_iter().filter(|b| b.language == language).collect();
    assert!(
        !found.is_empty(),
        "no {language} in the documentation: this test looks in the wrong place"
    );
    found
}

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let dir = bed().join(format!("run/logs/docs-{}", unique()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn names_of(text: &str, table: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|l| l.trim().strip_prefix(&format!("[{table}")));
    lines.map(|l| l.trim_end_matches(']').trim_matches(['\'', '"']).to_owned()).collect()
}

#[test]
fn docs_containerd_reads_what_is_pasted_into_its_configuration() {
    let scratch = Scratch::new();
    let file = scratch.0.join("config.toml");
    let containerd = bed().join("root/usr/bin/containerd").display().to_string();
    let pasted = |b: &Block| b.text.contains("[proxy_plugins") || b.text.contains(".runtimes.");
    for block in of("toml").into_iter().filter(pasted) {
        std::fs::write(&file, format!("version = 3\n{}", block.text)).unwrap();
        let said = inside(&[&containerd, "--config", file.to_str().unwrap(), "config", "dump"]);
        let read = String::from_utf8_lossy(&said.stdout).replace('"', "'");
        assert!(said.status.success(), "{}: {}", block.at, String::from_utf8_lossy(&said.stderr));
        // What is misspelt is left out of what containerd has understood.
        let values = block.text.lines().filter_map(|l| l.split('#').next()?.split_once('='));
        for (key, value) in values {
            let (key, value) = (key.trim(), value.trim().replace('"', "'"));
            let wanted = format!("{key} = {value}");
            assert!(read.contains(&wanted), "{}: containerd does not know: {wanted}", block.at);
        }
        for plugin in names_of(&block.text, "proxy_plugins.") {
            assert!(read.contains(&plugin), "{}: {plugin}", block.at);
        }
    }
}

#[test]
fn docs_daemons_take_the_drop_ins() {
    let scratch = Scratch::new();
    let pasted = |b: &Block| !b.text.contains("[proxy_plugins") && !b.text.contains(".runtimes.");
    for block in of("toml").into_iter().filter(pasted) {
        let named = block.text.lines().next().unwrap_or_default();
        let path = named.strip_prefix("# /etc/kuasar/");
        let path =
            path.unwrap_or_else(|| panic!("{}: the first line has to name the file", block.at));
        let path = path.split_whitespace().next().unwrap().trim_end_matches(':');
        if path == "shim.toml" {
            assert!(block.text.contains("[sockets]"), "{}", block.at);
            continue;
        }
        let (main, drop_in) = path.split_once(".d/").unwrap_or((path, "only.toml"));
        let main = main.trim_end_matches(".toml");
        let file = scratch.0.join(format!("{main}.toml"));
        std::fs::copy(top().join(format!("packaging/{main}.toml")), &file).unwrap();
        let dir = scratch.0.join(format!("{main}.toml.d"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(drop_in), &block.text).unwrap();
        let program = programs().join(main);
        let mut check = Command::new(program);
        let said = check.arg("--config").arg(&file).arg("--check-config").output().unwrap();
        assert!(said.status.success(), "{}: {}", block.at, String::from_utf8_lossy(&said.stderr));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn docs_units_json_and_runtime_classes_are_what_they_are_said_to_be() {
    for block in of("json") {
        let read = serde_json::from_str::<serde_json::Value>(&block.text);
        assert!(read.is_ok(), "{}: {read:?}", block.at);
    }
    // A handler has to be one that a page adds to containerd.
    let handlers: BTreeSet<String> = of("toml")
        .iter()
        .flat_map(|b| {
            names_of(&b.text, "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.")
        })
        .collect();
    for block in of("yaml") {
        if block.text.starts_with("scrape_configs:") {
            continue; // Prometheus' own.
        }
        let value = |key: &str| block.text.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
        assert_eq!(value("apiVersion:"), Some("node.k8s.io/v1"), "{}", block.at);
        assert_eq!(value("kind:"), Some("RuntimeClass"), "{}", block.at);
        let handler = value("handler:").unwrap_or_default();
        assert!(handlers.contains(handler), "{}: no page adds the handler {handler}", block.at);
    }
    for block in of("ini") {
        if block.text.starts_with("# /etc/systemd/system/") {
            continue; // A drop-in is the operator's own.
        }
        let unit =
            std::fs::read_to_string(top().join("packaging/systemd/kuasar-runc.service")).unwrap();
        let comment = |l: &&str| !l.is_empty() && !l.starts_with('#');
        for line in block.text.lines().filter(comment) {
            // The unit may say more: other engines, for one.
            let there = unit.lines().any(|l| l == line || l.starts_with(&format!("{line} ")));
            assert!(there, "{}: not in the unit: {line}", block.at);
        }
    }
}

/// The commands of a block: without comments, continued lines as one, `&&` taken apart.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().filter_map(|l| l.split(" #").next()).filter(|l| !l.starts_with('#'));
    let parts = lines
        .flat_map(|l| l.split("&&"))
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
    parts.filter(|l| !l.is_empty()).collect()
}

/// What the operator's commands are run with: the daemons of the bed instead of those of a node.
fn bench(scratch: &Scratch, kinds: &[&str], line: &str) -> std::process::Output {
    let ctl = programs().join("kuasar-ctl").display().to_string();
    let state = scratch.0.join("ctl").display().to_string();
    let sockets = kinds.iter().map(|k| format!(" -a {k}={}/run/kuasar-{k}.sock", bed().display()));
    let script = format!(
        "cd {dir} && export PATH={programs}:$PATH && kuasar-ctl() {{ {ctl} --state-dir {state}{sockets} \"$@\"; }}\n{line}",
        dir = scratch.0.display(),
        programs = programs().display(),
        sockets = sockets.collect::<String>(),
    );
    inside(&["bash", "-c", &script])
}

fn runs(scratch: &Scratch, kinds: &[&str], line: &str, at: &str, good: &[i32]) {
    let said = bench(scratch, kinds, line);
    let code = said.status.code().unwrap_or(-1);
    let (out, err) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(good.contains(&code), "{at}: {line}: exit code {code}\n{out}{err}");
}

/// Which commands are run, which are held against what they name, and which are left.
#[test]
fn docs_commands_can_be_typed() {
    if !ours() {
        return;
    }
    let before = leaks::snapshot();
    let scratch = Scratch::new();
    let dir = &scratch.0;
    prepare(dir);
    let pod = Pod::run(pod_config("web"));
    pod.start(&["sleep", "1000"]);
    let metrics = bed().join("run/kuasar-runc-metrics.sock").display().to_string();
    let (mut left, mut of_wasm) = (BTreeSet::new(), Vec::new());
    for block in of("sh") {
        for line in commands(&block.text) {
            let words: Vec<&str> =
                line.split_whitespace().skip_while(|w| w.contains('=')).collect();
            let Some(program) = words.first().copied() else { continue };
            match program {
                "make" => {
                    let mut make = Command::new("make");
                    make.arg("-n").args(&words[1..]).current_dir(top());
                    let said = make.output().unwrap();
                    assert!(said.status.success(), "{}: {line}: no such target", block.at);
                }
                "kuasar-ctl" if words.contains(&"wasm") => {
                    of_wasm.push((block.at.clone(), line.clone()))
                }
                // 5 says that something of this host is bad, which is no fault of the command.
                "kuasar-ctl" if words.get(1) == Some(&"check") => {
                    runs(&scratch, &["runc"], &line, &block.at, &[0, 5]);
                }
                // A pod that is no machine refuses it, by a code of its own.
                "kuasar-ctl" if words.get(1) == Some(&"debug") => {
                    runs(&scratch, &["runc"], &line, &block.at, &[1]);
                }
                // There is no terminal here.
                "kuasar-ctl" => {
                    runs(&scratch, &["runc"], &line.replace("-it", "-i"), &block.at, &[0])
                }
                "curl" => {
                    if inside(&["sh", "-c", "command -v curl"]).status.success() {
                        let line = line.replace("/run/kuasar-runc/metrics.sock", &metrics);
                        // What systemd would start at the first request.
                        let node = format!(
                            "{}/kuasar-ctl -a runc={}/run/kuasar-runc.sock metrics \
                             --listen 127.0.0.1:9755 2>/dev/null & trap \"kill $!; wait\" EXIT",
                            programs().display(),
                            bed().display()
                        );
                        let line = format!("{node}\n{line} --retry 20 --retry-connrefused");
                        runs(&scratch, &[], &line, &block.at, &[0]);
                    } else {
                        left.insert("curl".to_owned());
                    }
                }
                _ if words.contains(&"--check-config") => {
                    let line = line.replace("/etc/kuasar", &dir.join("etc").display().to_string());
                    runs(&scratch, &[], &line, &block.at, &[0]);
                }
                _ if words.contains(&"precompile") => {
                    of_wasm.push((block.at.clone(), line.clone()))
                }
                _ if program.contains('/') && !program.starts_with('.') => {
                    assert!(top().join(program).is_file(), "{}: no file {program}", block.at);
                }
                "cargo" if words.get(1) == Some(&"build") => {
                    let packages = words.windows(2).filter(|w| w[0] == "-p").map(|w| w[1]);
                    for package in packages {
                        let mut cargo = Command::new("cargo");
                        cargo.args(["pkgid", "--offline", package]).current_dir(top());
                        let said = cargo.output().unwrap();
                        assert!(said.status.success(), "{}: no package {package}", block.at);
                    }
                }
                "cargo" => {
                    let at =
                        words.iter().position(|w| *w == "--test").and_then(|i| words.get(i + 1));
                    let name = format!("{}.rs", at.expect("a test is named"));
                    assert!(exists_below(&top(), &name, 5), "{}: no test {name}", block.at);
                }
                other => {
                    left.insert(other.to_owned());
                }
            }
        }
    }
    pod.remove().unwrap();
    if let Some(_chosen) = on("kuasar-wasm") {
        assert!(!of_wasm.is_empty());
        wasm::import();
        std::fs::copy(bed().join("run/wasm/image.tar"), scratch.0.join("image.tar")).unwrap();
        let config = bed().join("etc/kuasar-wasm.toml").display().to_string();
        for (at, line) in &of_wasm {
            let line = line.replace("/etc/kuasar/wasm-sandboxer.toml", &config);
            let line = line.replace("registry.example/app:1", wasm::IMAGE);
            runs(&scratch, &["wasm"], &line, at, &[0]);
        }
    }
    drop(scratch);
    leaks::assert_none(&before);
    let left: Vec<String> = left.into_iter().collect();
    skip(&format!(
        "commands of the documentation that would change this host or need a cluster: {}",
        left.join(", ")
    ));
}

/// The files that the commands name.
fn prepare(dir: &Path) {
    let all = wasm::programs();
    for name in ["hello.wasm", "app.wasm", "other.wasm"] {
        std::fs::write(dir.join(name), &all["hello.wasm"]).unwrap();
    }
    let rootfs = dir.join("rootfs");
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(rootfs.join(name)).unwrap();
    }
    std::fs::copy(bed().join("src/busybox"), rootfs.join("bin/sh")).unwrap();
    // An archive with a name that the command gives, and the same as a directory.
    let archive = bed().join("images/base.tar");
    std::fs::create_dir_all(dir.join("layout")).unwrap();
    let unpack =
        ["tar", "-xf", archive.to_str().unwrap(), "-C", dir.join("layout").to_str().unwrap()]
            .map(str::to_owned);
    assert!(Command::new(&unpack[0]).args(&unpack[1..]).status().unwrap().success());
    let index = dir.join("layout/index.json");
    let mut named: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&index).unwrap()).unwrap();
    let one = &mut named["manifests"][0];
    one["annotations"]["org.opencontainers.image.ref.name"] = "localhost/app:1".into();
    one["annotations"]["io.containerd.image.name"] = "localhost/app:1".into();
    named["manifests"] = serde_json::json!([one.clone()]);
    std::fs::write(&index, named.to_string()).unwrap();
    let pack = Command::new("tar")
        .current_dir(dir.join("layout"))
        .args(["-cf", "../app.tar", "."])
        .status();
    assert!(pack.unwrap().success());
    std::fs::create_dir_all(dir.join("etc")).unwrap();
    for entry in std::fs::read_dir(top().join("packaging")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension() == Some("toml".as_ref()) {
            std::fs::copy(&path, dir.join("etc").join(path.file_name().unwrap())).unwrap();
        }
    }
}

fn exists_below(dir: &Path, name: &str, depth: usize) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.filter_map(Result::ok).any(|e| {
        let path = e.path();
        let skipped = path.ends_with("target") || path.ends_with(".git");
        e.file_name() == name
            || (depth > 0 && !skipped && path.is_dir() && exists_below(&path, name, depth - 1))
    })
}
