//! Bystanders: two ends that send each other numbered frames, a few at a time, while others come, go and misbehave.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use sluice_tests::PacketSocket;
use sluice_tests::wire::{Mac, note};

use crate::guest::Guest;

/// Most frames on their way in one direction: queues on the way hold more, so none has to be lost for want of room.
const WINDOW: usize = 48;
/// Most frames sent between two looks.
const BURST: usize = 8;
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(300);
/// A frame that takes longer is written off for now, and sending goes on without it; it may still arrive.
const STALL: Duration = Duration::from_secs(2);
/// What every numbered frame says first.
const MARK: &str = "sluice soak ";
/// Where the text of a note begins.
const TEXT: usize = 14;

/// One end of a pair.
pub(crate) enum End {
    /// Rings.
    Rings(Box<Guest>),
    /// An interface.
    Wire(PacketSocket),
}

impl End {
    fn send(&mut self, frame: &[u8]) -> Result<bool> {
        match self {
            End::Rings(guest) => Ok(guest.send(0, [0; 12], frame)),
            End::Wire(socket) => socket.send(frame).map(|()| true),
        }
    }

    fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        match self {
            End::Rings(guest) => {
                let mut frame = None;
                for pair in 0..guest.pairs() {
                    frame = frame.or_else(|| guest.receive(pair));
                }
                Ok(frame)
            }
            End::Wire(socket) => socket.receive(Duration::ZERO),
        }
    }

    fn flush(&mut self) {
        if let End::Rings(guest) = self {
            guest.flush();
        }
    }

    fn is_alone(&self) -> bool {
        matches!(self, End::Rings(guest) if guest.is_alone())
    }
}

/// What became of the frames of a pair, in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Sent.
    pub(crate) sent: u64,
    /// Never arrived.
    pub(crate) lost: u64,
    /// Arrived again.
    pub(crate) doubled: u64,
    /// Arrived with other bytes than it was sent with.
    pub(crate) spoilt: u64,
}

/// One direction.
struct Stream {
    from: Mac,
    to: Mac,
    next: u64,
    on_the_way: BTreeSet<u64>,
    written_off: BTreeSet<u64>,
    doubled: u64,
    spoilt: u64,
    last_arrival: Instant,
}

impl Stream {
    fn new(from: Mac, to: Mac) -> Stream {
        Stream {
            from,
            to,
            next: 0,
            on_the_way: BTreeSet::new(),
            written_off: BTreeSet::new(),
            doubled: 0,
            spoilt: 0,
            last_arrival: Instant::now(),
        }
    }

    fn frame(&self, number: u64) -> Vec<u8> {
        note(self.to, self.from, &[], &format!("{MARK}{number:020}"))
    }

    fn send(&mut self, end: &mut End) -> Result<()> {
        if self.on_the_way.is_empty() {
            self.last_arrival = Instant::now();
        }
        if self.last_arrival.elapsed() > STALL {
            self.written_off.append(&mut self.on_the_way);
        }
        let room = WINDOW.saturating_sub(self.on_the_way.len()).min(BURST);
        for _ in 0..room {
            let frame = self.frame(self.next);
            if !end.send(&frame)? {
                break;
            }
            self.on_the_way.insert(self.next);
            self.next += 1;
        }
        end.flush();
        Ok(())
    }

    /// Takes all frames of the stream that have arrived, and passes over what others send.
    fn receive(&mut self, end: &mut End) -> Result<()> {
        while let Some(frame) = end.receive()? {
            let text = frame.get(TEXT..TEXT + MARK.len() + 20).map(String::from_utf8_lossy);
            let number = text.as_deref().and_then(|text| text.strip_prefix(MARK)?.parse::<u64>().ok());
            let Some(number) = number.filter(|_| frame[6..12] == self.from) else { continue };
            if frame != self.frame(number) {
                self.spoilt += 1;
            } else if self.on_the_way.remove(&number) || self.written_off.remove(&number) {
                self.last_arrival = Instant::now();
            } else {
                self.doubled += 1;
            }
        }
        end.flush();
        Ok(())
    }
}

/// A pair that sends.
pub(crate) struct Pair {
    /// Its name in messages.
    pub(crate) name: &'static str,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Tally>>>,
}

impl Pair {
    /// Starts sending between two ends with these addresses, in both directions.
    pub(crate) fn start(name: &'static str, ends: [(End, Mac); 2]) -> Result<Pair> {
        let [(mut one, one_mac), (mut two, two_mac)] = ends;
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (is_over, counted) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut streams = [Stream::new(one_mac, two_mac), Stream::new(two_mac, one_mac)];
            let mut ended = None::<Instant>;
            loop {
                let [there, back] = &mut streams;
                if ended.is_none() {
                    there.send(&mut one)?;
                    back.send(&mut two)?;
                }
                there.receive(&mut two)?;
                back.receive(&mut one)?;
                counted.store(there.next + back.next, Ordering::Relaxed);
                if one.is_alone() || two.is_alone() {
                    bail!("the switch hung up on a bystander");
                }
                if ended.is_none() && is_over.load(Ordering::Relaxed) {
                    ended = Some(Instant::now());
                }
                let is_home = streams.iter().all(|stream| stream.on_the_way.is_empty());
                if ended.is_some_and(|ended| is_home || ended.elapsed() > STALL) {
                    break;
                }
                std::thread::sleep(PAUSE);
            }
            let mut tally = Tally::default();
            for stream in &streams {
                tally.sent += stream.next;
                tally.lost += (stream.on_the_way.len() + stream.written_off.len()) as u64;
                tally.doubled += stream.doubled;
                tally.spoilt += stream.spoilt;
            }
            Ok(tally)
        })?;
        Ok(Pair { name, stop, sent, thread: Some(thread) })
    }

    /// Frames sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops sending, waits for what is on its way, and counts.
    pub(crate) fn finish(mut self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("it has been finished"))?;
        thread.join().map_err(|_| anyhow!("the bystanders {} panicked", self.name))?
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A test that fails has said why.
            let _ = thread.join();
        }
    }
}
