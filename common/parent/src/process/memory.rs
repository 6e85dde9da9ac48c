//! Memory that is reserved once and counts only when it is touched.
//!
//! This process never calls the allocator while it serves: an allocation that fails would abort
//! the one process that must not die, and a heap never gives its pages back. A [`Table`] is a
//! mapping of rows of which all-zero means "free"; an [`Arena`] is a mapping of byte strings
//! without gaps. Both give whole pages back when they shrink.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

const PAGE: usize = 4096;

/// Every mapping that was reserved: address and length.
static RESERVED: [[AtomicUsize; 2]; 16] = [const { [const { AtomicUsize::new(0) }; 2] }; 16];

/// Unmaps everything that was reserved, in a child that has no use for it.
///
/// # Safety
/// No table, arena, buffer, or borrow from one may be used any more.
pub unsafe fn give_up() {
    for [at, len] in &RESERVED {
        let (at, len) = (at.load(Ordering::Relaxed), len.load(Ordering::Relaxed));
        if at != 0 {
            // SAFETY: a mapping of ours that is not used any more, by contract.
            unsafe { libc::munmap(at as *mut _, len) };
        }
    }
}

/// A row of a [`Table`].
///
/// # Safety
/// All-zero bytes must be a valid value, and `is_free` must hold for it.
pub unsafe trait Row: Copy {
    /// Whether nothing is stored here.
    fn is_free(&self) -> bool;
}

fn reserve(len: usize) -> Result<*mut u8, i32> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping; nothing of ours is at that address.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len.max(1), prot, flags, -1, 0) };
    if p == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM));
    }
    if let Some([at, room]) =
        RESERVED.iter().find(|r| r.iter().all(|v| v.load(Ordering::Relaxed) == 0))
    {
        at.store(p as usize, Ordering::Relaxed);
        room.store(len.max(1), Ordering::Relaxed);
    }
    Ok(p.cast())
}

/// Gives the whole pages of `from..to` bytes behind `base` back; they read as zero again.
fn give_back(base: *mut u8, from: usize, to: usize) {
    let from = from.next_multiple_of(PAGE);
    if from < to {
        // SAFETY: the range lies in a mapping of ours, and its contents are not needed any more.
        unsafe { libc::madvise(base.add(from).cast(), to - from, libc::MADV_DONTNEED) };
    }
}

/// A buffer of its own mapping.
pub struct Buffer {
    base: *mut u8,
    len: usize,
}

impl Buffer {
    /// Reserves `len` bytes.
    pub fn new(len: usize) -> Result<Self, i32> {
        Ok(Self { base: reserve(len)?, len })
    }

    /// A part of it. The borrow is independent of `self`, so that a buffer may be filled from
    /// other parts of the structure that holds it.
    ///
    /// # Safety
    /// No other slice of this part may be alive.
    pub unsafe fn part(&self, part: &Range<usize>) -> &'static mut [u8] {
        if part.start > part.end || part.end > self.len {
            return &mut [];
        }
        // SAFETY: it lies in the mapping, which stays until the process ends; exclusive by
        // contract.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(part.start), part.len()) }
    }

    /// Gives the pages of a part back.
    pub fn trim(&self, part: Range<usize>) {
        give_back(self.base, part.start, part.end.min(self.len));
    }
}

/// Gives back what deeper calls have left below the stack pointer.
#[inline(never)]
pub fn trim_stack() {
    let here = 0u8;
    let here = std::hint::black_box(&raw const here) as usize;
    // The distance covers this frame, the red zone and the call below.
    let (from, to) = ((here - 64 * PAGE) & !(PAGE - 1), (here - 1024) & !(PAGE - 1));
    // SAFETY: nothing below the stack pointer is in use: one thread, no signal handlers. What is
    // not mapped in the range is left out by the kernel.
    unsafe { libc::madvise(from as *mut _, to - from, libc::MADV_DONTNEED) };
}

/// Gives back the pages of our own code. They stay in the page cache, and what an idle process
/// runs through comes back at once.
pub fn trim_text() {
    unsafe extern "C" {
        // Both are made by the linker; only their addresses mean anything.
        safe static __executable_start: u8;
        safe static etext: u8;
    }
    let from = (&raw const __executable_start) as usize & !(PAGE - 1);
    let to = (&raw const etext) as usize & !(PAGE - 1);
    if to > from {
        // SAFETY: a mapping of our own file that was never writable.
        unsafe { libc::madvise(from as *mut _, to - from, libc::MADV_DONTNEED) };
    }
}

/// Rows in one mapping; the lowest free one is used first.
pub struct Table<T> {
    base: *mut T,
    capacity: usize,
    /// All rows from here on are free.
    high: usize,
    /// No row below is free.
    low: usize,
    used: usize,
    rows: PhantomData<T>,
}

impl<T: Row> Table<T> {
    /// Reserves room for `capacity` rows.
    pub fn new(capacity: usize) -> Result<Self, i32> {
        let base = reserve(capacity.saturating_mul(size_of::<T>()))?.cast();
        Ok(Self { base, capacity, high: 0, low: 0, used: 0, rows: PhantomData })
    }

    fn rows(&self) -> &[T] {
        // SAFETY: the mapping holds `capacity >= high` rows; any bytes in it were zero or written
        // as `T`, both of which are valid; it is aligned to a page.
        unsafe { std::slice::from_raw_parts(self.base, self.high) }
    }

    fn rows_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `rows`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.high) }
    }

    /// Rows in use.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Indices of all rows that may be in use.
    pub fn indices(&self) -> Range<usize> {
        0..self.high
    }

    /// The row `i`, if it is in use.
    pub fn get(&self, i: usize) -> Option<&T> {
        self.rows().get(i).filter(|r| !r.is_free())
    }

    /// The row `i`, if it is in use.
    pub fn get_mut(&mut self, i: usize) -> Option<&mut T> {
        self.rows_mut().get_mut(i).filter(|r| !r.is_free())
    }

    /// All rows in use.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.rows().iter().enumerate().filter(|(_, r)| !r.is_free())
    }

    /// All rows in use.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut T)> {
        self.rows_mut().iter_mut().enumerate().filter(|(_, r)| !r.is_free())
    }

    /// Stores a row; `None` when the table is full.
    pub fn insert(&mut self, row: T) -> Option<usize> {
        let low = self.low;
        let free = self.rows().iter().skip(low).position(T::is_free).map_or(self.high, |i| i + low);
        if free >= self.capacity || row.is_free() {
            return None;
        }
        self.high = self.high.max(free + 1);
        *self.rows_mut().get_mut(free)? = row;
        self.low = free + 1;
        self.used += 1;
        Some(free)
    }

    /// Takes a row out.
    pub fn remove(&mut self, i: usize) -> Option<T> {
        let row = *self.get(i)?;
        // SAFETY: all-zero is a valid `T`.
        *self.rows_mut().get_mut(i)? = unsafe { std::mem::zeroed() };
        self.low = self.low.min(i);
        self.used -= 1;
        let was = self.high * size_of::<T>();
        while self.rows().last().is_some_and(T::is_free) {
            self.high -= 1;
        }
        give_back(self.base.cast(), self.high * size_of::<T>(), was);
        Some(row)
    }
}

/// A byte string in an [`Arena`]. All-zero is the empty one.
#[derive(Clone, Copy, Default)]
pub struct Text {
    at: u32,
    len: u16,
}

impl Text {
    /// From position and length.
    pub fn new(at: u32, len: u16) -> Self {
        Self { at, len }
    }

    /// Position and length.
    pub fn parts(self) -> (u32, u16) {
        (self.at, self.len)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Follows the removal of another text.
    pub fn shift(&mut self, removed: Text) {
        if self.len > 0 && self.at > removed.at {
            self.at -= u32::from(removed.len);
        }
    }
}

/// Byte strings behind each other, without gaps: removing one moves those behind it, so their
/// holders have to [`Text::shift`]. With a few hundred kilobytes at most that is microseconds.
pub struct Arena {
    base: *mut u8,
    capacity: usize,
    used: usize,
}

impl Arena {
    /// Reserves `capacity` bytes.
    pub fn new(capacity: usize) -> Result<Self, i32> {
        Ok(Self { base: reserve(capacity)?, capacity, used: 0 })
    }

    fn all(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has `capacity` bytes; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.capacity) }
    }

    /// Stores a copy; `None` when it is full or `bytes` are too many.
    pub fn store(&mut self, bytes: &[u8]) -> Option<Text> {
        let text =
            Text { at: u32::try_from(self.used).ok()?, len: u16::try_from(bytes.len()).ok()? };
        if bytes.is_empty() {
            return Some(Text::default());
        }
        let used = self.used;
        self.all().get_mut(used..used + bytes.len())?.copy_from_slice(bytes);
        self.used += bytes.len();
        Some(text)
    }

    /// The bytes of a text.
    pub fn get(&self, text: Text) -> &[u8] {
        // SAFETY: the first `used` bytes are initialised and part of the mapping.
        let all = unsafe { std::slice::from_raw_parts(self.base, self.used) };
        let at = text.at as usize;
        all.get(at..at + usize::from(text.len)).unwrap_or_default()
    }

    /// Removes a text. Every other text must be shifted by it.
    pub fn remove(&mut self, text: Text) {
        let (at, len, used) = (text.at as usize, usize::from(text.len), self.used);
        if len == 0 || at + len > used {
            return;
        }
        self.all().copy_within(at + len..used, at);
        self.used -= len;
        if self.used / PAGE != used / PAGE {
            give_back(self.base, self.used, used);
        }
    }
}
