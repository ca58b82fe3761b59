//! The VFs of one uplink: places policies, decides who gets a VF, carries the lifecycles' commands out, looks for
//! drift, and tells what it knows.
//!
//! One thread owns a manager and calls [`step`](Manager::step) whenever something happened and at intervals; nothing in
//! here waits for a guest. Commands to the NIC are carried out at once, those to guests by asking the plug at each step.
//! The software path is brought along through [`SoftwarePath`], which answers when the kernel engine does what it
//! was told, so that a VF is never used before, nor closed without need before, the switch knows.

mod carry;
mod decide;
mod look;
mod software;
mod tell;

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
/// How long a guest may leave its VF unused, in milliseconds, before it is taken back: a bond that changes slaves does.
const IDLE_MAX: u64 = 2_000;
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
    /// Stations learnt behind uplinks whose NIC is in switchdev mode, by switch.
    pub behind_uplink: Arc<BTreeMap<String, BTreeSet<(Domain, MacAddr)>>>,
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
    /// The NIC's abilities, findings included, the operator's word not: that is part of what is planned. `None` while the
    /// NIC is not there.
    pub capabilities: Option<Capabilities>,
    /// What is known of neighbours.
    pub neighbours: Neighbours,
    /// Programs of the vNICs that hold VFs.
    pub programs: BTreeMap<String, Program>,
}

/// The kernel engine and the reconciler, as a NIC's thread sees them.
pub trait SoftwarePath: Send {
    /// Has the kernel engine serve a switch's vNICs as these backings say; returns when it does: the vNICs whose
    /// representors are not attached, however.
    ///
    /// # Errors
    /// Why it does not (yet).
    fn set(&mut self, switch: &str, backings: Backings) -> Result<BTreeSet<String>, String>;

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
    /// What the NIC says of itself, without findings and attestations.
    told_by_nic: Capabilities,
    neighbours: Neighbours,
    /// Why no VF can be granted now.
    trouble: Option<String>,
    /// What the NIC was last told to receive.
    filter: Option<BTreeSet<MacAddr>>,
    /// VLANs that it was last told to receive.
    vlans: Option<BTreeSet<VlanId>>,
    /// What the kernel engine does; `None` if it is not known.
    set: Option<Backings>,
    /// vNICs whose representors the engine could not attach.
    unattached: BTreeSet<String>,
    /// Whether the engine keeps the uplink from being promiscuous.
    is_filtered: bool,
    /// VFs that vNICs held when the last daemon ended, and have no claim to any more: to be closed and cleaned.
    orphans: BTreeMap<String, Held>,
    /// A vNIC has changed its path since neighbours were last looked at.
    has_moved: bool,
    /// The world is another since the filter was last looked at.
    is_world_new: bool,
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
            told_by_nic: Capabilities::default(),
            neighbours: Neighbours::default(),
            trouble: Some("nobody has looked at the NIC yet".to_owned()),
            filter: None,
            vlans: None,
            set: None,
            unattached: BTreeSet::new(),
            is_filtered: former.is_filtered,
            orphans: BTreeMap::new(),
            has_moved: false,
            is_world_new: true,
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
                    if claim.vnic != *vnic {
                        claim.refused = None;
                        claim.lifecycle.forgive(now);
                    }
                    // Another way into the VM is taken once the VF has left it by the present one.
                    claim.vnic = vnic.clone();
                    claim.sriov.weight = sriov.weight;
                }
            }
        }
        self.world = world;
        self.is_world_new = true;
        self.conclude();
    }

    /// What the NIC said of itself, with what probes found.
    fn found(&self) -> Capabilities {
        let mut capabilities = self.told_by_nic.clone();
        let kind = self.parts.nic.identity().key();
        knowledge::add_findings(&mut capabilities, &self.parts.findings.of(&kind));
        capabilities
    }

    /// Concludes from all that is known, the operator's word included, what the NIC can do.
    fn conclude(&mut self) {
        self.capabilities = self.found();
        knowledge::attest(&mut self.capabilities, &self.attested);
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
                // Drivers give new VFs addresses, which is not to be taken for somebody's setting.
                self.ensure_clean(index).map_err(|error| error.to_string())?;
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
        self.claims.is_empty() && self.orphans.is_empty()
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
        if self.former.is_some() {
            // What is in use must be known before anything is decided.
            return self.tell(now);
        }
        if std::mem::take(&mut self.is_world_new)
            && self.trouble.is_none()
            && let Err(text) = self.keep_filter()
        {
            self.note(Severity::Warning, text.clone());
            self.trouble = Some(text);
        }
        self.place(now);
        self.allocate(now);
        self.poll(now);
        if std::mem::take(&mut self.has_moved) {
            // Whoever has come is led to before anybody is told.
            self.place(now);
        }
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
            let eswitch = self.parts.nic.eswitch();
            let left =
                eswitch.sync_unicast_filter(&BTreeSet::new()).and(eswitch.sync_vlans(&BTreeSet::new()));
            if let Err(error) = left {
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
