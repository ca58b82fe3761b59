//! Validation of a whole configuration: everything that is wrong with it, at once, each with its place and remedy.
//!
//! What a type of [`net`](crate::net) or [`config`](crate::config) makes impossible is not looked for here. A
//! configuration that passes can be lowered; an interface that does not exist is no violation but a pending port.

mod acl;
mod port;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use sluice_pipeline::tables::{
    IP_GUARD_MAX, PORTS_MAX, RULE_ENTRIES_MAX, RULES_MAX, SWITCHES_MAX, VNIC_MACS_MAX,
};

use crate::config::{Attachment, Config, Vnic};
use crate::lower;
use crate::net::MacAddr;

/// Longest name of a resource, in bytes.
pub const NAME_MAX: usize = 63;
/// Longest name of a network interface, in bytes (the kernel's `IFNAMSIZ` less the final zero).
pub const NETDEV_MAX: usize = 15;
/// Longest path of a unix socket, in bytes (the kernel's `sun_path` less the final zero).
pub const SOCKET_PATH_MAX: usize = 107;
/// Fewest and most queue pairs of a vhost-user vNIC.
pub const VHOST_QUEUES: std::ops::RangeInclusive<u16> = 1..=16;
/// Most IP guard addresses of one vNIC.
pub const IP_GUARDS_PER_VNIC: usize = 64;
/// Highest priority of an ACL rule.
pub const PRIORITY_MAX: u32 = 65_535;
/// Most table entries that one rule may become.
pub const RULE_EXPANSION_MAX: usize = 1024;
/// Lowest and highest rate in bits per second.
pub const RATE_BPS: std::ops::RangeInclusive<u64> = 8_000..=10_000_000_000_000;
/// Smallest and largest bucket in bytes: one full Ethernet frame with tags, and 4 GiB.
pub const RATE_BURST_BYTES: std::ops::RangeInclusive<u64> = 1_540..=4_294_967_295;
/// Shortest and longest ageing time in seconds (IEEE 802.1Q table 8-6 has 10 to 1 000 000).
pub const AGEING_SECONDS: std::ops::RangeInclusive<u32> = 1..=1_000_000;

/// What kind of mistake it is; decides the status code of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ViolationCode {
    /// A value that cannot be right by itself.
    Invalid,
    /// A value outside its bounds.
    OutOfRange,
    /// Something that must be there is not.
    Missing,
    /// A name, address, interface or rule that is there twice.
    Duplicate,
    /// A reference to something that is not in the configuration.
    NotFound,
    /// Values that exclude each other.
    Conflict,
    /// More than the tables have room for.
    Limit,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The resource, as `vnics/NAME`, `switches/NAME` or `aclGroups/NAME`; or the list, where no item is to blame.
    pub resource: String,
    /// The field inside the resource, as in the API's JSON: `policy.acl.rules[3].match.dstPorts`.
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
    /// What kind of mistake it is.
    pub code: ViolationCode,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.resource)?;
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Checks everything.
///
/// # Errors
/// All violations, in the order of the configuration.
pub fn validate(config: &Config) -> Result<(), Vec<Violation>> {
    let mut check = Check { config, violations: Vec::new() };
    check.switches();
    check.acl_groups();
    check.vnics();
    check.addresses();
    check.netdevs();
    check.sockets();
    check.limits();
    if check.violations.is_empty() { Ok(()) } else { Err(check.violations) }
}

/// Collects violations.
struct Check<'a> {
    config: &'a Config,
    violations: Vec<Violation>,
}

impl Check<'_> {
    fn report(
        &mut self,
        code: ViolationCode,
        resource: &str,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        let (resource, field, message) = (resource.to_owned(), field.into(), message.into());
        self.violations.push(Violation { resource, field, message, code });
    }

    fn switches(&mut self) {
        let config = self.config;
        self.names("switches", config.switches.iter().map(|switch| switch.name.as_str()));
        for switch in &config.switches {
            self.switch(switch);
        }
    }

    fn acl_groups(&mut self) {
        let config = self.config;
        self.names("aclGroups", config.acl_groups.iter().map(|group| group.name.as_str()));
        for group in &config.acl_groups {
            self.rules(&format!("aclGroups/{}", group.name), "rules", &group.rules);
        }
    }

    fn vnics(&mut self) {
        let config = self.config;
        self.names("vnics", config.vnics.iter().map(|vnic| vnic.name.as_str()));
        let switches: BTreeSet<&str> = config.switches.iter().map(|switch| switch.name.as_str()).collect();
        let groups: BTreeSet<&str> = config.acl_groups.iter().map(|group| group.name.as_str()).collect();
        for vnic in &config.vnics {
            self.vnic(vnic, &switches, &groups);
        }
    }

    fn names<'n>(&mut self, list: &str, names: impl Iterator<Item = &'n str>) {
        let mut seen = BTreeSet::new();
        for (index, name) in names.enumerate() {
            let resource = format!("{list}/{name}");
            let starts_well = name.starts_with(|first: char| first.is_ascii_alphanumeric());
            let spelt_well = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
            if name.is_empty() {
                let message = "a name is needed; names tell the items of a list apart";
                self.report(ViolationCode::Missing, &format!("{list}[{index}]"), "name", message);
            } else if name.len() > NAME_MAX {
                let message = format!("`{name}` has {} bytes; use at most {NAME_MAX}", name.len());
                self.report(ViolationCode::OutOfRange, &resource, "name", message);
            } else if !starts_well || !spelt_well {
                let message = format!(
                    "`{name}` is not a name; use letters, digits, `.`, `_` and `-`, and begin with a letter or digit"
                );
                self.report(ViolationCode::Invalid, &resource, "name", message);
            }
            if !seen.insert(name) {
                let message =
                    format!("`{name}` is the name of an earlier item; rename or remove one of them");
                self.report(ViolationCode::Duplicate, &resource, "name", message);
            }
        }
    }

    /// Addresses are unique on a switch, for they decide where a frame goes.
    fn addresses(&mut self) {
        let config = self.config;
        let mut owners: BTreeMap<(&str, MacAddr), String> = BTreeMap::new();
        let mut claims = Vec::new();
        for switch in &config.switches {
            if let Some(internal) = &switch.internal {
                let mac = lower::internal_mac(switch, internal);
                claims.push((
                    switch.name.as_str(),
                    mac,
                    format!("switches/{}", switch.name),
                    "internal.mac".to_owned(),
                ));
            }
        }
        for vnic in &config.vnics {
            let resource = format!("vnics/{}", vnic.name);
            claims.push((&vnic.switch, vnic.mac, resource.clone(), "mac".to_owned()));
            for (index, mac) in vnic.extra_macs.iter().enumerate() {
                claims.push((&vnic.switch, *mac, resource.clone(), format!("extraMacs[{index}]")));
            }
        }
        for (switch, mac, resource, field) in claims {
            if mac.is_zero() || mac.is_group() {
                continue; // reported where the field is checked
            }
            if let Some(owner) = owners.get(&(switch, mac)) {
                let message = format!(
                    "{mac} is already the address of {owner} on switch `{switch}`; give each port its own address"
                );
                self.report(ViolationCode::Duplicate, &resource, field, message);
            } else {
                owners.insert((switch, mac), resource);
            }
        }
    }

    /// An interface is one port.
    fn netdevs(&mut self) {
        let mut claims = Vec::new();
        for switch in &self.config.switches {
            let resource = format!("switches/{}", switch.name);
            if let Some(uplink) = &switch.uplink {
                claims.push((uplink.netdev.clone(), resource.clone(), "uplink.netdev"));
            }
            if let Some(internal) = &switch.internal {
                claims.push((internal.netdev.clone(), resource.clone(), "internal.netdev"));
                claims.push((lower::internal_port_netdev(internal), resource, "internal.netdev"));
            }
        }
        let mut joined = BTreeSet::new();
        for vnic in &self.config.vnics {
            let resource = format!("vnics/{}", vnic.name);
            let field = port::attach_field(&vnic.attach);
            match &vnic.attach {
                Attachment::Veth(netdev) | Attachment::Tap(netdev) => {
                    claims.push((netdev.clone(), resource, field));
                }
                Attachment::VhostUser(_) if joined.insert(vnic.switch.as_str()) => {
                    claims.push((lower::user_tap_netdev(&vnic.switch), resource, field));
                }
                Attachment::VhostUser(_) => {}
            }
        }
        let mut owners: BTreeMap<String, String> = BTreeMap::new();
        for (netdev, resource, field) in claims {
            if netdev.is_empty() {
                continue; // reported where the field is checked
            }
            if let Some(owner) = owners.get(&netdev) {
                let message =
                    format!("interface `{netdev}` is already used by {owner}; an interface is one port only");
                self.report(ViolationCode::Duplicate, &resource, field, message);
            } else {
                owners.insert(netdev, resource);
            }
        }
    }

    /// A socket is one port.
    fn sockets(&mut self) {
        let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
        for vnic in &self.config.vnics {
            let Attachment::VhostUser(rings) = &vnic.attach else { continue };
            if rings.path.is_empty() {
                continue; // reported where the field is checked
            }
            let Some(owner) = owners.get(rings.path.as_str()) else {
                owners.insert(&rings.path, &vnic.name);
                continue;
            };
            let message =
                format!("socket {} is already used by vnics/{owner}; give each vNIC its own", rings.path);
            let resource = format!("vnics/{}", vnic.name);
            self.report(ViolationCode::Duplicate, &resource, "attach.vhostUser.path", message);
        }
    }

    /// What the tables have room for, over the whole host.
    fn limits(&mut self) {
        let config = self.config;
        let own_rules = || config.vnics.iter().map(|vnic| &vnic.policy.acl.rules);
        let rule_lists = || config.acl_groups.iter().map(|group| &group.rules).chain(own_rules());
        let rules: usize = rule_lists().map(Vec::len).sum();
        let entries: usize = rule_lists().flatten().map(|rule| lower::expand(&rule.matches).count()).sum();
        let macs: usize = config.vnics.iter().map(|vnic| 1 + vnic.extra_macs.len()).sum::<usize>()
            + config.switches.iter().filter(|switch| switch.internal.is_some()).count();
        // A VF has a port of its own, with the vNIC's policy.
        let guards_of =
            |vnic: &Vnic| lower::effective_ip_guard(vnic).len() * (1 + usize::from(vnic.wants_vf()));
        let guards: usize = config.vnics.iter().map(guards_of).sum();
        let vfs = config.vnics.iter().filter(|vnic| vnic.wants_vf()).count();
        let counts = [
            // Number 0 is never given out.
            ("switches", "switches", config.switches.len(), SWITCHES_MAX as usize - 1),
            (
                "vnics",
                "ports (vNICs, uplinks, internal ports, and one more for each vNIC that may have a VF)",
                lower::ports(config).len() + vfs,
                PORTS_MAX as usize - 1,
            ),
            ("aclGroups", "ACL rules", rules, RULES_MAX as usize - 1),
            ("aclGroups", "table entries that ACL rules expand to", entries, RULE_ENTRIES_MAX as usize),
            ("vnics", "vNIC addresses", macs, VNIC_MACS_MAX as usize),
            ("vnics", "IP guard addresses", guards, IP_GUARD_MAX as usize),
        ];
        for (list, what, count, limit) in counts {
            if count > limit {
                let message =
                    format!("there are {count} {what}, but a host has room for {limit}; remove some");
                self.report(ViolationCode::Limit, list, "", message);
            }
        }
    }
}

#[cfg(test)]
mod tests;
