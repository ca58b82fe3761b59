//! Whole frames: addresses, tags, and what breaks on the way.

use std::net::IpAddr;

use super::packets::{Sender, packet};
use super::policies::{STATIONS, VLANS, ip4, ip6, station_mac, vnic_mac};
use super::{Rng, Scenario};
use crate::config::{Switch, VlanMode, Vnic};
use crate::lower::{internal_mac, internal_port, uplink_port, vnic_port};
use crate::net::{MacAddr, VlanRange};

/// What matters of a port for the frames that come from it.
struct Source<'a> {
    name: String,
    switch: &'a Switch,
    mac: MacAddr,
    vnic: Option<&'a Vnic>,
    /// Carries VLANs with tags: which, or all if empty.
    trunk: Option<&'a [VlanRange]>,
}

/// A port to send from, by name, and a frame. Seldom, the port does not exist.
pub fn frame(rng: &mut Rng, scenario: &Scenario) -> (String, Vec<u8>) {
    let sources = sources(scenario);
    let source = rng.pick(&sources);
    let src = source_mac(rng, source);
    let number = |mac: MacAddr| usize::from(mac.0[5]);
    let guarded = |is_ipv6: bool| {
        let addresses = source.vnic.map(|vnic| vnic.policy.ip_guard.as_slice()).unwrap_or_default();
        addresses.iter().copied().find(|address| address.is_ipv6() == is_ipv6)
    };
    let own: (IpAddr, IpAddr) = (
        guarded(false).unwrap_or_else(|| ip4(number(src))),
        guarded(true).unwrap_or_else(|| ip6(number(src))),
    );
    let (ethertype, payload) = packet(rng, &Sender { mac: src, ip4: own.0, ip6: own.1 });
    let mut bytes = [destination_mac(rng, scenario, source).0, src.0].concat();
    for (tpid, tci) in tags(rng, source) {
        bytes.extend(tpid.to_be_bytes());
        bytes.extend(tci.to_be_bytes());
    }
    bytes.extend(ethertype.to_be_bytes());
    bytes.extend(payload);
    damage(rng, &mut bytes);
    let name = if rng.chance(1) { "vnic/absent".to_owned() } else { source.name.clone() };
    (name, bytes)
}

fn sources(scenario: &Scenario) -> Vec<Source<'_>> {
    let config = &scenario.config;
    let mut sources = Vec::new();
    let trunk = |mode: &'_ VlanMode| match mode {
        VlanMode::Trunk { .. } => true,
        VlanMode::Untagged | VlanMode::Access(_) | VlanMode::Tunnel(_) => false,
    };
    for switch in &config.switches {
        if let Some(uplink) = &switch.uplink {
            sources.push(Source {
                name: uplink_port(&switch.name),
                switch,
                mac: station_mac(0),
                vnic: None,
                trunk: Some(&uplink.trunk),
            });
        }
        if let Some(internal) = &switch.internal {
            sources.push(Source {
                name: internal_port(&switch.name),
                switch,
                mac: internal_mac(switch, internal),
                vnic: None,
                trunk: trunk(&internal.vlan).then(|| ranges(&internal.vlan)),
            });
        }
    }
    for vnic in &config.vnics {
        let Some(switch) = config.switches.iter().find(|switch| switch.name == vnic.switch) else {
            continue;
        };
        sources.push(Source {
            name: vnic_port(&vnic.name),
            switch,
            mac: vnic.mac,
            vnic: Some(vnic),
            trunk: trunk(&vnic.policy.vlan).then(|| ranges(&vnic.policy.vlan)),
        });
    }
    sources
}

fn ranges(mode: &VlanMode) -> &[VlanRange] {
    match mode {
        VlanMode::Trunk { allowed, .. } => allowed,
        VlanMode::Untagged | VlanMode::Access(_) | VlanMode::Tunnel(_) => &[],
    }
}

fn source_mac(rng: &mut Rng, source: &Source<'_>) -> MacAddr {
    let own = match source.vnic {
        None if source.mac == station_mac(0) => station_mac(rng.below(STATIONS)),
        Some(vnic) if !vnic.extra_macs.is_empty() && rng.chance(30) => *rng.pick(&vnic.extra_macs),
        _ => source.mac,
    };
    let may_spoof = source.vnic.is_none_or(|vnic| vnic.policy.allow_spoofing);
    match rng.below(100) {
        0..=1 => MacAddr([0x33, 0x33, 0, 0, 0, rng.byte()]),
        2..=4 => vnic_mac(1 + rng.below(8)),
        5 => MacAddr([0; 6]),
        6..=8 => station_mac(rng.below(STATIONS)),
        // An eSwitch gives back what VMs have sent, and VFs are heard from behind the uplink.
        9..=16 if source.vnic.is_none() => vnic_mac(1 + rng.below(8)),
        9..=25 if may_spoof => station_mac(rng.below(STATIONS)),
        _ => own,
    }
}

fn destination_mac(rng: &mut Rng, scenario: &Scenario, source: &Source<'_>) -> MacAddr {
    let neighbours: Vec<MacAddr> = scenario
        .config
        .vnics
        .iter()
        .filter(|vnic| vnic.switch == source.switch.name)
        .flat_map(|vnic| std::iter::once(vnic.mac).chain(vnic.extra_macs.iter().copied()))
        .chain(source.switch.internal.iter().map(|internal| internal_mac(source.switch, internal)))
        .collect();
    // Those that carry the usual VLAN are likelier to be reached.
    let reachable: Vec<MacAddr> = scenario
        .config
        .vnics
        .iter()
        .filter(|vnic| vnic.switch == source.switch.name && vnic.mac != source.mac && carries_usual(vnic))
        .map(|vnic| vnic.mac)
        .collect();
    match rng.below(100) {
        0..=33 if !reachable.is_empty() => *rng.pick(&reachable),
        0..=53 if !neighbours.is_empty() => *rng.pick(&neighbours),
        0..=69 => station_mac(rng.below(STATIONS)),
        70..=72 => vnic_mac(rng.below(12)),
        73..=84 => MacAddr([0xff; 6]),
        85..=92 => MacAddr([0x33, 0x33, 0, 0, 0, 1]),
        93..=97 => MacAddr([0x01, 0x80, 0xc2, 0, 0, rng.below(18) as u8]),
        _ => source.mac,
    }
}

fn carries_usual(vnic: &Vnic) -> bool {
    match &vnic.policy.vlan {
        VlanMode::Access(vid) => vid.get() == VLANS[0],
        VlanMode::Trunk { allowed, .. } => allowed.iter().any(|range| range.contains(VLANS[0])),
        VlanMode::Untagged | VlanMode::Tunnel(_) => false,
    }
}

/// Tags that mostly fit the port's mode: TPID and TCI, outermost first.
fn tags(rng: &mut Rng, source: &Source<'_>) -> Vec<(u16, u16)> {
    let any_vid = |rng: &mut Rng| match rng.below(12) {
        0 => 0,
        1 => 4095,
        2..=6 => VLANS[0],
        _ => *rng.pick(&VLANS),
    };
    let count = match (source.trunk, rng.below(100)) {
        (_, 0..=1) => 3,
        (_, 2..=7) => 2,
        (Some(_), 8..=80) => 1,
        (None, 8..=15) => 1,
        _ => 0,
    };
    (0..count)
        .map(|depth| {
            let vid = match source.trunk {
                Some(ranges) if !ranges.is_empty() && depth == 0 && rng.chance(75) => {
                    let usual = ranges.iter().find(|range| range.contains(VLANS[0]));
                    let range = usual.filter(|_| rng.chance(70)).unwrap_or_else(|| rng.pick(ranges));
                    if rng.chance(70) { range.first().get() } else { range.last().get() }
                }
                // Priority-tagged frames are what access ports take.
                None if depth == 0 && rng.chance(50) => 0,
                _ => any_vid(rng),
            };
            let tpid = if rng.chance(88) { 0x8100 } else { 0x88a8 };
            (tpid, vid | (rng.below(16) as u16) << 12)
        })
        .collect()
}

/// Cuts, pads, stretches or scratches some of the frames.
fn damage(rng: &mut Rng, bytes: &mut Vec<u8>) {
    match rng.below(100) {
        0..=4 => bytes.truncate(rng.below(bytes.len() + 1)),
        5..=6 => bytes.truncate(rng.below(bytes.len().min(40) + 1)),
        7..=14 => bytes.resize(bytes.len() + 1 + rng.below(40), 0),
        18 => bytes.resize(9_000, 0x5a),
        19..=20 => {
            for _ in 0..1 + rng.below(3) {
                let at = rng.below(bytes.len().min(100));
                bytes[at] ^= 1 << rng.below(8);
            }
        }
        _ => {}
    }
}
