//! What a NIC in legacy mode really enforces, found out by sending frames from a spare VF.
//!
//! Drivers take settings that the NIC then ignores, and only frames tell. [`probe`] programs a spare VF as a vNIC's would
//! be, moves its interface into a network namespace of its own, and sends frames of an experimental ethertype to the
//! PF's own address: the eSwitch loops them, and a packet socket on the PF that takes nothing else listens. With each
//! frame that should be stopped go frames that should pass, before and after it. So silence proves something only while
//! the others are heard; otherwise the finding is *inconclusive*. Whether the NIC stops a VF's own tags takes a witness,
//! since a PF does not hear VLANs that it did not ask for, and silence there would prove nothing: a second spare VF, if
//! there is one.
//!
//! # What others notice
//! Nothing is changed but the spare VFs, and the VLANs that the PF receives, by two for the time of the probe. VFs are
//! given back closed and clean, whatever happens. Some frames are meant for nobody and leave by the wire: a handful of
//! the experimental ethertype, tagged with the VLANs that the probe was given and untagged. At most 400 Mbit/s are
//! sent, for less than two seconds, to the PF.
//!
//! # Needs
//! The PF is up and has a carrier; CAP_NET_ADMIN, CAP_NET_RAW, and CAP_SYS_ADMIN for the namespace. Where an XDP program
//! on the PF takes the frames, or the kernel has no VLAN interfaces, less is found.
//!
//! It takes some seconds, in which the NIC's own thread does nothing else.

mod exchange;
mod judge;
mod packet;
mod rate;
mod room;
mod station;

use std::fmt;
use std::io;

use sluice_policy::config::Attestable;
use sluice_policy::net::VlanId;
use sluice_policy::placement::{Capabilities, Evidence, Mode, VfSettings};

use crate::contract::{Enforced, EswitchError, Vf, VfIndex};
use crate::lifecycle::Action;
use crate::lifecycle::execute::execute;
use crate::netlink::Refusal;
use crate::nic::{Identity, Nic, usage};
use judge::Judge;

/// What frames showed of an ability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// The NIC enforces it.
    Enforced,
    /// It takes the setting and does not enforce it.
    Refuted,
    /// It cannot be told: what should have arrived did not, or there is no such setting.
    Inconclusive,
}

impl Verdict {
    /// Its name, the same for ever.
    pub const fn code(self) -> &'static str {
        match self {
            Verdict::Enforced => "enforced",
            Verdict::Refuted => "refuted",
            Verdict::Inconclusive => "inconclusive",
        }
    }

    /// The one with this name.
    pub fn from_code(code: &str) -> Option<Verdict> {
        let all = [Verdict::Enforced, Verdict::Refuted, Verdict::Inconclusive];
        all.into_iter().find(|verdict| verdict.code() == code)
    }
}

/// What was found out about one ability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The ability.
    pub ability: Attestable,
    /// What frames showed.
    pub verdict: Verdict,
    /// Which frames, for people.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.ability.name(), self.verdict.code(), self.text)
    }
}

/// What a probe found out, in the order in which it was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// The NIC; what was found holds for its kind ([`Identity::key`]).
    pub identity: Identity,
    /// The VF that was used.
    pub vf: VfIndex,
    /// One finding for each ability that a probe can tell.
    pub findings: Vec<Finding>,
}

impl ProbeReport {
    /// What was found out about an ability; inconclusive if it was not tried.
    pub fn verdict(&self, ability: Attestable) -> Verdict {
        let found = self.findings.iter().find(|finding| finding.ability == ability);
        found.map_or(Verdict::Inconclusive, |finding| finding.verdict)
    }

    /// Adds what was found to what the NIC says of itself. What is inconclusive changes nothing.
    pub fn apply(&self, capabilities: &mut Capabilities) {
        for finding in &self.findings {
            let is_enforced = match finding.verdict {
                Verdict::Enforced => true,
                Verdict::Refuted => false,
                Verdict::Inconclusive => continue,
            };
            let Capabilities { mac_guard, untagged_only, rate_max, access_vlan, .. } = capabilities;
            match finding.ability {
                Attestable::MacGuard => *mac_guard = mac_guard.probed(is_enforced),
                Attestable::RateFromVm => *rate_max = rate_max.probed(is_enforced),
                Attestable::AccessVlan => *access_vlan = access_vlan.probed(is_enforced),
                // Not a knob but a habit of the NIC: it may be known from frames alone.
                Attestable::Untagged => *untagged_only = Evidence::Assumed.probed(is_enforced),
                Attestable::TunnelVlan | Attestable::UnknownUnicast => {}
            }
        }
    }
}

/// Why nothing was found out.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// In switchdev mode rules say what is enforced, and read back whether they are in hardware.
    #[error("{0} is in switchdev mode, where there is nothing to probe")]
    NotLegacy(String),
    /// The VF is somebody's.
    #[error("{0}; name a VF that nobody uses")]
    InUse(String),
    /// The PF does not carry frames now.
    #[error("{0}; set it up, and see that its cable is plugged")]
    NoCarrier(String),
    /// The VF got no interface.
    #[error("{0} has no interface when it is open; bind its network driver, and probe again")]
    NoInterface(VfIndex),
    /// A system call failed.
    #[error("{what}: {error}; sluiced needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN for a probe")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        error: io::Error,
    },
    /// The NIC failed.
    #[error(transparent)]
    Eswitch(#[from] EswitchError),
    /// What was found out is void, as the VF could not be given back.
    #[error("the VF could not be given back clean: {error}; {}", before.as_deref().unwrap_or("all was found out before"))]
    NotClean {
        /// Why not.
        error: EswitchError,
        /// What failed before that, if something did.
        before: Option<String>,
    },
}

impl ProbeError {
    fn system(what: &'static str) -> impl FnOnce(io::Error) -> ProbeError {
        move |error| ProbeError::System { what, error }
    }

    fn refused(what: &'static str) -> impl FnOnce(Refusal) -> ProbeError {
        move |refusal| ProbeError::System { what, error: refusal.error }
    }
}

/// Finds out what the NIC enforces, with a spare VF (and another one that nobody uses, if there is one), and with `vlan`
/// and the one behind it as VLANs that nobody uses.
///
/// # Errors
/// When there is nothing to be found out, or no way to. The VFs are clean then, too, except after
/// [`ProbeError::NotClean`].
pub fn probe(nic: &mut dyn Nic, vf: VfIndex, vlan: VlanId) -> Result<ProbeReport, ProbeError> {
    if nic.mode() != Mode::Legacy {
        return Err(ProbeError::NotLegacy(nic.netdev().to_owned()));
    }
    let vfs = nic.eswitch().vfs()?;
    let subject = vfs.iter().find(|one| one.index == vf).ok_or(EswitchError::NoSuchVf(vf))?;
    if let Some(occupant) = occupant(nic, subject)? {
        return Err(ProbeError::InUse(occupant));
    }
    let mut witness = None;
    for other in vfs.iter().rev().filter(|one| one.index != vf) {
        if witness.is_none() && occupant(nic, other)?.is_none() {
            witness = Some(other.index);
        }
    }
    let capabilities = nic.eswitch().capabilities()?;
    let spare = || std::iter::once(vf).chain(witness);
    let judged = spare()
        .try_for_each(|vf| clean(nic, vf))
        .map_err(ProbeError::from)
        .and_then(|()| Judge::open(nic, vf, witness, vlan, capabilities)?.judge());
    let cleaned = spare().map(|vf| clean(nic, vf)).fold(Ok(()), Result::and);
    match (judged, cleaned) {
        (Ok(findings), Ok(())) => Ok(ProbeReport { identity: nic.identity().clone(), vf, findings }),
        (Err(error), Ok(())) => Err(error),
        (judged, Err(error)) => {
            let before = judged.err().map(|error| format!("before that: {error}"));
            Err(ProbeError::NotClean { error, before })
        }
    }
}

fn clean(nic: &mut dyn Nic, vf: VfIndex) -> Result<(), EswitchError> {
    run(nic, &Action::Close(vf)).and_then(|()| run(nic, &Action::Clean(vf)))
}

fn run(nic: &mut dyn Nic, action: &Action) -> Result<(), EswitchError> {
    execute(nic.eswitch(), action).unwrap_or(Ok(()))
}

/// Who uses a VF, if somebody does. One with settings is programmed by somebody; one that is bound or up is used.
fn occupant(nic: &mut dyn Nic, vf: &Vf) -> Result<Option<String>, EswitchError> {
    if let Some(occupant) = usage::occupant(vf) {
        return Ok(Some(occupant));
    }
    let is_plain = match nic.eswitch().read_back(vf.index)?.enforced {
        Enforced::Legacy(settings) => VfSettings { spoofchk: false, ..settings } == VfSettings::default(),
        Enforced::Switchdev { program, .. } => program.rules().is_empty(),
    };
    Ok((!is_plain).then(|| format!("{} has settings of somebody", vf.index)))
}

#[cfg(test)]
mod tests;
