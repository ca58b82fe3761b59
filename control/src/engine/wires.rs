//! Uplinks that the userspace engine serves without the trunk, by AF_XDP sockets on their receive queues.
//!
//! The kernel engine's XDP does with a frame for a guest with rings all that it does with one for the trunk, and hands it to the
//! socket of its queue, if that has one, instead of the tap. So sockets are further queues of the trunk, and what comes by
//! them has been decided on already. The other way the uplink is a port of the userspace engine's, where lowering says so.
//!
//! The kernel copies frames into sockets and out of them; to a driver that takes frames that XDP redirects, the latter goes by a shorter
//! way than a socket's. Drivers that would not have to copy cannot be told from those that cut
//! frames with chunks as short as ours: igb takes receive buffers in steps of 1 KiB, of our 1 792 bytes it uses 1 024, and the
//! rest of every longer frame comes as a frame of its own, guards and rules notwithstanding. Nor is a queue that copies reset
//! when its socket goes, which others on it would notice.
//!
//! Sockets are opened and closed by the thread that owns the engine, which alone has the capabilities for it.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use sluice_kernel::EngineError;
use sluice_pipeline::tables::STEERED_QUEUES;
use sluice_user::port::Transmit;
use sluice_user::workers::{QueueId, WorkersError};
use sluice_user::xdp::{self, ONE_CHUNK, XdpError, XdpKeeper, XdpMode, XdpOptions, XdpQueue};

use super::user::Running;

/// Most sockets of a host. Each holds up to [`ENTRIES`] chunks for what is to come, as many that have come, and as many to be
/// sent; the region has room for them.
const SOCKETS_MAX: usize = 4;
/// Entries of each ring.
const ENTRIES: u32 = 1024;
/// Bytes of an Ethernet header with two tags.
const HEADER: usize = 22;
/// How long an uplink that could not be opened is left alone.
const RETRY: Duration = Duration::from_secs(30);
/// How long workers may take to let go of a socket: they do between two batches.
const LETTING_GO: Duration = Duration::from_secs(2);

/// An uplink that can be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wire {
    /// Number of the uplink's port.
    pub uplink: u32,
    /// Number of the port of its switch's trunk, which is served.
    pub trunk: u32,
    /// Interface index.
    pub ifindex: u32,
    /// Queues that it receives by.
    pub queues: u32,
    /// MTU.
    pub mtu: u32,
    /// Its driver takes frames that XDP redirects to it, at present, whichever CPU sends them.
    pub redirect: bool,
}

/// What was done about uplinks, and how they are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireReport {
    /// What was opened or closed, one line each; none on a second pass.
    pub changes: Vec<String>,
    /// How each uplink is served, by the number of its port.
    pub notes: BTreeMap<u32, Vec<String>>,
}

/// Brings what a queue of a port receives to a socket.
pub type Steer<'a> = dyn FnMut(u32, u32, BorrowedFd<'_>) -> Result<(), EngineError> + 'a;

/// Why an uplink is not served.
#[derive(Debug, thiserror::Error)]
enum WireError {
    #[error(transparent)]
    Xdp(#[from] XdpError),
    #[error(transparent)]
    Workers(#[from] WorkersError),
    #[error(transparent)]
    Steer(#[from] EngineError),
    #[error(
        "its MTU of {0} does not fit one chunk, and its driver has no others; an MTU of up to {most} does",
        most = ONE_CHUNK - HEADER
    )]
    Mtu(u32),
    #[error("all {SOCKETS_MAX} sockets are in use")]
    Sockets,
}

/// An uplink that is served.
#[derive(Debug)]
struct Open {
    wire: Wire,
    /// By queue.
    sockets: Vec<XdpKeeper>,
    /// Why not all queues have one.
    rest: Option<String>,
}

/// All of them, by number of their ports.
#[derive(Debug, Default)]
pub(super) struct Wires {
    open: BTreeMap<u32, Open>,
    failed: BTreeMap<u32, (Wire, String, Instant)>,
}

impl Wires {
    /// Serves these uplinks, and no others.
    pub(super) fn serve(&mut self, running: &Running, wires: &[Wire], steer: &mut Steer<'_>) -> WireReport {
        let mut report = WireReport {
            changes: self.close_others(running, |wire| wires.contains(wire)),
            ..WireReport::default()
        };
        self.failed.retain(|_, (wire, _, since)| wires.contains(wire) && since.elapsed() < RETRY);
        for wire in wires {
            if !self.open.contains_key(&wire.uplink) && !self.failed.contains_key(&wire.uplink) {
                match self.open(running, wire, steer) {
                    Ok(change) => report.changes.push(change),
                    Err(error) => {
                        let failed = (wire.clone(), error.to_string(), Instant::now());
                        self.failed.insert(wire.uplink, failed);
                    }
                }
            }
        }
        for (uplink, open) in &self.open {
            report.notes.insert(*uplink, open.notes());
        }
        for (uplink, (_, error, _)) in &self.failed {
            report.notes.insert(*uplink, vec![by_tap(error)]);
        }
        report
    }

    /// Uplinks that are served.
    pub(super) fn uplinks(&self) -> impl Iterator<Item = u32> {
        self.open.keys().copied()
    }

    /// Closes all but those that are kept; says which.
    pub(super) fn close_others(&mut self, running: &Running, is_kept: impl Fn(&Wire) -> bool) -> Vec<String> {
        let over: Vec<u32> =
            self.open.values().filter(|open| !is_kept(&open.wire)).map(|open| open.wire.uplink).collect();
        over.into_iter()
            .filter_map(|uplink| self.open.remove(&uplink))
            .map(|open| {
                let change = format!("interface {} is not served by AF_XDP any more", open.wire.ifindex);
                open.close(running);
                change
            })
            .collect()
    }

    fn open(&mut self, running: &Running, wire: &Wire, steer: &mut Steer<'_>) -> Result<String, WireError> {
        let used: usize = self.open.values().map(|open| open.sockets.len()).sum();
        let room = SOCKETS_MAX.saturating_sub(used).min(STEERED_QUEUES as usize);
        if room == 0 {
            return Err(WireError::Sockets);
        }
        let wanted = wire.queues as usize;
        let mut open = Open { wire: wire.clone(), sockets: Vec::new(), rest: None };
        let mut queues = Vec::new();
        for number in 0..wire.queues.min(room as u32) {
            match open_queue(running, wire, number) {
                Ok(queue) => queues.push(queue),
                Err(error) if number > 0 => {
                    open.rest = Some(error.to_string());
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if queues.len() < wanted && open.rest.is_none() {
            open.rest = Some(WireError::Sockets.to_string());
        }
        let mut ways_out: Vec<Box<dyn Transmit>> = Vec::new();
        let mut placed = Ok(());
        for (number, queue) in (0..).zip(queues) {
            open.sockets.push(queue.keeper());
            ways_out.push(Box::new(queue.transmit));
            if placed.is_ok() {
                placed =
                    running.workers.place_anywhere(open.queue(number), Box::new(queue.receive)).map(drop);
            }
        }
        if let Err(error) = placed {
            drop(ways_out);
            open.close(running);
            return Err(error.into());
        }
        running.engine.attach(wire.uplink, ways_out);
        // Last: whatever comes is served.
        let steered = (0..)
            .zip(&open.sockets)
            .try_for_each(|(number, keeper)| steer(wire.uplink, number, keeper.socket()));
        if let Err(error) = steered {
            open.close(running);
            return Err(error.into());
        }
        let change = format!("serves interface {} by {}", wire.ifindex, open.how());
        self.open.insert(wire.uplink, open);
        Ok(change)
    }
}

/// Opens the socket of one queue.
fn open_queue(running: &Running, wire: &Wire, number: u32) -> Result<XdpQueue, WireError> {
    let longest = wire.mtu as usize + HEADER;
    let options = XdpOptions { entries: ENTRIES, zero_copy: false, longest, redirect: wire.redirect };
    let queue = xdp::open(wire.ifindex, number, &running.region, &options)?;
    if longest > ONE_CHUNK && !queue.mode().multi_buffer {
        return Err(WireError::Mtu(wire.mtu));
    }
    Ok(queue)
}

/// What the note of an uplink with sockets begins with.
pub(super) const SERVED: &str = "guests with rings: ";

/// What is to be said of an uplink without sockets.
pub(super) fn by_tap(reason: &str) -> String {
    format!("its frames for guests with rings take the tap: {reason}")
}

impl Open {
    /// The queue of a socket: the trunk's first is its tap.
    fn queue(&self, number: u16) -> QueueId {
        QueueId { port: self.wire.trunk, queue: 1 + number }
    }

    fn close(self, running: &Running) {
        running.engine.detach(self.wire.uplink);
        for number in 0..self.sockets.len() as u16 {
            // One that was never placed, or whose worker has died, is not given back.
            let _ = running.workers.remove(self.queue(number));
        }
        let deadline = Instant::now() + LETTING_GO;
        while !self.sockets.iter().all(XdpKeeper::is_alone) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How it is served, in words.
    fn how(&self) -> String {
        let mode = match self.sockets.first().map(XdpKeeper::mode) {
            Some(XdpMode { zero_copy: true, .. }) => "zero-copy",
            _ => "copy mode",
        };
        let count = self.sockets.len();
        let is_redirected = self.sockets.iter().all(|keeper| keeper.mode().redirect);
        let out = if is_redirected { ", sent by XDP redirect" } else { "" };
        format!("AF_XDP, {mode}, {count} queue{}{out}", if count == 1 { "" } else { "s" })
    }

    fn notes(&self) -> Vec<String> {
        let mut first = format!("{SERVED}{}", self.how());
        if let Some(reason) = &self.rest {
            first.push_str(&format!(" of {}; the others take the tap: {reason}", self.wire.queues));
        }
        let mut notes = vec![first];
        let statistics = self.sockets.iter().filter_map(|keeper| keeper.statistics().ok());
        let lost: u64 = statistics
            .map(|counted| counted.rx_dropped + counted.rx_ring_full + counted.rx_fill_ring_empty_descs)
            .sum();
        if lost > 0 {
            notes.push(format!("frames lost at its AF_XDP sockets, as workers were too slow: {lost}"));
        }
        notes
    }
}

#[cfg(test)]
mod tests;
