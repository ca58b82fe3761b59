//! A host with the model eSwitch in it: placed vNICs on VFs, the others behind the PF in the software switch, which is
//! played by the oracle. What it does to a frame as a whole must be what the oracle says of the configuration.

use std::collections::BTreeMap;

use sluice_eswitch::contract::{Eswitch, VfIndex};
use sluice_eswitch::soft::{Flaws, Port, Soft};
use sluice_policy::config::{Config, Direction, Switch, VlanMode, Vnic};
use sluice_policy::generate::Scenario;
use sluice_policy::lower::{internal_mac, uplink_port, vnic_port};
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::oracle::{Domain, Sighting, State, Station, evaluate};
use sluice_policy::placement::{Capabilities, Mode, Neighbours, Uncovered, place};

/// The VLANs of generated ports.
const VLANS: [u32; 7] = [1, 5, 10, 11, 20, 100, 4094];

/// Frames by the port where they leave.
pub(crate) type Deliveries = BTreeMap<String, Vec<u8>>;

/// One switch and its eSwitch.
pub(crate) struct World<'a> {
    scenario: &'a Scenario,
    /// What the software switch knows when some vNICs are on VFs.
    software: Config,
    uplink: String,
    mode: Mode,
    soft: Soft,
    /// VFs by vNIC.
    pub(crate) placed: BTreeMap<&'a str, (VfIndex, &'a Vnic)>,
    /// Why the others are not.
    pub(crate) refused: Vec<Uncovered>,
}

impl<'a> World<'a> {
    /// Places what can be placed.
    pub(crate) fn new(
        scenario: &'a Scenario,
        switch: &'a Switch,
        capabilities: &Capabilities,
        flaws: Flaws,
    ) -> Self {
        let config = &scenario.config;
        let vnics: Vec<&Vnic> = config.vnics.iter().filter(|vnic| vnic.switch == switch.name).collect();
        let (mut placed, mut refused) = (BTreeMap::new(), Vec::new());
        for (number, vnic) in vnics.iter().enumerate() {
            match place(config, vnic, capabilities, &Neighbours::default()) {
                Ok(_) => {
                    placed.insert(vnic.name.as_str(), (VfIndex(number as u16), *vnic));
                }
                Err(uncovered) => refused.extend(uncovered),
            }
        }
        // A rule must not send to a VF that is not open; and with more neighbours, more rules are needed.
        let programs = loop {
            let neighbours = Neighbours {
                on_vfs: placed.iter().map(|(name, (vf, _))| ((*name).to_owned(), *vf)).collect(),
                behind_uplink: behind_uplink(&scenario.state, switch),
            };
            let mut programs = Vec::new();
            let before = placed.len();
            placed.retain(|_, (vf, vnic)| match place(config, vnic, capabilities, &neighbours) {
                Ok(program) => {
                    programs.push((*vf, program));
                    true
                }
                Err(uncovered) => {
                    refused.extend(uncovered);
                    false
                }
            });
            if placed.len() == before {
                break programs;
            }
        };
        let mut soft = Soft::new(capabilities.clone(), vnics.len() as u16, flaws);
        for (vf, program) in programs {
            soft.program(vf, &program).expect("it fits, as it was placed");
            let observed = soft.read_back(vf).expect("it exists");
            assert_eq!(observed.differences(&program), []);
            soft.enable(vf).expect("it exists");
        }
        let mut world = World {
            scenario,
            software: config.clone(),
            uplink: uplink_port(&switch.name),
            mode: capabilities.mode,
            soft,
            placed,
            refused,
        };
        if capabilities.mode == Mode::Legacy {
            world.move_behind_pf(switch);
        }
        world
    }

    /// In legacy mode the software switch finds placed vNICs behind its uplink, and the NIC finds the others by the
    /// PF's unicast filter.
    fn move_behind_pf(&mut self, switch: &Switch) {
        let placed = &self.placed;
        self.software.vnics.retain(|vnic| !placed.contains_key(vnic.name.as_str()));
        let software = self.software.vnics.iter().filter(|vnic| vnic.switch == switch.name);
        let macs = software
            .flat_map(|vnic| vnic.extra_macs.iter().chain([&vnic.mac]))
            .copied()
            .chain(switch.internal.iter().map(|internal| internal_mac(switch, internal)))
            .collect();
        self.soft.sync_unicast_filter(&macs).expect("the filter has room");
    }

    /// Where a frame ends, and how much of the way the NIC went.
    pub(crate) fn carry(&self, ingress: &str, frame: &[u8]) -> (Deliveries, Way) {
        let mut deliveries = Deliveries::new();
        let mut way = Way::default();
        let placed = ingress.strip_prefix("vnic/").and_then(|name| self.placed.get(name));
        match placed {
            Some((vf, vnic)) => {
                let over_rate = vnic.policy.rate_from_vm.is_some()
                    && self.scenario.state.empty_buckets.contains(&(ingress.to_owned(), Direction::FromVm));
                self.inject(Port::Vf(*vf), frame, over_rate, &mut deliveries, &mut way);
            }
            None if ingress == self.uplink => {
                self.inject(Port::Wire, frame, false, &mut deliveries, &mut way);
            }
            None => self.forward_in_software(ingress, frame, &mut deliveries, &mut way),
        }
        (deliveries, way)
    }

    fn inject(&self, from: Port, frame: &[u8], over_rate: bool, deliveries: &mut Deliveries, way: &mut Way) {
        way.nic_asked = true;
        for (port, frame) in self.soft.transmit(from, frame, over_rate) {
            match port {
                Port::Wire => {
                    let former = deliveries.insert(self.uplink.clone(), frame);
                    assert_eq!(former, None, "twice over the wire");
                }
                Port::Vf(vf) => {
                    way.vf_reached = true;
                    let former = deliveries.insert(self.port_on(vf), frame);
                    assert_eq!(former, None, "twice to {vf}");
                }
                Port::Pf => {
                    way.software_asked = true;
                    self.forward_in_software(&self.uplink, &frame, deliveries, way);
                }
                Port::Representor(vf) => {
                    way.software_asked = true;
                    self.forward_in_software(&self.port_on(vf), &frame, deliveries, way);
                }
            }
        }
    }

    fn port_on(&self, vf: VfIndex) -> String {
        let holder = self.placed.iter().find(|(_, (index, _))| *index == vf);
        vnic_port(holder.map(|(name, _)| name).expect("only VFs that are held are open"))
    }

    /// What the software switch has learnt. In legacy mode it has seen the frame's receiver behind its uplink, if that
    /// is on a VF, whatever VLAN the frame is in.
    fn state(&self, frame: &[u8]) -> State {
        let mut state = self.scenario.state.clone();
        let receiver = self.placed.values().find(|(_, vnic)| frame.get(..6) == Some(&vnic.mac.0));
        if let (Some((_, vnic)), Mode::Legacy) = (receiver, self.mode) {
            let vids = VLANS.iter().filter_map(|vid| VlanId::new(*vid).ok());
            let domains = vids.flat_map(|vid| [Domain::Customer(vid), Domain::Service(vid)]);
            for domain in domains.chain([Domain::Untagged, outer(frame)]) {
                let station = Station { switch: vnic.switch.clone(), domain, mac: vnic.mac };
                let sighting = Sighting { port: self.uplink.clone(), age_seconds: 0 };
                state.fdb.insert(station, sighting);
            }
        }
        state
    }

    fn forward_in_software(&self, ingress: &str, frame: &[u8], deliveries: &mut Deliveries, way: &mut Way) {
        let outcome = evaluate(&self.software, &self.state(frame), ingress, frame);
        for (port, result) in outcome.deliveries {
            let Ok(bytes) = result else { continue };
            let vf = port.strip_prefix("vnic/").and_then(|name| self.placed.get(name));
            let from = match vf {
                Some((vf, _)) => Port::Representor(*vf),
                None if port == self.uplink => Port::Pf,
                None => {
                    let former = deliveries.insert(port.clone(), bytes);
                    assert_eq!(former, None, "twice to {port}");
                    continue;
                }
            };
            self.inject(from, &bytes, false, deliveries, way);
        }
    }

    /// What holds for every frame, also for those of which a NIC makes nothing: it stays in its VLAN, comes from its
    /// sender and is within the rate.
    pub(crate) fn contained(
        &self,
        ingress: &str,
        frame: &[u8],
        deliveries: &Deliveries,
    ) -> Result<(), String> {
        let sender = ingress.strip_prefix("vnic/").and_then(|name| self.placed.get(name));
        let domain = match sender {
            Some((_, vnic)) => {
                let mut own = vnic.extra_macs.iter().chain([&vnic.mac]);
                let is_own = own.any(|mac| frame.get(6..12) == Some(&mac.0));
                if !vnic.policy.allow_spoofing && !deliveries.is_empty() && !is_own {
                    return Err("a spoofed address came through".into());
                }
                domain(&vnic.policy.vlan)
            }
            None => return Ok(()),
        };
        for (port, bytes) in deliveries {
            let native = self.software.switches[0].uplink.as_ref().and_then(|uplink| uplink.native);
            let on_wire = |domain: Domain| match (domain, native) {
                (Domain::Customer(vid), Some(native)) if vid == native => Domain::Untagged,
                (domain, _) => domain,
            };
            if *port == self.uplink && domain.is_some_and(|domain| outer(bytes) != on_wire(domain)) {
                return Err(format!("it left by the wire in {}", outer(bytes)));
            }
            let receiver = port.strip_prefix("vnic/").and_then(|name| self.placed.get(name));
            if let Some((_, vnic)) = receiver
                && self.mode == Mode::Legacy
                && domain != self::domain(&vnic.policy.vlan)
            {
                return Err(format!("it came into the VLAN of {port}"));
            }
        }
        Ok(())
    }
}

/// Which parts of the host a frame passed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Way {
    pub(crate) nic_asked: bool,
    pub(crate) vf_reached: bool,
    pub(crate) software_asked: bool,
}

/// The one domain of a mode, if it is one.
pub(crate) fn domain(mode: &VlanMode) -> Option<Domain> {
    match mode {
        VlanMode::Untagged => Some(Domain::Untagged),
        VlanMode::Access(vid) => Some(Domain::Customer(*vid)),
        VlanMode::Tunnel(vid) => Some(Domain::Service(*vid)),
        VlanMode::Trunk { .. } => None,
    }
}

/// The domain of a frame on the wire.
fn outer(frame: &[u8]) -> Domain {
    let word = |at: usize| frame.get(at..at + 2).map_or(0, |b| u32::from(b[0]) << 8 | u32::from(b[1]));
    match (word(12), VlanId::new(word(14) & 0x0fff)) {
        (0x8100, Ok(vid)) => Domain::Customer(vid),
        (0x88a8, Ok(vid)) => Domain::Service(vid),
        _ => Domain::Untagged,
    }
}

fn behind_uplink(state: &State, switch: &Switch) -> std::collections::BTreeSet<(Domain, MacAddr)> {
    let uplink = uplink_port(&switch.name);
    let is_there = |station: &Station, sighting: &Sighting| {
        station.switch == switch.name
            && sighting.port == uplink
            && sighting.age_seconds <= switch.ageing_seconds
    };
    let stations = state.fdb.iter().filter(|(station, sighting)| is_there(station, sighting));
    stations.map(|(station, _)| (station.domain, station.mac)).collect()
}
