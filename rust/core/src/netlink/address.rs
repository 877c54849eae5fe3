//! IPv4 addresses with a prefix length, as text and as the kernel's bytes.

use std::net::Ipv4Addr;

use rustix::io::Errno;

/// An address and the length of its network's prefix: "10.88.0.1/24".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    /// The address, host bits included.
    pub address: Ipv4Addr,
    /// 0 to 32.
    pub n_bits: u8,
}

impl Prefix {
    /// Parses "10.88.0.1/24"; EINVAL for anything else.
    pub fn parse(text: &str) -> Result<Self, Errno> {
        let (address, n_bits) = text.split_once('/').ok_or(Errno::INVAL)?;
        // `u8::from_str` takes a sign, which no prefix has.
        if !n_bits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(Errno::INVAL);
        }
        let n_bits: u8 = n_bits.parse().map_err(|_| Errno::INVAL)?;
        let address = address.parse().map_err(|_| Errno::INVAL)?;
        if n_bits > 32 { Err(Errno::INVAL) } else { Ok(Self { address, n_bits }) }
    }

    /// Returns the network's last address, to which broadcasts go; None where a network is too small to have one.
    pub fn broadcast(&self) -> Option<Ipv4Addr> {
        let host_bits = u32::MAX.checked_shr(u32::from(self.n_bits)).unwrap_or(0);
        (self.n_bits < 31).then(|| Ipv4Addr::from(u32::from(self.address) | host_bits))
    }
}

impl std::fmt::Display for Prefix {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.address, self.n_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        assert_eq!(Prefix::parse("10.88.0.1/24").unwrap().to_string(), "10.88.0.1/24");
        for bad in ["", "10.88.0.1", "10.88.0.1/", "10.88.0.1/33", "10.88.0/24", "10.88.0.1/+4", "10.88.0.1/-1", "::1/64"] {
            assert_eq!(Prefix::parse(bad), Err(Errno::INVAL), "{bad}");
        }
    }

    #[test]
    fn broadcast_is_the_last_address() {
        let broadcast = |text| Prefix::parse(text).unwrap().broadcast().map(|address| address.to_string());
        assert_eq!(broadcast("10.88.0.1/24").as_deref(), Some("10.88.0.255"));
        assert_eq!(broadcast("1.2.3.4/0").as_deref(), Some("255.255.255.255"));
        assert_eq!(broadcast("10.88.0.1/31"), None);
        assert_eq!(broadcast("10.88.0.1/32"), None);
    }
}
