//! The VFs of one uplink: places policies, decides who gets a VF, carries the lifecycles' commands out, looks for
//! drift, and tells what it knows.
//!
//! One thread owns a manager and calls [`step`](Manager::step) whenever something happened and at intervals; nothing in
//! here waits for a guest. Commands to the NIC are carried out at once, those to guests by asking the plug at each step.
//! The software path is brought along through [`SoftwarePath`], which answers when the kernel engine does what it
//! was told, so that a VF is never used before, nor closed without need before, the switch knows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sluice_eswitch::contract::{ErrorClass, EswitchError, Vf, VfIndex};
use sluice_eswitch::lifecycle::allocate::{self, Hysteresis, allocate};
use sluice_eswitch::lifecycle::execute::{check, execute};
use sluice_eswitch::lifecycle::{Action, Command, Event, Lifecycle, Losses, Path, Timing, answer};
use sluice_eswitch::nic::{Nic, usage};
use sluice_policy::config::{Attestable, Config, Switch, VfAttachment, VlanMode, Vnic};
use sluice_policy::image::{Backing, Backings};
use sluice_policy::lower;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::oracle::Domain;
use sluice_policy::placement::{Capabilities, Mode, Neighbours, Program, place};
use sluice_proto::v1;

use super::claim::{self, Claim, Hold, Surroundings, Waiting};
use super::knowledge::{self, Findings};
use super::plug::{Plug, PlugError, Progress};
use super::record::{Held, Record, RecordFile};
use crate::events::Severity;

/// Commands that follow from one event, at most: a lifecycle goes round in far fewer.
const COMMANDS_MAX: usize = 64;
/// Looks in a row at a guest that does not use its VF, before that is taken back.
const IDLE_LOOKS_MAX: u32 = 3;
/// Looks between those at rules that are not ours.
const FOREIGN_LOOKS: u64 = 10;
/// Stations behind the uplink that programs in switchdev mode lead to.
const STATIONS_MAX: usize = 64;

/// The world as the reconciler sees it.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Revision of the desired state.
    pub revision: u64,
    /// The desired state.
    pub config: Arc<Config>,
    /// Stations learnt behind the uplink, in switchdev mode.
    pub behind_uplink: BTreeSet<(Domain, MacAddr)>,
}

/// What a manager tells.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its switch.
    pub switch: String,
    /// Revision of the world that it has acted upon.
    pub revision: u64,
    /// Paths, by vNIC.
    pub paths: BTreeMap<String, v1::PathStatus>,
    /// The NIC.
    pub nic: v1::NicStatus,
    /// Counters of VFs, by vNIC.
    pub counters: Vec<v1::VfCounters>,
    /// What planning a change needs to know.
    pub outlook: Outlook,
    /// What happened since the last report.
    pub events: Vec<(Severity, String)>,
}

/// What planning a change needs to know of an uplink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// The NIC's abilities, findings and attestations included; `None` while it is not there.
    pub capabilities: Option<Capabilities>,
    /// What is known of neighbours.
    pub neighbours: Neighbours,
    /// Programs of the vNICs that hold VFs.
    pub programs: BTreeMap<String, Program>,
}

/// The kernel engine and the reconciler, as a NIC's thread sees them.
pub trait SoftwarePath: Send {
    /// Has the kernel engine serve a switch's vNICs as these backings say; returns when it does.
    ///
    /// # Errors
    /// Why it does not (yet).
    fn set(&mut self, switch: &str, backings: Backings) -> Result<(), String>;

    /// Takes a report.
    fn report(&mut self, report: Report);
}

/// Makes the plug for a vNIC.
pub type PlugMaker = Box<dyn Fn(&str, &VfAttachment) -> Box<dyn Plug> + Send>;

/// What was told last, so that only news are.
#[derive(Clone, PartialEq)]
struct Told {
    paths: BTreeMap<String, v1::PathStatus>,
    nic: v1::NicStatus,
    revision: u64,
    counters: Vec<v1::VfCounters>,
}

/// What a manager is made of.
pub struct Parts {
    /// Name of the switch.
    pub switch: String,
    /// The NIC of its uplink.
    pub nic: Box<dyn Nic>,
    /// The software path.
    pub software: Box<dyn SoftwarePath>,
    /// Makes plugs.
    pub plugs: PlugMaker,
    /// What probes have found.
    pub findings: Findings,
    /// Where it is kept who holds which VF.
    pub record: RecordFile,
    /// Patience.
    pub timing: Timing,
    /// Time since 1970 at the zero of the clock that [`Manager::step`] is called with, in milliseconds.
    pub epoch: u64,
}

/// The VFs of one uplink.
pub struct Manager {
    parts: Parts,
    world: World,
    attested: Vec<Attestable>,
    claims: BTreeMap<String, Claim>,
    /// Those of the NIC, as of the last look.
    vfs: Vec<Vf>,
    /// VFs that were seen clean in this life.
    clean: BTreeSet<VfIndex>,
    capabilities: Capabilities,
    neighbours: Neighbours,
    /// Why no VF can be granted now.
    trouble: Option<String>,
    /// What the NIC was last told to receive.
    filter: Option<BTreeSet<MacAddr>>,
    set: Option<Backings>,
    record: Record,
    written: Record,
    foreign: Vec<String>,
    counters: Vec<v1::VfCounters>,
    looks: u64,
    events: Vec<(Severity, String)>,
    told: Option<Told>,
    /// What the record says of a former life, until the first look.
    former: Option<Record>,
}

impl Manager {
    /// Takes an uplink over. Nothing is written before the first step.
    pub fn new(parts: Parts) -> Manager {
        let former = parts.record.read();
        Manager {
            parts,
            world: World::default(),
            attested: Vec::new(),
            claims: BTreeMap::new(),
            vfs: Vec::new(),
            clean: BTreeSet::new(),
            capabilities: Capabilities::default(),
            neighbours: Neighbours::default(),
            trouble: Some("nobody has looked at the NIC yet".to_owned()),
            filter: None,
            set: None,
            written: former.clone(),
            record: Record::default(),
            foreign: Vec::new(),
            counters: Vec::new(),
            looks: 0,
            events: Vec::new(),
            told: None,
            former: Some(former),
        }
    }

    /// The desired state is another. Acted upon by the next step.
    pub fn set_world(&mut self, now: u64, world: World) {
        let uplink = switch_of(&world.config, &self.parts.switch).and_then(|switch| switch.uplink.as_ref());
        self.attested = uplink.map(|uplink| uplink.attest.clone()).unwrap_or_default();
        let wanted: BTreeMap<&str, &Vnic> = world
            .config
            .vnics
            .iter()
            .filter(|vnic| uplink.is_some() && vnic.switch == self.parts.switch && vnic.wants_vf())
            .map(|vnic| (vnic.name.as_str(), vnic))
            .collect();
        for claim in self.claims.values_mut() {
            claim.is_wanted = wanted.contains_key(claim.vnic.name.as_str());
        }
        for (name, vnic) in wanted {
            let Some(sriov) = &vnic.sriov else { continue };
            match self.claims.get_mut(name) {
                None => {
                    let plug = (self.parts.plugs)(name, &sriov.attach);
                    let lifecycle = Lifecycle::new(self.parts.timing, now);
                    self.claims.insert(name.to_owned(), Claim::new(vnic, sriov, plug, lifecycle));
                }
                Some(claim) => {
                    // Another way into the VM is taken once the VF has left it by the present one.
                    claim.vnic = vnic.clone();
                    claim.sriov.weight = sriov.weight;
                }
            }
        }
        self.world = world;
    }

    /// Keeps a vNIC on its software path; `until` is a time on the clock of [`step`](Self::step). `false` if it has no
    /// claim to a VF: then it is there for good.
    pub fn hold(&mut self, vnic: &str, reason: &str, until: Option<u64>) -> bool {
        let Some(claim) = self.claims.get_mut(vnic) else { return false };
        claim.hold = Some(Hold { reason: reason.to_owned(), until });
        true
    }

    /// Ends a hold, and all other waiting.
    pub fn release(&mut self, now: u64, vnic: &str) -> bool {
        let Some(claim) = self.claims.get_mut(vnic) else { return false };
        claim.forgive(now);
        true
    }

    /// Hands an orchestrator's answer to the vNIC's plug. `false` if nobody waits for it.
    pub fn acknowledge(&mut self, answer: &v1::AcknowledgeVfRequest) -> bool {
        let Some(claim) = self.claims.get_mut(&answer.vnic) else { return false };
        let is_awaited = claim.plug.acknowledge(answer);
        if is_awaited {
            let losses = Losses {
                lost: answer.lost,
                duplicated: answer.duplicated,
                reordered: answer.reordered,
                blackout: 0,
            };
            claim.lifecycle.record(losses);
        }
        is_awaited
    }

    /// The NIC, for a probe, with a spare VF: the last one that nobody holds or uses.
    ///
    /// # Errors
    /// Why there is none, with what to do.
    pub fn spare(&mut self) -> Result<(&mut dyn Nic, VfIndex), String> {
        let pf = self.parts.nic.netdev().to_owned();
        let held: BTreeSet<VfIndex> = self.claims.values().filter_map(|claim| claim.lifecycle.vf()).collect();
        let spare = self.vfs.iter().rev().find(|vf| {
            !held.contains(&vf.index) && (self.clean.contains(&vf.index) || usage::occupant(vf).is_none())
        });
        match spare {
            Some(vf) => {
                let index = vf.index;
                // The probe leaves it clean, but is not believed.
                self.clean.remove(&index);
                Ok((self.parts.nic.as_mut(), index))
            }
            None => Err(format!(
                "{pf} has no VF to spare: make one more than is in use (/sys/class/net/{pf}/device/sriov_numvfs)"
            )),
        }
    }

    /// The first of two VLANs for a probe, which nobody on this host uses.
    ///
    /// # Errors
    /// When there are none.
    pub fn spare_vlans(&self) -> Result<VlanId, String> {
        let config = &self.world.config;
        let internals = config.switches.iter().filter_map(|switch| switch.internal.as_ref());
        let modes: Vec<&VlanMode> = config
            .vnics
            .iter()
            .map(|vnic| &vnic.policy.vlan)
            .chain(internals.map(|internal| &internal.vlan))
            .collect();
        let uses = |mode: &VlanMode, vid: VlanId| match mode {
            VlanMode::Untagged => false,
            VlanMode::Access(own) | VlanMode::Tunnel(own) => *own == vid,
            VlanMode::Trunk { allowed, native } => {
                *native == Some(vid) || allowed.iter().any(|range| range.contains(vid.get()))
            }
        };
        let is_spare = |vid: u32| VlanId::new(vid).is_ok_and(|vid| !modes.iter().any(|mode| uses(mode, vid)));
        (2..4094)
            .rev()
            .find(|vid| is_spare(*vid) && is_spare(*vid + 1))
            .and_then(|vid| VlanId::new(vid).ok())
            .ok_or_else(|| {
                "every VLAN is in use on this host; free two neighbouring ones for a probe".to_owned()
            })
    }

    /// What findings about this NIC are kept under.
    pub fn kind(&self) -> String {
        self.parts.nic.identity().key()
    }

    /// Whether no vNIC holds a VF or asks for one.
    pub fn is_idle(&self) -> bool {
        self.claims.is_empty()
    }

    /// Whether something is being waited for that wants to be asked about soon.
    pub fn is_busy(&self) -> bool {
        self.claims.values().any(|claim| {
            claim.waiting.is_some() || !matches!(claim.lifecycle.path(), Path::Software | Path::Hardware)
        })
    }

    /// Where a vNIC is.
    pub fn status(&self, now: u64, vnic: &str) -> Option<v1::PathStatus> {
        Some(self.claims.get(vnic)?.status(&self.surroundings(now)))
    }

    /// One round at a time of any clock in milliseconds; with a look at the NIC, or without.
    pub fn step(&mut self, now: u64, look: bool) {
        if look || self.former.is_some() {
            self.look(now);
        }
        self.place(now);
        self.allocate(now);
        self.poll(now);
        self.retire(now);
        self.keep_books();
        self.tell(now);
    }

    /// Leaves the NIC as it was before anybody asked for a VF: the PF receives everything again, and nothing of ours.
    pub fn finish(&mut self) {
        self.filter = None;
        // The reconciler may be ending too; the record says what is left.
        if self.parts.software.set(&self.parts.switch, Backings::default()).is_ok() {
            self.set = Some(Backings::default());
            if let Err(error) = self.parts.nic.eswitch().sync_unicast_filter(&BTreeSet::new()) {
                self.note(Severity::Warning, error.to_string());
            }
        }
        self.keep_books();
        self.told = None;
        self.tell(0);
    }

    fn note(&mut self, severity: Severity, text: String) {
        self.events.push((severity, text));
    }

    fn pf(&self) -> String {
        self.parts.nic.netdev().to_owned()
    }

    // ---- looking ----

    /// Reads the NIC: is it there, what can it do, which VFs are there, does it hold what was programmed.
    fn look(&mut self, now: u64) {
        let before = self.trouble.take();
        self.trouble = self.read_nic(now).err();
        if let Some(former) = self.former.take() {
            self.adopt(now, &former);
        }
        if self.trouble.is_none() {
            // Also looks whether somebody has taken addresses out.
            self.filter = None;
            self.trouble = self.keep_filter().err();
        }
        if let Some(trouble) = self.trouble.clone()
            && before.as_ref() != Some(&trouble)
        {
            self.note(Severity::Warning, trouble);
        } else if self.trouble.is_none() && before.is_some() {
            let text = format!("{}: {} VFs, ready", self.pf(), self.vfs.len());
            self.note(Severity::Info, text);
        }
        self.check_all(now);
        self.counters = self.vf_counters();
        if self.looks.is_multiple_of(FOREIGN_LOOKS) {
            self.foreign = self.foreign_rules();
        }
        self.looks += 1;
    }

    /// Rules on representors of ours that are not ours.
    fn foreign_rules(&mut self) -> Vec<String> {
        if self.parts.nic.mode() != Mode::Switchdev {
            return Vec::new();
        }
        let held: Vec<VfIndex> = self.claims.values().filter_map(|claim| claim.lifecycle.vf()).collect();
        let found = held.into_iter().filter_map(|vf| self.parts.nic.eswitch().read_back(vf).ok());
        let all: BTreeSet<String> = found.flat_map(|found| found.foreign).collect();
        all.into_iter().collect()
    }

    /// Why no VF can be granted, if so.
    fn read_nic(&mut self, now: u64) -> Result<(), String> {
        let refresh = self.parts.nic.refresh().map_err(|error| error.to_string())?;
        if !refresh.is_unchanged() {
            let text = format!("{}: {refresh}", self.pf());
            self.note(Severity::Warning, text.clone());
            if refresh.loses_programs() {
                self.clean.clear();
                self.filter = None;
                self.disturb(now, &text);
            }
        }
        let pf = self.pf();
        if !self.parts.nic.is_present() {
            self.vfs.clear();
            return Err(format!("the NIC of {pf} is gone; it is used again when it is back"));
        }
        if usage::is_up(&pf) == Some(false) {
            self.disturb(now, &format!("{pf} is down"));
            return Err(format!("{pf} is down, and so are its VFs: ip link set {pf} up"));
        }
        self.vfs = self.parts.nic.eswitch().vfs().map_err(|error| error.to_string())?;
        let mut capabilities = self.parts.nic.eswitch().capabilities().map_err(|error| error.to_string())?;
        let kind = self.parts.nic.identity().key();
        knowledge::complete(&mut capabilities, &self.parts.findings.of(&kind), &self.attested);
        self.capabilities = capabilities;
        Ok(())
    }

    /// All VFs may have lost their programs.
    fn disturb(&mut self, now: u64, text: &str) {
        let names: Vec<String> = self
            .claims
            .iter()
            .filter(|(_, claim)| claim.lifecycle.vf().is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            self.send(now, &name, Event::Drifted(text.to_owned()));
        }
    }

    /// Takes VFs over that vNICs held when the last daemon ended.
    fn adopt(&mut self, now: u64, former: &Record) {
        let identity = self.parts.nic.identity();
        let device = format!("{}/{}", identity.bus, identity.address);
        if former.device != device {
            return;
        }
        self.parts.nic.adopt_unicast_filter(&former.filter());
        for (name, held) in &former.held {
            let index = VfIndex(held.vf);
            let vf = self.vfs.iter().find(|vf| vf.index == index).cloned();
            let Some(claim) = self.claims.get_mut(name).filter(|claim| claim.lifecycle.vf().is_none()) else {
                continue;
            };
            claim.vf = vf;
            claim.backing = Some(Backing { representor: held.representor.clone(), in_use: held.in_use });
        }
        // Neighbours first: programs lead to them.
        self.neighbours.on_vfs = former
            .held
            .iter()
            .filter(|(name, held)| held.in_use && self.claims.contains_key(*name))
            .map(|(name, held)| (name.clone(), VfIndex(held.vf)))
            .collect();
        for (name, held) in &former.held {
            let Some(claim) = self.claims.get_mut(name) else { continue };
            let placed = place(&self.world.config, &claim.vnic, &self.capabilities, &self.neighbours);
            let candidate = claim.candidate(self.parts.nic.netdev());
            let is_active =
                held.in_use && claim.vf.is_some() && matches!(claim.plug.is_active(&candidate), Ok(true));
            match placed {
                Ok(program) if is_active => {
                    claim.lifecycle =
                        Lifecycle::adopted(self.parts.timing, now, VfIndex(held.vf), program.clone());
                    claim.placed = Ok(program);
                    claim.told = (Path::Hardware, String::new());
                    let text =
                        format!("vnic/{name}: adopted on VF {} of {}", held.vf, self.parts.nic.netdev());
                    self.note(Severity::Info, text);
                }
                // On its way when the daemon ended, or no longer covered: taken back as any VF, from its guest too.
                _ => {
                    let program = Program::Legacy(Default::default());
                    claim.lifecycle = Lifecycle::adopted(self.parts.timing, now, VfIndex(held.vf), program);
                    let text = "the daemon was restarted while it was on its way".to_owned();
                    self.send(now, name, Event::Drifted(text));
                }
            }
        }
    }

    /// Looks at every VF that may be open.
    fn check_all(&mut self, now: u64) {
        let names: Vec<String> = self.claims.keys().cloned().collect();
        for name in names {
            let Some(claim) = self.claims.get(&name) else { continue };
            if let (Some(vf), Some(program)) = (claim.lifecycle.vf(), claim.lifecycle.program().cloned()) {
                self.check_one(now, &name, vf, &program);
            }
            self.check_guest(now, &name);
        }
    }

    fn check_one(&mut self, now: u64, name: &str, vf: VfIndex, program: &Program) {
        let Err(error) = check(self.parts.nic.eswitch(), vf, program) else { return };
        if error.class() == ErrorClass::Passing {
            return;
        }
        let text = error.to_string();
        if let Some(claim) = self.claims.get_mut(name) {
            claim.drifted(now);
        }
        // A setting is put back at once: that is quicker than closing the VF.
        if let EswitchError::Broken { .. } = error
            && let Some(Ok(())) = execute(
                self.parts.nic.eswitch(),
                &Action::Program { vf, program: program.clone(), is_open: true },
            )
            && check(self.parts.nic.eswitch(), vf, program).is_ok()
        {
            self.note(Severity::Warning, format!("vnic/{name}: drift, put right at once: {text}"));
            let unsteady = self.claims.get(name).is_some_and(|claim| claim.is_unsteady(now));
            if !unsteady {
                return;
            }
        } else {
            self.note(Severity::Warning, format!("vnic/{name}: drift: {text}"));
        }
        self.send(now, name, Event::Drifted(text));
    }

    /// Takes the VF back from a guest that has stopped using it.
    fn check_guest(&mut self, now: u64, name: &str) {
        let pf = self.pf();
        let Some(claim) = self.claims.get_mut(name) else { return };
        if claim.lifecycle.path() != Path::Hardware {
            claim.idle_looks = 0;
            return;
        }
        let candidate = claim.candidate(&pf);
        claim.idle_looks = match claim.plug.is_active(&candidate) {
            Ok(true) => 0,
            Ok(false) | Err(_) => claim.idle_looks + 1,
        };
        if claim.idle_looks >= IDLE_LOOKS_MAX {
            claim.drifted(now);
            self.send(now, name, Event::Revoke("the guest no longer uses it".to_owned()));
        }
    }

    // ---- deciding ----

    /// Fits every policy anew, and tells the lifecycles what changed.
    fn place(&mut self, now: u64) {
        let names: Vec<String> = self.claims.keys().cloned().collect();
        let before = self.neighbours.clone();
        self.meet_neighbours(None);
        for name in names {
            let Some(claim) = self.claims.get_mut(&name) else { continue };
            if let Some(Hold { until: Some(until), .. }) = &claim.hold
                && *until <= now
            {
                claim.hold = None;
            }
            let config = &self.world.config;
            claim.placed = if claim.is_wanted {
                place(config, &claim.vnic, &self.capabilities, &self.neighbours)
            } else {
                Err(Vec::new())
            };
            let Some(current) = self.program_of(&name) else { continue };
            let Some(claim) = self.claims.get(&name) else { continue };
            match &claim.placed {
                Ok(program) if *program == current => {}
                Ok(program) => {
                    let only_neighbours = matches!(program, Program::Switchdev(_))
                        && place(config, &claim.vnic, &self.capabilities, &before).as_ref() == Ok(&current);
                    let event = if only_neighbours {
                        Event::Replaced(program.clone())
                    } else {
                        Event::PolicyChanged("its policy has changed".to_owned())
                    };
                    self.send(now, &name, event);
                }
                Err(uncovered) => {
                    let features: Vec<&str> = uncovered.iter().map(|one| one.feature.code()).collect();
                    let text = match (claim.is_wanted, features.as_slice()) {
                        (false, _) => "it no longer asks for a VF".to_owned(),
                        (true, features) => {
                            format!("the NIC cannot enforce its policy: {}", features.join(", "))
                        }
                    };
                    let event =
                        if claim.is_wanted { Event::PolicyChanged(text) } else { Event::Revoke(text) };
                    self.send(now, &name, event);
                }
            }
        }
    }

    /// What a vNIC's VF holds or is being given; `None` if it has none, or is losing it.
    fn program_of(&self, name: &str) -> Option<Program> {
        let claim = self.claims.get(name)?;
        match claim.lifecycle.path() {
            Path::Software | Path::Draining => None,
            Path::Programming | Path::Attaching | Path::Hardware => claim.lifecycle.granted().cloned(),
        }
    }

    /// What programs may lead to, in switchdev mode: VFs in use, but not that of `leaving`.
    fn meet_neighbours(&mut self, leaving: Option<&str>) {
        if self.parts.nic.mode() != Mode::Switchdev {
            self.neighbours = Neighbours::default();
            return;
        }
        self.neighbours.on_vfs = self
            .claims
            .iter()
            .filter(|(name, claim)| {
                claim.lifecycle.path() == Path::Hardware && Some(name.as_str()) != leaving
            })
            .filter_map(|(name, claim)| Some((name.clone(), claim.lifecycle.vf()?)))
            .collect();
        // Those that are led to already stay, so that a long list does not make programs change for ever.
        let known = &self.world.behind_uplink;
        self.neighbours.behind_uplink.retain(|station| known.contains(station));
        for station in known {
            if self.neighbours.behind_uplink.len() >= STATIONS_MAX {
                break;
            }
            self.neighbours.behind_uplink.insert(*station);
        }
    }

    fn allocate(&mut self, now: u64) {
        let nic_is_well = self.trouble.is_none();
        let candidates: Vec<allocate::Candidate> = self
            .claims
            .values()
            .map(|claim| allocate::Candidate {
                name: claim.vnic.name.clone(),
                weight: if claim.is_wanted { claim.sriov.weight } else { 0 },
                is_eligible: claim.is_eligible(now, nic_is_well),
                path: claim.lifecycle.path(),
                since: claim.lifecycle.since(),
            })
            .collect();
        let held: BTreeSet<VfIndex> = self.claims.values().filter_map(|claim| claim.lifecycle.vf()).collect();
        let mut free: Vec<Vf> = self
            .vfs
            .iter()
            .filter(|vf| !held.contains(&vf.index))
            .filter(|vf| self.clean.contains(&vf.index) || usage::occupant(vf).is_none())
            .cloned()
            .collect();
        let decision = allocate(&candidates, free.len() + held.len(), Hysteresis::default(), now);
        for name in decision.revokes {
            let reason = match self.claims.get(&name) {
                Some(Claim { hold: Some(hold), .. }) => hold.reason.clone(),
                Some(claim) if claim.is_wanted && claim.placed.is_ok() => {
                    "another vNIC weighs more".to_owned()
                }
                _ => "it may not have one".to_owned(),
            };
            self.send(now, &name, Event::Revoke(reason));
        }
        for name in decision.grants {
            // A VF that cannot be cleaned is somebody's who knows more; the next one may do.
            while let Some(vf) = (!free.is_empty()).then(|| free.remove(0)) {
                match self.ensure_clean(vf.index) {
                    Ok(()) => {
                        self.grant(now, &name, vf);
                        break;
                    }
                    Err(error) => {
                        self.note(Severity::Warning, format!("{} is not granted: {error}", vf.index))
                    }
                }
            }
        }
    }

    fn ensure_clean(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        if !self.clean.contains(&vf) {
            execute(self.parts.nic.eswitch(), &Action::Clean(vf)).unwrap_or(Ok(()))?;
            self.clean.insert(vf);
        }
        Ok(())
    }

    fn grant(&mut self, now: u64, name: &str, vf: Vf) {
        let representors = match self.parts.nic.representors() {
            Ok(representors) => representors,
            Err(error) => return self.note(Severity::Warning, format!("vnic/{name}: {error}")),
        };
        let representor =
            representors.and_then(|found| found.vfs.get(&vf.index).map(|port| port.netdev.clone()));
        let index = vf.index;
        let Some(claim) = self.claims.get_mut(name) else { return };
        let Ok(program) = claim.placed.clone() else { return };
        if let Some(sriov) = wanted_sriov(&self.world.config, name)
            && sriov.attach != claim.sriov.attach
        {
            claim.sriov = sriov.clone();
            claim.plug = (self.parts.plugs)(name, &claim.sriov.attach);
        }
        self.parts.nic.use_vf_driver(index, claim.sriov.attach.driver());
        claim.vf = Some(vf);
        claim.dark_since = None;
        claim.backing = Some(Backing { representor, in_use: false });
        self.clean.remove(&index);
        self.keep_books();
        self.send(now, name, Event::Grant { vf: index, program });
    }

    // ---- carrying out ----

    /// Gives a lifecycle an event, and carries out what follows, as far as that needs no waiting.
    fn send(&mut self, now: u64, name: &str, event: Event) {
        let mut next = Some(event);
        for _ in 0..COMMANDS_MAX {
            let Some(event) = next.take() else { return };
            let Some(claim) = self.claims.get_mut(name) else { return };
            let commands = claim.lifecycle.handle(now, event);
            self.tell_path(name);
            for command in commands {
                next = self.carry_out(now, name, command);
            }
        }
    }

    /// The answer, unless it has to be waited for.
    fn carry_out(&mut self, now: u64, name: &str, command: Command) -> Option<Event> {
        let Command { ticket, action } = command;
        let claim = self.claims.get_mut(name)?;
        if !claim.lifecycle.awaits(ticket) {
            return None;
        }
        claim.waiting = None;
        match &action {
            Action::Plug(vf) => {
                let checked = claim.plug.check();
                let binds = self.parts.nic.opens_by_binding(*vf);
                let claim = self.claims.get_mut(name)?;
                match (checked, binds) {
                    (Err(error), _) => Some(refused(ticket, &error)),
                    (Ok(()), Err(error)) => Some(answer(ticket, Err(error))),
                    // There is nothing to give before it is open.
                    (Ok(()), Ok(true)) => Some(Event::Done(ticket)),
                    (Ok(()), Ok(false)) => {
                        claim.waiting = Some(Waiting::Plug(ticket));
                        None
                    }
                }
            }
            Action::Unplug { by_force, .. } => {
                claim.waiting = Some(Waiting::Unplug { ticket, by_force: *by_force });
                None
            }
            Action::UseHardware(_) => Some(self.use_hardware(name, ticket)),
            Action::UseSoftware => Some(self.use_software(now, name, ticket)),
            Action::Open { vf, .. } => {
                let vf = *vf;
                let result = self.open(&action, vf);
                let opened = result.is_ok();
                let claim = self.claims.get_mut(name)?;
                if opened {
                    claim.waiting = Some(Waiting::PlugOpen);
                    // It may have its interface only now.
                    if let Some(found) = self.vfs.iter().find(|one| one.index == vf) {
                        claim.vf = Some(found.clone());
                    }
                }
                Some(answer(ticket, result))
            }
            Action::Close(vf) | Action::Clean(vf) | Action::Program { vf, .. } => {
                let vf = *vf;
                let result = match execute(self.parts.nic.eswitch(), &action).unwrap_or(Ok(())) {
                    // With the NIC its VFs are gone; whatever comes back is cleaned before it is granted.
                    Err(error) if error.class() == ErrorClass::Gone && !self.parts.nic.is_present() => {
                        match action {
                            Action::Program { .. } => Err(error),
                            _ => Ok(()),
                        }
                    }
                    result => result,
                };
                let claim = self.claims.get_mut(name)?;
                let is_draining = claim.lifecycle.path() == Path::Draining;
                match &action {
                    Action::Close(_) if is_draining && result.is_ok() && is_in_use(claim) => {
                        claim.dark_since.get_or_insert(now);
                    }
                    Action::Clean(_) if result.is_ok() && self.parts.nic.is_present() => {
                        self.clean.insert(vf);
                    }
                    _ => {}
                }
                Some(answer(ticket, result))
            }
        }
    }

    fn open(&mut self, action: &Action, vf: VfIndex) -> Result<(), EswitchError> {
        // In switchdev mode what the rules do not decide comes to the representor: it must be served.
        self.set_software()
            .map_err(|detail| EswitchError::Busy { detail: format!("the representor: {detail}") })?;
        execute(self.parts.nic.eswitch(), action).unwrap_or(Ok(()))?;
        if let Ok(vfs) = self.parts.nic.eswitch().vfs()
            && vfs.iter().any(|one| one.index == vf)
        {
            self.vfs = vfs;
        }
        Ok(())
    }

    fn use_hardware(&mut self, name: &str, ticket: u64) -> Event {
        self.set_in_use(name, true);
        if let Err(text) = self.set_software() {
            self.set_in_use(name, false);
            return Event::Failed { ticket, class: ErrorClass::Passing, text };
        }
        // Until here the PF received its frames too; now only the VF does.
        self.filter = None;
        if let Err(text) = self.keep_filter() {
            return Event::Failed { ticket, class: ErrorClass::Passing, text };
        }
        self.replace_neighbours(None);
        Event::Done(ticket)
    }

    fn use_software(&mut self, now: u64, name: &str, ticket: u64) -> Event {
        // Neighbours must not send into a VF that is about to be closed.
        self.replace_neighbours(Some(name));
        self.set_in_use(name, false);
        self.filter = None;
        // A NIC that is gone filters nothing; the vNICs on this host need their path all the same.
        let filtered = self.keep_filter();
        if let Err(text) = self.set_software() {
            return Event::Failed { ticket, class: ErrorClass::Passing, text };
        }
        if let Some(claim) = self.claims.get_mut(name)
            && let Some(dark_since) = claim.dark_since.take()
        {
            let blackout = now.saturating_sub(dark_since);
            claim.lifecycle.record(Losses { blackout, ..Losses::default() });
        }
        match filtered {
            Err(text) if self.parts.nic.is_present() && self.trouble.is_none() => {
                Event::Failed { ticket, class: ErrorClass::Passing, text }
            }
            _ => Event::Done(ticket),
        }
    }

    fn set_in_use(&mut self, name: &str, in_use: bool) {
        if let Some(backing) = self.claims.get_mut(name).and_then(|claim| claim.backing.as_mut()) {
            backing.in_use = in_use;
        }
    }

    /// Has the programs of all VFs in use lead to the neighbours that there are now.
    fn replace_neighbours(&mut self, leaving: Option<&str>) {
        if self.parts.nic.mode() != Mode::Switchdev {
            return;
        }
        self.meet_neighbours(leaving);
        let others: Vec<String> =
            self.neighbours.on_vfs.keys().filter(|name| Some(name.as_str()) != leaving).cloned().collect();
        for other in others {
            let Some(claim) = self.claims.get_mut(&other) else { continue };
            let Ok(program) = place(&self.world.config, &claim.vnic, &self.capabilities, &self.neighbours)
            else {
                continue;
            };
            claim.placed = Ok(program.clone());
            let now = claim.lifecycle.since();
            let commands = claim.lifecycle.handle(now, Event::Replaced(program));
            for Command { ticket, action } in commands {
                let result = execute(self.parts.nic.eswitch(), &action).unwrap_or(Ok(()));
                if let Some(claim) = self.claims.get_mut(&other) {
                    // What failed is repeated by the lifecycle, or the VF given back.
                    let _ = claim.lifecycle.handle(now, answer(ticket, result));
                }
            }
        }
    }

    /// Asks plugs how far they are, and lets time pass.
    fn poll(&mut self, now: u64) {
        let names: Vec<String> = self.claims.keys().cloned().collect();
        let pf = self.pf();
        for name in names {
            for _ in 0..COMMANDS_MAX {
                let Some(event) = self.ask(&name, &pf) else { break };
                self.send(now, &name, event);
            }
            self.send(now, &name, Event::Tick);
        }
    }

    /// What a plug has to say, if it has.
    fn ask(&mut self, name: &str, pf: &str) -> Option<Event> {
        let claim = self.claims.get_mut(name)?;
        let candidate = claim.candidate(pf);
        let vf = claim.lifecycle.vf()?;
        match claim.waiting? {
            Waiting::Plug(ticket) => match claim.plug.plug(&candidate) {
                Ok(Progress::Pending) => None,
                Ok(Progress::Done) => {
                    claim.waiting = None;
                    Some(Event::Done(ticket))
                }
                Err(error) => {
                    claim.waiting = None;
                    Some(refused(ticket, &error))
                }
            },
            Waiting::PlugOpen => match claim.plug.plug(&candidate) {
                Ok(Progress::Pending) => None,
                Ok(Progress::Done) => {
                    claim.waiting = Some(Waiting::Guest);
                    self.ask(name, pf)
                }
                Err(error) => {
                    claim.waiting = None;
                    Some(Event::Refused(error.to_string()))
                }
            },
            Waiting::Guest => match claim.plug.is_active(&candidate) {
                Ok(true) => {
                    claim.waiting = None;
                    Some(Event::GuestActive(vf))
                }
                Ok(false) => None,
                Err(error) => {
                    claim.waiting = None;
                    Some(Event::Refused(error.to_string()))
                }
            },
            Waiting::Unplug { ticket, by_force } => match claim.plug.unplug(&candidate, by_force) {
                Ok(Progress::Pending) => None,
                Ok(Progress::Done) => {
                    claim.waiting = None;
                    let losses = claim.plug.losses();
                    claim.lifecycle.record(losses);
                    Some(Event::Done(ticket))
                }
                Err(error) => {
                    claim.waiting = None;
                    Some(refused(ticket, &error))
                }
            },
        }
    }

    /// Lets go of what has no VF any more, and forgets claims that nobody makes.
    fn retire(&mut self, _now: u64) {
        let mut freed = false;
        for claim in self.claims.values_mut().filter(|claim| claim.lifecycle.vf().is_none()) {
            freed |= claim.backing.take().is_some();
            claim.vf = None;
            claim.waiting = None;
        }
        self.claims.retain(|_, claim| claim.is_wanted || claim.lifecycle.vf().is_some());
        if freed || self.set.is_none() {
            // Tried again by the next step, as `set` stays what it was.
            let _ = self.set_software();
        }
    }

    // ---- the software path and the PF's filter ----

    fn backings(&self) -> Backings {
        let mut backings = Backings::default();
        if self.parts.nic.mode() == Mode::Legacy && self.filter.is_some() {
            backings.filtered_uplinks.insert(self.parts.switch.clone());
        }
        for (name, claim) in &self.claims {
            if let Some(backing) = &claim.backing {
                backings.vnics.insert(name.clone(), backing.clone());
            }
        }
        backings
    }

    fn set_software(&mut self) -> Result<(), String> {
        let backings = self.backings();
        if self.set.as_ref() != Some(&backings) {
            self.parts.software.set(&self.parts.switch, backings.clone())?;
            self.set = Some(backings);
            self.keep_books();
        }
        Ok(())
    }

    /// Has the PF receive what is for vNICs in software: theirs, and the host's own address on the switch.
    fn keep_filter(&mut self) -> Result<(), String> {
        if self.parts.nic.mode() != Mode::Legacy || self.claims.is_empty() && self.filter.is_none() {
            self.filter = None;
            return Ok(());
        }
        let Some(switch) = switch_of(&self.world.config, &self.parts.switch) else { return Ok(()) };
        let in_use = |vnic: &&Vnic| {
            let backing = self.claims.get(&vnic.name).and_then(|claim| claim.backing.as_ref());
            backing.is_some_and(|backing| backing.in_use)
        };
        let mut macs: BTreeSet<MacAddr> = self
            .world
            .config
            .vnics
            .iter()
            .filter(|vnic| vnic.switch == switch.name)
            .filter(|vnic| !in_use(vnic))
            .flat_map(Vnic::macs)
            .collect();
        macs.extend(switch.internal.iter().map(|internal| lower::internal_mac(switch, internal)));
        if self.filter.as_ref() == Some(&macs) {
            return Ok(());
        }
        match self.parts.nic.eswitch().sync_unicast_filter(&macs) {
            Ok(()) => {
                self.filter = Some(macs);
                Ok(())
            }
            Err(error) => Err(format!("{} cannot be told what to receive: {error}", self.parts.nic.netdev())),
        }
    }

    /// Writes down who holds what, if that has changed.
    fn keep_books(&mut self) {
        let identity = self.parts.nic.identity();
        let held: BTreeMap<String, Held> = self
            .claims
            .iter()
            .filter_map(|(name, claim)| {
                let vf = claim.vf.as_ref()?.index.0;
                let backing = claim.backing.clone().unwrap_or_default();
                Some((name.clone(), Held { vf, in_use: backing.in_use, representor: backing.representor }))
            })
            .collect();
        let filter: BTreeSet<String> =
            self.parts.nic.unicast_filter().iter().map(ToString::to_string).collect();
        self.record = Record {
            device: format!("{}/{}", identity.bus, identity.address),
            is_filtered: self.set.as_ref().is_some_and(|set| !set.filtered_uplinks.is_empty()),
            filter,
            held,
        };
        if self.record.held.is_empty() && self.record.filter.is_empty() && !self.record.is_filtered {
            self.record = Record::default();
        }
        if self.record != self.written {
            match self.parts.record.write(&self.record) {
                Ok(()) => self.written = self.record.clone(),
                Err(error) => {
                    self.note(
                        Severity::Error,
                        format!("the record of VFs in use cannot be written: {error}"),
                    );
                }
            }
        }
    }

    // ---- telling ----

    fn surroundings(&self, now: u64) -> Surroundings<'_> {
        Surroundings {
            pf: self.parts.nic.netdev(),
            trouble: self.trouble.as_deref(),
            capabilities: &self.capabilities,
            timing: self.parts.timing,
            now,
            epoch: self.parts.epoch,
        }
    }

    /// Notes that a vNIC has changed its path.
    fn tell_path(&mut self, name: &str) {
        let Some(claim) = self.claims.get_mut(name) else { return };
        let now_told = (claim.lifecycle.path(), claim.lifecycle.reason().to_owned());
        if now_told.0 == claim.told.0 {
            return;
        }
        let text =
            format!("vnic/{name}: {} -> {}: {}", path_name(claim.told.0), path_name(now_told.0), now_told.1);
        let severity = match (claim.told.0, now_told.0) {
            (Path::Hardware, Path::Draining) if claim.hold.is_none() && claim.is_wanted => Severity::Warning,
            _ => Severity::Info,
        };
        claim.told = now_told;
        self.note(severity, text);
    }

    fn tell(&mut self, now: u64) {
        let around = self.surroundings(now);
        let paths: BTreeMap<String, v1::PathStatus> =
            self.claims.iter().map(|(name, claim)| (name.clone(), claim.status(&around))).collect();
        let nic = self.nic_status();
        let told = Told { paths, nic, revision: self.world.revision, counters: self.counters.clone() };
        if self.events.is_empty() && self.told.as_ref() == Some(&told) {
            return;
        }
        let Told { paths, nic, revision, counters } = told.clone();
        self.told = Some(told);
        let outlook = Outlook {
            capabilities: self.trouble.is_none().then(|| self.capabilities.clone()),
            neighbours: self.neighbours.clone(),
            programs: self
                .claims
                .keys()
                .filter_map(|name| Some((name.clone(), self.program_of(name)?)))
                .collect(),
        };
        let events = std::mem::take(&mut self.events);
        let switch = self.parts.switch.clone();
        self.parts.software.report(Report { switch, revision, paths, nic, counters, outlook, events });
    }

    fn nic_status(&self) -> v1::NicStatus {
        let nic = &self.parts.nic;
        let identity = nic.identity();
        v1::NicStatus {
            pf: nic.netdev().to_owned(),
            driver: identity.driver.clone(),
            firmware: identity.firmware.clone(),
            mode: match nic.mode() {
                Mode::Legacy => "legacy".to_owned(),
                Mode::Switchdev => "switchdev".to_owned(),
            },
            vfs: u32::try_from(self.vfs.len()).unwrap_or(u32::MAX),
            vfs_used: u32::try_from(
                self.claims.values().filter(|claim| claim.lifecycle.vf().is_some()).count(),
            )
            .unwrap_or(u32::MAX),
            capabilities: if self.trouble.is_none() {
                knowledge::to_proto(&self.capabilities)
            } else {
                Vec::new()
            },
            foreign: self.foreign.clone(),
            message: self.trouble.clone().unwrap_or_default(),
            writes: nic.writes(),
        }
    }

    /// What the VFs in use have carried.
    fn vf_counters(&mut self) -> Vec<v1::VfCounters> {
        let held: Vec<(String, VfIndex)> = self
            .claims
            .iter()
            .filter(|(_, claim)| is_in_use(claim))
            .filter_map(|(name, claim)| Some((name.clone(), claim.lifecycle.vf()?)))
            .collect();
        held.into_iter()
            .filter_map(|(vnic, vf)| {
                let stats = self.parts.nic.eswitch().stats(vf).ok()?;
                Some(v1::VfCounters {
                    vnic,
                    rx_packets: stats.from_vm_frames,
                    rx_bytes: stats.from_vm_bytes,
                    tx_packets: stats.to_vm_frames,
                    tx_bytes: stats.to_vm_bytes,
                    rx_dropped: stats.from_vm_dropped,
                    tx_dropped: stats.to_vm_dropped,
                })
            })
            .collect()
    }
}

fn is_in_use(claim: &Claim) -> bool {
    claim.backing.as_ref().is_some_and(|backing| backing.in_use)
}

fn refused(ticket: u64, error: &PlugError) -> Event {
    Event::Failed { ticket, class: ErrorClass::Broken, text: error.to_string() }
}

fn switch_of<'a>(config: &'a Config, name: &str) -> Option<&'a Switch> {
    config.switches.iter().find(|switch| switch.name == name)
}

fn wanted_sriov<'a>(config: &'a Config, vnic: &str) -> Option<&'a sluice_policy::config::Sriov> {
    config.vnics.iter().find(|one| one.name == vnic)?.sriov.as_ref()
}

fn path_name(path: Path) -> &'static str {
    claim::path(path).as_str_name()
}

#[cfg(test)]
mod tests;
