//! What the property test does not see: the shape of programs, and refusals.

use super::*;
use crate::config::Masked;
use crate::placement::{Evidence, FlowerActions, FlowerKeys, FlowerSupport, Mode};

#[test]
fn port_ranges_become_the_blocks_that_cover_them_exactly() {
    for (first, last, most) in
        [(0, 65_535, 1), (80, 80, 1), (1024, 2047, 1), (1, 65_534, 30), (22, 80, 12), (65_535, 65_535, 1)]
    {
        let blocks = acl::expand(first, last);
        assert!(blocks.len() <= most, "{first}-{last}: {blocks:?}");
        for port in 0..=u16::MAX {
            let hits = blocks.iter().filter(|Masked { value, mask }| port & mask == *value).count();
            assert_eq!(hits, usize::from((first..=last).contains(&port)), "{port} in {first}-{last}");
        }
    }
}

fn capable() -> Capabilities {
    Capabilities {
        mode: Mode::Switchdev,
        max_vfs: 8,
        flower: FlowerSupport {
            offload: Evidence::ReadBack,
            rules_max: 4096,
            keys: FlowerKeys::ALL,
            actions: FlowerActions::ALL,
        },
        ..Capabilities::default()
    }
}

fn config(change: impl FnOnce(&mut Vnic)) -> Config {
    let mut config = crate::placement::tests::config(crate::placement::tests::access());
    change(&mut config.vnics[0]);
    config
}

fn features(config: &Config, capabilities: &Capabilities) -> Vec<Feature> {
    match crate::placement::place(config, &config.vnics[0], capabilities, &Neighbours::default()) {
        Ok(_) => Vec::new(),
        Err(uncovered) => uncovered.iter().map(|one| one.feature).collect(),
    }
}

#[test]
fn what_hardware_lacks_is_named_by_the_feature_that_needs_it() {
    let guarded = config(|vnic| {
        vnic.policy.ip_guard = vec![[10, 0, 0, 1].into()];
        vnic.policy.ra_guard = true;
    });
    assert_eq!(features(&guarded, &capable()), []);
    let with = |change: fn(&mut FlowerSupport)| {
        let mut capabilities = capable();
        change(&mut capabilities.flower);
        features(&guarded, &capabilities)
    };
    assert_eq!(with(|flower| flower.keys.ip = false), [Feature::IpGuard]);
    assert_eq!(with(|flower| flower.keys.icmp = false), [Feature::RaGuard]);
    assert_eq!(with(|flower| flower.actions.trap = false), [Feature::Offload]);
    assert_eq!(with(|flower| flower.offload = Evidence::Assumed), [Feature::Offload]);
    assert_eq!(with(|flower| flower.rules_max = 3), [Feature::TableSpace]);
    assert_eq!(with(|flower| flower.keys.tcp_flags = false), [], "nothing needs them");
}

#[test]
fn what_rules_cannot_express_is_refused() {
    let tunnel = config(|vnic| vnic.policy.vlan = VlanMode::Tunnel(VlanId::new(5).expect("in range")));
    assert_eq!(features(&tunnel, &capable()), [Feature::TunnelVlan]);
    let length = config(|vnic| {
        vnic.policy.acl.rules = vec![crate::config::AclRule {
            priority: 1,
            direction: Direction::FromVm,
            matches: crate::config::AclMatch { ethertype: Some(0x26), ..Default::default() },
            action: crate::config::AclAction::Deny,
        }];
    });
    assert_eq!(features(&length, &capable()), [Feature::AclFromVm]);
}

#[test]
fn an_own_address_is_never_looked_for_behind_the_uplink() {
    let config = config(|_| {});
    let domain = Domain::Customer(VlanId::new(100).expect("in range"));
    let to = |mac: MacAddr| {
        let neighbours = Neighbours { behind_uplink: [(domain, mac)].into(), ..Neighbours::default() };
        let program = crate::placement::place(&config, &config.vnics[0], &capable(), &neighbours);
        let Ok(crate::placement::Program::Switchdev(program)) = program else {
            panic!("it is placed, not {program:?}");
        };
        let sends = |rule: &&FlowerRule| rule.actions.contains(&FlowerAction::Redirect(Target::Uplink));
        program.rules().iter().filter(sends).count()
    };
    assert_eq!(to(MacAddr([2, 0, 0, 0, 0xf0, 1])), 1);
    assert_eq!(to(config.vnics[0].mac), 0, "somebody outside pretends to be it");
}

#[test]
fn each_rule_has_a_place_of_its_own_and_an_end() {
    let config = config(|vnic| {
        vnic.policy.vlan = VlanMode::Trunk {
            allowed: vec!["10-20".parse().expect("a range")],
            native: VlanId::new(30).ok(),
        };
        vnic.policy.dhcp_guard = true;
    });
    let program = crate::placement::place(&config, &config.vnics[0], &capable(), &Neighbours::default());
    let Ok(crate::placement::Program::Switchdev(program)) = program else {
        panic!("it is placed, not {program:?}");
    };
    let mut places = std::collections::BTreeSet::new();
    for rule in program.rules() {
        assert!(places.insert((rule.port, rule.chain, rule.priority)), "{rule:?}");
        let ends = |action: &FlowerAction| {
            matches!(
                action,
                FlowerAction::Drop | FlowerAction::Goto(_) | FlowerAction::Trap | FlowerAction::Redirect(_)
            )
        };
        let (last, before) = rule.actions.split_last().expect("it does something");
        assert!(ends(last) && !before.iter().any(ends), "{rule:?}");
    }
    let again = FlowerProgram::new(program.rules().to_vec());
    assert_eq!(again.hash(), program.hash());
    assert_ne!(FlowerProgram::new(program.rules()[1..].to_vec()).hash(), program.hash());
}
