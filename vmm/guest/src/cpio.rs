//! The archive that a kernel unpacks as its initramfs: cpio in the "newc" format (the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::{self, Write};

use crate::{Entry, Kind};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// Writes an archive; counts what it has written, for the padding.
pub(crate) struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    pub(crate) fn add(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        self.inode += 1;
        match entry.kind {
            Kind::Directory(mode) => {
                self.member(entry.path, self.inode, S_IFDIR | mode, 2, (0, 0), &[])
            }
            Kind::File(mode, content) => {
                self.member(entry.path, self.inode, S_IFREG | mode, 1, (0, 0), content)
            }
            Kind::Device(mode, major, minor) => {
                self.member(entry.path, self.inode, S_IFCHR | mode, 1, (major, minor), &[])
            }
        }
    }

    /// Ends the archive; gives back the writer and how many bytes it got. The length is a multiple of
    /// 512, as other writers of the format make it and some boot loaders want it.
    pub(crate) fn finish(mut self) -> io::Result<(W, u64)> {
        self.member("TRAILER!!!", 0, 0, 1, (0, 0), &[])?;
        self.pad(512)?;
        Ok((self.out, self.written))
    }

    fn member(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        links: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_large = |_| {
            io::Error::new(io::ErrorKind::InvalidInput, "more than 4 GiB in one archive member")
        };
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        // inode, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes(b"070701")?;
        for field in fields {
            self.bytes(format!("{field:08X}").as_bytes())?;
        }
        self.bytes(name.as_bytes())?;
        self.bytes(b"\0")?;
        self.pad(4)?;
        self.bytes(content)?;
        self.pad(4)
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, to: u64) -> io::Result<()> {
        while !self.written.is_multiple_of(to) {
            self.bytes(b"\0")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, device, content.
    type Member = (String, u32, (u32, u32), Vec<u8>);

    /// Reads an archive back.
    fn read(mut archive: &[u8]) -> Vec<Member> {
        let mut members = Vec::new();
        loop {
            let (head, _) = archive.split_at(110);
            assert_eq!(&head[..6], b"070701");
            let field = |i: usize| {
                u32::from_str_radix(std::str::from_utf8(&head[6 + 8 * i..14 + 8 * i]).unwrap(), 16)
                    .unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&archive[110..110 + name_size - 1]).unwrap().to_owned();
            let start = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return members;
            }
            members.push((
                name,
                field(1),
                (field(9), field(10)),
                archive[start..start + size].to_vec(),
            ));
            archive = &archive[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn an_archive_reads_back_as_it_was_written() {
        let mut archive = Archive::new(Vec::new());
        for entry in crate::entries(b"\x7fELF!", &[]) {
            archive.add(&entry).unwrap();
        }
        let (bytes, length) = archive.finish().unwrap();
        assert_eq!(bytes.len() as u64, length);
        assert_eq!(length % 512, 0);
        let members = read(&bytes);
        assert_eq!(members[0], ("dev".into(), 0o040_755, (0, 0), vec![]));
        assert_eq!(members[1], ("dev/console".into(), 0o020_600, (5, 1), vec![]));
        assert_eq!(members[3], ("init".into(), 0o100_755, (0, 0), b"\x7fELF!".to_vec()));
        assert_eq!(members[7], ("tmp".into(), 0o041_777, (0, 0), vec![]));
        assert_eq!(members.len(), 8);
    }
}
