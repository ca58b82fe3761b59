//! Packet sockets (packet(7)) for the probe's frames alone, with the tags that the kernel takes out of frames.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

/// An ethertype that nobody answers (IEEE 802 local experimental).
pub(super) const ETHERTYPE: u16 = 0x88b5;
/// Room for what arrives while nobody looks.
const SOCKET_BUFFER: usize = 4 << 20;
/// `PACKET_IGNORE_OUTGOING` of linux/if_packet.h; from kernel 4.20.
const IGNORE_OUTGOING: libc::c_int = 23;

/// Takes frames of our ethertype behind up to two tags, and nothing else (linux/filter.h, classic BPF).
const FILTER: [libc::sock_filter; 11] = {
    const HALF_WORD: u16 = 0x28;
    const EQUALS: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const fn op(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }
    let ours = ETHERTYPE as u32;
    [
        op(HALF_WORD, 0, 0, 12),
        op(EQUALS, 7, 0, ours),
        op(EQUALS, 1, 0, 0x8100),
        op(EQUALS, 0, 6, 0x88a8),
        op(HALF_WORD, 0, 0, 16),
        op(EQUALS, 3, 0, ours),
        op(EQUALS, 0, 3, 0x8100),
        op(HALF_WORD, 0, 0, 20),
        op(EQUALS, 0, 1, ours),
        op(RETURN, 0, 0, u32::MAX),
        op(RETURN, 0, 0, 0),
    ]
};

/// A packet socket on one interface.
#[derive(Debug)]
pub(super) struct Packets(OwnedFd);

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A frame that arrived: what the kernel took out of it, and the rest.
pub(super) struct Received<'a> {
    /// Tag control information of the tag that was taken out.
    pub(super) tag: Option<u16>,
    pub(super) bytes: &'a [u8],
}

impl Packets {
    /// Opens one on an interface of the calling thread's network namespace; it stays there.
    pub(super) fn open(ifindex: u32) -> io::Result<Packets> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // With protocol 0 nothing arrives before there is a filter.
        // SAFETY: no pointers are passed.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let program = libc::sock_fprog {
            len: FILTER.len() as u16,
            // The kernel only reads it.
            filter: FILTER.as_ptr().cast_mut(),
        };
        set(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        let on: libc::c_int = 1;
        set(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &on)?;
        set(&socket, libc::SOL_PACKET, IGNORE_OUTGOING, &on)?;
        setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER)?;
        // SAFETY: all-zero bytes are a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = ifindex as i32;
        // SAFETY: the address is a live sockaddr_ll of the length that is passed.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(Packets(socket)) }
    }

    /// Sends a frame, as it is; `false` if there is no room for it now.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<bool> {
        match send(self.0.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What has arrived, if something has.
    pub(super) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<Received<'a>>> {
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // Room for the one control message, aligned as its header wants it.
        let mut control = [0u64; 16];
        // SAFETY: all-zero bytes are a valid msghdr.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: the message points to a buffer and a control buffer that outlive the call, with their true lengths.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if length < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        let tag = stripped_tag(&message);
        let length = usize::try_from(length).unwrap_or(0).min(buffer.len());
        Ok(Some(Received { tag, bytes: &buffer[..length] }))
    }
}

/// The tag in the control messages of a message that was just received.
fn stripped_tag(message: &libc::msghdr) -> Option<u16> {
    // SAFETY: the kernel has filled the message's control buffer, which is alive, and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, so it points to a whole header inside the control buffer.
        let kind = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if kind == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            // SAFETY: a message of this kind carries a tpacket_auxdata; it may be unaligned.
            let data: libc::tpacket_auxdata =
                unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
            return (data.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(data.tp_vlan_tci);
        }
        // SAFETY: both pointers are of this message.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    None
}

/// Sets a socket option of plain data.
fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value outlives the call, and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
