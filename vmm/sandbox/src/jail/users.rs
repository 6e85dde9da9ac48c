//! Which user is which machine's.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The users that are taken, with the machine of each. What is durable of it is in the pods' records.
#[derive(Debug, Default)]
pub(crate) struct Users(Mutex<BTreeMap<u32, String>>);

impl Users {
    /// The user of machine `id`: the one it has, or else the lowest of `range` that nobody has.
    /// `None` when all are taken.
    pub fn take(&self, id: &str, (first, count): (u32, u32)) -> Option<u32> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((user, _)) = taken.iter().find(|(_, owner)| *owner == id) {
            return Some(*user);
        }
        let free = (first..first.saturating_add(count)).find(|user| !taken.contains_key(user))?;
        taken.insert(free, id.to_owned());
        Some(free)
    }

    /// `user` is that of machine `id`, as an earlier daemon has recorded.
    pub fn reserve(&self, id: &str, user: u32) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(user, id.to_owned());
    }

    /// The machine `from` is `to` from now on, which gives up the user that it had.
    pub fn hand_over(&self, from: &str, to: &str) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, owner| owner != to);
        taken.values_mut().filter(|owner| *owner == from).for_each(|owner| *owner = to.to_owned());
    }

    /// Nothing of machine `id` is left.
    pub fn release(&self, id: &str) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, owner| owner != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_machines_have_the_same_user() {
        let (users, range) = (Users::default(), (1000, 3));
        // An earlier daemon's; the range was another one then.
        users.reserve("old", 1001);
        users.reserve("older", 7);
        assert_eq!(users.take("a", range), Some(1000));
        assert_eq!(users.take("a", range), Some(1000));
        assert_eq!(users.take("b", range), Some(1002));
        assert_eq!(users.take("c", range), None);
        users.release("old");
        assert_eq!(users.take("c", range), Some(1001));
        assert_eq!(users.take("d", (u32::MAX - 1, 1)), Some(u32::MAX - 1));
        // The pod "a" takes the machine "b": its own user is free, and that of "b" is not.
        users.hand_over("b", "a");
        assert_eq!(users.take("a", range), Some(1002));
        assert_eq!(users.take("e", range), Some(1000));
        assert_eq!(users.take("b", range), None);
    }
}
