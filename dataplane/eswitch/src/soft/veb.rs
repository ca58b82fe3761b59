//! Legacy mode: a bridge that knows the addresses of its functions and learns none (a VEB, IEEE 802.1Qbg).

use sluice_policy::placement::VlanProtocol;

use super::frame::{Tag, addresses, pop, push, tag};
use super::{Function, GuestTags, Port, Soft};

/// A VLAN inside the NIC: the tag protocol and number, or none.
type Vlan = Option<(u16, u16)>;

fn port_vlan(function: &Function) -> Vlan {
    function.settings.vlan.map(|vlan| (vlan.protocol.tpid(), vlan.vid.get()))
}

impl Soft {
    pub(super) fn bridge(&self, from: Port, frame: &[u8], over_rate: bool) -> Vec<(Port, Vec<u8>)> {
        let Some((vlan, frame)) = self.take_in(from, frame, over_rate) else {
            return Vec::new();
        };
        let ports = self.destinations(from, vlan, &frame);
        ports
            .into_iter()
            .map(|port| {
                let strips = matches!(port, Port::Vf(_)) && vlan.is_some();
                (port, if strips { pop(&frame) } else { frame.clone() })
            })
            .collect()
    }

    /// The frame as it is inside the NIC, its VLAN's tag outermost.
    fn take_in(&self, from: Port, frame: &[u8], over_rate: bool) -> Option<(Vlan, Vec<u8>)> {
        let (_, src, ethertype) = addresses(frame)?;
        let Port::Vf(vf) = from else {
            return match tag(frame).map(|tag| (tag.tpid, tag.vid())) {
                Some((_, 0x0fff)) => None,
                Some((_, 0)) | None => Some((None, frame.to_vec())),
                vlan => Some((vlan, frame.to_vec())),
            };
        };
        let function = self.functions.get(&vf).filter(|function| function.enabled)?;
        let settings = &function.settings;
        if settings.spoofchk && !self.flaws.ignores_spoofchk && src != settings.mac {
            return None;
        }
        if settings.max_rate_mbps > 0 && over_rate && !self.flaws.ignores_rates {
            return None;
        }
        let is_tagged = matches!(ethertype, 0x8100 | 0x88a8);
        match settings.vlan {
            Some(vlan) => {
                let is_nested =
                    vlan.protocol == VlanProtocol::Dot1ad || self.flaws.guest_tags == GuestTags::Nested;
                let outer =
                    Tag { tpid: vlan.protocol.tpid(), tci: vlan.vid.get() | u16::from(vlan.qos) << 13 };
                (!is_tagged || is_nested).then(|| (port_vlan(function), push(frame, outer)))
            }
            None if is_tagged && self.capabilities.untagged_only.is_sufficient() => None,
            None => match tag(frame) {
                Some(tag) if tag.vid() != 0 => Some((Some((tag.tpid, tag.vid())), frame.to_vec())),
                _ => Some((None, frame.to_vec())),
            },
        }
    }

    fn destinations(&self, from: Port, vlan: Vlan, frame: &[u8]) -> Vec<Port> {
        let Some((dst, _, _)) = addresses(frame) else {
            return Vec::new();
        };
        let members = self
            .functions
            .iter()
            .filter(|(_, function)| function.enabled && port_vlan(function) == vlan)
            .map(|(index, function)| (Port::Vf(*index), function.settings.mac));
        let mut ports: Vec<Port> = if dst.is_group() {
            members.map(|(port, _)| port).chain([Port::Pf, Port::Wire]).collect()
        } else if let Some((port, _)) = members.into_iter().find(|(_, mac)| *mac == dst) {
            vec![port]
        } else if self.filter.contains(&dst) || from == Port::Wire {
            // Unknown addresses too come in from the wire: Sluice keeps its uplinks promiscuous.
            vec![Port::Pf]
        } else if matches!(from, Port::Vf(_)) && self.capabilities.unknown_unicast_to_pf.is_sufficient() {
            vec![Port::Pf, Port::Wire]
        } else {
            vec![Port::Wire]
        };
        ports.retain(|port| *port != from);
        ports
    }
}
