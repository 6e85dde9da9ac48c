//! Setting interfaces up: names, addresses, routes, neighbours (rtnetlink(7)).

use std::net::{IpAddr, Ipv4Addr};

use super::{Address, Netlink, attributes, u32_at};
use crate::{Error, Result};

pub(super) const ACK: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
const REPLACE: u16 = ACK | (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
/// Bytes of an interface's name with its null byte (`IFNAMSIZ`).
const NAME: usize = 16;
const ROUTE_HEADER: usize = 12;
/// `RTPROT_STATIC`: how routes that were asked for are told from the kernel's own.
const STATIC: u8 = 4;
const MAIN: u8 = 254;
const UNICAST: u8 = 1;
/// `RT_SCOPE_LINK` of rtnetlink.h.
const SCOPE_LINK: u8 = 253;
/// `NUD_PERMANENT` of linux/neighbour.h.
const PERMANENT: u16 = 0x80;

/// A route of the main table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// Destination and its prefix length; `None` is the default route.
    pub destination: Option<(IpAddr, u8)>,
    /// Gateway.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Index of the interface.
    pub link: u32,
    /// Metric; 0 leaves it to the kernel.
    pub metric: u32,
    /// `RT_SCOPE_*`; 0 for what fits: link without a gateway (IPv4), universe otherwise.
    pub scope: u8,
    /// `RTN_*`; 0 is unicast.
    pub kind: u8,
    /// `RTNH_F_*`, such as `RTNH_F_ONLINK`.
    pub flags: u32,
    /// Whether it is of IPv6, where no address says so.
    pub v6: bool,
}

impl Route {
    fn is_v6(&self) -> bool {
        let address = self.destination.map(|(a, _)| a).or(self.gateway).or(self.source);
        address.map_or(self.v6, |a| a.is_ipv6())
    }
}

/// An entry of the neighbour table (ARP, NDP).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// Index of the interface.
    pub link: u32,
    /// `NUD_*`; 0 is permanent.
    pub state: u16,
}

/// A request's body: a fixed header and attributes behind it.
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn address(&mut self, kind: u16, address: IpAddr) -> &mut Self {
        match address {
            IpAddr::V4(a) => self.attribute(kind, &a.octets()),
            IpAddr::V6(a) => self.attribute(kind, &a.octets()),
        }
    }
}

fn family(v6: bool) -> u8 {
    (if v6 { libc::AF_INET6 } else { libc::AF_INET }) as u8
}

pub(super) fn link_body(index: u32, flags: u32, change: u32) -> Body {
    let mut body = vec![0; 4];
    for word in [index, flags, change] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    Body(body)
}

/// What is said of, or asked for, an interface of that name.
///
/// # Errors
/// [`Error::Invalid`] for no name.
pub(super) fn named(index: u32, name: &str) -> Result<Body> {
    if name.is_empty() || name.len() >= NAME || name.contains(['/', '\0']) {
        return Err(Error::Invalid(format!("{name:.40?} is no name of a network interface")));
    }
    let mut body = link_body(index, 0, 0);
    body.attribute(libc::IFLA_IFNAME, format!("{name}\0").as_bytes());
    Ok(body)
}

fn address_body(a: &Address, nodad: bool) -> Body {
    // IFA_F_NODAD (2) fits the header's eight bits.
    let flags = if nodad && a.address.is_ipv6() { 2 } else { 0 };
    let mut body = vec![family(a.address.is_ipv6()), a.prefix, flags, a.scope];
    body.extend_from_slice(&a.link.to_ne_bytes());
    let mut body = Body(body);
    body.address(libc::IFA_LOCAL, a.address).address(libc::IFA_ADDRESS, a.address);
    if let IpAddr::V4(v4) = a.address
        && a.prefix < 31
    {
        let host = u32::MAX.checked_shr(a.prefix.into()).unwrap_or_default();
        let broadcast = Ipv4Addr::from(u32::from(v4) | host);
        body.attribute(libc::IFA_BROADCAST, &broadcast.octets());
    }
    body
}

fn route_body(r: &Route) -> Body {
    let v6 = r.is_v6();
    let scope = match r.scope {
        0 if !v6 && r.gateway.is_none() => SCOPE_LINK,
        given => given,
    };
    let kind = if r.kind == 0 { UNICAST } else { r.kind };
    let prefix = r.destination.map_or(0, |(_, prefix)| prefix);
    let mut body = vec![family(v6), prefix, 0, 0, MAIN, STATIC, scope, kind];
    body.extend_from_slice(&r.flags.to_ne_bytes());
    let mut body = Body(body);
    if let Some((to, _)) = r.destination {
        body.address(libc::RTA_DST, to);
    }
    if let Some(gateway) = r.gateway {
        body.address(libc::RTA_GATEWAY, gateway);
    }
    if let Some(source) = r.source {
        body.address(libc::RTA_PREFSRC, source);
    }
    body.attribute(libc::RTA_OIF, &r.link.to_ne_bytes());
    if r.metric != 0 {
        body.attribute(libc::RTA_PRIORITY, &r.metric.to_ne_bytes());
    }
    body
}

fn parse_route(body: &[u8]) -> Option<(u8, u8, Route)> {
    let (family, prefix) = (*body.first()?, *body.get(1)?);
    let (table, protocol, scope, kind) =
        (*body.get(4)?, *body.get(5)?, *body.get(6)?, *body.get(7)?);
    let v6 = i32::from(family) == libc::AF_INET6;
    let mut route = Route { scope, kind, flags: u32_at(body, 8)?, v6, ..Route::default() };
    for (kind, value) in attributes(body.get(ROUTE_HEADER..)?) {
        let address = super::ip(value);
        match kind {
            libc::RTA_DST => route.destination = address.map(|a| (a, prefix)),
            libc::RTA_GATEWAY => route.gateway = address,
            libc::RTA_PREFSRC => route.source = address,
            libc::RTA_OIF => route.link = u32_at(value, 0)?,
            libc::RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some((table, protocol, route))
}

impl Netlink {
    /// Sets an interface down.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_down(&self, index: u32) -> Result<()> {
        self.ask(libc::RTM_NEWLINK, ACK, &link_body(index, 0, libc::IFF_UP as u32).0, |_, _| {})
    }

    /// Renames an interface, which must be down on older kernels.
    ///
    /// # Errors
    /// [`Error::Io`] `EEXIST` when the name is taken; [`Error::Invalid`] for no name.
    pub fn rename(&self, index: u32, name: &str) -> Result<()> {
        self.ask(libc::RTM_NEWLINK, ACK, &named(index, name)?.0, |_, _| {})
    }

    /// Sets the largest packet, in bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        let mut body = link_body(index, 0, 0);
        body.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
        self.ask(libc::RTM_NEWLINK, ACK, &body.0, |_, _| {})
    }

    /// Sets the hardware address. Whether that needs the interface down is its driver's affair.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_mac(&self, index: u32, mac: &[u8]) -> Result<()> {
        let mut body = link_body(index, 0, 0);
        body.attribute(libc::IFLA_ADDRESS, mac);
        self.ask(libc::RTM_NEWLINK, ACK, &body.0, |_, _| {})
    }

    /// Adds an address, or leaves it as it is. With `nodad` an IPv6 address is usable at once,
    /// without a search for duplicates (RFC 4862).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_address(&self, address: &Address, nodad: bool) -> Result<()> {
        let body = address_body(address, nodad);
        self.ask(libc::RTM_NEWADDR, REPLACE, &body.0, |_, _| {})
    }

    /// Removes an address.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_address(&self, address: &Address) -> Result<()> {
        self.ask(libc::RTM_DELADDR, ACK, &address_body(address, false).0, |_, _| {})
    }

    /// Adds a route to the main table, or replaces the one with its destination and metric.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_route(&self, route: &Route) -> Result<()> {
        self.ask(libc::RTM_NEWROUTE, REPLACE, &route_body(route).0, |_, _| {})
    }

    /// Removes a route that [`Netlink::add_route`] made.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_route(&self, route: &Route) -> Result<()> {
        self.ask(libc::RTM_DELROUTE, ACK, &route_body(route).0, |_, _| {})
    }

    /// The routes that [`Netlink::add_route`] or another administrator made in the main table.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn static_routes(&self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        let dump = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        for v6 in [false, true] {
            let mut body = [0; ROUTE_HEADER];
            if let Some(first) = body.first_mut() {
                *first = family(v6);
            }
            self.ask(libc::RTM_GETROUTE, dump, &body, |kind, body| {
                if kind == libc::RTM_NEWROUTE
                    && let Some((MAIN, STATIC, route)) = parse_route(body)
                {
                    routes.push(route);
                }
            })?;
        }
        Ok(routes)
    }

    /// Adds or replaces an entry of the neighbour table.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_neighbour(&self, n: &Neighbour) -> Result<()> {
        let mut body = vec![family(n.address.is_ipv6()), 0, 0, 0];
        body.extend_from_slice(&n.link.to_ne_bytes());
        let state = if n.state == 0 { PERMANENT } else { n.state };
        body.extend_from_slice(&state.to_ne_bytes());
        body.extend_from_slice(&[0, UNICAST]);
        let mut body = Body(body);
        // NDA_DST and NDA_LLADDR of linux/neighbour.h.
        body.address(1, n.address).attribute(2, &n.mac);
        self.ask(libc::RTM_NEWNEIGH, REPLACE, &body.0, |_, _| {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::CloneFlags;

    #[test]
    fn a_route_is_read_as_it_was_written() {
        let route = Route {
            destination: Some(("10.1.0.0".parse().unwrap(), 16)),
            gateway: Some("10.0.0.1".parse().unwrap()),
            source: Some("10.0.0.2".parse().unwrap()),
            link: 7,
            metric: 100,
            kind: UNICAST,
            flags: 4,
            ..Route::default()
        };
        assert_eq!(parse_route(&route_body(&route).0), Some((MAIN, STATIC, route)));
        assert_eq!(parse_route(&[0; 5]), None);
    }

    #[test]
    fn an_interface_is_configured_and_configured_again() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let test = || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let netlink = Netlink::open().unwrap();
            // `lo` is the one interface that every kernel makes.
            let lo = netlink.link("lo").unwrap();
            netlink.set_down(lo.index).unwrap();
            netlink.rename(lo.index, "net1").unwrap();
            netlink.set_mtu(lo.index, 1400).unwrap();
            let mac = [2, 0, 0, 0, 0, 7];
            netlink.set_mac(lo.index, &mac).unwrap();
            netlink.set_up(lo.index).unwrap();
            for _ in 0..2 {
                for (address, prefix) in [("10.9.0.2", 24), ("fd00::2", 64)] {
                    let address = address.parse().unwrap();
                    let address = Address { link: lo.index, address, prefix, scope: 0 };
                    netlink.add_address(&address, true).unwrap();
                }
                let to = |ip: &str, prefix| Some((ip.parse().unwrap(), prefix));
                let plain =
                    Route { destination: to("10.9.9.0", 24), link: lo.index, ..Route::default() };
                netlink.add_route(&plain).unwrap();
                let via = Some("10.9.0.1".parse().unwrap());
                netlink
                    .add_route(&Route { gateway: via, link: lo.index, ..Route::default() })
                    .unwrap();
                let v6 =
                    Route { destination: to("fd01::", 64), link: lo.index, ..Route::default() };
                netlink.add_route(&v6).unwrap();
            }
            let link = netlink.link("net1").unwrap();
            assert!(link.is_up() && link.mtu == 1400 && link.mac == mac);
            let addresses = netlink.addresses().unwrap();
            assert!(addresses.iter().any(|a| a.address.to_string() == "fd00::2"));
            let routes = netlink.static_routes().unwrap();
            assert_eq!(routes.len(), 3, "{routes:?}");
            for route in &routes {
                netlink.remove_route(route).unwrap();
            }
            assert!(netlink.static_routes().unwrap().is_empty());
            for address in addresses.iter().filter(|a| a.scope == 0 && a.address.is_ipv4()) {
                netlink.remove_address(address).unwrap();
            }
            assert!(
                netlink.addresses().unwrap().iter().all(|a| a.address.to_string() != "10.9.0.2")
            );
            assert!(netlink.rename(link.index, "a-name-that-is-too-long").is_err());
        };
        std::thread::spawn(test).join().unwrap();
    }
}
