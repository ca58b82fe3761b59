//! The oracle: what must happen to a frame, said as slowly and plainly as possible.
//!
//! [`evaluate`] works on the configuration itself: it parses with plain slices, tries rules one after another, and
//! knows no table, cache, bit set or hash. Every engine is tested against it, so it shares with the pipeline the names
//! of drop reasons, stages and ethertypes, and no code. `sluice trace` prints its steps beside those of the live tables.

mod acl;
mod guard;
mod packet;
mod ports;
mod vlan;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use sluice_pipeline::{DropReason, Stage};

use crate::config::{Config, Direction};
use crate::image::Backings;
use crate::net::{MacAddr, VlanId};

pub use acl::{Decision, RuleRef};

use packet::Packet;
use ports::Port;

/// The forwarding VLAN: what separates addresses and floods inside one switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Domain {
    /// Neither customer nor service VLAN.
    Untagged,
    /// A customer VLAN (802.1Q).
    Customer(VlanId),
    /// A service VLAN (802.1ad), a number space of its own.
    Service(VlanId),
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Domain::Untagged => f.write_str("the untagged domain"),
            Domain::Customer(vid) => write!(f, "VLAN {vid}"),
            Domain::Service(vid) => write!(f, "service VLAN {vid}"),
        }
    }
}

/// An address as switches learn it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Station {
    /// Name of the switch.
    pub switch: String,
    /// VLAN in which it was seen.
    pub domain: Domain,
    /// Address.
    pub mac: MacAddr,
}

/// Where a station was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Name of the port, as in [`PortSpec::name`](crate::lower::PortSpec::name).
    pub port: String,
    /// How long ago.
    pub age_seconds: u32,
}

/// What the answer depends on besides the configuration and the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Learnt addresses, those that are too old included.
    pub fdb: BTreeMap<Station, Sighting>,
    /// Buckets without a single token, by port name and direction; all others are full.
    pub empty_buckets: BTreeSet<(String, Direction)>,
    /// Ports whose interface is absent.
    pub unattached: BTreeSet<String>,
    /// vNICs that have VFs, and uplinks whose NICs are told what to receive.
    pub backings: Backings,
}

/// One stage and what was found there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The stage.
    pub stage: Stage,
    /// The port whose policy was asked.
    pub port: String,
    /// What was found, in words.
    pub text: String,
}

/// What must happen to a frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Set if the frame was dropped before any destination was asked, or had none; counted on the ingress port.
    pub dropped: Option<DropReason>,
    /// Destinations by port name: the bytes that leave, or the reason why none do, counted on that port.
    pub deliveries: BTreeMap<String, Result<Vec<u8>, DropReason>>,
    /// Stages passed, in order, the last one included. For floods, destination after destination by name.
    pub steps: Vec<Step>,
    /// What the source's ACL said, once it was asked.
    pub from_vm: Option<Decision>,
    /// What the destinations' ACLs said, by port name.
    pub to_vm: BTreeMap<String, Decision>,
    /// The source address, if the table of learnt addresses changes: it is new there, moves, or is seen again after
    /// at least a second.
    pub learnt: Option<Station>,
}

/// Says what must happen to `frame`, all tags in its bytes, that comes from port `ingress`.
///
/// Ports are named as in [`PortSpec::name`](crate::lower::PortSpec::name). The configuration must be valid.
pub fn evaluate(config: &Config, state: &State, ingress: &str, frame: &[u8]) -> Outcome {
    let ports = ports::all(config, &state.backings);
    let mut walk = Walk { config, state, ports, outcome: Outcome::default() };
    walk.outcome.dropped = walk.run(ingress, frame).err();
    walk.outcome
}

/// One frame's way.
struct Walk<'a> {
    config: &'a Config,
    state: &'a State,
    ports: Vec<Port<'a>>,
    outcome: Outcome,
}

/// A frame that has passed the stages of its source.
struct InFlight<'p> {
    packet: &'p Packet<'p>,
    domain: Domain,
    /// Priority and drop eligibility, to be carried into the outgoing tag.
    priority: u16,
    /// Tags that are not for us: they travel on.
    inner_tags: &'p [packet::Tag],
}

impl<'a> Walk<'a> {
    fn note(&mut self, stage: Stage, port: &str, text: impl Into<String>) {
        self.outcome.steps.push(Step { stage, port: port.to_owned(), text: text.into() });
    }

    /// Notes what a stage found, and goes on if that was no reason to drop.
    fn judge(
        &mut self,
        stage: Stage,
        port: &str,
        finding: Result<String, (DropReason, String)>,
    ) -> Result<(), DropReason> {
        match finding {
            Ok(text) => {
                self.note(stage, port, text);
                Ok(())
            }
            Err((reason, text)) => {
                self.note(stage, port, format!("drop ({}): {text}", reason.name()));
                Err(reason)
            }
        }
    }

    fn run(&mut self, ingress: &str, frame: &[u8]) -> Result<(), DropReason> {
        let Some(source) = self.ports.iter().find(|port| port.name == ingress).cloned() else {
            return Err(DropReason::PortUnknown);
        };
        let parsed = packet::parse(frame);
        let finding = match &parsed {
            Ok(packet) => Ok(packet.to_string()),
            Err(reason) => Err((*reason, reason.describe().to_owned())),
        };
        self.judge(Stage::Parse, ingress, finding)?;
        let packet = parsed?;

        let finding = if source.up {
            Ok("up".into())
        } else {
            Err((DropReason::PortDown, "administratively down".into()))
        };
        self.judge(Stage::PortState, ingress, finding)?;
        let finding =
            guard::mac(&source, &packet).and_then(|text| self.not_looped(&source, packet.src, text));
        self.judge(Stage::MacGuard, ingress, finding)?;
        self.judge(Stage::IpGuard, ingress, guard::ip(&source, &packet))?;

        let classified = vlan::classify(&source, &packet.tags);
        let finding = match &classified {
            Ok(classified) => Ok(format!("belongs to {}", classified.domain)),
            Err((reason, text)) => Err((*reason, text.clone())),
        };
        self.judge(Stage::Vlan, ingress, finding)?;
        let classified = classified.map_err(|(reason, _)| reason)?;
        let inner_tags = if classified.strip { &packet.tags[1..] } else { &packet.tags[..] };
        let (domain, priority) = (classified.domain, classified.priority);
        let in_flight = InFlight { packet: &packet, domain, priority, inner_tags };

        self.judge(Stage::Guards, ingress, guard::services(&source, &packet))?;
        self.acl_from_vm(&source, &in_flight)?;
        self.rate(Stage::RateFromVm, &source, Direction::FromVm)?;
        self.forward(&source, &in_flight)
    }

    /// What an eSwitch has given back of what came from here goes nowhere. A vNIC that has a VF may be heard both ways.
    fn not_looped(
        &self,
        source: &Port<'a>,
        mac: MacAddr,
        text: String,
    ) -> Result<String, (DropReason, String)> {
        let owner = self.ports.iter().find(|port| port.is_on_switch_of(source) && port.owns.contains(&mac));
        match owner {
            Some(owner) if source.loops && owner.name != source.name && !owner.has_vf => {
                Err((DropReason::LoopedBack, format!("{mac} is behind {}: the NIC gave it back", owner.name)))
            }
            _ => Ok(text),
        }
    }

    fn acl_from_vm(&mut self, source: &Port<'a>, frame: &InFlight<'_>) -> Result<(), DropReason> {
        let decision = acl::decide(self.config, source, Direction::FromVm, frame.packet, frame.domain);
        let finding = decision.finding(DropReason::AclFromVm);
        self.outcome.from_vm = Some(decision);
        self.judge(Stage::AclFromVm, &source.name, finding)
    }

    fn rate(&mut self, stage: Stage, port: &Port<'a>, direction: Direction) -> Result<(), DropReason> {
        let rate = port.vnic.and_then(|vnic| match direction {
            Direction::FromVm => vnic.policy.rate_from_vm,
            Direction::ToVm => vnic.policy.rate_to_vm,
        });
        let empty = self.state.empty_buckets.contains(&(port.name.clone(), direction));
        let reason = match direction {
            Direction::FromVm => DropReason::RateFromVm,
            Direction::ToVm => DropReason::RateToVm,
        };
        let finding = match rate {
            None => Ok("no limit".to_owned()),
            Some(rate) if empty => Err((reason, format!("over {} bit/s", rate.bits_per_second))),
            Some(rate) => Ok(format!("within {} bit/s", rate.bits_per_second)),
        };
        self.judge(stage, &port.name, finding)
    }

    fn forward(&mut self, source: &Port<'a>, frame: &InFlight<'_>) -> Result<(), DropReason> {
        let (stage, dst) = (Stage::Forward, frame.packet.dst);
        if dst.0[..5] == [0x01, 0x80, 0xc2, 0, 0] && dst.0[5] < 16 {
            let text = format!("{dst} is reserved for the link it is sent on");
            return self.judge(stage, &source.name, Err((DropReason::ReservedMulticast, text)));
        }
        self.learn(source, frame);
        if dst.is_group() {
            self.note(stage, &source.name, format!("flood to the members of {}", frame.domain));
            return self.flood(source, frame, |_| true);
        }
        let Some(name) = self.locate(source, dst, frame.domain) else {
            let text =
                format!("{dst} is unknown in {}: to the uplink and those that ask for it", frame.domain);
            self.note(stage, &source.name, text);
            return self.flood(source, frame, |port| port.wants_unknown_unicast);
        };
        if name == source.name {
            let text = format!("{dst} is behind {name} itself");
            return self.judge(stage, &source.name, Err((DropReason::SourcePort, text)));
        }
        let Some(destination) = self.ports.iter().find(|port| port.name == name).cloned() else {
            let text = format!("{dst} is behind {name}, which is no port");
            return self.judge(stage, &source.name, Err((DropReason::TableInconsistent, text)));
        };
        self.note(stage, &source.name, format!("{dst} is behind {name}"));
        let result = self.deliver(&destination, frame);
        self.outcome.deliveries.insert(name, result);
        Ok(())
    }

    /// Learns the source address behind a port that learns, unless it belongs to one of the switch's own ports.
    fn learn(&mut self, source: &Port<'a>, frame: &InFlight<'_>) {
        let mac = frame.packet.src;
        let is_own = self.ports.iter().any(|port| port.is_on_switch_of(source) && port.owns.contains(&mac));
        if source.learn_limit == 0 || is_own {
            return;
        }
        let station = Station { switch: source.switch.name.clone(), domain: frame.domain, mac };
        let known = self.state.fdb.get(&station).filter(|sighting| sighting.port == source.name);
        if known.is_some_and(|sighting| sighting.age_seconds == 0) {
            return;
        }
        let learnt = self.state.fdb.values().filter(|sighting| sighting.port == source.name).count();
        if known.is_some() || learnt < source.learn_limit as usize {
            self.outcome.learnt = Some(station);
        }
    }

    /// The port that has the address, or behind which it was seen lately.
    fn locate(&self, source: &Port<'a>, mac: MacAddr, domain: Domain) -> Option<String> {
        let own = self.ports.iter().find(|port| port.is_on_switch_of(source) && port.owns.contains(&mac));
        if let Some(port) = own {
            return Some(port.name.clone());
        }
        let station = Station { switch: source.switch.name.clone(), domain, mac };
        let sighting = self.state.fdb.get(&station)?;
        (sighting.age_seconds <= source.switch.ageing_seconds).then(|| sighting.port.clone())
    }

    fn flood(
        &mut self,
        source: &Port<'a>,
        frame: &InFlight<'_>,
        wanted: impl Fn(&Port<'a>) -> bool,
    ) -> Result<(), DropReason> {
        let mut ports: Vec<Port<'a>> = self
            .ports
            .iter()
            .filter(|port| port.is_on_switch_of(source) && port.name != source.name)
            .filter(|port| !port.is_standby && wanted(port))
            .cloned()
            .collect();
        ports.sort_by(|a, b| a.name.cmp(&b.name));
        for port in ports {
            match self.deliver(&port, frame) {
                // Such a port is simply not part of the flood.
                Err(DropReason::VlanEgress | DropReason::DestinationDown) => {}
                result => {
                    self.outcome.deliveries.insert(port.name, result);
                }
            }
        }
        if self.outcome.deliveries.is_empty() { Err(DropReason::NoDestination) } else { Ok(()) }
    }

    /// The stages of one destination.
    fn deliver(&mut self, port: &Port<'a>, frame: &InFlight<'_>) -> Result<Vec<u8>, DropReason> {
        let down = |text: &str| Err((DropReason::DestinationDown, text.to_owned()));
        let tag = if !port.up {
            down("administratively down")
        } else if self.state.unattached.contains(&port.name) {
            down("its interface is absent")
        } else {
            vlan::tag_out(port, frame.domain, frame.priority, frame.inner_tags)
                .map_err(|text| (DropReason::VlanEgress, text))
        };
        let finding = match &tag {
            Ok(None) => Ok("leaves without a tag of ours".to_owned()),
            Ok(Some(tag)) => Ok(format!("leaves with tag {:#06x}, VLAN {}", tag.tpid, tag.vid())),
            Err(error) => Err(error.clone()),
        };
        self.judge(Stage::Egress, &port.name, finding)?;
        let tag = tag.map_err(|(reason, _)| reason)?;

        let decision = acl::decide(self.config, port, Direction::ToVm, frame.packet, frame.domain);
        let finding = decision.finding(DropReason::AclToVm);
        self.outcome.to_vm.insert(port.name.clone(), decision);
        self.judge(Stage::AclToVm, &port.name, finding)?;
        self.rate(Stage::RateToVm, port, Direction::ToVm)?;
        Ok(frame.packet.with_tags(tag.iter().chain(frame.inner_tags)))
    }
}

#[cfg(test)]
mod tests;
