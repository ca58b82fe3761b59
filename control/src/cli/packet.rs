//! Frames for `sluice trace`: from hexadecimal text, from a capture file, or built from `key=value` words.

use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use etherparse::{IpNumber, PacketBuilder, TcpHeader};
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use sluice_pipeline::ethertype;
use sluice_policy::net::{MacAddr, VlanId};

use crate::convert::{parse_ethertype, parse_number, parse_protocol, parse_tcp_flags};

/// Why there is no frame.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// Not hexadecimal bytes.
    #[error("`{0}` is not a row of hexadecimal bytes, as in 020000000001… or 02:00:00:00:00:01:…")]
    Hex(String),
    /// The file cannot be read.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Not `key=value`.
    #[error("`{0}` is not of the form key=value; keys are {KEYS}")]
    Word(String),
    /// No such key.
    #[error("`{0}` is not a key; keys are {KEYS}")]
    Key(String),
    /// A value that does not fit its key.
    #[error("{key}: {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// Values that do not fit each other.
    #[error("{0}")]
    Conflict(&'static str),
}

const KEYS: &str = "srcMac, dstMac, vlan, serviceVlan, ethertype, srcIp, dstIp, ipProto, srcPort, dstPort, \
                    tcpFlags, icmpType, icmpCode, ttl, payload (a number of bytes)";

/// Reads hexadecimal bytes, with or without `:`, `-`, spaces and `0x`.
///
/// # Errors
/// [`PacketError::Hex`].
pub fn from_hex(text: &str) -> Result<Vec<u8>, PacketError> {
    let error = || PacketError::Hex(text.to_owned());
    let digits: String = text
        .split(|c: char| c == ':' || c == '-' || c.is_whitespace())
        .map(|part| part.strip_prefix("0x").unwrap_or(part))
        .collect();
    if digits.is_empty() || !digits.len().is_multiple_of(2) || !digits.is_ascii() {
        return Err(error());
    }
    let bytes = (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16));
    bytes.collect::<Result<_, _>>().map_err(|_| error())
}

/// Reads every frame of a pcap or pcapng file.
///
/// # Errors
/// [`PacketError::File`].
pub fn from_pcap(path: &Path) -> Result<Vec<Vec<u8>>, PacketError> {
    let error = |problem: String| PacketError::File { path: path.to_owned(), problem };
    let open = || File::open(path).map_err(|source| error(source.to_string()));
    let mut frames = Vec::new();
    if let Ok(mut reader) = PcapReader::new(open()?) {
        while let Some(packet) = reader.next_packet() {
            frames.push(packet.map_err(|source| error(source.to_string()))?.data.into_owned());
        }
        return Ok(frames);
    }
    let mut reader = PcapNgReader::new(open()?)
        .map_err(|source| error(format!("neither a pcap nor a pcapng file: {source}")))?;
    while let Some(block) = reader.next_block() {
        match block.map_err(|source| error(source.to_string()))? {
            Block::EnhancedPacket(packet) => frames.push(packet.data.into_owned()),
            Block::SimplePacket(packet) => frames.push(packet.data.into_owned()),
            _ => {}
        }
    }
    Ok(frames)
}

/// A frame to be built. Fields that stay empty get the obvious value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Builder {
    /// Source MAC.
    pub src_mac: MacAddr,
    /// Source address, used where none is given and the family fits.
    pub own_ips: Vec<IpAddr>,
    dst_mac: Option<MacAddr>,
    vlan: Option<VlanId>,
    service_vlan: Option<VlanId>,
    ethertype: Option<u16>,
    src_ip: Option<IpAddr>,
    dst_ip: Option<IpAddr>,
    ip_proto: Option<u8>,
    src_port: Option<u16>,
    dst_port: Option<u16>,
    tcp_flags: Option<u8>,
    icmp_type: Option<u8>,
    icmp_code: Option<u8>,
    ttl: Option<u8>,
    payload: usize,
}

fn value<T: FromStr>(key: &str, text: &str) -> Result<T, PacketError>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| PacketError::Value {
        key: key.to_owned(),
        problem: format!("`{text}`: {error}"),
    })
}

fn checked<T>(key: &str, result: Result<T, String>) -> Result<T, PacketError> {
    result.map_err(|problem| PacketError::Value { key: key.to_owned(), problem })
}

fn vlan(key: &str, text: &str) -> Result<VlanId, PacketError> {
    checked(key, VlanId::new(value(key, text)?).map_err(|error| error.to_string()))
}

impl Builder {
    /// Takes one `key=value` word.
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn set(&mut self, word: &str) -> Result<(), PacketError> {
        let (key, text) = word.split_once('=').ok_or_else(|| PacketError::Word(word.to_owned()))?;
        match key.to_ascii_lowercase().replace(['_', '-'], "").as_str() {
            "srcmac" => self.src_mac = value(key, text)?,
            "dstmac" => self.dst_mac = Some(value(key, text)?),
            "vlan" => self.vlan = Some(vlan(key, text)?),
            "servicevlan" => self.service_vlan = Some(vlan(key, text)?),
            "ethertype" => self.ethertype = Some(checked(key, parse_ethertype(text))?),
            "srcip" => self.src_ip = Some(value(key, text)?),
            "dstip" => self.dst_ip = Some(value(key, text)?),
            "ipproto" => self.ip_proto = Some(checked(key, parse_protocol(text))?),
            "srcport" => self.src_port = Some(value(key, text)?),
            "dstport" => self.dst_port = Some(value(key, text)?),
            "tcpflags" => self.tcp_flags = Some(checked(key, parse_tcp_flags(text))?.value),
            "icmptype" => self.icmp_type = Some(value(key, text)?),
            "icmpcode" => self.icmp_code = Some(value(key, text)?),
            "ttl" => self.ttl = Some(value(key, text)?),
            "payload" => {
                let length = parse_number(text).and_then(|length| usize::try_from(length).ok());
                let length = length.filter(|length| *length <= 65_000);
                let problem = format!("`{text}` is not a length up to 65000");
                self.payload = checked(key, length.ok_or(problem))?;
            }
            _ => return Err(PacketError::Key(key.to_owned())),
        }
        Ok(())
    }

    /// The frame.
    ///
    /// # Errors
    /// [`PacketError::Conflict`] if the words do not fit together.
    pub fn build(&self) -> Result<Vec<u8>, PacketError> {
        let (number, body) = match self.ethertype {
            Some(ethertype::ARP) => (ethertype::ARP, self.arp()?),
            Some(number) if number != ethertype::IPV4 && number != ethertype::IPV6 => {
                (number, vec![0; self.payload.max(46)])
            }
            family => self.ip(family)?,
        };
        let mut frame = Vec::new();
        let broadcast = number == ethertype::ARP;
        let default_dst = if broadcast { MacAddr([0xff; 6]) } else { MacAddr([2, 0, 0, 0, 0, 0xfe]) };
        frame.extend(self.dst_mac.unwrap_or(default_dst).0);
        frame.extend(self.src_mac.0);
        for (kind, vid) in [(ethertype::STAG, self.service_vlan), (ethertype::CTAG, self.vlan)] {
            if let Some(vid) = vid {
                frame.extend(kind.to_be_bytes());
                frame.extend(vid.get().to_be_bytes());
            }
        }
        frame.extend(number.to_be_bytes());
        frame.extend(body);
        Ok(frame)
    }

    fn own_ip(&self, like: IpAddr) -> IpAddr {
        let own = self.own_ips.iter().find(|ip| ip.is_ipv4() == like.is_ipv4());
        self.src_ip.or(own.copied()).unwrap_or(match like {
            IpAddr::V4(_) => IpAddr::from([192, 0, 2, 1]),
            IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
        })
    }

    /// A request (RFC 826).
    fn arp(&self) -> Result<Vec<u8>, PacketError> {
        let target = self.dst_ip.unwrap_or(IpAddr::from([192, 0, 2, 2]));
        let (IpAddr::V4(sender), IpAddr::V4(target)) = (self.own_ip(target), target) else {
            return Err(PacketError::Conflict("ARP is for IPv4; give IPv4 addresses, or ethertype=ipv6"));
        };
        let mut body = vec![0, 1, 8, 0, 6, 4, 0, 1];
        body.extend(self.src_mac.0);
        body.extend(sender.octets());
        body.extend([0; 6]);
        body.extend(target.octets());
        Ok(body)
    }

    fn ip(&self, family: Option<u16>) -> Result<(u16, Vec<u8>), PacketError> {
        let icmpv6 = self.ip_proto == Some(IpNumber::IPV6_ICMP.0);
        let wants_ipv6 = family == Some(ethertype::IPV6) || (family.is_none() && icmpv6);
        let target = self.dst_ip.unwrap_or_else(|| match self.src_ip {
            Some(IpAddr::V6(_)) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 2]),
            None if wants_ipv6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 2]),
            _ => IpAddr::from([192, 0, 2, 2]),
        });
        let ttl = self.ttl.unwrap_or(64);
        let (number, ip) = match (self.own_ip(target), target) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                (ethertype::IPV4, PacketBuilder::ipv4(src.octets(), dst.octets(), ttl))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                (ethertype::IPV6, PacketBuilder::ipv6(src.octets(), dst.octets(), ttl))
            }
            _ => return Err(PacketError::Conflict("srcIp and dstIp must be of the same family")),
        };
        if family.is_some_and(|family| family != number) {
            return Err(PacketError::Conflict("the ethertype does not fit the addresses"));
        }
        let payload = vec![0; self.payload];
        let (src_port, dst_port) = (self.src_port.unwrap_or(40_000), self.dst_port.unwrap_or(80));
        let has_ports = self.src_port.is_some() || self.dst_port.is_some() || self.tcp_flags.is_some();
        let default_proto = if has_ports {
            IpNumber::TCP
        } else if number == ethertype::IPV4 {
            IpNumber::ICMP
        } else {
            IpNumber::IPV6_ICMP
        };
        let proto = self.ip_proto.map_or(default_proto, IpNumber);
        let mut body = Vec::new();
        let code = self.icmp_code.unwrap_or(0);
        let written = match proto {
            IpNumber::TCP => {
                let mut header = TcpHeader::new(src_port, dst_port, 1, 64_240);
                let flags = self.tcp_flags.unwrap_or(1 << 1);
                let on = |bit: u8| flags & 1 << bit != 0;
                (header.fin, header.syn, header.rst, header.psh) = (on(0), on(1), on(2), on(3));
                (header.ack, header.urg, header.ece, header.cwr) = (on(4), on(5), on(6), on(7));
                ip.tcp_header(header).write(&mut body, &payload)
            }
            IpNumber::UDP => ip.udp(src_port, dst_port).write(&mut body, &payload),
            IpNumber::ICMP => {
                ip.icmpv4_raw(self.icmp_type.unwrap_or(8), code, [0; 4]).write(&mut body, &payload)
            }
            IpNumber::IPV6_ICMP => {
                ip.icmpv6_raw(self.icmp_type.unwrap_or(128), code, [0; 4]).write(&mut body, &payload)
            }
            other => ip.write(&mut body, other, &payload),
        };
        written.map_err(|_| {
            PacketError::Conflict("this packet cannot be built: too long, or the ICMP of another family")
        })?;
        Ok((number, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(words: &str) -> Vec<u8> {
        let mut builder = Builder { src_mac: MacAddr([2, 0, 0, 0, 0, 1]), ..Builder::default() };
        for word in words.split_whitespace() {
            builder.set(word).expect("a good word");
        }
        builder.build().expect("a good packet")
    }

    fn parsed(frame: &[u8]) -> sluice_pipeline::Headers {
        let mut headers = sluice_pipeline::Headers::default();
        sluice_pipeline::parse(&sluice_policy::sim::SliceFrame::new(frame), &mut headers)
            .expect("well-formed");
        headers
    }

    #[test]
    fn packets_are_what_the_words_say() {
        let headers = parsed(&build("vlan=10 dstIp=10.0.0.2 dstPort=443 tcpFlags=syn,ack payload=100"));
        assert_eq!((headers.tag_count, headers.key.dst_port, headers.key.tcp_flags), (1, 443, 0x12));
        let headers = parsed(&build("serviceVlan=20 vlan=10 dstIp=2001:db8::5 ipProto=udp"));
        assert_eq!((headers.tag_count, headers.key.ethertype, headers.key.proto), (2, ethertype::IPV6, 17));
        assert_eq!(parsed(&build("ethertype=arp")).key.ethertype, ethertype::ARP);
        assert_eq!(parsed(&build("icmpType=3 icmpCode=1")).key.icmp_type, 3);
        assert_eq!(parsed(&build("ethertype=ipv6")).key.proto, 58);
        assert_eq!(parsed(&build("ipProto=47")).key.proto, 47);
        assert_eq!(parsed(&build("ethertype=0x88cc")).key.ethertype, 0x88cc);
    }

    #[test]
    fn bad_words_are_refused() {
        let mut builder = Builder::default();
        for word in ["dstPort", "dstport=x", "colour=red", "vlan=5000", "payload=99999"] {
            assert!(builder.set(word).is_err(), "{word}");
        }
        builder.set("srcIp=10.0.0.1").expect("good");
        builder.set("dstIp=::1").expect("good");
        assert!(builder.build().is_err());
    }

    #[test]
    fn hexadecimal_is_read_in_every_spelling() {
        for text in ["0200ff", "02:00:ff", "0x02 0x00 0xFF", "02-00-ff"] {
            assert_eq!(from_hex(text).expect("good"), [2, 0, 255], "{text}");
        }
        for text in ["", "0", "zz", "0é0"] {
            assert!(from_hex(text).is_err(), "{text}");
        }
    }

    #[test]
    fn captures_are_read() {
        use pcap_file::pcap::{PcapPacket, PcapWriter};
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("capture");
        let mut writer = PcapWriter::new(File::create(&path).expect("made")).expect("a header");
        let frames = [build("dstPort=80"), build("ethertype=arp")];
        for frame in &frames {
            let length = u32::try_from(frame.len()).expect("short");
            let packet = PcapPacket::new(std::time::Duration::ZERO, length, frame);
            writer.write_packet(&packet).expect("written");
        }
        drop(writer);
        assert_eq!(from_pcap(&path).expect("a capture"), frames);
        std::fs::write(&path, "no capture").expect("written");
        assert!(from_pcap(&path).is_err());
        assert!(from_pcap(&dir.path().join("absent")).is_err());
    }
}
