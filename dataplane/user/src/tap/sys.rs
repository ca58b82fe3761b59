//! The calls that make a tap. The only place here where the kernel is given pointers.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketType, socket};

/// What the kernel may hand us in one piece: super-frames of TCP, with ECN too, and checksums still to be filled in.
const OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// A request about this interface; `None` if the name is too long.
fn request(name: &str) -> Option<libc::ifreq> {
    // SAFETY: an ifreq is plain bytes, of which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return None;
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    Some(request)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes a tap that lives as long as what is answered, with more flags; answers its name, too. `%d` in it stands for a number that
/// the kernel chooses.
fn make(name: &str, more: libc::c_int) -> io::Result<(OwnedFd, String)> {
    let too_long = || io::Error::from_raw_os_error(libc::ENAMETOOLONG);
    // The kernel runs XDP on pages only if it need not wait.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open("/dev/net/tun", flags, Mode::empty())?;
    let mut request = request(name).ok_or_else(too_long)?;
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL | more) as libc::c_short;
    // SAFETY: the kernel reads and writes the ifreq, which lives through the call.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    Ok((file, String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned()))
}

/// Makes a tap whose frames are as they are.
pub(super) fn make_plain(name: &str) -> io::Result<(OwnedFd, String)> {
    make(name, 0)
}

/// Makes a tap with a virtio-net header of so many bytes before each frame.
pub(super) fn make_with_headers(name: &str, header: usize) -> io::Result<OwnedFd> {
    let (file, _) = make(name, libc::IFF_VNET_HDR)?;
    let header = header as libc::c_int;
    // SAFETY: the kernel reads the integer, which lives through the call.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
    // SAFETY: the offloads are passed by value.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(OFFLOADS)) })?;
    Ok(file)
}

/// Sets an interface up.
pub(super) fn set_up(name: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut request = request(name).ok_or_else(|| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?;
    // SAFETY: the kernel writes the flags into the ifreq, which lives through the call.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the kernel has just set the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads the ifreq, which lives through the call.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}
