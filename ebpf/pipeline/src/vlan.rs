//! Stage 5 and its mirror image: from a frame's tags to the forwarding VLAN, and from that to the tag on the way out.

use crate::parse::{Headers, Tag, ethertype};
use crate::reason::DropReason;
use crate::tables::{PortConfig, Tables, Vlan, port_flag, vlan_mode};

/// Where the frame belongs, and what its outermost tag was for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Classified {
    pub(crate) vlan: Vlan,
    /// Priority and drop eligibility, in place (bits 12–15 of a TCI), to be carried into the outgoing tag.
    pub(crate) priority: u16,
    /// Whether the outermost tag said which VLAN (or only the priority) and so is not part of the payload.
    pub(crate) strip: bool,
}

/// Finds the forwarding VLAN of a frame that came from `port`.
///
/// # Errors
/// `VlanTagged`, `VlanNotAllowed`, `VlanUntagged` or `VlanDepth`, as the port's mode has it.
#[inline(always)]
pub(crate) fn ingress<T: Tables>(
    tables: &T,
    port: &PortConfig,
    slot: u32,
    headers: &Headers,
) -> Result<Classified, DropReason> {
    if port.vlan_mode == vlan_mode::TUNNEL {
        if headers.tag_count > 1 {
            return Err(DropReason::VlanDepth);
        }
        return Ok(Classified { vlan: port.vlan, priority: 0, strip: false });
    }
    let tagged = headers.tag_count > 0;
    let (tpid, vid) = (headers.outer.tpid, headers.outer.vid());
    if tagged && vid != 0 {
        let service = tpid == ethertype::STAG;
        let vlan = match port.vlan_mode {
            vlan_mode::TRUNK if !service && tables.trunk_allows(slot, vid) => Vlan(vid),
            vlan_mode::ALL if vid != 0x0fff => Vlan(if service { vid | Vlan::SERVICE } else { vid }),
            vlan_mode::ACCESS => return Err(DropReason::VlanTagged),
            _ => return Err(DropReason::VlanNotAllowed),
        };
        return Ok(Classified { vlan, priority: headers.outer.tci & 0xf000, strip: true });
    }
    // Untagged, or priority-tagged; a second tag behind a priority tag would come to light when the first is taken.
    if headers.tag_count > 1 {
        return Err(match port.vlan_mode {
            vlan_mode::ACCESS => DropReason::VlanTagged,
            _ => DropReason::VlanNotAllowed,
        });
    }
    let vlan = match port.vlan_mode {
        vlan_mode::ACCESS => port.vlan,
        vlan_mode::ALL => port.native,
        _ if port.flags & port_flag::NATIVE != 0 => port.native,
        _ => return Err(DropReason::VlanUntagged),
    };
    Ok(Classified { vlan, priority: headers.outer.tci & 0xf000, strip: tagged })
}

/// The tag that a frame of `vlan` carries out of `port`, or [`Tag::NONE`].
///
/// `has_inner_tag`: the frame still has a tag of its own. Where tags say the VLAN, such a frame cannot leave untagged:
/// its inner tag would be taken for the VLAN, which is how frames hop from one to another.
///
/// # Errors
/// `VlanEgress` if the port is not a member, or would be one only without the inner tag.
#[inline(always)]
pub(crate) fn egress<T: Tables>(
    tables: &T,
    port: &PortConfig,
    slot: u32,
    vlan: Vlan,
    priority: u16,
    has_inner_tag: bool,
) -> Result<Tag, DropReason> {
    let untagged = if has_inner_tag { Err(DropReason::VlanEgress) } else { Ok(Tag::NONE) };
    match port.vlan_mode {
        vlan_mode::TRUNK => {
            if port.flags & port_flag::NATIVE != 0 && vlan == port.native {
                return untagged;
            }
            if vlan.is_service() || vlan == Vlan::UNTAGGED || !tables.trunk_allows(slot, vlan.vid()) {
                return Err(DropReason::VlanEgress);
            }
        }
        vlan_mode::ALL => {
            if vlan == port.native {
                return untagged;
            }
            if vlan == Vlan::UNTAGGED {
                return Err(DropReason::VlanEgress); // untagged would be the native VLAN there
            }
        }
        _ if vlan == port.vlan => return Ok(Tag::NONE),
        _ => return Err(DropReason::VlanEgress),
    }
    let tpid = if vlan.is_service() { ethertype::STAG } else { ethertype::CTAG };
    Ok(Tag { tpid, tci: vlan.vid() | priority })
}

/// Whether `port` is a member of `vlan`.
#[inline(always)]
pub(crate) fn carries<T: Tables>(tables: &T, port: &PortConfig, slot: u32, vlan: Vlan) -> bool {
    egress(tables, port, slot, vlan, 0, false).is_ok()
}
