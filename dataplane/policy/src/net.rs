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

/// A decimal number, spaces around it allowed, a sign not.
fn number<T: FromStr>(text: &str) -> Option<T> {
    let text = text.trim();
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
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
            let part =
                parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(error)?;
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
        let id = |part: &str| number::<u32>(part).and_then(|vid| VlanId::new(vid).ok()).ok_or_else(error);
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
        let port = |part: &str| number::<u16>(part).ok_or_else(error);
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
            Some(length) => number(length).ok_or_else(error)?,
            None if address.is_ipv4() => 32,
            None => 128,
        };
        IpPrefix::new(address, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_back_as_they_are_written() {
        for text in ["02:00:00:00:00:0a", "ff:ff:ff:ff:ff:ff"] {
            assert_eq!(text.parse::<MacAddr>().map(|mac| mac.to_string()).as_deref(), Ok(text));
        }
        for text in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "2001:db8::/32", "2001:db8::1/128"] {
            assert_eq!(text.parse::<IpPrefix>().map(|prefix| prefix.to_string()).as_deref(), Ok(text));
        }
        for text in ["10", "10-20", "1-4094"] {
            assert_eq!(text.parse::<VlanRange>().map(|range| range.to_string()).as_deref(), Ok(text));
        }
        for text in ["0", "80", "8000-8080", "0-65535"] {
            assert_eq!(text.parse::<PortRange>().map(|range| range.to_string()).as_deref(), Ok(text));
        }
        assert_eq!("10.0.0.1".parse::<IpPrefix>().map(IpPrefix::length), Ok(32));
    }

    #[test]
    fn what_is_no_value_is_refused_with_a_remedy() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02:00:00:00:00:0g",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(ParseError::Mac(text.into())), "{text}");
        }
        for text in ["0", "4095", "20-10", "10-", "-10", "+10", "x", "1-2-3"] {
            assert_eq!(text.parse::<VlanRange>(), Err(ParseError::Vlans(text.into())), "{text}");
        }
        for text in ["65536", "+80", "20-10", "", "http"] {
            assert_eq!(text.parse::<PortRange>(), Err(ParseError::Ports(text.into())), "{text}");
        }
        for text in ["10.0.0.0/33", "::/129", "10.0.0", "10.0.0.0/", "10.0.0.0/-1"] {
            assert!(matches!(text.parse::<IpPrefix>(), Err(ParseError::Prefix(_))), "{text}");
        }
        let error = "10.0.0.1/8".parse::<IpPrefix>().expect_err("host bits");
        assert!(error.to_string().contains("10.0.0.0/8"), "{error}");
    }

    #[test]
    fn prefixes_hold_addresses_of_their_family_only() {
        let holds = |prefix: &str, ip: &str| {
            let prefix: IpPrefix = prefix.parse().expect("a prefix");
            prefix.contains(ip.parse().expect("an address"))
        };
        assert!(holds("0.0.0.0/0", "255.255.255.255") && holds("::/0", "ff02::1"));
        assert!(!holds("0.0.0.0/0", "::ffff:10.0.0.1") && !holds("::/0", "10.0.0.1"));
        assert!(holds("10.0.0.0/31", "10.0.0.1") && !holds("10.0.0.0/31", "10.0.0.2"));
        assert!(holds("2001:db8::/127", "2001:db8::1") && !holds("2001:db8::/128", "2001:db8::1"));
    }
}
