//! Checkpoint and restore by a real CRIU, through runc.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kuasar_protos::runc_options::CheckpointOptions;
use kuasar_protos::shim::api as tasks;
use kuasar_tests::cri::*;
use kuasar_tests::wire::{self, Bundle, Direct};
use kuasar_tests::{bed, cri, handler, leaks, ours, skip, task, wait_for};
use tonic::Code;

pub(crate) const COUNT: &str = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done";

/// Whether there is a criu that works here.
fn has_criu() -> bool {
    let is = bed().join("bin/criu").is_file();
    if !is {
        skip("criu does not run here");
    }
    is
}

/// A directory for an image, as containerd makes one; removed when dropped.
pub(crate) struct Image(pub(crate) PathBuf);

impl Image {
    pub(crate) fn new() -> Self {
        let dir = bed().join(format!("run/logs/image-{}", unique()));
        std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&dir).unwrap();
        Self(dir)
    }

    pub(crate) fn text(&self) -> String {
        self.0.to_string_lossy().into_owned()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A FIFO as containerd makes one, and a reader of its lines.
pub(crate) fn fifo(dir: &Path) -> (String, BufReader<std::fs::File>) {
    let path = dir.join(format!("fifo-{}", unique()));
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut how = std::fs::OpenOptions::new();
    // Without a writer there is an end at once: ours stays until the container has its own.
    let reader = how.read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path).unwrap();
    (path.to_string_lossy().into_owned(), BufReader::new(reader))
}

pub(crate) fn number(lines: &mut impl BufRead) -> u32 {
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    line.trim().parse().unwrap_or_else(|_| panic!("{line:?}"))
}

/// What has been written and not read; there must be a writer of ours, so that reads would wait.
pub(crate) fn rest(lines: &mut BufReader<std::fs::File>) -> Vec<u32> {
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(lines.get_ref(), nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    let mut text = lines.buffer().to_vec();
    let _ = lines.get_mut().read_to_end(&mut text); // until it would block
    String::from_utf8(text).unwrap().lines().map(|line| line.parse().unwrap()).collect()
}

fn checkpoint(
    pod: &Direct,
    id: &str,
    image: &Image,
    options: CheckpointOptions,
) -> Result<(), tonic::Status> {
    let q = wire::checkpoint_request(id, &image.text(), &options);
    task!(&pod.socket, checkpoint, q).map(drop)
}

fn start(pod: &Direct, id: &str) -> Result<u32, tonic::Status> {
    let q = tasks::StartRequest { id: id.into(), ..Default::default() };
    task!(&pod.socket, start, q).map(|a| a.pid)
}

fn wait(pod: &Direct, id: &str) -> u32 {
    let q = tasks::WaitRequest { id: id.into(), ..Default::default() };
    task!(&pod.socket, wait, q).unwrap().exit_status
}

fn delete(pod: &Direct, id: &str) {
    let q = tasks::DeleteRequest { id: id.into(), ..Default::default() };
    task!(&pod.socket, delete, q).unwrap();
}

fn status(pod: &Direct, id: &str) -> String {
    let q = tasks::StateRequest { id: id.into(), ..Default::default() };
    format!("{:?}", task!(&pod.socket, state, q).unwrap().status)
}

/// Checkpoints a counter and ends it, lets it go on as another container (after `between`), and
/// sees that it counts on into the new one's output, and how that ends.
fn there_and_back(between: impl FnOnce(&Direct)) {
    if !ours() || !has_criu() {
        return;
    }
    let before = leaks::snapshot();
    {
        let pod = Direct::run_on("checkpoint", "runc");
        let (image, bundle) = (Image::new(), Bundle::new(&["sh", "-c", COUNT]));
        let (stdout, mut lines) = fifo(&bundle.dir);
        let first = tasks::CreateTaskRequest { stdout, ..bundle.request("first") };
        task!(&pod.socket, create, first).unwrap();
        start(&pod, "first").unwrap();
        for n in 1..=3 {
            assert_eq!(number(&mut lines), n);
        }
        let options = CheckpointOptions { exit: true, ..Default::default() };
        checkpoint(&pod, "first", &image, options).unwrap();
        assert_eq!(wait(&pod, "first"), 137);
        let last = *rest(&mut lines).last().unwrap_or(&3);
        delete(&pod, "first");

        let (stdout, mut lines) = fifo(&bundle.dir);
        let second = tasks::CreateTaskRequest {
            stdout,
            checkpoint: image.text(),
            ..bundle.request("second")
        };
        task!(&pod.socket, create, second).unwrap();
        assert!(status(&pod, "second").contains("CREATED"));
        between(&pod);
        let pid = start(&pod, "second").unwrap();
        assert!(pid > 0);
        assert!(status(&pod, "second").contains("RUNNING"));
        for n in 1..=5 {
            assert_eq!(number(&mut lines), last + n);
        }
        let q = tasks::KillRequest { id: "second".into(), signal: 9, ..Default::default() };
        task!(&pod.socket, kill, q).unwrap();
        assert_eq!(wait(&pod, "second"), 137);
        delete(&pod, "second");
    }
    leaks::assert_none(&before);
}

#[test]
fn a_container_goes_on_from_its_checkpoint() {
    there_and_back(|_| {});
}

#[test]
fn a_restore_survives_a_kill_of_the_daemon_before_start() {
    there_and_back(|pod| {
        kuasar_tests::switch(&["daemon", "kill"], &[]);
        kuasar_tests::switch(&["daemon", "start"], &[]);
        wait_for("it is known again", Duration::from_secs(10), || {
            let q = tasks::StateRequest { id: "second".into(), ..Default::default() };
            task!(&pod.socket, state, q).is_ok()
        });
    });
}

#[test]
fn a_checkpoint_leaves_a_container_running_unless_asked() {
    if !ours() || !has_criu() {
        return;
    }
    let pod = Direct::run_on("checkpoint", "runc");
    let (image, bundle) = (Image::new(), Bundle::new(&["sh", "-c", COUNT]));
    let (stdout, mut lines) = fifo(&bundle.dir);
    let q = tasks::CreateTaskRequest { stdout, ..bundle.request("c") };
    task!(&pod.socket, create, q).unwrap();
    let created = checkpoint(&pod, "c", &image, CheckpointOptions::new()).unwrap_err();
    assert_eq!(created.code(), Code::FailedPrecondition, "{created}");
    start(&pod, "c").unwrap();
    assert_eq!(number(&mut lines), 1);
    checkpoint(&pod, "c", &image, CheckpointOptions::new()).unwrap();
    assert!(image.0.join("inventory.img").is_file());
    for n in 2..=20 {
        assert_eq!(number(&mut lines), n); // None is lost, and it goes on.
    }
}

#[test]
fn a_hostile_checkpoint_is_refused_and_leaves_nothing() {
    if !ours() || !has_criu() {
        return;
    }
    let before = leaks::snapshot();
    {
        let pod = Direct::run_on("checkpoint", "runc");
        let bundle = Bundle::new(&["true"]);
        let link = Image::new();
        std::os::unix::fs::symlink("/etc/shadow", link.0.join("pages-1.img")).unwrap();
        let lines = Image::new();
        let notes = r#"{"streams":[null,"file[1:2]\naction-script /bin/sh",null]}"#;
        std::fs::write(lines.0.join("kuasar.json"), notes).unwrap();
        for image in [&link, &lines] {
            let q = tasks::CreateTaskRequest { checkpoint: image.text(), ..bundle.request("c") };
            let refused = task!(&pod.socket, create, q).unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        }
        // Nothing that CRIU can use: Start fails, and the container can be deleted.
        let empty = Image::new();
        let q = tasks::CreateTaskRequest { checkpoint: empty.text(), ..bundle.request("c") };
        task!(&pod.socket, create, q).unwrap();
        let refused = start(&pod, "c").unwrap_err();
        assert!(refused.message().contains("restore failed"), "{refused}");
        assert_eq!(wait(&pod, "c"), 255);
        delete(&pod, "c");
        // Created, and never started.
        let q = tasks::CreateTaskRequest { checkpoint: empty.text(), ..bundle.request("d") };
        task!(&pod.socket, create, q).unwrap();
        delete(&pod, "d");
        let q = tasks::CreateTaskRequest { checkpoint: empty.text(), ..bundle.request("e") };
        task!(&pod.socket, create, q).unwrap(); // The pod's end is its end.
    }
    leaks::assert_none(&before);
}

#[test]
fn the_built_in_engine_says_that_it_cannot() {
    if !ours() {
        return;
    }
    let pod = Direct::run_on("checkpoint", "builtin");
    let (image, bundle) = (Image::new(), Bundle::new(&["sleep", "100"]));
    let q = tasks::CreateTaskRequest { checkpoint: image.text(), ..bundle.request("c") };
    let refused = task!(&pod.socket, create, q).unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
    task!(&pod.socket, create, bundle.request("c")).unwrap();
    start(&pod, "c").unwrap();
    let refused = checkpoint(&pod, "c", &image, CheckpointOptions::new()).unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
}

/// As kubelet does it. (containerd 2.1 does not tell a sandboxer's task address when it restores, so
/// that the way back by CRI ends in containerd.)
#[test]
fn kubernetes_checkpoints_a_container_that_goes_on() {
    if !matches!(handler().as_str(), "kuasar-runc" | "kuasar-runc-v2") || !has_criu() {
        return skip("checkpoints by CRI are a matter of kuasar-runc-v2");
    }
    let mut config = pod_config("checkpoint");
    config.annotations = annotations(&[("io.kuasar.runc.engine", "runc")]);
    let pod = Pod::try_run(config, "kuasar-runc-v2").unwrap();
    let c = pod.start(&["sh", "-c", COUNT]);
    wait_for("it counts", Duration::from_secs(20), || c.logged("stdout").len() > 8);
    let image = Image::new();
    let location = image.0.join("checkpoint.tar").to_string_lossy().into_owned();
    let q = CheckpointContainerRequest {
        container_id: c.id.clone(),
        location: location.clone(),
        timeout: 60,
    };
    cri!(checkpoint_container, q).unwrap();
    let listed = std::process::Command::new("tar").args(["-tf", &location]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for name in ["checkpoint/inventory.img", "checkpoint/kuasar.json", "spec.dump", "dump.log"] {
        assert!(listed.lines().any(|line| line == name), "{name}: {listed}");
    }
    let counted = c.logged("stdout").len();
    wait_for("it counts on", Duration::from_secs(20), || c.logged("stdout").len() > counted + 8);
    let numbers = String::from_utf8(c.logged("stdout")).unwrap();
    let numbers: Vec<u32> = numbers.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.iter().zip(1..).all(|(a, b)| *a == b), "{numbers:?}");
    c.stop(0).unwrap();
    assert_eq!(c.wait(), 137);
    pod.remove().unwrap();
}
