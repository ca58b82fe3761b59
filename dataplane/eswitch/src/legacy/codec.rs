//! VFs in rtnetlink messages (linux/if_link.h `IFLA_VFINFO_LIST`): written as requests, read from answers.
//!
//! Read by hand and not by a crate: drivers report knobs that they do not have as all ones, which must not look like
//! "off", and one attribute that is new to us must not hide the VFs.

use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{Feature, PortVlan, VfIndex, VfSettings, VlanProtocol};

use crate::contract::VfStats;
use crate::netlink::attr::{Attributes, Read, each, u32_at};

/// `RTM_NEWLINK`, the answer to `RTM_GETLINK`.
pub(super) const NEW_LINK: u16 = 16;
/// `RTM_GETLINK`.
pub(super) const GET_LINK: u16 = 18;
/// `RTM_SETLINK`.
pub(super) const SET_LINK: u16 = 19;

/// `struct ifinfomsg`: its size, and where its flags are.
const LINK_HEADER: usize = 16;
const LINK_FLAGS: usize = 8;
/// `IFF_UP` and `IFF_RUNNING`.
const UP: u32 = 1;
const RUNNING: u32 = 1 << 6;

const IFLA_NUM_VF: u16 = 21;
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_EXT_MASK: u16 = 29;
const EXT_VF: u32 = 1;
const EXT_SKIP_STATS: u32 = 1 << 3;

const VF_INFO: u16 = 1;
const VF_MAC: u16 = 1;
const VF_VLAN: u16 = 2;
const VF_SPOOFCHK: u16 = 4;
const VF_LINK_STATE: u16 = 5;
const VF_RATE: u16 = 6;
const VF_RSS_QUERY_EN: u16 = 7;
const VF_STATS: u16 = 8;
const VF_TRUST: u16 = 9;
const VF_VLAN_LIST: u16 = 12;
const VF_VLAN_INFO: u16 = 1;

/// Bytes of an address in `struct ifla_vf_mac`.
const MAC_ROOM: usize = 32;
/// What a driver reports for a switch that it does not have: -1.
const UNREPORTED: u32 = u32::MAX;

/// Whether a VF's link may come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    /// With the PF's.
    Auto,
    /// Always.
    Enable,
    /// Never.
    Disable,
    /// Not known to us.
    Unknown(u32),
}

impl LinkState {
    const fn number(self) -> u32 {
        match self {
            LinkState::Auto => 0,
            LinkState::Enable => 1,
            LinkState::Disable => 2,
            LinkState::Unknown(number) => number,
        }
    }

    const fn from_number(number: u32) -> Self {
        match number {
            0 => LinkState::Auto,
            1 => LinkState::Enable,
            2 => LinkState::Disable,
            _ => LinkState::Unknown(number),
        }
    }
}

/// One thing that a PF driver is told about a VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Setting {
    Mac(MacAddr),
    Vlan(Option<PortVlan>),
    Spoofchk(bool),
    Trust(bool),
    Rates { min_mbps: u32, max_mbps: u32 },
    QueryRss(bool),
    Link(LinkState),
}

impl Setting {
    /// As `ip link set PF vf N` calls it.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Setting::Mac(_) => "mac",
            Setting::Vlan(_) => "vlan",
            Setting::Spoofchk(_) => "spoofchk",
            Setting::Trust(_) => "trust",
            Setting::Rates { .. } => "min_tx_rate and max_tx_rate",
            Setting::QueryRss(_) => "query_rss",
            Setting::Link(_) => "state",
        }
    }

    /// The part of a policy that rests on it.
    pub(super) const fn feature(&self) -> Feature {
        match self {
            Setting::Mac(_) | Setting::Spoofchk(_) | Setting::Trust(_) => Feature::MacGuard,
            Setting::Vlan(Some(PortVlan { protocol: VlanProtocol::Dot1ad, .. })) => Feature::TunnelVlan,
            Setting::Vlan(_) => Feature::AccessVlan,
            Setting::Rates { .. } => Feature::RateFromVm,
            Setting::QueryRss(_) => Feature::Offload,
            Setting::Link(_) => Feature::PortState,
        }
    }

    fn attribute(&self, vf: u32) -> Attributes {
        let words = |kind, words: &[u32]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            Attributes::default().put(kind, &bytes)
        };
        match *self {
            Setting::Mac(mac) => {
                let mut bytes = vf.to_ne_bytes().to_vec();
                bytes.extend(mac.0);
                bytes.resize(size_of::<u32>() + MAC_ROOM, 0);
                Attributes::default().put(VF_MAC, &bytes)
            }
            Setting::Vlan(vlan) => {
                let (vid, qos, protocol) = match vlan {
                    Some(vlan) => (vlan.vid.get(), vlan.qos, vlan.protocol),
                    None => (0, 0, VlanProtocol::Dot1q),
                };
                // struct ifla_vf_vlan_info ends with the protocol in network order and two bytes of padding.
                let mut bytes: Vec<u8> =
                    [vf, vid.into(), qos.into()].iter().flat_map(|word| word.to_ne_bytes()).collect();
                bytes.extend(protocol.tpid().to_be_bytes());
                bytes.extend([0, 0]);
                Attributes::default().nest(VF_VLAN_LIST, &Attributes::default().put(VF_VLAN_INFO, &bytes))
            }
            Setting::Spoofchk(on) => words(VF_SPOOFCHK, &[vf, on.into()]),
            Setting::Trust(on) => words(VF_TRUST, &[vf, on.into()]),
            Setting::Rates { min_mbps, max_mbps } => words(VF_RATE, &[vf, min_mbps, max_mbps]),
            Setting::QueryRss(on) => words(VF_RSS_QUERY_EN, &[vf, on.into()]),
            Setting::Link(state) => words(VF_LINK_STATE, &[vf, state.number()]),
        }
    }
}

fn link_header(ifindex: u32) -> [u8; LINK_HEADER] {
    let mut header = [0; LINK_HEADER];
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    header
}

/// The payload of a `RTM_SETLINK` that changes one thing of a VF.
pub(super) fn set(ifindex: u32, vf: VfIndex, setting: &Setting) -> Vec<u8> {
    let info = Attributes::default().nest(VF_INFO, &setting.attribute(vf.0.into()));
    Attributes::after(&link_header(ifindex)).nest(IFLA_VFINFO_LIST, &info).into_bytes()
}

/// The payload of a `RTM_GETLINK` for a PF and its VFs. Statistics take a quarter of the room, and the list ends at
/// 64 KiB.
pub(super) fn get(ifindex: u32, with_stats: bool) -> Vec<u8> {
    let mask = if with_stats { EXT_VF } else { EXT_VF | EXT_SKIP_STATS };
    Attributes::after(&link_header(ifindex)).put(IFLA_EXT_MASK, &mask.to_ne_bytes()).into_bytes()
}

/// A PF as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PfReport {
    /// It is administratively up.
    pub(super) up: bool,
    /// And has a carrier.
    pub(super) running: bool,
    /// How many VFs there are.
    pub(super) vf_count: u32,
    /// Those that fit into the message.
    pub(super) vfs: Vec<VfReport>,
}

/// A VF as the PF driver describes it. `None` is what it does not report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VfReport {
    pub(super) index: u32,
    pub(super) mac: MacAddr,
    pub(super) vid: u32,
    pub(super) qos: u32,
    pub(super) tpid: u16,
    pub(super) min_rate_mbps: u32,
    pub(super) max_rate_mbps: u32,
    pub(super) spoofchk: Option<bool>,
    pub(super) trust: Option<bool>,
    pub(super) query_rss: Option<bool>,
    pub(super) link: LinkState,
    pub(super) stats: VfStats,
}

impl VfReport {
    /// As settings; an error names what no program of ours can say.
    pub(super) fn settings(&self) -> Result<VfSettings, String> {
        let protocol = match self.tpid {
            0x8100 | 0 => VlanProtocol::Dot1q,
            0x88a8 => VlanProtocol::Dot1ad,
            other => return Err(format!("it reports a port VLAN of protocol {other:#06x}")),
        };
        let vlan = match self.vid {
            0 => None,
            vid => {
                let vid = VlanId::new(vid).map_err(|error| format!("it reports a port VLAN: {error}"))?;
                let qos = u8::try_from(self.qos).map_err(|_| format!("it reports qos {}", self.qos))?;
                Some(PortVlan { vid, qos, protocol })
            }
        };
        Ok(VfSettings {
            mac: self.mac,
            vlan,
            spoofchk: self.spoofchk.unwrap_or(false),
            trust: self.trust.unwrap_or(false),
            min_rate_mbps: self.min_rate_mbps,
            max_rate_mbps: self.max_rate_mbps,
            query_rss: self.query_rss.unwrap_or(false),
        })
    }
}

/// Reads the payload of a `RTM_NEWLINK`.
pub(super) fn pf_report(payload: &[u8]) -> Option<PfReport> {
    let flags = u32_at(payload, LINK_FLAGS)?;
    let attributes = payload.get(LINK_HEADER..)?;
    let mut report = PfReport {
        up: flags & UP != 0,
        running: flags & RUNNING != 0,
        vf_count: Read::new(attributes).u32(IFLA_NUM_VF).unwrap_or(0),
        vfs: Vec::new(),
    };
    let lists = each(attributes).filter(|(kind, _)| *kind == IFLA_VFINFO_LIST);
    for (_, info) in lists.flat_map(|(_, list)| each(list)).filter(|(kind, _)| *kind == VF_INFO) {
        report.vfs.extend(vf_report(info));
    }
    Some(report)
}

fn vf_report(info: &[u8]) -> Option<VfReport> {
    let info = Read::new(info);
    let mac = info.get(VF_MAC)?;
    let word = |kind, at: usize| info.get(kind).and_then(|value| u32_at(value, at * size_of::<u32>()));
    let switch = |kind| word(kind, 1).filter(|setting| *setting != UNREPORTED).map(|setting| setting != 0);
    let vlan_list = info.nested(VF_VLAN_LIST);
    let vlan = vlan_list.get(VF_VLAN_INFO);
    let vlan_word = |at: usize| match vlan {
        Some(vlan) => u32_at(vlan, at * size_of::<u32>()),
        None => word(VF_VLAN, at),
    };
    let tpid = vlan.and_then(|vlan| vlan.get(12..14)).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    Some(VfReport {
        index: u32_at(mac, 0)?,
        mac: MacAddr(mac.get(4..10)?.try_into().ok()?),
        vid: vlan_word(1).unwrap_or(0),
        qos: vlan_word(2).unwrap_or(0),
        tpid: tpid.unwrap_or(VlanProtocol::Dot1q.tpid()),
        min_rate_mbps: word(VF_RATE, 1).unwrap_or(0),
        max_rate_mbps: word(VF_RATE, 2).unwrap_or(0),
        spoofchk: switch(VF_SPOOFCHK),
        trust: switch(VF_TRUST),
        query_rss: switch(VF_RSS_QUERY_EN),
        link: LinkState::from_number(word(VF_LINK_STATE, 1).unwrap_or(0)),
        stats: stats(&info.nested(VF_STATS)),
    })
}

/// The kernel writes zeros for drivers that do not count, so all zeros say nothing. The VF's side is meant: what it
/// transmits is what the VM sends.
fn stats(attributes: &Read<'_>) -> VfStats {
    let counter = |kind| attributes.u64(kind);
    if (0..=8).all(|kind| counter(kind).unwrap_or(0) == 0) {
        return VfStats::default();
    }
    VfStats {
        to_vm_frames: counter(0),
        from_vm_frames: counter(1),
        to_vm_bytes: counter(2),
        from_vm_bytes: counter(3),
        to_vm_dropped: counter(7),
        from_vm_dropped: counter(8),
    }
}

#[cfg(test)]
mod tests;
