//! The machine's link: address, route, hardware address, by the ioctls of netdevice(7), which need no messages for so little.
//!
//! The link is the one with the wanted hardware address, else the first that is no loopback: after a restore the device still has the address
//! of the machine it was taken from, and is given the new one.
//!
//! In a template's memory links are up already, without an address, also without one of IPv6's own making (the host lets none through): a
//! clone has only its addresses to set. The hardware address is the last of them, with which the kernel announces the other.

use std::fs;
use std::io::{Error, Result};
use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::requests::{Failure, Network};

const LINKS: &str = "/sys/class/net";
/// What the kernel calls the first one, and its number; the loopback is 1.
const FIRST: &str = "eth0";
const FIRST_INDEX: i32 = 2;
const LINK_S: u64 = 5;

/// What an address of the form "10.88.0.5/24" says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The host.
    pub ip: Ipv4Addr,
    /// The mask of its network.
    pub mask: Ipv4Addr,
}

/// Bring the loopback up, and have links tell their address to their bridge when they come up or get one.
pub fn prepare() -> std::result::Result<(), Failure> {
    let socket = Socket::open().map_err(|error| Failure::failed("a socket", error))?;
    let _ = fs::write("/proc/sys/net/ipv4/conf/all/arp_notify", "1");
    let _ = fs::write("/proc/sys/net/ipv6/conf/all/addr_gen_mode", "1");
    socket.set_up("lo", true).map_err(|error| Failure::failed("the loopback", error))
}

/// Bring all links up, though nobody has an address yet.
pub fn warm() -> Result<()> {
    let socket = Socket::open()?;
    links().iter().try_for_each(|link| socket.set_up(link, true))
}

/// Bring the link up as wanted; without a wish it is taken down.
pub fn apply(wanted: Option<&Network>) -> std::result::Result<(), Failure> {
    let failed = |what: &'static str| move |error: Error| Failure::failed(what, error);
    let socket = Socket::open().map_err(failed("a socket"))?;
    let Some(wanted) = wanted else {
        return links().iter().try_for_each(|link| socket.set_up(link, false)).map_err(failed("the link"));
    };
    let mac = parse_mac(&wanted.mac)?;
    let address = parse_address(&wanted.address)?;
    let gateway = wanted.gateway.as_deref().filter(|text| !text.is_empty()).map(parse_ip).transpose()?;
    let link = socket.find_link(mac)?;
    if let Some(mtu) = wanted.mtu {
        socket.set_mtu(&link, mtu).map_err(failed("the link's MTU"))?;
    }
    socket.set_address(&link, address).map_err(failed("the link's address"))?;
    socket
        .set_mac(&link, mac)
        .or_else(|error| {
            // A driver that changes it only of a link that is down.
            socket.set_up(&link, false).and_then(|()| socket.set_mac(&link, mac)).map_err(|_| error)
        })
        .map_err(failed("the link's hardware address"))?;
    socket.set_up(&link, true).map_err(failed("the link"))?;
    gateway.map_or(Ok(()), |gateway| socket.add_default_route(gateway).map_err(failed("the default route")))
}

fn links() -> Vec<String> {
    let Ok(folder) = fs::read_dir(LINKS) else { return Vec::new() };
    let mut names: Vec<String> =
        folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|name| name != "lo").collect();
    names.sort();
    names
}

/// Read six bytes in hexadecimal.
pub fn parse_mac(text: &str) -> std::result::Result<[u8; 6], Failure> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2)).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| Failure::invalid(format!("{text:?} is no hardware address")))
}

/// Read an address and the length of its network's prefix.
pub fn parse_address(text: &str) -> std::result::Result<Address, Failure> {
    let parsed = text.split_once('/').and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse::<u32>().ok()?)));
    match parsed {
        Some((ip, prefix)) if prefix <= 32 => {
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            Ok(Address { ip, mask: mask.into() })
        }
        _ => Err(Failure::invalid(format!("{text:?} is no address with a prefix"))),
    }
}

fn parse_ip(text: &str) -> std::result::Result<Ipv4Addr, Failure> {
    text.parse().map_err(|_| Failure::invalid(format!("{text:?} is no address")))
}

/// What the ioctls go to.
struct Socket(OwnedFd);

impl Socket {
    fn open() -> Result<Self> {
        Ok(Self(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?))
    }

    /// The link with that hardware address, else the first one. Its driver may just be coming.
    fn find_link(&self, mac: [u8; 6]) -> std::result::Result<String, Failure> {
        // What is so nearly always is asked first: there is one link, and it is called so. Not by a name that may be missing: the kernel
        // would look for a module of that name.
        if self.has_link(FIRST_INDEX) && !self.has_link(FIRST_INDEX + 1) && self.mac_of(FIRST).is_some() {
            return Ok(FIRST.to_owned());
        }
        let until = Instant::now() + Duration::from_secs(LINK_S);
        loop {
            let links = links();
            if let Some(link) = links.iter().find(|link| self.mac_of(link) == Some(mac)).or(links.first()) {
                return Ok(link.clone());
            }
            if Instant::now() > until {
                return Err(Failure::new("not_found", "the machine has no link"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn has_link(&self, index: i32) -> bool {
        // SAFETY: all-zero is this plain struct's meaning of "nothing known".
        let mut request: libc::ifreq = unsafe { zeroed() };
        request.ifr_ifru.ifru_ifindex = index;
        self.ask(libc::SIOCGIFNAME, &mut request).is_ok()
    }

    fn mac_of(&self, link: &str) -> Option<[u8; 6]> {
        let mut request = named(link).ok()?;
        self.ask(libc::SIOCGIFHWADDR, &mut request).ok()?;
        // SAFETY: the kernel has just written the address into the union.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        Some(std::array::from_fn(|place| data[place].to_ne_bytes()[0]))
    }

    fn set_up(&self, link: &str, up: bool) -> Result<()> {
        let mut request = named(link)?;
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just written the flags into the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let bit = i16::try_from(libc::IFF_UP).expect("it is 1");
        if (flags & bit != 0) == up {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags ^ bit;
        self.ask(libc::SIOCSIFFLAGS, &mut request)
    }

    fn set_mac(&self, link: &str, mac: [u8; 6]) -> Result<()> {
        let mut request = named(link)?;
        // SAFETY: all-zero is a valid address of this plain struct.
        let mut address: libc::sockaddr = unsafe { zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (place, byte) in address.sa_data.iter_mut().zip(mac) {
            *place = libc::c_char::from_ne_bytes([byte]);
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.ask(libc::SIOCSIFHWADDR, &mut request)
    }

    fn set_mtu(&self, link: &str, mtu: u32) -> Result<()> {
        let mut request = named(link)?;
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).map_err(|_| Error::from_raw_os_error(libc::EINVAL))?;
        self.ask(libc::SIOCSIFMTU, &mut request)
    }

    /// Instead of any earlier one.
    fn set_address(&self, link: &str, address: Address) -> Result<()> {
        for (kind, ip) in [(libc::SIOCSIFADDR, address.ip), (libc::SIOCSIFNETMASK, address.mask)] {
            let mut request = named(link)?;
            request.ifr_ifru.ifru_addr = socket_address(ip);
            self.ask(kind, &mut request)?;
        }
        Ok(())
    }

    fn add_default_route(&self, gateway: Ipv4Addr) -> Result<()> {
        // SAFETY: all-zero is this plain struct's meaning of "nothing wanted".
        let mut route: libc::rtentry = unsafe { zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: the struct is what the request wants, and outlives the call.
        let result = unsafe { libc::ioctl(self.0.as_fd().as_raw_fd(), libc::SIOCADDRT, &raw const route) };
        let error = Error::last_os_error();
        // The same route is there already.
        if result == 0 || error.raw_os_error() == Some(libc::EEXIST) { Ok(()) } else { Err(error) }
    }

    fn ask(&self, kind: libc::c_ulong, request: &mut libc::ifreq) -> Result<()> {
        // SAFETY: the struct is what these requests want, and outlives the call.
        let result = unsafe { libc::ioctl(self.0.as_fd().as_raw_fd(), kind, &raw mut *request) };
        if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    }
}

fn named(link: &str) -> Result<libc::ifreq> {
    // SAFETY: all-zero is this plain struct's meaning of "nothing wanted".
    let mut request: libc::ifreq = unsafe { zeroed() };
    if link.len() >= request.ifr_name.len() {
        return Err(Error::from_raw_os_error(libc::EINVAL));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    Ok(request)
}

/// An IPv4 address in the general form: family, port, four bytes.
fn socket_address(ip: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero is a valid address of this plain struct.
    let mut address: libc::sockaddr = unsafe { zeroed() };
    address.sa_family = u16::try_from(libc::AF_INET).expect("it is 2");
    for (place, byte) in address.sa_data[2..].iter_mut().zip(ip.octets()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    address
}

#[cfg(test)]
mod tests {
    use super::{Address, parse_address, parse_mac};

    #[test]
    fn addresses_are_read_or_refused() {
        let address = |ip: [u8; 4], mask: [u8; 4]| Ok(Address { ip: ip.into(), mask: mask.into() });
        assert_eq!(parse_address("10.88.0.5/24"), address([10, 88, 0, 5], [255, 255, 255, 0]));
        assert_eq!(parse_address("10.0.0.1/0"), address([10, 0, 0, 1], [0; 4]));
        assert_eq!(parse_address("10.0.0.1/32"), address([10, 0, 0, 1], [255; 4]));
        assert!(["", "10.0.0.1", "10.0.0.1/33", "10.0.0/8", "10.0.0.1/-1", "::1/64"].iter().all(|text| parse_address(text).is_err()));
    }

    #[test]
    fn hardware_addresses_are_read_or_refused() {
        assert_eq!(parse_mac("02:00:00:00:0A:ff"), Ok([2, 0, 0, 0, 10, 255]));
        assert!(
            ["", "02:00:00:00:0a", "02:00:00:00:0a:ff:00", "2:0:0:0:a:ff", "02:00:00:00:0a:fg"].iter().all(|text| parse_mac(text).is_err())
        );
    }
}
