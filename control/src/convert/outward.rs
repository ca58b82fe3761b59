//! Domain types to messages. Whatever equals its default is left out.

use sluice_policy::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Direction, Hook, Policy, Rate, Sriov, Switch,
    Uplink, VfAttachment, VhostMode, VlanMode, Vnic,
};
use sluice_proto::v1;

use super::Spec;
use super::inward::{AGEING_SECONDS, UPLINK_LEARN_LIMIT, VF_NETDEV, VHOST_QUEUES, WEIGHT};
use super::text::{print_ethertype, print_masked_mac, print_protocol, print_tcp_flags};

/// A resource without status.
pub fn resource(spec: &Spec, revision: u64) -> v1::Resource {
    let spec = match spec {
        Spec::Switch(spec) => v1::resource::Spec::Switch(switch(spec)),
        Spec::AclGroup(spec) => v1::resource::Spec::AclGroup(group(spec)),
        Spec::Vnic(spec) => v1::resource::Spec::Vnic(vnic(spec)),
    };
    v1::Resource { spec: Some(spec), revision, status: None }
}

/// A hook.
pub fn hook(hook: Hook) -> v1::Hook {
    match hook {
        Hook::Auto => v1::Hook::Auto,
        Hook::Tcx => v1::Hook::Tcx,
        Hook::Xdp => v1::Hook::Xdp,
    }
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn admin_state(up: bool) -> i32 {
    let state = if up { v1::AdminState::Up } else { v1::AdminState::Down };
    state.into()
}

fn switch(spec: &Switch) -> v1::Switch {
    v1::Switch {
        name: spec.name.clone(),
        uplink: spec.uplink.as_ref().map(uplink),
        internal: spec.internal.as_ref().map(|internal| v1::Internal {
            netdev: internal.netdev.clone(),
            mac: internal.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            vlan: vlan_mode(&internal.vlan),
        }),
        ageing_seconds: (spec.ageing_seconds != AGEING_SECONDS).then_some(spec.ageing_seconds),
    }
}

fn uplink(spec: &Uplink) -> v1::Uplink {
    v1::Uplink {
        netdev: spec.netdev.clone(),
        hook: hook(spec.hook).into(),
        full_checksums: spec.full_checksums,
        trunk: texts(&spec.trunk),
        native: spec.native.map(|vid| vid.get().into()),
        learn_limit: (spec.learn_limit != UPLINK_LEARN_LIMIT).then_some(spec.learn_limit),
        admin_state: admin_state(spec.up),
        attest: spec.attest.iter().map(|one| one.name().to_owned()).collect(),
    }
}

fn vlan_mode(mode: &VlanMode) -> Option<v1::VlanMode> {
    let mode = match mode {
        VlanMode::Untagged => return None,
        VlanMode::Access(vid) => v1::vlan_mode::Mode::Access(vid.get().into()),
        VlanMode::Tunnel(vid) => v1::vlan_mode::Mode::Tunnel(vid.get().into()),
        VlanMode::Trunk { allowed, native } => v1::vlan_mode::Mode::Trunk(v1::Trunk {
            allowed: texts(allowed),
            native: native.map(|vid| vid.get().into()),
        }),
    };
    Some(v1::VlanMode { mode: Some(mode) })
}

fn group(spec: &AclGroup) -> v1::AclGroup {
    v1::AclGroup { name: spec.name.clone(), rules: spec.rules.iter().map(rule).collect() }
}

fn action(action: AclAction) -> v1::acl_rule::Action {
    match action {
        AclAction::Allow => v1::acl_rule::Action::Allow,
        AclAction::Deny => v1::acl_rule::Action::Deny,
    }
}

/// A rule.
pub fn rule(rule: &AclRule) -> v1::AclRule {
    let direction = match rule.direction {
        Direction::FromVm => v1::acl_rule::Direction::FromVm,
        Direction::ToVm => v1::acl_rule::Direction::ToVm,
    };
    v1::AclRule {
        priority: rule.priority,
        direction: direction.into(),
        r#match: (rule.matches != AclMatch::default()).then(|| matches(&rule.matches)),
        action: action(rule.action).into(),
    }
}

fn matches(matches: &AclMatch) -> v1::AclMatch {
    let mac = |mac: &Option<_>| mac.as_ref().map(print_masked_mac).unwrap_or_default();
    let ip = |prefix: Option<sluice_policy::net::IpPrefix>| prefix.map(|prefix| prefix.to_string());
    v1::AclMatch {
        src_mac: mac(&matches.src_mac),
        dst_mac: mac(&matches.dst_mac),
        ethertype: matches.ethertype.map(print_ethertype).unwrap_or_default(),
        vlan: matches.vlan.map(|vid| vid.get().into()),
        src_ip: ip(matches.src_ip).unwrap_or_default(),
        dst_ip: ip(matches.dst_ip).unwrap_or_default(),
        ip_proto: matches.ip_proto.map(print_protocol).unwrap_or_default(),
        src_ports: texts(&matches.src_ports),
        dst_ports: texts(&matches.dst_ports),
        tcp_flags: matches.tcp_flags.as_ref().map(print_tcp_flags).unwrap_or_default(),
        icmp_type: matches.icmp_type.map(Into::into),
        icmp_code: matches.icmp_code.map(Into::into),
    }
}

fn vnic(spec: &Vnic) -> v1::Vnic {
    let attach = match &spec.attach {
        Attachment::Veth(name) => v1::attachment::Kind::Veth(name.clone()),
        Attachment::Tap(name) => v1::attachment::Kind::Tap(name.clone()),
        Attachment::VhostUser(rings) => {
            let mode = match rings.mode {
                VhostMode::Server => v1::vhost_user_attachment::Mode::Server,
                VhostMode::Client => v1::vhost_user_attachment::Mode::Client,
            };
            v1::attachment::Kind::VhostUser(v1::VhostUserAttachment {
                path: rings.path.clone(),
                mode: mode.into(),
                queues: (rings.queues != VHOST_QUEUES).then(|| rings.queues.into()),
            })
        }
    };
    v1::Vnic {
        name: spec.name.clone(),
        switch: spec.switch.clone(),
        attach: Some(v1::Attachment { kind: Some(attach) }),
        hook: hook(spec.hook).into(),
        full_checksums: spec.full_checksums,
        mac: spec.mac.to_string(),
        extra_macs: texts(&spec.extra_macs),
        admin_state: admin_state(spec.up),
        policy: (spec.policy != Policy::default()).then(|| policy(&spec.policy)),
        sriov: spec.sriov.as_ref().map(|claim| sriov(&spec.name, claim)),
    }
}

fn sriov(vnic: &str, spec: &Sriov) -> v1::Sriov {
    let unless = |text: &str, usual: &str| if text == usual { String::new() } else { text.to_owned() };
    let kind = match &spec.attach {
        VfAttachment::Netns { path, netdev, bond } => v1::vf_attachment::Kind::Netns(v1::NetnsAttachment {
            path: path.clone(),
            netdev: unless(netdev, VF_NETDEV),
            bond: bond.clone().unwrap_or_default(),
        }),
        VfAttachment::External { driver } => v1::vf_attachment::Kind::External(v1::ExternalAttachment {
            driver: driver.clone().unwrap_or_default(),
        }),
        VfAttachment::Qmp { socket, device, bus, failover_pair } => {
            v1::vf_attachment::Kind::Qmp(v1::QmpAttachment {
                socket: socket.clone(),
                device: unless(device, &format!("sluice-{vnic}")),
                bus: bus.clone().unwrap_or_default(),
                failover_pair: failover_pair.clone().unwrap_or_default(),
            })
        }
    };
    v1::Sriov {
        weight: (spec.weight != WEIGHT).then_some(spec.weight.into()),
        attach: Some(v1::VfAttachment { kind: Some(kind) }),
    }
}

fn policy(policy: &Policy) -> v1::Policy {
    let rate = |rate: &Rate| v1::Rate { bps: rate.bits_per_second, burst_bytes: rate.burst_bytes };
    let has_rate = policy.rate_from_vm.is_some() || policy.rate_to_vm.is_some();
    v1::Policy {
        vlan: vlan_mode(&policy.vlan),
        allow_spoofing: policy.allow_spoofing,
        ip_guard: texts(&policy.ip_guard),
        dhcp_guard: policy.dhcp_guard,
        ra_guard: policy.ra_guard,
        unknown_unicast: policy.unknown_unicast,
        learn_limit: policy.learn_limit,
        acl: (policy.acl != Acl::default()).then(|| acl(&policy.acl)),
        rate: has_rate.then(|| v1::Rates {
            from_vm: policy.rate_from_vm.as_ref().map(rate),
            to_vm: policy.rate_to_vm.as_ref().map(rate),
        }),
    }
}

fn acl(acl: &Acl) -> v1::Acl {
    let default = |wanted: AclAction| match wanted {
        AclAction::Allow => v1::acl_rule::Action::Unspecified,
        AclAction::Deny => v1::acl_rule::Action::Deny,
    };
    let defaults = v1::AclDefaults {
        from_vm: default(acl.default_from_vm).into(),
        to_vm: default(acl.default_to_vm).into(),
    };
    v1::Acl {
        groups: acl.groups.clone(),
        rules: acl.rules.iter().map(rule).collect(),
        default: (defaults != v1::AclDefaults::default()).then_some(defaults),
    }
}
