//! The process that is left behind: its namespaces, its root, its Task server.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use containerd_task::events::EventSender;
use containerd_task::journal::NoJournal;
use containerd_task::runtime::NoKeeper;
use containerd_task::{TaskOptions, TaskServer};
use kuasar_oci::selfexe::SelfExe;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use vmm_task::reaper::Reaper;

use crate::runtime::FakeContainers;
use crate::{Failure, Mode};

/// Runs until it is killed.
///
/// # Errors
/// When it cannot serve.
pub fn main(tree: &str, id: &str, mode: Mode) -> Result<(), Failure> {
    if mode == Mode::Dies {
        return Err("the fake was told to die: can't open kvm".into());
    }
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    let listener = std::os::unix::net::UnixListener::from(stdin);
    listener.set_nonblocking(true)?;
    let exe = SelfExe::open("fake-quark")?;
    let spec: Value = serde_json::from_slice(&std::fs::read(Path::new(tree).join("config.json"))?)?;
    enter(Path::new(tree), &spec)?;
    // SAFETY: there is one thread.
    unsafe { std::env::set_var("PATH", "/usr/sbin:/usr/bin:/sbin:/bin") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = UnixListener::from_std(listener)?;
        match mode {
            Mode::Deaf => std::future::pending().await,
            Mode::Rubbish => loop {
                let (mut socket, _) = listener.accept().await?;
                tokio::spawn(async move { while socket.write_all(b"rubbish\n").await.is_ok() {} });
            },
            _ => serve(listener, id, exe, mode == Mode::Spares).await,
        }
    })
}

/// As Quark does it: network, host name, and the tree as the root.
fn enter(tree: &Path, spec: &Value) -> Result<(), Failure> {
    let none = None::<&str>;
    // Quark makes its tree a mount point of its own while it still is in the host's namespace.
    mount(Some(tree), tree, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    for dir in ["proc", "sys", "dev", "tmp", "run"] {
        std::fs::create_dir_all(tree.join(dir))?;
    }
    let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    for namespace in namespaces.into_iter().flatten() {
        if namespace.get("type").and_then(Value::as_str) == Some("network")
            && let Some(path) = namespace.get("path").and_then(Value::as_str)
        {
            setns(std::fs::File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        }
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)?;
    if let Some(name) = spec.get("hostname").and_then(Value::as_str) {
        std::fs::write("/proc/sys/kernel/hostname", name)?;
    }
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    mount(Some(tree), tree, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    let at = |name: &str| tree.join(name);
    mount(Some("proc"), &at("proc"), Some("proc"), MsFlags::empty(), none)?;
    for name in ["sys", "dev"] {
        let from = Path::new("/").join(name);
        mount(Some(&from), &at(name), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    }
    // A build of this fake that is not static has its libraries there.
    for name in ["lib", "lib64", "usr"] {
        let from = Path::new("/").join(name);
        if from.is_dir() {
            std::fs::create_dir_all(at(name))?;
            mount(Some(&from), &at(name), none, MsFlags::MS_BIND, none)?;
        }
    }
    for name in ["tmp", "run"] {
        mount(Some("tmpfs"), &at(name), Some("tmpfs"), MsFlags::empty(), none)?;
    }
    nix::unistd::chdir(tree)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}

async fn serve(
    listener: UnixListener,
    id: &str,
    exe: SelfExe,
    spares: bool,
) -> Result<(), Failure> {
    let reaper = Reaper::default();
    reaper.run()?;
    let containers = FakeContainers::new(id, spares, reaper, &exe)?;
    let options = TaskOptions { sandbox_id: id.into(), ..TaskOptions::default() };
    let tasks = TaskServer::new(
        Arc::new(containers),
        Arc::new(NoKeeper),
        Arc::new(NoJournal),
        EventSender::none(),
        options,
    );
    tasks.serve(HashMap::new()).await?;
    loop {
        let (socket, _) = listener.accept().await?;
        let tasks = tasks.clone();
        tokio::spawn(async move { tasks.connection(socket).await });
    }
}
