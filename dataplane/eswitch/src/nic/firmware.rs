//! The version of a NIC's firmware, which for many drivers only the ethtool ioctl tells (`ethtool -i`).

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: u64 = 0x8946;
/// `ETHTOOL_GDRVINFO` of linux/ethtool.h.
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo`, of which only the firmware's version is of interest.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    rest: [u8; 96],
}

const _: () = assert!(size_of::<DriverInfo>() == 196, "as long as the kernel's, or it writes behind ours");

/// What the driver of the interface says; empty if it does not.
pub(crate) fn version(netdev: &str) -> String {
    ask(netdev).unwrap_or_default()
}

fn ask(netdev: &str) -> Option<String> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok()?;
    let mut info = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        rest: [0; 96],
    };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if netdev.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(netdev.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut info).cast();
    // SAFETY: the request holds a zero-terminated name, since that is shorter than its field, and the address of a live
    // ethtool_drvinfo, which is what this command writes.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &mut request) } < 0 {
        return None;
    }
    let length = info.firmware.iter().position(|byte| *byte == 0).unwrap_or(info.firmware.len());
    Some(String::from_utf8_lossy(&info.firmware[..length]).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_firmware_has_no_version() {
        assert_eq!(version("lo"), "");
        assert_eq!(version("a-name-that-is-longer-than-any"), "");
        assert_eq!(version(""), "");
    }
}
