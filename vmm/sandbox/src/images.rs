//! What guests boot: kernel and root file system, as configured or as installed.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// What guests boot: `[guest]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestConfig {
    /// Kernel. Unset: see [`crate::config::Config::images`].
    pub kernel: Option<PathBuf>,
    /// initramfs with vmm-task. Unset: see [`crate::config::Config::images`].
    pub initrd: Option<PathBuf>,
    /// EROFS image with vmm-task, from which guests boot in place of the initramfs: for kernels
    /// without one, and for less memory.
    pub image: Option<PathBuf>,
    /// Further parameters for the kernel.
    pub params: Vec<String>,
    /// Bytes of each of the two console logs of a pod; 0 keeps none.
    pub console_bytes: u64,
    /// Size of a pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Lets unprivileged processes of pods bind low ports and send pings, as containerd does.
    pub unprivileged_ports: bool,
    /// Guests that boot from now on let an operator run programs beside the containers
    /// ([`crate::debug`]).
    pub debug_console: bool,
    /// The program that is run there; a static one of the host.
    pub debug_program: PathBuf,
    /// Its arguments.
    pub debug_args: Vec<String>,
    /// Further names of it, by which it is found there.
    pub debug_links: Vec<String>,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            kernel: None,
            initrd: None,
            image: None,
            params: ["quiet", "panic=-1"].map(str::to_owned).to_vec(),
            console_bytes: 256 << 10,
            shm_size: 64 << 20,
            unprivileged_ports: true,
            debug_console: false,
            debug_program: "/usr/bin/busybox".into(),
            debug_args: vec!["sh".into()],
            debug_links: DEBUG_LINKS.map(str::to_owned).to_vec(),
        }
    }
}

/// Applets of busybox that a look around wants. Where its shell runs applets by itself (Debian's does),
/// none is needed.
const DEBUG_LINKS: [&str; 32] = [
    "sh", "awk", "cat", "chroot", "cut", "date", "dd", "df", "dmesg", "du", "find", "free", "grep",
    "head", "hexdump", "ip", "kill", "ls", "mount", "netstat", "nsenter", "ping", "ps", "sed",
    "sleep", "stat", "stty", "tail", "top", "uname", "vi", "wc",
];

/// Names beside the program at most.
const MOST_LINKS: usize = 1024;

/// A guest's kernel and root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    /// Kernel.
    pub kernel: PathBuf,
    /// initramfs, or an EROFS image.
    pub root: RootImage,
}

/// A guest's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootImage {
    /// An initramfs.
    Initrd(PathBuf),
    /// A disk with EROFS.
    Erofs(PathBuf),
}

impl GuestConfig {
    /// What a guest's kernel is told.
    pub fn kernel_params(&self) -> Vec<String> {
        let mut params = self.params.clone();
        params.extend(self.debug_console.then(|| "kuasar.debug_console".to_owned()));
        params
    }

    /// What is wrong with the debug console's keys, in words that name the key.
    ///
    /// # Errors
    /// The first value without sense.
    pub fn check_debug(&self) -> Result<(), String> {
        let program = &self.debug_program;
        if !program.is_absolute() || program.file_name().is_none() {
            return Err(format!(
                "guest.debug_program = {program:?}: an absolute path of a program"
            ));
        }
        if self.debug_links.len() > MOST_LINKS {
            return Err(format!("guest.debug_links: at most {MOST_LINKS} names"));
        }
        let plain = |name: &String| kuasar_host::id::check("name", name).is_ok() || name == "[";
        match self.debug_links.iter().find(|name| !plain(name)) {
            Some(odd) => Err(format!("guest.debug_links: {odd:.40?} is no plain name")),
            None => Ok(()),
        }
    }

    /// Names of initramfs files.
    const INITRDS: [&'static str; 4] =
        ["initramfs.cpio", "initramfs.cpio.gz", "initramfs.cpio.zst", "initramfs.cpio.lz4"];

    /// [`crate::config::Config::images`], of kernels with these names.
    pub(crate) fn find(&self, kernels: &[&str]) -> Result<Images, String> {
        let installed = ["/usr/share/kuasar", "/usr/local/share/kuasar"].map(PathBuf::from);
        let exe = std::env::current_exe().unwrap_or_default();
        let checkout = exe.parent().and_then(Path::parent).map(|target| target.join("guest"));
        self.find_in(&installed.into_iter().chain(checkout).collect::<Vec<_>>(), kernels)
    }

    /// The same, of what these directories have.
    pub(crate) fn find_in(&self, dirs: &[PathBuf], kernels: &[&str]) -> Result<Images, String> {
        let search = |given: &Option<PathBuf>, key: &str, names: &[&str]| {
            if let Some(path) = given {
                if !path.is_file() {
                    return Err(format!(
                        "guest.{key}: {} is no file: run `make guest`, or set guest.{key} to one",
                        path.display()
                    ));
                }
                return readable(key, path.clone());
            }
            let all = dirs.iter().flat_map(|dir| names.iter().map(|name| dir.join(name)));
            let found = all.into_iter().find(|path| path.is_file()).ok_or_else(|| {
                format!(
                    "no guest {key} is installed: run `make guest`, or set guest.{key} in the \
                     configuration"
                )
            })?;
            readable(key, found)
        };
        let kernel = search(&self.kernel, "kernel", kernels)?;
        is_kernel(&kernel)?;
        let root = match &self.image {
            Some(_) => RootImage::Erofs(search(&self.image, "image", &[])?),
            None => RootImage::Initrd(search(&self.initrd, "initrd", &Self::INITRDS)?),
        };
        Ok(Images { kernel, root })
    }
}

/// A file that this user can open.
fn readable(key: &str, path: PathBuf) -> Result<PathBuf, String> {
    match std::fs::File::open(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(format!(
            "guest.{key}: {path} cannot be read ({error}): chmod 0644 {path}",
            path = path.display()
        )),
    }
}

/// What VMMs load begins like one of these; whatever else is there boots nothing, and would be found
/// out by the first pod alone.
fn is_kernel(path: &Path) -> Result<(), String> {
    use std::io::Read;
    let mut head = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(1024).read_to_end(&mut head));
    let at = |place: usize, magic: &[u8]| head.get(place..place + magic.len()) == Some(magic);
    let why = match read {
        // An ELF file, x86's bzImage and arm64's Image.
        Ok(_) if at(0, b"\x7fELF") || at(0x202, b"HdrS") || at(0x38, b"ARM\x64") => return Ok(()),
        Ok(_) => "is neither vmlinux, bzImage nor Image".to_owned(),
        Err(error) => format!("cannot be read ({error})"),
    };
    Err(format!("guest.kernel: {path} {why}: set it to a kernel", path = path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_of_its_debug_console_and_only_where_there_is_one() {
        let off = GuestConfig::default();
        assert_eq!(off.kernel_params(), off.params);
        let on = GuestConfig { debug_console: true, ..off.clone() };
        assert_eq!(on.kernel_params().last().unwrap(), "kuasar.debug_console");
        assert_eq!(on.kernel_params()[..off.params.len()], off.params);
        on.check_debug().unwrap();
        let relative = GuestConfig { debug_program: "busybox".into(), ..off.clone() };
        assert!(relative.check_debug().unwrap_err().contains("guest.debug_program"));
        for odd in ["", "../x", "a/b", ".."] {
            let links = GuestConfig { debug_links: vec![odd.into()], ..off.clone() };
            assert!(links.check_debug().unwrap_err().contains("guest.debug_links"), "{odd}");
        }
    }

    #[test]
    fn a_missing_guest_says_what_to_do() {
        let config = GuestConfig { kernel: Some("/nowhere/vmlinux".into()), ..Default::default() };
        assert!(config.find(&["vmlinux"]).unwrap_err().contains("/nowhere/vmlinux"));
        // What is no kernel is told before a pod is.
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        std::fs::write(&kernel, "404: not found").unwrap();
        let config = GuestConfig { kernel: Some(kernel.clone()), ..Default::default() };
        let said = config.find(&["vmlinux"]).unwrap_err();
        assert!(said.contains("is neither vmlinux, bzImage nor Image: set it"), "{said}");
        for (place, magic) in [(0, &b"\x7fELF"[..]), (0x202, b"HdrS"), (0x38, b"ARM\x64")] {
            let mut image = vec![0; 2048];
            image[place..place + 4].copy_from_slice(magic);
            std::fs::write(&kernel, image).unwrap();
            is_kernel(&kernel).unwrap();
        }
    }
}
