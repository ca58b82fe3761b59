//! The only place where the protocol's messages become domain types, and back.
//!
//! Inwards, everything that is wrong is collected, with the path of the field in the JSON mapping, and nothing stops
//! at the first mistake. Outwards, values that equal their default are left out, so that a configuration that was
//! read, applied and read again is the same text.

mod inward;
mod outward;
mod text;

use sluice_policy::config::{AclGroup, Config, Switch, Vnic};
use sluice_policy::validate::{Violation, ViolationCode};
use sluice_proto::v1;

use crate::resource::{Key, Kind};

pub use inward::config;
pub use outward::{hook, resource, rule};
pub use text::{parse_ethertype, parse_number, parse_protocol, parse_tcp_flags};

/// A resource's desired state, as a domain type.
#[derive(Clone, Debug, PartialEq, Eq)]
// Most are vNICs, which are the largest.
#[allow(clippy::large_enum_variant)]
pub enum Spec {
    /// A switch.
    Switch(Switch),
    /// A shared rule set.
    AclGroup(AclGroup),
    /// A VM interface.
    Vnic(Vnic),
}

impl Spec {
    /// The key of the resource.
    pub fn key(&self) -> Key {
        match self {
            Spec::Switch(spec) => Key::new(Kind::Switch, &spec.name),
            Spec::AclGroup(spec) => Key::new(Kind::AclGroup, &spec.name),
            Spec::Vnic(spec) => Key::new(Kind::Vnic, &spec.name),
        }
    }
}

/// A stored resource as a domain type.
///
/// # Errors
/// What is wrong with it.
pub fn spec(resource: &v1::Resource) -> Result<Spec, Vec<Violation>> {
    let mut message = v1::Config::default();
    match resource.spec.clone() {
        Some(v1::resource::Spec::Switch(spec)) => message.switches.push(spec),
        Some(v1::resource::Spec::AclGroup(spec)) => message.acl_groups.push(spec),
        Some(v1::resource::Spec::Vnic(spec)) => message.vnics.push(spec),
        None => {
            return Err(vec![Violation {
                resource: String::new(),
                field: String::new(),
                message: "the resource has no spec".to_owned(),
                code: ViolationCode::Missing,
            }]);
        }
    }
    config(&message).map(|mut specs| specs.remove(0))
}

/// Puts specs together in one configuration, by kind and in the given order.
pub fn collect<'a>(specs: impl IntoIterator<Item = &'a Spec>) -> Config {
    let mut config = Config::default();
    for spec in specs {
        match spec {
            Spec::Switch(spec) => config.switches.push(spec.clone()),
            Spec::AclGroup(spec) => config.acl_groups.push(spec.clone()),
            Spec::Vnic(spec) => config.vnics.push(spec.clone()),
        }
    }
    config
}

#[cfg(test)]
mod tests;
