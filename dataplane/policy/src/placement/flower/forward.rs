//! Stages 8 and 10: known receivers are sent to, policed; all others are for software, which floods, learns and says
//! where a station is.

use super::build::Builder;
use super::guards::{exactly, goto};
use super::rule::{FlowerAction, FlowerMatch, Target, VlanMatch};
use super::{Framing, SOFTWARE, Stage, Subject, macs, takes_anything, trunk_vids};
use crate::config::{Uplink, VlanMode};
use crate::net::{MacAddr, VlanId};
use crate::oracle::Domain;
use crate::placement::{Feature, VlanProtocol};

const CTAG: u16 = 0x8100;
const STAG: u16 = 0x88a8;

/// How a frame of a domain looks on a port that is a member.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Untagged,
    Tagged(VlanId),
}

/// How a frame of the domain looks on a port of this mode; `None` if the port is no member.
fn shape(mode: &VlanMode, domain: Domain) -> Option<Shape> {
    match (mode, domain) {
        (VlanMode::Untagged, Domain::Untagged) => Some(Shape::Untagged),
        (VlanMode::Access(own), Domain::Customer(vid)) if *own == vid => Some(Shape::Untagged),
        (VlanMode::Trunk { native: Some(native), .. }, Domain::Customer(vid)) if *native == vid => {
            Some(Shape::Untagged)
        }
        (VlanMode::Trunk { allowed, .. }, Domain::Customer(vid))
            if allowed.iter().any(|range| range.contains(vid.get())) =>
        {
            Some(Shape::Tagged(vid))
        }
        _ => None,
    }
}

/// The same for the uplink.
fn uplink_shape(uplink: &Uplink, domain: Domain) -> Option<Shape> {
    let native = uplink.native.map_or(Domain::Untagged, Domain::Customer);
    match domain {
        _ if domain == native => Some(Shape::Untagged),
        Domain::Customer(vid)
            if uplink.trunk.is_empty() || uplink.trunk.iter().any(|range| range.contains(vid.get())) =>
        {
            Some(Shape::Tagged(vid))
        }
        _ => None,
    }
}

/// What turns one shape into another.
fn retag(from: Shape, to: Shape) -> Option<FlowerAction> {
    match (from, to) {
        (Shape::Untagged, Shape::Tagged(vid)) => {
            Some(FlowerAction::VlanPush { protocol: VlanProtocol::Dot1q, vid, priority: 0 })
        }
        (Shape::Tagged(_), Shape::Untagged) => Some(FlowerAction::VlanPop),
        _ => None,
    }
}

/// The domains of a framing, and how the VM's frames look in each.
fn domains(subject: &Subject<'_>, framing: Framing) -> Vec<(Domain, Shape)> {
    match (framing, &subject.vnic.policy.vlan) {
        (Framing::Untagged(domain), _) => vec![(domain, Shape::Untagged)],
        (Framing::Tagged, VlanMode::Trunk { allowed, native }) => {
            let vids = trunk_vids(allowed, *native);
            vids.into_iter().map(|vid| (Domain::Customer(vid), Shape::Tagged(vid))).collect()
        }
        (Framing::Tagged, _) => Vec::new(),
    }
}

/// What the VM sends to receivers that are known.
pub(super) fn from_vm(subject: &Subject<'_>, framing: Framing, builder: &mut Builder<'_>) {
    let chain = framing.chain(Stage::Forward);
    let police = subject.vnic.policy.rate_from_vm.map(FlowerAction::Police);
    for (domain, from) in domains(subject, framing) {
        let mut send = |mac: MacAddr, to: Shape, target: Target| {
            let mut matches = framing.frames(None);
            matches.dst_mac = exactly(mac);
            if let Shape::Tagged(vid) = from {
                matches.vlan = Some(VlanMatch { vid: Some(vid.get()), ethertype: None });
            }
            let actions = police.clone().into_iter().chain(retag(from, to));
            let actions = actions.chain([FlowerAction::Redirect(target)]).collect();
            builder.add(Feature::RateFromVm, chain, matches, actions);
        };
        for (name, vf) in &subject.neighbours.on_vfs {
            let peer = subject.config.vnics.iter().find(|peer| {
                peer.name == *name && peer.name != subject.vnic.name && peer.switch == subject.switch.name
            });
            let Some(peer) = peer.filter(|peer| takes_anything(subject.config, peer)) else {
                continue;
            };
            if let Some(to) = shape(&peer.policy.vlan, domain) {
                macs(peer).into_iter().for_each(|mac| send(mac, to, Target::Vf(*vf)));
            }
        }
        if let Some(to) = subject.switch.uplink.as_ref().and_then(|uplink| uplink_shape(uplink, domain)) {
            let stations = subject.neighbours.behind_uplink.iter();
            stations
                .filter(|(there, mac)| *there == domain && !subject.is_own(*mac))
                .for_each(|(_, mac)| send(*mac, to, Target::Uplink));
        }
    }
    builder.add(Feature::RateFromVm, chain, FlowerMatch::default(), goto(SOFTWARE));
}

/// Chains on the uplink's representor, which the vNIC has for itself.
const UNTAGGED: u32 = 1;
const TAGGED: u32 = 2;

/// What stations behind the uplink send to the VM, if its policy asks nothing of that. A station that is not known is
/// for software to learn.
pub(super) fn to_vm(subject: &Subject<'_>, builder: &mut Builder<'_>) {
    let (vnic, keys, actions) = (subject.vnic, builder.support().keys, builder.support().actions);
    let (Some(uplink), Some(vf)) = (&subject.switch.uplink, subject.neighbours.on_vfs.get(&vnic.name)) else {
        return;
    };
    // These rules are a short cut, not the policy: without them, software serves the VM.
    if !takes_anything(subject.config, vnic) || !keys.vlan || !actions.vlan {
        return;
    }
    let trap = || vec![FlowerAction::Trap];
    for mac in subject.macs() {
        let to_me = FlowerMatch { dst_mac: exactly(mac), ..FlowerMatch::default() };
        let tagged = |tpid| FlowerMatch { ethertype: Some(tpid), ..to_me.clone() };
        builder.add_uplink(0, tagged(CTAG), goto(TAGGED));
        builder.add_uplink(0, tagged(STAG), trap());
        builder.add_uplink(0, to_me.clone(), goto(UNTAGGED));
    }
    for inner in [CTAG, STAG] {
        let vlan = Some(VlanMatch { vid: None, ethertype: Some(inner) });
        builder.add_uplink(
            TAGGED,
            FlowerMatch { ethertype: Some(CTAG), vlan, ..FlowerMatch::default() },
            trap(),
        );
    }
    for (domain, station) in &subject.neighbours.behind_uplink {
        let (Some(from), Some(to)) = (uplink_shape(uplink, *domain), shape(&vnic.policy.vlan, *domain))
        else {
            continue;
        };
        if subject.is_own(*station) {
            continue;
        }
        let mut matches = FlowerMatch { src_mac: exactly(*station), ..FlowerMatch::default() };
        let chain = match from {
            Shape::Untagged => UNTAGGED,
            Shape::Tagged(vid) => {
                matches.ethertype = Some(CTAG);
                matches.vlan = Some(VlanMatch { vid: Some(vid.get()), ethertype: None });
                TAGGED
            }
        };
        let actions = retag(from, to).into_iter().chain([FlowerAction::Redirect(Target::Vf(*vf))]).collect();
        builder.add_uplink(chain, matches, actions);
    }
}
