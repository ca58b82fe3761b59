//! Frames, byte by byte, for tests that need exactly those.

use std::net::{Ipv4Addr, Ipv6Addr};

/// A MAC address.
pub type Mac = [u8; 6];

/// The broadcast address.
pub const BROADCAST: Mac = [0xff; 6];
/// TPID of a customer tag.
pub const TPID_CUSTOMER: u16 = 0x8100;
/// TPID of a service tag.
pub const TPID_SERVICE: u16 = 0x88a8;
/// An ethertype that nobody answers (IEEE 802 local experimental).
pub const ETHERTYPE_EXPERIMENT: u16 = 0x88b5;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;

/// The lab's address for the VM or host number `number`.
pub const fn mac(number: u8) -> Mac {
    [0x02, 0, 0, 0, 0, number]
}

/// A MAC address in its usual notation.
pub fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// An Ethernet frame with tags, outermost first.
pub fn ethernet(
    destination: Mac,
    source: Mac,
    tags: &[(u16, u16)],
    ethertype: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A frame of an experimental ethertype, padded to the minimum length, that carries `text`.
pub fn note(destination: Mac, source: Mac, tags: &[(u16, u16)], text: &str) -> Vec<u8> {
    let mut payload = text.as_bytes().to_vec();
    payload.resize(payload.len().max(46), 0);
    ethernet(destination, source, tags, ETHERTYPE_EXPERIMENT, &payload)
}

/// Whether a frame carries `text` somewhere.
pub fn carries(frame: &[u8], text: &str) -> bool {
    frame.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The tags of a frame, outermost first, as (TPID, VLAN identifier).
pub fn tags(frame: &[u8]) -> Vec<(u16, u16)> {
    let mut tags = Vec::new();
    let mut rest = frame.get(12..).unwrap_or_default();
    while let [t0, t1, v0, v1, ..] = *rest {
        let tpid = u16::from_be_bytes([t0, t1]);
        if tpid != TPID_CUSTOMER && tpid != TPID_SERVICE {
            break;
        }
        tags.push((tpid, u16::from_be_bytes([v0, v1]) & 0x0fff));
        rest = &rest[4..];
    }
    tags
}

/// An untagged frame with IPv4 and UDP; the UDP checksum is left out, as IPv4 allows.
pub fn udp4(
    destination: Mac,
    source: Mac,
    addresses: (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(ports.0.to_be_bytes());
    datagram.extend(ports.1.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    ethernet(destination, source, &[], ETHERTYPE_IPV4, &ipv4(addresses, 17, &datagram))
}

/// An untagged frame with IPv4 and TCP: a segment with ACK set, whose checksum is left out.
pub fn tcp4(
    destination: Mac,
    source: Mac,
    addresses: (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(ports.0.to_be_bytes());
    segment.extend(ports.1.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x10, 0, 0, 0, 0, 0]);
    segment.extend(payload);
    ethernet(destination, source, &[], ETHERTYPE_IPV4, &ipv4(addresses, 6, &segment))
}

/// An untagged frame with an ICMP echo request.
pub fn echo_request(
    destination: Mac,
    source: Mac,
    addresses: (Ipv4Addr, Ipv4Addr),
    sequence: u16,
) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0x51, 0x1c];
    message.extend(sequence.to_be_bytes());
    message.extend([0; 32]);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ethernet(destination, source, &[], ETHERTYPE_IPV4, &ipv4(addresses, 1, &message))
}

/// An IPv4 packet from the first to the second address.
fn ipv4(addresses: (Ipv4Addr, Ipv4Addr), protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + payload.len() as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(addresses.0.octets());
    header.extend(addresses.1.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend(payload);
    header
}

/// Whether the checksum of TCP or UDP in an untagged frame with IPv4 is right.
pub fn is_sum_right(frame: &[u8]) -> bool {
    let Some(packet) = frame.get(14..).filter(|packet| packet.len() >= 40) else { return false };
    let end = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let Some(segment) = packet.get(20..end) else { return false };
    let length = (segment.len() as u16).to_be_bytes();
    checksum(&[&packet[12..20], &[0, packet[9]], &length, segment].concat()) == 0
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An ARP request (`operation` 1) or reply (2).
pub fn arp(destination: Mac, operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend(operation.to_be_bytes());
    body.extend(sender.0);
    body.extend(sender.1.octets());
    body.extend(target.0);
    body.extend(target.1.octets());
    body.resize(46, 0);
    ethernet(destination, sender.0, &[], ETHERTYPE_ARP, &body)
}

/// An IPv6 router advertisement to all nodes, from the link-local address of `source`.
pub fn router_advertisement(source: Mac) -> Vec<u8> {
    let own = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, u16::from(source[5]));
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Hop limit 64, no flags, lifetime 30 minutes, no timers.
    let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let pseudo =
        [&own.octets()[..], &all_nodes.octets(), &[0, 0, 0, message.len() as u8, 0, 0, 0, 58]].concat();
    let sum = checksum(&[pseudo, message.clone()].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, 58, 255];
    packet.extend(own.octets());
    packet.extend(all_nodes.octets());
    packet.extend(message);
    ethernet([0x33, 0x33, 0, 0, 0, 1], source, &[], 0x86dd, &packet)
}

/// Whether a frame is an ARP reply from `sender`.
pub fn is_arp_reply(frame: &[u8], sender: Ipv4Addr) -> bool {
    frame.len() >= 42
        && frame[12..14] == ETHERTYPE_ARP.to_be_bytes()
        && frame[20..22] == [0, 2]
        && frame[28..32] == sender.octets()
}

/// Whether a frame is an untagged ICMP echo reply.
pub fn is_echo_reply(frame: &[u8], sequence: u16) -> bool {
    frame.len() >= 42
        && frame[12..14] == ETHERTYPE_IPV4.to_be_bytes()
        && frame[23] == 1
        && frame[34] == 0
        && frame[40..42] == sequence.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_read_as_written() {
        let frame = note(mac(1), mac(2), &[(TPID_SERVICE, 100), (TPID_CUSTOMER, 7)], "hello");
        assert_eq!(tags(&frame), [(TPID_SERVICE, 100), (TPID_CUSTOMER, 7)]);
        assert!(carries(&frame, "hello"));
        assert!(!carries(&frame, "bye"));
    }

    #[test]
    fn an_ipv4_header_sums_to_zero() {
        let frame = udp4(mac(1), mac(2), ([10, 0, 0, 1].into(), [10, 0, 0, 2].into()), (1, 2), b"odd");
        assert_eq!(checksum(&frame[14..34]), 0);
        assert!(!is_sum_right(&frame) && !is_sum_right(&frame[..20]));
    }
}
