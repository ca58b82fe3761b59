//! Lowering: from the desired state to what the pipeline's tables should hold.
//!
//! [`ports`] says which interfaces are wanted, [`assign_ids`] gives every name its number, and [`lower`] makes the
//! [`Image`] from the configuration, the numbers, and what the engine found of the interfaces. All three are pure and
//! deterministic: the same input gives the same image, so that an engine can compare images and write differences.
//!
//! The configuration should have passed [`validate`](crate::validate::validate); lowering one that has not returns an
//! error or an image, and never panics.

mod acl;
mod flood;
mod port;
mod split;

use std::collections::BTreeSet;

use sluice_pipeline::tables::{
    MacKey, PORTS_MAX, RULES_MAX, SWITCHES_MAX, SwitchConfig, mac_word, port_flag,
};

use crate::config::{Attachment, Config, Hook, Internal, Switch, Vnic};
use crate::ids::{IdSpace, Ids};
use crate::image::{Backings, Bindings, Image};
use crate::net::MacAddr;

pub use acl::{Expansion, expand, rule_name};
pub use port::{effective_ip_guard, internal_mac, learn_limit, link_local};
pub use split::{Split, split};

/// Why a configuration cannot be lowered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// A name has no number.
    #[error(
        "{kind} `{name}` has no number; assign numbers from the same configuration before lowering it, and validate it first"
    )]
    Unnumbered {
        /// What kind of thing.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// More things than the tables have room for.
    #[error("{wanted} {what} are configured but the tables have room for {limit}; remove some")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there are.
        wanted: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Two masks in a group have the same number.
    #[error(
        "two combinations of matched fields in ACL group `{group}` cannot be told apart by their number; \
         move the rules of priority {first} or {second} into another group"
    )]
    MaskCollision {
        /// Key of the group in [`Ids::groups`].
        group: String,
        /// Priority of a rule with the first mask.
        first: u32,
        /// Priority of a rule with the second.
        second: u32,
    },
}

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSpecKind {
    /// The host's end of a veth pair.
    Veth,
    /// A tap.
    Tap,
    /// A switch's uplink.
    Uplink,
    /// A VF's representor.
    Representor,
    /// The trunk between the kernel engine and the userspace engine, which the latter makes.
    UserTap,
    /// A guest's rings, which the userspace engine serves: no interface.
    VhostUser,
    /// The host's interface on a switch, which the engine makes.
    Internal {
        /// Address of the host's end.
        mac: MacAddr,
    },
}

/// An interface that the configuration wants as a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Name in [`Ids::ports`].
    pub name: String,
    /// The interface. For an internal port, the switch's end (see [`internal_port_netdev`]); empty if it is none.
    pub netdev: String,
    /// What it is.
    pub kind: PortSpecKind,
    /// Wanted hook.
    pub hook: Hook,
    /// The other end is known to send full checksums.
    pub full_checksums: bool,
}

/// Name of a vNIC's port in [`Ids::ports`].
pub fn vnic_port(vnic: &str) -> String {
    format!("vnic/{vnic}")
}

/// Name of the port of a vNIC's VF, in switchdev mode, in [`Ids::ports`].
pub fn vf_port(vnic: &str) -> String {
    format!("vf/{vnic}")
}

/// Name of a switch's uplink in [`Ids::ports`].
pub fn uplink_port(switch: &str) -> String {
    format!("uplink/{switch}")
}

/// Name of a switch's internal port in [`Ids::ports`].
pub fn internal_port(switch: &str) -> String {
    format!("internal/{switch}")
}

/// Name of the port that joins the two engines on a switch, in [`Ids::ports`].
pub fn user_port(switch: &str) -> String {
    format!("user/{switch}")
}

/// The tap that joins the two engines on a switch.
pub fn user_tap_netdev(switch: &str) -> String {
    format!("slu-{:010x}", acl::fnv1a(switch.as_bytes()) & 0xff_ffff_ffff)
}

/// Key of a shared group in [`Ids::groups`].
pub fn shared_group(group: &str) -> String {
    format!("group/{group}")
}

/// Key of the group made of a vNIC's own rules in [`Ids::groups`].
pub fn own_group(vnic: &str) -> String {
    format!("vnic/{vnic}")
}

/// The switch's end of an internal port's veth pair.
pub fn internal_port_netdev(internal: &Internal) -> String {
    format!("{}-sw", internal.netdev)
}

/// Every port that the configuration wants while no vNIC has a VF: see [`ports_with`].
pub fn ports(config: &Config) -> Vec<PortSpec> {
    ports_with(config, &Backings::default())
}

/// Every port that is wanted, in a stable order: switches' first, then vNICs', each followed by its VF's if that has a
/// representor.
pub fn ports_with(config: &Config, backings: &Backings) -> Vec<PortSpec> {
    let mut specs = Vec::with_capacity(config.vnics.len() + config.switches.len() * 2);
    let joined = joined(config);
    for switch in &config.switches {
        if let Some(uplink) = &switch.uplink {
            specs.push(PortSpec {
                name: uplink_port(&switch.name),
                netdev: uplink.netdev.clone(),
                kind: PortSpecKind::Uplink,
                hook: uplink.hook,
                full_checksums: uplink.full_checksums,
            });
        }
        if let Some(internal) = &switch.internal {
            specs.push(PortSpec {
                name: internal_port(&switch.name),
                netdev: internal_port_netdev(internal),
                kind: PortSpecKind::Internal { mac: internal_mac(switch, internal) },
                hook: Hook::Tcx,
                full_checksums: false,
            });
        }
        if joined.contains(switch.name.as_str()) {
            specs.push(PortSpec {
                name: user_port(&switch.name),
                netdev: user_tap_netdev(&switch.name),
                kind: PortSpecKind::UserTap,
                hook: Hook::Tcx,
                full_checksums: false,
            });
        }
    }
    for vnic in &config.vnics {
        specs.push(vnic_spec(vnic));
        specs.extend(representor(vnic, backings).map(|netdev| PortSpec {
            name: vf_port(&vnic.name),
            netdev: netdev.to_owned(),
            kind: PortSpecKind::Representor,
            hook: Hook::Tcx,
            full_checksums: false,
        }));
    }
    specs
}

/// Switches that both engines serve.
fn joined(config: &Config) -> BTreeSet<&str> {
    let served = config.vnics.iter().filter(|vnic| matches!(vnic.attach, Attachment::VhostUser(_)));
    served.map(|vnic| vnic.switch.as_str()).collect()
}

/// The representor of the VF that a vNIC has, in switchdev mode.
fn representor<'a>(vnic: &Vnic, backings: &'a Backings) -> Option<&'a str> {
    backings.vnics.get(&vnic.name)?.representor.as_deref()
}

fn vnic_spec(vnic: &Vnic) -> PortSpec {
    PortSpec {
        name: vnic_port(&vnic.name),
        netdev: vnic.attach.netdev().unwrap_or_default().to_owned(),
        kind: match vnic.attach {
            Attachment::Veth(_) => PortSpecKind::Veth,
            Attachment::Tap(_) => PortSpecKind::Tap,
            Attachment::VhostUser(_) => PortSpecKind::VhostUser,
        },
        hook: vnic.hook,
        full_checksums: vnic.full_checksums,
    }
}

/// Numbers every name of the configuration: names that had a number keep it, names that are gone lose it.
///
/// A number that is freed rests until the next call, as long as there are others. Whoever keeps state by number
/// (counters, learnt addresses, buckets) clears it when a number appears that was not there before.
///
/// # Errors
/// [`LowerError::TooMany`] if there are more names than numbers; `ids` is then unchanged.
pub fn assign_ids(config: &Config, ids: &mut Ids) -> Result<(), LowerError> {
    // A VF comes and goes without a change of the configuration: its port has a number all the while.
    let of_vfs = config.vnics.iter().filter(|vnic| vnic.wants_vf()).map(|vnic| vf_port(&vnic.name));
    let ports: Vec<String> = ports(config).into_iter().map(|spec| spec.name).chain(of_vfs).collect();
    let switches: Vec<&str> = config.switches.iter().map(|switch| switch.name.as_str()).collect();
    let (mut groups, mut rules) = (Vec::new(), Vec::new());
    for (key, list) in acl::groups(config) {
        rules.extend(list.iter().map(|rule| rule_name(&key, rule)));
        groups.push(key);
    }
    // Number 0 is never given out, and numbers index arrays.
    let limit = |what, wanted: usize, room: u32| {
        let limit = room as usize - 1;
        if wanted > limit { Err(LowerError::TooMany { what, wanted, limit }) } else { Ok(()) }
    };
    limit("ports", ports.len(), PORTS_MAX)?;
    limit("switches", switches.len(), SWITCHES_MAX)?;
    limit("ACL rules", rules.len(), RULES_MAX)?;
    ids.ports.assign(ports.iter().map(String::as_str), PORTS_MAX);
    ids.switches.assign(switches, SWITCHES_MAX);
    ids.groups.assign(groups.iter().map(String::as_str), GROUP_NUMBERS);
    ids.rules.assign(rules.iter().map(String::as_str), RULES_MAX);
    Ok(())
}

/// Group numbers are keys of hash entries and need only leave room for the direction in
/// [`RuleKey::group_direction`](sluice_pipeline::tables::RuleKey::group_direction).
const GROUP_NUMBERS: u32 = 1 << 31;

fn number(space: &IdSpace, kind: &'static str, name: &str) -> Result<u32, LowerError> {
    space.get(name).ok_or_else(|| LowerError::Unnumbered { kind, name: name.to_owned() })
}

/// Makes the tables of a host on which no vNIC has a VF: see [`lower_with`].
///
/// # Errors
/// As [`lower_with`].
pub fn lower(config: &Config, ids: &Ids, bindings: &Bindings) -> Result<Image, LowerError> {
    lower_with(config, ids, bindings, &Backings::default())
}

/// Makes the tables of a host, as if one engine served every port; [`split`] makes each engine's of them.
///
/// Ports without a binding are pending: their configuration and static addresses are there, so that frames to them
/// are dropped as `DestinationDown` and not flooded, but nothing is sent to them.
///
/// # Errors
/// [`LowerError`]; what is wrong with the configuration is better said by [`validate`](crate::validate::validate).
pub fn lower_with(
    config: &Config,
    ids: &Ids,
    bindings: &Bindings,
    backings: &Backings,
) -> Result<Image, LowerError> {
    let mut image = Image { groups: acl::lower_groups(config, ids)?, ..Image::default() };
    let joined = joined(config);
    for switch in &config.switches {
        lower_switch(switch, ids, bindings, backings, &mut image)?;
        if joined.contains(switch.name.as_str()) {
            let id = number(&ids.ports, "port", &user_port(&switch.name))?;
            let mut port = port::user_tap(&switch.name, number(&ids.switches, "switch", &switch.name)?);
            port::bind(&mut port, id, bindings, &mut image);
            image.ports.insert(id, port);
        }
    }
    for vnic in &config.vnics {
        let switch = number(&ids.switches, "switch", &vnic.switch)?;
        let id = number(&ids.ports, "port", &vnic_port(&vnic.name))?;
        let acl = acl::port_acl(&vnic.name, &vnic.policy.acl, ids, &image.groups)?;
        let mut software = port::vnic(vnic, switch, acl);
        port::bind(&mut software, id, bindings, &mut image);
        image.ip_guard.extend(port::ip_guard_keys(vnic, id));
        if let Some(backing) = backings.vnics.get(&vnic.name) {
            software.config.flags |= port_flag::HAS_VF;
            let vf = match &backing.representor {
                Some(netdev) => {
                    let vf = number(&ids.ports, "port", &vf_port(&vnic.name))?;
                    let mut port = port::representor(&software, vf_port(&vnic.name), netdev);
                    port.is_standby = !backing.in_use;
                    port::bind(&mut port, vf, bindings, &mut image);
                    image.ip_guard.extend(port::ip_guard_keys(vnic, vf));
                    image.ports.insert(vf, port);
                    Some(vf)
                }
                None => {
                    let uplink = image.switches.get(&switch).map_or(0, |switch| switch.uplink);
                    (uplink != 0).then_some(uplink)
                }
            };
            software.is_standby = backing.in_use;
            // Entered last, it decides where the addresses are.
            let owner = vf.filter(|_| backing.in_use).unwrap_or(id);
            image.macs.extend(vnic.macs().map(|mac| (MacKey::from_word(switch, mac_word(mac.0)), owner)));
        }
        image.ports.insert(id, software);
    }
    flood::lower_lists(&mut image);
    Ok(image)
}

fn lower_switch(
    switch: &Switch,
    ids: &Ids,
    bindings: &Bindings,
    backings: &Backings,
    image: &mut Image,
) -> Result<(), LowerError> {
    let id = number(&ids.switches, "switch", &switch.name)?;
    let mut uplink_id = 0;
    if let Some(uplink) = &switch.uplink {
        uplink_id = number(&ids.ports, "port", &uplink_port(&switch.name))?;
        let mut port = port::uplink(&switch.name, uplink, id);
        port.is_filtered = backings.filtered_uplinks.contains(&switch.name);
        if port.is_filtered {
            port.config.flags |= port_flag::LOOPS;
        }
        port::bind(&mut port, uplink_id, bindings, image);
        image.ports.insert(uplink_id, port);
    }
    if let Some(internal) = &switch.internal {
        let port_id = number(&ids.ports, "port", &internal_port(&switch.name))?;
        let mut port = port::internal(switch, internal, id);
        port::bind(&mut port, port_id, bindings, image);
        image.ports.insert(port_id, port);
    }
    image.switches.insert(id, SwitchConfig { uplink: uplink_id, ageing_seconds: switch.ageing_seconds });
    Ok(())
}

#[cfg(test)]
mod tests;
