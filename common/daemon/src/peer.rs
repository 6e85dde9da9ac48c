//! Who is at the other end of a unix socket.
//!
//! The socket's mode keeps others out; this check holds also when somebody has loosened it.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// Users that may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed(Vec<u32>);

impl Default for Allowed {
    fn default() -> Self {
        Self::with(&[])
    }
}

impl Allowed {
    /// Root, the daemon's own user, and these.
    pub fn with(uids: &[u32]) -> Self {
        let mut all = vec![0, nix::unistd::geteuid().as_raw()];
        all.extend_from_slice(uids);
        all.sort_unstable();
        all.dedup();
        Self(all)
    }

    /// Whether this user may connect.
    pub fn permits(&self, uid: u32) -> bool {
        self.0.contains(&uid)
    }

    /// Checks the process at the other end, as it was when it connected.
    ///
    /// # Errors
    /// `PermissionDenied` that names its uid and pid.
    pub fn check(&self, socket: &impl AsFd) -> io::Result<()> {
        let peer = getsockopt(&socket.as_fd(), PeerCredentials)?;
        if self.permits(peer.uid()) {
            return Ok(());
        }
        let text = format!("user {} (process {}) may not connect", peer.uid(), peer.pid());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_may_connect_and_strangers_may_not() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        Allowed::default().check(&a).unwrap();
        assert!(!Allowed::default().permits(4_000_000_001));
        assert!(Allowed::with(&[4_000_000_001]).permits(4_000_000_001));
        let nobody = Allowed(vec![]).check(&a).unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::PermissionDenied);
    }
}
