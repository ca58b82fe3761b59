//! A machine with an IP stack, at one end of a link: smoltcp over a memory port.

use std::sync::Arc;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

use super::MemoryTransmit;
use crate::frame::{Frame, Pool, Region};
use crate::port::{Batch, Receive, Transmit};

/// Bytes of the longest frame that it sends: MTU 1500.
const FRAME_MAX: usize = 1514;

/// A machine.
pub struct Guest {
    interface: Interface,
    nic: Nic,
    /// Its sockets.
    pub sockets: SocketSet<'static>,
}

/// Its network card.
struct Nic {
    receive: Box<dyn Receive>,
    transmit: MemoryTransmit,
    pool: Pool,
    received: Batch,
}

impl Guest {
    /// A machine with one address of each kind given. Its card takes plain frames only.
    pub fn new(
        receive: impl Receive + 'static,
        transmit: MemoryTransmit,
        region: &Arc<Region>,
        mac: [u8; 6],
        addresses: &[IpCidr],
        seed: u64,
    ) -> Guest {
        let pool = Pool::new(region);
        let mut nic = Nic { receive: Box::new(receive), transmit, pool, received: Batch::new() };
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut nic, Instant::ZERO);
        interface.update_ip_addrs(|list| {
            for address in addresses {
                let _ = list.push(*address); // more than the stack has room for are left out
            }
        });
        Guest { interface, nic, sockets: SocketSet::new(Vec::new()) }
    }

    /// Does what there is to do at `now`, in microseconds of any clock that goes forward.
    pub fn poll(&mut self, now: i64) {
        self.interface.poll(Instant::from_micros(now), &mut self.nic, &mut self.sockets);
    }

    /// The stack, and the sockets that it works with: to open connections.
    pub fn stack(&mut self) -> (&mut Interface, &mut SocketSet<'static>) {
        (&mut self.interface, &mut self.sockets)
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guest({})", self.interface.hardware_addr())
    }
}

/// A frame that was received.
struct Received(Frame);
/// A frame to be sent.
struct Sending<'a>(&'a mut MemoryTransmit, &'a mut Pool);

impl Device for Nic {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sending<'_>)> {
        if self.received.is_empty() {
            self.receive.receive(&mut self.pool, &mut self.received);
            // Taken from the end below, in the order in which they came.
            self.received.frames_mut().reverse();
        }
        let frame = self.received.pop()?;
        Some((Received(frame), Sending(&mut self.transmit, &mut self.pool)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.transmit, &mut self.pool))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0.bytes())
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let Sending(transmit, pool) = self;
        let Some(mut frame) = pool.take(length) else {
            return write(&mut vec![0; length]); // lost, as by a card without memory
        };
        frame.spare_mut()[..length].fill(0);
        frame.advance(length);
        let result = write(frame.bytes_mut());
        let mut batch = Batch::new();
        batch.push(frame);
        transmit.transmit(pool, &mut batch);
        transmit.flush();
        result
    }
}
