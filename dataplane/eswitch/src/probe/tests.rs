use sluice_policy::net::MacAddr;
use sluice_policy::placement::Program;

use super::*;
use crate::contract::Eswitch;
use crate::nic::SoftNic;
use crate::soft::{Flaws, Soft};

fn capabilities() -> Capabilities {
    Capabilities {
        mac_guard: Evidence::ReadBack,
        access_vlan: Evidence::ReadBack,
        rate_max: Evidence::Missing,
        untagged_only: Evidence::Missing,
        ..Capabilities::default()
    }
}

fn nic() -> SoftNic {
    SoftNic::new("no-such-pf", Soft::new(capabilities(), 2, Flaws::default()), Mode::Legacy)
}

#[test]
fn findings_become_evidence() {
    let finding = |ability, verdict| Finding { ability, verdict, text: String::new() };
    let report = ProbeReport {
        identity: nic().identity().clone(),
        vf: VfIndex(0),
        findings: vec![
            finding(Attestable::MacGuard, Verdict::Refuted),
            finding(Attestable::AccessVlan, Verdict::Inconclusive),
            finding(Attestable::RateFromVm, Verdict::Enforced),
            finding(Attestable::Untagged, Verdict::Enforced),
        ],
    };
    let mut found = capabilities();
    report.apply(&mut found);
    assert_eq!(found.mac_guard, Evidence::Refuted);
    assert_eq!(found.access_vlan, Evidence::ReadBack, "what is inconclusive changes nothing");
    assert_eq!(found.rate_max, Evidence::Missing, "what has no knob gets none");
    assert_eq!(found.untagged_only, Evidence::Probed, "a habit needs no knob");
    assert_eq!(report.verdict(Attestable::TunnelVlan), Verdict::Inconclusive);
}

#[test]
fn verdicts_keep_their_names() {
    for verdict in [Verdict::Enforced, Verdict::Refuted, Verdict::Inconclusive] {
        assert_eq!(Verdict::from_code(verdict.code()), Some(verdict));
    }
    assert_eq!(Verdict::from_code("likely"), None);
}

#[test]
fn what_is_not_spare_is_not_touched() {
    let vlan = VlanId::new(4000).expect("a VLAN");
    let mut nic = nic();
    let settings = VfSettings { mac: MacAddr([2; 6]), ..VfSettings::default() };
    nic.with(|soft| soft.program(VfIndex(1), &Program::Legacy(settings))).expect("programming");
    let writes = Nic::writes(&nic);
    assert!(matches!(probe(&mut nic, VfIndex(1), vlan), Err(ProbeError::InUse(_))));
    let absent = probe(&mut nic, VfIndex(7), vlan);
    assert!(matches!(absent, Err(ProbeError::Eswitch(EswitchError::NoSuchVf(_)))), "{absent:?}");
    assert!(matches!(probe(&mut nic, VfIndex(0), vlan), Err(ProbeError::NoCarrier(_))));
    assert_eq!(Nic::writes(&nic), writes);
    nic.flip(Mode::Switchdev, |_| {});
    nic.refresh().expect("a model");
    assert!(matches!(probe(&mut nic, VfIndex(0), vlan), Err(ProbeError::NotLegacy(_))));
}
