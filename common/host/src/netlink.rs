//! The little of rtnetlink that sandboxers ask: which interfaces, addresses, routes and neighbours
//! a pod has, setting an interface up, and joining two of them with tc.
//!
//! Messages are read by hand (rtnetlink(7), linux/if_link.h, linux/if_addr.h): a request and a
//! walk over attributes are smaller than any library for them, and a short or odd answer is
//! skipped, never trusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::CloneFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::{Context, Error, Result};

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

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// Destination and bits of its prefix; `None` is the default route.
    pub destination: Option<(IpAddr, u8)>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Index of the interface; 0 without one, and for several next hops.
    pub link: u32,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Priority; lower wins.
    pub metric: u32,
    /// `RT_TABLE_*`.
    pub table: u32,
    /// `RTPROT_*`: who made it. 2 is the kernel.
    pub protocol: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTN_*`: 1 is unicast.
    pub kind: u8,
    /// `RTM_F_*` and `RTNH_F_*`.
    pub flags: u32,
}

/// An entry of the neighbour table (ARP, NDP).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of the interface.
    pub link: u32,
    /// Address.
    pub address: IpAddr,
    /// Hardware address; empty while it is not known.
    pub mac: Vec<u8>,
    /// `NUD_*`: 0x80 is permanent.
    pub state: u16,
}

/// The chain of filters at which packets come in (`TC_H_CLSACT` with `TC_H_MIN_INGRESS`).
const INGRESS: u32 = 0xffff_fff2;
/// Parent of the `clsact` qdisc (`TC_H_CLSACT`).
const CLSACT: u32 = 0xffff_fff1;
/// Priority of our filters, by which they are told from others.
const PRIORITY: u32 = 0x4b53;

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
    /// [`Error::Io`] `ENODEV` when there is none.
    pub fn link(&self, name: &str) -> Result<Link> {
        self.links()?
            .into_iter()
            .find(|l| l.name == name)
            .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENODEV))
            .context(|| format!("no network interface {name:?}"))
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

    /// All routes of all tables.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn routes(&self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        let dump = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        // struct rtmsg: 12 bytes.
        self.ask(libc::RTM_GETROUTE, dump, &[0; 12], |kind, body| {
            if kind == libc::RTM_NEWROUTE {
                routes.extend(parse_route(body));
            }
        })?;
        Ok(routes)
    }

    /// All entries of the neighbour tables.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn neighbours(&self) -> Result<Vec<Neighbour>> {
        let mut neighbours = Vec::new();
        let dump = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        // struct ndmsg: 12 bytes.
        self.ask(libc::RTM_GETNEIGH, dump, &[0; 12], |kind, body| {
            if kind == libc::RTM_NEWNEIGH {
                neighbours.extend(parse_neighbour(body));
            }
        })?;
        Ok(neighbours)
    }

    /// Sets the largest packet of an interface, in bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        let mut body = vec![0u8; 4];
        body.extend(index.to_ne_bytes());
        body.extend([0; 8]);
        put(&mut body, libc::IFLA_MTU, &mtu.to_ne_bytes());
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.ask(libc::RTM_NEWLINK, flags, &body, |_, _| {})
    }

    /// Everything that comes in at `from` leaves through `to` from now on, whatever its protocol
    /// (`tc filter … u32 … action mirred egress redirect`). Idempotent: an older redirection of
    /// ours is replaced, filters of others stay and come first.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a kernel without `clsact`, `u32` or `mirred`; [`Error::Io`].
    pub fn redirect(&self, from: u32, to: u32) -> Result<()> {
        let missing = |error: Error| match error.errno() {
            Some(libc::ENOENT | libc::EOPNOTSUPP) => Error::Unsupported(
                "this kernel cannot redirect packets: it needs CONFIG_NET_SCH_INGRESS, \
                 CONFIG_NET_CLS_U32 and CONFIG_NET_ACT_MIRRED"
                    .into(),
            ),
            _ => error,
        };
        let new = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut qdisc = tcmsg(from, 0xffff_0000, CLSACT, 0);
        put(&mut qdisc, libc::TCA_KIND, b"clsact\0");
        match self.ask(libc::RTM_NEWQDISC, new as u16, &qdisc, |_, _| {}) {
            // `ingress` or `clsact` is there; the filter goes to either.
            Err(error) if error.errno() == Some(libc::EEXIST) => {}
            other => other.map_err(missing)?,
        }
        self.unredirect(from)?;
        let mut filter = tcmsg(from, 0, INGRESS, PRIORITY << 16 | all_protocols());
        put(&mut filter, libc::TCA_KIND, b"u32\0");
        put(&mut filter, libc::TCA_OPTIONS, &mirred(to));
        self.ask(libc::RTM_NEWTFILTER, new as u16, &filter, |_, _| {}).map_err(missing)
    }

    /// Takes a redirection of ours away. Nothing there is no error.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn unredirect(&self, from: u32) -> Result<()> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let filter = tcmsg(from, 0, INGRESS, PRIORITY << 16 | all_protocols());
        match self.ask(libc::RTM_DELTFILTER, flags, &filter, |_, _| {}) {
            // No filter, no qdisc, no interface.
            Err(error)
                if matches!(
                    error.errno(),
                    Some(libc::ENOENT | libc::EINVAL | libc::ENODEV | libc::EOPNOTSUPP)
                ) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Whether packets that come in at `from` are redirected by us.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_redirected(&self, from: u32) -> Result<bool> {
        let mut found = false;
        let dump = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        let asked = tcmsg(from, 0, INGRESS, 0);
        self.ask(libc::RTM_GETTFILTER, dump, &asked, |kind, body| {
            let info = u32_at(body, 16).unwrap_or_default();
            found |= kind == libc::RTM_NEWTFILTER && info >> 16 == PRIORITY;
        })?;
        Ok(found)
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_up(&self, index: u32) -> Result<()> {
        let up = libc::IFF_UP as u32;
        let mut body = [0u8; 16];
        for (at, word) in [(4, index), (8, up), (12, up)] {
            if let Some(b) = body.get_mut(at..at + 4) {
                b.copy_from_slice(&word.to_ne_bytes());
            }
        }
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.ask(libc::RTM_NEWLINK, flags, &body, |_, _| {})
    }

    /// Sets `lo` up.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_lo_up(&self) -> Result<()> {
        self.set_up(self.link("lo")?.index)
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

/// Adds an attribute.
fn put(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(((4 + value.len()) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// `struct tcmsg`.
fn tcmsg(link: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    for word in [link, handle, parent, info] {
        message.extend(word.to_ne_bytes());
    }
    message
}

/// `ETH_P_ALL` as tc wants it: network byte order in the low half.
fn all_protocols() -> u32 {
    u32::from((libc::ETH_P_ALL as u16).to_be())
}

/// Options of a `u32` filter that matches everything and redirects it (linux/pkt_cls.h,
/// linux/tc_act/tc_mirred.h).
fn mirred(to: u32) -> Vec<u8> {
    const TCA_U32_SEL: u16 = 5;
    const TCA_U32_ACT: u16 = 7;
    const TCA_ACT_KIND: u16 = 1;
    const TCA_ACT_OPTIONS: u16 = 2;
    const TCA_MIRRED_PARMS: u16 = 2;
    const TC_U32_TERMINAL: u8 = 1;
    const TC_ACT_STOLEN: u32 = 4;
    const TCA_EGRESS_REDIR: u32 = 1;
    // struct tc_u32_sel with one key, whose mask is zero.
    let mut selector = [0u8; 32];
    (selector[0], selector[2]) = (TC_U32_TERMINAL, 1);
    let mut parms = Vec::new();
    for word in [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to] {
        parms.extend(word.to_ne_bytes());
    }
    let mut options = Vec::new();
    put(&mut options, TCA_MIRRED_PARMS, &parms);
    let mut action = Vec::new();
    put(&mut action, TCA_ACT_KIND, b"mirred\0");
    put(&mut action, TCA_ACT_OPTIONS, &options);
    let mut actions = Vec::new();
    put(&mut actions, 1, &action);
    let mut all = Vec::new();
    put(&mut all, TCA_U32_SEL, &selector);
    put(&mut all, TCA_U32_ACT, &actions);
    all
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

fn parse_route(body: &[u8]) -> Option<Route> {
    let byte = |at: usize| body.get(at).copied();
    let prefix = byte(1)?;
    let mut route = Route {
        family: byte(0)?,
        destination: None,
        gateway: None,
        link: 0,
        source: None,
        metric: 0,
        table: byte(4)?.into(),
        protocol: byte(5)?,
        scope: byte(6)?,
        kind: byte(7)?,
        flags: u32_at(body, 8)?,
    };
    for (kind, value) in attributes(body.get(12..)?) {
        match kind {
            libc::RTA_DST => route.destination = Some((ip(value)?, prefix)),
            libc::RTA_GATEWAY => route.gateway = ip(value),
            libc::RTA_OIF => route.link = u32_at(value, 0)?,
            libc::RTA_PREFSRC => route.source = ip(value),
            libc::RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            libc::RTA_TABLE => route.table = u32_at(value, 0)?,
            // struct rtvia: an address of another family than the destination's.
            libc::RTA_VIA => route.gateway = ip(value.get(2..)?),
            _ => {}
        }
    }
    Some(route)
}

fn parse_neighbour(body: &[u8]) -> Option<Neighbour> {
    let (link, state) = (u32_at(body, 4)?, u16_at(body, 8)?);
    let find = |wanted: u16| attributes(body.get(12..)?).find(|(k, _)| *k == wanted);
    let address = find(libc::NDA_DST).and_then(|(_, v)| ip(v))?;
    let mac = find(libc::NDA_LLADDR).map(|(_, v)| v.to_vec()).unwrap_or_default();
    Some(Neighbour { link, address, mac, state })
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
