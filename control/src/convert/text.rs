//! The small languages inside text fields: ethertypes, protocols, masked MACs, TCP flags.

use sluice_pipeline::{ethertype, ip_proto};
use sluice_policy::config::Masked;
use sluice_policy::net::{MacAddr, ParseError};

const ETHERTYPES: [(&str, u16); 3] =
    [("arp", ethertype::ARP), ("ipv4", ethertype::IPV4), ("ipv6", ethertype::IPV6)];
const PROTOCOLS: [(&str, u8); 5] = [
    ("icmp", ip_proto::ICMP),
    ("tcp", ip_proto::TCP),
    ("udp", ip_proto::UDP),
    ("icmpv6", ip_proto::ICMPV6),
    ("sctp", ip_proto::SCTP),
];
/// In the order of their bits, FIN lowest (RFC 9293 section 3.1).
const TCP_FLAGS: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"];

/// Reads a number in decimal, or in hexadecimal after `0x`.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Reads an ethertype by name or number.
///
/// # Errors
/// What is wrong and what to write.
pub fn parse_ethertype(text: &str) -> Result<u16, String> {
    let named = ETHERTYPES.iter().find(|(name, _)| text.eq_ignore_ascii_case(name));
    named
        .map(|(_, number)| *number)
        .or_else(|| parse_number(text).and_then(|number| u16::try_from(number).ok()))
        .ok_or_else(|| {
            format!("`{text}` is not an ethertype; write arp, ipv4, ipv6 or a number such as 0x0806")
        })
}

pub(super) fn print_ethertype(number: u16) -> String {
    match ETHERTYPES.iter().find(|(_, known)| *known == number) {
        Some((name, _)) => (*name).to_owned(),
        None => format!("0x{number:04x}"),
    }
}

/// Reads an IP protocol by name or number.
///
/// # Errors
/// What is wrong and what to write.
pub fn parse_protocol(text: &str) -> Result<u8, String> {
    let named = PROTOCOLS.iter().find(|(name, _)| text.eq_ignore_ascii_case(name));
    named
        .map(|(_, number)| *number)
        .or_else(|| parse_number(text).and_then(|number| u8::try_from(number).ok()))
        .ok_or_else(|| {
            format!("`{text}` is not an IP protocol; write tcp, udp, icmp, icmpv6, sctp or a number 0-255")
        })
}

pub(super) fn print_protocol(number: u8) -> String {
    match PROTOCOLS.iter().find(|(_, known)| *known == number) {
        Some((name, _)) => (*name).to_owned(),
        None => number.to_string(),
    }
}

pub(super) fn parse_masked_mac(text: &str) -> Result<Masked<MacAddr>, String> {
    let mac = |part: &str| part.trim().parse().map_err(|error: ParseError| error.to_string());
    let Some((value, mask)) = text.split_once('/') else {
        return Ok(Masked { value: mac(text)?, mask: MacAddr([0xff; 6]) });
    };
    let masked = Masked { value: mac(value)?, mask: mac(mask)? };
    let outside = masked.value.0.iter().zip(masked.mask.0).any(|(value, mask)| value & !mask != 0);
    if outside {
        let mut value = masked.value.0;
        value.iter_mut().zip(masked.mask.0).for_each(|(value, mask)| *value &= mask);
        return Err(format!(
            "`{text}` has bits set that its mask leaves out; did you mean {}/{}?",
            MacAddr(value),
            masked.mask
        ));
    }
    Ok(masked)
}

pub(super) fn print_masked_mac(masked: &Masked<MacAddr>) -> String {
    if masked.mask == MacAddr([0xff; 6]) {
        masked.value.to_string()
    } else {
        format!("{}/{}", masked.value, masked.mask)
    }
}

fn parse_flags(text: &str) -> Result<u8, String> {
    if text.trim().eq_ignore_ascii_case("none") {
        return Ok(0);
    }
    text.split(',').try_fold(0, |flags, name| {
        let bit = TCP_FLAGS.iter().position(|known| name.trim().eq_ignore_ascii_case(known));
        bit.map(|bit| flags | 1 << bit).ok_or_else(|| {
            format!("`{}` is not a TCP flag; use {} (or none)", name.trim(), TCP_FLAGS.join(", "))
        })
    })
}

/// Reads wanted TCP flags and the flags looked at, as in `syn/syn,ack`.
///
/// # Errors
/// What is wrong and what to write.
pub fn parse_tcp_flags(text: &str) -> Result<Masked<u8>, String> {
    let (value, mask) = text.split_once('/').unwrap_or((text, text));
    let masked = Masked { value: parse_flags(value)?, mask: parse_flags(mask)? };
    if masked.mask == 0 {
        return Err(format!("`{text}` looks at no flag; write `none/syn,ack` for neither of them"));
    }
    if masked.value & !masked.mask != 0 {
        return Err(format!("`{text}` wants flags that it does not look at; list them after the slash too"));
    }
    Ok(masked)
}

fn print_flags(flags: u8) -> String {
    if flags == 0 {
        return "none".to_owned();
    }
    let names: Vec<&str> = (0..8).filter(|bit| flags & 1 << bit != 0).map(|bit| TCP_FLAGS[bit]).collect();
    names.join(",")
}

pub(super) fn print_tcp_flags(masked: &Masked<u8>) -> String {
    if masked.value == masked.mask {
        print_flags(masked.value)
    } else {
        format!("{}/{}", print_flags(masked.value), print_flags(masked.mask))
    }
}
