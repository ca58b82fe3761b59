//! Addresses, VLANs and units, as types that can only be built valid.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Why a text or number is not one of this module's values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not a MAC address.
    #[error("`{0}` is not a MAC address; write six hexadecimal bytes, as in 02:00:00:00:00:01")]
    Mac(String),
    /// Not a VLAN identifier.
    #[error("VLAN {0} is out of range; a VLAN identifier is 1 to 4094")]
    Vlan(u32),
    /// Not an IP prefix.
    #[error("`{0}` is not an IP address or prefix; write 10.0.0.0/8, 2001:db8::/32 or a single address")]
    Prefix(String),
    /// Bits set beyond the prefix length.
    #[error("`{0}` has bits set beyond its prefix length; did you mean {1}?")]
    PrefixHostBits(String, String),
    /// Not a port or port range.
    #[error("`{0}` is not a port or port range; write 80 or 8000-8080, lower end first")]
    Ports(String),
    /// Not a VLAN range.
    #[error("`{0}` is not a VLAN or VLAN range; write 10 or 10-20, lower end first, within 1 to 4094")]
    Vlans(String),
}

/// A MAC address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether it is a group (multicast or broadcast) address.
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether all bytes are zero.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(MacAddr(bytes)) }
    }
}

/// A VLAN identifier, 1 to 4094 (IEEE 802.1Q clause 9.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VlanId(u16);

impl VlanId {
    /// # Errors
    /// [`ParseError::Vlan`] outside 1–4094.
    pub fn new(vid: u32) -> Result<Self, ParseError> {
        match u16::try_from(vid) {
            Ok(vid @ 1..=4094) => Ok(VlanId(vid)),
            _ => Err(ParseError::Vlan(vid)),
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of consecutive VLANs, written `10` or `10-20`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VlanRange {
    first: VlanId,
    last: VlanId,
}

impl VlanRange {
    /// Both ends inclusive; `None` if `last` is below `first`.
    pub fn new(first: VlanId, last: VlanId) -> Option<Self> {
        (first <= last).then_some(VlanRange { first, last })
    }

    /// First VLAN.
    pub const fn first(self) -> VlanId {
        self.first
    }

    /// Last VLAN.
    pub const fn last(self) -> VlanId {
        self.last
    }

    /// Whether `vid` is in the range.
    pub const fn contains(self, vid: u16) -> bool {
        self.first.0 <= vid && vid <= self.last.0
    }
}

impl fmt::Display for VlanRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl FromStr for VlanRange {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::Vlans(text.to_owned());
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let id = |part: &str| {
            part.trim().parse::<u32>().ok().and_then(|vid| VlanId::new(vid).ok()).ok_or_else(error)
        };
        VlanRange::new(id(first)?, id(last)?).ok_or_else(error)
    }
}

/// A range of transport ports, written `80` or `8000-8080`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Both ends inclusive; `None` if `last` is below `first`.
    pub fn new(first: u16, last: u16) -> Option<Self> {
        (first <= last).then_some(PortRange { first, last })
    }

    /// First port.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// Last port.
    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether `port` is in the range.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl FromStr for PortRange {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::Ports(text.to_owned());
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |part: &str| part.trim().parse::<u16>().map_err(|_| error());
        PortRange::new(port(first)?, port(last)?).ok_or_else(error)
    }
}

/// An IP prefix. Bits beyond the length are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpPrefix {
    address: IpAddr,
    length: u8,
}

impl IpPrefix {
    /// # Errors
    /// [`ParseError::Prefix`] if the length is past the family's, [`ParseError::PrefixHostBits`] if bits beyond it are set.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, ParseError> {
        let text = || format!("{address}/{length}");
        let network = match address {
            IpAddr::V4(ip) if length <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                IpAddr::from((u32::from(ip) & mask).to_be_bytes())
            }
            IpAddr::V6(ip) if length <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                IpAddr::from((u128::from(ip) & mask).to_be_bytes())
            }
            _ => return Err(ParseError::Prefix(text())),
        };
        if network != address {
            return Err(ParseError::PrefixHostBits(text(), format!("{network}/{length}")));
        }
        Ok(IpPrefix { address, length })
    }

    /// The network address.
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// Bits that count.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `ip` is of the same family and inside.
    pub fn contains(self, ip: IpAddr) -> bool {
        match (self.address, ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                self.length == 0 || (u32::from(a) ^ u32::from(b)) >> (32 - u32::from(self.length)) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                self.length == 0 || (u128::from(a) ^ u128::from(b)) >> (128 - u32::from(self.length)) == 0
            }
            _ => false,
        }
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for IpPrefix {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::Prefix(text.to_owned());
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let length = match length {
            Some(length) => length.parse().map_err(|_| error())?,
            None if address.is_ipv4() => 32,
            None => 128,
        };
        IpPrefix::new(address, length)
    }
}
