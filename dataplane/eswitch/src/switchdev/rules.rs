//! The rules of one vNIC on representors: written, read back, adopted by their cookies, and removed.
//!
//! # Why the order is safe
//! What no rule of a chain matches goes to the representor's software port, where the whole pipeline awaits it. So the
//! first rules of a chain, however many, are never weaker than all of them. Rules are written chain by chain in the
//! order of their priorities, chain 0 last; rules of a former program are removed the other way round, all of them
//! before the first new one. An open VF is served by software meanwhile.

use std::collections::BTreeMap;

use sluice_policy::placement::{FlowerAction, FlowerProgram, FlowerRule, RulePort, Target, VfIndex};

use super::actions::Scope;
use super::cookie::Cookie;
use super::filter::{self, Filter, Where};
use super::layout::Layout;
use super::refusal;
use super::representors::Representors;
use crate::contract::{Enforced, EswitchError};
use crate::netlink::{Connection, Refusal};

/// What a VF's representor and the uplink's hold for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Our rules.
    pub enforced: Enforced,
    /// Rules on its representor that are not ours, in words.
    pub foreign: Vec<String>,
}

/// Where the rules on one representor have sent frames, since they were written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Dropped by a rule or for the rate.
    pub dropped: u64,
    /// Given to software by a rule. Frames that no rule matches go there too, uncounted.
    pub software: u64,
    /// Sent out of the uplink or to a VF.
    pub sent: u64,
}

/// A connection to the kernel's traffic control.
pub struct Rules {
    route: Connection,
    place: Where,
    writes: u64,
}

/// A rule and the filter that it was read from.
struct Held {
    filter: Filter,
    rule: Option<FlowerRule>,
}

impl Rules {
    /// Rules that must be in hardware: what the driver does not take is refused.
    ///
    /// # Errors
    /// Without netlink.
    pub fn in_hardware() -> Result<Rules, EswitchError> {
        Rules::open(Where::Hardware)
    }

    /// Rules that the kernel may execute itself, for interfaces without hardware: to see what a program does.
    ///
    /// # Errors
    /// Without netlink.
    pub fn in_software() -> Result<Rules, EswitchError> {
        Rules::open(Where::Anywhere)
    }

    fn open(place: Where) -> Result<Rules, EswitchError> {
        let route = Connection::open(netlink_sys::protocols::NETLINK_ROUTE)
            .map_err(|error| refusal::general("opening a netlink socket", &error.into()))?;
        Ok(Rules { route, place, writes: 0 })
    }

    /// How many writes have been tried.
    pub const fn writes(&self) -> u64 {
        self.writes
    }

    /// Makes the VF's rules those of the program. Where they are, nothing is written.
    ///
    /// # Errors
    /// Of any class; then none of the rules are left, unless removing them fails too.
    pub fn program(
        &mut self,
        ports: &Representors,
        vf: VfIndex,
        program: &FlowerProgram,
    ) -> Result<(), EswitchError> {
        let own = ports.vfs.get(&vf).ok_or(EswitchError::NoSuchVf(vf))?.ifindex;
        let messages = self.encode(ports, vf, program)?;
        self.need_clsact(own)?;
        if program.rules().iter().any(|rule| rule.port == RulePort::Uplink) {
            self.need_clsact(ports.uplink.ifindex)?;
        }
        let held = self.held(ports, vf)?;
        let is_wanted = |held: &Held| {
            held.filter.cookie.is_some_and(|cookie| cookie.hash == program.hash())
                && held.rule.as_ref().is_some_and(|rule| program.rules().contains(rule))
                && self.is_placed(&held.filter)
        };
        let is_subset = held.iter().all(is_wanted);
        if !is_subset {
            self.remove_all(held.iter().map(|held| &held.filter))?;
        }
        let there: Vec<&FlowerRule> =
            held.iter().filter(|_| is_subset).filter_map(|held| held.rule.as_ref()).collect();
        let written = self.write(program, &messages, &there).and_then(|()| self.verify(ports, vf, program));
        if written.is_err() {
            // The first error is the one that tells; what is left is seen when it is read back.
            let _ = self.remove(ports, vf);
        }
        written
    }

    fn encode(
        &self,
        ports: &Representors,
        vf: VfIndex,
        program: &FlowerProgram,
    ) -> Result<Vec<Vec<u8>>, EswitchError> {
        let rules = program.rules();
        for action in rules.iter().flat_map(|rule| &rule.actions) {
            if let FlowerAction::Redirect(Target::Vf(target)) = action
                && !ports.vfs.contains_key(target)
            {
                return Err(EswitchError::NoSuchVf(*target));
            }
        }
        rules
            .iter()
            .map(|rule| {
                let scope = scope(ports, vf, rule.port, program.hash());
                let has_room = scope.layout.real_chain(rule.chain).is_some()
                    && scope.layout.real_priority(rule.chain, rule.priority).is_some();
                if !has_room {
                    let detail = format!("{} has no place beside those of other VFs", refusal::name(rule));
                    return Err(EswitchError::TableFull { detail });
                }
                filter::encode(rule, ifindex(ports, vf, rule.port).unwrap_or(0), &scope, self.place).map_err(
                    |reason| EswitchError::Broken {
                        operation: refusal::name(rule),
                        detail: format!("it has {reason}"),
                    },
                )
            })
            .collect()
    }

    fn write(
        &mut self,
        program: &FlowerProgram,
        messages: &[Vec<u8>],
        there: &[&FlowerRule],
    ) -> Result<(), EswitchError> {
        let mut missing: Vec<(&FlowerRule, &Vec<u8>)> =
            program.rules().iter().zip(messages).filter(|(rule, _)| !there.contains(rule)).collect();
        missing.sort_by_key(|(rule, _)| (rule.chain == 0, rule.port, rule.chain, rule.priority));
        for (rule, message) in missing {
            self.writes += 1;
            filter::add(&mut self.route, message).map_err(|refused| refusal::of_rule(rule, &refused))?;
        }
        Ok(())
    }

    /// Looks whether the kernel holds just what was written, and in hardware.
    fn verify(
        &mut self,
        ports: &Representors,
        vf: VfIndex,
        program: &FlowerProgram,
    ) -> Result<(), EswitchError> {
        let held = self.held(ports, vf)?;
        for wanted in program.rules() {
            match held.iter().find(|held| held.rule.as_ref() == Some(wanted)) {
                None => {
                    let same_place = |held: &&Held| {
                        held.rule.as_ref().is_none_or(|rule| {
                            (rule.port, rule.chain, rule.priority)
                                == (wanted.port, wanted.chain, wanted.priority)
                        })
                    };
                    let found = held.iter().filter(same_place).map(|held| (&held.rule, held.filter.name()));
                    let found: Vec<_> = found.collect();
                    return Err(EswitchError::Broken {
                        operation: refusal::name(wanted),
                        detail: format!("the kernel took {wanted:?} and has {found:?}"),
                    });
                }
                Some(held) if !self.is_placed(&held.filter) => {
                    return Err(EswitchError::Uncovered {
                        feature: refusal::feature(wanted),
                        detail: format!(
                            "{} is not in hardware, and the driver says nothing",
                            held.filter.name()
                        ),
                    });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// What there is of a VF's rules.
    ///
    /// # Errors
    /// Of class passing, gone or broken.
    pub fn read_back(&mut self, ports: &Representors, vf: VfIndex) -> Result<Found, EswitchError> {
        let own = ports.vfs.get(&vf).ok_or(EswitchError::NoSuchVf(vf))?.ifindex;
        let held = self.held(ports, vf)?;
        let mut rules: Vec<FlowerRule> = held.iter().filter_map(|held| held.rule.clone()).collect();
        rules.sort_by_key(|rule| (rule.port, rule.chain, rule.priority));
        let in_software =
            held.iter().filter(|held| !self.is_placed(&held.filter)).map(|held| held.filter.name());
        let in_software = in_software.collect();
        let foreign =
            self.list(own)?.into_iter().filter(|filter| filter.cookie.is_none_or(|cookie| cookie.vf != vf));
        Ok(Found {
            enforced: Enforced::Switchdev { program: FlowerProgram::new(rules), in_software },
            foreign: foreign.map(|filter| filter.name()).collect(),
        })
    }

    /// Counts what became of frames: of those that the VF sent (`Own`), or of those for it from the uplink.
    ///
    /// # Errors
    /// Of class passing, gone or broken.
    pub fn counters(
        &mut self,
        ports: &Representors,
        vf: VfIndex,
        port: RulePort,
    ) -> Result<Counters, EswitchError> {
        let mut counters = Counters::default();
        let mut over_rate = 0;
        for Held { filter, rule } in self.held_on(ports, vf, port)? {
            let Some(rule) = rule else { continue };
            let (frames, dropped) = filter.frames();
            over_rate = over_rate.max(dropped);
            match rule.actions.last() {
                Some(FlowerAction::Drop) => counters.dropped += frames,
                Some(FlowerAction::Trap) => counters.software += frames,
                Some(FlowerAction::Redirect(_)) => counters.sent += frames,
                _ => {}
            }
        }
        counters.dropped += over_rate;
        Ok(counters)
    }

    /// Removes the VF's rules and no others.
    ///
    /// # Errors
    /// Of class passing, gone or broken; then some may be left.
    pub fn remove(&mut self, ports: &Representors, vf: VfIndex) -> Result<(), EswitchError> {
        let held = self.held(ports, vf)?;
        self.remove_all(held.iter().map(|held| &held.filter))
    }

    fn remove_all<'a>(&mut self, filters: impl Iterator<Item = &'a Filter>) -> Result<(), EswitchError> {
        let mut filters: Vec<&Filter> = filters.collect();
        filters.sort_by_key(|filter| (filter.chain != 0, std::cmp::Reverse(filter.priority)));
        for filter in filters {
            self.writes += 1;
            match filter::remove(&mut self.route, filter) {
                // Somebody was quicker.
                Err(refused) if refused.errno() == nix::errno::Errno::ENOENT as i32 => {}
                Err(refused) => {
                    return Err(refusal::general(&format!("removing {}", filter.name()), &refused));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Our filters of a VF, on both representors. Those that are not as we write them have no rule.
    fn held(&mut self, ports: &Representors, vf: VfIndex) -> Result<Vec<Held>, EswitchError> {
        let mut found = self.held_on(ports, vf, RulePort::Own)?;
        found.extend(self.held_on(ports, vf, RulePort::Uplink)?);
        Ok(found)
    }

    fn held_on(
        &mut self,
        ports: &Representors,
        vf: VfIndex,
        port: RulePort,
    ) -> Result<Vec<Held>, EswitchError> {
        // A VF that is gone may still have rules on the uplink.
        let Some(ifindex) = ifindex(ports, vf, port) else { return Ok(Vec::new()) };
        let scope = scope(ports, vf, port, 0);
        let filters = self.list(ifindex)?.into_iter();
        let ours = filters.filter(|filter| filter.cookie.is_some_and(|cookie| cookie.vf == vf));
        Ok(ours.map(|filter| Held { rule: filter.rule(port, &scope), filter }).collect())
    }

    fn list(&mut self, ifindex: u32) -> Result<Vec<Filter>, EswitchError> {
        match filter::list(&mut self.route, ifindex) {
            // Without the qdisc there are no filters.
            Err(refused) if refused.errno() == nix::errno::Errno::EINVAL as i32 => Ok(Vec::new()),
            result => result.map_err(|refused| refusal::general("listing filters", &refused)),
        }
    }

    fn is_placed(&self, filter: &Filter) -> bool {
        self.place == Where::Anywhere || filter.in_hw
    }

    fn need_clsact(&mut self, ifindex: u32) -> Result<(), EswitchError> {
        let failed = |refused: Refusal| refusal::general("adding the clsact qdisc", &refused);
        if !filter::has_clsact(&mut self.route, ifindex).map_err(failed)? {
            self.writes += 1;
            filter::add_clsact(&mut self.route, ifindex).map_err(failed)?;
        }
        Ok(())
    }

    /// Whether the driver takes these rules, one after the other; they are removed again. For what the NIC can do.
    pub(super) fn takes(
        &mut self,
        ports: &Representors,
        vf: VfIndex,
        rules: &[FlowerRule],
    ) -> Result<bool, EswitchError> {
        let own = ports.vfs.get(&vf).ok_or(EswitchError::NoSuchVf(vf))?.ifindex;
        self.need_clsact(own)?;
        let scope =
            Scope { cookie: Cookie { vf: Cookie::PROBE, hash: 0 }, ..scope(ports, vf, RulePort::Own, 0) };
        let mut taken = true;
        for rule in rules {
            let message = filter::encode(rule, own, &scope, Where::Hardware);
            taken &= message.is_ok_and(|message| filter::add(&mut self.route, &message).is_ok());
        }
        let probes: Vec<Filter> = self
            .list(own)?
            .into_iter()
            .filter(|filter| filter.cookie.is_some_and(|cookie| cookie.vf == Cookie::PROBE))
            .collect();
        taken &= rules.iter().all(|rule| {
            probes.iter().any(|probe| probe.in_hw && probe.rule(RulePort::Own, &scope).as_ref() == Some(rule))
        });
        let writes = self.writes;
        let removed = self.remove_all(probes.iter());
        self.writes = writes;
        removed.map(|()| taken)
    }
}

/// The interface of a rule.
fn ifindex(ports: &Representors, vf: VfIndex, port: RulePort) -> Option<u32> {
    match port {
        RulePort::Own => ports.vfs.get(&vf).map(|representor| representor.ifindex),
        RulePort::Uplink => Some(ports.uplink.ifindex),
    }
}

fn scope(ports: &Representors, vf: VfIndex, port: RulePort, hash: u64) -> Scope {
    let vfs: BTreeMap<VfIndex, u32> =
        ports.vfs.iter().map(|(vf, representor)| (*vf, representor.ifindex)).collect();
    let own = vfs.get(&vf).copied().unwrap_or(0);
    Scope {
        uplink: ports.uplink.ifindex,
        cookie: Cookie { vf, hash },
        own,
        port,
        layout: Layout::new(port, vf),
        vfs,
    }
}
