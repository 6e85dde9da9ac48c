//! The pod's network, which is the guest's own.
//!
//! A message is first made into a [`Plan`], where every number and name has been checked; then
//! the kernel is asked for the difference. So a wrong message changes nothing, and the same one
//! twice changes nothing the second time.
//!
//! * Links are found by MAC address, and waited for: a NIC that was just plugged may not have
//!   been found yet. One that a copy of a machine has from that machine gets its own first.
//! * Names that are in each other's way (`eth0` and `eth1` the other way round) go over temporary
//!   ones.
//! * IPv6 addresses are usable at once (`nodad`): CNI has made sure that they are unique.
//! * Routes without a gateway come first, because those with one need them.

use std::net::IpAddr;
use std::time::Instant;

use containerd_task::error::{Error, Result};
use kuasar_host::netlink::{Address, Link, Neighbour, Netlink, Route};
use vmm_common::guest;

use crate::limits;

/// Addresses that are the kernel's own business (`RT_SCOPE_LINK`, `RT_SCOPE_HOST`).
const LOCAL_SCOPES: [u8; 2] = [253, 254];

/// What an interface is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Interface {
    name: String,
    mac: Vec<u8>,
    /// The MAC address that it may have instead, and gives up.
    saved: Option<Vec<u8>>,
    mtu: u32,
    addresses: Vec<(IpAddr, u8)>,
}

impl Interface {
    /// The link that it is, or is to become.
    fn link<'a>(&self, links: &'a [Link]) -> Result<&'a Link> {
        match (find(links, &self.mac), &self.saved) {
            (Err(error), Some(saved)) => find(links, saved).map_err(|_| error),
            (found, _) => found,
        }
    }

    /// Whether a link could be taken for either.
    fn is_like(&self, other: &Self) -> bool {
        let both = |one: &Self| [Some(one.mac.clone()), one.saved.clone()];
        let others = both(other);
        both(self).iter().flatten().any(|mac| others.iter().flatten().any(|other| other == mac))
    }
}

/// A checked [`guest::Network`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    interfaces: Vec<Interface>,
    /// With the name of the device, since its index is not known yet.
    routes: Vec<(String, Route)>,
    neighbours: Vec<(String, IpAddr, Vec<u8>, u16)>,
}

fn bad(what: &str, value: &str) -> Error {
    Error::InvalidArgument(format!("network: {value:.80?} is no {what}"))
}

fn mac(text: &str) -> Result<Vec<u8>> {
    // `from_str_radix` takes a sign, too.
    let is_byte = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| is_byte(part).then(|| u8::from_str_radix(part, 16).ok()).flatten())
        .collect();
    bytes.filter(|b| b.len() == 6).ok_or_else(|| bad("MAC address (aa:bb:cc:dd:ee:ff)", text))
}

fn ip(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| bad("IP address", text))
}

fn maybe_ip(text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() { Ok(None) } else { ip(text).map(Some) }
}

fn cidr(text: &str) -> Result<(IpAddr, u8)> {
    let wrong = || bad("address with its prefix length (10.0.0.2/24)", text);
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if prefix > most { Err(wrong()) } else { Ok((address, prefix)) }
}

/// The address with all bits beyond the prefix cleared: the kernel takes no other destination.
fn masked((address, prefix): (IpAddr, u8)) -> (IpAddr, u8) {
    let masked = match address {
        IpAddr::V4(a) => {
            let keep = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((u32::from(a) & keep).into())
        }
        IpAddr::V6(a) => {
            let keep = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((u128::from(a) & keep).into())
        }
    };
    (masked, prefix)
}

fn name(text: &str) -> Result<String> {
    let good = !text.is_empty()
        && text.len() < 16
        && text != "."
        && text != ".."
        && text.bytes().all(|b| b.is_ascii_graphic() && !b"/:".contains(&b));
    if good { Ok(text.to_owned()) } else { Err(bad("name of a network interface", text)) }
}

fn byte(what: &str, value: u32) -> Result<u8> {
    u8::try_from(value).map_err(|_| bad(what, &value.to_string()))
}

impl Plan {
    /// Checks a message.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that says what is wrong.
    pub fn new(network: &guest::Network) -> Result<Self> {
        let counts = [network.interfaces.len(), network.routes.len(), network.neighbours.len()];
        if counts.iter().any(|n| *n > limits::ENTRIES) {
            let text = format!("network: more than {} entries of a kind", limits::ENTRIES);
            return Err(Error::ResourceExhausted(text));
        }
        let mut plan = Self::default();
        for i in &network.interfaces {
            if i.addresses.len() > limits::ENTRIES {
                return Err(Error::ResourceExhausted("network: too many addresses".into()));
            }
            let interface = Interface {
                name: name(&i.name)?,
                mac: mac(&i.mac)?,
                saved: Some(&i.saved_mac)
                    .filter(|text| !text.is_empty())
                    .map(|m| mac(m))
                    .transpose()?,
                mtu: i.mtu,
                addresses: i.addresses.iter().map(|a| cidr(a)).collect::<Result<_>>()?,
            };
            let twice =
                plan.interfaces.iter().any(|o| o.name == interface.name || o.is_like(&interface));
            if twice {
                return Err(bad("name and MAC address of a single interface", &i.name));
            }
            plan.interfaces.push(interface);
        }
        for r in &network.routes {
            let destination = match r.destination.as_str() {
                "" => None,
                text => Some(masked(cidr(text)?)).filter(|(_, prefix)| *prefix > 0),
            };
            let any_v6 = r.destination.contains(':');
            let route = Route {
                destination,
                gateway: maybe_ip(&r.gateway)?,
                source: maybe_ip(&r.source)?,
                link: 0,
                metric: r.metric,
                scope: byte("scope", r.scope)?,
                kind: byte("route type", r.type_)?,
                flags: r.flags,
                v6: r.family == 6 || any_v6,
            };
            let ips = [route.destination.map(|(a, _)| a), route.gateway, route.source];
            let mut families = ips.into_iter().flatten().map(|a| a.is_ipv6());
            let first = families.next();
            if families.any(|v6| Some(v6) != first) {
                return Err(bad("route of one address family", &r.destination));
            }
            plan.routes.push((name(&r.device)?, route));
        }
        plan.routes.sort_by_key(|(_, r)| r.gateway.is_some());
        for n in &network.neighbours {
            let state = u16::try_from(n.state).map_err(|_| bad("state", &n.state.to_string()))?;
            plan.neighbours.push((name(&n.device)?, ip(&n.address)?, mac(&n.mac)?, state));
        }
        Ok(plan)
    }

    /// Asks the kernel for what is not so yet. Blocks.
    ///
    /// # Errors
    /// Of the kernel, naming what it refused; [`Error::NotFound`] for a link that is not there.
    fn apply(&self) -> Result<()> {
        let netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
        let links = netlink.links().map_err(failed("list interfaces"))?;
        let wanted: Vec<(u32, &str)> = self
            .interfaces
            .iter()
            .map(|i| Ok((i.link(&links)?.index, i.name.as_str())))
            .collect::<Result<_>>()?;
        let current: Vec<(u32, &str)> = links.iter().map(|l| (l.index, l.name.as_str())).collect();
        for (index, name) in renames(&current, &wanted) {
            // Older kernels rename only what is down.
            netlink.set_down(index).map_err(failed("set an interface down"))?;
            netlink
                .rename(index, &name)
                .map_err(failed(format!("rename an interface to {name}")))?;
        }
        let addresses = netlink.addresses().map_err(failed("list addresses"))?;
        for (i, (index, name)) in self.interfaces.iter().zip(&wanted) {
            let link = i.link(&links)?;
            if link.mac != i.mac {
                // Before it is up: its own IPv6 address is made of it.
                netlink
                    .set_mac(*index, &i.mac)
                    .map_err(failed(format!("set the MAC address of {name}")))?;
            }
            if i.mtu != 0 && link.mtu != i.mtu {
                netlink
                    .set_mtu(*index, i.mtu)
                    .map_err(failed(format!("set the MTU of {name} to {}", i.mtu)))?;
            }
            for old in addresses.iter().filter(|a| a.link == *index) {
                let stays = i.addresses.contains(&(old.address, old.prefix));
                if !stays && !LOCAL_SCOPES.contains(&old.scope) {
                    netlink
                        .remove_address(old)
                        .map_err(failed(format!("remove {} from {name}", old.address)))?;
                }
            }
            netlink.set_up(*index).map_err(failed(format!("set {name} up")))?;
            for (address, prefix) in &i.addresses {
                let new = Address { link: *index, address: *address, prefix: *prefix, scope: 0 };
                netlink
                    .add_address(&new, true)
                    .map_err(failed(format!("add {address}/{prefix} to {name}")))?;
            }
        }
        self.apply_routes(&netlink)
    }

    fn apply_routes(&self, netlink: &Netlink) -> Result<()> {
        let links = netlink.links().map_err(failed("list interfaces"))?;
        let index = |device: &str| {
            let link = links.iter().find(|l| l.name == device);
            let none = || Error::NotFound(format!("network: there is no interface {device}"));
            link.map(|l| l.index).ok_or_else(none)
        };
        let mut routes = Vec::with_capacity(self.routes.len());
        for (device, route) in &self.routes {
            routes.push(Route { link: index(device)?, ..route.clone() });
        }
        for old in netlink.static_routes().map_err(failed("list routes"))? {
            let stays = routes.iter().any(|r| {
                (r.destination, r.gateway, r.link) == (old.destination, old.gateway, old.link)
            });
            if !stays {
                // It may have gone with its address.
                let _ = netlink.remove_route(&old);
            }
        }
        for route in &routes {
            let to = route.destination.map_or("default".into(), |(a, p)| format!("{a}/{p}"));
            netlink.add_route(route).map_err(failed(format!("add the route to {to}")))?;
        }
        for (device, address, mac, state) in &self.neighbours {
            let link = index(device)?;
            let neighbour = Neighbour { address: *address, mac: mac.clone(), link, state: *state };
            netlink
                .add_neighbour(&neighbour)
                .map_err(failed(format!("add the neighbour {address}")))?;
        }
        Ok(())
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(kuasar_host::Error) -> Error {
    let what = format!("network: cannot {}", what.into());
    move |error| match error.kind() {
        kuasar_host::Kind::Invalid => Error::InvalidArgument(format!("{what}: {error}")),
        _ => Error::internal(what, error),
    }
}

fn find<'a>(links: &'a [Link], mac: &[u8]) -> Result<&'a Link> {
    links.iter().find(|l| l.mac == mac).ok_or_else(|| {
        let text: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
        Error::NotFound(format!("network: no interface has the MAC address {}", text.join(":")))
    })
}

/// The renames that bring `current` to `wanted`, in order. Whoever has a name that is wanted by
/// another gets a temporary one first, strangers too.
fn renames(current: &[(u32, &str)], wanted: &[(u32, &str)]) -> Vec<(u32, String)> {
    let has = |index: u32, name: &str| current.contains(&(index, name));
    let is_taken = |steps: &[(u32, String)], name: &str| {
        current.iter().chain(wanted).any(|(_, taken)| *taken == name)
            || steps.iter().any(|(_, taken)| taken == name)
    };
    let wanted: Vec<_> = wanted.iter().filter(|(index, name)| !has(*index, name)).collect();
    let mut steps: Vec<(u32, String)> = Vec::new();
    for (index, name) in current {
        if wanted.iter().any(|(_, other)| other == name) {
            let mut temporary = format!("kuasar{index}");
            while is_taken(&steps, &temporary) {
                temporary.insert(0, 'x');
            }
            steps.push((*index, temporary));
        }
    }
    steps.extend(wanted.iter().map(|(index, name)| (*index, (*name).to_owned())));
    steps
}

/// Makes the network what the message says.
///
/// # Errors
/// Of [`Plan::new`] and of the kernel; [`Error::DeadlineExceeded`] for a link that does not come.
pub async fn set(network: &guest::Network) -> Result<()> {
    let plan = Plan::new(network)?;
    if plan == Plan::default() {
        return Ok(());
    }
    let begun = Instant::now();
    crate::uevent::wait_for("a network interface", limits::DEVICE_TIME, || {
        let links = Netlink::open().and_then(|n| n.links()).map_err(failed("list interfaces"))?;
        Ok(plan.interfaces.iter().all(|i| i.link(&links).is_ok()).then_some(()))
    })
    .await?;
    let there = begun.elapsed();
    let applied = tokio::task::spawn_blocking(move || plan.apply())
        .await
        .map_err(|error| Error::internal("worker", error))?;
    tracing::debug!(?there, all = ?begun.elapsed(), "the network is set");
    applied
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> guest::Network {
        let mut network = guest::Network::new();
        network.interfaces.push(guest::Interface {
            name: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1450,
            addresses: vec!["10.1.2.3/24".into(), "fd00::3/64".into()],
            ..Default::default()
        });
        let route = |destination: &str, gateway: &str| guest::Route {
            destination: destination.into(),
            gateway: gateway.into(),
            device: "eth0".into(),
            ..Default::default()
        };
        network.routes.push(route("", "10.1.2.1"));
        network.routes.push(route("10.9.0.77/16", ""));
        network.routes.push(route("::/0", "fd00::1"));
        network
    }

    #[test]
    fn a_message_becomes_a_plan() {
        let plan = Plan::new(&network()).unwrap();
        assert_eq!(plan.interfaces[0].addresses[1], ("fd00::3".parse().unwrap(), 64));
        // Without a gateway first; with its host bits cleared.
        assert_eq!(plan.routes[0].1.destination, Some(("10.9.0.0".parse().unwrap(), 16)));
        assert_eq!(plan.routes[1].1.destination, None);
        assert!(plan.routes[2].1.v6 && plan.routes[2].1.destination.is_none());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let with = |change: &dyn Fn(&mut guest::Network)| {
            let mut n = network();
            change(&mut n);
            Plan::new(&n).is_err()
        };
        assert!(with(&|n| n.interfaces[0].mac = "02:00".into()));
        assert!(with(&|n| n.interfaces[0].mac = "02:00:00:00:00:+1".into()));
        assert!(with(&|n| n.interfaces[0].name = "a/b".into()));
        assert!(with(&|n| n.interfaces[0].name = "x".repeat(16)));
        assert!(with(&|n| n.interfaces[0].addresses[0] = "10.0.0.1/33".into()));
        assert!(with(&|n| n.interfaces[0].addresses[0] = "10.0.0.1".into()));
        assert!(with(&|n| n.interfaces.push(n.interfaces[0].clone())));
        assert!(!with(&|n| n.routes[0].gateway = "fd00::1".into()));
        assert!(with(&|n| n.routes[1].gateway = "fd00::1".into()));
        assert!(with(&|n| n.routes[0].scope = 256));
        assert!(with(&|n| n.routes = vec![n.routes[0].clone(); limits::ENTRIES + 1]));
    }

    #[test]
    fn an_interface_is_found_by_its_own_address_first_and_else_by_the_saved_one() {
        let link = |index, last| Link { index, mac: vec![2, 0, 0, 0, 0, last], ..Link::default() };
        let index = |saved: &str, links: &[Link]| {
            let mut n = network();
            n.interfaces[0].saved_mac = saved.into();
            Plan::new(&n).unwrap().interfaces[0].link(links).map(|link| link.index)
        };
        let saved = "02:00:00:00:00:07";
        assert_eq!(index(saved, &[link(2, 7), link(3, 1)]).unwrap(), 3);
        assert_eq!(index(saved, &[link(2, 7), link(3, 9)]).unwrap(), 2);
        assert!(index("", &[link(2, 7)]).is_err());
        // Who is missing is the one that is wanted.
        let error = index(saved, &[]).unwrap_err().to_string();
        assert!(error.contains("02:00:00:00:00:01"), "{error}");
        // No link is two interfaces.
        let mut n = network();
        n.interfaces.push(guest::Interface {
            name: "eth1".into(),
            mac: "02:00:00:00:00:02".into(),
            ..Default::default()
        });
        for (first, second) in
            [("02:00:00:00:00:02", ""), (saved, saved), ("", "02:00:00:00:00:01")]
        {
            n.interfaces[0].saved_mac = first.into();
            n.interfaces[1].saved_mac = second.into();
            assert!(Plan::new(&n).is_err(), "{first} {second}");
        }
        n.interfaces[1].saved_mac = "02:00".into();
        assert!(Plan::new(&n).is_err());
    }

    #[test]
    fn odd_addresses_are_no_accident() {
        let mut random = crate::testing::Random(7);
        for _ in 0..5000 {
            let text = String::from_utf8_lossy(&random.bytes(24)).into_owned();
            let _ = (mac(&text), cidr(&text), name(&text), ip(&text));
        }
        for prefix in 0..=32 {
            masked(("255.255.255.255".parse().unwrap(), prefix));
        }
        for prefix in 0..=128 {
            masked(("ffff::1".parse().unwrap(), prefix));
        }
        assert_eq!(masked(("10.1.2.3".parse().unwrap(), 0)).0.to_string(), "0.0.0.0");
    }

    #[test]
    fn names_are_exchanged_over_temporary_ones() {
        let current = [(1, "lo"), (2, "eth0"), (3, "eth1")];
        assert_eq!(
            renames(&current, &[(2, "eth1"), (3, "eth0")]),
            [(2, "kuasar2".into()), (3, "kuasar3".into()), (2, "eth1".into()), (3, "eth0".into())]
        );
        assert!(renames(&current, &[(2, "eth0")]).is_empty());
        // A stranger makes way.
        assert_eq!(
            renames(&current, &[(3, "eth0")]),
            [(2, "kuasar2".to_owned()), (3, "eth0".to_owned())]
        );
        assert_eq!(renames(&current, &[(3, "net1")]), [(3, "net1".to_owned())]);
        // Any order of any names ends as it was wanted.
        let mut random = crate::testing::Random(3);
        for _ in 0..500 {
            let names = ["a", "b", "c", "d", "kuasar1", "kuasar2"];
            let mut pick = || names[random.next() as usize % names.len()];
            let mut unique = |n: u32| {
                let mut list: Vec<(u32, &str)> = Vec::new();
                for i in 1..=n {
                    let name = pick();
                    if list.iter().all(|(_, taken)| *taken != name) {
                        list.push((i, name));
                    }
                }
                list
            };
            let current = unique(4);
            let wanted: Vec<_> = unique(4)
                .into_iter()
                .filter(|(i, _)| current.iter().any(|(index, _)| index == i))
                .collect();
            let mut now: Vec<(u32, String)> =
                current.iter().map(|(i, n)| (*i, (*n).to_owned())).collect();
            for (index, name) in renames(&current, &wanted) {
                assert!(now.iter().all(|(_, n)| *n != name), "{current:?} {wanted:?}");
                now.iter_mut().find(|(i, _)| *i == index).unwrap().1 = name;
            }
            for (index, name) in wanted {
                assert!(now.contains(&(index, name.to_owned())));
            }
        }
    }
}
