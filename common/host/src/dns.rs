//! The texts of a pod's `resolv.conf`, `hosts` and `hostname`.

use crate::{Error, Result};

fn resolv_conf(servers: &[String], searches: &[String], options: &[String]) -> Option<String> {
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

/// Most search domains, and bytes of all with a blank between them, that Kubernetes allows.
pub const MAX_SEARCHES: (usize, usize) = (32, 2048);
/// Most servers that resolvers use; Kubernetes passes no more.
pub const MAX_SERVERS: usize = 3;

/// `resolv.conf` for these servers, search domains and options; `None` when all are empty, which
/// means: take the host's (as containerd's own sandbox controller does). Every value is checked:
/// each stays on its line, servers are IP addresses, and their number is within Kubernetes' bounds.
///
/// # Errors
/// [`Error::Invalid`] that names the value.
pub fn checked_resolv_conf(
    servers: &[String],
    searches: &[String],
    options: &[String],
) -> Result<Option<String>> {
    if servers.len() > MAX_SERVERS {
        return Err(Error::Invalid(format!(
            "DNS configuration has {} servers; {MAX_SERVERS} are allowed",
            servers.len()
        )));
    }
    let line = searches.iter().map(|s| s.len() + 1).sum::<usize>().saturating_sub(1);
    if searches.len() > MAX_SEARCHES.0 || line > MAX_SEARCHES.1 {
        return Err(Error::Invalid(format!(
            "DNS configuration has {} search domains of {line} bytes; {} of {} are allowed",
            searches.len(),
            MAX_SEARCHES.0,
            MAX_SEARCHES.1
        )));
    }
    for s in servers {
        // A zone may follow a link-local address.
        if s.split('%').next().unwrap_or_default().parse::<std::net::IpAddr>().is_err() {
            return Err(Error::Invalid(format!("DNS server {s:?} is no IP address")));
        }
    }
    for v in servers.iter().chain(searches).chain(options) {
        if !is_plain(v) {
            return Err(Error::Invalid(format!("DNS value {v:?} is not one word")));
        }
    }
    Ok(resolv_conf(servers, searches, options))
}

/// The host's `resolv.conf` as a pod gets it. A server on the loopback means nothing in a pod's
/// network namespace, so where systemd-resolved's stub is all there is, its upstream list is taken.
pub fn host_resolv_conf() -> String {
    use std::io::Read;
    let read = |path: &str| {
        let mut text = String::new();
        let file = std::fs::File::open(path).ok()?;
        file.take(64 << 10).read_to_string(&mut text).ok()?;
        Some(text)
    };
    let text = read("/etc/resolv.conf").unwrap_or_default();
    if only_stub(&text) {
        return read("/run/systemd/resolve/resolv.conf").unwrap_or(text);
    }
    text
}

fn only_stub(text: &str) -> bool {
    let mut servers = text.lines().filter_map(|l| l.trim().strip_prefix("nameserver")).peekable();
    servers.peek().is_some() && servers.all(|s| matches!(s.trim(), "127.0.0.53" | "127.0.0.54"))
}

/// `hosts` of a pod for which the engine brings none.
pub fn hosts(hostname: &str, addresses: &[std::net::IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    if is_plain(hostname) {
        for a in addresses {
            text.push_str(&format!("{a}\t{hostname}\n"));
        }
    }
    text
}

/// `hostname` file of a pod.
///
/// # Errors
/// [`Error::Invalid`] for what the kernel or resolvers would not take.
pub fn hostname(name: &str) -> Result<String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    // HOST_NAME_MAX of Linux.
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(Error::Invalid(format!(
            "hostname of {} bytes is not allowed: use 1 to 64 letters, digits, '-', '.'",
            name.len()
        )));
    }
    Ok(format!("{name}\n"))
}

/// Whether a value from a DNS configuration stays on its line.
fn is_plain(value: &str) -> bool {
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

    #[test]
    fn a_dns_configuration_is_within_bounds() {
        let v = |s: &str, n| vec![s.to_string(); n];
        assert!(checked_resolv_conf(&v("1.1.1.1", 3), &v("a", 32), &[]).unwrap().is_some());
        assert!(checked_resolv_conf(&v("fe80::1%eth0", 1), &[], &[]).is_ok());
        // 2048 bytes, as kubelet counts them.
        let (most, more) = ([v(&"a".repeat(1023), 1), v(&"b".repeat(1024), 1)], v("c", 1));
        assert!(checked_resolv_conf(&[], &most.concat(), &[]).is_ok());
        assert!(checked_resolv_conf(&[], &[most.concat(), more].concat(), &[]).is_err());
        for bad in [
            checked_resolv_conf(&v("1.1.1.1", 4), &[], &[]),
            checked_resolv_conf(&v("dns.example", 1), &[], &[]),
            checked_resolv_conf(&[], &v("a", 33), &[]),
            checked_resolv_conf(&[], &v("a b", 1), &[]),
            checked_resolv_conf(&[], &[], &v("x\ny", 1)),
            checked_resolv_conf(&v("1.1.1.1%a\nb", 1), &[], &[]),
        ] {
            assert!(bad.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_stub_on_the_loopback_is_recognised() {
        assert!(only_stub("# x\nnameserver 127.0.0.53\noptions edns0\n"));
        assert!(!only_stub("nameserver 127.0.0.53\nnameserver 10.0.0.1\n"));
        assert!(!only_stub(""));
    }

    #[test]
    fn hosts_and_hostname() {
        let text = hosts("web", &["10.0.0.5".parse().unwrap()]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n") && text.ends_with("10.0.0.5\tweb\n"));
        assert_eq!(hostname("web-0").unwrap(), "web-0\n");
        assert!(hostname("a\nb").is_err() && hostname("").is_err());
    }
}
