//! IPv4 addresses on links, and routes.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::address::Prefix;
use super::message::{Message, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Request, attributes, u32_at};
use super::socket::Socket;
use crate::error::{Error, Result};

const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_TABLE: u16 = 15;

const AF_INET: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;
const RTMSG_BYTES: usize = 12;

/// Adds an address to a link; one that is there already is fine.
pub fn add_address(socket: &mut Socket, index: u32, prefix: Prefix) -> Result<()> {
    // struct ifaddrmsg: family, prefix length, flags, scope, index
    let mut header = [AF_INET, prefix.n_bits, 0, RT_SCOPE_UNIVERSE, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut request = Request::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &header)
        .with(IFA_LOCAL, &prefix.address.octets())
        .with(IFA_ADDRESS, &prefix.address.octets());
    if let Some(broadcast) = prefix.broadcast() {
        request = request.with(IFA_BROADCAST, &broadcast.octets());
    }
    match socket.execute(request) {
        Err(Error::Os { errno: Errno::EXIST, .. }) => Ok(()),
        other => other,
    }
}

/// Sets the default route of a socket's namespace.
pub fn set_default(socket: &mut Socket, index: u32, gateway: Ipv4Addr) -> Result<()> {
    let request = Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &header(RT_TABLE_MAIN))
        .with(RTA_GATEWAY, &gateway.octets())
        .with_u32(RTA_OIF, index);
    socket.execute(request)
}

/// Lists the prefixes of the main table in the current namespace, sorted, without the default route.
pub fn list() -> Result<Vec<Prefix>> {
    let mut found = Socket::open()?.dump(&Request::new(RTM_GETROUTE, 0, &header(0)), parse)?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// `struct rtmsg`: family, destination and source prefix lengths, tos, table, protocol, scope, type, flags.
fn header(table: u8) -> [u8; RTMSG_BYTES] {
    [AF_INET, 0, 0, 0, table, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0, 0, 0, 0]
}

fn parse(message: &Message<'_>) -> Option<Prefix> {
    let &[family, n_bits, _, _, table, ..] = message.payload.first_chunk::<RTMSG_BYTES>()?;
    if message.kind != RTM_NEWROUTE || family != AF_INET || n_bits == 0 {
        return None;
    }
    let mut table = u32::from(table);
    let mut address = None;
    for (kind, value) in attributes(&message.payload[RTMSG_BYTES..]) {
        match kind {
            RTA_DST => address = value.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets)),
            RTA_TABLE => table = u32_at(value, 0)?,
            _ => {}
        }
    }
    address.filter(|_| table == u32::from(RT_TABLE_MAIN)).map(|address| Prefix { address, n_bits })
}

#[cfg(test)]
mod tests {
    use super::super::message::messages;
    use super::*;

    fn parsed(n_bits: u8, table: u8, destination: Option<[u8; 4]>, long_table: Option<u32>) -> Option<Prefix> {
        let mut bytes = header(table);
        bytes[1] = n_bits;
        let mut request = Request::new(RTM_NEWROUTE, 0, &bytes);
        if let Some(destination) = destination {
            request = request.with(RTA_DST, &destination);
        }
        if let Some(table) = long_table {
            request = request.with_u32(RTA_TABLE, table);
        }
        let bytes = request.finish(1);
        parse(&messages(&bytes).next().unwrap().unwrap())
    }

    #[test]
    fn only_prefixes_of_the_main_table_count() {
        assert_eq!(parsed(24, 254, Some([192, 168, 7, 0]), None).unwrap().to_string(), "192.168.7.0/24");
        assert_eq!(parsed(0, 254, None, None), None);
        assert_eq!(parsed(32, 255, Some([127, 0, 0, 1]), None), None);
        assert_eq!(parsed(24, 252, Some([10, 0, 0, 0]), Some(1000)), None);
        assert_eq!(parsed(24, 252, Some([10, 0, 0, 0]), Some(254)).unwrap().to_string(), "10.0.0.0/24");
    }
}
