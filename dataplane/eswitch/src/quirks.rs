//! What is known about particular NICs and cannot be found out by asking them. One table, by driver and identity.

use sluice_policy::placement::{Capabilities, Evidence};

use crate::nic::PciId;

/// What VFs must be when an eSwitch is put into switchdev mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ModeOrder {
    /// There are none: the mode first, then `sriov_numvfs`. ice refuses otherwise, and mlx5_core wants VFs without drivers.
    WithoutVfs,
    /// They exist: `sriov_numvfs` first, then the mode.
    WithVfs,
}

/// What to know about a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quirk {
    /// The PF's driver.
    driver: &'static str,
    /// The NIC, if only this one is meant: a card, or a model in an emulator.
    pci: Option<PciId>,
    /// The driver of its VFs, for when the kernel must be told which to bind.
    vf_driver: &'static str,
    /// What comes first, VFs or mode.
    mode_order: ModeOrder,
    /// It takes `spoofchk` and lets other source addresses pass.
    ignores_spoofchk: bool,
    /// It takes rates and does not limit.
    ignores_rates: bool,
    /// Without a port VLAN, a VF's own tags pass.
    passes_guest_tags: bool,
}

/// What holds for NICs of a driver that are not in the table by identity comes after those that are.
const QUIRKS: &[Quirk] = &[
    // QEMU's igb model (FACTS: measured with QEMU 10.0).
    Quirk {
        driver: "igb",
        pci: Some(PciId {
            vendor: 0x8086,
            device: 0x10c9,
            subsystem_vendor: 0x1af4,
            subsystem_device: 0x1100,
        }),
        vf_driver: "igbvf",
        mode_order: ModeOrder::WithoutVfs,
        ignores_spoofchk: true,
        ignores_rates: true,
        passes_guest_tags: true,
    },
    plain("igb", "igbvf"),
    plain("ixgbe", "ixgbevf"),
    plain("i40e", "iavf"),
    plain("ice", "iavf"),
    plain("mlx5_core", "mlx5_core"),
    // For years it refused switchdev mode without VFs; newer kernels take both orders.
    Quirk { mode_order: ModeOrder::WithVfs, ..plain("bnxt_en", "bnxt_en") },
];

const fn plain(driver: &'static str, vf_driver: &'static str) -> Quirk {
    Quirk {
        driver,
        pci: None,
        vf_driver,
        mode_order: ModeOrder::WithoutVfs,
        ignores_spoofchk: false,
        ignores_rates: false,
        passes_guest_tags: false,
    }
}

impl Quirk {
    /// What is known about a NIC.
    pub(crate) fn of(driver: &str, pci: Option<PciId>) -> Option<&'static Quirk> {
        let fits = |quirk: &&Quirk| quirk.driver == driver && (quirk.pci.is_none() || quirk.pci == pci);
        QUIRKS.iter().find(fits)
    }

    /// The driver of its VFs.
    pub(crate) const fn vf_driver(&self) -> &'static str {
        self.vf_driver
    }

    /// What comes first when the mode changes.
    pub(crate) const fn mode_order(&self) -> ModeOrder {
        self.mode_order
    }

    /// Takes from what the NIC says about itself what is known to be untrue.
    pub(crate) fn correct(&self, capabilities: &mut Capabilities) {
        if self.ignores_spoofchk {
            capabilities.mac_guard = capabilities.mac_guard.probed(false);
        }
        if self.ignores_rates {
            capabilities.rate_max = capabilities.rate_max.probed(false);
            capabilities.rate_min = capabilities.rate_min.probed(false);
        }
        if self.passes_guest_tags {
            capabilities.untagged_only = Evidence::Refuted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_nic_is_not_believed_and_the_real_one_is() {
        let told = || Capabilities {
            mac_guard: Evidence::ReadBack,
            rate_max: Evidence::ReadBack,
            untagged_only: Evidence::Assumed,
            ..Capabilities::default()
        };
        let emulator =
            PciId { vendor: 0x8086, device: 0x10c9, subsystem_vendor: 0x1af4, subsystem_device: 0x1100 };
        let corrected = |pci| {
            let mut capabilities = told();
            Quirk::of("igb", Some(pci)).expect("igb is known").correct(&mut capabilities);
            capabilities
        };
        let emulated = corrected(emulator);
        assert_eq!(emulated.mac_guard, Evidence::Refuted);
        assert_eq!(emulated.rate_max, Evidence::Refuted);
        assert_eq!(emulated.rate_min, Evidence::Missing, "what is not offered stays so");
        assert_eq!(emulated.untagged_only, Evidence::Refuted);
        assert_eq!(
            corrected(PciId { subsystem_vendor: 0x8086, subsystem_device: 0xa03c, ..emulator }),
            told()
        );
        assert_eq!(Quirk::of("e1000", None), None);
    }

    #[test]
    fn particular_nics_come_before_their_drivers() {
        for (index, quirk) in QUIRKS.iter().enumerate() {
            let shadows = QUIRKS[..index]
                .iter()
                .any(|other| other.driver == quirk.driver && (other.pci.is_none() || other.pci == quirk.pci));
            assert!(!shadows, "{quirk:?} is never found");
        }
    }
}
