//! Tags in front of XDP: a NIC may take a frame's VLAN tag out of its bytes and hand it over beside them, where XDP does
//! not see it. A tagged frame would pass for an untagged one, in another VLAN. So uplinks with XDP keep tags in the bytes.
//!
//! What we switch off we switch on again, also in another life of the daemon: a directory `PIN_DIR/rxvlan/IFINDEX`
//! stands for it.
//!
//! Measured on igb of Linux 7.2, whose receive VLAN offload is on at first: its XDP programs get frames without tags.

use std::collections::BTreeSet;
use std::fs;

use crate::EngineError;
use crate::ethtool;
use crate::links::{Link, Links};
use crate::pins::Pins;

/// Makes a NIC leave tags in the bytes; says whether there was anything to do.
///
/// # Errors
/// [`EngineError::Io`] when the driver does not tell or refuses: then XDP must not serve this interface.
pub(crate) fn switch_off(link: &Link, pins: &Pins) -> Result<bool, EngineError> {
    let name = &link.view.name;
    let ifindex = link.view.ifindex;
    let is_on = ethtool::receive_vlan_offload(ifindex)
        .map_err(EngineError::io(format!("reading the receive VLAN offload of {name}")))?;
    if !is_on {
        return Ok(false);
    }
    // The mark first: at worst, an offload is switched on that nobody had switched off.
    let mark = pins.receive_vlan().join(ifindex.to_string());
    fs::create_dir_all(&mark).map_err(EngineError::io(format!("making {}", mark.display())))?;
    ethtool::set_receive_vlan_offload(ifindex, false)
        .map_err(EngineError::io(format!("switching the receive VLAN offload of {name} off")))?;
    Ok(true)
}

/// Switches on again what was switched off for interfaces that are not among those kept. Says what it did.
pub(crate) fn restore(kept: &BTreeSet<u32>, links: &Links, pins: &Pins) -> Result<Vec<String>, EngineError> {
    let mut done = Vec::new();
    let directory = pins.receive_vlan();
    // Without the directory nothing was ever switched off.
    for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
        let Some(ifindex) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if kept.contains(&ifindex) {
            continue;
        }
        if let Some(link) = links.by_ifindex(ifindex) {
            match ethtool::set_receive_vlan_offload(ifindex, true) {
                Ok(()) => {
                    done.push(format!("switched the receive VLAN offload of {} on again", link.view.name))
                }
                // Frames are right either way.
                Err(error) => tracing::warn!(%error, link.view.name, "its receive VLAN offload stays off"),
            }
        }
        let mark = directory.join(ifindex.to_string());
        fs::remove_dir(&mark).map_err(EngineError::io(format!("removing {}", mark.display())))?;
    }
    Ok(done)
}
