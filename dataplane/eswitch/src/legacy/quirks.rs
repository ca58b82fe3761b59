//! What is known about particular NICs and cannot be found out by asking them. One table, by driver and identity.

use sluice_policy::placement::{Capabilities, Evidence};

/// What to know about a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quirk {
    /// The PF's driver.
    driver: &'static str,
    /// The NIC, as [`super::sysfs::Device::identity`] has it, if only this one is meant: a model in firmware or in an
    /// emulator. There is no better key on Linux than the subsystem's, since old drivers tell their firmware's version
    /// only to an ioctl.
    identity: Option<&'static str>,
    /// The driver of its VFs, for when the kernel must be told which to bind.
    vf_driver: &'static str,
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
        identity: Some("8086:10c9 1af4:1100"),
        vf_driver: "igbvf",
        ignores_spoofchk: true,
        ignores_rates: true,
        passes_guest_tags: true,
    },
    plain("igb", "igbvf"),
    plain("ixgbe", "ixgbevf"),
    plain("i40e", "iavf"),
    plain("ice", "iavf"),
    plain("mlx5_core", "mlx5_core"),
    plain("bnxt_en", "bnxt_en"),
];

const fn plain(driver: &'static str, vf_driver: &'static str) -> Quirk {
    Quirk {
        driver,
        identity: None,
        vf_driver,
        ignores_spoofchk: false,
        ignores_rates: false,
        passes_guest_tags: false,
    }
}

impl Quirk {
    /// What is known about a NIC.
    pub(super) fn of(driver: &str, identity: &str) -> Option<&'static Quirk> {
        let fits =
            |quirk: &&Quirk| quirk.driver == driver && quirk.identity.is_none_or(|wanted| wanted == identity);
        QUIRKS.iter().find(fits)
    }

    /// The driver of its VFs.
    pub(super) const fn vf_driver(&self) -> &'static str {
        self.vf_driver
    }

    /// Takes from what the NIC says about itself what is known to be untrue.
    pub(super) fn correct(&self, capabilities: &mut Capabilities) {
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
        let corrected = |identity| {
            let mut capabilities = told();
            Quirk::of("igb", identity).expect("igb is known").correct(&mut capabilities);
            capabilities
        };
        let emulated = corrected("8086:10c9 1af4:1100");
        assert_eq!(emulated.mac_guard, Evidence::Refuted);
        assert_eq!(emulated.rate_max, Evidence::Refuted);
        assert_eq!(emulated.rate_min, Evidence::Missing, "what is not offered stays so");
        assert_eq!(emulated.untagged_only, Evidence::Refuted);
        assert_eq!(corrected("8086:10c9 8086:a03c"), told());
        assert_eq!(Quirk::of("e1000", ""), None);
    }

    #[test]
    fn particular_nics_come_before_their_drivers() {
        for (index, quirk) in QUIRKS.iter().enumerate() {
            let shadows = QUIRKS[..index].iter().any(|other| {
                other.driver == quirk.driver && (other.identity.is_none() || other.identity == quirk.identity)
            });
            assert!(!shadows, "{quirk:?} is never found");
        }
    }
}
