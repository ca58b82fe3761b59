//! What ioctls answer simply: does an interface leave checksums to the receiver, do VLAN tags travel beside the bytes of
//! what it sends and receives, by how many queues does it receive, what is
//! its driver?

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `ETHTOOL_GDRVINFO` of `include/uapi/linux/ethtool.h`.
const ETHTOOL_GDRVINFO: u32 = 0x03;
/// `ETHTOOL_GTXCSUM` of `include/uapi/linux/ethtool.h`.
const ETHTOOL_GTXCSUM: u32 = 0x16;
/// `ETHTOOL_GFLAGS`, `ETHTOOL_SFLAGS` and the flags `ETH_FLAG_TXVLAN` and `ETH_FLAG_RXVLAN`, of the same header.
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETH_FLAG_TXVLAN: u32 = 1 << 7;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
/// `ETHTOOL_GCHANNELS`, of the same header.
const ETHTOOL_GCHANNELS: u32 = 0x3c;
/// `SIOCETHTOOL` of `include/uapi/linux/sockios.h`.
const SIOCETHTOOL: u64 = 0x8946;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ethtool_channels`.
#[derive(Default)]
#[repr(C)]
struct Channels {
    command: u32,
    /// The most that there can be: receive, transmit, other, combined.
    most: [u32; 4],
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    /// Versions, places, and numbers of other tables.
    rest: [u8; 160],
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

/// How many queues it receives by, now.
pub(crate) fn receive_queues(ifindex: u32) -> io::Result<u32> {
    let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    let mut request = request_for(ifindex)?;
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut channels).cast();
    // SAFETY: the request holds the address of a live ethtool_channels, which is what this command reads and writes.
    match unsafe { control(SIOCETHTOOL, &mut request) } {
        Ok(()) => Ok((channels.receive + channels.combined).max(1)),
        // It has one, and nothing to choose.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(1),
        Err(error) => Err(error),
    }
}

/// Whether its driver, said to take redirected frames, takes them whichever CPU sends them. Many use the queue that has the CPU's
/// number, and refuse where there is none (i40e, mlx5), of which nobody hears; a veth finds one.
pub(crate) fn takes_from_any_cpu(ifindex: u32) -> io::Result<bool> {
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
    let mut request = request_for(ifindex)?;
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut info).cast();
    // SAFETY: the request holds the address of a live ethtool_drvinfo, which is what this command reads and writes.
    match unsafe { control(SIOCETHTOOL, &mut request) } {
        Ok(()) => Ok(info.driver.starts_with(b"veth\0")),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Its MTU.
pub(crate) fn mtu(ifindex: u32) -> io::Result<u32> {
    let mut request = request_for(ifindex)?;
    // SAFETY: the request has a name; the kernel writes a number.
    unsafe { control(libc::SIOCGIFMTU, &mut request) }?;
    // SAFETY: that number is what it has written.
    Ok(unsafe { request.ifr_ifru.ifru_mtu } as u32)
}

/// Gives a command with a number to the interface, and returns the number that it leaves.
fn ask(ifindex: u32, command: u32, data: u32) -> io::Result<u32> {
    let mut value = Value { command, data };
    let mut request = request_for(ifindex)?;
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
    // SAFETY: the request holds the address of a live ethtool_value, which is what these commands read and write.
    unsafe { control(SIOCETHTOOL, &mut request) }?;
    Ok(value.data)
}

/// A request about an interface.
fn request_for(ifindex: u32) -> io::Result<libc::ifreq> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE bytes that the function may write.
    if unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Carries a request out.
///
/// # Safety
/// Whatever address is in the request must be valid for what the operation reads or writes there.
unsafe fn control(operation: u64, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: no addresses are passed.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the request is alive, its name ends with a zero, and the caller vouches for the rest.
    if unsafe { libc::ioctl(socket.as_raw_fd(), operation as _, request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
