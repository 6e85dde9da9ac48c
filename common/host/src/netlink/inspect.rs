//! Routes and neighbours of a namespace, and the joining of two interfaces with tc.

use std::net::IpAddr;

use super::{Netlink, attributes, ip, u16_at, u32_at};
use crate::{Error, Result};

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteEntry {
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
pub struct NeighbourEntry {
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

impl Netlink {
    /// All routes of all tables.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn routes(&self) -> Result<Vec<RouteEntry>> {
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
    pub fn neighbours(&self) -> Result<Vec<NeighbourEntry>> {
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

fn parse_route(body: &[u8]) -> Option<RouteEntry> {
    let byte = |at: usize| body.get(at).copied();
    let prefix = byte(1)?;
    let mut route = RouteEntry {
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

fn parse_neighbour(body: &[u8]) -> Option<NeighbourEntry> {
    let (link, state) = (u32_at(body, 4)?, u16_at(body, 8)?);
    let find = |wanted: u16| attributes(body.get(12..)?).find(|(k, _)| *k == wanted);
    let address = find(libc::NDA_DST).and_then(|(_, v)| ip(v))?;
    let mac = find(libc::NDA_LLADDR).map(|(_, v)| v.to_vec()).unwrap_or_default();
    Some(NeighbourEntry { link, address, mac, state })
}
