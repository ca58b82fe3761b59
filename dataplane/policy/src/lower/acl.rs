//! ACL rules to tuples and rule keys: see the tables' [`AclKey`] for the shape and `docs/classifier.md` for the why.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use sluice_pipeline::mask_id;
use sluice_pipeline::tables::{
    AclConfig, AclKey, PORT_GROUPS_MAX, RULE_ENTRIES_MAX, RuleKey, TUPLES_MAX, Tuple, Vlan, acl_action, fact,
};

use crate::config::{Acl, AclAction, AclMatch, AclRule, Config};
use crate::ids::Ids;
use crate::image::{GroupImage, RuleImage};
use crate::lower::{LowerError, number, own_group, shared_group};
use crate::net::{IpPrefix, PortRange};

/// Every set of rules with its key in [`Ids::groups`]: shared groups, then vNICs' own where there are any.
pub(super) fn groups(config: &Config) -> impl Iterator<Item = (String, &[AclRule])> {
    let shared = config.acl_groups.iter().map(|group| (shared_group(&group.name), group.rules.as_slice()));
    let own = config
        .vnics
        .iter()
        .filter(|vnic| !vnic.policy.acl.rules.is_empty())
        .map(|vnic| (own_group(&vnic.name), vnic.policy.acl.rules.as_slice()));
    shared.chain(own)
}

/// Lowers every group that has rules and that some vNIC refers to.
pub(super) fn lower_groups(config: &Config, ids: &Ids) -> Result<BTreeMap<u32, GroupImage>, LowerError> {
    let used: BTreeSet<&str> =
        config.vnics.iter().flat_map(|vnic| vnic.policy.acl.groups.iter().map(String::as_str)).collect();
    let unused: BTreeSet<String> = config
        .acl_groups
        .iter()
        .filter(|group| !used.contains(group.name.as_str()))
        .map(|group| shared_group(&group.name))
        .collect();
    let mut images = BTreeMap::new();
    let mut entries = 0;
    for (key, rules) in groups(config) {
        if rules.is_empty() || unused.contains(&key) {
            continue;
        }
        let id = number(&ids.groups, "ACL group", &key)?;
        let image = lower_group(&key, id, rules, ids)?;
        entries += image.rules.len();
        images.insert(id, image);
    }
    let limit = RULE_ENTRIES_MAX as usize;
    if entries > limit {
        return Err(LowerError::TooMany { what: "ACL rule entries", wanted: entries, limit });
    }
    Ok(images)
}

/// A mask on its way to becoming a tuple.
struct Draft {
    mask: AclKey,
    max_rank: u32,
    /// Of the rule that brought it, for messages.
    priority: u32,
}

fn lower_group(key: &str, id: u32, rules: &[AclRule], ids: &Ids) -> Result<GroupImage, LowerError> {
    let mut drafts: [HashMap<u32, Draft>; 2] = Default::default();
    let mut entries: HashMap<RuleKey, RuleImage> = HashMap::with_capacity(rules.len());
    for rule in rules {
        let image = RuleImage {
            rank: rank(rule),
            counter: number(&ids.rules, "ACL rule", &rule_name(key, rule))?,
            action: lower_action(rule.action),
        };
        let direction = rule.direction as usize;
        for (value, mask) in expand(&rule.matches).entries() {
            let tuple = mask_id(&mask);
            let draft = drafts[direction].entry(tuple).or_insert(Draft {
                mask,
                max_rank: image.rank,
                priority: rule.priority,
            });
            if draft.mask != mask {
                let (first, second) = (draft.priority, rule.priority);
                return Err(LowerError::MaskCollision { group: key.to_owned(), first, second });
            }
            draft.max_rank = draft.max_rank.max(image.rank);
            let rule_key = RuleKey { key: value, group_direction: id * 2 + direction as u32, tuple };
            // The better rank wins; among equals, which do the same, the one that was written first.
            let entry = entries.entry(rule_key).or_insert(image);
            if image.rank > entry.rank {
                *entry = image;
            }
        }
    }
    let mut tuples = [Vec::new(), Vec::new()];
    for (list, drafts) in tuples.iter_mut().zip(drafts) {
        if drafts.len() > TUPLES_MAX as usize {
            return Err(LowerError::TooMany {
                what: "distinct combinations of matched bits in one ACL group",
                wanted: drafts.len(),
                limit: TUPLES_MAX as usize,
            });
        }
        list.extend(drafts.into_iter().map(|(id, draft)| Tuple {
            mask: draft.mask,
            id,
            max_rank: draft.max_rank,
        }));
        list.sort_unstable_by_key(|tuple| (std::cmp::Reverse(tuple.max_rank), tuple.id));
    }
    Ok(GroupImage { tuples, rules: entries.into_iter().collect() })
}

/// The two directions of a port's ACL: those groups that have rules in the direction, and the default.
pub(super) fn port_acl(
    vnic: &str,
    acl: &Acl,
    ids: &Ids,
    images: &BTreeMap<u32, GroupImage>,
) -> Result<[AclConfig; 2], LowerError> {
    let own = (!acl.rules.is_empty()).then(|| own_group(vnic));
    let keys: Vec<String> = acl.groups.iter().map(|group| shared_group(group)).chain(own).collect();
    let mut configs = [acl.default_from_vm, acl.default_to_vm].map(|action| AclConfig {
        groups: [0; PORT_GROUPS_MAX],
        group_count: 0,
        default_action: lower_action(action),
    });
    for key in &keys {
        let id = number(&ids.groups, "ACL group", key)?;
        let Some(image) = images.get(&id) else {
            continue; // it has no rules
        };
        for (config, tuples) in configs.iter_mut().zip(&image.tuples) {
            if tuples.is_empty() {
                continue;
            }
            let Some(slot) = config.groups.get_mut(config.group_count as usize) else {
                return Err(LowerError::TooMany {
                    what: "ACL groups of one vNIC",
                    wanted: keys.len(),
                    limit: PORT_GROUPS_MAX,
                });
            };
            *slot = id;
            config.group_count += 1;
        }
    }
    Ok(configs)
}

const fn lower_action(action: AclAction) -> u32 {
    match action {
        AclAction::Allow => acl_action::ALLOW,
        AclAction::Deny => acl_action::DENY,
    }
}

fn rank(rule: &AclRule) -> u32 {
    (rule.priority.min(u32::MAX / 2 - 2) + 1) * 2 + u32::from(rule.action == AclAction::Deny)
}

/// What a match becomes: one value and mask, for every pair of a source and a destination port prefix.
#[derive(Clone, Debug)]
pub struct Expansion {
    value: AclKey,
    mask: AclKey,
    src_ports: Vec<(u16, u16)>,
    dst_ports: Vec<(u16, u16)>,
}

impl Expansion {
    /// How many entries it has.
    pub fn count(&self) -> usize {
        self.src_ports.len() * self.dst_ports.len()
    }

    /// The entries: value (zero where the mask is) and mask.
    pub fn entries(&self) -> impl Iterator<Item = (AclKey, AclKey)> + '_ {
        self.src_ports.iter().flat_map(move |&(src_value, src_mask)| {
            self.dst_ports.iter().map(move |&(dst_value, dst_mask)| {
                let (mut value, mut mask) = (self.value, self.mask);
                (value.src_port, mask.src_port) = (src_value, src_mask);
                (value.dst_port, mask.dst_port) = (dst_value, dst_mask);
                (value, mask)
            })
        })
    }
}

/// Expands a match into entries of the rule table.
pub fn expand(matches: &AclMatch) -> Expansion {
    let (mut value, mut mask) = (AclKey::default(), AclKey::default());
    if let Some(mac) = matches.src_mac {
        (value.src_mac, mask.src_mac) = (mac.value.0, mac.mask.0);
    }
    if let Some(mac) = matches.dst_mac {
        (value.dst_mac, mask.dst_mac) = (mac.value.0, mac.mask.0);
    }
    if let Some(ethertype) = matches.ethertype {
        (value.ethertype, mask.ethertype) = (ethertype, 0xffff);
    }
    if let Some(vlan) = matches.vlan {
        (value.vlan, mask.vlan) = (Vlan(vlan.get()), Vlan(0xffff));
    }
    if let Some(prefix) = matches.src_ip {
        (value.src_ip, mask.src_ip) = lower_prefix(prefix, &mut value.facts, &mut mask.facts);
    }
    if let Some(prefix) = matches.dst_ip {
        (value.dst_ip, mask.dst_ip) = lower_prefix(prefix, &mut value.facts, &mut mask.facts);
    }
    if let Some(proto) = matches.ip_proto {
        (value.proto, mask.proto) = (proto, 0xff);
        require(fact::IP, &mut value, &mut mask);
    }
    if let Some(flags) = matches.tcp_flags {
        (value.tcp_flags, mask.tcp_flags) = (flags.value, flags.mask);
    }
    if let Some(icmp_type) = matches.icmp_type {
        (value.icmp_type, mask.icmp_type) = (icmp_type, 0xff);
    }
    if let Some(icmp_code) = matches.icmp_code {
        (value.icmp_code, mask.icmp_code) = (icmp_code, 0xff);
    }
    let has_transport = !matches.src_ports.is_empty()
        || !matches.dst_ports.is_empty()
        || matches.tcp_flags.is_some()
        || matches.icmp_type.is_some()
        || matches.icmp_code.is_some();
    if has_transport {
        require(fact::IP | fact::L4, &mut value, &mut mask);
    }
    let value = value.masked(&mask);
    Expansion {
        value,
        mask,
        src_ports: port_prefixes(&matches.src_ports),
        dst_ports: port_prefixes(&matches.dst_ports),
    }
}

fn require(facts: u8, value: &mut AclKey, mask: &mut AclKey) {
    value.facts |= facts;
    mask.facts |= facts;
}

/// An address as the tables hold it.
pub(super) fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// Value and mask of a prefix; the packet must be of its family.
fn lower_prefix(prefix: IpPrefix, facts: &mut u8, facts_mask: &mut u8) -> ([u8; 16], [u8; 16]) {
    let bits = match prefix.address() {
        // The family bit tells it from an IPv6 packet with an address in ::ffff:0:0/96.
        IpAddr::V4(_) => 96 + u32::from(prefix.length()),
        IpAddr::V6(_) => {
            *facts |= fact::IPV6;
            u32::from(prefix.length())
        }
    };
    *facts |= fact::IP;
    *facts_mask |= fact::IP | fact::IPV6;
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    (octets(prefix.address()), mask.to_be_bytes())
}

/// The fewest prefixes, as value and mask, that cover the union of the ranges exactly; one that matches all if there
/// is no range.
fn port_prefixes(ranges: &[PortRange]) -> Vec<(u16, u16)> {
    if ranges.is_empty() {
        return vec![(0, 0)];
    }
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(sorted.len());
    for range in sorted {
        let (first, last) = (u32::from(range.first()), u32::from(range.last()));
        match merged.last_mut() {
            Some((_, end)) if first <= *end + 1 => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    let mut prefixes = Vec::new();
    for (mut first, last) in merged {
        while first <= last {
            // The largest block that starts here, is aligned and does not reach past the end.
            let aligned = if first == 0 { 1 << 16 } else { 1 << first.trailing_zeros() };
            let fitting = 1u32 << (last - first + 1).ilog2();
            let size = aligned.min(fitting);
            prefixes.push((first as u16, !(size - 1) as u16));
            first += size;
        }
    }
    prefixes
}

/// The name of a rule's counter in [`Ids::rules`]: the group's key and a hash of what the rule says.
///
/// The same rule keeps its counter wherever it stands in its group; a rule that is edited is another rule.
pub fn rule_name(group_key: &str, rule: &AclRule) -> String {
    format!("{group_key}#{:016x}", fnv1a(&canonical(rule)))
}

/// The rule as bytes: each field as a length and its bytes, so that no two rules have the same.
fn canonical(rule: &AclRule) -> Vec<u8> {
    let AclMatch {
        src_mac,
        dst_mac,
        ethertype,
        vlan,
        src_ip,
        dst_ip,
        ip_proto,
        src_ports,
        dst_ports,
        tcp_flags,
        icmp_type,
        icmp_code,
    } = &rule.matches;
    let mut out = Vec::with_capacity(96);
    let mut field = |bytes: Option<&[u8]>| match bytes {
        Some(bytes) => {
            out.extend((bytes.len() as u32 + 1).to_be_bytes());
            out.extend(bytes);
        }
        None => out.extend(0u32.to_be_bytes()),
    };
    field(Some(&rule.priority.to_be_bytes()));
    field(Some(&[rule.direction as u8, u8::from(rule.action == AclAction::Deny)]));
    for mac in [src_mac, dst_mac] {
        field(mac.map(|mac| [mac.value.0, mac.mask.0].concat()).as_deref());
    }
    field(ethertype.map(u16::to_be_bytes).as_ref().map(|bytes| bytes.as_slice()));
    field(vlan.map(|vlan| vlan.get().to_be_bytes()).as_ref().map(|bytes| bytes.as_slice()));
    for prefix in [src_ip, dst_ip] {
        let text = prefix.map(|prefix| prefix.to_string());
        field(text.as_ref().map(|text| text.as_bytes()));
    }
    field(ip_proto.as_ref().map(std::slice::from_ref));
    for ranges in [src_ports, dst_ports] {
        let mut sorted = ranges.clone();
        sorted.sort_unstable();
        let bytes: Vec<u8> = sorted
            .iter()
            .flat_map(|range| [range.first().to_be_bytes(), range.last().to_be_bytes()].concat())
            .collect();
        field(Some(&bytes));
    }
    field(tcp_flags.map(|flags| [flags.value, flags.mask]).as_ref().map(|bytes| bytes.as_slice()));
    field(icmp_type.as_ref().map(std::slice::from_ref));
    field(icmp_code.as_ref().map(std::slice::from_ref));
    out
}

/// FNV-1a, 64 bits: the same on every machine and in every version, which the standard library's hasher is not.
pub(super) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Direction;

    fn ranges(texts: &[&str]) -> Vec<PortRange> {
        texts.iter().map(|text| text.parse().expect("a range")).collect()
    }

    #[test]
    fn port_prefixes_cover_the_union_exactly() {
        for texts in [
            &["80"][..],
            &["0-65535"],
            &["1-65534"],
            &["8000-8080", "80"],
            &["1-10", "5-20", "21-22"],
            &["65535"],
            &["0"],
            &["1023-1025", "32767-32768"],
        ] {
            let ranges = ranges(texts);
            let prefixes = port_prefixes(&ranges);
            for port in 0..=u16::MAX {
                let hits = prefixes.iter().filter(|(value, mask)| port & mask == *value).count();
                let wanted = ranges.iter().any(|range| range.contains(port));
                assert_eq!(hits, usize::from(wanted), "{texts:?} {port}");
            }
        }
        assert_eq!(port_prefixes(&ranges(&["0-65535"])), [(0, 0)]);
        assert_eq!(port_prefixes(&ranges(&["1-65534"])).len(), 30);
        assert_eq!(port_prefixes(&ranges(&["0-32767", "32768-65535"])), [(0, 0)]);
    }

    #[test]
    fn rule_names_are_stable_and_tell_rules_apart() {
        let rule = |priority, ports: &[&str]| AclRule {
            priority,
            direction: Direction::ToVm,
            matches: AclMatch { ip_proto: Some(6), dst_ports: ranges(ports), ..AclMatch::default() },
            action: AclAction::Allow,
        };
        // Written down: the name is stored and must be the same in every later version.
        assert_eq!(rule_name("group/web", &rule(100, &["80"])), "group/web#db247d737dee543e");
        assert_eq!(rule_name("g", &rule(1, &["80", "90"])), rule_name("g", &rule(1, &["90", "80"])));
        assert_ne!(rule_name("g", &rule(1, &["80"])), rule_name("g", &rule(2, &["80"])));
        assert_ne!(rule_name("g", &rule(1, &["80"])), rule_name("h", &rule(1, &["80"])));
        let mut swapped = rule(1, &["80"]);
        swapped.matches.src_ports = std::mem::take(&mut swapped.matches.dst_ports);
        assert_ne!(rule_name("g", &swapped), rule_name("g", &rule(1, &["80"])));
    }
}
