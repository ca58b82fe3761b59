//! Which NIC a PF is: where it is plugged, and what kind it is, which is the key for what is known about it.

use std::fmt;

/// Vendor, device and the subsystem's two, as in `lspci -nn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciId {
    /// Who makes the chip.
    pub vendor: u16,
    /// Which chip.
    pub device: u16,
    /// Who makes the card.
    pub subsystem_vendor: u16,
    /// Which card.
    pub subsystem_device: u16,
}

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciId { vendor, device, subsystem_vendor, subsystem_device } = self;
        write!(f, "{vendor:04x}:{device:04x} {subsystem_vendor:04x}:{subsystem_device:04x}")
    }
}

/// Which NIC a PF is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its interface when it was opened.
    pub netdev: String,
    /// Its bus, such as `pci`.
    pub bus: String,
    /// Its address there, such as `0000:01:00.0`.
    pub address: String,
    /// Its driver; empty if it has none.
    pub driver: String,
    /// The version of its firmware, as its driver tells it; empty if it does not.
    pub firmware: String,
    /// What PCI says that it is, if it is a PCI function.
    pub pci: Option<PciId>,
}

impl Identity {
    /// What findings about it are kept under: driver, PCI identity and firmware, and nothing of where it is plugged. It is
    /// one line, the same for ever.
    pub fn key(&self) -> String {
        let pci = self.pci.map_or_else(|| self.bus.clone(), |pci| pci.to_string());
        let or_none = |text: &str| if text.is_empty() { "none".to_owned() } else { one_line(text) };
        format!("driver {}, device {pci}, firmware {}", or_none(&self.driver), or_none(&self.firmware))
    }

    /// Whether the other one is of the same kind.
    pub fn is_same_kind(&self, other: &Identity) -> bool {
        self.key() == other.key()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}/{}: {})", self.netdev, self.bus, self.address, self.key())
    }
}

/// Drivers write what they like.
fn one_line(text: &str) -> String {
    text.split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_of_the_kind_and_not_of_the_place() {
        let here = Identity {
            netdev: "pf0".into(),
            bus: "pci".into(),
            address: "0000:01:00.0".into(),
            driver: "igb".into(),
            firmware: "2.1.0\n, 0x8000".into(),
            pci: Some(PciId {
                vendor: 0x8086,
                device: 0x10c9,
                subsystem_vendor: 0x1af4,
                subsystem_device: 0x1100,
            }),
        };
        assert_eq!(here.key(), "driver igb, device 8086:10c9 1af4:1100, firmware 2.1.0 , 0x8000");
        let there = Identity { netdev: "pf1".into(), address: "0000:02:00.0".into(), ..here.clone() };
        assert!(here.is_same_kind(&there));
        assert!(!here.is_same_kind(&Identity { firmware: String::new(), ..here.clone() }));
        assert!(!here.is_same_kind(&Identity { pci: None, ..here.clone() }));
    }
}
