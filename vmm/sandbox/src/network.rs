//! The pod's network, handed through to the guest.
//!
//! CNI has put interfaces into the pod's network namespace before the machine is made. Each
//! Ethernet interface gets a tap device beside it, and two tc filters join the two: what comes in
//! at one leaves through the other. The guest gets the interface's MAC address, MTU, addresses,
//! routes and permanent neighbours, so for the rest of the network it *is* that interface. The
//! interface itself stays where it is with its counters, which are the pod's network statistics.
//!
//! This works alike for every kind of Ethernet interface: `veth` (bridge, ptp, Calico, Cilium, …),
//! `macvlan`, `macvtap`, `ipvlan` in L2 mode, SR-IOV functions and other physical interfaces. What comes
//! in at a `macvtap` is for its character device; tc's filters see it before that, and send it to the tap,
//! so every VMM can have it, those too that open a tap by name. Refused are an `ipvlan` that routes (L3),
//! and a pod whose interfaces are not Ethernet. An `ipvlan` has the MAC address of what it lies on, and so
//! has the guest; which packets are the pod's the kernel knows by the addresses of the interface, which
//! stay there.
//!
//! Taps are not persistent: they live as long as a descriptor of them is open, so nothing is left
//! of them after the VMM and the daemon are gone. Only a VMM that opens them itself, by name, gets
//! persistent ones, which belong to its user, and go when they are parted. All netlink work happens on sockets that were
//! opened inside the namespace by a thread of their own; no thread of the daemon changes its own.

mod tap;

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kuasar_host::netlink::{Link, Netlink, RouteEntry};
use nix::sched::CloneFlags;
use serde::{Deserialize, Serialize};
use vmm_common::guest;

pub use tap::{Taps, alone};

/// Most interfaces of a pod.
pub const MAX_NICS: usize = 16;
/// Most addresses, routes or neighbours of a pod.
pub const MAX_ENTRIES: usize = 4096;

/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
/// `RT_TABLE_MAIN`.
const MAIN: u32 = 254;
/// `RTPROT_KERNEL`: made by itself with an address.
const BY_KERNEL: u8 = 2;
/// `RTM_F_CLONED`: a cached entry, no route.
const CLONED: u32 = 0x200;
/// `RTNH_F_ONLINK`.
const ONLINK: u32 = 4;
/// `NUD_PERMANENT`.
const PERMANENT: u16 = 0x80;
/// `RT_SCOPE_LINK` and `RT_SCOPE_HOST`.
const NARROW: [u8; 2] = [253, 254];
/// Prefix of our taps' names.
const TAP: &str = "kuasar";

/// Why a pod's network cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace has something that a guest cannot be given; the text names the way out.
    #[error("{0}")]
    Unsupported(String),
    /// A step failed.
    #[error("{context}")]
    Host {
        /// What was being done.
        context: String,
        /// Why it failed.
        #[source]
        source: kuasar_host::Error,
    },
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

fn host(context: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let context = context.into();
    move |source| match source {
        kuasar_host::Error::Unsupported(text) => Error::Unsupported(format!("{context}: {text}")),
        source => Error::Host { context, source },
    }
}

/// An interface of the pod that the guest gets, as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name in the namespace, and in the guest.
    pub name: String,
    /// Index in the namespace.
    pub index: u32,
    /// MAC address.
    pub mac: [u8; 6],
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Name of the tap device beside it.
    pub tap: String,
}

/// What the namespace has, in the guest API's words.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Interfaces, in the order of their indices.
    pub interfaces: Vec<Interface>,
    /// What the guest is told.
    pub network: guest::Network,
}

/// An interface that was joined with its tap.
#[derive(Debug)]
pub struct Joined {
    /// The interface.
    pub interface: Interface,
    /// The tap: one descriptor for each pair of queues.
    pub tap: Vec<OwnedFd>,
}

/// Reads what CNI has made of a namespace.
///
/// # Errors
/// [`Error::Unsupported`] for interfaces that cannot be handed through, and for too many.
pub fn plan(netns: BorrowedFd<'_>) -> Result<Plan> {
    let netlink = Netlink::open_in(netns).map_err(host("enter the pod's network namespace"))?;
    let read = |what: &str| host(format!("read the pod's {what}"));
    let links = netlink.links().map_err(read("interfaces"))?;
    let mut interfaces = Vec::new();
    for link in links.iter().filter(|link| wanted(link)) {
        // In its L3 modes it has no use for neighbours, and says so.
        if link.kind == "ipvlan" && link.flags & libc::IFF_NOARP as u32 != 0 {
            return Err(Error::Unsupported(format!(
                "interface {} of the pod is an ipvlan that routes, and carries no Ethernet frames: \
                 use its mode l2, macvlan, a bridge or another CNI plugin",
                link.name
            )));
        }
        let Ok(mac) = <[u8; 6]>::try_from(link.mac.as_slice()) else { continue };
        interfaces.push(Interface {
            name: link.name.clone(),
            index: link.index,
            mac,
            mtu: link.mtu,
            tap: format!("{TAP}{}", link.index),
        });
    }
    interfaces.sort_by_key(|interface| interface.index);
    if interfaces.len() > MAX_NICS {
        return Err(Error::Unsupported(format!(
            "the pod has {} network interfaces: at most {MAX_NICS} can be handed to a VM",
            interfaces.len()
        )));
    }
    let addresses = netlink.addresses().map_err(read("addresses"))?;
    let routes = netlink.routes().map_err(read("routes"))?;
    let neighbours = netlink.neighbours().map_err(read("neighbours"))?;
    let name =
        |index: u32| interfaces.iter().find(|one| one.index == index).map(|one| one.name.clone());
    let mut network = guest::Network::new();
    for interface in &interfaces {
        let own = addresses.iter().filter(|a| a.link == interface.index);
        // The guest makes link-local addresses of IPv6 itself, from the same MAC address.
        let own = own.filter(|a| !(a.address.is_ipv6() && NARROW.contains(&a.scope)));
        network.interfaces.push(guest::Interface {
            name: interface.name.clone(),
            mac: mac_text(&interface.mac),
            mtu: interface.mtu,
            addresses: own.map(|a| format!("{}/{}", a.address, a.prefix)).collect(),
            ..Default::default()
        });
    }
    for route in &routes {
        if route.table != MAIN || route.protocol == BY_KERNEL || route.flags & CLONED != 0 {
            continue;
        }
        match (route.link, name(route.link)) {
            (0, _) if route.kind == libc::RTN_UNICAST => {
                return Err(Error::Unsupported(
                    "the pod has a route with several next hops: give it one each".into(),
                ));
            }
            // blackhole, unreachable, prohibit: without an interface, or with lo.
            (_, None) if route.kind == libc::RTN_UNICAST => continue,
            (_, device) => network.routes.push(wire_route(route, device.unwrap_or_default())),
        }
    }
    // Gateways that are reached through another route come behind that route.
    network.routes.sort_by_key(|route| {
        (!route.gateway.is_empty(), route.destination.is_empty(), route.family, route.metric)
    });
    for neighbour in neighbours.iter().filter(|n| n.state & PERMANENT != 0) {
        let Ok(mac) = <[u8; 6]>::try_from(neighbour.mac.as_slice()) else { continue };
        let Some(device) = name(neighbour.link) else { continue };
        network.neighbours.push(guest::Neighbour {
            address: neighbour.address.to_string(),
            mac: mac_text(&mac),
            device,
            state: neighbour.state.into(),
            ..Default::default()
        });
    }
    let entries = network.routes.len().max(network.neighbours.len());
    let entries = entries.max(addresses.len());
    if entries > MAX_ENTRIES {
        return Err(Error::Unsupported(format!(
            "the pod's network has {entries} routes, addresses or neighbours: at most \
             {MAX_ENTRIES} can be handed to a VM"
        )));
    }
    Ok(Plan { interfaces, network })
}

fn wanted(link: &Link) -> bool {
    let loopback = link.flags & libc::IFF_LOOPBACK as u32 != 0;
    // A tap of ours, of a start that was repeated.
    let ours = link.kind == "tun" && link.name.starts_with(TAP);
    link.hardware == ETHERNET && !loopback && !ours && link.is_up()
}

fn wire_route(route: &RouteEntry, device: String) -> guest::Route {
    guest::Route {
        destination: route.destination.map(|(ip, bits)| format!("{ip}/{bits}")).unwrap_or_default(),
        gateway: route.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
        device,
        source: route.source.map(|ip: IpAddr| ip.to_string()).unwrap_or_default(),
        metric: route.metric,
        scope: route.scope.into(),
        type_: route.kind.into(),
        // Of what the kernel says only this is also something that can be asked for.
        flags: route.flags & ONLINK,
        family: if route.family == libc::AF_INET6 as u8 { 6 } else { 4 },
        ..Default::default()
    }
}

/// A MAC address in its usual form.
pub fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Makes the tap of each interface and joins the two. When one fails, those before it are undone.
///
/// # Errors
/// [`Error::Unsupported`] on a kernel that lacks tc's redirection; [`Error::Host`].
pub fn join(netns: BorrowedFd<'_>, plan: &Plan, taps: Taps) -> Result<Vec<Joined>> {
    let mut joined = Vec::with_capacity(plan.interfaces.len());
    for interface in &plan.interfaces {
        match join_one(netns, interface, taps) {
            Ok(tap) => joined.push(Joined { interface: interface.clone(), tap }),
            Err(error) => {
                let before: Vec<_> = joined.drain(..).map(|one| one.interface).collect();
                // The first error is the one to report.
                let _ = part(netns, &before);
                let _ = part(netns, std::slice::from_ref(interface));
                return Err(error);
            }
        }
    }
    Ok(joined)
}

fn join_one(netns: BorrowedFd<'_>, interface: &Interface, taps: Taps) -> Result<Vec<OwnedFd>> {
    let at = |what: &str| host(format!("{what} for interface {}", interface.name));
    let netlink = Netlink::open_in(netns).map_err(at("enter the pod's network namespace"))?;
    let taps = tap::open(netns, &interface.tap, taps)?;
    let device = netlink.link(&interface.tap).map_err(at("find the tap"))?;
    netlink.set_mtu(device.index, interface.mtu).map_err(at("set the tap's MTU"))?;
    tap::quiet(netns, &interface.tap);
    netlink.set_up(device.index).map_err(at("set the tap up"))?;
    netlink.redirect(device.index, interface.index).map_err(at("join the tap"))?;
    netlink.redirect(interface.index, device.index).map_err(at("join the interface"))?;
    Ok(taps)
}

/// Parts interfaces from their taps. What is gone already, the namespace too, is no error.
///
/// # Errors
/// [`Error::Host`].
pub fn part(netns: BorrowedFd<'_>, interfaces: &[Interface]) -> Result<()> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open_in(netns).map_err(host("enter the pod's network namespace"))?;
    for interface in interfaces {
        // Its own filter goes with the tap.
        netlink
            .unredirect(interface.index)
            .map_err(host(format!("part interface {} from its tap", interface.name)))?;
        if netlink.link(&interface.tap).is_ok() {
            tap::remove(netns, &interface.tap)?;
        }
    }
    Ok(())
}

/// Interfaces of `plan` beside which no tap stands: for engines that set the network up after the
/// pod's start.
///
/// # Errors
/// [`Error::Host`].
pub fn unjoined(netns: BorrowedFd<'_>, plan: &Plan) -> Result<Vec<Interface>> {
    let netlink = Netlink::open_in(netns).map_err(host("enter the pod's network namespace"))?;
    let links = netlink.links().map_err(host("read the pod's interfaces"))?;
    let joined = |one: &&Interface| links.iter().any(|link| link.name == one.tap);
    Ok(plan.interfaces.iter().filter(|one| !joined(one)).cloned().collect())
}

/// Opens a pod's network namespace.
///
/// # Errors
/// [`Error::Host`] when it is gone or something else.
pub fn open(path: &str) -> Result<OwnedFd> {
    kuasar_host::namespace::open_kind(std::path::Path::new(path), CloneFlags::CLONE_NEWNET)
        .map_err(host(format!("open the pod's network namespace {path}")))
}

/// Whether a namespace is the one that this process runs in: then it is the host's network.
pub fn is_hosts(netns: &OwnedFd) -> bool {
    kuasar_host::namespace::is_own(netns.as_fd(), "net").unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, FromRawFd};

    /// A namespace of its own for a test.
    fn namespace() -> Option<OwnedFd> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let made = tap::empty().ok();
        if made.is_none() {
            eprintln!("skipped: no network namespaces here");
        }
        made
    }

    /// `ip` with these words, in a namespace.
    fn ip_says(netns: &OwnedFd, words: &str) -> std::process::Output {
        kuasar_host::namespace::enter_on_thread(netns.as_fd(), CloneFlags::CLONE_NEWNET, || {
            Ok(std::process::Command::new("ip").args(words.split(' ')).output().unwrap())
        })
        .unwrap()
    }

    fn ip(netns: &OwnedFd, words: &str) {
        let out = ip_says(netns, words);
        assert!(out.status.success(), "ip {words}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// A pod's namespace as the bridge plugin makes it, with `peer` in place of the bridge.
    fn pod() -> Option<OwnedFd> {
        let netns = namespace()?;
        ip(&netns, "link set lo up");
        ip(&netns, "link add eth0 mtu 1400 address 02:00:00:00:00:01 type veth peer name peer");
        ip(&netns, "link set peer mtu 1400 up");
        ip(&netns, "link set eth0 up");
        ip(&netns, "addr add 10.9.0.2/24 dev eth0");
        ip(&netns, "route add default via 10.9.0.1 dev eth0");
        ip(&netns, "route add 10.7.0.0/16 dev eth0 scope link metric 5");
        ip(&netns, "neigh add 10.9.0.1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent");
        Some(netns)
    }

    /// A raw socket on an interface: all frames that come in there.
    fn raw(netns: &OwnedFd, name: &str) -> std::fs::File {
        let index = Netlink::open_in(netns.as_fd()).unwrap().link(name).unwrap().index;
        kuasar_host::namespace::enter_on_thread(netns.as_fd(), CloneFlags::CLONE_NEWNET, || {
            let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
            // SAFETY: plain calls; the address is filled in and its size given.
            let fd = unsafe {
                let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol);
                assert!(fd >= 0);
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = protocol as u16;
                address.sll_ifindex = index as i32;
                let size = std::mem::size_of_val(&address) as u32;
                assert_eq!(libc::bind(fd, (&raw const address).cast(), size), 0);
                let patience = libc::timeval { tv_sec: 5, tv_usec: 0 };
                let size = std::mem::size_of_val(&patience) as u32;
                libc::setsockopt(
                    fd,
                    libc::SOL_SOCKET,
                    libc::SO_RCVTIMEO,
                    (&raw const patience).cast(),
                    size,
                );
                std::fs::File::from_raw_fd(fd)
            };
            Ok(fd)
        })
        .unwrap()
    }

    fn frame(mark: u8) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1]);
        // A protocol that nobody speaks.
        frame.extend([0x88, 0xb5]);
        frame.extend([mark; 50]);
        frame
    }

    /// Reads frames, behind `skip` bytes each, until one is the one that is meant.
    fn until(from: &mut std::fs::File, skip: usize, is: impl Fn(&[u8]) -> bool) {
        let mut buffer = [0; 4096];
        loop {
            let n = from.read(&mut buffer).expect("no frame came");
            if is(&buffer[skip.min(n)..n]) {
                return;
            }
        }
    }

    /// Reads frames until one carries `mark`.
    fn expect(from: &mut std::fs::File, mark: u8, skip: usize) {
        until(from, skip, |frame| frame.get(12..14) == Some(&[0x88, 0xb5]) && frame[14] == mark);
    }

    #[test]
    fn what_cni_has_made_is_handed_to_the_guest() {
        let Some(netns) = pod() else { return };
        ip(&netns, "link set peer down");
        let plan = plan(netns.as_fd()).unwrap();
        assert_eq!(plan.interfaces.len(), 1, "{:?}", plan.interfaces);
        let [eth0] = plan.network.interfaces.as_slice() else { panic!() };
        assert_eq!((eth0.name.as_str(), eth0.mtu), ("eth0", 1400));
        assert_eq!(eth0.mac, "02:00:00:00:00:01");
        assert_eq!(eth0.addresses, ["10.9.0.2/24"]);
        let routes = &plan.network.routes;
        let [near, default] = routes.as_slice() else { panic!("{routes:?}") };
        assert_eq!((near.destination.as_str(), near.metric, near.scope), ("10.7.0.0/16", 5, 253));
        assert_eq!((default.destination.as_str(), default.gateway.as_str()), ("", "10.9.0.1"));
        assert_eq!(default.device, "eth0");
        let [gateway] = plan.network.neighbours.as_slice() else { panic!() };
        assert_eq!((gateway.address.as_str(), gateway.state), ("10.9.0.1", 0x80));
    }

    #[test]
    fn addresses_routes_and_neighbours_of_version_6_are_handed_through() {
        let Some(netns) = pod() else { return };
        ip(&netns, "-6 addr add fd00:9::2/64 dev eth0 nodad");
        ip(&netns, "-6 route add default via fd00:9::1 dev eth0 metric 7");
        ip(&netns, "-6 neigh add fd00:9::1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent");
        let plan = plan(netns.as_fd()).unwrap();
        let eth0 = plan.network.interfaces.iter().find(|one| one.name == "eth0").unwrap();
        assert!(eth0.addresses.contains(&"fd00:9::2/64".to_owned()), "{:?}", eth0.addresses);
        let routes = &plan.network.routes;
        let default = routes.iter().find(|route| route.gateway == "fd00:9::1");
        let default = default.unwrap_or_else(|| panic!("{routes:?}"));
        assert_eq!((default.destination.as_str(), default.family, default.metric), ("", 6, 7));
        let neighbours = &plan.network.neighbours;
        assert!(neighbours.iter().any(|one| one.address == "fd00:9::1"), "{neighbours:?}");
    }

    /// Makes an interface `net1` of this kind on `peer`; none, and a note, where the kernel cannot.
    fn on_peer(netns: &OwnedFd, kind: &str) -> bool {
        let made = ip_says(netns, &format!("link add link peer name net1 type {kind}"));
        if !made.status.success() {
            println!("skipped: no {kind} in this kernel: it is tried in tests/interfaces.sh");
        }
        made.status.success()
    }

    #[test]
    fn an_ipvlan_that_routes_is_refused_with_what_to_use() {
        let Some(netns) = pod() else { return };
        if !on_peer(&netns, "ipvlan mode l3") {
            return;
        }
        ip(&netns, "link set net1 up");
        let error = plan(netns.as_fd()).unwrap_err().to_string();
        assert!(error.contains("net1") && error.contains("mode l2"), "{error}");
    }

    /// An IPv4 packet of a protocol that nobody speaks, as Ethernet has it.
    fn packet(to: [u8; 6], from: [u8; 6], ips: [[u8; 4]; 2], mark: u8) -> Vec<u8> {
        let mut header = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 253, 0, 0].to_vec();
        header.extend(ips.concat());
        let sum: u32 =
            header.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        [&to[..], &from, &[8, 0], &header, &[mark; 20]].concat()
    }

    #[test]
    fn packets_reach_the_guest_and_leave_it_through_interfaces_of_every_kind() {
        const OURS: [u8; 4] = [10, 9, 0, 9];
        const THEIRS: [u8; 4] = [10, 9, 0, 2];
        for kind in ["macvlan mode bridge", "macvtap mode bridge", "ipvlan mode l2"] {
            let Some(netns) = pod() else { return };
            if !on_peer(&netns, kind) {
                continue;
            }
            ip(&netns, "addr add 10.9.0.9/24 dev net1");
            ip(&netns, "link set net1 up");
            let plan = plan_of(&netns, "net1");
            let [net1] = plan.interfaces.as_slice() else { panic!("{kind}: {plan:?}") };
            assert_eq!(net1.mtu, 1400, "{kind}");
            let told = plan.network.interfaces.iter().find(|one| one.name == "net1").unwrap();
            assert_eq!(told.addresses, ["10.9.0.9/24"], "{kind}");
            let mut joined = join(netns.as_fd(), &plan, Taps::Held { queues: 1 }).unwrap();
            let mut tap = std::fs::File::from(joined.remove(0).tap.remove(0));
            let blocks = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
            nix::fcntl::fcntl(&tap, blocks).unwrap();
            let mut outside = raw(&netns, "eth0");
            let outer = [2, 0, 0, 0, 0, 1];
            println!("{kind}: from the network to the guest");
            let comes = packet(net1.mac, outer, [THEIRS, OURS], 1);
            outside.write_all(&comes).unwrap();
            until(&mut tap, 10, |frame| frame == comes);
            println!("{kind}: a broadcast");
            outside.write_all(&frame(2)).unwrap();
            expect(&mut tap, 2, 10);
            println!("{kind}: from the guest to the network");
            let goes = packet(outer, net1.mac, [OURS, THEIRS], 3);
            tap.write_all(&[&[0; 10], goes.as_slice()].concat()).unwrap();
            until(&mut outside, 0, |frame| frame == goes);
            let netlink = Netlink::open_in(netns.as_fd()).unwrap();
            let stats = netlink.link("net1").unwrap().stats;
            assert!(stats.rx_packets >= 1 && stats.tx_packets >= 1, "{kind}: {stats:?}");
            part(netns.as_fd(), &plan.interfaces).unwrap();
            assert!(!netlink.is_redirected(net1.index).unwrap(), "{kind}");
        }
    }

    #[test]
    fn frames_cross_between_interface_and_tap_until_they_are_parted() {
        let Some(netns) = pod() else { return };
        let plan = plan_of(&netns, "eth0");
        let mut joined = join(netns.as_fd(), &plan, Taps::Held { queues: 1 }).unwrap();
        let netlink = Netlink::open_in(netns.as_fd()).unwrap();
        let eth0 = netlink.link("eth0").unwrap().index;
        assert!(netlink.is_redirected(eth0).unwrap());
        let mut tap = std::fs::File::from(joined.remove(0).tap.remove(0));
        nix::fcntl::fcntl(&tap, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
        let mut peer = raw(&netns, "peer");
        // From the network to the guest.
        peer.write_all(&frame(1)).unwrap();
        expect(&mut tap, 1, 10);
        // From the guest to the network: ten bytes of virtio-net header first.
        let mut out = vec![0; 10];
        out.extend(frame(2));
        tap.write_all(&out).unwrap();
        expect(&mut peer, 2, 0);
        // The counters are the pod's statistics.
        let stats = netlink.link("eth0").unwrap().stats;
        assert!(stats.rx_packets >= 1 && stats.tx_packets >= 1, "{stats:?}");
        // Joining again replaces, parting is idempotent, and what is parted stays apart.
        netlink.redirect(eth0, netlink.link(&plan.interfaces[0].tap).unwrap().index).unwrap();
        peer.write_all(&frame(3)).unwrap();
        expect(&mut tap, 3, 10);
        part(netns.as_fd(), &plan.interfaces).unwrap();
        part(netns.as_fd(), &plan.interfaces).unwrap();
        assert!(!netlink.is_redirected(eth0).unwrap());
        // The tap goes with its last descriptor.
        let name = plan.interfaces[0].tap.clone();
        assert!(netlink.link(&name).is_ok());
        drop(tap);
        wait_for_no_tap(&netlink);
    }

    /// A descriptor of a tap is a child's, too, that another test forks at this moment, until that
    /// executes its program.
    fn wait_for_no_tap(netlink: &Netlink) {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while netlink.links().unwrap().iter().any(|link| link.kind == "tun") {
            assert!(std::time::Instant::now() < until, "a tap is left");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn plan_of(netns: &OwnedFd, name: &str) -> Plan {
        let mut plan = plan(netns.as_fd()).unwrap();
        plan.interfaces.retain(|one| one.name == name);
        plan
    }

    #[test]
    fn a_tap_that_is_opened_by_name_is_its_users_alone_and_goes_when_it_is_parted() {
        let Some(netns) = pod() else { return };
        let plan = plan_of(&netns, "eth0");
        let name = plan.interfaces[0].tap.clone();
        // A start that is repeated finds it there.
        for _ in 0..2 {
            let joined = join(netns.as_fd(), &plan, Taps::Named { owner: 4711 }).unwrap();
            assert!(joined[0].tap.is_empty());
        }
        let netlink = Netlink::open_in(netns.as_fd()).unwrap();
        let tap = netlink.link(&name).unwrap();
        assert!(netlink.is_redirected(tap.index).unwrap());
        // As a VMM in its jail: without capabilities, of one user or another.
        let opened = |user: u32| {
            kuasar_host::namespace::enter_on_thread(netns.as_fd(), CloneFlags::CLONE_NEWNET, || {
                // The jail shows it to its user; on the host it is root's.
                let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
                // SAFETY: changes this thread alone, which ends here.
                unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
                Ok(attach(&tun.unwrap(), &name).is_ok())
            })
            .unwrap()
        };
        assert_eq!([opened(4712), opened(4711)], [false, true]);
        part(netns.as_fd(), &plan.interfaces).unwrap();
        assert!(netlink.link(&name).is_err());
    }

    /// Attaches to a tap of this thread's namespace, as it stands.
    fn attach(file: &std::fs::File, name: &str) -> std::io::Result<()> {
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: a `struct ifreq` that lives across the call.
        match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, request.as_ptr()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    #[test]
    fn several_queues_are_several_descriptors_of_one_tap() {
        let Some(netns) = pod() else { return };
        let joined =
            join(netns.as_fd(), &plan_of(&netns, "eth0"), Taps::Held { queues: 3 }).unwrap();
        assert_eq!(joined[0].tap.len(), 3);
    }

    #[test]
    fn a_namespace_with_nothing_but_lo_is_an_empty_plan() {
        let Some(netns) = namespace() else { return };
        let plan = plan(netns.as_fd()).unwrap();
        assert!(plan.interfaces.is_empty() && plan.network.routes.is_empty());
        assert!(join(netns.as_fd(), &plan, Taps::Held { queues: 1 }).unwrap().is_empty());
    }

    #[test]
    fn an_interface_that_came_later_is_noticed() {
        let Some(netns) = pod() else { return };
        let _joined =
            join(netns.as_fd(), &plan_of(&netns, "eth0"), Taps::Held { queues: 1 }).unwrap();
        let both = plan(netns.as_fd()).unwrap();
        let new = unjoined(netns.as_fd(), &both).unwrap();
        assert_eq!(new.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["peer"]);
        let _late = join(
            netns.as_fd(),
            &Plan { interfaces: new, ..Plan::default() },
            Taps::Held { queues: 1 },
        )
        .unwrap();
        assert!(unjoined(netns.as_fd(), &both).unwrap().is_empty());
    }

    #[test]
    fn a_failed_join_leaves_nothing() {
        let Some(netns) = pod() else { return };
        let mut plan = plan_of(&netns, "eth0");
        let mut missing = plan.interfaces[0].clone();
        (missing.index, missing.name, missing.tap) = (4242, "gone".into(), "kuasar4242".into());
        plan.interfaces.push(missing);
        assert!(join(netns.as_fd(), &plan, Taps::Held { queues: 1 }).is_err());
        let netlink = Netlink::open_in(netns.as_fd()).unwrap();
        assert!(!netlink.is_redirected(netlink.link("eth0").unwrap().index).unwrap());
        wait_for_no_tap(&netlink);
    }
}
