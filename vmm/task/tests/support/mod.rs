//! A host for the guest under test: an initramfs, QEMU and its helpers, the channel.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test's helper

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::r#async::Client;
use vmm_common::handshake::{
    self, Purpose, Ready, StreamKind, Welcome, greet, read_json, read_line, write_json,
};

/// A token as the host makes them.
pub const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// Programs and files of the environment.
pub struct Tools {
    pub qemu: PathBuf,
    pub vmlinux: PathBuf,
    pub vsock: PathBuf,
    pub virtiofsd: PathBuf,
    pub task: PathBuf,
    pub busybox: PathBuf,
    /// An EROFS image to boot from instead of an initramfs, for a kernel without one.
    pub image: Option<PathBuf>,
}

impl Tools {
    /// All of them, or the name of the first that is missing.
    pub fn find() -> Result<Self, String> {
        let file = |name: &str| {
            let path = std::env::var_os(name).map(PathBuf::from).ok_or(format!("no {name}"))?;
            if path.exists() {
                Ok(path)
            } else {
                Err(format!("{name}: {} is not there", path.display()))
            }
        };
        Ok(Self {
            qemu: file("KUASAR_QEMU")?,
            vmlinux: file("KUASAR_VMLINUX")?,
            vsock: file("KUASAR_VHOST_VSOCK")?,
            virtiofsd: file("KUASAR_VIRTIOFSD")?,
            task: file("KUASAR_VMM_TASK")?,
            busybox: file("KUASAR_BUSYBOX")?,
            image: file("KUASAR_GUEST_EROFS").ok(),
        })
    }
}

/// An archive in the `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    pub fn add(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            contents.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.bytes
    }
}

/// Ends its process with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A booted guest that has been welcomed.
pub struct Vm {
    pub dir: tempfile::TempDir,
    pub qemu: Running,
    helpers: Vec<Running>,
    pub ready: Ready,
    /// From exec of QEMU to READY.
    pub booted: Duration,
    pub started: Instant,
    socket: PathBuf,
}

async fn wait_for_socket(path: &Path) {
    // Another program's socket: there is no event for a test but its directory's.
    let deadline = Instant::now() + Duration::from_secs(120);
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} does not come", path.display());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub fn log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("console")).unwrap_or_default()
}

impl Vm {
    /// Boots with a share of `share` (below the VM's directory).
    pub async fn boot(tools: &Tools, options: &str) -> Self {
        Self::boot_with(tools, options, &[]).await
    }

    /// The same with further arguments of QEMU.
    pub async fn boot_with(tools: &Tools, options: &str, devices: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut cpio = Cpio::default();
        cpio.add("init", 0o100_755, &std::fs::read(&tools.task).unwrap());
        std::fs::write(at("initrd"), cpio.finish()).unwrap();
        std::fs::create_dir(at("share")).unwrap();

        let ready = UnixListener::bind(at("vsock_1023")).unwrap();
        let out = |name: &str| std::fs::File::create(at(name)).unwrap();
        let mut helpers = Vec::new();
        let vsock = Command::new(&tools.vsock)
            .args(["--guest-cid", "3", "--socket"])
            .arg(at("vhost-vsock"))
            .arg("--uds-path")
            .arg(at("vsock"))
            .stdout(out("vsock.log"))
            .stderr(out("vsock.err"))
            .spawn()
            .unwrap();
        helpers.push(Running(vsock));
        let virtiofsd = Command::new(&tools.virtiofsd)
            .arg("--socket-path")
            .arg(at("vhost-fs"))
            .arg("--shared-dir")
            .arg(at("share"))
            .args(["--sandbox=none", "--announce-submounts", "--cache=always"])
            .stdout(out("virtiofsd.log"))
            .stderr(out("virtiofsd.err"))
            .spawn()
            .unwrap();
        helpers.push(Running(virtiofsd));
        wait_for_socket(&at("vhost-vsock")).await;
        wait_for_socket(&at("vhost-fs")).await;

        let clock = vmm_common::clock::parameters(vmm_common::clock::host_khz()).join(" ");
        let started = Instant::now();
        let text = |name: &str| at(name).display().to_string();
        let (root, boot) = match &tools.image {
            None => (vec!["-initrd".into(), text("initrd")], ""),
            Some(image) => {
                let drive = format!("if=none,id=d,file={},format=raw,readonly=on", image.display());
                let disk = "virtio-blk-device,drive=d".into();
                let boot = "root=/dev/vda rootfstype=erofs ro init=/init";
                (vec!["-drive".into(), drive, "-device".into(), disk], boot)
            }
        };
        let qemu = Command::new(&tools.qemu)
            .args(["-accel", "tcg", "-cpu", "max", "-m", "128", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot"])
            .args(["-object", "memory-backend-memfd,id=m0,size=128M,share=on"])
            .args(["-M", "microvm,acpi=off,memory-backend=m0"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-serial", &format!("file:{}", text("console"))])
            .args(["-chardev", &format!("socket,id=vs,path={}", text("vhost-vsock"))])
            .args(["-device", "vhost-user-vsock-device,chardev=vs"])
            .args(["-chardev", &format!("socket,id=fs,path={}", text("vhost-fs"))])
            .args(["-device", "vhost-user-fs-device,chardev=fs,tag=kuasar"])
            .args(devices)
            .arg("-kernel")
            .arg(&tools.vmlinux)
            .args(&root)
            .arg("-append")
            // init_on_alloc: virtiofsd writes into guest memory behind TCG's back, which then
            // runs stale translations of whatever code was in that page before. The guest's own
            // write of zeroes invalidates them.
            .arg(format!(
                "init_on_alloc=1 console=ttyS0 quiet nolapic_timer panic=-1 reboot=t kuasar.log=info {boot} {clock} {options}"
            ))
            .stdin(Stdio::null())
            .stdout(out("qemu.log"))
            .stderr(out("qemu.err"))
            .spawn()
            .unwrap();
        let qemu = Running(qemu);
        let accepted = tokio::time::timeout(Duration::from_secs(120), ready.accept()).await;
        let Ok(Ok((mut stream, _))) = accepted else {
            let err = std::fs::read_to_string(at("qemu.err")).unwrap_or_default();
            panic!("no READY; QEMU: {err}; console:\n{}", log(dir.path()));
        };
        let booted = started.elapsed();
        let ready: Ready = read_json(&mut stream).await.unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let welcome = Welcome {
            token: TOKEN.into(),
            now_ns: i64::try_from(now.as_nanos()).unwrap(),
            entropy: "5a".repeat(64),
            sandbox_id: "pod".into(),
        };
        write_json(&mut stream, &welcome).await.unwrap();
        assert_eq!(read_line(&mut stream).await.unwrap(), "{\"ok\":true}");
        let socket = at("vsock");
        Self { dir, qemu, helpers, ready, booted, started, socket }
    }

    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// Dials a port of the guest.
    pub async fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.unwrap();
        let answer = read_line(&mut stream).await.unwrap();
        assert!(answer.starts_with("OK "), "{answer}");
        stream
    }

    pub async fn control(&self) -> Client {
        let mut stream = self.dial(vmm_common::port::CONTROL).await;
        greet(&mut stream, TOKEN, &Purpose::Control).await.unwrap();
        Client::new(ttrpc::r#async::transport::Socket::new(stream))
    }

    pub async fn stream(&self, container: &str, exec: &str, kind: StreamKind) -> UnixStream {
        let mut stream = self.dial(vmm_common::port::STREAM).await;
        let purpose = Purpose::Stream { container: container.into(), exec: exec.into(), kind };
        greet(&mut stream, TOKEN, &purpose).await.unwrap();
        stream
    }

    /// A root filesystem with busybox in the share, for one container.
    pub fn rootfs(&self, tools: &Tools, container: &str) {
        let root = self.share().join(container).join("rootfs");
        for dir in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        let busybox = root.join("bin/busybox");
        std::fs::copy(&tools.busybox, &busybox).unwrap();
        std::fs::set_permissions(&busybox, std::fs::Permissions::from_mode(0o755)).unwrap();
        for name in
            ["sh", "cat", "sleep", "dd", "stty", "hostname", "ls", "head", "true", "nc", "echo"]
        {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
    }

    pub fn log(&self) -> String {
        log(self.dir.path())
    }

    /// Waits for the end of QEMU.
    pub async fn ended(mut self) -> std::process::ExitStatus {
        let wait = tokio::task::spawn_blocking(move || {
            let status = self.qemu.0.wait().unwrap();
            (status, self)
        });
        let (status, _vm) =
            tokio::time::timeout(Duration::from_secs(180), wait).await.unwrap().unwrap();
        status
    }
}

/// Reads to the end of a stream.
pub async fn all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    tokio::time::timeout(Duration::from_secs(180), read).await.unwrap().unwrap();
    bytes
}

pub fn address(container: &str, exec: &str, kind: StreamKind) -> String {
    vmm_common::stream_address(container, exec, kind)
}

pub use handshake::StreamKind as Kind;
