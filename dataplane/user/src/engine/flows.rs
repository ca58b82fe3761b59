//! A worker's flow cache: what the pipeline made of a frame of a flow, for as long as the tables stay as they are. It stands in
//! front of the pipeline, and spares it for what most traffic is: whole, untagged TCP and UDP over IPv4 between vNICs.
//!
//! It changes no verdict. What the pipeline makes of such a frame depends on the tables and on the fields of a [`Key`] alone,
//! and only where nothing else has a say is it kept: the frame passed, nothing was learnt or looked up in the FDB, no bucket
//! was asked. A frame has a key only if its lengths are as `sluice_pipeline::parse` demands, since other frames of the flow
//! may lie about theirs. All else goes through the pipeline, and so does the first frame of a flow in each epoch.
//!
//! Four entries of a cache line each may hold a flow, anywhere: the chance that all are taken is so small that flows get into each
//! other's way only when the cache is nearly full; and then any of them goes, so that those which have ended are gone soon.

use sluice_pipeline::tables::{Direction, MacKey, NO_RULE, PortConfig, fact, port_flag};
use sluice_pipeline::{Context, Delivery, Headers, Tag, ip_proto};

use super::counters::{Counters, add};
use super::honest::is_honest;
use super::tables::Tables;
use crate::frame::{Checksum, Frame};
use crate::hint::{Access, prefetch};
use crate::port::BATCH;

/// Entries. A power of two.
const ENTRIES: usize = 8192;
/// How many of them may hold a flow.
const WAYS: usize = 4;
/// Bytes that a key is made of, at the frame's start: to the end of TCP's flags.
const WINDOW: usize = 48;
/// Offset of the network and of the transport header.
const L3: usize = 14;
const L4: usize = 34;
/// Version 4, five words of header.
const PLAIN_IPV4: u8 = 0x45;
/// More fragments, and the fragment's offset.
const FRAGMENT: u16 = 0x3fff;

/// What the pipeline goes by in a frame of a flow, and in which tables: addresses, ports, protocol, TCP flags; ingress port, epoch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Key([u64; 5]);

/// Word by word: derived, it would be a call of `memcmp`, which took a fifth of the time of all that is done for a frame.
impl PartialEq for Key {
    #[inline(always)]
    fn eq(&self, other: &Key) -> bool {
        let differing = self.0.iter().zip(other.0).fold(0, |bits, (one, other)| bits | (one ^ other));
        differing == 0
    }
}

impl Key {
    /// Of no frame: there is an ethertype in the second word of all others.
    const NONE: Key = Key([0; 5]);

    #[inline]
    fn is_some(&self) -> bool {
        self.0[1] != 0
    }

    /// The key of a frame that is plain in all that a key does not say; `None` for any other.
    #[inline]
    pub(super) fn of(frame: &Frame, ingress: u32, epoch: u64) -> Option<Key> {
        let bytes = frame.bytes();
        let header: &[u8; WINDOW] = bytes.first_chunk()?;
        let half = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        if half(12) != 0x0800 || header[L3] != PLAIN_IPV4 || half(20) & FRAGMENT != 0 {
            return None;
        }
        let total = usize::from(half(16));
        let payload = total.checked_sub(L4 - L3).filter(|_| total <= bytes.len() - L3)?;
        let proto = header[23];
        let flags = match proto {
            ip_proto::TCP => {
                let length = usize::from(header[46] >> 4) * 4;
                if length < 20 || length > payload {
                    return None;
                }
                header[47]
            }
            ip_proto::UDP => {
                let length = usize::from(half(38));
                if length < 8 || length > payload {
                    return None;
                }
                0
            }
            _ => return None,
        };
        if matches!(frame.offload().checksum, Checksum::Partial { .. })
            && !is_honest(frame.offload(), &headers(proto))
        {
            return None;
        }
        let ports = word(L4) & u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        let kind = u64::from_ne_bytes([0, 0, 0, 0, proto, flags, 0, 0]);
        let tables = u64::from(ingress) << 32 | epoch & 0xffff_ffff;
        Some(Key([word(0), word(6), word(26), ports | kind, tables]))
    }

    /// The entries that may hold its flow, likelier ones first. Multiplications to 128 bits, folded.
    #[inline]
    fn places(&self) -> [u16; WAYS] {
        const A: u64 = 0x9e37_79b9_7f4a_7c15;
        const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let [a, b, c, d, e] = self.0;
        let hash = fold(fold(a ^ A, b ^ B) ^ e, fold(c ^ B, d ^ A) ^ A);
        [hash, hash >> 16, hash >> 32, hash >> 48].map(|bits| (bits as usize % ENTRIES) as u16)
    }

    /// Whether it is of other tables than `other`: then nobody asks for it any more.
    #[inline]
    fn is_older_than(&self, other: &Key) -> bool {
        self.0[4] as u32 != other.0[4] as u32
    }
}

/// What of the headers matters to an offload, of a frame that has a key.
#[cold]
fn headers(proto: u8) -> Headers {
    let mut headers = Headers { l3: L3 as u32, l4: L4 as u32, ..Headers::default() };
    headers.key.facts = fact::IP | fact::L4;
    headers.key.proto = proto;
    headers
}

/// Where the frames of a flow go, and what is counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    pub(super) port: u32,
    /// The tag that they get, or [`Tag::NONE`].
    pub(super) tag: Tag,
    /// Counters of the rules that let them pass, or [`NO_RULE`].
    rules: [u32; 2],
}

impl Flow {
    /// What is kept of a frame that has a key and passed; `None` if another frame of its flow may fare otherwise.
    pub(super) fn of(tables: &Tables, context: &Context, delivery: &Delivery) -> Option<Flow> {
        let key = &context.headers.key;
        let destination = &tables.port(delivery.port)?.config;
        let address = MacKey::from_word(context.switch, key.dst_mac_word());
        let is_static = tables.owner(&address) == Some(delivery.port);
        if !is_static || destination.rate[Direction::ToVm as usize].ns_per_byte != 0 {
            return None;
        }
        let rules = [context.from_vm.counter, context.to_vm.counter];
        Some(Flow { port: delivery.port, tag: delivery.tag, rules })
    }
}

/// Frames of known flows in one batch, counted as the pipeline would have.
#[derive(Debug)]
pub(super) struct Tally {
    ingress: u32,
    frames: u64,
    bytes: u64,
    /// The rules that let the last ones pass, and how many of them are not counted there yet.
    rules: [u32; 2],
    passed: [u64; 2],
}

impl Tally {
    #[inline]
    pub(super) fn new(ingress: u32) -> Tally {
        Tally { ingress, frames: 0, bytes: 0, rules: [NO_RULE; 2], passed: [0; 2] }
    }

    #[inline(always)]
    pub(super) fn add(&mut self, flow: &Flow, length: usize, counters: &Counters) {
        if flow.rules != self.rules {
            self.count_rules(counters);
            self.rules = flow.rules;
        }
        self.frames += 1;
        self.bytes += length as u64;
        self.passed[0] += 1;
        self.passed[1] += length as u64;
    }

    fn count_rules(&mut self, counters: &Counters) {
        let [frames, bytes] = std::mem::take(&mut self.passed);
        for rule in self.rules {
            if rule != NO_RULE {
                counters.count_rule(rule, frames, bytes);
            }
        }
    }

    /// Counts all of them.
    #[inline]
    pub(super) fn count(mut self, counters: &Counters) {
        if self.frames > 0 {
            self.count_rules(counters);
            let received = counters.port(self.ingress);
            add(&received.rx_packets, self.frames);
            add(&received.rx_bytes, self.bytes);
        }
    }
}

/// A frame's key, and where its flow is looked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    key: Key,
    places: [u16; WAYS],
}

impl Asked {
    const NONE: Asked = Asked { key: Key::NONE, places: [0; WAYS] };
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Entry {
    key: Key,
    flow: Flow,
}

/// The cache.
#[derive(Debug)]
pub(super) struct Flows {
    entries: Box<[Entry]>,
    /// Of the frames of the batch at hand, the first so many.
    asked: [Asked; BATCH],
    count: usize,
    /// Which of its places a flow took last, where there was no room.
    turn: usize,
}

impl Flows {
    pub(super) fn new() -> Flows {
        let flow = Flow { port: 0, tag: Tag::NONE, rules: [NO_RULE; 2] };
        Flows {
            entries: vec![Entry { key: Key::NONE, flow }; ENTRIES].into(),
            asked: [Asked::NONE; BATCH],
            count: 0,
            turn: 0,
        }
    }

    /// Whether flows from this port are kept: it learns no addresses, is heard by nobody else, and has no bucket to ask.
    #[inline]
    pub(super) fn are_kept_of(&self, tables: &Tables, ingress: u32) -> bool {
        let has_no_say = |config: &PortConfig| {
            config.flags & (port_flag::LEARN | port_flag::LOOPS) == 0
                && config.rate[Direction::FromVm as usize].ns_per_byte == 0
        };
        tables.port(ingress).is_some_and(|port| has_no_say(&port.config))
    }

    /// Asks for the flows of a batch that came from `ingress`: the first of the entries that may hold them are brought near.
    #[inline]
    pub(super) fn ask(&mut self, frames: &[Frame], ingress: u32, epoch: u64) {
        let mut last = Asked::NONE;
        for (asked, frame) in self.asked.iter_mut().zip(frames) {
            let key = Key::of(frame, ingress, epoch).unwrap_or(Key::NONE);
            // Frames of a flow come one behind the other.
            if key != last.key {
                last = Asked { key, places: key.places() };
                prefetch(&raw const self.entries[usize::from(last.places[0])], Access::Read);
            }
            *asked = last;
        }
        self.count = frames.len().min(BATCH);
    }

    /// Asks for none.
    #[inline]
    pub(super) fn ask_nothing(&mut self) {
        self.count = 0;
    }

    #[inline(always)]
    fn asked(&self, at: usize) -> Option<&Asked> {
        self.asked[..self.count].get(at).filter(|asked| asked.key.is_some())
    }

    /// What is known of the flow of the frame at a place of the batch.
    #[inline(always)]
    pub(super) fn answer(&self, at: usize) -> Option<&Flow> {
        let asked = self.asked(at)?;
        let mut entries = asked.places.iter().map(|place| &self.entries[usize::from(*place)]);
        entries.find(|entry| entry.key == asked.key).map(|entry| &entry.flow)
    }

    /// Keeps the flow of the frame at a place of the batch, if it was asked for; instead of another one, if there is no room.
    pub(super) fn put(&mut self, at: usize, flow: Flow) {
        let Some(asked) = self.asked(at) else { return };
        let (key, places) = (asked.key, asked.places.map(usize::from));
        let is_free = |place: &usize| self.entries[*place].key.is_older_than(&key);
        let place = places.into_iter().find(is_free).unwrap_or_else(|| {
            // Whichever comes: most are of flows that have ended, and those that have not come back to another place.
            self.turn = (self.turn + 1) % WAYS;
            places[self.turn]
        });
        self.entries[place] = Entry { key, flow };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Pool, Region, RegionLayout};

    /// A datagram of one of many flows.
    fn frame(pool: &mut Pool, flow: u16) -> Frame {
        let mut bytes = [0; 60];
        bytes[12..24].copy_from_slice(&[8, 0, PLAIN_IPV4, 0, 0, 46, 0, 0, 0, 0, 64, ip_proto::UDP]);
        bytes[34..36].copy_from_slice(&flow.to_be_bytes());
        bytes[39] = 26;
        pool.copy(&bytes).expect("memory")
    }

    /// Asks for these flows and puts those that are not known; answers how many were.
    fn put(flows: &mut Flows, numbers: std::ops::Range<u16>, epoch: u64) -> usize {
        let region = Region::new(RegionLayout { small: 64, large: 1 }).expect("memory");
        let mut pool = Pool::new(&region);
        let mut known = 0;
        for number in numbers {
            let frame = frame(&mut pool, number);
            flows.ask(std::slice::from_ref(&frame), 1, epoch);
            pool.give(frame);
            match flows.answer(0) {
                Some(flow) => {
                    assert_eq!(flow.port, u32::from(number));
                    known += 1;
                }
                None => flows.put(0, Flow { port: number.into(), tag: Tag::NONE, rules: [NO_RULE; 2] }),
            }
        }
        known
    }

    /// How many of so many new flows are known when each was put.
    fn known(flows: &mut Flows, count: u16, epoch: u64) -> usize {
        assert_eq!(put(flows, 0..count, epoch), 0, "they are new");
        put(flows, 0..count, epoch)
    }

    #[test]
    fn flows_have_room_beside_each_other_in_each_epoch() {
        let mut flows = Flows::new();
        for epoch in 1..4 {
            let count = known(&mut flows, 2000, epoch);
            assert!(count >= 1995, "{count} in epoch {epoch}");
        }
        // Flows that have ended give way to those that go on.
        let mut flows = Flows::new();
        known(&mut flows, 30_000, 1);
        for _ in 0..8 {
            put(&mut flows, 40_000..41_000, 1);
        }
        let count = put(&mut flows, 40_000..41_000, 1);
        assert!(count >= 990, "{count} of 1000 after 30000 others");
        // As many as there are entries: most find room.
        let count = known(&mut flows, ENTRIES as u16, 4);
        assert!((ENTRIES * 7 / 10..ENTRIES).contains(&count), "{count} of {ENTRIES}");
    }
}
