//! What notices are about. Whatever cannot be read, or is about nothing that NICs have, gives no hint.

use std::collections::BTreeSet;

use super::Hint;
use crate::netlink::attr::u32_at;
use crate::switchdev::devlink;

/// Of linux/rtnetlink.h.
const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const NEW_NEIGHBOUR: u16 = 28;
const DELETE_NEIGHBOUR: u16 = 29;
const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;
const NEW_CHAIN: u16 = 100;
const DELETE_CHAIN: u16 = 101;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Where `struct ifinfomsg`, `struct tcmsg` and `struct ndmsg` have their interface.
const IFINDEX: usize = 4;
/// Where `struct ndmsg` has its flags.
const NEIGHBOUR_FLAGS: usize = 10;
const NTF_SELF: u8 = 1 << 1;
const AF_BRIDGE: u8 = 7;
/// `TCM_IFINDEX_MAGIC_BLOCK`: filters that several interfaces share.
const SHARED_BLOCK: u32 = u32::MAX;

/// The buses whose devices have eSwitches.
const BUSES: [&str; 2] = ["pci", "netdevsim"];

/// Kind and payload of each message in a datagram.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// Notices of rtnetlink.
pub(super) fn route(bytes: &[u8], hints: &mut BTreeSet<Hint>) {
    for (kind, payload) in messages(bytes) {
        let Some(ifindex) = u32_at(payload, IFINDEX) else { continue };
        match kind {
            NEW_LINK | DELETE_LINK => {
                hints.insert(Hint::Link { ifindex });
            }
            // Neighbours of the host are none of ours; addresses in a NIC's own filter are.
            NEW_NEIGHBOUR | DELETE_NEIGHBOUR => {
                let is_filter = payload.first() == Some(&AF_BRIDGE)
                    && payload.get(NEIGHBOUR_FLAGS).is_some_and(|flags| flags & NTF_SELF != 0);
                if is_filter {
                    hints.insert(Hint::Link { ifindex });
                }
            }
            NEW_QDISC | DELETE_QDISC | NEW_FILTER | DELETE_FILTER | NEW_CHAIN | DELETE_CHAIN => {
                let is_shared = ifindex == SHARED_BLOCK;
                hints.insert(if is_shared { Hint::All } else { Hint::Filters { ifindex } });
            }
            _ => {}
        }
    }
}

/// Notices of devlink.
pub(super) fn devlink(bytes: &[u8], hints: &mut BTreeSet<Hint>) {
    let handles = messages(bytes).filter_map(|(_, payload)| devlink::handle_in(payload));
    hints.extend(handles.map(|handle| Hint::Device { bus: handle.bus, address: handle.device }));
}

/// A uevent: `action@path`, then `NAME=value` each with a zero behind it.
pub(super) fn uevent(bytes: &[u8]) -> Option<Hint> {
    let fields = || bytes.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok());
    let value = |name: &str| fields().find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    let bus = value("SUBSYSTEM").filter(|bus| BUSES.contains(bus))?;
    let (_, address) = value("DEVPATH")?.rsplit_once('/')?;
    Some(Hint::Device { bus: bus.to_owned(), address: address.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = (HEADER + payload.len()) as u32;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn about(family: u8, ifindex: u32, flags: u8) -> Vec<u8> {
        let mut payload = vec![0; 16];
        payload[0] = family;
        payload[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        payload[NEIGHBOUR_FLAGS] = flags;
        payload
    }

    fn hints(bytes: &[u8]) -> Vec<Hint> {
        let mut hints = BTreeSet::new();
        route(bytes, &mut hints);
        hints.into_iter().collect()
    }

    #[test]
    fn each_interface_is_named_once_and_what_is_shared_is_everything() {
        let datagram = [
            message(NEW_LINK, &about(0, 7, 0)),
            message(NEW_LINK, &about(0, 7, 0)),
            message(DELETE_FILTER, &about(0, 8, 0)),
            message(NEW_QDISC, &about(0, 8, 0)),
        ]
        .concat();
        assert_eq!(hints(&datagram), [Hint::Link { ifindex: 7 }, Hint::Filters { ifindex: 8 }]);
        assert_eq!(hints(&message(NEW_FILTER, &about(0, SHARED_BLOCK, 0))), [Hint::All]);
    }

    #[test]
    fn of_neighbours_only_a_nics_own_filter_counts() {
        assert_eq!(hints(&message(NEW_NEIGHBOUR, &about(2, 7, 0))), []);
        assert_eq!(hints(&message(NEW_NEIGHBOUR, &about(AF_BRIDGE, 7, 0))), []);
        let filter = message(DELETE_NEIGHBOUR, &about(AF_BRIDGE, 7, NTF_SELF));
        assert_eq!(hints(&filter), [Hint::Link { ifindex: 7 }]);
    }

    #[test]
    fn what_is_cut_off_gives_no_hint() {
        let whole = message(NEW_LINK, &about(0, 7, 0));
        for length in 0..whole.len() {
            assert_eq!(hints(&whole[..length]), [], "{length}");
        }
        // A length that leads nowhere ends the datagram.
        assert_eq!(hints(&[0; 64]), []);
    }

    #[test]
    fn uevents_name_devices_of_buses_with_eswitches() {
        let text = b"unbind@/devices/pci0000:00/0000:01:10.0\0ACTION=unbind\0\
            DEVPATH=/devices/pci0000:00/0000:01:10.0\0SUBSYSTEM=pci\0PCI_SLOT_NAME=0000:01:10.0\0";
        let device = Hint::Device { bus: "pci".into(), address: "0000:01:10.0".into() };
        assert_eq!(uevent(text), Some(device));
        assert_eq!(uevent(b"add@/devices/x\0DEVPATH=/devices/x\0SUBSYSTEM=block\0"), None);
        assert_eq!(uevent(b"\xff\xfe\0"), None);
    }
}
