//! A stream of sequence-numbered packets that tells every loss, duplicate and reordering.
//!
//! The sender keeps at most [`WINDOW`] packets in flight, which the kernel's own queues hold, so that whatever is
//! missing was lost on the way and not for want of room at the receiver. It never waits for a lost packet longer than
//! [`STALL`].

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use crate::netns::Netns;
use crate::wait::wait_until;

/// Most packets in flight: below the kernel's backlog of 1 000 packets per CPU.
const WINDOW: u64 = 256;
/// After so long without an arrival the packets in flight count as lost and the sender goes on.
const STALL: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct Shared {
    sent: AtomicU64,
    received: AtomicU64,
    stop: AtomicBool,
    ended: AtomicBool,
}

/// A running stream.
#[derive(Debug)]
pub struct Flow {
    shared: Arc<Shared>,
    sender: JoinHandle<Result<()>>,
    receiver: JoinHandle<Result<Arrivals>>,
    started: Instant,
}

/// What became of a stream.
#[derive(Clone, Copy, Debug)]
pub struct FlowReport {
    /// Packets sent.
    pub sent: u64,
    /// Different packets that arrived.
    pub received: u64,
    /// Packets that arrived again.
    pub duplicated: u64,
    /// Packets that arrived after a later one.
    pub reordered: u64,
    /// Longest time between two arrivals.
    pub longest_gap: Duration,
    /// How long packets were sent.
    pub lasted: Duration,
}

impl FlowReport {
    /// Packets that never arrived.
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }
}

/// Which packets of a stream did not arrive as they were sent, by their numbers from 0.
#[derive(Clone, Debug, Default)]
pub struct FlowTrace {
    /// Those that never arrived.
    pub lost: Vec<u64>,
    /// Those that arrived again; once for each time.
    pub duplicated: Vec<u64>,
    /// Those that arrived after a later one.
    pub reordered: Vec<u64>,
}

#[derive(Debug, Default)]
struct Arrivals {
    seen: Vec<u64>,
    received: u64,
    duplicated: Vec<u64>,
    reordered: Vec<u64>,
    highest: u64,
    longest_gap: Duration,
}

impl Arrivals {
    fn count(&mut self, sequence: u64) {
        let (word, bit) = ((sequence / 64) as usize, 1u64 << (sequence % 64));
        if word >= self.seen.len() {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicated.push(sequence);
            return;
        }
        self.seen[word] |= bit;
        self.received += 1;
        if sequence < self.highest {
            self.reordered.push(sequence);
        }
        self.highest = self.highest.max(sequence);
    }

    fn has(&self, sequence: u64) -> bool {
        self.seen.get((sequence / 64) as usize).is_some_and(|word| word & (1 << (sequence % 64)) != 0)
    }
}

impl Flow {
    /// Starts a stream of UDP datagrams from `from` to `address` in `to`.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn start(from: &Netns, to: &Netns, address: SocketAddr) -> Result<Flow> {
        Flow::start_paced(from, to, address, Duration::ZERO)
    }

    /// The same, with so long between two packets: for wires and machines that would lose some at full speed.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn start_paced(from: &Netns, to: &Netns, address: SocketAddr, pause: Duration) -> Result<Flow> {
        let inbound = to.enter(|| UdpSocket::bind(address).context("binding the receiver"))?;
        // The default holds fewer small packets than a window.
        setsockopt(&inbound, RcvBufForce, &(16 << 20)).context("enlarging the receiver's buffer")?;
        inbound.set_read_timeout(Some(Duration::from_millis(20)))?;
        let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
        let outbound = from.enter(|| UdpSocket::bind(any).context("binding the sender"))?;
        outbound.connect(address)?;
        let shared = Arc::new(Shared::default());
        let sender = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                let outcome = send(&outbound, &shared, pause);
                shared.ended.store(true, Ordering::SeqCst);
                outcome
            })
        };
        let receiver = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || receive(&inbound, &shared))
        };
        Ok(Flow { shared, sender, receiver, started: Instant::now() })
    }

    /// Packets sent so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Packets that have arrived so far.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Waits until so many packets have arrived since it started.
    ///
    /// # Errors
    /// When they do not in time.
    pub fn wait_received(&self, packets: u64, patience: Duration) -> Result<()> {
        wait_until(&format!("{packets} packets have arrived"), patience, || {
            let received = self.received();
            if received >= packets { Ok(Some(())) } else { bail!("{received} of {} sent", self.sent()) }
        })
    }

    /// Stops sending, waits for what is in flight, and counts.
    ///
    /// # Errors
    /// When a socket failed.
    pub fn finish(self) -> Result<FlowReport> {
        self.finish_traced().map(|(report, _)| report)
    }

    /// The same, and which packets it was.
    ///
    /// # Errors
    /// When a socket failed.
    pub fn finish_traced(self) -> Result<(FlowReport, FlowTrace)> {
        let lasted = self.started.elapsed();
        self.shared.stop.store(true, Ordering::SeqCst);
        self.sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        let arrivals = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        let sent = self.shared.sent.load(Ordering::SeqCst);
        let report = FlowReport {
            sent,
            received: arrivals.received,
            duplicated: arrivals.duplicated.len() as u64,
            reordered: arrivals.reordered.len() as u64,
            longest_gap: arrivals.longest_gap,
            lasted,
        };
        let lost = (0..sent).filter(|sequence| !arrivals.has(*sequence)).collect();
        Ok((report, FlowTrace { lost, duplicated: arrivals.duplicated, reordered: arrivals.reordered }))
    }
}

fn send(socket: &UdpSocket, shared: &Shared, pause: Duration) -> Result<()> {
    let mut sequence = 0u64;
    let mut written_off = 0;
    let mut last = (0, Instant::now());
    while !shared.stop.load(Ordering::Relaxed) {
        let received = shared.received.load(Ordering::Relaxed);
        if received != last.0 {
            last = (received, Instant::now());
        }
        if sequence.saturating_sub(received + written_off) >= WINDOW {
            if last.1.elapsed() > STALL {
                written_off = sequence - received;
            }
            std::thread::yield_now();
            continue;
        }
        let mut payload = [0u8; 32];
        payload[..8].copy_from_slice(&sequence.to_be_bytes());
        match socket.send(&payload) {
            Ok(_) => {
                sequence += 1;
                shared.sent.store(sequence, Ordering::Relaxed);
                if pause > Duration::ZERO {
                    std::thread::sleep(pause);
                }
            }
            // Nothing was sent; as when the neighbour is not resolved yet. Try the same number again.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(error) => return Err(error).context("sending"),
        }
    }
    Ok(())
}

fn receive(socket: &UdpSocket, shared: &Shared) -> Result<Arrivals> {
    let mut arrivals = Arrivals::default();
    let mut buffer = [0u8; 64];
    let mut last = None;
    let mut quiet_since = Instant::now();
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) if length >= 8 => {
                let now = Instant::now();
                if let Some(last) = last {
                    arrivals.longest_gap = arrivals.longest_gap.max(now.duration_since(last));
                }
                last = Some(now);
                quiet_since = now;
                let mut sequence = [0; 8];
                sequence.copy_from_slice(&buffer[..8]);
                arrivals.count(u64::from_be_bytes(sequence));
                shared.received.store(arrivals.received, Ordering::Relaxed);
            }
            Ok(length) => return Err(anyhow!("a datagram of {length} bytes")),
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) =>
            {
                // What is in flight arrives within microseconds; this is for a machine that is very busy.
                if shared.ended.load(Ordering::SeqCst) && quiet_since.elapsed() > Duration::from_millis(500) {
                    return Ok(arrivals);
                }
            }
            Err(error) => return Err(error).context("receiving"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_tell_duplicates_and_reordering() {
        let mut arrivals = Arrivals::default();
        for sequence in [0, 1, 3, 2, 2, 200] {
            arrivals.count(sequence);
        }
        assert_eq!(
            (arrivals.received, arrivals.duplicated.as_slice(), arrivals.reordered.as_slice()),
            (5, &[2][..], &[2][..])
        );
        assert!(arrivals.has(200) && !arrivals.has(4) && !arrivals.has(1000));
    }
}
