//! The texts of a pod's `resolv.conf`, `hosts` and `hostname`.

/// `resolv.conf` for these servers, search domains and options; `None` when all are empty, which
/// means: take the host's (as containerd's own sandbox controller does).
pub fn resolv_conf(servers: &[String], searches: &[String], options: &[String]) -> Option<String> {
    if servers.is_empty() && searches.is_empty() && options.is_empty() {
        return None;
    }
    let mut text = String::new();
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    for s in servers {
        text.push_str(&format!("nameserver {s}\n"));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    Some(text)
}

/// Whether a value from a DNS configuration stays on its line.
pub fn is_plain(value: &str) -> bool {
    !value.is_empty() && !value.chars().any(|c| c.is_control() || c.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_what_was_asked_for() {
        let v = |s: &[&str]| s.iter().map(|s| (*s).to_string()).collect::<Vec<_>>();
        assert_eq!(resolv_conf(&[], &[], &[]), None);
        let text = resolv_conf(&v(&["10.0.0.1"]), &v(&["a.b", "c"]), &v(&["ndots:5"]));
        assert_eq!(text.unwrap(), "search a.b c\nnameserver 10.0.0.1\noptions ndots:5\n");
    }

    #[test]
    fn a_value_cannot_add_a_line() {
        assert!(!is_plain("8.8.8.8\nnameserver 6.6.6.6"));
        assert!(is_plain("8.8.8.8"));
    }
}
