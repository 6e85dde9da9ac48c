//! Extended attributes of files that are open, however they were opened.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

use crate::safe_path::proc_path;

/// Most bytes of a list of names, and of a value, that Linux has (`limits.h`).
const MOST: usize = 64 << 10;

fn path(file: BorrowedFd<'_>) -> io::Result<CString> {
    CString::new(proc_path(file).as_os_str().as_bytes()).map_err(io::Error::other)
}

/// What a call has answered: a number of bytes, or an error.
fn answered(bytes: isize) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::Error::last_os_error())
}

/// The names of a file's attributes; none where its file system has no such thing.
///
/// # Errors
/// Of the kernel.
pub fn names(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let (path, mut list) = (path(file)?, vec![0_u8; MOST]);
    // SAFETY: the kernel reads a string that ends, and writes at most the length of the list.
    let n = unsafe { libc::listxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    match answered(n) {
        Ok(n) => list.truncate(n),
        Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

/// An attribute's value; nothing when the file has none of that name.
///
/// # Errors
/// Of the kernel.
pub fn get(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let (path, mut value) = (path(file)?, vec![0_u8; MOST]);
    let room = value.as_mut_ptr().cast();
    // SAFETY: as above; both strings end.
    let n = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), room, value.len()) };
    match answered(n) {
        Ok(n) => value.truncate(n),
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(Some(value))
}

/// Gives a file an attribute, or another value for it.
///
/// # Errors
/// Of the kernel, such as `ENOTSUP` of a file system that has none.
pub fn set(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = path(file)?;
    let from = value.as_ptr().cast();
    // SAFETY: the kernel reads two strings that end, and as many bytes as there are.
    let r = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), from, value.len(), 0) };
    answered(r as isize).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_was_set_is_there_also_by_a_descriptor_that_only_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_PATH);
        let file = options.read(true).open(&file).unwrap();
        match set(file.as_fd(), c"user.one", b"1\0\xff") {
            Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => {
                eprintln!("skipped: the file system of {} has no attributes", dir.path().display());
                return;
            }
            other => other.unwrap(),
        }
        set(file.as_fd(), c"user.none", b"").unwrap();
        let mut all = names(file.as_fd()).unwrap();
        all.retain(|name| name.to_bytes().starts_with(b"user."));
        all.sort();
        assert_eq!(all, [c"user.none".to_owned(), c"user.one".into()]);
        assert_eq!(get(file.as_fd(), c"user.one").unwrap().unwrap(), b"1\0\xff");
        assert_eq!(get(file.as_fd(), c"user.none").unwrap().unwrap(), b"");
        assert_eq!(get(file.as_fd(), c"user.other").unwrap(), None);
    }
}
