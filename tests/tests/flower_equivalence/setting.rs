//! What is tried: generated policies, placed on the VFs of one eSwitch, and frames for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use anyhow::{Context, Result};
use sluice_eswitch::contract::Eswitch;
use sluice_eswitch::soft::{Flaws, Port, Soft};
use sluice_policy::config::{AclAction, Config, Direction, Policy, Rate, Switch, VlanMode, Vnic};
use sluice_policy::generate::{Rng, Scenario, frame, scenario};
use sluice_policy::lower::{uplink_port, vnic_port};
use sluice_policy::net::{MacAddr, VlanId, VlanRange};
use sluice_policy::oracle::{Domain, Outcome, Sighting, Station, evaluate};
use sluice_policy::placement::{
    Capabilities, Evidence, FlowerActions, FlowerKeys, FlowerProgram, FlowerSupport, Mode, Neighbours,
    Program, Target, VfIndex, place,
};

use crate::provoke::provoke;
use crate::wires::{Fate, VFS};

/// Shortest frame on a wire, without its checksum.
const FRAME_MIN: usize = 60;
/// Most rules of one program: writing them takes long in an emulated machine.
const RULES_MAX: u32 = 200;
/// VLANs in one range of a trunk, for the same reason.
const RANGE_MAX: u16 = 4;
/// The addresses 02:00:00:00:f0:00 and up, which generated frames are sent to and from outside, and which no port has.
const STATIONS: u8 = 4;
/// Frames whose receiver is chosen among those that rules may know.
const AIMED_PERCENT: usize = 60;
/// Frames of VFs that a rule of their ACL is about, if there is one.
const PROVOKED_PERCENT: usize = 40;
/// Frames that are brought just beside what a rule may want.
const GRAZED_PERCENT: usize = 25;
/// Frames that are replaced by router advertisements, of which the generator makes too few to miss the guard.
const ADVERTISEMENTS_PERCENT: usize = 5;
/// Bytes of a router advertisement without options.
pub(crate) const ADVERTISEMENT_LENGTH: usize = 16;
const ADVERTISEMENT: u8 = 134;
const ICMPV6: u8 = 58;
const MORE_FRAGMENTS: u8 = 0x20;
/// Frames drawn to find one that comes from a VF or the uplink.
const DRAWS: usize = 10_000;

/// Placed policies.
pub(crate) struct Setting {
    pub(crate) scenario: Scenario,
    /// By VF.
    pub(crate) programs: BTreeMap<VfIndex, FlowerProgram>,
    /// The ports of the eSwitch: names, as the oracle has them, and where they are.
    ports: BTreeMap<String, Target>,
    model: Soft,
    outside: BTreeSet<(Domain, MacAddr)>,
}

/// A frame, and the port that it comes from.
pub(crate) struct Case {
    pub(crate) ingress: String,
    pub(crate) from: Target,
    pub(crate) frame: Vec<u8>,
}

/// A NIC that can do everything, as the kernel can.
fn capabilities() -> Capabilities {
    let flower = FlowerSupport {
        offload: Evidence::ReadBack,
        rules_max: RULES_MAX,
        keys: FlowerKeys::ALL,
        actions: FlowerActions::ALL,
    };
    Capabilities { mode: Mode::Switchdev, max_vfs: VFS, flower, ..Capabilities::default() }
}

impl Setting {
    /// The next one of which something is placed.
    pub(crate) fn draw(rng: &mut Rng) -> Result<Setting> {
        loop {
            let mut scenario = scenario(rng);
            ease(rng, &mut scenario);
            if let Some(setting) = Setting::place(scenario)? {
                return Ok(setting);
            }
        }
    }

    /// The VFs and programs of a scenario, if any of its vNICs can be placed.
    pub(crate) fn place(scenario: Scenario) -> Result<Option<Setting>> {
        let (config, capabilities) = (&scenario.config, capabilities());
        let Some(switch) = config.switches.first() else { return Ok(None) };
        let outside = behind_uplink(&scenario, switch);
        let vnics = config.vnics.iter().filter(|vnic| vnic.switch == switch.name);
        let mut placed: BTreeMap<VfIndex, &Vnic> = (0..VFS).map(VfIndex).zip(vnics).collect();
        // No rule may lead to a VF that is not placed, and fewer neighbours never need more rules.
        let programs = loop {
            let neighbours = Neighbours {
                on_vfs: placed.iter().map(|(vf, vnic)| (vnic.name.clone(), *vf)).collect(),
                behind_uplink: outside.clone(),
            };
            let mut programs = BTreeMap::new();
            for (vf, vnic) in &placed {
                if let Ok(Program::Switchdev(program)) = place(config, vnic, &capabilities, &neighbours) {
                    programs.insert(*vf, program);
                }
            }
            if programs.len() == placed.len() {
                break programs;
            }
            placed.retain(|vf, _| programs.contains_key(vf));
        };
        if programs.is_empty() {
            return Ok(None);
        }
        let mut model = Soft::new(capabilities, VFS, Flaws::default());
        for (vf, program) in &programs {
            model.program(*vf, &Program::Switchdev(program.clone()))?;
            model.enable(*vf)?;
        }
        let mut ports: BTreeMap<String, Target> =
            placed.iter().map(|(vf, vnic)| (vnic_port(&vnic.name), Target::Vf(*vf))).collect();
        ports.insert(uplink_port(&switch.name), Target::Uplink);
        Ok(Some(Setting { programs, ports, model, outside, scenario }))
    }

    /// A frame that comes from a placed vNIC, or from the wire.
    pub(crate) fn case(&self, rng: &mut Rng) -> Result<Case> {
        let mut draws = (0..DRAWS).map(|_| frame(rng, &self.scenario));
        let mut drawn = draws.find_map(|(ingress, frame)| {
            let from = *self.ports.get(&ingress)?;
            Some(Case { ingress, from, frame })
        });
        if let Some(case) = &mut drawn {
            let config = &self.scenario.config;
            let sender = config.vnics.iter().find(|vnic| vnic_port(&vnic.name) == case.ingress);
            if let Some(sender) = sender.filter(|_| rng.chance(PROVOKED_PERCENT)) {
                provoke(rng, config, sender, &mut case.frame);
            }
            if rng.chance(AIMED_PERCENT) {
                self.aim(rng, case);
            }
            if rng.chance(GRAZED_PERCENT) {
                graze(rng, &mut case.frame);
            }
            if let Target::Vf(vf) = case.from
                && rng.chance(ADVERTISEMENTS_PERCENT)
                && let Some(advertisement) = self.advertisement(vf, None, ADVERTISEMENT_LENGTH)
            {
                *case = advertisement;
            }
            let length = case.frame.len().max(FRAME_MIN);
            case.frame.resize(length, 0);
        }
        drawn.context("the generator makes no frames for the ports of the eSwitch")
    }

    /// Sends a frame to somebody that rules may know.
    fn aim(&self, rng: &mut Rng, case: &mut Case) {
        let config = &self.scenario.config;
        let placed = config.vnics.iter().filter(|vnic| self.ports.contains_key(&vnic_port(&vnic.name)));
        let outside = self.outside.iter().map(|(_, mac)| *mac).filter(|_| case.from != Target::Uplink);
        let known: Vec<MacAddr> = placed.map(|vnic| vnic.mac).chain(outside).collect();
        if let Some(destination) = case.frame.get_mut(..6) {
            destination.copy_from_slice(&rng.pick(&known).0);
        }
    }

    /// A router advertisement to a station behind the uplink, behind an extension header of this kind and length if given,
    /// and cut off after so many bytes; `None` if the VF is nobody's, or no station is known.
    pub(crate) fn advertisement(
        &self,
        vf: VfIndex,
        extension: Option<(u8, u8)>,
        length: usize,
    ) -> Option<Case> {
        let from = Target::Vf(vf);
        let ingress = self.name(from)?.to_owned();
        let vnics = &self.scenario.config.vnics;
        let sender = vnics.iter().find(|vnic| vnic_port(&vnic.name) == ingress)?;
        let (_, receiver) = self.outside.first()?;
        let mut headers = Vec::new();
        if let Some((kind, units)) = extension {
            // The authentication header counts in other units, and a fragment header has but one length.
            headers.resize(
                match kind {
                    44 => 8,
                    51 => (usize::from(units) + 2) * 4,
                    _ => (usize::from(units) + 1) * 8,
                },
                0,
            );
            headers[0] = ICMPV6;
            headers[1] = if kind == 44 { 0 } else { units };
        }
        let mut message = vec![0; length];
        *message.first_mut()? = ADVERTISEMENT;
        let mut frame = [receiver.0, sender.mac.0].concat();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((headers.len() as u16 + length as u16).to_be_bytes());
        frame.extend([extension.map_or(ICMPV6, |(kind, _)| kind), 255]);
        for host in [1, 2] {
            frame.extend(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, host).octets());
        }
        frame.extend(headers);
        frame.extend(message);
        Some(Case { ingress, from, frame })
    }

    /// What the oracle says.
    pub(crate) fn oracle(&self, case: &Case) -> Outcome {
        evaluate(&self.scenario.config, &self.scenario.state, &case.ingress, &case.frame)
    }

    /// What the model does.
    pub(crate) fn model(&self, case: &Case) -> Result<Fate> {
        let from = match case.from {
            Target::Uplink => Port::Wire,
            Target::Vf(vf) => Port::Vf(vf),
        };
        let mut left = self.model.transmit(from, &case.frame, false);
        let fate = match left.pop() {
            None => Fate::Dropped,
            Some((Port::Pf | Port::Representor(_), _)) => Fate::Software,
            Some((Port::Wire, bytes)) => Fate::Sent(Target::Uplink, bytes),
            Some((Port::Vf(vf), bytes)) => Fate::Sent(Target::Vf(vf), bytes),
        };
        anyhow::ensure!(left.is_empty(), "the model sends to several: {left:02x?}");
        Ok(fate)
    }

    /// The name of a port.
    pub(crate) fn name(&self, target: Target) -> Option<&str> {
        self.ports.iter().find(|(_, place)| **place == target).map(|(name, _)| name.as_str())
    }

    /// Whether a station that the switch learns, or sees again, is one that rules know to be there.
    pub(crate) fn is_known(&self, case: &Case, station: &Station) -> bool {
        case.from == Target::Uplink && self.outside.contains(&(station.domain, station.mac))
    }

    /// Whether a frame that comes from a VF has an address of its vNIC as source.
    pub(crate) fn is_own_source(&self, case: &Case) -> bool {
        let sender = self.scenario.config.vnics.iter().find(|vnic| vnic_port(&vnic.name) == case.ingress);
        sender.is_none_or(|vnic| {
            let mut own = vnic.extra_macs.iter().chain([&vnic.mac]);
            own.any(|mac| case.frame.get(6..12) == Some(&mac.0))
        })
    }

    /// Whether rules know what is to be done: with what the sender must not send, and with what goes to one receiver
    /// that they know and that takes anything, from a sender that they know.
    pub(crate) fn is_decidable(&self, case: &Case, outcome: &Outcome) -> bool {
        let config = &self.scenario.config;
        if outcome.dropped.is_some() {
            return case.from != Target::Uplink && is_senders_fault(outcome);
        }
        let mut delivered = outcome.deliveries.iter().filter(|(_, result)| result.is_ok());
        let (Some((port, _)), None) = (delivered.next(), delivered.next()) else { return false };
        let has = |at: usize| {
            let bytes = case.frame.get(at..at + 6);
            self.outside.iter().any(|(_, mac)| bytes == Some(&mac.0))
        };
        let receiver = config.vnics.iter().find(|vnic| vnic_port(&vnic.name) == *port);
        let is_group = case.frame[0] & 1 == 1;
        match (self.ports.get(port), receiver) {
            (Some(Target::Uplink), _) => !is_group && has(0),
            (Some(Target::Vf(_)), Some(vnic)) => {
                !is_group && asks_nothing(config, vnic) && (case.from != Target::Uplink || has(6))
            }
            _ => false,
        }
    }
}

/// One with a vNIC, on this VF, that may do anything but advertise itself as router, and a station behind the uplink.
pub(crate) fn guarded(rng: &mut Rng) -> Result<(Setting, VfIndex)> {
    loop {
        let mut scenario = scenario(rng);
        for vnic in &mut scenario.config.vnics {
            let vlan = VlanMode::Access(VlanId::new(100)?);
            vnic.policy = Policy { vlan, ra_guard: true, ..Policy::default() };
        }
        ease(rng, &mut scenario);
        if let Some(setting) = Setting::place(scenario)?
            && let (Some(vf), false) = (setting.programs.keys().next().copied(), setting.outside.is_empty())
        {
            return Ok((setting, vf));
        }
    }
}

/// Whether the frame was dropped for what its sender may not do, before anybody looked for its receiver.
pub(crate) fn is_senders_fault(outcome: &Outcome) -> bool {
    use sluice_pipeline::Stage::{AclFromVm, Guards, IpGuard, MacGuard, PortState, RateFromVm, Vlan};
    let last = outcome.steps.last().map(|step| step.stage);
    outcome.dropped.is_some()
        && last.is_some_and(|stage| {
            matches!(stage, PortState | MacGuard | IpGuard | Vlan | Guards | AclFromVm | RateFromVm)
        })
}

/// Whether a vNIC takes all that it is sent.
fn asks_nothing(config: &Config, vnic: &Vnic) -> bool {
    let acl = &vnic.policy.acl;
    let groups = config.acl_groups.iter().filter(|group| acl.groups.contains(&group.name));
    let mut rules = groups.flat_map(|group| &group.rules).chain(&acl.rules);
    vnic.up
        && vnic.policy.rate_to_vm.is_none()
        && acl.default_to_vm == AclAction::Allow
        && !rules.any(|rule| rule.direction == Direction::ToVm && rule.action == AclAction::Deny)
}

/// Makes an IPv4 packet a fragment, or flips one of the low bits of a MAC address, a VLAN, an IP address, a port or what is
/// in its place.
fn graze(rng: &mut Rng, frame: &mut [u8]) {
    let (tag, network) = match frame.get(12..14) {
        Some([0x81, 0x00] | [0x88, 0xa8]) => (Some(15), 18),
        _ => (None, 14),
    };
    if frame.get(network - 2..network) == Some(&[0x08, 0x00]) && rng.chance(30) {
        if let Some(flags) = frame.get_mut(network + 6) {
            *flags ^= MORE_FRAGMENTS;
        }
        return;
    }
    // The last bytes of both addresses, and what begins behind the header.
    let (src_ip, dst_ip) = if frame.get(network - 2) == Some(&0x86) { (23, 39) } else { (15, 19) };
    let in_packet = [src_ip, dst_ip, dst_ip + 1, dst_ip + 2, dst_ip + 4, dst_ip + 14].map(|at| network + at);
    let places: Vec<usize> = in_packet.into_iter().chain([11, network + src_ip]).chain(tag).collect();
    if let Some(byte) = frame.get_mut(*rng.pick(&places)) {
        *byte ^= 1 << rng.below(3);
    }
}

/// Representors are always there. Buckets never run empty, trunks are short, and mostly the uplink carries all VLANs.
fn ease(rng: &mut Rng, scenario: &mut Scenario) {
    scenario.state.unattached.clear();
    scenario.state.backings = Default::default();
    scenario.state.empty_buckets.clear();
    for vnic in &mut scenario.config.vnics {
        if let Some(rate) = &mut vnic.policy.rate_from_vm {
            *rate = Rate { bits_per_second: 10_000_000_000, burst_bytes: 100_000_000 };
        }
        if let VlanMode::Trunk { allowed, .. } = &mut vnic.policy.vlan {
            for range in allowed {
                let first = range.first();
                let last = first.get().saturating_add(RANGE_MAX).min(range.last().get());
                let last = VlanId::new(u32::from(last)).ok();
                *range = last.and_then(|last| VlanRange::new(first, last)).unwrap_or(*range);
            }
        }
        if rng.chance(60) {
            vnic.policy.rate_to_vm = None;
        }
    }
    if let Some(uplink) = scenario.config.switches.first_mut().and_then(|switch| switch.uplink.as_mut())
        && rng.chance(70)
    {
        uplink.trunk.clear();
        uplink.native = None;
    }
    meet_stations(rng, scenario);
}

/// Lets the vNICs of the first switch have been talking to some stations behind the uplink.
fn meet_stations(rng: &mut Rng, scenario: &mut Scenario) {
    let config = &scenario.config;
    let Some(switch) = config.switches.first() else { return };
    for vnic in config.vnics.iter().filter(|vnic| vnic.switch == switch.name) {
        let domain = match &vnic.policy.vlan {
            VlanMode::Access(vid) => Domain::Customer(*vid),
            VlanMode::Trunk { native: Some(vid), .. } if rng.chance(30) => Domain::Customer(*vid),
            VlanMode::Trunk { allowed, .. } => match allowed.first() {
                Some(range) => Domain::Customer(range.first()),
                None => continue,
            },
            VlanMode::Untagged | VlanMode::Tunnel(_) => Domain::Untagged,
        };
        for number in 0..STATIONS {
            if rng.chance(70) {
                let mac = MacAddr([0x02, 0, 0, 0, 0xf0, number]);
                let station = Station { switch: switch.name.clone(), domain, mac };
                let sighting = Sighting { port: uplink_port(&switch.name), age_seconds: 0 };
                scenario.state.fdb.insert(station, sighting);
            }
        }
    }
}

fn behind_uplink(scenario: &Scenario, switch: &Switch) -> BTreeSet<(Domain, MacAddr)> {
    let uplink = uplink_port(&switch.name);
    let stations = scenario.state.fdb.iter().filter(|(station, sighting)| {
        station.switch == switch.name
            && sighting.port == uplink
            && sighting.age_seconds <= switch.ageing_seconds
    });
    stations.map(|(Station { domain, mac, .. }, _)| (*domain, *mac)).collect()
}
