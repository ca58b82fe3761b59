//! What an eSwitch cannot enforce, for machines and for people.

use std::fmt;

macro_rules! features {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal;)+) => {
        /// A part of a policy, as far as an eSwitch may fail to enforce it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Feature {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Feature {
            /// Every feature.
            pub const ALL: &'static [Feature] = &[$(Feature::$name,)+];

            /// Stable code in `lower-kebab-case`, for machines.
            pub const fn code(self) -> &'static str {
                match self {
                    $(Feature::$name => $text,)+
                }
            }
        }
    };
}

features! {
    /// The vNIC is administratively down.
    PortState = "port-state";
    /// There is no VF to give.
    Vfs = "vfs";
    /// The switch's uplink, or how it carries the vNIC's VLAN.
    Uplink = "uplink";
    /// Source addresses.
    MacGuard = "mac-guard";
    /// More than one address.
    ExtraMacs = "extra-macs";
    /// Source IP addresses.
    IpGuard = "ip-guard";
    /// Dropping frames that the guest tags.
    UntaggedVlan = "vlan-untagged";
    /// One customer VLAN.
    AccessVlan = "vlan-access";
    /// Several customer VLANs.
    TrunkVlan = "vlan-trunk";
    /// A service VLAN.
    TunnelVlan = "vlan-tunnel";
    /// No DHCP service.
    DhcpGuard = "dhcp-guard";
    /// No router advertisements.
    RaGuard = "ra-guard";
    /// The ACL on what it sends.
    AclFromVm = "acl-from-vm";
    /// The ACL on what it receives.
    AclToVm = "acl-to-vm";
    /// The rate limit on what it sends.
    RateFromVm = "rate-from-vm";
    /// The rate limit on what it receives.
    RateToVm = "rate-to-vm";
    /// Frames to unknown addresses, for this vNIC or for others of its switch.
    UnknownUnicast = "unknown-unicast";
    /// Addresses learnt behind the vNIC.
    Learning = "learning";
    /// Rules in hardware at all.
    Offload = "offload";
    /// Room for rules.
    TableSpace = "table-space";
}

/// One thing that an eSwitch cannot enforce. Where there is one, the vNIC stays on its software path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uncovered {
    /// What.
    pub feature: Feature,
    /// Why, for people.
    pub text: String,
    /// What to do about it.
    pub remedy: String,
}

impl Uncovered {
    /// Puts one together.
    pub fn new(feature: Feature, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Uncovered { feature, text: text.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Uncovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.feature.code(), self.text, self.remedy)
    }
}
