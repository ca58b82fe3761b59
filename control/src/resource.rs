//! How resources are named: the kinds, and `vnics/vm1`-like keys.
//!
//! Used by everything in this crate; knows nothing of specs.

use std::fmt;
use std::str::FromStr;

/// Kinds of resources. The order is that of listings, and what is referred to comes before what refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A switch.
    Switch,
    /// A shared rule set.
    AclGroup,
    /// A VM interface.
    Vnic,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 3] = [Kind::Switch, Kind::AclGroup, Kind::Vnic];

    /// The list that holds resources of this kind in a configuration.
    pub const fn collection(self) -> &'static str {
        match self {
            Kind::Switch => "switches",
            Kind::AclGroup => "aclGroups",
            Kind::Vnic => "vnics",
        }
    }

    /// Name of one such resource.
    pub const fn singular(self) -> &'static str {
        match self {
            Kind::Switch => "switch",
            Kind::AclGroup => "aclGroup",
            Kind::Vnic => "vnic",
        }
    }
}

/// A word that is not a kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a kind of resource; use switch, aclGroup or vnic")]
pub struct UnknownKind(pub String);

impl FromStr for Kind {
    type Err = UnknownKind;

    /// Accepts singular and plural, in any case and with or without a dash.
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        match text.to_ascii_lowercase().replace(['-', '_'], "").as_str() {
            "switch" | "switches" => Ok(Kind::Switch),
            "aclgroup" | "aclgroups" | "group" | "groups" => Ok(Kind::AclGroup),
            "vnic" | "vnics" => Ok(Kind::Vnic),
            _ => Err(UnknownKind(text.to_owned())),
        }
    }
}

/// Names one resource. Its text is `vnics/vm1`, as in violations and events.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Kind.
    pub kind: Kind,
    /// Name, unique within the kind.
    pub name: String,
}

impl Key {
    /// Makes a key.
    pub fn new(kind: Kind, name: impl Into<String>) -> Key {
        Key { kind, name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.collection(), self.name)
    }
}

impl FromStr for Key {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let (kind, name) = text.split_once('/').ok_or_else(|| UnknownKind(text.to_owned()))?;
        Ok(Key::new(kind.parse()?, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_their_text() {
        for kind in Kind::ALL {
            let key = Key::new(kind, "a/b");
            assert_eq!(key.to_string().parse(), Ok(key));
            assert_eq!(kind.singular().parse(), Ok(kind));
        }
        assert_eq!("acl-groups".parse(), Ok(Kind::AclGroup));
        assert!("vnics".parse::<Key>().is_err());
    }
}
