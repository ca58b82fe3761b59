//! What only the ethtool ioctl answers simply: does an interface leave checksums to the receiver, do VLAN tags travel
//! beside the bytes of what it sends and receives?

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `ETHTOOL_GTXCSUM` of `include/uapi/linux/ethtool.h`.
const ETHTOOL_GTXCSUM: u32 = 0x16;
/// `ETHTOOL_GFLAGS`, `ETHTOOL_SFLAGS` and the flags `ETH_FLAG_TXVLAN` and `ETH_FLAG_RXVLAN`, of the same header.
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETH_FLAG_TXVLAN: u32 = 1 << 7;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
/// `SIOCETHTOOL` of `include/uapi/linux/sockios.h`.
const SIOCETHTOOL: u64 = 0x8946;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether the interface with this index in the calling thread's network namespace has transmit checksum offload on.
pub(crate) fn transmit_checksum_offload(ifindex: u32) -> io::Result<bool> {
    Ok(ask(ifindex, ETHTOOL_GTXCSUM, 0)? != 0)
}

/// Whether VLAN tags travel beside the bytes of what it sends.
pub(crate) fn transmit_vlan_offload(ifindex: u32) -> io::Result<bool> {
    Ok(ask(ifindex, ETHTOOL_GFLAGS, 0)? & ETH_FLAG_TXVLAN != 0)
}

/// Whether it hands VLAN tags over beside the bytes of what it receives.
pub(crate) fn receive_vlan_offload(ifindex: u32) -> io::Result<bool> {
    Ok(ask(ifindex, ETHTOOL_GFLAGS, 0)? & ETH_FLAG_RXVLAN != 0)
}

/// Switches that on or off.
pub(crate) fn set_receive_vlan_offload(ifindex: u32, on: bool) -> io::Result<()> {
    let flags = ask(ifindex, ETHTOOL_GFLAGS, 0)? & !ETH_FLAG_RXVLAN;
    ask(ifindex, ETHTOOL_SFLAGS, if on { flags | ETH_FLAG_RXVLAN } else { flags })?;
    // A driver may leave a feature as it is without saying so.
    if receive_vlan_offload(ifindex)? == on {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}

/// Gives a command with a number to the interface, and returns the number that it leaves.
fn ask(ifindex: u32, command: u32, data: u32) -> io::Result<u32> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE bytes that the function may write.
    if unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    let name =
        CString::from_vec_with_nul(name.split_inclusive(|byte| *byte == 0).next().unwrap_or(b"\0").to_vec())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: no addresses are passed.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut value = Value { command, data };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes_with_nul()) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
    // SAFETY: the request holds a zero-terminated name and the address of a live ethtool_value, which is what
    // these commands read and write.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.data)
}
