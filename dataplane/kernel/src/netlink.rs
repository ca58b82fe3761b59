//! Blocking netlink requests: one socket, one request at a time.
//!
//! Each socket belongs to the network namespace of the thread that opened it.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// Room for one datagram. The kernel fills at most 32 KiB of a dump at a time.
const BUFFER: usize = 64 * 1024;

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
        // Without it, an error carries the whole request back.
        socket.set_cap_ack(true)?;
        Ok(Connection { socket, sequence: 0 })
    }

    /// Asks for a list. Messages that cannot be decoded are left out, with a warning.
    ///
    /// # Errors
    /// [`io::ErrorKind::Interrupted`] if what is listed changed meanwhile, so that something may be missing.
    pub(crate) fn dump<T>(&mut self, message: T) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug,
    {
        self.exchange(message, NLM_F_DUMP)
    }

    /// Makes a request and waits for its acknowledgement; returns what came before that.
    pub(crate) fn request<T>(&mut self, message: T, flags: u16) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug,
    {
        self.exchange(message, flags | NLM_F_ACK)
    }

    fn exchange<T>(&mut self, message: T, flags: u16) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::InnerMessage(message));
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while rest.len() >= size_of::<libc::nlmsghdr>() {
                let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if length < size_of::<libc::nlmsghdr>() || length > rest.len() {
                    return Err(io::Error::other("the kernel sent a truncated netlink message"));
                }
                match NetlinkMessage::<T>::deserialize(&rest[..length]) {
                    Ok(message) if message.header.sequence_number != self.sequence => {}
                    Ok(message) => {
                        interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                        match message.payload {
                            NetlinkPayload::Done(_) if interrupted => {
                                return Err(io::ErrorKind::Interrupted.into());
                            }
                            NetlinkPayload::Done(_) => return Ok(answers),
                            NetlinkPayload::Error(error) => match error.code {
                                None => return Ok(answers),
                                Some(code) => return Err(io::Error::from_raw_os_error(-code.get())),
                            },
                            NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                            _ => {}
                        }
                    }
                    Err(error) => tracing::warn!(%error, "a netlink message could not be decoded"),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}
