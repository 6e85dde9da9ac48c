//! The little of rtnetlink that sandboxers ask: which interfaces, addresses, routes and neighbours
//! a pod has, setting an interface up, and joining two of them with tc.
//!
//! Messages are read by hand (rtnetlink(7), linux/if_link.h, linux/if_addr.h): a request and a
//! walk over attributes are smaller than any library for them, and a short or odd answer is
//! skipped, never trusted.

mod configure;
mod inspect;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::CloneFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::{Context, Error, Result};
use configure::{ACK, link_body, named};
pub use configure::{Neighbour, Route};
pub use inspect::{NeighbourEntry, RouteEntry};

/// Index of `lo`: the first interface of each namespace (`LOOPBACK_IFINDEX` of net/flow.h in the kernel).
const LOOPBACK: u32 = 1;

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Index in its namespace.
    pub index: u32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// Hardware address; empty where the kind has none.
    pub mac: Vec<u8>,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// `IFF_*` flags; see [`Link::is_up`].
    pub flags: u32,
    /// `ARPHRD_*`: 1 is Ethernet.
    pub hardware: u16,
    /// Kind of a virtual interface (`veth`, `macvlan`, …); empty for others.
    pub kind: String,
    /// Counters since the interface was made.
    pub stats: LinkStats,
}

impl Link {
    /// Whether it has been set up.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }
}

/// Counters of an interface (`struct rtnl_link_stats64`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Bad packets received.
    pub rx_errors: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
    /// Packets dropped on arrival.
    pub rx_dropped: u64,
    /// Packets dropped before sending.
    pub tx_dropped: u64,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Index of the interface.
    pub link: u32,
    /// The address; of a point-to-point interface, the local one.
    pub address: IpAddr,
    /// Bits of the prefix.
    pub prefix: u8,
    /// `RT_SCOPE_*`: 0 global, 253 link, 254 host.
    pub scope: u8,
}

/// A socket in one network namespace.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
}

impl Netlink {
    /// A socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open() -> Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
            .context(|| "cannot open a netlink socket")?;
        let patience = nix::sys::time::TimeVal::new(5, 0);
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &patience)
            .context(|| "cannot bound a netlink socket")?;
        Ok(Self { fd })
    }

    /// A socket in another network namespace; it stays there whatever this thread does.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_in(netns: BorrowedFd<'_>) -> Result<Self> {
        crate::namespace::enter_on_thread(netns, CloneFlags::CLONE_NEWNET, Self::open)
    }

    /// All interfaces.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn links(&self) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        // struct ifinfomsg: 16 bytes.
        let dump = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        self.ask(libc::RTM_GETLINK, dump, &[0; 16], |kind, body| {
            if kind == libc::RTM_NEWLINK {
                links.extend(parse_link(body));
            }
        })?;
        Ok(links)
    }

    /// The interface of that name.
    ///
    /// # Errors
    /// [`Error::Io`] `ENODEV` when there is none; [`Error::Invalid`] for no name.
    pub fn link(&self, name: &str) -> Result<Link> {
        // Asked for by its name, not looked for among all: a host has one for each of its pods.
        let mut found = None;
        let none = || format!("no network interface {name:?}");
        let answer = self.ask(libc::RTM_GETLINK, ACK, &named(0, name)?.0, |kind, body| {
            if kind == libc::RTM_NEWLINK {
                found = parse_link(body);
            }
        });
        answer.map_err(|error| match error {
            Error::Io { source, .. } => Error::Io { context: none(), source },
            other => other,
        })?;
        // The kernel answers to alternative names, too.
        found
            .filter(|link| link.name == name)
            .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENODEV))
            .context(none)
    }

    /// All addresses of all interfaces.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn addresses(&self) -> Result<Vec<Address>> {
        let mut addresses = Vec::new();
        // struct ifaddrmsg: 8 bytes.
        let dump = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        self.ask(libc::RTM_GETADDR, dump, &[0; 8], |kind, body| {
            if kind == libc::RTM_NEWADDR {
                addresses.extend(parse_address(body));
            }
        })?;
        Ok(addresses)
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_up(&self, index: u32) -> Result<()> {
        let up = libc::IFF_UP as u32;
        self.ask(libc::RTM_NEWLINK, ACK, &link_body(index, up, up).0, |_, _| {})
    }

    /// Sets `lo` up.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_lo_up(&self) -> Result<()> {
        self.set_up(LOOPBACK)
    }

    fn ask(
        &self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> Result<()> {
        const HEADER: usize = 16;
        let context = || "netlink request failed";
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&flags.to_ne_bytes());
        request.extend_from_slice(&1u32.to_ne_bytes());
        request.extend_from_slice(&0u32.to_ne_bytes());
        request.extend_from_slice(body);
        send(self.fd.as_raw_fd(), &request, MsgFlags::empty()).context(context)?;
        let mut buf = vec![0u8; 64 << 10];
        loop {
            let n = recv(self.fd.as_raw_fd(), &mut buf, MsgFlags::empty()).context(context)?;
            let mut rest = buf.get(..n).unwrap_or_default();
            while let (Some(len), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
                let len = len as usize;
                let Some(body) = rest.get(HEADER..len) else { break };
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let errno = u32_at(body, 0).map_or(libc::EBADMSG, |e| -(e as i32));
                        return match errno {
                            0 => Ok(()),
                            e => Err(std::io::Error::from_raw_os_error(e)).context(context),
                        };
                    }
                    _ => each(kind, body),
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
            if n == 0 {
                return Err(Error::Invalid("netlink ended its answer early".into()));
            }
        }
    }
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(b.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(b.get(at..at + 8)?.try_into().ok()?))
}

/// Kind and value of each attribute.
fn attributes(mut b: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        // The two highest bits are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
        let (len, kind) = (u16_at(b, 0)? as usize, u16_at(b, 2)? & 0x3fff);
        let value = b.get(4..len)?;
        b = b.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        flags: u32_at(body, 8)?,
        hardware: u16_at(body, 2)?,
        ..Link::default()
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => {
                let name = value.split(|b| *b == 0).next().unwrap_or_default();
                link.name = String::from_utf8_lossy(name).into_owned();
            }
            libc::IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                let name = kind.and_then(|(_, name)| name.split(|b| *b == 0).next());
                link.kind = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
            }
            libc::IFLA_ADDRESS => link.mac = value.to_vec(),
            libc::IFLA_MTU => link.mtu = u32_at(value, 0).unwrap_or_default(),
            libc::IFLA_STATS64 => {
                let n = |i: usize| u64_at(value, i * 8).unwrap_or_default();
                link.stats = LinkStats {
                    rx_packets: n(0),
                    tx_packets: n(1),
                    rx_bytes: n(2),
                    tx_bytes: n(3),
                    rx_errors: n(4),
                    tx_errors: n(5),
                    rx_dropped: n(6),
                    tx_dropped: n(7),
                };
            }
            _ => {}
        }
    }
    Some(link)
}

fn ip(v: &[u8]) -> Option<IpAddr> {
    match v.len() {
        4 => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(v).ok()?))),
        16 => Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(v).ok()?))),
        _ => None,
    }
}

fn parse_address(body: &[u8]) -> Option<Address> {
    let (prefix, scope, link) = (*body.get(1)?, *body.get(3)?, u32_at(body, 4)?);
    let of =
        |wanted| attributes(body.get(8..)?).find(|(k, _)| *k == wanted).and_then(|(_, v)| ip(v));
    let address = of(libc::IFA_LOCAL).or_else(|| of(libc::IFA_ADDRESS))?;
    Some(Address { link, address, prefix, scope })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_asked_without_being_entered() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let ns = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            crate::namespace::open(std::path::Path::new("/proc/thread-self/ns/net")).unwrap()
        });
        let ns = ns.join().unwrap();
        let netlink = Netlink::open_in(std::os::fd::AsFd::as_fd(&ns)).unwrap();
        let lo = netlink.link("lo").unwrap();
        assert!(netlink.links().unwrap().contains(&lo));
        let none = netlink.link("nothing").unwrap_err().to_string();
        assert!(none.contains("no network interface \"nothing\""), "{none}");
        assert!(matches!(netlink.link("a name that is too long"), Err(Error::Invalid(_))));
        assert!(!lo.is_up() && lo.mtu == 65536 && lo.mac == [0; 6]);
        assert!(netlink.addresses().unwrap().is_empty());
        netlink.set_lo_up().unwrap();
        assert!(netlink.link("lo").unwrap().is_up());
        let addresses = netlink.addresses().unwrap();
        let local =
            Address { link: lo.index, address: Ipv4Addr::LOCALHOST.into(), prefix: 8, scope: 254 };
        assert!(addresses.contains(&local), "{addresses:?}");
        let e = netlink.set_up(9999).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ENODEV));
    }

    #[test]
    fn odd_messages_are_skipped() {
        assert_eq!(parse_link(&[1, 2, 3]), None);
        assert_eq!(parse_address(&[0; 8]), None);
        assert_eq!(attributes(&[255, 255, 0, 0]).count(), 0);
        assert_eq!(attributes(&[0, 0, 0, 0]).count(), 0);
    }
}
