//! The PF's own unicast filter (`bridge fdb … dev PF self`): which addresses besides its own the PF receives.

use std::collections::BTreeSet;

use sluice_policy::net::MacAddr;

use crate::netlink::attr::{Attributes, Read, u32_at};

/// `RTM_NEWNEIGH`.
pub(super) const NEW_NEIGHBOUR: u16 = 28;
/// `RTM_DELNEIGH`.
pub(super) const DELETE_NEIGHBOUR: u16 = 29;
/// `RTM_GETNEIGH`.
pub(super) const GET_NEIGHBOUR: u16 = 30;

const AF_BRIDGE: u8 = 7;
const NTF_SELF: u8 = 1 << 1;
const NUD_PERMANENT: u16 = 0x80;
const NDA_LLADDR: u16 = 2;
/// `struct ndmsg`.
const HEADER: usize = 12;
const FLAGS: usize = 10;

/// The payload that adds or removes an address.
pub(super) fn entry(ifindex: u32, mac: MacAddr) -> Vec<u8> {
    let mut header = [0; HEADER];
    header[0] = AF_BRIDGE;
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    header[FLAGS] = NTF_SELF;
    Attributes::after(&header).put(NDA_LLADDR, &mac.0).into_bytes()
}

/// The payload of the dump: `struct ifinfomsg`, since the kernel looks at the index only in one of that length.
pub(super) fn list(ifindex: u32) -> Vec<u8> {
    let mut header = vec![0; 16];
    header[0] = AF_BRIDGE;
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    header
}

/// The unicast addresses of the PF in the payloads of a dump's answers.
pub(super) fn addresses<'a>(ifindex: u32, answers: impl Iterator<Item = &'a [u8]>) -> BTreeSet<MacAddr> {
    let address = |payload: &[u8]| {
        let is_own = payload.get(FLAGS)? & NTF_SELF != 0 && u32_at(payload, 4)? == ifindex;
        let mac = MacAddr(Read::new(payload.get(HEADER..)?).array(NDA_LLADDR)?);
        (is_own && !mac.is_group()).then_some(mac)
    };
    answers.filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x99]);

    /// As `bridge fdb add 02:00:00:00:00:99 dev IFINDEX5 self` writes it.
    #[test]
    #[cfg(target_endian = "little")]
    fn entries_are_what_bridge_writes() {
        let golden = [
            7, 0, 0, 0, 5, 0, 0, 0, 0x80, 0, 2, 0, // ndmsg: AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF
            10, 0, 2, 0, 2, 0, 0, 0, 0, 0x99, 0, 0, // NDA_LLADDR, padded
        ];
        assert_eq!(entry(5, MAC), golden);
        assert_eq!(list(5), [7, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn only_the_pfs_own_unicast_addresses_count() {
        let mut of_bridge = entry(5, MacAddr([2, 0, 0, 0, 0, 1]));
        of_bridge[FLAGS] = 0;
        let answers =
            [entry(5, MAC), entry(6, MacAddr([2; 6])), entry(5, MacAddr([0x33; 6])), of_bridge, vec![7; 9]];
        assert_eq!(addresses(5, answers.iter().map(Vec::as_slice)), BTreeSet::from([MAC]));
    }
}
