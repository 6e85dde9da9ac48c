//! The guest's kernel as StratoVirt takes it.
//!
//! StratoVirt knows bzImages, and takes everything else for a flat binary: it puts that at 16 MiB
//! and begins with its first byte, in 64-bit mode. Given an ELF file it runs the header, and the
//! machine is gone at once without a word. So an ELF file is laid out here the way its program
//! headers say. Where a kernel has an entry for PVH, that is what comes first (Linux has it in
//! `.head.text`, as the 64-bit entry is), in 32-bit code that nobody calls here: a jump to the
//! 64-bit entry takes its place.
//!
//! All machines of one kernel share one file, beside their directories. A changed kernel makes
//! another, and the older one is removed: machines that run have read it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

use super::super::error::{Doing, Error, Result};

/// Where StratoVirt puts a flat binary, and begins (boot_loader/src/x86_64/mod.rs).
const START: u64 = 0x100_0000;
/// Largest kernel in memory.
const MOST: u64 = 256 << 20;
/// First letters of the names of our files.
const PREFIX: &str = "flat-";

/// A file that StratoVirt can start: `kernel` itself, or what was made of it in `dir`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] for an ELF file that is no kernel for this.
pub(super) fn usable(kernel: &Path, dir: &Path) -> Result<PathBuf> {
    let reading = || format!("read the kernel {}", kernel.display());
    let file = fs::File::open(kernel).doing(reading)?;
    let mut magic = [0; 4];
    let known = std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 0).is_ok();
    // aarch64's "Image" is flat already, and its ELF file is none that StratoVirt could be given.
    if !known || &magic != b"\x7fELF" || cfg!(not(target_arch = "x86_64")) {
        return Ok(kernel.to_owned());
    }
    let meta = file.metadata().doing(reading)?;
    let name = format!(
        "{PREFIX}{:x}-{:x}-{:x}-{:x}{:09}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    let path = dir.join(&name);
    if path.is_file() {
        return Ok(path);
    }
    let elf = fs::read(kernel).doing(reading)?;
    let flat = flat(&elf).map_err(|why| {
        Error::Invalid(format!(
            "stratovirt cannot start the kernel {}: {why}; give it a vmlinux, a bzImage or a flat \
             binary by [stratovirt] kernel",
            kernel.display()
        ))
    })?;
    // The jail shows it, read-only.
    kuasar_host::record::write_file(&path, &flat, 0o444)?;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let other = entry.file_name();
        let text = other.to_string_lossy();
        if text.starts_with(PREFIX) && !text.ends_with(".new") && *text != name {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(path)
}

/// Lays an ELF file out as it is in memory from [`START`] on.
fn flat(elf: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let broken = |e: object::Error| format!("as an ELF file it is broken ({e})");
    let header = FileHeader64::<Endianness>::parse(elf).map_err(broken)?;
    let endian = header.endian().map_err(broken)?;
    if header.e_machine.get(endian) != object::elf::EM_X86_64 {
        return Err("it is not for x86_64".into());
    }
    let entry = header.e_entry(endian);
    let mut all = Vec::new();
    let headers = header.program_headers(endian, elf).map_err(broken)?;
    for part in headers.iter().filter(|part| part.p_type(endian) == PT_LOAD) {
        let bytes = part.data(endian, elf).map_err(|()| "its parts are not in the file")?;
        let from = part.p_paddr(endian).checked_sub(START);
        let from = from.ok_or_else(|| format!("a part of it lies below {START:#x}"))?;
        // What is not in the file is zero in memory that nobody has used.
        let end = from.checked_add(bytes.len() as u64).filter(|end| *end <= MOST);
        let end = end.ok_or_else(|| format!("it takes more than {MOST} bytes"))?;
        let (from, end) = (from as usize, end as usize);
        if all.len() < end {
            all.resize(end, 0);
        }
        all.get_mut(from..end).ok_or("a part of it lies nowhere")?.copy_from_slice(bytes);
    }
    let to = entry.checked_sub(START).filter(|to| *to < all.len() as u64);
    match to.ok_or_else(|| format!("its entry {entry:#x} is in none of its parts"))? {
        0 => {}
        to => {
            // `jmp rel32`, counted from its end.
            let far = i32::try_from(to).ok().and_then(|to| to.checked_sub(5)).filter(|n| *n >= 0);
            let far = far.ok_or("there is no room before its entry")?;
            let jump = all.get_mut(..5).ok_or("it is too short")?;
            jump.copy_from_slice(&[&[0xe9][..], &far.to_le_bytes()].concat());
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file of two parts, 16 bytes at `START` and 4 bytes at `START` + 32.
    fn elf(entry: u64) -> Vec<u8> {
        let mut all = vec![0; 64];
        all[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        all[16..20].copy_from_slice(&[2, 0, 62, 0]);
        all[20] = 1;
        all[24..32].copy_from_slice(&entry.to_le_bytes());
        all[32] = 64;
        all[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
        for (offset, at, size) in [(176_u64, START, 16_u64), (192, START + 32, 4)] {
            all.extend([1, 0, 0, 0, 5, 0, 0, 0]);
            for value in [offset, 0, at, size, size + 8, 1] {
                all.extend(value.to_le_bytes());
            }
        }
        all.extend([0x90; 16]);
        all.extend([1, 2, 3, 4]);
        all
    }

    #[test]
    fn an_elf_file_becomes_what_is_in_memory_and_begins_at_its_entry() {
        let all = flat(&elf(START)).unwrap();
        assert_eq!(all.len(), 36);
        assert_eq!(&all[..16], &[0x90; 16]);
        assert_eq!(&all[16..32], &[0; 16]);
        assert_eq!(&all[32..], &[1, 2, 3, 4]);
        let all = flat(&elf(START + 12)).unwrap();
        assert_eq!(&all[..6], &[0xe9, 7, 0, 0, 0, 0x90]);
    }

    #[test]
    fn what_cannot_be_started_is_refused_with_its_reason() {
        assert!(flat(&elf(START + 2)).unwrap_err().contains("no room"));
        assert!(flat(&elf(START + 36)).unwrap_err().contains("entry"));
        assert!(flat(&elf(1)).unwrap_err().contains("entry"));
        let mut other = elf(START);
        other[18] = 183;
        assert!(flat(&other).unwrap_err().contains("x86_64"));
        let whole = elf(START);
        for end in 0..whole.len() {
            assert!(flat(&whole[..end]).is_err(), "{end}");
        }
        let mut far = elf(START);
        far[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(flat(&far).is_err());
    }

    #[test]
    fn one_file_is_made_of_a_kernel_and_another_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, flats) = (dir.path().join("vmlinux"), dir.path().join("vm"));
        fs::create_dir(&flats).unwrap();
        fs::write(&kernel, elf(START)).unwrap();
        let first = usable(&kernel, &flats).unwrap();
        assert_eq!(usable(&kernel, &flats).unwrap(), first);
        fs::write(&kernel, [elf(START), vec![0]].concat()).unwrap();
        let second = usable(&kernel, &flats).unwrap();
        assert_ne!(first, second);
        assert_eq!(fs::read_dir(&flats).unwrap().count(), 1);
        fs::write(&kernel, "a flat one").unwrap();
        assert_eq!(usable(&kernel, &flats).unwrap(), kernel);
        fs::write(&kernel, "\x7fELF and no more").unwrap();
        let error = usable(&kernel, &flats).unwrap_err();
        assert!(matches!(&error, Error::Invalid(text) if text.contains("[stratovirt] kernel")));
    }
}
