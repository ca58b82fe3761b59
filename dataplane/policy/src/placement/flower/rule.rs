//! Flower rules as plain values. A back-end turns them into netlink messages and back, and adds nothing to them.

use crate::config::{Masked, Rate};
use crate::net::{IpPrefix, MacAddr, VlanId};
use crate::placement::{VfIndex, VlanProtocol};

/// Where a rule is: always the ingress side of a representor, that is, what its owner sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RulePort {
    /// The VF's representor.
    Own,
    /// The uplink's representor. Chains and priorities there belong to one vNIC; a back-end with several moves them apart.
    Uplink,
}

/// The tag that a rule with a tag's ethertype wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VlanMatch {
    /// VLAN identifier of the outermost tag (`vlan_id`); any if absent. 0 for a priority tag.
    pub vid: Option<u16>,
    /// The ethertype behind it (`vlan_ethtype`).
    pub ethertype: Option<u16>,
}

/// What a rule matches; what is absent matches everything.
///
/// As in the kernel, a field of a protocol that the frame is not of reads as zero, except that fragments do not show
/// ports, flags and ICMP at all: also zero. A rule on those fields names `ip_proto`, and comes after one that traps fragments.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowerMatch {
    /// The outermost ethertype (tc's `protocol`); 0x8100 or 0x88a8 means tagged, any other untagged.
    pub ethertype: Option<u16>,
    /// The outermost tag; `ethertype` must be a tag's.
    pub vlan: Option<VlanMatch>,
    /// Source MAC.
    pub src_mac: Option<Masked<MacAddr>>,
    /// Destination MAC.
    pub dst_mac: Option<Masked<MacAddr>>,
    /// Source prefix; the ethertype must be of its family.
    pub src_ip: Option<IpPrefix>,
    /// Destination prefix.
    pub dst_ip: Option<IpPrefix>,
    /// IP protocol; the ethertype must be IP.
    pub ip_proto: Option<u8>,
    /// Whether it is a fragment (`ip_flags frag` or `nofrag`).
    pub fragment: Option<bool>,
    /// Source port; `ip_proto` must be TCP, UDP or SCTP.
    pub src_port: Option<Masked<u16>>,
    /// Destination port.
    pub dst_port: Option<Masked<u16>>,
    /// TCP flags.
    pub tcp_flags: Option<Masked<u8>>,
    /// ICMP or ICMPv6 type.
    pub icmp_type: Option<u8>,
    /// ICMP or ICMPv6 code.
    pub icmp_code: Option<u8>,
}

impl FlowerMatch {
    /// The same without fields that match everything, which the kernel does not keep.
    #[must_use]
    fn canonical(mut self) -> Self {
        self.vlan = self.vlan.filter(|vlan| *vlan != VlanMatch::default());
        self.src_mac = self.src_mac.filter(|mac| !mac.mask.is_zero());
        self.dst_mac = self.dst_mac.filter(|mac| !mac.mask.is_zero());
        self.src_ip = self.src_ip.filter(|prefix| prefix.length() > 0);
        self.dst_ip = self.dst_ip.filter(|prefix| prefix.length() > 0);
        self.src_port = self.src_port.filter(|port| port.mask != 0);
        self.dst_port = self.dst_port.filter(|port| port.mask != 0);
        self.tcp_flags = self.tcp_flags.filter(|flags| flags.mask != 0);
        self
    }
}

/// Where a rule sends frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Out of the uplink.
    Uplink,
    /// To a VF.
    Vf(VfIndex),
}

/// What a rule does, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowerAction {
    /// End: drop it.
    Drop,
    /// End: look further in this chain.
    Goto(u32),
    /// End: give it to the representor's software port, where the whole pipeline awaits it.
    Trap,
    /// End: send it.
    Redirect(Target),
    /// Drop it if it is over the rate. All `Police` of one program share one bucket.
    Police(Rate),
    /// Push a tag.
    VlanPush {
        /// Which.
        protocol: VlanProtocol,
        /// VLAN.
        vid: VlanId,
        /// 0–7.
        priority: u8,
    },
    /// Take the outermost tag off.
    VlanPop,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowerRule {
    /// Where.
    pub port: RulePort,
    /// Chain; frames start in chain 0. What no rule of a chain matches goes to the software port.
    pub chain: u32,
    /// Lower numbers are tried first; unique within port and chain, as tc allows one ethertype per priority.
    pub priority: u16,
    /// What it matches.
    pub matches: FlowerMatch,
    /// What it does; the last action is an end.
    pub actions: Vec<FlowerAction>,
}

/// The rules of one vNIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowerProgram {
    rules: Vec<FlowerRule>,
    hash: u64,
}

impl FlowerProgram {
    /// A program of these rules, whatever their order: where each is says in which order they are tried.
    pub fn new(mut rules: Vec<FlowerRule>) -> Self {
        for rule in &mut rules {
            rule.matches = std::mem::take(&mut rule.matches).canonical();
        }
        rules.sort_by_key(|rule| (rule.port, rule.chain, rule.priority));
        let hash = fnv1a(format!("{rules:?}").as_bytes());
        FlowerProgram { rules, hash }
    }

    /// Its rules, by port, chain and priority.
    pub fn rules(&self) -> &[FlowerRule] {
        &self.rules
    }

    /// Names the whole program in the cookies of its rules, so that rules of another are told apart. It may change
    /// with the version of Sluice: then rules are written anew once.
    pub const fn hash(&self) -> u64 {
        self.hash
    }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
