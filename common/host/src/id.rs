//! Ids of sandboxes, containers and execs. They become file names, so they are checked once, at
//! the border.

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
}
