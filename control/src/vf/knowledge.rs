//! What is known of a NIC's abilities: what it says, what a probe has found, what the operator vouches for.
//!
//! Findings of probes are kept per kind of NIC (driver, device, firmware) in the state directory, since they outlive
//! reboots; an update of the firmware makes them void by itself.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sluice_policy::config::Attestable;
use sluice_policy::placement::{Capabilities, Evidence, Mode};
use sluice_proto::v1;

/// Name of the file in the state directory.
const FILE: &str = "probes.json";

/// What frames showed of one ability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finding {
    /// The NIC enforces it.
    Enforced,
    /// It takes the setting and does not enforce it.
    Refuted,
}

/// Findings about one kind of NIC, by the ability's name.
pub type KindFindings = BTreeMap<String, Finding>;

/// Findings about all kinds of NIC, shared by the NICs' threads.
#[derive(Clone, Debug)]
pub struct Findings {
    path: PathBuf,
    by_kind: Arc<Mutex<BTreeMap<String, KindFindings>>>,
}

impl Findings {
    /// Those kept in this directory; what cannot be read is forgotten, and found again by another probe.
    pub fn open(state_dir: &Path) -> Findings {
        let path = state_dir.join(FILE);
        let by_kind = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!("{}: {error}; probe the uplinks again", path.display());
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Findings { path, by_kind: Arc::new(Mutex::new(by_kind)) }
    }

    /// What is known of a kind.
    pub fn of(&self, kind: &str) -> KindFindings {
        self.by_kind.lock().get(kind).cloned().unwrap_or_default()
    }

    /// Keeps what a probe found of a kind; what it could not find out stays as it was.
    ///
    /// # Errors
    /// The file system's: then it is known until the daemon ends.
    pub fn keep(&self, kind: &str, found: &KindFindings) -> io::Result<()> {
        let mut by_kind = self.by_kind.lock();
        by_kind.entry(kind.to_owned()).or_default().extend(found.clone());
        let text = serde_json::to_vec_pretty(&*by_kind)?;
        let new = self.path.with_extension("json.new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.path)
    }
}

/// The evidence for an ability that can be attested.
fn evidence(capabilities: &mut Capabilities, ability: Attestable) -> &mut Evidence {
    match ability {
        Attestable::MacGuard => &mut capabilities.mac_guard,
        Attestable::Untagged => &mut capabilities.untagged_only,
        Attestable::RateFromVm => &mut capabilities.rate_max,
        Attestable::AccessVlan => &mut capabilities.access_vlan,
        Attestable::TunnelVlan => &mut capabilities.tunnel_vlan,
        Attestable::UnknownUnicast => &mut capabilities.unknown_unicast_to_pf,
    }
}

/// Adds findings to what a NIC says of itself. What it has no knob for stays missing.
pub fn add_findings(capabilities: &mut Capabilities, findings: &KindFindings) {
    for ability in Attestable::ALL {
        let evidence = evidence(capabilities, ability);
        if let Some(finding) = findings.get(ability.name()) {
            *evidence = match (*evidence, finding) {
                // Not a knob but a habit of the NIC: nothing can be set, and frames show it all the same.
                (Evidence::Missing, Finding::Enforced) if ability == Attestable::Untagged => Evidence::Probed,
                (known, finding) => known.probed(*finding == Finding::Enforced),
            };
        }
    }
}

/// Adds the operator's word to what is known of a NIC. There is none for what it has no knob for.
pub fn attest(capabilities: &mut Capabilities, attested: &[Attestable]) {
    for ability in attested {
        let evidence = evidence(capabilities, *ability);
        let has_knob = *evidence != Evidence::Missing
            || matches!(ability, Attestable::Untagged | Attestable::UnknownUnicast);
        if has_knob {
            *evidence = evidence.attested();
        }
    }
}

/// The abilities as the API tells them.
pub fn to_proto(capabilities: &Capabilities) -> Vec<v1::NicCapability> {
    let mut capabilities = capabilities.clone();
    let named = Attestable::ALL.map(|ability| (ability.name(), *evidence(&mut capabilities, ability)));
    let others = [
        ("rateMin", capabilities.rate_min),
        ("trust", capabilities.trust),
        ("linkState", capabilities.link_state),
        ("queryRss", capabilities.query_rss),
        ("flowerOffload", capabilities.flower.offload),
    ];
    named
        .into_iter()
        .chain(others)
        .map(|(feature, evidence)| v1::NicCapability {
            feature: feature.to_owned(),
            evidence: code(evidence).to_owned(),
            sufficient: evidence.is_sufficient(),
        })
        .collect()
}

/// A legacy eSwitch's abilities by name, for the record.
fn by_name(capabilities: &mut Capabilities) -> [(&'static str, &mut Evidence); 11] {
    [
        ("macGuard", &mut capabilities.mac_guard),
        ("accessVlan", &mut capabilities.access_vlan),
        ("tunnelVlan", &mut capabilities.tunnel_vlan),
        ("vlanQos", &mut capabilities.vlan_qos),
        ("untagged", &mut capabilities.untagged_only),
        ("rateFromVm", &mut capabilities.rate_max),
        ("rateMin", &mut capabilities.rate_min),
        ("trust", &mut capabilities.trust),
        ("linkState", &mut capabilities.link_state),
        ("queryRss", &mut capabilities.query_rss),
        ("unknownUnicast", &mut capabilities.unknown_unicast_to_pf),
    ]
}

/// What a legacy eSwitch said of itself, to be kept for the next daemon; empty in switchdev mode, where nothing is tried.
pub fn to_record(capabilities: &Capabilities) -> BTreeMap<String, String> {
    if capabilities.mode != Mode::Legacy {
        return BTreeMap::new();
    }
    let mut capabilities = capabilities.clone();
    let known = by_name(&mut capabilities);
    known.into_iter().map(|(name, evidence)| (name.to_owned(), code(*evidence).to_owned())).collect()
}

/// The same, read again; `None` if something is missing in it.
pub fn from_record(known: &BTreeMap<String, String>, vfs: u16) -> Option<Capabilities> {
    let mut capabilities = Capabilities { mode: Mode::Legacy, max_vfs: vfs, ..Capabilities::default() };
    for (name, evidence) in by_name(&mut capabilities) {
        let text = known.get(name)?;
        *evidence = ALL_EVIDENCE.into_iter().find(|one| code(*one) == text)?;
    }
    Some(capabilities)
}

/// Abilities that rest on the operator's word only.
pub fn attested(capabilities: &Capabilities) -> Vec<Attestable> {
    let mut capabilities = capabilities.clone();
    Attestable::ALL
        .into_iter()
        .filter(|ability| *evidence(&mut capabilities, *ability) == Evidence::Attested)
        .collect()
}

const ALL_EVIDENCE: [Evidence; 6] = [
    Evidence::Missing,
    Evidence::Assumed,
    Evidence::Refuted,
    Evidence::ReadBack,
    Evidence::Probed,
    Evidence::Attested,
];

const fn code(evidence: Evidence) -> &'static str {
    match evidence {
        Evidence::Missing => "missing",
        Evidence::Assumed => "assumed",
        Evidence::Refuted => "refuted",
        Evidence::ReadBack => "read-back",
        Evidence::Probed => "probed",
        Evidence::Attested => "attested",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_count_more_than_words_and_the_operator_more_than_silence() {
        let told = Capabilities {
            mac_guard: Evidence::ReadBack,
            access_vlan: Evidence::ReadBack,
            rate_max: Evidence::Missing,
            ..Capabilities::default()
        };
        let known = |findings: &[(&str, Finding)], attested: &[Attestable]| {
            let findings = findings.iter().map(|(name, finding)| ((*name).to_owned(), *finding)).collect();
            let mut capabilities = told.clone();
            add_findings(&mut capabilities, &findings);
            attest(&mut capabilities, attested);
            capabilities
        };
        assert_eq!(known(&[], &[]), told);
        let found = [("macGuard", Finding::Refuted), ("accessVlan", Finding::Enforced)];
        assert_eq!(known(&found, &[]).mac_guard, Evidence::Refuted);
        assert_eq!(known(&found, &[]).access_vlan, Evidence::Probed);
        let both = [Attestable::MacGuard, Attestable::AccessVlan, Attestable::RateFromVm];
        let known = known(&found, &both);
        assert_eq!(known.mac_guard, Evidence::Attested);
        assert_eq!(known.access_vlan, Evidence::Probed, "what is proven stays proven");
        assert_eq!(known.rate_max, Evidence::Missing, "there is nothing to vouch for");
        assert_eq!(attested(&known), [Attestable::MacGuard]);
    }

    #[test]
    fn what_a_nic_said_of_itself_is_read_as_it_was_written() {
        let told = Capabilities {
            max_vfs: 4,
            mac_guard: Evidence::Refuted,
            access_vlan: Evidence::ReadBack,
            query_rss: Evidence::Assumed,
            ..Capabilities::default()
        };
        let mut kept = to_record(&told);
        assert_eq!(from_record(&kept, 4), Some(told.clone()));
        kept.remove("trust");
        assert_eq!(from_record(&kept, 4), None);
        assert!(to_record(&Capabilities { mode: Mode::Switchdev, ..told }).is_empty());
    }

    #[test]
    fn findings_are_kept_by_kind() {
        let folder = tempfile::tempdir().expect("a folder");
        let findings = Findings::open(folder.path());
        let found: KindFindings = [("macGuard".to_owned(), Finding::Refuted)].into();
        findings.keep("driver igb", &found).expect("a tmpfs");
        let again = Findings::open(folder.path());
        assert_eq!(again.of("driver igb"), found);
        assert!(again.of("driver ice").is_empty());
        fs::write(folder.path().join(FILE), "nonsense").expect("a tmpfs");
        assert!(Findings::open(folder.path()).of("driver igb").is_empty());
    }
}
