//! Messages to domain types.

use std::fmt::Display;
use std::str::FromStr;

use sluice_policy::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Attestable, Direction, Hook, Internal, Policy,
    Rate, Sriov, Switch, Uplink, VfAttachment, VhostMode, VhostUser, VlanMode, Vnic,
};
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::validate::{Violation, ViolationCode};
use sluice_proto::v1;

use super::Spec;
use super::text::{parse_ethertype, parse_masked_mac, parse_protocol, parse_tcp_flags};
use crate::resource::{Key, Kind};

/// Seconds after which learnt addresses are forgotten, unless told.
pub(super) const AGEING_SECONDS: u32 = 300;
/// Most addresses learnt from an uplink, unless told.
pub(super) const UPLINK_LEARN_LIMIT: u32 = 16_384;
/// Weight of a vNIC's claim to a VF, unless told.
pub(super) const WEIGHT: u8 = 50;
/// Queue pairs of a vhost-user vNIC, unless told.
pub(super) const VHOST_QUEUES: u16 = 1;
/// Name of a VF's interface in a VM's namespace, unless told.
pub(super) const VF_NETDEV: &str = "vf0";

/// Converts every resource of a configuration, in its order.
///
/// # Errors
/// Everything that is wrong, in the order of the configuration. References between resources are not looked at.
pub fn config(message: &v1::Config) -> Result<Vec<Spec>, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut specs =
        Vec::with_capacity(message.switches.len() + message.acl_groups.len() + message.vnics.len());
    for (index, switch) in message.switches.iter().enumerate() {
        let mut reader = Reader::new(Kind::Switch, &switch.name, index, &mut violations);
        specs.push(Spec::Switch(reader.switch(switch)));
    }
    for (index, group) in message.acl_groups.iter().enumerate() {
        let mut reader = Reader::new(Kind::AclGroup, &group.name, index, &mut violations);
        let rules = reader.rules("rules", &group.rules);
        specs.push(Spec::AclGroup(AclGroup { name: group.name.clone(), rules }));
    }
    for (index, vnic) in message.vnics.iter().enumerate() {
        let mut reader = Reader::new(Kind::Vnic, &vnic.name, index, &mut violations);
        specs.push(Spec::Vnic(reader.vnic(vnic)));
    }
    if violations.is_empty() { Ok(specs) } else { Err(violations) }
}

/// Reads one resource. A field that cannot be read is noted and stands as some valid value, which nobody will see.
struct Reader<'a> {
    resource: String,
    violations: &'a mut Vec<Violation>,
}

impl<'a> Reader<'a> {
    fn new(kind: Kind, name: &str, index: usize, violations: &'a mut Vec<Violation>) -> Self {
        let resource = match name {
            "" => format!("{}[{index}]", kind.collection()),
            name => Key::new(kind, name).to_string(),
        };
        let mut reader = Reader { resource, violations };
        if name.is_empty() {
            reader.missing("name", "every resource needs a name");
        }
        reader
    }

    fn note(&mut self, field: &str, message: impl Display, code: ViolationCode) {
        self.violations.push(Violation {
            resource: self.resource.clone(),
            field: field.to_owned(),
            message: message.to_string(),
            code,
        });
    }

    fn invalid(&mut self, field: &str, message: impl Display) {
        self.note(field, message, ViolationCode::Invalid);
    }

    fn missing(&mut self, field: &str, message: impl Display) {
        self.note(field, message, ViolationCode::Missing);
    }

    fn get<T, E: Display>(&mut self, field: &str, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.invalid(field, error)).ok()
    }

    fn parse<T: FromStr>(&mut self, field: &str, text: &str) -> Option<T>
    where
        T::Err: Display,
    {
        self.get(field, text.trim().parse())
    }

    fn list<T: FromStr>(&mut self, field: &str, texts: &[String]) -> Vec<T>
    where
        T::Err: Display,
    {
        let parsed = texts.iter().enumerate();
        parsed.filter_map(|(index, text)| self.parse(&format!("{field}[{index}]"), text)).collect()
    }

    /// A text in which empty means absent.
    fn optional<T, E: Display>(
        &mut self,
        field: &str,
        text: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        if text.is_empty() { None } else { self.get(field, parse(text.trim())) }
    }

    fn vlan(&mut self, field: &str, vid: u32) -> Option<VlanId> {
        self.get(field, VlanId::new(vid))
    }

    fn byte(&mut self, field: &str, number: Option<u32>) -> Option<u8> {
        let number = number?;
        self.get(
            field,
            u8::try_from(number).map_err(|_| format!("{number} is too large; it is a byte, 0-255")),
        )
    }

    fn hook(&mut self, number: i32) -> Hook {
        match v1::Hook::try_from(number) {
            Ok(v1::Hook::Auto) => Hook::Auto,
            Ok(v1::Hook::Tcx) => Hook::Tcx,
            Ok(v1::Hook::Xdp) => Hook::Xdp,
            Err(_) => {
                self.invalid("hook", format!("{number} is not a hook; use AUTO, TCX or XDP"));
                Hook::Auto
            }
        }
    }

    fn is_up(&mut self, field: &str, number: i32) -> bool {
        match v1::AdminState::try_from(number) {
            Ok(v1::AdminState::Up) => true,
            Ok(v1::AdminState::Down) => false,
            Err(_) => {
                self.invalid(field, format!("{number} is not an administrative state; use UP or DOWN"));
                false
            }
        }
    }

    fn switch(&mut self, message: &v1::Switch) -> Switch {
        Switch {
            name: message.name.clone(),
            uplink: message.uplink.as_ref().map(|uplink| self.uplink(uplink)),
            internal: message.internal.as_ref().map(|internal| Internal {
                netdev: internal.netdev.clone(),
                mac: self.optional("internal.mac", &internal.mac, str::parse),
                vlan: self.vlan_mode("internal.vlan", internal.vlan.as_ref()),
            }),
            ageing_seconds: message.ageing_seconds.unwrap_or(AGEING_SECONDS),
        }
    }

    fn uplink(&mut self, message: &v1::Uplink) -> Uplink {
        Uplink {
            netdev: message.netdev.clone(),
            hook: self.hook(message.hook),
            full_checksums: message.full_checksums,
            trunk: self.list("uplink.trunk", &message.trunk),
            native: message.native.and_then(|vid| self.vlan("uplink.native", vid)),
            learn_limit: message.learn_limit.unwrap_or(UPLINK_LEARN_LIMIT),
            up: self.is_up("uplink.adminState", message.admin_state),
            attest: self.attest(&message.attest),
        }
    }

    fn attest(&mut self, names: &[String]) -> Vec<Attestable> {
        let mut attested = Vec::new();
        for (index, name) in names.iter().enumerate() {
            match Attestable::from_name(name) {
                Some(one) if !attested.contains(&one) => attested.push(one),
                Some(_) => {}
                None => {
                    let known = Attestable::ALL.map(Attestable::name).join(", ");
                    self.invalid(
                        &format!("uplink.attest[{index}]"),
                        format!("`{name}` cannot be attested; use {known}"),
                    );
                }
            }
        }
        attested
    }

    fn vlan_mode(&mut self, field: &str, message: Option<&v1::VlanMode>) -> VlanMode {
        let mode = match message.and_then(|message| message.mode.as_ref()) {
            None => Some(VlanMode::Untagged),
            Some(v1::vlan_mode::Mode::Access(vid)) => {
                self.vlan(&format!("{field}.access"), *vid).map(VlanMode::Access)
            }
            Some(v1::vlan_mode::Mode::Tunnel(vid)) => {
                self.vlan(&format!("{field}.tunnel"), *vid).map(VlanMode::Tunnel)
            }
            Some(v1::vlan_mode::Mode::Trunk(trunk)) => Some(VlanMode::Trunk {
                allowed: self.list(&format!("{field}.trunk.allowed"), &trunk.allowed),
                native: trunk.native.and_then(|vid| self.vlan(&format!("{field}.trunk.native"), vid)),
            }),
        };
        mode.unwrap_or_default()
    }

    fn vnic(&mut self, message: &v1::Vnic) -> Vnic {
        let attach = match message.attach.as_ref().and_then(|attach| attach.kind.as_ref()) {
            Some(v1::attachment::Kind::Veth(name)) => Attachment::Veth(name.clone()),
            Some(v1::attachment::Kind::Tap(name)) => Attachment::Tap(name.clone()),
            Some(v1::attachment::Kind::VhostUser(rings)) => Attachment::VhostUser(self.vhost_user(rings)),
            None => {
                self.missing(
                    "attach",
                    "say which interface it is: `attach: {veth: NAME}` or `attach: {tap: NAME}`, or which socket: \
                     `attach: {vhostUser: {path: PATH}}`",
                );
                Attachment::Veth(String::new())
            }
        };
        if message.switch.is_empty() {
            self.missing("switch", "name the switch that it is on");
        }
        let mac = if message.mac.is_empty() {
            self.missing("mac", "give its MAC address, as in 02:00:00:00:00:01");
            MacAddr::default()
        } else {
            self.parse("mac", &message.mac).unwrap_or_default()
        };
        Vnic {
            name: message.name.clone(),
            switch: message.switch.clone(),
            attach,
            hook: self.hook(message.hook),
            full_checksums: message.full_checksums,
            mac,
            extra_macs: self.list("extraMacs", &message.extra_macs),
            up: self.is_up("adminState", message.admin_state),
            policy: message.policy.as_ref().map(|policy| self.policy(policy)).unwrap_or_default(),
            sriov: message.sriov.as_ref().map(|sriov| self.sriov(&message.name, sriov)),
        }
    }

    fn vhost_user(&mut self, message: &v1::VhostUserAttachment) -> VhostUser {
        let mode = match v1::vhost_user_attachment::Mode::try_from(message.mode) {
            Ok(v1::vhost_user_attachment::Mode::Server) => VhostMode::Server,
            Ok(v1::vhost_user_attachment::Mode::Client) => VhostMode::Client,
            Err(_) => {
                let text = format!("{} is not a mode; use SERVER or CLIENT", message.mode);
                self.invalid("attach.vhostUser.mode", text);
                VhostMode::Server
            }
        };
        // What is too large for the type is too large for validation as well.
        let queues = message.queues.map_or(VHOST_QUEUES, |queues| u16::try_from(queues).unwrap_or(u16::MAX));
        VhostUser { path: message.path.clone(), mode, queues }
    }

    fn sriov(&mut self, vnic: &str, message: &v1::Sriov) -> Sriov {
        let weight = match message.weight {
            None => WEIGHT,
            Some(weight) => match u8::try_from(weight) {
                Ok(weight @ 0..=100) => weight,
                _ => {
                    let text = format!("{weight} is not a weight; use 0 (never) to 100");
                    self.note("sriov.weight", text, ViolationCode::OutOfRange);
                    0
                }
            },
        };
        let optional = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let or = |text: &str, usual: &str| if text.is_empty() { usual.to_owned() } else { text.to_owned() };
        let attach = match message.attach.as_ref().and_then(|attach| attach.kind.as_ref()) {
            Some(v1::vf_attachment::Kind::Netns(netns)) => {
                if netns.path.is_empty() {
                    self.missing("sriov.attach.netns.path", "give the namespace, as in /run/netns/vm1");
                }
                VfAttachment::Netns {
                    path: netns.path.clone(),
                    netdev: or(&netns.netdev, VF_NETDEV),
                    bond: optional(&netns.bond),
                }
            }
            Some(v1::vf_attachment::Kind::External(external)) => {
                VfAttachment::External { driver: optional(&external.driver) }
            }
            Some(v1::vf_attachment::Kind::Qmp(qmp)) => {
                if qmp.socket.is_empty() {
                    self.missing("sriov.attach.qmp.socket", "give the path of QEMU's monitor socket");
                }
                VfAttachment::Qmp {
                    socket: qmp.socket.clone(),
                    device: or(&qmp.device, &format!("sluice-{vnic}")),
                    bus: optional(&qmp.bus),
                    failover_pair: optional(&qmp.failover_pair),
                }
            }
            None => {
                self.missing(
                    "sriov.attach",
                    "say how the VF reaches the VM: `attach: {netns: {path: …}}`, `{external: {}}` or `{qmp: {socket: …}}`",
                );
                VfAttachment::External { driver: None }
            }
        };
        Sriov { weight, attach }
    }

    fn policy(&mut self, message: &v1::Policy) -> Policy {
        let rate = |rate: Option<&v1::Rate>| {
            rate.map(|rate| Rate { bits_per_second: rate.bps, burst_bytes: rate.burst_bytes })
        };
        let rates = message.rate.as_ref();
        Policy {
            vlan: self.vlan_mode("policy.vlan", message.vlan.as_ref()),
            allow_spoofing: message.allow_spoofing,
            ip_guard: self.addresses("policy.ipGuard", &message.ip_guard),
            dhcp_guard: message.dhcp_guard,
            ra_guard: message.ra_guard,
            unknown_unicast: message.unknown_unicast,
            learn_limit: message.learn_limit,
            acl: message.acl.as_ref().map(|acl| self.acl(acl)).unwrap_or_default(),
            rate_from_vm: rate(rates.and_then(|rates| rates.from_vm.as_ref())),
            rate_to_vm: rate(rates.and_then(|rates| rates.to_vm.as_ref())),
        }
    }

    fn addresses(&mut self, field: &str, texts: &[String]) -> Vec<std::net::IpAddr> {
        let parsed = texts.iter().enumerate().filter_map(|(index, text)| {
            let address = text.trim().parse().map_err(|_| {
                format!("`{text}` is not an IP address; write one address, as in 10.0.0.1 or 2001:db8::1")
            });
            self.get(&format!("{field}[{index}]"), address)
        });
        parsed.collect()
    }

    fn acl(&mut self, message: &v1::Acl) -> Acl {
        let defaults = message.default.unwrap_or_default();
        Acl {
            groups: message.groups.clone(),
            rules: self.rules("policy.acl.rules", &message.rules),
            default_from_vm: self.default_action("policy.acl.default.fromVm", defaults.from_vm),
            default_to_vm: self.default_action("policy.acl.default.toVm", defaults.to_vm),
        }
    }

    fn default_action(&mut self, field: &str, number: i32) -> AclAction {
        match v1::acl_rule::Action::try_from(number) {
            Ok(v1::acl_rule::Action::Unspecified | v1::acl_rule::Action::Allow) => AclAction::Allow,
            Ok(v1::acl_rule::Action::Deny) => AclAction::Deny,
            Err(_) => {
                self.invalid(field, format!("{number} is not an action; use ALLOW or DENY"));
                AclAction::Deny
            }
        }
    }

    fn rules(&mut self, field: &str, messages: &[v1::AclRule]) -> Vec<AclRule> {
        let rules = messages.iter().enumerate();
        rules.map(|(index, rule)| self.rule(&format!("{field}[{index}]"), rule)).collect()
    }

    fn rule(&mut self, field: &str, message: &v1::AclRule) -> AclRule {
        let direction = match v1::acl_rule::Direction::try_from(message.direction) {
            Ok(v1::acl_rule::Direction::FromVm) => Direction::FromVm,
            Ok(v1::acl_rule::Direction::ToVm) => Direction::ToVm,
            Ok(v1::acl_rule::Direction::Unspecified) | Err(_) => {
                self.missing(&format!("{field}.direction"), "say FROM_VM or TO_VM");
                Direction::FromVm
            }
        };
        let action = match v1::acl_rule::Action::try_from(message.action) {
            Ok(v1::acl_rule::Action::Allow) => AclAction::Allow,
            Ok(v1::acl_rule::Action::Deny) => AclAction::Deny,
            Ok(v1::acl_rule::Action::Unspecified) | Err(_) => {
                self.missing(&format!("{field}.action"), "say ALLOW or DENY");
                AclAction::Deny
            }
        };
        let matches =
            message.r#match.as_ref().map(|matches| self.matches(&format!("{field}.match"), matches));
        AclRule { priority: message.priority, direction, matches: matches.unwrap_or_default(), action }
    }

    fn matches(&mut self, field: &str, message: &v1::AclMatch) -> AclMatch {
        let at = |name: &str| format!("{field}.{name}");
        AclMatch {
            src_mac: self.optional(&at("srcMac"), &message.src_mac, parse_masked_mac),
            dst_mac: self.optional(&at("dstMac"), &message.dst_mac, parse_masked_mac),
            ethertype: self.optional(&at("ethertype"), &message.ethertype, parse_ethertype),
            vlan: message.vlan.and_then(|vid| self.vlan(&at("vlan"), vid)),
            src_ip: self.optional(&at("srcIp"), &message.src_ip, str::parse),
            dst_ip: self.optional(&at("dstIp"), &message.dst_ip, str::parse),
            ip_proto: self.optional(&at("ipProto"), &message.ip_proto, parse_protocol),
            src_ports: self.list(&at("srcPorts"), &message.src_ports),
            dst_ports: self.list(&at("dstPorts"), &message.dst_ports),
            tcp_flags: self.optional(&at("tcpFlags"), &message.tcp_flags, parse_tcp_flags),
            icmp_type: self.byte(&at("icmpType"), message.icmp_type),
            icmp_code: self.byte(&at("icmpCode"), message.icmp_code),
        }
    }
}
