//! Links: bridges, veth pairs, and moving them between network namespaces.
//!
//! Every function opens its own socket; nothing is kept. Names are checked here, because the kernel would truncate or
//! expand (`%d`) some of them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::io::Errno;

use super::address::Prefix;
use super::message::{Attributes, Message, NLM_F_CREATE, NLM_F_EXCL, Request, attributes, text, u32_at};
use super::routes;
use super::socket::Socket;
use crate::error::{About, Error, Result};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
/// Counters are most of a link's answer, and nobody asks for them here.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;

const IFF_UP: u32 = 1;
const IFINFOMSG_BYTES: usize = 16;
const NAME_BYTES_MAX: usize = 15;
const LOOPBACK_INDEX: u32 = 1;

/// A link as the kernel lists it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// "bridge", "veth"; empty for hardware and loopback.
    pub kind: String,
    /// Whether it is administratively up.
    pub is_up: bool,
    /// The number of the bridge it is a port of, 0 if none.
    pub master: u32,
    /// Its hardware address.
    pub mac: Vec<u8>,
}

/// Lists the links of the current network namespace.
pub fn list() -> Result<Vec<Link>> {
    let request = Request::new(RTM_GETLINK, 0, &header(0, 0)).with_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    Socket::open()?.dump(&request, parse)
}

/// Finds a link by name; ENODEV if there is none.
pub fn find(socket: &mut Socket, name: &str) -> Result<Link> {
    checked(name)?;
    let request = Request::new(RTM_GETLINK, 0, &header(0, 0)).with_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS).with_str(IFLA_IFNAME, name);
    let mut found = None;
    socket.get(request, |message| found = parse(message)).about(name)?;
    found.ok_or_else(|| Error::from(Errno::NODEV).about(name))
}

/// Makes a bridge that is up and carries an address. What exists already is kept; EEXIST if the name is another kind's.
pub fn create_bridge(name: &str, address: &str) -> Result<()> {
    let address = Prefix::parse(address).about(address)?;
    let mut socket = Socket::open()?;
    let index = match socket.execute(bridge_request(name, address)?) {
        Ok(()) => find(&mut socket, name)?.index,
        Err(Error::Os { errno: Errno::EXIST, .. }) => existing_bridge(&mut socket, name)?,
        Err(error) => return Err(error.about(name)),
    };
    routes::add_address(&mut socket, index, address).about(name)
}

/// Makes a veth pair: one end a port of `bridge`, up; the other inside `namespace` as `guest_name`, up. On failure no
/// link stays.
pub fn create_veth(host_name: &str, bridge: &str, namespace: &Path, guest_name: &str) -> Result<()> {
    checked(host_name)?;
    checked(guest_name)?;
    let namespace_file = File::open(namespace).about(namespace)?;
    let mut guest_socket = Socket::open_in_fd(&namespace_file).map_err(|error| error.about(namespace))?;
    let mut socket = Socket::open()?;
    let master = find(&mut socket, bridge)?.index;
    socket.execute(veth_request(host_name, master, &namespace_file, guest_name)).about(host_name)?;
    // The kernel refuses to open a veth whose peer is not linked yet, so the inner end cannot come up in the same request.
    let up = guest_socket.execute(change_request().with_str(IFLA_IFNAME, guest_name));
    if up.is_err() {
        delete_with(&mut socket, host_name)?;
    }
    up.about(guest_name)
}

/// Gives a link inside a namespace its address and default route (none if `gateway` is empty); returns its MAC.
/// Doing it again with the same values changes nothing.
pub fn configure(namespace: &Path, name: &str, address: &str, gateway: &str) -> Result<String> {
    let address = Prefix::parse(address).about(address)?;
    let gateway = match gateway {
        "" => None,
        text => Some(text.parse().map_err(|_| Error::from(Errno::INVAL).about(text))?),
    };
    let mut socket = Socket::open_in(namespace)?;
    let link = find(&mut socket, name)?;
    if !link.is_up {
        socket.execute(change_request().with_str(IFLA_IFNAME, name)).about(name)?;
    }
    routes::add_address(&mut socket, link.index, address).about(name)?;
    if let Some(gateway) = gateway {
        routes::set_default(&mut socket, link.index, gateway).about(name)?;
    }
    Ok(mac_text(&link.mac))
}

/// Moves a link of the current namespace into a pinned one. The kernel sets it down on the way.
pub fn move_to(name: &str, namespace: &Path) -> Result<()> {
    checked(name)?;
    let namespace = File::open(namespace).about(namespace)?;
    let request =
        Request::new(RTM_NEWLINK, 0, &header(0, 0)).with_str(IFLA_IFNAME, name).with(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
    Socket::open()?.execute(request).about(name)
}

/// Removes a link of the current namespace; false if there is none of that name.
pub fn delete(name: &str) -> Result<bool> {
    checked(name)?;
    delete_with(&mut Socket::open()?, name)
}

/// Sets the loopback link of a socket's namespace up.
pub fn set_loopback_up(socket: &mut Socket) -> Result<()> {
    socket.execute(Request::new(RTM_NEWLINK, 0, &header(LOOPBACK_INDEX, IFF_UP))).about("lo")
}

fn delete_with(socket: &mut Socket, name: &str) -> Result<bool> {
    match socket.execute(Request::new(RTM_DELLINK, 0, &header(0, 0)).with_str(IFLA_IFNAME, name)) {
        Ok(()) => Ok(true),
        Err(Error::Os { errno: Errno::NODEV, .. }) => Ok(false),
        Err(error) => Err(error.about(name)),
    }
}

fn existing_bridge(socket: &mut Socket, name: &str) -> Result<u32> {
    let link = find(socket, name)?;
    if link.kind != "bridge" {
        return Err(Error::from(Errno::EXIST).about(name));
    }
    if !link.is_up {
        socket.execute(change_request().with_str(IFLA_IFNAME, name)).about(name)?;
    }
    Ok(link.index)
}

/// A bridge without spanning tree forwards at once. Its MAC comes from its address: left to the kernel it would be the
/// lowest of its ports', and change under the containers' neighbour tables whenever one comes or goes.
fn bridge_request(name: &str, address: Prefix) -> Result<Request> {
    checked(name)?;
    let [a, b, c, d] = address.address.octets();
    let data = Attributes::default().with(IFLA_BR_FORWARD_DELAY, &0_u32.to_ne_bytes()).with(IFLA_BR_STP_STATE, &0_u32.to_ne_bytes());
    let info = Attributes::default().with_str(IFLA_INFO_KIND, "bridge").with_nested(IFLA_INFO_DATA, &data);
    Ok(Request::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header(0, IFF_UP))
        .with_str(IFLA_IFNAME, name)
        .with(IFLA_ADDRESS, &[0x02, 0x1b, a, b, c, d])
        .with_nested(IFLA_LINKINFO, &info))
}

fn veth_request(host_name: &str, master: u32, namespace: &File, guest_name: &str) -> Request {
    let peer =
        Attributes::after(&header(0, 0)).with_str(IFLA_IFNAME, guest_name).with(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
    let data = Attributes::default().with_nested(VETH_INFO_PEER, &peer);
    let info = Attributes::default().with_str(IFLA_INFO_KIND, "veth").with_nested(IFLA_INFO_DATA, &data);
    Request::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header(0, IFF_UP))
        .with_str(IFLA_IFNAME, host_name)
        .with_u32(IFLA_MASTER, master)
        .with_nested(IFLA_LINKINFO, &info)
}

/// "Set up", for a link named by an attribute.
fn change_request() -> Request {
    Request::new(RTM_NEWLINK, 0, &header(0, IFF_UP))
}

/// `struct ifinfomsg`: family, type, index, flags, and which flags to change.
fn header(index: u32, flags: u32) -> [u8; IFINFOMSG_BYTES] {
    let mut bytes = [0; IFINFOMSG_BYTES];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

fn parse(message: &Message<'_>) -> Option<Link> {
    if message.kind != RTM_NEWLINK {
        return None;
    }
    let is_up = u32_at(message.payload, 8)? & IFF_UP != 0;
    let mut link = Link { index: u32_at(message.payload, 4)?, is_up, ..Link::default() };
    for (kind, value) in attributes(message.payload.get(IFINFOMSG_BYTES..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_MASTER => link.master = u32_at(value, 0)?,
            IFLA_LINKINFO => link.kind = kind_of(value),
            _ => {}
        }
    }
    Some(link)
}

fn kind_of(info: &[u8]) -> String {
    attributes(info).find(|&(kind, _)| kind == IFLA_INFO_KIND).map_or_else(String::new, |(_, value)| text(value))
}

fn checked(name: &str) -> Result<()> {
    let is_fine = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || matches!(name, "." | "..") || !name.bytes().all(is_fine) {
        return Err(Error::from(Errno::INVAL).about(name));
    }
    Ok(())
}

fn mac_text(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::super::message::messages;
    use super::*;

    #[test]
    fn names_the_kernel_would_change_are_refused() {
        for good in ["eth0", "ip-0123456789ab", "a.b"] {
            assert!(checked(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "sixteen-bytes-ab", "a b", "a/b", "veth%d", "a:b", "h\u{f6}"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_link_is_parsed_from_its_message() {
        let request = bridge_request("br0", Prefix::parse("10.88.0.1/24").unwrap()).unwrap().with_u32(IFLA_MASTER, 9);
        let bytes = request.finish(1);
        let message = messages(&bytes).next().unwrap().unwrap();
        let link = parse(&message).unwrap();
        assert_eq!((link.name.as_str(), link.kind.as_str(), link.is_up, link.master), ("br0", "bridge", true, 9));
        assert_eq!(mac_text(&link.mac), "02:1b:0a:58:00:01");
    }
}
