use sluice_pipeline::tables::{FLOOD_TRUNKS, FLOOD_UNKNOWN, FloodKey, MacKey, Vlan, mac_word, vlan_mode};

use super::*;
use crate::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Config, Direction, Hook, Policy, Switch, Uplink,
    VhostMode, VhostUser, VlanMode, Vnic,
};
use crate::ids::Ids;
use crate::image::{Binding, Bindings};
use crate::lower::{PortSpecKind, assign_ids, lower, ports, user_port, user_tap_netdev, vnic_port};
use crate::net::{MacAddr, VlanId};

fn vnic(number: u8, attach: Attachment) -> Vnic {
    Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach,
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr([2, 0, 0, 0, 0, number]),
        extra_macs: Vec::new(),
        up: true,
        policy: Policy {
            vlan: VlanMode::Access(VlanId::new(7).expect("in range")),
            ip_guard: vec![[10, 0, 0, number].into()],
            acl: Acl { groups: vec![format!("of-vm{number}")], ..Acl::default() },
            ..Policy::default()
        },
        sriov: None,
    }
}

fn group(number: u8) -> AclGroup {
    let rule = AclRule {
        priority: 1,
        direction: Direction::ToVm,
        matches: AclMatch { ip_proto: Some(number), ..AclMatch::default() },
        action: AclAction::Deny,
    };
    AclGroup { name: format!("of-vm{number}"), rules: vec![rule] }
}

fn rings(number: u8) -> Attachment {
    Attachment::VhostUser(VhostUser { path: format!("/run/vm{number}"), mode: VhostMode::Server, queues: 2 })
}

/// vm1 in the kernel, vm2 and vm3 in user space, on one switch; and another switch without the latter.
fn host() -> (Config, Ids, Image) {
    let switch = |name: &str| Switch { name: name.into(), uplink: None, internal: None, ageing_seconds: 60 };
    let mut elsewhere = vnic(4, Attachment::Tap("tap4".into()));
    elsewhere.switch = "red".into();
    let config = Config {
        switches: vec![switch("blue"), switch("red")],
        acl_groups: (1..=4).map(group).collect(),
        vnics: vec![vnic(1, Attachment::Tap("tap1".into())), vnic(2, rings(2)), vnic(3, rings(3)), elsewhere],
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let bindings: Bindings = (100..)
        .zip(ports(&config))
        .map(|(ifindex, spec)| (spec.name, Binding { ifindex, ..Binding::default() }))
        .collect();
    let image = lower(&config, &ids, &bindings).expect("an image");
    (config, ids, image)
}

fn id(ids: &Ids, port: &str) -> u32 {
    ids.ports.get(port).expect("it has a number")
}

fn owner(image: &Image, ids: &Ids, number: u8) -> Option<u32> {
    let switch = ids.switches.get("blue").expect("it has a number");
    image.macs.get(&MacKey::from_word(switch, mac_word([2, 0, 0, 0, 0, number]))).copied()
}

fn members(image: &Image, ids: &Ids, vlan: Vlan) -> Vec<u32> {
    let switch = ids.switches.get("blue").expect("it has a number");
    let chunk = image.flood.get(&FloodKey { switch, vlan, chunk: 0 });
    chunk.map(|chunk| chunk.ports[..chunk.count as usize].to_vec()).unwrap_or_default()
}

#[test]
fn a_switch_with_guests_rings_gets_a_trunk_and_no_other_does() {
    let (config, _, image) = host();
    let specs = ports(&config);
    let kinds: Vec<_> = specs.iter().map(|spec| (spec.name.as_str(), spec.kind)).collect();
    assert_eq!(
        kinds,
        [
            ("user/blue", PortSpecKind::UserTap),
            ("vnic/vm1", PortSpecKind::Tap),
            ("vnic/vm2", PortSpecKind::VhostUser),
            ("vnic/vm3", PortSpecKind::VhostUser),
            ("vnic/vm4", PortSpecKind::Tap),
        ]
    );
    assert_eq!(specs[0].netdev, user_tap_netdev("blue"));
    assert!(specs[0].netdev.len() <= 15, "{} is too long for an interface", specs[0].netdev);
    assert_ne!(user_tap_netdev("blue"), user_tap_netdev("red"));
    let bound: Vec<u32> = image.ifindexes.keys().copied().collect();
    assert_eq!(bound, [100, 101, 104], "rings are no interface");
}

#[test]
fn the_kernel_finds_guests_with_rings_behind_the_trunk() {
    let (_, ids, whole) = host();
    let Split { kernel, .. } = split(&whole);
    let (tap, vm1, vm2) = (id(&ids, &user_port("blue")), id(&ids, "vnic/vm1"), id(&ids, "vnic/vm2"));
    assert!(!kernel.ports.contains_key(&vm2));
    assert_eq!(owner(&kernel, &ids, 1), Some(vm1));
    assert_eq!((owner(&kernel, &ids, 2), owner(&kernel, &ids, 3)), (Some(tap), Some(tap)));
    assert_eq!(members(&kernel, &ids, Vlan(7)), [vm1]);
    assert_eq!(members(&kernel, &ids, FLOOD_TRUNKS), [tap]);
    assert_eq!(members(&kernel, &ids, FLOOD_UNKNOWN), [tap]);
    assert!(kernel.ip_guard.iter().all(|key| key.port != vm2));
    let config = &kernel.ports[&tap].config;
    assert_eq!((config.vlan_mode, config.native), (vlan_mode::ALL, Vlan::UNTAGGED));
    assert_eq!(config.flags & port_flag::LEARN, 0, "guests' limits are kept by the engine that serves them");
    assert_eq!(config.acl.map(|acl| acl.group_count), [0, 0]);
}

#[test]
fn the_userspace_engine_has_its_guests_and_an_uplink() {
    let (_, ids, whole) = host();
    let Split { user, .. } = split(&whole);
    let number = |vm: u8| id(&ids, &vnic_port(&format!("vm{vm}")));
    let tap = id(&ids, &user_port("blue"));
    assert_eq!(user.ports.keys().copied().collect::<BTreeSet<_>>(), [tap, number(2), number(3)].into());
    assert_eq!(user.switches.len(), 1);
    assert_eq!(
        user.switches.values().map(|switch| (switch.uplink, switch.ageing_seconds)).collect::<Vec<_>>(),
        [(tap, 60)]
    );
    let owners = (1..=3).map(|vm| owner(&user, &ids, vm)).collect::<Vec<_>>();
    assert_eq!(owners, [Some(tap), Some(number(2)), Some(number(3))]);
    assert_eq!(user.macs.len(), 3, "of this switch only");
    assert_eq!(members(&user, &ids, Vlan(7)), [number(2), number(3)]);
    assert_eq!(members(&user, &ids, FLOOD_UNKNOWN), [tap]);
    assert_eq!(user.ip_guard.len(), 2);
    let groups: BTreeSet<u32> =
        [2, 3].map(|vm| ids.groups.get(&format!("group/of-vm{vm}")).expect("one")).into();
    assert_eq!(user.groups.keys().copied().collect::<BTreeSet<_>>(), groups);
    assert_ne!(user.ports[&tap].config.flags & port_flag::LEARN, 0);
    assert!(user.ifindexes.is_empty());
}

#[test]
fn a_host_without_rings_is_the_kernels_alone() {
    let (mut config, _, _) = host();
    config.vnics.retain(|vnic| vnic.attach.netdev().is_some());
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let whole = lower(&config, &ids, &Bindings::new()).expect("an image");
    assert_eq!(split(&whole), Split { kernel: whole, user: Image::default() });
}

/// The same host, with an uplink that learns on the first switch.
fn host_with_uplink() -> Config {
    let (mut config, _, _) = host();
    config.switches[0].uplink = Some(Uplink {
        netdev: "up0".into(),
        hook: Hook::Xdp,
        full_checksums: true,
        trunk: Vec::new(),
        native: None,
        learn_limit: 100,
        up: true,
        attest: Vec::new(),
    });
    config
}

fn user_part(config: &Config) -> (Ids, Image) {
    let mut ids = Ids::default();
    assign_ids(config, &mut ids).expect("numbers");
    let bindings: Bindings = (100..)
        .zip(ports(config))
        .map(|(ifindex, spec)| (spec.name, Binding { ifindex, ..Binding::default() }))
        .collect();
    let image = split(&lower(config, &ids, &bindings).expect("an image")).user;
    (ids, image)
}

#[test]
fn an_uplink_is_sent_to_and_not_flooded() {
    let (ids, user) = user_part(&host_with_uplink());
    let (tap, uplink) = (id(&ids, &user_port("blue")), id(&ids, "uplink/blue"));
    assert_eq!(user.short_cut(tap), Some(uplink));
    assert_eq!(user.short_cut(uplink), None, "a way back is none");
    let port = &user.ports[&uplink];
    assert_eq!((port.behind.clone(), port.config.ifindex), (Behind::Uplink, 0));
    assert_eq!(members(&user, &ids, FLOOD_TRUNKS), [tap]);
    assert_eq!(members(&user, &ids, FLOOD_UNKNOWN), [tap]);
    assert!(user.switches.values().all(|switch| switch.uplink == tap), "what is unknown takes the trunk");
}

/// What is learnt behind the trunk may be behind these.
#[test]
fn an_uplink_beside_others_that_can_be_learnt_is_no_short_cut() {
    let tap = |config: &Config| {
        let (ids, user) = user_part(config);
        user.short_cut(id(&ids, &user_port("blue")))
    };
    let with = |change: fn(&mut Config)| {
        let mut config = host_with_uplink();
        change(&mut config);
        tap(&config)
    };
    assert_eq!(with(|config| config.vnics[0].policy.allow_spoofing = true), None);
    assert_eq!(with(|config| config.vnics[0].policy.learn_limit = Some(1)), None);
    assert_eq!(with(|config| config.switches[0].uplink.as_mut().expect("one").learn_limit = 0), None);
    // The userspace engine knows of its own guests, and switches of each other nothing.
    assert!(with(|config| config.vnics[1].policy.allow_spoofing = true).is_some());
    assert!(with(|config| config.vnics[3].policy.allow_spoofing = true).is_some());
}
