//! Switchdev mode: rules on representors, matched as the kernel's flow dissector and cls_flower do.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{
    FlowerAction, FlowerMatch, FlowerProgram, FlowerRule, RulePort, Target, VlanProtocol,
};

use super::frame::{Tag, addresses, be16, pop, push, tag};
use super::{Port, Soft};
use crate::contract::VfIndex;

/// More changes of chain than any program needs.
const GOTO_MAX: usize = 16;

/// What a program does with a frame.
enum Outcome {
    /// No rule, or a trap: software decides.
    Software,
    Dropped,
    Sent(Target, Vec<u8>),
}

impl Soft {
    pub(super) fn switch(&self, from: Port, frame: &[u8], over_rate: bool) -> Vec<(Port, Vec<u8>)> {
        let is_open = |vf: VfIndex| self.functions.get(&vf).is_some_and(|function| function.enabled);
        let outcome = match from {
            Port::Pf => Outcome::Sent(Target::Uplink, frame.to_vec()),
            Port::Representor(vf) => Outcome::Sent(Target::Vf(vf), frame.to_vec()),
            Port::Vf(vf) if !is_open(vf) => Outcome::Dropped,
            Port::Vf(vf) => match self.run(&self.functions[&vf].rules, RulePort::Own, frame, over_rate) {
                Outcome::Software => return vec![(Port::Representor(vf), frame.to_vec())],
                outcome => outcome,
            },
            Port::Wire => {
                let programs = self.functions.values().map(|function| &function.rules);
                let outcomes = programs.map(|rules| self.run(rules, RulePort::Uplink, frame, false));
                match outcomes.into_iter().find(|outcome| !matches!(outcome, Outcome::Software)) {
                    None => return vec![(Port::Pf, frame.to_vec())],
                    Some(outcome) => outcome,
                }
            }
        };
        match outcome {
            Outcome::Sent(Target::Uplink, frame) => vec![(Port::Wire, frame)],
            Outcome::Sent(Target::Vf(vf), frame) if is_open(vf) => vec![(Port::Vf(vf), frame)],
            Outcome::Sent(..) | Outcome::Dropped | Outcome::Software => Vec::new(),
        }
    }

    fn run(&self, program: &FlowerProgram, port: RulePort, frame: &[u8], over_rate: bool) -> Outcome {
        let Some(keys) = Keys::dissect(frame, self.flaws.stops_at_extensions) else {
            return Outcome::Software;
        };
        let mut frame = frame.to_vec();
        let mut chain = 0;
        for _ in 0..GOTO_MAX {
            let rules = program.rules().iter().filter(|rule| rule.port == port && rule.chain == chain);
            let Some(rule) =
                rules.filter(|rule| keys.are_matched_by(&rule.matches)).min_by_key(|rule| rule.priority)
            else {
                return Outcome::Software;
            };
            match self.act(rule, &mut frame, over_rate) {
                Ok(next) => chain = next,
                Err(outcome) => return outcome,
            }
        }
        Outcome::Dropped
    }

    /// The chain to go to, or where the frame ends.
    fn act(&self, rule: &FlowerRule, frame: &mut Vec<u8>, over_rate: bool) -> Result<u32, Outcome> {
        for action in &rule.actions {
            match action {
                FlowerAction::Drop => return Err(Outcome::Dropped),
                FlowerAction::Goto(chain) => return Ok(*chain),
                FlowerAction::Trap => return Err(Outcome::Software),
                FlowerAction::Redirect(target) => return Err(Outcome::Sent(*target, std::mem::take(frame))),
                FlowerAction::Police(_) if over_rate && !self.flaws.ignores_rates => {
                    return Err(Outcome::Dropped);
                }
                FlowerAction::Police(_) => {}
                FlowerAction::VlanPush { protocol, vid, priority } => {
                    let tci = vid.get() | u16::from(*priority) << 13;
                    *frame = push(frame, Tag { tpid: VlanProtocol::tpid(*protocol), tci });
                }
                FlowerAction::VlanPop => *frame = pop(frame),
            }
        }
        Err(Outcome::Dropped)
    }
}

/// What the dissector finds; what it does not find is zero.
#[derive(Debug, Default)]
struct Keys {
    dst: MacAddr,
    src: MacAddr,
    ethertype: u16,
    tag: Option<Tag>,
    /// Behind the tag, if there is one.
    inner_ethertype: u16,
    src_ip: Option<IpAddr>,
    dst_ip: Option<IpAddr>,
    ip_proto: u8,
    is_fragment: bool,
    src_port: u16,
    dst_port: u16,
    tcp_flags: u8,
    icmp_type: u8,
    icmp_code: u8,
}

impl Keys {
    fn dissect(frame: &[u8], stops_at_extensions: bool) -> Option<Keys> {
        let (dst, src, ethertype) = addresses(frame)?;
        let tag = tag(frame);
        let mut keys = Keys { dst, src, ethertype, tag, ..Keys::default() };
        let (network, at) = match tag {
            Some(_) => (be16(frame, 16)?, 18),
            None => (ethertype, 14),
        };
        if tag.is_some() {
            keys.inner_ethertype = network;
        }
        let packet = frame.get(at..)?;
        // A packet that is cut off leaves the keys as far as they were found.
        let _ = match network {
            0x0800 => keys.ipv4(packet),
            0x86dd => keys.ipv6(packet, stops_at_extensions),
            _ => None,
        };
        Some(keys)
    }

    fn ipv4(&mut self, packet: &[u8]) -> Option<()> {
        let header = usize::from(packet.first()? & 15) * 4;
        let address =
            |at: usize| packet.get(at..at + 4)?.try_into().ok().map(<Ipv4Addr as From<[u8; 4]>>::from);
        (header >= 20).then_some(())?;
        self.dst_ip = Some(address(16)?.into());
        self.src_ip = Some(address(12)?.into());
        self.ip_proto = packet[9];
        self.is_fragment = be16(packet, 6)? & 0x3fff != 0;
        if self.is_fragment { Some(()) } else { self.transport(packet.get(header..)?) }
    }

    fn ipv6(&mut self, packet: &[u8], stops_at_extensions: bool) -> Option<()> {
        let address =
            |at: usize| packet.get(at..at + 16)?.try_into().ok().map(<Ipv6Addr as From<[u8; 16]>>::from);
        self.dst_ip = Some(address(24)?.into());
        self.src_ip = Some(address(8)?.into());
        self.ip_proto = packet[6];
        let mut at = 40;
        while matches!(self.ip_proto, 0 | 43 | 60) && !stops_at_extensions {
            let header = packet.get(at..at + 2)?;
            self.ip_proto = header[0];
            at += (usize::from(header[1]) + 1) * 8;
        }
        if self.ip_proto == 44 {
            self.is_fragment = true;
            if !stops_at_extensions {
                self.ip_proto = *packet.get(at)?;
            }
            return Some(());
        }
        self.transport(packet.get(at..)?)
    }

    fn transport(&mut self, segment: &[u8]) -> Option<()> {
        match self.ip_proto {
            6 | 17 | 132 => {
                let (src, dst) = (be16(segment, 0)?, be16(segment, 2)?);
                (self.src_port, self.dst_port) = (src, dst);
                // The kernel wants a whole header that says so itself.
                if self.ip_proto == 6 && segment.get(..20)?[12] >= 0x50 {
                    self.tcp_flags = segment[13];
                }
            }
            1 | 58 => {
                let header = segment.get(..8)?;
                (self.icmp_type, self.icmp_code) = (header[0], header[1]);
            }
            _ => {}
        }
        Some(())
    }

    fn are_matched_by(&self, wanted: &FlowerMatch) -> bool {
        let FlowerMatch {
            ethertype,
            vlan,
            src_mac,
            dst_mac,
            src_ip,
            dst_ip,
            ip_proto,
            fragment,
            src_port,
            dst_port,
            tcp_flags,
            icmp_type,
            icmp_code,
        } = wanted;
        let mac = |wanted: &Option<sluice_policy::config::Masked<MacAddr>>, found: MacAddr| {
            wanted.is_none_or(|wanted| (0..6).all(|i| found.0[i] & wanted.mask.0[i] == wanted.value.0[i]))
        };
        ethertype.is_none_or(|wanted| wanted == self.ethertype)
            && vlan.is_none_or(|wanted| {
                self.tag.is_some_and(|tag| {
                    wanted.vid.is_none_or(|vid| vid == tag.vid())
                        && wanted.ethertype.is_none_or(|ethertype| ethertype == self.inner_ethertype)
                })
            })
            && mac(src_mac, self.src)
            && mac(dst_mac, self.dst)
            && src_ip.is_none_or(|prefix| self.src_ip.is_some_and(|ip| prefix.contains(ip)))
            && dst_ip.is_none_or(|prefix| self.dst_ip.is_some_and(|ip| prefix.contains(ip)))
            && ip_proto.is_none_or(|wanted| wanted == self.ip_proto)
            && fragment.is_none_or(|wanted| wanted == self.is_fragment)
            && src_port.is_none_or(|wanted| self.src_port & wanted.mask == wanted.value)
            && dst_port.is_none_or(|wanted| self.dst_port & wanted.mask == wanted.value)
            && tcp_flags.is_none_or(|wanted| self.tcp_flags & wanted.mask == wanted.value)
            && icmp_type.is_none_or(|wanted| wanted == self.icmp_type)
            && icmp_code.is_none_or(|wanted| wanted == self.icmp_code)
    }
}
