//! Placement by examples; what placed programs do to frames is tested with the model eSwitch in `sluice-eswitch`.

use super::*;
use crate::config::{AclRule, Attachment, Hook, Policy, Rate, Uplink, VlanMode};
use crate::net::VlanRange;

fn vid(number: u32) -> VlanId {
    VlanId::new(number).expect("in range")
}

fn capable() -> Capabilities {
    Capabilities {
        mode: Mode::Legacy,
        max_vfs: 8,
        mac_guard: Evidence::Probed,
        access_vlan: Evidence::ReadBack,
        tunnel_vlan: Evidence::ReadBack,
        rate_max: Evidence::ReadBack,
        ..Capabilities::default()
    }
}

pub(super) fn config(policy: Policy) -> Config {
    Config {
        switches: vec![Switch {
            name: "blue".into(),
            uplink: Some(Uplink {
                netdev: "pf0".into(),
                hook: Hook::Auto,
                full_checksums: false,
                trunk: Vec::new(),
                native: None,
                learn_limit: 16_384,
                up: true,
                attest: Vec::new(),
            }),
            internal: None,
            ageing_seconds: 300,
        }],
        acl_groups: Vec::new(),
        vnics: vec![Vnic {
            name: "vm1".into(),
            switch: "blue".into(),
            attach: Attachment::Tap("tap0".into()),
            hook: Hook::Auto,
            full_checksums: false,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            extra_macs: Vec::new(),
            up: true,
            policy,
            sriov: None,
        }],
    }
}

pub(super) fn access() -> Policy {
    Policy { vlan: VlanMode::Access(vid(100)), ..Policy::default() }
}

fn features(config: &Config, capabilities: &Capabilities) -> Vec<Feature> {
    match place(config, &config.vnics[0], capabilities, &Neighbours::default()) {
        Ok(_) => Vec::new(),
        Err(uncovered) => {
            assert!(!uncovered.is_empty());
            assert!(uncovered.iter().all(|one| !one.text.is_empty() && !one.remedy.is_empty()));
            uncovered.iter().map(|one| one.feature).collect()
        }
    }
}

#[test]
fn legacy_takes_mac_guard_one_vlan_and_the_sending_rate() {
    let rate = Some(Rate { bits_per_second: 100_000_000, burst_bytes: 65_536 });
    let config = config(Policy { rate_from_vm: rate, ..access() });
    let program = place(&config, &config.vnics[0], &capable(), &Neighbours::default());
    let wanted = VfSettings {
        mac: config.vnics[0].mac,
        vlan: Some(PortVlan { vid: vid(100), qos: 0, protocol: VlanProtocol::Dot1q }),
        spoofchk: true,
        max_rate_mbps: 100,
        ..VfSettings::default()
    };
    assert_eq!(program, Ok(Program::Legacy(wanted)));
}

#[test]
fn legacy_refuses_everything_else_by_name() {
    let deny = || AclRule {
        priority: 1,
        direction: Direction::FromVm,
        matches: Default::default(),
        action: AclAction::Deny,
    };
    let rate = |bits_per_second| Some(Rate { bits_per_second, burst_bytes: 1540 });
    let range = VlanRange::new(vid(1), vid(9)).expect("in order");
    let mut acl = access();
    acl.acl.rules = vec![deny(), AclRule { direction: Direction::ToVm, ..deny() }];
    let mut default_deny = access();
    default_deny.acl.default_to_vm = AclAction::Deny;
    let cases = [
        (Policy { ip_guard: vec![[10, 0, 0, 1].into()], ..access() }, vec![Feature::IpGuard]),
        (Policy { vlan: VlanMode::Untagged, ..access() }, vec![Feature::UntaggedVlan]),
        (
            Policy { vlan: VlanMode::Trunk { allowed: vec![range], native: None }, ..access() },
            vec![Feature::TrunkVlan],
        ),
        (Policy { dhcp_guard: true, ra_guard: true, ..access() }, vec![Feature::DhcpGuard, Feature::RaGuard]),
        (acl, vec![Feature::AclFromVm, Feature::AclToVm]),
        (default_deny, vec![Feature::AclToVm]),
        (Policy { rate_from_vm: rate(1_500_000), ..access() }, vec![Feature::RateFromVm]),
        (Policy { rate_from_vm: rate(999), ..access() }, vec![Feature::RateFromVm]),
        (Policy { rate_to_vm: rate(1_000_000), ..access() }, vec![Feature::RateToVm]),
        (Policy { unknown_unicast: true, ..access() }, vec![Feature::UnknownUnicast]),
        (Policy { learn_limit: Some(1), ..access() }, vec![Feature::Learning]),
    ];
    for (policy, wanted) in cases {
        assert_eq!(features(&config(policy.clone()), &capable()), wanted, "{policy:?}");
    }
}

#[test]
fn only_good_evidence_counts() {
    for (evidence, is_enough) in [
        (Evidence::Missing, false),
        (Evidence::Assumed, false),
        (Evidence::Refuted, false),
        (Evidence::Refuted.attested(), true),
        (Evidence::ReadBack, true),
        (Evidence::ReadBack.probed(false), false),
        (Evidence::Missing.probed(true), false),
        (Evidence::Assumed.probed(true), true),
    ] {
        let capabilities = Capabilities { mac_guard: evidence, ..capable() };
        let found = features(&config(access()), &capabilities);
        assert_eq!(found.is_empty(), is_enough, "{evidence:?}: {found:?}");
        let spoofer = config(Policy { allow_spoofing: true, ..access() });
        assert_eq!(features(&spoofer, &capabilities), [], "nothing to guard");
    }
    assert_eq!(Evidence::Probed.attested(), Evidence::Probed);
}

#[test]
fn surroundings_that_a_nic_cannot_serve_are_named() {
    let good = config(access());
    let with = |change: &dyn Fn(&mut Config)| {
        let mut config = good.clone();
        change(&mut config);
        features(&config, &capable())
    };
    let uplink = |change: fn(&mut Uplink)| {
        with(&|config| change(config.switches[0].uplink.as_mut().expect("it has one")))
    };
    let range = |a, b| VlanRange::new(vid(a), vid(b)).expect("in order");
    assert_eq!(with(&|config| config.switches[0].uplink = None), [Feature::Uplink]);
    assert_eq!(uplink(|uplink| uplink.up = false), [Feature::Uplink]);
    assert_eq!(uplink(|uplink| uplink.native = VlanId::new(100).ok()), [Feature::Uplink]);
    assert_eq!(uplink(|uplink| uplink.trunk = "1-99".parse().into_iter().collect()), [Feature::Uplink]);
    assert_eq!(with(&|c| c.switches[0].uplink.iter_mut().for_each(|u| u.trunk = vec![range(1, 100)])), []);
    assert_eq!(with(&|config| config.vnics[0].up = false), [Feature::PortState]);
    assert_eq!(with(&|config| config.vnics[0].extra_macs = vec![MacAddr([2; 6])]), [Feature::ExtraMacs]);
    assert_eq!(
        with(&|config| {
            let mut asker = config.vnics[0].clone();
            asker.name = "vm2".into();
            asker.policy.unknown_unicast = true;
            config.vnics.push(asker);
        }),
        [Feature::UnknownUnicast]
    );
    assert_eq!(features(&good, &Capabilities { max_vfs: 0, ..capable() }), [Feature::Vfs]);
}

#[test]
fn codes_are_unique() {
    for (index, feature) in Feature::ALL.iter().enumerate() {
        assert!(Feature::ALL[..index].iter().all(|other| other.code() != feature.code()));
    }
}
