//! Compiled code in memory: mapped from the cache's file, so that all containers of a module share
//! its pages.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use wasmtime::component::Component;
use wasmtime::{CustomCodeMemory, Engine, Module};

/// Makes mapped code executable.
pub struct Pages;

fn page() -> usize {
    // SAFETY: plain call.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

fn protect(ptr: *const u8, len: usize, protection: libc::c_int) -> wasmtime::Result<()> {
    // SAFETY: Wasmtime names whole pages of code that it owns; on failure nothing has changed.
    if unsafe { libc::mprotect(ptr.cast_mut().cast(), len, protection) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

impl CustomCodeMemory for Pages {
    fn required_alignment(&self) -> usize {
        page()
    }

    fn publish_executable(&self, ptr: *const u8, len: usize) -> wasmtime::Result<()> {
        protect(ptr, len, libc::PROT_READ | libc::PROT_EXEC)
    }

    fn unpublish_executable(&self, ptr: *const u8, len: usize) -> wasmtime::Result<()> {
        protect(ptr, len, libc::PROT_READ | libc::PROT_WRITE)
    }
}

/// A module's code. Its initial memory is mapped from the file, too.
pub fn module(engine: &Engine, file: File) -> wasmtime::Result<Module> {
    // SAFETY: the file is one that our compiler has written for this engine, which the sandboxer
    // has verified, and that nobody changes. Were it not, this process is confined like the
    // module that it stands for.
    unsafe { Module::deserialize_open_file(engine, file) }
}

/// A component's code. It stays mapped until the process ends.
pub fn component(engine: &Engine, file: &File) -> wasmtime::Result<Component> {
    let length = usize::try_from(file.metadata()?.len())?;
    wasmtime::ensure!(length > 0, "the compiled component is empty");
    // SAFETY: a new private mapping of a file that nobody changes.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    let start = NonNull::new(address.cast::<u8>())
        .ok_or_else(|| wasmtime::format_err!("the compiled component is mapped nowhere"))?;
    // SAFETY: as for a module; the mapping is never removed.
    unsafe { Component::deserialize_raw(engine, NonNull::slice_from_raw_parts(start, length)) }
}
