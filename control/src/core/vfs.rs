//! VFs as the core sees them: where vNICs' frames go, what NICs' threads report, and what people ask about paths.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use sluice_policy::config::Config;
use sluice_policy::image::Backings;
use sluice_policy::lower;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::oracle::Domain;
use sluice_policy::placement::{Mode, Program, place};
use sluice_proto::v1;
use sluice_proto::v1::path_status::{Path, Reason};
use sluice_proto::v1::port_status::State;
use tokio::sync::oneshot;

use super::Core;
use crate::convert::Spec;
use crate::error::Error;
use crate::events::Severity;
use crate::explain;
use crate::resource::{Key, Kind};
use crate::vf::fleet::{Equipment, Fleet, Message};
use crate::vf::knowledge;
use crate::vf::manager::{Outlook, Report, SoftwarePath, World};
use crate::vf::uncovered_to_proto;

/// What is known of VFs.
#[derive(Default)]
pub(super) struct Vfs {
    fleet: Option<Fleet>,
    /// What each uplink's thread wants of the engine.
    by_switch: BTreeMap<String, Backings>,
    /// By switch and vNIC: one that moves to another switch is on its way back on the first for a while.
    paths: BTreeMap<String, BTreeMap<String, v1::PathStatus>>,
    nics: BTreeMap<String, v1::NicStatus>,
    outlooks: BTreeMap<String, Outlook>,
    counters: BTreeMap<String, Vec<v1::VfCounters>>,
    /// Revisions that the threads have acted upon.
    revisions: BTreeMap<String, u64>,
    /// Revision and stations that the threads were last told.
    told: Option<(u64, Stations)>,
}

/// Stations behind uplinks, by switch.
type Stations = BTreeMap<String, BTreeSet<(Domain, MacAddr)>>;

impl Vfs {
    /// What the engine is told.
    fn backings(&self) -> Backings {
        let mut all = Backings::default();
        for backings in self.by_switch.values() {
            all.vnics.extend(backings.vnics.clone());
            all.filtered_uplinks.extend(backings.filtered_uplinks.iter().cloned());
        }
        all
    }

    pub(super) fn counters(&self) -> impl Iterator<Item = &v1::VfCounters> {
        self.counters.values().flatten()
    }

    pub(super) fn nic(&self, switch: &str) -> Option<&v1::NicStatus> {
        self.nics.get(switch)
    }

    /// Where a vNIC is that holds a VF, on whatever switch.
    fn held(&self, vnic: &str) -> Option<&v1::PathStatus> {
        self.paths.values().filter_map(|paths| paths.get(vnic)).find(|path| path.vf.is_some())
    }

    /// Where a vNIC is, and why.
    pub(super) fn path(&self, vnic: &sluice_policy::config::Vnic, config: &Config) -> v1::PathStatus {
        let here = self.paths.get(&vnic.switch).and_then(|paths| paths.get(&vnic.name));
        let held = here.filter(|path| path.vf.is_some()).or_else(|| self.held(&vnic.name));
        if let Some(path) = held.or(here.filter(|_| vnic.wants_vf())) {
            return path.clone();
        }
        let mut path = v1::PathStatus::default();
        let is_in_use =
            |backings: &Backings| backings.vnics.get(&vnic.name).is_some_and(|backing| backing.in_use);
        if vnic.wants_vf() && self.by_switch.values().any(is_in_use) {
            // Adopted: the engine serves it as on its VF, and nobody has found that to be otherwise.
            path.set_path(Path::Hardware);
            path.cause =
                "it was on a VF when the last daemon ended; the NIC is about to be looked at".to_owned();
            return path;
        }
        path.set_path(Path::Software);
        let switch = config.switches.iter().find(|switch| switch.name == vnic.switch);
        let (reason, message) = if !vnic.wants_vf() {
            (Reason::NotWanted, "it does not ask for a VF: give it `sriov` with a weight above 0".to_owned())
        } else if switch.is_none_or(|switch| switch.uplink.is_none()) {
            let message = format!("switch {} has no uplink: give it one that is a PF", vnic.switch);
            (Reason::NoNic, message)
        } else {
            (Reason::InTransition, "the NIC is about to be looked at".to_owned())
        };
        path.set_reason(reason);
        path.message = message;
        path
    }
}

impl Core {
    /// Begins to serve VFs: the first pass finds vNICs where the last daemon left them. `software` makes each NIC's
    /// thread its way back to this core.
    pub fn serve_vfs(
        &mut self,
        equipment: Equipment,
        software: impl Fn() -> Box<dyn SoftwarePath> + Send + 'static,
    ) {
        self.vfs.by_switch = Fleet::former(&equipment, &self.config);
        self.backings = self.backings_for(&self.config);
        self.vfs.fleet = Some(Fleet::new(equipment, software));
    }

    /// Tells the NICs' threads of the desired state. Called after each pass; cheap where nothing changed.
    pub(super) fn tell_fleet(&mut self, again: bool) {
        if self.untouched {
            return;
        }
        let behind = self.stations();
        let world = (self.state.revision, behind);
        if !again && self.vfs.told.as_ref() == Some(&world) {
            return;
        }
        let all = Arc::new(world.1.clone());
        if let Some(fleet) = &mut self.vfs.fleet {
            fleet.set_world(&World {
                revision: self.state.revision,
                config: Arc::new(self.config.clone()),
                behind_uplink: all,
            });
            self.vfs.told = Some(world);
        }
    }

    /// Stations behind uplinks whose NIC is in switchdev mode, by switch.
    fn stations(&self) -> Stations {
        let is_switchdev = |switch: &str| {
            let outlook = self.vfs.outlooks.get(switch);
            outlook
                .and_then(|outlook| outlook.capabilities.as_ref())
                .is_some_and(|found| found.mode == Mode::Switchdev)
        };
        let uplinks: BTreeMap<u32, &str> = self
            .config
            .switches
            .iter()
            .filter(|switch| is_switchdev(&switch.name))
            .filter_map(|switch| {
                Some((self.state.ids.ports.get(&lower::uplink_port(&switch.name))?, switch.name.as_str()))
            })
            .collect();
        let mut stations = Stations::new();
        if uplinks.is_empty() {
            return stations;
        }
        for row in self.engine.fdb().unwrap_or_default() {
            let Some(switch) = uplinks.get(&row.port) else { continue };
            let vid = VlanId::new(u32::from(row.vlan.vid())).ok();
            let domain = match (vid, row.vlan.is_service()) {
                (None, _) => Domain::Untagged,
                (Some(vid), false) => Domain::Customer(vid),
                (Some(vid), true) => Domain::Service(vid),
            };
            stations.entry((*switch).to_owned()).or_default().insert((domain, row.mac));
        }
        stations
    }

    /// Has every NIC looked at soon.
    pub fn hint_vfs(&self) {
        if let Some(fleet) = &self.vfs.fleet {
            fleet.hint();
        }
    }

    /// Has the engine serve a switch's vNICs as these backings say. The vNICs whose representors could not be attached.
    ///
    /// # Errors
    /// If the pass failed, and another will follow.
    pub fn set_backings(&mut self, switch: &str, backings: Backings) -> Result<BTreeSet<String>, String> {
        let with_representors = backings.vnics.iter().filter(|(_, backing)| backing.representor.is_some());
        let with_representors: Vec<String> = with_representors.map(|(name, _)| name.clone()).collect();
        self.vfs.by_switch.insert(switch.to_owned(), backings);
        self.backings = self.backings_for(&self.config);
        self.pass();
        if self.failed {
            return Err("the kernel engine could not be programmed; see the events".to_owned());
        }
        // One whose vNIC has gone from the configuration has no port, and needs none.
        let is_missing = |name: &String| {
            let port = self.ports.get(&lower::vf_port(name));
            port.is_some_and(|port| port.state() != State::Attached)
        };
        Ok(with_representors.into_iter().filter(is_missing).collect())
    }

    /// What the engine is told of VFs with this configuration: what is no longer configured has no port, and its VF is on
    /// its way back.
    pub(super) fn backings_for(&self, config: &Config) -> Backings {
        let mut backings = self.vfs.backings();
        let asks = |name: &str| config.vnics.iter().any(|vnic| vnic.name == name && vnic.wants_vf());
        backings.vnics.retain(|name, _| asks(name));
        backings
    }

    /// Takes a NIC's report over.
    pub fn take_report(&mut self, report: Report) {
        for (severity, text) in report.events {
            self.events.note(severity, text);
        }
        self.vfs.paths.insert(report.switch.clone(), report.paths);
        self.vfs.nics.insert(report.switch.clone(), report.nic);
        self.vfs.outlooks.insert(report.switch.clone(), report.outlook);
        self.vfs.counters.insert(report.switch.clone(), report.counters);
        self.vfs.revisions.insert(report.switch, report.revision);
        self.publish();
        self.tell_fleet(false);
    }

    /// The revision that every NIC's thread has acted upon.
    pub fn settled_revision(&self) -> u64 {
        let Some(fleet) = &self.vfs.fleet else { return u64::MAX };
        let acted = |switch: &str| self.vfs.revisions.get(switch).copied().unwrap_or(0);
        fleet.switches().map(acted).min().unwrap_or(u64::MAX)
    }

    /// How vNICs would change paths with another configuration.
    pub(super) fn plan_paths(&self, config: &Config) -> Vec<v1::Change> {
        let mut changes = Vec::new();
        for vnic in &config.vnics {
            let held = self.vfs.held(&vnic.name);
            let Some(outlook) = self.vfs.outlooks.get(&vnic.switch) else { continue };
            let current = outlook.programs.get(&vnic.name);
            let mut change = v1::Change { target: format!("vnics/{}", vnic.name), ..v1::Change::default() };
            change.set_action(v1::change::Action::Move);
            let Some(mut capabilities) = outlook.capabilities.clone() else { continue };
            let switch = config.switches.iter().find(|switch| switch.name == vnic.switch);
            if let Some(uplink) = switch.and_then(|switch| switch.uplink.as_ref()) {
                knowledge::attest(&mut capabilities, &uplink.attest);
            }
            let placed = vnic.wants_vf().then(|| place(config, vnic, &capabilities, &outlook.neighbours));
            match (placed, current) {
                (None, Some(_)) if held.is_some() => {
                    change.note = "to its software path: it no longer asks for a VF".to_owned();
                }
                (Some(Err(uncovered)), Some(_)) => {
                    change.note = "to its software path: the NIC cannot enforce its policy".to_owned();
                    change.uncovered = uncovered.iter().map(uncovered_to_proto).collect();
                }
                (Some(Ok(program)), Some(current)) if program != *current => {
                    if matches!(program, Program::Switchdev(_)) && self.same_policy(config, &vnic.name) {
                        continue;
                    }
                    change.note = "through its software path and back: its VF is programmed anew".to_owned();
                }
                (Some(Ok(_)), None) if self.was_uncovered(&vnic.switch, &vnic.name) => {
                    change.note =
                        "to a VF, as soon as one is free: the NIC can enforce its policy".to_owned();
                }
                (Some(Err(uncovered)), None) if !self.same_policy(config, &vnic.name) => {
                    change.note =
                        "it stays on its software path: the NIC cannot enforce its policy".to_owned();
                    change.uncovered = uncovered.iter().map(uncovered_to_proto).collect();
                }
                _ => continue,
            }
            changes.push(change);
        }
        changes
    }

    fn same_policy(&self, config: &Config, name: &str) -> bool {
        let find = |config: &Config| config.vnics.iter().find(|vnic| vnic.name == name).cloned();
        find(config) == find(&self.config)
            && config.acl_groups == self.config.acl_groups
            && config.switches == self.config.switches
    }

    fn was_uncovered(&self, switch: &str, name: &str) -> bool {
        let known = self.vfs.paths.get(switch).and_then(|paths| paths.get(name));
        known.is_none_or(|path| matches!(path.reason(), Reason::Uncovered | Reason::NotWanted))
    }

    /// The switch of a vNIC.
    fn switch_of(&self, vnic: &str) -> Result<String, Error> {
        let key = Key::new(Kind::Vnic, vnic);
        match self.state.resources.get(&key).map(|entry| entry.spec.as_ref()) {
            Some(Spec::Vnic(spec)) => Ok(spec.switch.clone()),
            _ => Err(Error::no_such(&key)),
        }
    }

    /// Where a vNIC is.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn path_of(&self, vnic: &str) -> Result<v1::PathStatus, Error> {
        let key = Key::new(Kind::Vnic, vnic);
        match self.state.resources.get(&key).map(|entry| entry.spec.as_ref()) {
            Some(Spec::Vnic(spec)) => Ok(self.vfs.path(spec, &self.config)),
            _ => Err(Error::no_such(&key)),
        }
    }

    /// Explains a vNIC's path.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn explain(&self, vnic: &str) -> Result<v1::ExplainResponse, Error> {
        let key = Key::new(Kind::Vnic, vnic);
        let resource = self.view.borrow().resources.get(&key).cloned().ok_or_else(|| Error::no_such(&key))?;
        let path = self.path_of(vnic)?;
        let nic = self.vfs.nic(&self.switch_of(vnic)?);
        let name = format!("vnic/{vnic}:");
        let events = self.events.newest().filter(|event| event.text.starts_with(&name));
        let findings = explain::explain(&path, nic, events);
        let mut resource = resource.as_ref().clone();
        if let Some(status) = &mut resource.status {
            status.path = Some(path);
        }
        Ok(v1::ExplainResponse { vnic: Some(resource), findings })
    }

    /// Takes a vNIC's VF; the answer comes when the vNIC is on its software path. `None`: it is already, for good.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn revoke_vf(
        &mut self,
        request: &v1::RevokeVfRequest,
        actor: &str,
    ) -> Result<Option<oneshot::Receiver<crate::vf::fleet::Settled>>, Error> {
        let switch = self.switch_of(&request.vnic)?;
        let reason = if request.reason.is_empty() { "revoked".to_owned() } else { request.reason.clone() };
        let reason = format!("{reason} (by {actor})");
        let time = (request.hold_seconds > 0).then(|| Duration::from_secs(request.hold_seconds.into()));
        let (done, settled) = oneshot::channel();
        let message = Message::Hold { vnic: request.vnic.clone(), reason: reason.clone(), time, done };
        self.events.note(
            Severity::Info,
            format!("vnic/{}: to be held on its software path: {reason}", request.vnic),
        );
        Ok(self.send(&switch, message).then_some(settled))
    }

    /// Ends a hold.
    ///
    /// # Errors
    /// If the vNIC does not exist.
    pub fn release_vf(
        &mut self,
        vnic: &str,
    ) -> Result<Option<oneshot::Receiver<crate::vf::fleet::Settled>>, Error> {
        let switch = self.switch_of(vnic)?;
        let (done, settled) = oneshot::channel();
        Ok(self.send(&switch, Message::Release { vnic: vnic.to_owned(), done }).then_some(settled))
    }

    /// Hands an orchestrator's answer on. `None`: nobody waits for one.
    ///
    /// # Errors
    /// If the vNIC does not exist.
    pub fn acknowledge_vf(
        &mut self,
        answer: v1::AcknowledgeVfRequest,
    ) -> Result<Option<oneshot::Receiver<bool>>, Error> {
        let switch = self.switch_of(&answer.vnic)?;
        let (done, accepted) = oneshot::channel();
        Ok(self.send(&switch, Message::Acknowledge { answer, done }).then_some(accepted))
    }

    /// Has a NIC probed. `None`: no vNIC of the switch asks for a VF, so nobody looks after its NIC.
    ///
    /// # Errors
    /// If the switch does not exist.
    pub fn probe_uplink(
        &mut self,
        switch: &str,
    ) -> Result<Option<oneshot::Receiver<Result<v1::ProbeUplinkResponse, String>>>, Error> {
        let key = Key::new(Kind::Switch, switch);
        if !self.state.resources.contains_key(&key) {
            return Err(Error::no_such(&key));
        }
        let (done, found) = oneshot::channel();
        Ok(self.send(switch, Message::Probe { done }).then_some(found))
    }

    fn send(&self, switch: &str, message: Message) -> bool {
        self.vfs.fleet.as_ref().is_some_and(|fleet| fleet.send(switch, message).is_ok())
    }
}
