//! What is to run: a WebAssembly module, an image in an OCI layout or archive, or a directory.
//!
//! Layers are unpacked each into a directory of its own and stacked by overlayfs, as an engine's
//! snapshotter does it; the daemon mounts them. Blobs are compared with their digests before anything
//! of them is used.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::unpack;
use crate::error::{Error, Result};

/// Largest index, manifest or configuration, in bytes.
const MOST_JSON: u64 = 4 << 20;
/// Indexes that may refer to indexes.
const DEPTH: usize = 4;
/// Layers of an image; overlayfs has a limit of its own beyond that.
const LAYERS: usize = 128;

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A WebAssembly module or component.
    Wasm(PathBuf),
    /// A directory with an OCI layout.
    Layout(PathBuf),
    /// A tar archive of one.
    Archive(PathBuf),
    /// A root file system.
    Directory(PathBuf),
}

/// What a container is made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// Directories from the uppermost to the lowest.
    layers: Vec<PathBuf>,
    entrypoint: Vec<String>,
    default_command: Vec<String>,
    /// Environment.
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// User and group.
    pub user: (u32, u32),
}

impl Source {
    /// What `path` is.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Io`].
    pub fn detect(path: &Path) -> Result<Self> {
        let full = std::fs::canonicalize(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::NotFound(format!("{} does not exist", path.display()))
            }
            _ => Error::at("look at", path)(error),
        })?;
        if full.is_dir() {
            let layout = full.join("oci-layout").is_file() && full.join("index.json").is_file();
            return Ok(if layout { Self::Layout(full) } else { Self::Directory(full) });
        }
        let mut magic = [0; 4];
        let mut file = File::open(&full).map_err(Error::at("open", path))?;
        let n = file.read(&mut magic).map_err(Error::at("read", path))?;
        // The WebAssembly core specification, section 5.5.16; components begin alike.
        let wasm = magic.get(..n) == Some(b"\0asm".as_slice());
        Ok(if wasm { Self::Wasm(full) } else { Self::Archive(full) })
    }

    /// Unpacks it below `dir`; at most `most` bytes. Blocks.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(self, dir: &Path, reference: Option<&str>, most: u64) -> Result<Image> {
        match self {
            Self::Directory(root) => Ok(Image { layers: vec![root], ..Image::default() }),
            Self::Wasm(module) => wasm(&module, dir),
            Self::Layout(layout) => Layout { dir: layout, most }.image(dir, reference),
            Self::Archive(archive) => {
                let layout = dir.join("layout");
                unpack::layout(&archive, &layout, most)?;
                Layout { dir: layout, most }.image(dir, reference)
            }
        }
    }
}

/// A directory with one module.
fn wasm(module: &Path, dir: &Path) -> Result<Image> {
    let root = dir.join("module");
    std::fs::create_dir(&root).map_err(Error::at("make", &root))?;
    let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let to = root.join(&name);
    std::fs::copy(module, &to).map_err(Error::at("copy", module))?;
    Ok(Image { layers: vec![root], entrypoint: vec![format!("/{name}")], ..Image::default() })
}

struct Layout {
    dir: PathBuf,
    most: u64,
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn texts(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|v| Some(v.as_str()?.to_owned())).collect()
}

fn bad(why: impl Into<String>) -> Error {
    Error::Failed(format!("the image is not usable: {}", why.into()))
}

impl Layout {
    /// A blob by its descriptor, after its digest was compared. It is opened once: what is compared
    /// is what is used.
    fn blob(&self, descriptor: &Value) -> Result<File> {
        use std::io::Seek;
        let digest = text(descriptor, "digest");
        let hex = digest.strip_prefix("sha256:").filter(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
        });
        let hex = hex.ok_or_else(|| bad(format!("{digest:.80?} is no sha256 digest")))?;
        let path = self.dir.join("blobs/sha256").join(hex);
        let mut file = File::open(&path).map_err(Error::at("open", &path))?;
        let mut hash = Sha256::new();
        std::io::copy(&mut file, &mut hash).map_err(Error::at("read", &path))?;
        let found = kuasar_host::hex(&hash.finalize());
        if found != hex {
            return Err(bad(format!("blob {hex} has other bytes than its digest says")));
        }
        file.rewind().map_err(Error::at("read", &path))?;
        Ok(file)
    }

    fn json(&self, descriptor: &Value) -> Result<Value> {
        parse(self.blob(descriptor)?, text(descriptor, "digest"))
    }

    /// The manifest that is wanted: by name, or the only one, for this machine.
    fn manifest(&self, reference: Option<&str>) -> Result<Value> {
        let path = self.dir.join("index.json");
        let index = parse(File::open(&path).map_err(Error::at("open", &path))?, "index.json")?;
        let all = index.get("manifests").and_then(Value::as_array).cloned().unwrap_or_default();
        let name = |m: &Value, key: &str| {
            m.get("annotations").map(|a| text(a, key).to_owned()).unwrap_or_default()
        };
        let names = |m: &Value| {
            [name(m, "org.opencontainers.image.ref.name"), name(m, "io.containerd.image.name")]
        };
        let chosen: Vec<&Value> = match reference {
            Some(wanted) => all.iter().filter(|m| names(m).iter().any(|n| n == wanted)).collect(),
            None => all.iter().collect(),
        };
        let mut one = match chosen.as_slice() {
            [one] => (*one).clone(),
            [] => {
                return Err(Error::NotFound(match reference {
                    Some(wanted) => format!("no image is named {wanted:?} there"),
                    None => "there is no image in it".into(),
                }));
            }
            several => {
                let all: Vec<String> =
                    several.iter().flat_map(|m| names(m)).filter(|n| !n.is_empty()).collect();
                return Err(Error::Usage(format!(
                    "it has several images: name one with --ref, of {}",
                    all.join(", ")
                )));
            }
        };
        for _ in 0..DEPTH {
            let document = self.json(&one)?;
            let Some(inner) = document.get("manifests").and_then(Value::as_array) else {
                return Ok(document);
            };
            let fits = |m: &&Value| {
                let platform = m.get("platform").cloned().unwrap_or_default();
                let arch = match std::env::consts::ARCH {
                    "x86_64" => "amd64",
                    "aarch64" => "arm64",
                    other => other,
                };
                let (os, of) = (text(&platform, "os"), text(&platform, "architecture"));
                (os == "linux" && of == arch) || os.starts_with("wasi") || of == "wasm"
            };
            let found = inner.iter().find(fits).or(inner.first().filter(|_| inner.len() == 1));
            one = found.cloned().ok_or_else(|| bad("it has nothing for this machine"))?;
        }
        Err(bad("its indexes are nested too deeply"))
    }

    fn image(&self, dir: &Path, reference: Option<&str>) -> Result<Image> {
        let manifest = self.manifest(reference)?;
        let layers = manifest.get("layers").and_then(Value::as_array).cloned().unwrap_or_default();
        if layers.is_empty() || layers.len() > LAYERS {
            return Err(bad(format!("{} layers: 1 to {LAYERS} are possible", layers.len())));
        }
        let mut image = Image::default();
        let mut left = self.most;
        for (n, layer) in layers.iter().enumerate() {
            let to = dir.join(format!("layer-{n}"));
            std::fs::create_dir(&to).map_err(Error::at("make", &to))?;
            let kind = text(layer, "mediaType");
            if kind.contains("wasm") {
                // A module as an artifact: the layer is the module itself.
                let module = to.join("module.wasm");
                let mut file = File::create(&module).map_err(Error::at("make", &module))?;
                std::io::copy(&mut self.blob(layer)?.take(left), &mut file)
                    .map_err(Error::at("write", &module))?;
                image.entrypoint = vec!["/module.wasm".into()];
            } else {
                unpack::layer(self.blob(layer)?, &to, &mut left)
                    .map_err(|error| bad(format!("layer {}: {error}", n + 1)))?;
            }
            image.layers.insert(0, to);
        }
        let Some(descriptor) = manifest.get("config") else { return Ok(image) };
        let config = self.json(descriptor)?;
        let Some(config) = config.get("config") else { return Ok(image) };
        let entrypoint = texts(config.get("Entrypoint"));
        if !entrypoint.is_empty() {
            image.entrypoint = entrypoint;
        }
        image.default_command = texts(config.get("Cmd"));
        image.env = texts(config.get("Env"));
        image.workdir = Some(text(config, "WorkingDir").to_owned()).filter(|dir| !dir.is_empty());
        image.user = image.find_user(text(config, "User"))?;
        Ok(image)
    }
}

fn parse(file: File, what: &str) -> Result<Value> {
    let mut bytes = Vec::new();
    file.take(MOST_JSON).read_to_end(&mut bytes).map_err(Error::io(format!("read {what}")))?;
    serde_json::from_slice(&bytes).map_err(|e| bad(format!("{what}: {e}")))
}

impl Image {
    /// What to run: the image's own, or its entrypoint's with other arguments, as engines have it.
    pub fn command(&self, given: &[String]) -> Vec<String> {
        let arguments = if given.is_empty() { &self.default_command } else { given };
        self.entrypoint.iter().chain(arguments).cloned().collect()
    }

    /// A file of the image, bounded: of the uppermost layer that has it.
    fn file(&self, path: &str) -> Option<String> {
        self.layers.iter().find_map(|layer| {
            let root = kuasar_host::safe_path::Root::open(layer).ok()?;
            let file = File::from(root.open_file(Path::new(path), libc::O_RDONLY).ok()?);
            let mut text = String::new();
            file.take(MOST_JSON).read_to_string(&mut text).ok()?;
            Some(text)
        })
    }

    /// `User` of a configuration: numbers, or names of the image's own files.
    fn find_user(&self, user: &str) -> Result<(u32, u32)> {
        let (name, group) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
        let field = |line: &str, n: usize| line.split(':').nth(n).map(str::to_owned);
        let look_up = |file: &str, name: &str, key: usize| -> Option<String> {
            let text = self.file(file)?;
            let mut lines = text.lines();
            lines.find(|line| field(line, key).as_deref() == Some(name)).map(str::to_owned)
        };
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u32>().ok());
        let unknown =
            |what: &str| bad(format!("its {what} {user:?} is unknown: name one with --user"));
        let (uid, own) = match name.parse::<u32>() {
            _ if name.is_empty() => (0, 0),
            Ok(uid) => {
                let line = look_up("etc/passwd", name, 2);
                (uid, number(line.and_then(|line| field(&line, 3))).unwrap_or(0))
            }
            Err(_) => {
                let line = look_up("etc/passwd", name, 0).ok_or_else(|| unknown("user"))?;
                let uid = number(field(&line, 2)).ok_or_else(|| unknown("user"))?;
                (uid, number(field(&line, 3)).unwrap_or(0))
            }
        };
        let gid = match group {
            None | Some("") => own,
            Some(group) => match group.parse() {
                Ok(gid) => gid,
                Err(_) => {
                    let line = look_up("etc/group", group, 0).ok_or_else(|| unknown("group"))?;
                    number(field(&line, 2)).ok_or_else(|| unknown("group"))?
                }
            },
        };
        Ok((uid, gid))
    }

    /// The rootfs: kind, source and options of its mount. What the container writes goes to `dir`.
    ///
    /// # Errors
    /// When a directory cannot be made, or has a name that overlayfs cannot be told.
    pub fn mounts(&self, dir: &Path) -> Result<Vec<(String, String, Vec<String>)>> {
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        for path in [&upper, &work] {
            std::fs::create_dir(path).map_err(Error::at("make", path))?;
        }
        // The root directory is the upper one's: it is to look as the image's does.
        if let Some(meta) = self.layers.first().and_then(|layer| std::fs::metadata(layer).ok()) {
            let _ = std::fs::set_permissions(&upper, meta.permissions());
        }
        let mut lower = Vec::new();
        for layer in &self.layers {
            let path = layer.display().to_string();
            if path.contains([':', ',', '\\']) {
                return Err(Error::Usage(format!(
                    "{path:?} has a ':', ',' or '\\' in its name, which overlayfs does not take"
                )));
            }
            lower.push(path);
        }
        let options = vec![
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", lower.join(":")),
        ];
        Ok(vec![("overlay".into(), "overlay".into(), options)])
    }
}
