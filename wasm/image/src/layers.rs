//! A file of an image by its layers, which are read and never unpacked.
//!
//! Names are resolved as in a container's rootfs: links inside the image alone, what an upper layer has before what a
//! lower one has, and without what an upper one has removed. So what is found is what [`crate::program`] finds in the
//! mounted image.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;
use wasm_common::kind::{Detected, detect};

use crate::layout::{Blobs, Checked, Found, bounded};
use crate::shown;

/// Beginning of the names that remove something of a lower layer (OCI image spec, layer.md).
const WHITEOUT: &[u8] = b".wh.";
/// The name that removes everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Most layers of an image.
const MAX_LAYERS: usize = 512;
/// Most entries of all layers.
const MAX_ENTRIES: usize = 500_000;
/// Most bytes of all names together.
const MAX_NAMES: usize = 64 << 20;
/// Longest name (Linux' PATH_MAX).
const MAX_NAME: usize = 4096;
/// Most bytes of all layers, unpacked.
const MAX_UNPACKED: u64 = 16 << 30;
/// Most links of one name (Linux' MAXSYMLINKS).
const MAX_LINKS: usize = 40;

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    Link(PathBuf),
    /// The content is that of an entry of a layer.
    File {
        layer: usize,
        entry: usize,
    },
    Other,
}

/// What is at a name, and the layer that has put it there.
#[derive(Debug, Clone)]
struct Node {
    layer: usize,
    kind: Kind,
}

/// The files of an image, by their names without a leading `/`.
#[derive(Debug, Default)]
struct Tree {
    nodes: BTreeMap<PathBuf, Node>,
    entries: usize,
    names: usize,
}

impl Tree {
    /// Where a name leads, whether there is something or not; `None` when it leads nowhere.
    fn resolve(&self, path: &Path) -> Option<PathBuf> {
        let mut open: Vec<PathBuf> = parts(path);
        let (mut at, mut links) = (PathBuf::new(), 0);
        while let Some(part) = open.pop() {
            if part.as_os_str() == ".." {
                at.pop();
                continue;
            }
            at.push(part);
            match self.nodes.get(&at).map(|node| &node.kind) {
                Some(Kind::Link(to)) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    at.pop();
                    if to.is_absolute() {
                        at.clear();
                    }
                    open.extend(parts(to));
                }
                Some(Kind::Directory) | None => {}
                Some(_) if open.is_empty() => {}
                Some(_) => return None,
            }
        }
        Some(at)
    }

    /// Everything below a directory.
    fn below(&self, dir: &Path) -> Vec<PathBuf> {
        let all = self.nodes.range(dir.to_owned()..).map(|(path, _)| path);
        let all = all.take_while(|path| path.starts_with(dir));
        all.filter(|path| path.as_path() != dir).cloned().collect()
    }

    /// Removes what lower layers have below a directory, and the directory itself where it is said.
    fn remove(&mut self, dir: &Path, itself: bool, layer: usize) {
        for path in self.below(dir).into_iter().chain(itself.then(|| dir.to_owned())) {
            if self.nodes.get(&path).is_some_and(|node| node.layer < layer) {
                self.nodes.remove(&path);
            }
        }
    }

    fn put(&mut self, path: PathBuf, node: Node) {
        let both =
            |old: &Node| matches!((&old.kind, &node.kind), (Kind::Directory, Kind::Directory));
        if self.nodes.get(&path).is_some_and(|old| !both(old)) {
            for below in self.below(&path) {
                self.nodes.remove(&below);
            }
        }
        self.nodes.insert(path, node);
    }

    /// Takes one entry of a layer.
    fn take(&mut self, name: &Path, kind: Kind, layer: usize) -> Result<(), String> {
        self.entries += 1;
        self.names += name.as_os_str().len();
        if self.entries > MAX_ENTRIES || self.names > MAX_NAMES {
            return Err("it has too many files".into());
        }
        let wrong = || format!("{} is no name of a file of an image", shown(name.as_os_str()));
        if name.as_os_str().len() > MAX_NAME
            || name.components().any(|part| part == Component::ParentDir)
        {
            return Err(wrong());
        }
        // The root itself.
        let Some(last) = name.file_name() else { return Ok(()) };
        let parent = name.parent().unwrap_or(Path::new(""));
        let parent = self.resolve(parent).ok_or_else(wrong)?;
        if last.as_bytes() == OPAQUE {
            self.remove(&parent, false, layer);
            return Ok(());
        }
        if let Some(gone) = last.as_bytes().strip_prefix(WHITEOUT) {
            let gone = OsStr::from_bytes(gone);
            if gone.is_empty() || gone == "." || gone == ".." {
                return Err(wrong());
            }
            self.remove(&parent.join(gone), true, layer);
            return Ok(());
        }
        self.put(parent.join(last), Node { layer, kind });
        Ok(())
    }

    /// The file at a name.
    fn file(&self, path: &Path) -> Option<(usize, usize)> {
        match self.nodes.get(&self.resolve(path)?)?.kind {
            Kind::File { layer, entry } => Some((layer, entry)),
            _ => None,
        }
    }
}

/// The parts of a path, the last one first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let usable = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::ParentDir);
    let parts = path.components().filter(usable).map(|part| PathBuf::from(part.as_os_str()));
    parts.rev().collect()
}

/// The bytes of a layer, whatever they are compressed with.
fn decompressed<'a>(blob: &'a mut dyn Read) -> Result<Box<dyn Read + 'a>, String> {
    let mut blob = BufReader::with_capacity(64 << 10, blob);
    let magic = blob.fill_buf().map_err(|error| error.to_string())?;
    Ok(match magic {
        // RFC 1952 and RFC 8878: the formats' own first bytes.
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(
            ruzstd::decoding::StreamingDecoder::new(blob)
                .map_err(|error| format!("zstd: {error}"))?,
        ),
        _ => Box::new(blob),
    })
}

/// Reads a layer, entry by entry until one answers something; compares its digest.
fn each<T>(
    blobs: &dyn Blobs,
    layer: &Value,
    left: &mut u64,
    mut entry: impl FnMut(usize, &mut tar::Entry<'_, &mut dyn Read>) -> Result<Option<T>, String>,
) -> Result<Option<T>, String> {
    let wrong = |error: std::io::Error| format!("a layer: {error}");
    let mut blob = Checked::open(blobs, layer)?;
    let mut found = None;
    {
        let mut files = decompressed(&mut blob)?.take(*left);
        let mut tar = tar::Archive::new(&mut files as &mut dyn Read);
        for (n, file) in tar.entries().map_err(wrong)?.enumerate() {
            found = entry(n, &mut file.map_err(wrong)?)?;
            if found.is_some() {
                break;
            }
        }
        *left = files.limit();
        if *left == 0 {
            return Err(format!("its layers have more than {MAX_UNPACKED} bytes"));
        }
    }
    blob.finish()?;
    Ok(found)
}

/// The first of `places` that is a file of the image, which is to be a module or a component of at most `max` bytes.
pub(crate) fn find(
    blobs: &dyn Blobs,
    layers: &[Value],
    places: &[PathBuf],
    max: u64,
) -> Result<Found, String> {
    if layers.len() > MAX_LAYERS {
        return Err(format!("it has more than {MAX_LAYERS} layers"));
    }
    let mut tree = Tree::default();
    let mut left = MAX_UNPACKED;
    for (layer, descriptor) in layers.iter().enumerate() {
        let none: Option<()> = each(blobs, descriptor, &mut left, |entry, file| {
            let wrong = |error: std::io::Error| format!("a layer: {error}");
            let name = file.path().map_err(wrong)?.into_owned();
            let to = file.link_name().map_err(wrong)?.map(|to| to.into_owned());
            let kind = match (file.header().entry_type(), to) {
                (tar::EntryType::Directory, _) => Kind::Directory,
                (tar::EntryType::Symlink, Some(to)) if to.as_os_str().len() <= MAX_NAME => {
                    Kind::Link(to)
                }
                (tar::EntryType::Link, Some(to)) => {
                    let to = tree.resolve(&to).and_then(|to| tree.nodes.get(&to));
                    to.map_or(Kind::Other, |node| node.kind.clone())
                }
                (tar::EntryType::Regular | tar::EntryType::Continuous, _) => {
                    Kind::File { layer, entry }
                }
                _ => Kind::Other,
            };
            tree.take(&name, kind, layer)?;
            Ok(None)
        })?;
        debug_assert!(none.is_none(), "every entry is looked at");
    }
    let found = places.iter().find_map(|path| Some((path, tree.file(path)?)));
    let Some((path, (layer, wanted))) = found else {
        let names: Vec<String> = places.iter().map(|path| shown(path.as_os_str())).collect();
        return Err(format!("its entrypoint is not in the image: {:.400}", names.join(", ")));
    };
    let name = shown(path.as_os_str());
    let descriptor = layers.get(layer).ok_or("there is no such layer")?;
    let bytes = each(blobs, descriptor, &mut left, |n, file| {
        if n != wanted {
            return Ok(None);
        }
        let bytes =
            bounded(file, max).map_err(|error| format!("{name}: {error} (compiler.max_module)"))?;
        Ok(Some(bytes))
    })?;
    let bytes = bytes.ok_or_else(|| format!("{name} is in no layer"))?;
    match detect(&bytes) {
        Detected::Wasm(_) => Ok(Found { path: path.clone(), bytes }),
        what => Err(format!("its entrypoint {name} is no module and no component: {what:?}")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::Write;

    use serde_json::json;
    use sha2::{Digest, Sha256};
    use tar::EntryType;

    use kuasar_host::hex;

    use super::*;
    use crate::layout::program;

    const MODULE: &[u8] = b"\0asm\x01\0\0\0";
    const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

    /// Blobs by digest.
    #[derive(Default)]
    struct Shelf(HashMap<String, Vec<u8>>);

    impl Shelf {
        fn put(&mut self, bytes: &[u8]) -> Value {
            let digest = format!("sha256:{}", hex(&Sha256::digest(bytes)));
            self.0.insert(digest.clone(), bytes.to_vec());
            json!({ "digest": digest })
        }

        /// An image with this configuration and these layers.
        fn image(&mut self, config: &Value, layers: &[Vec<u8>]) -> Vec<Value> {
            let layers: Vec<Value> = layers.iter().map(|layer| self.put(layer)).collect();
            let config = self.put(json!({ "config": config }).to_string().as_bytes());
            let manifest = json!({ "config": config, "layers": layers });
            vec![self.put(manifest.to_string().as_bytes())]
        }
    }

    impl Blobs for Shelf {
        fn open(&self, digest: &str) -> Result<Box<dyn Read + '_>, String> {
            Ok(Box::new(self.0.get(digest).ok_or("no such blob")?.as_slice()))
        }
    }

    type File<'a> = (&'a str, EntryType, &'a [u8]);
    const FILE: EntryType = EntryType::Regular;
    const DIRECTORY: EntryType = EntryType::Directory;
    const LINK: EntryType = EntryType::Symlink;

    /// A layer with these files; names are taken as they are.
    fn archive(files: &[File<'_>]) -> Vec<u8> {
        let mut all = tar::Builder::new(Vec::new());
        for (name, kind, bytes) in files {
            let link = matches!(kind, EntryType::Symlink | EntryType::Link);
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(if link { 0 } else { bytes.len() as u64 });
            // The crate would refuse bad names.
            let raw = header.as_gnu_mut().unwrap();
            raw.name[..name.len()].copy_from_slice(name.as_bytes());
            if link {
                raw.linkname[..bytes.len()].copy_from_slice(bytes);
            }
            header.set_cksum();
            all.append(&header, if link { &[] } else { *bytes }).unwrap();
        }
        all.into_inner().unwrap()
    }

    fn of(config: &Value, layers: &[&[File<'_>]]) -> Result<Found, String> {
        let layers: Vec<Vec<u8>> = layers.iter().map(|files| archive(files)).collect();
        let mut shelf = Shelf::default();
        let image = shelf.image(config, &layers);
        program(&shelf, &image, 1000)
    }

    #[test]
    fn the_entrypoint_is_found_as_in_a_mounted_image() {
        let files: &[File<'_>] = &[
            ("./app/", DIRECTORY, b""),
            ("app/m.wasm", FILE, MODULE),
            ("up.wasm", LINK, b"../../app/m.wasm"),
            ("absolute", LINK, b"/app"),
            ("bin", LINK, b"absolute"),
            ("hard.wasm", EntryType::Link, b"app/m.wasm"),
        ];
        for config in [
            json!({ "Entrypoint": ["/app/m.wasm"] }),
            json!({ "Cmd": ["m.wasm"], "WorkingDir": "/app" }),
            json!({ "Entrypoint": ["./m.wasm"], "WorkingDir": "/absolute" }),
            json!({ "Entrypoint": ["m.wasm"], "Env": ["PATH=/no:/bin"] }),
            json!({ "Entrypoint": ["m.wasm"] }),
            json!({ "Entrypoint": ["/up.wasm", "argument"] }),
            json!({ "Entrypoint": ["hard.wasm"] }),
        ] {
            let found = of(&config, &[files]).unwrap_or_else(|error| panic!("{config}: {error}"));
            assert_eq!(found.bytes, MODULE, "{config}");
        }
    }

    #[test]
    fn an_upper_layer_has_the_last_word() {
        let config = json!({ "Entrypoint": ["/app/m.wasm"] });
        let lower: &[File<'_>] = &[("app/m.wasm", FILE, MODULE), ("other/o.wasm", FILE, COMPONENT)];
        let bytes = |upper: &[File<'_>]| of(&config, &[lower, upper]).map(|found| found.bytes);
        assert_eq!(bytes(&[("app/m.wasm", FILE, COMPONENT)]).unwrap(), COMPONENT);
        assert_eq!(bytes(&[("app/n.wasm", FILE, COMPONENT)]).unwrap(), MODULE);
        // A directory that is a link from now on, and a name that is no directory any more.
        assert_eq!(
            bytes(&[("app", LINK, b"other"), ("other/m.wasm", FILE, COMPONENT)]).unwrap(),
            COMPONENT
        );
        for gone in [
            &[("app/.wh.m.wasm", FILE, &b""[..])][..],
            &[(".wh.app", FILE, b"")],
            &[("app/.wh..wh..opq", FILE, b"")],
            &[(".wh..wh..opq", FILE, b"")],
            &[("app", FILE, b"")],
        ] {
            let error = bytes(gone).unwrap_err();
            assert!(error.contains("not in the image"), "{gone:?}: {error}");
        }
        // What removes, removes what lower layers have, wherever it stands among its layer's own.
        for own in [
            &[("app/m.wasm", FILE, COMPONENT), ("app/.wh..wh..opq", FILE, b"")][..],
            &[("app/.wh..wh..opq", FILE, b""), ("app/m.wasm", FILE, COMPONENT)],
            &[("app/m.wasm", FILE, COMPONENT), (".wh.app", FILE, b"")],
        ] {
            assert_eq!(bytes(own).unwrap(), COMPONENT, "{own:?}");
        }
    }

    #[test]
    fn layers_are_read_whatever_they_are_compressed_with_and_compared_with_their_digest() {
        let plain = archive(&[("m.wasm", FILE, MODULE)]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(
            plain.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        let config = json!({ "Entrypoint": ["/m.wasm"] });
        for layer in [plain, gzip, zstd] {
            let mut shelf = Shelf::default();
            let image = shelf.image(&config, std::slice::from_ref(&layer));
            assert_eq!(program(&shelf, &image, 1000).unwrap().bytes, MODULE);
            let error = program(&shelf, &image, 7).unwrap_err();
            assert!(error.contains("compiler.max_module"), "{error}");
            let digest = format!("sha256:{}", hex(&Sha256::digest(&layer)));
            // Behind the archive's end, which no reader of it would look at.
            shelf.0.get_mut(&digest).unwrap().push(0);
            let error = program(&shelf, &image, 1000).unwrap_err();
            assert!(error.contains("another one than its name says"), "{error}");
        }
    }

    #[test]
    fn what_is_no_program_is_said_so() {
        let said = |config: Value, files: &[File<'_>]| of(&config, &[files]).unwrap_err();
        let files: &[File<'_>] = &[
            ("text", FILE, b"text"),
            ("loop", LINK, b"loop"),
            ("dir/", DIRECTORY, b""),
            ("fifo", EntryType::Fifo, b""),
        ];
        assert!(said(json!({}), files).contains("no entrypoint"));
        assert!(said(json!({ "Cmd": ["/text"] }), files).contains("no module"));
        for name in ["/loop", "/dir", "/fifo", "/text/below", "/none"] {
            let error = said(json!({ "Cmd": [name] }), files);
            assert!(error.contains("not in the image"), "{name}: {error}");
        }
        let outside: &[File<'_>] = &[("../m.wasm", FILE, MODULE)];
        assert!(said(json!({ "Cmd": ["/m.wasm"] }), outside).contains("no name of a file"));
    }
}
