//! Blocking netlink requests with raw payloads, and what the kernel says when it refuses one (extack).
//!
//! Each socket belongs to the network namespace of the thread that opened it.

pub(crate) mod attr;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use attr::{Read, u32_at};

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG` of linux/netlink.h.
const MESSAGE: u16 = 1;
/// How often a dump is repeated that was overtaken by changes.
const REPEATS: usize = 20;

/// A message as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) kind: u16,
    pub(crate) payload: Vec<u8>,
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.payload.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.payload);
    }
}

impl NetlinkDeserializable for Raw {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Raw { kind: header.message_type, payload: payload.to_vec() })
    }
}

/// Why a request failed.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The error number, or why there was no answer.
    pub(crate) error: io::Error,
    /// The kernel's or the driver's own words, if it said any.
    pub(crate) extack: Option<String>,
}

impl Refusal {
    /// The error number; 0 if there was no answer.
    pub(crate) fn errno(&self) -> i32 {
        self.error.raw_os_error().unwrap_or(0)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.extack {
            Some(extack) => write!(f, "{} ({extack})", self.error),
            None => self.error.fmt(f),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal { error, extack: None }
    }
}

/// A connection to one netlink family.
pub(crate) struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// Connects to a family of [`netlink_sys::protocols`].
    pub(crate) fn open(family: isize) -> io::Result<Connection> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // An error carries only the header of the request, and behind it what the driver says.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        Ok(Connection { socket, sequence: 0 })
    }

    /// From now on, an answer that does not come in this time is an error; otherwise it is waited for.
    pub(crate) fn wait_at_most(&self, patience: Duration) -> io::Result<()> {
        let patience = TimeVal::milliseconds(patience.as_millis().try_into().unwrap_or(i64::MAX));
        Ok(setsockopt(&self.socket, sockopt::ReceiveTimeout, &patience)?)
    }

    /// Asks for a list, again if it changes meanwhile.
    pub(crate) fn dump(&mut self, kind: u16, payload: &[u8]) -> Result<Vec<Raw>, Refusal> {
        let mut attempt = 0;
        loop {
            match self.exchange(kind, payload, NLM_F_DUMP) {
                Err(refusal) if refusal.error.kind() == io::ErrorKind::Interrupted && attempt < REPEATS => {
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    /// Makes a request and waits for its acknowledgement; returns what came before that.
    pub(crate) fn request(&mut self, kind: u16, payload: &[u8], flags: u16) -> Result<Vec<Raw>, Refusal> {
        self.exchange(kind, payload, flags | NLM_F_ACK)
    }

    fn exchange(&mut self, kind: u16, payload: &[u8], flags: u16) -> Result<Vec<Raw>, Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::new(
            NetlinkHeader::default(),
            NetlinkPayload::InnerMessage(Raw { kind, payload: payload.to_vec() }),
        );
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            // The length is peeked at first: of a NIC with hundreds of VFs, one message is longer than most buffers.
            let (buffer, _) = self.socket.recv_from_full()?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let broken = || io::Error::other("the kernel sent a truncated netlink message");
                let length = u32_at(rest, 0).ok_or_else(broken)? as usize;
                let bytes = rest.get(..length).filter(|_| length >= HEADER).ok_or_else(broken)?;
                let message = NetlinkMessage::<Raw>::deserialize(bytes).map_err(io::Error::other)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::Done(_) if interrupted => {
                        return Err(io::Error::from(io::ErrorKind::Interrupted).into());
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(answers),
                        Some(code) => {
                            return Err(Refusal {
                                error: io::Error::from_raw_os_error(-code.get()),
                                extack: extack(&error.header),
                            });
                        }
                    },
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}

/// The words behind the header of the refused request.
fn extack(bytes: &[u8]) -> Option<String> {
    Read::new(bytes.get(HEADER..)?).text(MESSAGE).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::attr::Attributes;
    use super::*;

    #[test]
    fn a_refusal_is_shown_with_the_drivers_words() {
        let bytes = Attributes::after(&[0; HEADER]).put(MESSAGE, b"chain not supported\0").into_bytes();
        let refusal = Refusal {
            error: io::Error::from_raw_os_error(nix::errno::Errno::EOPNOTSUPP as i32),
            extack: extack(&bytes),
        };
        assert!(refusal.to_string().ends_with("(chain not supported)"), "{refusal}");
        assert_eq!(extack(&bytes[..HEADER]), None);
    }

    #[test]
    fn the_kernel_answers() {
        let mut connection = Connection::open(netlink_sys::protocols::NETLINK_ROUTE).expect("a socket");
        // RTM_GETLINK; there is always the loopback interface.
        assert!(!connection.dump(18, &[0; 16]).expect("links").is_empty());
        let refusal = connection.request(18, &[0; 16], 0).expect_err("no interface has index 0");
        assert_ne!(refusal.errno(), 0);
    }
}
