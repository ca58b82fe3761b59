//! Who else may be using a VF, or the PF, as far as the host shows: somebody else's VF is not ours to grant.

use std::fs;
use std::path::Path;

use crate::contract::Vf;

const NET: &str = "/sys/class/net";
/// `IFF_UP` of linux/if.h.
const IFF_UP: u32 = 1;

/// Whether an interface is administratively up; `None` if it is not there.
pub fn is_up(netdev: &str) -> Option<bool> {
    flags(Path::new(NET), netdev).map(|flags| flags & IFF_UP != 0)
}

/// Why a VF that no vNIC of ours holds is not free, if it is not.
pub fn occupant(vf: &Vf) -> Option<String> {
    occupant_below(Path::new(NET), vf)
}

fn occupant_below(net: &Path, vf: &Vf) -> Option<String> {
    let index = vf.index;
    match (&vf.driver, &vf.netdev) {
        (Some(driver), None) if driver == "vfio-pci" => {
            Some(format!("{index} is bound to vfio-pci: somebody passes it to a VM"))
        }
        (Some(driver), None) => Some(format!(
            "{index} has the driver {driver}, and no interface in this network namespace: somebody has moved it away"
        )),
        (_, Some(netdev)) if flags(net, netdev).is_some_and(|flags| flags & IFF_UP != 0) => {
            Some(format!("{netdev}, the interface of {index}, is up: somebody uses it"))
        }
        _ => None,
    }
}

fn flags(net: &Path, netdev: &str) -> Option<u32> {
    let text = fs::read_to_string(net.join(netdev).join("flags")).ok()?;
    u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::VfIndex;

    #[test]
    fn what_is_bound_moved_or_up_is_somebody_elses() {
        let net = tempfile::tempdir().expect("a folder");
        for (netdev, flags) in [("vf-up", "0x1003"), ("vf-down", "0x1002")] {
            fs::create_dir(net.path().join(netdev)).expect("a folder");
            fs::write(net.path().join(netdev).join("flags"), flags).expect("a file");
        }
        let vf = |driver: Option<&str>, netdev: Option<&str>| Vf {
            index: VfIndex(1),
            pci: None,
            netdev: netdev.map(str::to_owned),
            driver: driver.map(str::to_owned),
        };
        for (driver, netdev, is_free) in [
            (None, None, true),
            (Some("igbvf"), Some("vf-down"), true),
            (Some("igbvf"), Some("vf-up"), false),
            (Some("igbvf"), None, false),
            (Some("vfio-pci"), None, false),
        ] {
            let occupant = occupant_below(net.path(), &vf(driver, netdev));
            assert_eq!(occupant.is_none(), is_free, "{driver:?} {netdev:?}: {occupant:?}");
        }
    }
}
