//! How much one linear memory may have, as it is now: the container's memory limit, which Update changes.
//!
//! The process sees neither its cgroup nor who changes that. So whoever changes it writes the limit down
//! with the process, as its RLIMIT_RSS, which the kernel has not looked at since 2.4.30 (getrlimit(2)), and which a
//! daemon that has been started anew finds as well. A module has no call that reaches it.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// Sets the limit of this process in bytes, 0 for none, unless it has been told another one meanwhile.
///
/// # Errors
/// When the kernel refuses it.
pub fn hold(bytes: u64) -> Result<(), String> {
    let set = || {
        let (told, most) = getrlimit(Resource::RLIMIT_RSS)?;
        if bytes == 0 || told != RLIM_INFINITY {
            return Ok(());
        }
        setrlimit(Resource::RLIMIT_RSS, bytes.min(most), most)
    };
    set().map_err(|error: nix::Error| format!("memory limit: {error}"))
}

/// Whether a linear memory may have so many bytes.
pub fn fits(bytes: usize) -> bool {
    // What cannot be asked holds nobody: the cgroup does.
    let limit = getrlimit(Resource::RLIMIT_RSS).map_or(RLIM_INFINITY, |(limit, _)| limit);
    bytes as u64 <= limit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_that_of_now() {
        hold(0).unwrap();
        assert!(fits(usize::MAX));
        hold(1000).unwrap();
        assert_eq!((fits(1000), fits(1001)), (true, false));
        // As the sandboxer tells it, and before the process itself has.
        let (_, most) = getrlimit(Resource::RLIMIT_RSS).unwrap();
        setrlimit(Resource::RLIMIT_RSS, 2000, most).unwrap();
        hold(1000).unwrap();
        assert_eq!((fits(2000), fits(2001)), (true, false));
    }
}
