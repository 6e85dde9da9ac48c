//! Digests, and the seal of a cache entry.
//!
//! The cache's directory is root's and 0700. That keeps others from writing, and does nothing
//! against a disk that fails, a backup of another machine, or a directory that was shared once.
//! So each entry has a seal: a keyed digest of its name and its content. The key is made when the
//! directory is, is readable by root alone, and goes nowhere.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use sha2::{Digest, Sha256};

/// A SHA-256.
pub type Sum = [u8; 32];

/// Digest of a file of at most `max` bytes, read from its beginning.
///
/// # Errors
/// When it cannot be read or is larger.
pub fn digest(file: &File, max: u64) -> std::io::Result<Sum> {
    use std::os::unix::fs::FileExt;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    loop {
        let length = file.read_at(&mut buffer, at)?;
        let Some(part) = buffer.get(..length).filter(|part| !part.is_empty()) else { break };
        hasher.update(part);
        at += length as u64;
        if at > max {
            return Err(std::io::Error::other(format!("it is larger than {max} bytes")));
        }
    }
    Ok(hasher.finalize().into())
}

/// What identifies a file's content without reading it: whoever changes a file changes its time of
/// change, which nobody can set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Of an open file.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// The same without the device, which is another one for each overlay mount.
    pub fn in_layers(self) -> Self {
        Self { device: 0, ..self }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The key of a cache.
pub struct Key(Sum);

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel has no random numbers.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// One that was kept.
    pub fn from_bytes(bytes: Sum) -> Self {
        Self(bytes)
    }

    /// To keep it.
    pub fn bytes(&self) -> &Sum {
        &self.0
    }

    /// The seal of an entry; two passes, as HMAC has them.
    pub fn seal(&self, name: &str, content: &Sum) -> Sum {
        let inner = Sha256::new()
            .chain_update([0x36; 32])
            .chain_update(self.0)
            .chain_update((name.len() as u64).to_le_bytes())
            .chain_update(name)
            .chain_update(content)
            .finalize();
        Sha256::new()
            .chain_update([0x5c; 32])
            .chain_update(self.0)
            .chain_update(inner)
            .finalize()
            .into()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use kuasar_host::hex;

    use super::*;

    #[test]
    fn a_digest_is_sha_256() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc").unwrap();
        let text = hex(&digest(&file, 3).unwrap());
        assert_eq!(text, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(digest(&file, 2).is_err());
    }

    #[test]
    fn a_seal_is_of_key_name_and_content() {
        let (a, b) = (Key::from_bytes([1; 32]), Key::from_bytes([2; 32]));
        let seal = a.seal("n", &[0; 32]);
        assert_eq!(seal, a.seal("n", &[0; 32]));
        assert_ne!(seal, b.seal("n", &[0; 32]));
        assert_ne!(seal, a.seal("m", &[0; 32]));
        assert_ne!(seal, a.seal("n", &[1; 32]));
    }
}
