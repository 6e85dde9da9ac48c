//! The clock and the random numbers of a guest that was just booted or restored.

use containerd_task::error::{Error, Result};
use nix::time::{ClockId, clock_gettime, clock_settime};

const SECOND: i128 = 1_000_000_000;

/// Guest's wall clock minus `host_ns`, in nanoseconds.
fn offset(host_ns: i64) -> Result<i128> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)
        .map_err(|error| Error::internal("read the clock", error))?;
    Ok(i128::from(now.tv_sec()) * SECOND + i128::from(now.tv_nsec()) - i128::from(host_ns))
}

/// Steps the clock to `host_ns`, forwards or backwards, unless it is within `tolerance_ns`.
/// Answers the offset before and whether it was stepped.
///
/// # Errors
/// [`Error::InvalidArgument`] for a time before 1970; the kernel's.
pub fn set(host_ns: i64, tolerance_ns: u64) -> Result<(i64, bool)> {
    if host_ns <= 0 {
        return Err(Error::InvalidArgument("the host's clock is before 1970".into()));
    }
    let offset = offset(host_ns)?;
    let shown = i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX });
    if offset.unsigned_abs() <= u128::from(tolerance_ns) {
        return Ok((shown, false));
    }
    let time = nix::sys::time::TimeSpec::new(host_ns / 1_000_000_000, host_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time)
        .map_err(|error| Error::internal("step the clock", error))?;
    Ok((shown, true))
}

/// Gives bytes that nobody can guess to the kernel's random number generator, credited, and has
/// it use them at once: two guests of one template must not draw the same numbers.
///
/// # Errors
/// [`Error::InvalidArgument`] for too few or too many bytes; the kernel's.
pub fn seed(entropy: &[u8]) -> Result<()> {
    use std::os::fd::AsRawFd;
    if !(16..=4096).contains(&entropy.len()) {
        return Err(Error::InvalidArgument("entropy has to be 16 to 4096 bytes".into()));
    }
    let failed = |error| Error::internal("seed the random number generator", error);
    let device = std::fs::OpenOptions::new().write(true).open("/dev/urandom").map_err(failed)?;
    // struct rand_pool_info of linux/random.h: bits, bytes, and the bytes themselves.
    let len = i32::try_from(entropy.len()).unwrap_or(0);
    let mut info = Vec::with_capacity(8 + entropy.len());
    info.extend_from_slice(&(len * 8).to_ne_bytes());
    info.extend_from_slice(&len.to_ne_bytes());
    info.extend_from_slice(entropy);
    // RNDADDENTROPY and RNDRESEEDCRNG of linux/random.h.
    let (add, reseed) = (0x4008_5203_u64, 0x5207_u64);
    // SAFETY: `info` is a whole rand_pool_info; the kernel only reads it.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), add as _, info.as_ptr()) };
    // SAFETY: no argument.
    if added != 0 || unsafe { libc::ioctl(device.as_raw_fd(), reseed as _) } != 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Bytes in hex.
///
/// # Errors
/// [`Error::InvalidArgument`].
pub fn from_hex(text: &str) -> Result<Vec<u8>> {
    let bad = || Error::InvalidArgument("not bytes in hex".into());
    if !text.len().is_multiple_of(2) || text.len() > 8192 {
        return Err(bad());
    }
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let pairs = text.as_bytes().chunks_exact(2);
    pairs
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect::<Option<_>>()
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_within_its_tolerance_is_left_alone() {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
        let now = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
        for shift in [-3_000_000_000, 0, 3_000_000_000] {
            let (offset, stepped) = set(now + shift, 60_000_000_000).unwrap();
            assert!(!stepped && (offset + shift).abs() < 1_000_000_000, "{offset}");
        }
        assert!(set(-1, 0).is_err());
    }

    #[test]
    fn hex_is_read_or_refused() {
        assert_eq!(from_hex("00ffA0").unwrap(), [0, 255, 160]);
        for text in ["0", "0g", "é1", "+1"] {
            assert!(from_hex(text).is_err(), "{text}");
        }
        assert!(seed(&[0; 3]).is_err());
    }
}
