//! The system calls that the lab needs and no safe crate offers: packet sockets and taps.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;

/// A tag that the kernel took out of a frame, as in the auxiliary data of a packet socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StrippedTag {
    pub(crate) tpid: u16,
    pub(crate) tci: u16,
}

fn check(result: libc::c_int, what: &'static str) -> Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()).context(what) } else { Ok(result) }
}

/// Sets an integer socket option.
pub(crate) fn set_option(socket: RawFd, level: i32, option: i32, value: i32) -> Result<()> {
    // SAFETY: `value` outlives the call and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            socket,
            level,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    check(result, "setsockopt").map(drop)
}

/// Opens a packet socket for all protocols on one interface of the calling thread's namespace.
pub(crate) fn open_packet(interface: &str) -> Result<OwnedFd> {
    let index = if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no pointers are passed.
    let socket =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
    let socket = check(socket, "opening a packet socket")?;
    // SAFETY: the descriptor has just been opened and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    // SAFETY: the address is a sockaddr_ll of the length that is passed.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    check(result, "binding a packet socket")?;
    Ok(socket)
}

/// Receives one frame without waiting: its length and the tag that the kernel took out. `None` when there is none.
pub(crate) fn receive_packet(
    socket: RawFd,
    buffer: &mut [u8],
) -> Result<Option<(usize, Option<StrippedTag>)>> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // Room for the one control message, aligned as its header wants it.
    let mut control = [0u64; 16];
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message points to a buffer and a control buffer that outlive the call, with their true lengths.
    let length = unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error).context("receiving from a packet socket"),
        };
    }
    let mut tag = None;
    // SAFETY: the kernel has filled the control buffer and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: not null, so it points to a whole header inside the control buffer.
        let kind = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if kind == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            // SAFETY: a message of this kind carries a tpacket_auxdata; it may be unaligned.
            let data: libc::tpacket_auxdata =
                unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
            if data.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                tag = Some(StrippedTag { tpid: data.tp_vlan_tpid, tci: data.tp_vlan_tci });
            }
        }
        // SAFETY: both pointers are of this message.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(Some((length as usize, tag)))
}

/// Opens a tap of the calling thread's namespace, as a hypervisor does; it is created if it does not exist and, unless
/// made persistent elsewhere, goes away when closed.
pub(crate) fn open_tap(name: &str) -> Result<OwnedFd> {
    tap(name, libc::IFF_TAP | libc::IFF_NO_PI)
}

/// As [`open_tap`], with a virtio-net header of 12 bytes before each frame; the kernel hands over what these `TUN_F_…`
/// allow.
pub(crate) fn open_vnet_tap(name: &str, offloads: u32) -> Result<OwnedFd> {
    let device = tap(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    let length: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const length) };
    check(result, "TUNSETVNETHDRSZ")?;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offloads)) };
    check(result, "TUNSETOFFLOAD")?;
    Ok(device)
}

fn tap(name: &str, flags: libc::c_int) -> Result<OwnedFd> {
    let device =
        std::fs::File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    anyhow::ensure!(name.len() < request.ifr_name.len(), "interface name {name} is too long");
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    check(result, "TUNSETIFF")?;
    Ok(OwnedFd::from(device))
}
