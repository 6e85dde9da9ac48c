//! Containers for real, by the program that has been built, in a mount namespace of each test.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kuasar_host::cgroup::Cgroup;
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

/// One container. Its root is the host's, below an overlay.
struct Container {
    dir: tempfile::TempDir,
    id: String,
    spec: Value,
}

/// Runs `test` on a thread with a private mount namespace, or says why not.
fn with(name: &str, test: impl FnOnce(Container) + Send) {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: needs root");
    }
    if !program().exists() {
        return eprintln!("skipped: build the workspace first ({})", program().display());
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
            let dir = tempfile::tempdir().unwrap();
            // Layers may not lie on an overlay, as the host's root may be.
            let tmpfs = mount(Some("t"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>);
            tmpfs.unwrap();
            for sub in ["upper", "work", "rootfs", "state"] {
                std::fs::create_dir(dir.path().join(sub)).unwrap();
            }
            let id = format!("direct-{name}-{}", std::process::id());
            let spec = spec(&dir.path().join("rootfs"), &id);
            test(Container { dir, id, spec });
        });
    });
}

fn program() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    exe.parent().unwrap().parent().unwrap().join("examples/kuasar-oci")
}

fn spec(rootfs: &Path, id: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": [], "cwd": "/", "env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"],
            "user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": ["CAP_KILL"]}
        },
        "root": {"path": rootfs},
        "hostname": "direct",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}
        ],
        "linux": {
            "cgroupsPath": format!("/kuasar-direct/{id}"),
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "ipc"},
                {"type": "uts"}, {"type": "network"}
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }
    })
}

impl Container {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path of the image.
    fn image(&self, path: &str) -> PathBuf {
        let path = self.path("upper").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn mount(&mut self, at: &str, source: &Path, options: &[&str]) {
        let new = json!({"destination": at, "type": "bind", "source": source, "options": options});
        self.spec["mounts"].as_array_mut().unwrap().push(new);
    }

    fn oci(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg("--root").arg(self.path("state")).arg("--log").arg(self.path("log"));
        command.args(words).stdin(Stdio::null());
        command
    }

    /// Makes it; answers its pid and what it will print, or why it cannot be made.
    fn create(&self, script: &str) -> Result<(i32, std::io::PipeReader), String> {
        let layers = ["upper", "work"].map(|name| self.path(name).display().to_string());
        let data = format!("lowerdir=/,upperdir={},workdir={}", layers[0], layers[1]);
        let rootfs = self.path("rootfs");
        mount(Some("o"), &rootfs, Some("overlay"), MsFlags::empty(), Some(data.as_str())).unwrap();
        let mut spec = self.spec.clone();
        if spec["process"]["args"] == json!([]) {
            spec["process"]["args"] = json!(["sh", "-c", script]);
        }
        std::fs::write(self.path("config.json"), spec.to_string()).unwrap();
        let (out, write) = std::io::pipe().unwrap();
        let (bundle, pid) = (self.dir.path().to_str().unwrap(), self.path("pid"));
        let pid_file = pid.to_str().unwrap();
        let words = ["create", "--bundle", bundle, "--pid-file", pid_file, &self.id];
        let made = self.oci(&words).stdout(write.try_clone().unwrap()).stderr(write).status();
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        // None of these is left to libcontainer.
        assert!(!log.contains("by libcontainer"), "{log}");
        if made.unwrap().success() {
            return Ok((std::fs::read_to_string(pid).unwrap().parse().unwrap(), out));
        }
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        Err(last["msg"].as_str().unwrap().to_owned())
    }

    /// Lets it run; answers what it prints and its exit status.
    fn finish(&self, (pid, mut out): (i32, std::io::PipeReader)) -> (String, i32) {
        assert!(self.oci(&["start", &self.id]).status().unwrap().success());
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        // It is our child: the engine makes it its sibling.
        let mut status = 0;
        // SAFETY: a valid place for the status.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(self.oci(&["delete", &self.id]).status().unwrap().success());
        assert!(!self.path("state").join(&self.id).exists());
        assert!(!self.group().exists());
        (text, libc::WEXITSTATUS(status))
    }

    fn run(&self, script: &str) -> String {
        let (text, status) = self.finish(self.create(script).unwrap());
        assert_eq!(status, 0, "{text}");
        text
    }

    fn group(&self) -> Cgroup {
        Cgroup::open(self.spec["linux"]["cgroupsPath"].as_str().unwrap()).unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let group = self.group();
        let _ = group.kill();
        let _ = group.remove(std::time::Duration::from_secs(5));
        // SAFETY: an init that a failed test has left; none is no error.
        unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        let _ = nix::mount::umount2(&self.path("rootfs"), nix::mount::MntFlags::MNT_DETACH);
        let _ = nix::mount::umount2(self.dir.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_process_is_what_its_spec_says() {
    with("process", |mut c| {
        c.spec["process"] = json!({
            "args": [], "cwd": "/made/here", "env": ["PATH=/usr/bin:/bin", "X=1"],
            "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 10], "umask": 0o27},
            "capabilities": {
                "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL"],
                "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 700, "soft": 600}],
            "noNewPrivileges": true, "oomScoreAdj": 700
        });
        c.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_default_ttl": "33", "kernel.shmmni": "77"});
        c.spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
        });
        std::fs::write(c.image("etc/passwd"), "d:x:1000:1001::/home/direct:/bin/sh\n").unwrap();
        let text = c.run(
            "id -u; id -g; id -G; pwd; umask; ulimit -n; ulimit -Hn; hostname; echo $X $HOME; echo $$
             cat /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shmmni
             grep -E '^(Cap|NoNewPrivs|Seccomp:|SigIgn)' /proc/$$/status; ls -m /proc/$$/fd
             mkdir /tmp/never || echo denied; cat /proc/self/cgroup | grep -v ':/$' || echo own cgroups
             readlink /proc/$$/exe | grep -c kuasar; true",
        );
        let lines: Vec<&str> = text.lines().collect();
        let (head, rest) = lines.split_at(13);
        assert_eq!(head[..3], ["1000", "1001", "1001 5 10"]);
        assert_eq!(head[3..8], ["/made/here", "0027", "600", "700", "direct"]);
        assert_eq!(head[8..], ["1 /home/direct", "1", "700", "33", "77"]);
        for wanted in [
            "CapInh:\t0000000000000020",
            "CapPrm:\t0000000000000020",
            "CapEff:\t0000000000000020",
            "CapBnd:\t0000000000000021",
            "CapAmb:\t0000000000000020",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
            "denied",
            "own cgroups",
            "0",
        ] {
            assert!(rest.contains(&wanted), "{wanted:?}: {text}");
        }
        // Standard streams alone. (In a pipeline the shell has its pipe, too, for a moment.)
        assert!(rest.contains(&"0, 1, 2"), "{text}");
    });
}

#[test]
fn a_file_system_is_what_its_spec_says() {
    with("fs", |mut c| {
        let volume = c.path("volume");
        std::fs::create_dir_all(volume.join("below")).unwrap();
        std::fs::write(c.path("file"), "of the host\n").unwrap();
        let below = volume.join("below");
        mount(Some("b"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        std::fs::create_dir_all(c.image("copied/d")).unwrap();
        std::fs::write(c.image("copied/d/f"), "of the image\n").unwrap();
        let file = c.path("file");
        c.mount("/new/file", &file, &["rbind", "rprivate", "ro"]);
        c.mount("/ro", &volume, &["rbind", "ro"]);
        c.mount("/rro", &volume, &["rbind", "rro", "noexec"]);
        let copied = json!({"destination": "/copied", "type": "tmpfs", "source": "tmpfs",
            "options": ["tmpcopyup", "ro", "nodev"]});
        c.spec["mounts"].as_array_mut().unwrap().push(copied);
        c.spec["root"]["readonly"] = json!(true);
        c.spec["linux"]["devices"] = json!([
            {"type": "c", "path": "/dev/sub/mynull", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 7, "gid": 8},
            {"type": "p", "path": "/dev/pipe", "fileMode": 0o600}
        ]);
        c.spec["linux"]["maskedPaths"] =
            json!(["/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/acpi", "/proc/none"]);
        c.spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/proc/bus", "/proc/none"]);
        c.spec["linux"]["resources"]["pids"] = json!({"limit": 123});
        let text = c.run(
            "w() { ( : > $1 ) 2>/dev/null && echo $1 yes || echo $1 no; }
             cat /new/file; w /new/file; w /ro/x; w /ro/below/x; w /rro/x; w /rro/below/x; w /root-x
             w /proc/sys/kernel/domainname; cat /proc/keys | wc -c; ls /sys/firmware | wc -l
             cat /copied/d/f; w /copied/x; stat -c '%a %u %g %t:%T' /dev/sub/mynull; stat -c %F /dev/pipe
             w /dev/null; w /dev/sub/mynull; stat -c '%a %t:%T' /dev/tty; readlink /dev/ptmx
             cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; w /sys/fs/cgroup/x
             grep -c ' /rro .*noexec' /proc/self/mounts; grep -c ' /dev .*relatime' /proc/self/mounts
             mknod /dev/sda b 8 0 2>/dev/null || echo no mknod",
        );
        let wanted = "of the host\n/new/file no\n/ro/x no\n/ro/below/x yes\n/rro/x no\n/rro/below/x no\n\
            /root-x no\n/proc/sys/kernel/domainname no\n0\n0\nof the image\n/copied/x no\n640 7 8 1:3\nfifo\n\
            /dev/null yes\n/dev/sub/mynull no\n666 5:0\npts/ptmx\n123\n/sys/fs/cgroup/x no\n1\n0\nno mknod\n";
        assert_eq!(text, wanted);
    });
}

#[test]
fn each_mount_is_propagated_as_it_says() {
    with("propagation", |mut c| {
        let volume = c.path("volume");
        std::fs::create_dir(&volume).unwrap();
        mount(Some("v"), &volume, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, &volume, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        std::fs::create_dir(volume.join("late")).unwrap();
        std::fs::create_dir(volume.join("inner")).unwrap();
        c.mount("/slave", &volume, &["rbind", "rslave"]);
        c.mount("/private", &volume, &["rbind", "rprivate"]);
        c.mount("/shared", &volume, &["rbind", "rshared"]);
        c.spec["linux"]["rootfsPropagation"] = json!("rshared");
        c.spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]
        });
        let made = c.create(
            "for d in slave private shared; do test -e /$d/late/here && echo $d; done
             mount -t tmpfs t /shared/inner && touch /shared/inner/there",
        );
        let made = made.unwrap();
        let late = volume.join("late");
        mount(Some("l"), &late, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        std::fs::write(late.join("here"), "").unwrap();
        let (text, status) = c.finish(made);
        assert_eq!((text.as_str(), status), ("slave\nshared\n", 0));
        assert!(volume.join("inner/there").exists(), "and back to the host");
    });
}

#[test]
fn a_link_of_the_image_as_a_target_stays_inside() {
    with("links", |mut c| {
        let outside = c.path("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(c.path("file"), "x").unwrap();
        // Absolute, upwards, and to where nothing is.
        symlink(&outside, c.image("absolute")).unwrap();
        symlink("../../../../../../etc", c.image("upwards")).unwrap();
        std::fs::create_dir_all(c.image("target")).unwrap();
        symlink("/target", c.image("inside")).unwrap();
        let file = c.path("file");
        c.mount("/inside/new/file", &file, &["bind"]);
        c.mount("/upwards/direct-file", &file, &["bind"]);
        let text = c.run("cat /target/new/file /etc/direct-file; ls -d /target/new");
        assert_eq!(text, "xx/target/new\n");
        assert!(!Path::new("/etc/direct-file").exists());
        let _ = nix::mount::umount2(&c.path("rootfs"), nix::mount::MntFlags::MNT_DETACH);
        c.mount("/absolute/new", &file, &["bind"]);
        c.create("true").unwrap_err();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    });
}

#[test]
fn false_proc_and_false_devices_are_refused() {
    with("false", |mut c| {
        let refused = |c: &Container, words: &str| {
            let error = c.create("true").unwrap_err();
            assert!(error.contains(words), "{error}");
            let _ = nix::mount::umount2(&c.path("rootfs"), nix::mount::MntFlags::MNT_DETACH);
            assert!(!c.group().exists() && !c.path("state").join(&c.id).exists());
        };
        let dev = c.path("dev");
        std::fs::create_dir(&dev).unwrap();
        std::fs::write(dev.join("null"), "").unwrap();
        let usual = c.spec.clone();
        // What would cover /proc/keys is a file of somebody's.
        c.spec["linux"]["maskedPaths"] = json!(["/proc/keys"]);
        c.mount("/dev", &dev, &["rbind"]);
        refused(&c, "not the null device");
        // A volume on a part of /proc, by name and by a link.
        c.spec = usual.clone();
        c.mount("/proc/sys", &dev, &["rbind"]);
        refused(&c, "a part of /proc");
        symlink("/proc/sys", c.image("linked")).unwrap();
        c.spec = usual.clone();
        c.mount("/linked", &dev, &["rbind"]);
        refused(&c, "a part of /proc");
        // procfs mounted where a link leads.
        std::fs::create_dir_all(c.image("elsewhere")).unwrap();
        symlink("/elsewhere", c.image("false-proc")).unwrap();
        c.spec = usual;
        c.spec["mounts"][0]["destination"] = json!("/false-proc");
        refused(&c, "ordinary directory");
    });
}

#[test]
fn what_cannot_be_run_is_explained_and_leaves_nothing() {
    with("errors", |mut c| {
        let usual = c.spec.clone();
        for (pointer, value, words) in [
            (
                "/process/args",
                json!(["no-such"]),
                "exec: \"no-such\": executable file not found in $PATH",
            ),
            ("/process/args", json!(["/etc"]), "exec: \"/etc\": is a directory"),
            ("/mounts/4/destination", json!("/proc/x"), "/proc/x in the rootfs"),
            ("/linux/sysctl", json!({"net.no.such": "1"}), "sysctl net.no.such"),
            (
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "network", "path": "/no/ns"}]),
                "/no/ns",
            ),
            ("/root/path", json!("/no/such/root"), "/no/such/root"),
            ("/linux/resources/unified", json!({"memory.max": "no number"}), "resources"),
        ] {
            c.spec = usual.clone();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            match c.spec.pointer_mut(parent).unwrap() {
                Value::Array(_) => panic!("{pointer}"),
                object => object[key] = value,
            }
            let error = c.create("true").unwrap_err();
            assert!(error.contains(words), "{pointer}: {error}");
            let _ = nix::mount::umount2(&c.path("rootfs"), nix::mount::MntFlags::MNT_DETACH);
            assert!(!c.group().exists(), "{pointer}");
            assert!(!c.path("state").join(&c.id).exists(), "{pointer}");
        }
    });
}

#[test]
fn descriptors_and_executable_of_the_host_stay_outside() {
    with("fds", |c| {
        // One that is not close-on-exec, as a careless caller may leave it.
        let host = std::fs::File::open("/").unwrap();
        // SAFETY: plain system call on our descriptor.
        assert_eq!(unsafe { libc::fcntl(host.as_raw_fd(), libc::F_SETFD, 0) }, 0);
        let text = c.run("for f in /proc/$$/fd/*; do readlink $f; done | grep -c '^/$'; true");
        drop(host);
        assert_eq!(text, "0\n");
    });
}

#[test]
fn a_working_directory_of_the_host_is_refused() {
    with("cwd", |mut c| {
        // Some of these are directories of the host in the process that makes the container.
        for fd in 3..16 {
            c.spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
            match c.create("test $(stat -c %d:%i .) = $(stat -c %d:%i /)") {
                Ok(made) => assert_eq!(c.finish(made).1, 0, "it may be the container's own root"),
                Err(error) => assert!(
                    error.contains("cwd") || error.contains("working directory"),
                    "{fd}: {error}"
                ),
            }
            let _ = nix::mount::umount2(&c.path("rootfs"), nix::mount::MntFlags::MNT_DETACH);
        }
    });
}
