//! Programs in the jail, seen from outside: what `/proc` says of each holds what is promised.

#![allow(clippy::unwrap_used, clippy::panic)] // a test

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sandboxer::jail::{JailConfig, Role, View};
use vmm_sandboxer::vmm::process::{Fds, Launcher, Local, Process, Program};
use vmm_sandboxer::vmm::{Error, Result};

const UID: u32 = 65_530;

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: not root");
    }
    root
}

fn config() -> JailConfig {
    JailConfig {
        jailer: vec![env!("CARGO_BIN_EXE_vmm-sandboxer").into(), "jail".into()],
        files: 128,
        oom_score_adj: 123,
        ..JailConfig::default()
    }
}

fn launcher(config: JailConfig) -> Launcher {
    Launcher::new(Arc::new(Local::new().unwrap()), Some(config))
}

async fn run(
    launcher: &Launcher,
    argv: &[&str],
    view: View,
    fds: &Fds,
    cgroups: &[PathBuf],
    netns: Option<&OwnedFd>,
) -> Result<Process> {
    use std::os::fd::AsFd;
    let program = Program {
        name: "test".into(),
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        stdout: None,
        fds,
        view,
        netns: netns.map(AsFd::as_fd),
        cgroups,
    };
    launcher.run(program).await
}

fn of(process: &Process, what: &str) -> PathBuf {
    format!("/proc/{}/{what}", process.pid()).into()
}

fn read(process: &Process, what: &str) -> String {
    fs::read_to_string(of(process, what)).unwrap()
}

/// The value of a line of `status` or `limits`.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn namespace(of: &Path, name: &str) -> u64 {
    fs::metadata(of.join("ns").join(name)).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_program_has_nothing_that_it_was_not_given() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("kernel");
    fs::write(&data, "kernel").unwrap();
    // Open in this process and not for the program.
    let _secret = fs::File::open("/etc/passwd").unwrap();
    let mut fds = Fds::default();
    let given = fds.push_file(Arc::new(fs::File::open(&data).unwrap()));
    let mut view = View::new(Role::Vmm);
    view.readable.push(data.clone());
    let launcher = launcher(config());
    let jailed = run(&launcher, &["/bin/sleep", "1000"], view, &fds, &[], None).await.unwrap();

    let status = read(&jailed, "status");
    assert_eq!(field(&status, "Uid:"), format!("{UID} {UID} {UID} {UID}"));
    assert_eq!(field(&status, "Gid:"), format!("{UID} {UID} {UID} {UID}"));
    assert_eq!(field(&status, "Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs:"), "1");
    assert_eq!(field(&status, "Seccomp:"), "2");
    // Its number outside and inside: it is the first of its namespace.
    assert_eq!(field(&status, "NSpid:"), format!("{} 1", jailed.pid()));

    let proc = of(&jailed, "");
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(&proc, name), namespace(Path::new("/proc/self"), name), "{name}");
    }
    let links = read(&jailed, "net/dev");
    assert_eq!(links.lines().filter(|line| line.contains(':')).count(), 1, "only lo:\n{links}");

    let limits = read(&jailed, "limits");
    assert!(field(&limits, "Max open files").starts_with("128 128"));
    assert!(field(&limits, "Max core file size").starts_with("0 0"));
    assert_eq!(read(&jailed, "oom_score_adj").trim(), "123");

    let open = || {
        let mut open: Vec<String> = fs::read_dir(of(&jailed, "fd"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        open.sort();
        open
    };
    // The loader opens the program's libraries, one at a time, before there is nothing else.
    let deadline = Instant::now() + Duration::from_secs(10);
    while open() != ["0", "1", "2", &given.to_string()] {
        assert!(Instant::now() < deadline, "{:?}", open());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let inside = of(&jailed, "root");
    let mut top: Vec<String> = fs::read_dir(&inside)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    top.sort();
    for entry in &top {
        assert!(
            ["bin", "dev", "etc", "lib", "lib64", "proc", "tmp", "usr"].contains(&entry.as_str()),
            "{entry}"
        );
    }
    assert!(!inside.join("etc/passwd").exists());
    assert_eq!(fs::read_to_string(inside.join(data.strip_prefix("/").unwrap())).unwrap(), "kernel");
    for mount in read(&jailed, "mountinfo").lines() {
        let (point, options) = {
            let mut words = mount.split_whitespace().skip(4);
            (words.next().unwrap(), words.next().unwrap())
        };
        assert!(options.split(',').any(|o| o == "nosuid"), "{mount}");
        assert!(point == "/proc" || options.split(',').any(|o| o == "ro"), "{mount}");
        assert!(!mount.contains("shared:") && !mount.contains("master:"), "{mount}");
    }
    let mut devices: Vec<String> = fs::read_dir(inside.join("dev"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    devices.sort();
    assert_eq!(devices, ["null", "urandom", "zero"]);

    let exit = jailed.kill().await.unwrap();
    assert_eq!((exit.status, exit.signal), (137, Some(9)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_runs_in_the_pods_network_and_in_its_cgroups() {
    if !root() {
        return;
    }
    let launcher = launcher(config());
    let netns = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        OwnedFd::from(fs::File::open("/proc/thread-self/ns/net").unwrap())
    })
    .join()
    .unwrap();
    let expected = nix::sys::stat::fstat(&netns).unwrap().st_ino;
    // A cgroup below our own, wherever this host has one that we may write to.
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let group = own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controller, path) = (parts.next()?, parts.next()?);
        let mount = if controller.is_empty() {
            PathBuf::from("/sys/fs/cgroup")
        } else {
            Path::new("/sys/fs/cgroup").join(controller)
        };
        let dir = mount
            .join(path.trim_start_matches('/'))
            .join(format!("kuasar-jail-{}", std::process::id()));
        (controller != "cpuset" && fs::create_dir(&dir).is_ok()).then_some(dir)
    });
    let procs: Vec<PathBuf> = group.iter().map(|dir| dir.join("cgroup.procs")).collect();
    if procs.is_empty() {
        println!("skipped the cgroup: none that can be written to");
    }
    let view = View::new(Role::Vmm);
    let jailed =
        run(&launcher, &["/bin/sleep", "1000"], view, &Fds::default(), &procs, Some(&netns))
            .await
            .unwrap();
    assert_eq!(namespace(&of(&jailed, ""), "net"), expected);
    for procs in &procs {
        let pids = fs::read_to_string(procs).unwrap();
        assert_eq!(pids.trim(), jailed.pid().to_string(), "alone in its cgroup");
    }
    jailed.kill().await.unwrap();
    if let Some(dir) = group {
        fs::remove_dir(dir).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn virtiofsds_role_keeps_what_serving_files_takes_and_follows_the_hosts_mounts() {
    if !root() {
        return;
    }
    let launcher = launcher(config());
    let dir = tempfile::tempdir().unwrap();
    let (name, path) = ("kuasar-jail-test", dir.path().to_owned());
    let mut view = View::new(Role::FileServer);
    view.shared_tree = Some(path.clone());
    // A shared mount, as the daemon makes one of each share.
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let none = None::<&str>;
    mount(Some(&path), &path, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, &path, none, MsFlags::MS_SHARED, none).unwrap();
    let jailed =
        run(&launcher, &["/bin/sleep", "1000"], view, &Fds::default(), &[], None).await.unwrap();
    let status = read(&jailed, "status");
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(&status, set), "00000000880401db", "{set}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    // A rootfs that is mounted after the start is seen.
    let later = path.join("later");
    fs::create_dir(&later).unwrap();
    mount(Some(name), &later, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    fs::write(later.join("file"), "seen").unwrap();
    let inside = of(&jailed, "root").join(later.strip_prefix("/").unwrap()).join("file");
    let seen = fs::read_to_string(inside);
    jailed.kill().await.unwrap();
    umount2(&later, MntFlags::MNT_DETACH).unwrap();
    umount2(&path, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(seen.unwrap(), "seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_serves_files_acts_for_every_user_on_its_tree_alone_and_is_not_root() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let (inside, secret) = (tree.join("file"), dir.path().join("secret"));
    for file in [&inside, &secret] {
        fs::write(file, "x").unwrap();
        std::os::unix::fs::chown(file, Some(4711), Some(4711)).unwrap();
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let start = async |line: &str| {
        let mut view = View::new(Role::ServingVmm);
        view.shared_tree = Some(tree.clone());
        let mut config = config();
        config.libraries.push("/bin".into());
        let argv = ["/bin/sh", "-c", line];
        run(&launcher(config), &argv, view, &Fds::default(), &[], None).await.unwrap()
    };
    let jailed = start("exec /bin/sleep 1000").await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while read(&jailed, "comm").trim() != "sleep" {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let status = read(&jailed, "status");
    assert_eq!(field(&status, "Uid:"), format!("{UID} {UID} {UID} {UID}"));
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID.
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&status, set), "000000000000001b", "{set}");
    }
    assert_eq!(
        (field(&status, "NoNewPrivs:"), field(&status, "Seccomp:")),
        ("1".into(), "2".into())
    );
    jailed.kill().await.unwrap();
    // Another's file in the tree is its to read and to give away; what is beside the tree is not there.
    let (inside, secret) = (inside.display(), secret.display());
    let line = format!("cat {inside} && chown 1:1 {inside} && ! cat {secret}");
    assert_eq!(start(&line).await.wait().await.unwrap().status, 0);
    let line = format!("mknod {inside}.device b 7 0");
    assert_ne!(start(&line).await.wait().await.unwrap().status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jail_that_cannot_be_built_names_the_step_and_leaves_no_process() {
    if !root() {
        return;
    }
    let launcher = launcher(config());
    let mut view = View::new(Role::Vmm);
    view.writable.push("/no/such/directory".into());
    let failed = run(&launcher, &["/bin/sleep", "1"], view, &Fds::default(), &[], None).await;
    let Err(Error::Ended { said, status: 1, .. }) = failed else { panic!("{failed:?}") };
    assert!(said.starts_with("jail: cannot find /no/such/directory: No such file"), "{said}");

    let mut view = View::new(Role::Vmm);
    view.devices.push("/etc/passwd".into());
    let failed = run(&launcher, &["/bin/sleep", "1"], view, &Fds::default(), &[], None).await;
    assert!(failed.unwrap_err().to_string().contains("/etc/passwd is no character device"));

    // Found by the launcher, but not a program: the last step of all.
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    fs::write(&text, "no program").unwrap();
    let view = View::new(Role::Vmm);
    let words = [text.to_str().unwrap()];
    let failed = run(&launcher, &words, view, &Fds::default(), &[], None).await.unwrap_err();
    assert!(failed.to_string().contains("cannot run"), "{failed}");

    let missing =
        run(&launcher, &["no-such-program"], View::new(Role::Vmm), &Fds::default(), &[], None)
            .await;
    assert!(matches!(missing, Err(Error::NoProgram(_))));
}
