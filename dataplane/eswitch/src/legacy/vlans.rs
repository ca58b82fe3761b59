//! VLANs that the PF receives. A PF that is not promiscuous filters them, and takes those of VLAN interfaces on it; so one
//! is made for each VLAN of the software switch, which stays down and has no other use. It outlives the daemon, as the
//! frames must; its name, `slPF.VLAN` with the PF's index, says that it is ours.

use std::collections::BTreeMap;

use sluice_policy::net::VlanId;

use super::codec;
use crate::netlink::attr::{Attributes, Read, u32_at};

/// `RTM_DELLINK`.
pub(super) const DELETE_LINK: u16 = 17;
/// Most VLANs: each is an interface.
pub(super) const VLANS_MAX: usize = 256;

/// `struct ifinfomsg`: its size, and where its index is.
const HEADER: usize = 16;
const IFINDEX: usize = 4;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;

/// A VLAN interface on the PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) ifindex: u32,
    pub(super) is_ours: bool,
}

/// The payload of the dump of all interfaces.
pub(super) fn list() -> Vec<u8> {
    vec![0; HEADER]
}

/// The VLAN interfaces on the PF in the payloads of a dump's answers. Where there are two of a VLAN, with different tags,
/// somebody else's counts.
pub(super) fn members<'a>(
    pf: u32,
    answers: impl Iterator<Item = (u16, &'a [u8])>,
) -> BTreeMap<VlanId, Member> {
    let mut members = BTreeMap::new();
    for (kind, payload) in answers {
        if kind != codec::NEW_LINK {
            continue;
        }
        let Some((vlan, member)) = member(pf, payload) else { continue };
        let known = members.entry(vlan).or_insert(member);
        if !member.is_ours {
            *known = member;
        }
    }
    members
}

fn member(pf: u32, payload: &[u8]) -> Option<(VlanId, Member)> {
    let attributes = Read::new(payload.get(HEADER..)?);
    let info = attributes.nested(IFLA_LINKINFO);
    // Of an interface whose link is in another namespace, the index is one there.
    let is_here = attributes.get(IFLA_LINK_NETNSID).is_none();
    let is_on_pf = attributes.array(IFLA_LINK).map(u32::from_ne_bytes) == Some(pf);
    if info.get(IFLA_INFO_KIND)? != b"vlan\0" || !is_on_pf || !is_here {
        return None;
    }
    let vid = u16::from_ne_bytes(info.nested(IFLA_INFO_DATA).array(IFLA_VLAN_ID)?);
    let vlan = VlanId::new(vid.into()).ok()?;
    let found = attributes.get(IFLA_IFNAME)?;
    let is_ours = found.strip_suffix(b"\0").unwrap_or(found) == name(pf, vlan).as_bytes();
    Some((vlan, Member { ifindex: u32_at(payload, IFINDEX)?, is_ours }))
}

/// What ours is called.
fn name(pf: u32, vlan: VlanId) -> String {
    format!("sl{pf}.{vlan}")
}

/// The payload that makes one.
pub(super) fn join(pf: u32, vlan: VlanId) -> Vec<u8> {
    let data = Attributes::default().put(IFLA_VLAN_ID, &vlan.get().to_ne_bytes());
    let info = Attributes::default().text(IFLA_INFO_KIND, "vlan").nest(IFLA_INFO_DATA, &data);
    Attributes::after(&[0; HEADER])
        .text(IFLA_IFNAME, &name(pf, vlan))
        .put(IFLA_LINK, &pf.to_ne_bytes())
        .nest(IFLA_LINKINFO, &info)
        .into_bytes()
}

/// The payload that removes one.
pub(super) fn leave(ifindex: u32) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    header[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vid(vid: u32) -> VlanId {
        VlanId::new(vid).expect("in range")
    }

    /// What the kernel would say of an interface that was made so.
    fn made(pf: u32, vlan: u32, ifindex: u32) -> Vec<u8> {
        let mut message = join(pf, vid(vlan));
        message[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        message
    }

    #[test]
    fn ours_are_told_from_others_by_their_name() {
        let ours = made(5, 100, 9);
        let mut theirs = made(5, 200, 10);
        let at = theirs.windows(4).position(|bytes| bytes == b"sl5.").expect("the name");
        theirs[at] = b'S';
        let elsewhere = made(6, 300, 11);
        let answers = [&ours, &theirs, &elsewhere].map(|payload| (codec::NEW_LINK, payload.as_slice()));
        let members = members(5, answers.into_iter().chain([(codec::NEW_LINK, &[1, 2, 3][..])]));
        assert_eq!(
            members.into_iter().collect::<Vec<_>>(),
            [
                (vid(100), Member { ifindex: 9, is_ours: true }),
                (vid(200), Member { ifindex: 10, is_ours: false })
            ]
        );
    }
}
