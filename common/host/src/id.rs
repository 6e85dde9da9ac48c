//! Ids of sandboxes, containers and execs. They become file names, so they are checked once, at
//! the border.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Longest id, in bytes. Kubernetes' are 64; some engines add a prefix.
pub const MAX_ID: usize = 128;

/// Checks an id: 1 to [`MAX_ID`] bytes, a letter or digit, then letters, digits, `_`, `.`, `-`.
///
/// # Errors
/// [`Error::Invalid`] with a text that says what is wrong; a long id is not repeated in it.
pub fn check<'a>(kind: &str, id: &'a str) -> Result<&'a str> {
    if id.is_empty() || id.len() > MAX_ID {
        return Err(Error::Invalid(format!(
            "{kind} id has {} bytes; 1 to {MAX_ID} are allowed",
            id.len()
        )));
    }
    let first = id.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    if !first || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        return Err(Error::Invalid(format!(
            "{kind} id {id:?} is not allowed: use letters, digits, '_', '.' and '-', and begin \
             with a letter or digit"
        )));
    }
    Ok(id)
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and takes an id; see [`check`].
            ///
            /// # Errors
            /// [`Error::Invalid`].
            pub fn new(id: impl Into<String>) -> Result<Self> {
                let id = id.into();
                check($kind, &id)?;
                Ok(Self(id))
            }

            /// The id as text; safe as one component of a path.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<std::path::Path> for $name {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                Self::new(s)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(s: String) -> Result<Self> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

id!(
    /// Id of a sandbox (pod).
    SandboxId,
    "sandbox"
);
id!(
    /// Id of a container, unique within its engine's namespace.
    ContainerId,
    "container"
);
id!(
    /// Id of a process started in a running container, unique within the container.
    ExecId,
    "exec"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_leave_a_directory_is_refused() {
        for bad in ["", ".", "..", "a/b", "/a", "-a", "a b", "a\0", &"x".repeat(10_000)] {
            assert!(check("sandbox", bad).is_err(), "{bad:?}");
        }
        for good in ["a", "0123abc", "a.b_c-d", &"f".repeat(64)] {
            assert_eq!(check("sandbox", good).unwrap(), good);
        }
    }

    #[test]
    fn a_stored_id_is_checked_again_when_it_is_read() {
        let id: SandboxId = serde_json::from_str("\"abc\"").unwrap();
        assert_eq!(id.to_string(), "abc");
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"abc\"");
        assert!(serde_json::from_str::<ContainerId>("\"../x\"").is_err());
        assert!("a/b".parse::<ExecId>().is_err());
    }
}
