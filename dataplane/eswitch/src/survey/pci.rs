//! The configuration space of a PCI function (PCI Express Base Specification 6.0, chapter 7): the capabilities that
//! decide about VFs.

use super::reading::{Reading, Why};

/// What an unprivileged reader gets: the header alone.
const HEADER: usize = 64;
/// Where the extended capabilities begin.
const EXTENDED: usize = 0x100;
/// No list is longer than the space has room for.
const STEPS: usize = 1024;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 0x10;
const FIRST: usize = 0x34;
const PCI_EXPRESS: u8 = 0x10;
const ACS: u16 = 0x0d;
const SRIOV: u16 = 0x10;

/// What a port of the PCI Express tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A root port.
    Root,
    /// The side of a PCI Express switch towards the CPU.
    Upstream,
    /// The side of a PCI Express switch towards devices.
    Downstream,
    /// Anything else, by its number in the PCI Express capabilities register.
    Other(u8),
}

/// Access control services of a port (7.7.11): whether what devices below it send to each other goes up to the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acs {
    /// What the port can do: the capability register.
    pub capable: u16,
    /// What is on: the control register.
    pub enabled: u16,
}

impl Acs {
    /// Source validation, request redirect, completion redirect, upstream forwarding: what the kernel wants for a group
    /// of its own.
    const WANTED: u16 = 0b1_1101;

    /// Whether all is on that isolation takes and the port can do.
    pub const fn isolates(self) -> bool {
        let wanted = Acs::WANTED & self.capable;
        wanted != 0 && self.enabled & wanted == wanted
    }
}

/// A configuration space, as far as it could be read.
#[derive(Clone, Debug)]
pub(super) struct Space(Reading<Vec<u8>>);

impl Space {
    /// Takes what the file `config` of a device gave.
    pub(super) fn new(read: Reading<Vec<u8>>) -> Space {
        let space = read.and_then(|bytes| match bytes.len() {
            0 => Reading::Absent,
            // The kernel shows the rest to CAP_SYS_ADMIN only.
            1..=HEADER => Reading::Unknown(Why::Denied),
            // A device that has been unplugged answers with ones.
            _ if bytes.iter().take(HEADER).all(|byte| *byte == 0xff) => {
                Reading::Unknown(Why::Failed(nix::errno::Errno::ENODEV as i32))
            }
            _ => Reading::Known(bytes),
        });
        Space(space)
    }

    /// How many VFs the function has in hardware, whatever the kernel makes of it; absent without the capability.
    pub(super) fn total_vfs(&self) -> Reading<u16> {
        self.field(|bytes| word(bytes, extended(bytes, SRIOV)? + 0x0e))
    }

    /// Its access control services.
    pub(super) fn acs(&self) -> Reading<Acs> {
        self.field(|bytes| {
            let at = extended(bytes, ACS)?;
            Some(Acs { capable: word(bytes, at + 4)?, enabled: word(bytes, at + 6)? })
        })
    }

    /// What kind of port it is; absent if it is not PCI Express.
    pub(super) fn port(&self) -> Reading<PortKind> {
        self.field(|bytes| {
            let flags = word(bytes, standard(bytes, PCI_EXPRESS)? + 2)?;
            Some(match (flags >> 4) as u8 & 0xf {
                4 => PortKind::Root,
                5 => PortKind::Upstream,
                6 => PortKind::Downstream,
                other => PortKind::Other(other),
            })
        })
    }

    fn field<T>(&self, find: impl FnOnce(&[u8]) -> Option<T>) -> Reading<T> {
        self.0.clone().and_then(|bytes| find(&bytes).map_or(Reading::Absent, Reading::Known))
    }
}

/// Where a capability is (7.5.3).
fn standard(bytes: &[u8], wanted: u8) -> Option<usize> {
    if word(bytes, STATUS)? & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = usize::from(*bytes.get(FIRST)? & !3);
    for _ in 0..STEPS {
        if at < HEADER {
            return None;
        }
        if *bytes.get(at)? == wanted {
            return Some(at);
        }
        at = usize::from(*bytes.get(at + 1)? & !3);
    }
    None
}

/// Where an extended capability is (7.6.3).
fn extended(bytes: &[u8], wanted: u16) -> Option<usize> {
    let mut at = EXTENDED;
    for _ in 0..STEPS {
        let (id, next) = (word(bytes, at)?, word(bytes, at + 2)? >> 4);
        if at < EXTENDED || id == 0 || id == 0xffff {
            return None;
        }
        if id == wanted {
            return Some(at);
        }
        at = usize::from(next & !3);
    }
    None
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A space of 4 KiB: a port of this kind, then SR-IOV with so many VFs, then access control.
    pub(in super::super) fn space(port: u8, total: Option<u16>, acs: Option<Acs>) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[STATUS] = 0x10;
        bytes[FIRST] = 0x40;
        bytes[0x40..0x44].copy_from_slice(&[0x05, 0x60, 0, 0]);
        bytes[0x60..0x64].copy_from_slice(&[PCI_EXPRESS, 0, port << 4, 0]);
        let mut put = |at: usize, id: u16, next: u16| {
            bytes[at..at + 2].copy_from_slice(&id.to_le_bytes());
            bytes[at + 2..at + 4].copy_from_slice(&(next << 4 | 1).to_le_bytes());
        };
        put(0x100, 0x01, 0x140);
        put(0x140, if total.is_some() { SRIOV } else { 0x0b }, 0x200);
        put(0x200, if acs.is_some() { ACS } else { 0x0b }, 0);
        if let Some(total) = total {
            bytes[0x14e..0x150].copy_from_slice(&total.to_le_bytes());
        }
        if let Some(acs) = acs {
            bytes[0x204..0x206].copy_from_slice(&acs.capable.to_le_bytes());
            bytes[0x206..0x208].copy_from_slice(&acs.enabled.to_le_bytes());
        }
        bytes
    }

    fn of(bytes: &[u8]) -> Space {
        Space::new(Reading::Known(bytes.to_vec()))
    }

    #[test]
    fn capabilities_are_found_behind_others() {
        let acs = Acs { capable: 0x1f, enabled: 0x1d };
        let space = of(&space(4, Some(7), Some(acs)));
        assert_eq!(space.total_vfs(), Reading::Known(7));
        assert_eq!(space.acs(), Reading::Known(acs));
        assert_eq!(space.port(), Reading::Known(PortKind::Root));
    }

    #[test]
    fn what_is_not_there_is_absent_and_what_is_hidden_is_unknown() {
        let whole = space(6, None, None);
        assert_eq!((of(&whole).total_vfs(), of(&whole).acs()), (Reading::Absent, Reading::Absent));
        assert_eq!(of(&whole).port(), Reading::Known(PortKind::Downstream));
        assert_eq!(of(&whole[..256]).acs(), Reading::Absent, "plain PCI has nothing extended");
        assert_eq!(of(&whole[..64]).acs(), Reading::Unknown(Why::Denied));
        assert_eq!(of(&[]).acs(), Reading::Absent);
        assert!(matches!(of(&[0xff; 4096]).total_vfs(), Reading::Unknown(Why::Failed(_))));
    }

    #[test]
    fn lists_in_circles_end() {
        let mut bytes = space(0, None, None);
        bytes[0x202..0x204].copy_from_slice(&(0x140_u16 << 4).to_le_bytes());
        bytes[0x61] = 0x40;
        bytes[0x60] = 0x05;
        assert_eq!((of(&bytes).acs(), of(&bytes).port()), (Reading::Absent, Reading::Absent));
    }

    #[test]
    fn isolation_takes_all_that_the_port_can_do() {
        let isolates = |capable, enabled| Acs { capable, enabled }.isolates();
        assert!(isolates(0x1f, 0x1d) && isolates(0x05, 0x05));
        assert!(!isolates(0x1f, 0x0d) && !isolates(0, 0x1d) && !isolates(0x1f, 0));
    }
}
