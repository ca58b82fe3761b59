//! The pipeline in memory: tables made from an [`Image`], and a way to run frames through [`decide`] and [`flood`].
//!
//! It is the reference for what `decide` itself does: conformance tests compare it with the oracle on one side and
//! with the loaded BPF programs on the other. It is also how a packet can be traced without any kernel. It is not
//! an engine: one thread, standard maps, a clock that stands still until told.

mod frame;
mod view;

use std::collections::{BTreeMap, HashMap};

use bytemuck::Zeroable;
use sluice_pipeline::tables::{
    AclGroup, Direction, FdbEntry, FdbKey, PortStats, RuleEntry, RuleKey, RuleSlot, RuleStats, TUPLE_CHUNK,
    Tuple, TupleChunk, TupleKey,
};
use sluice_pipeline::{Context, Delivery, DropReason, Sink, Stage, Verdict, decide, flood};

use crate::conformance::{self, Observed};
use crate::ids::Ids;
use crate::image::Image;
use crate::oracle;

pub use frame::{SliceFrame, TagPlace, rewrite, take_tag_out};
use view::Cache;
pub use view::View;

/// What changes while frames pass.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Learnt addresses.
    pub fdb: HashMap<FdbKey, FdbEntry>,
    /// Theoretical arrival time of each bucket; absent is full.
    pub buckets: HashMap<(u32, Direction), u64>,
    /// Counters by port.
    pub ports: BTreeMap<u32, PortStats>,
    /// Counters by rule.
    pub rules: BTreeMap<u32, RuleStats>,
    /// Drops by port and reason.
    pub drops: BTreeMap<(u32, DropReason), u64>,
    /// Monotonic clock in nanoseconds.
    pub now: u64,
    /// Raised whenever a cached verdict may be wrong.
    pub epoch: u64,
}

/// Tables over an image, and their state.
#[derive(Debug)]
pub struct Simulator {
    image: Image,
    groups: HashMap<u32, AclGroup>,
    tuples: HashMap<TupleKey, TupleChunk>,
    rules: HashMap<RuleKey, RuleEntry>,
    cache: Option<Cache>,
    state: State,
}

/// One frame's way through the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What [`decide`] said.
    pub verdict: Verdict,
    /// Drops, with the port on which each was counted.
    pub drops: Vec<(u32, DropReason)>,
    /// Frames that left, with their ports. Bytes are as on a wire, tags included.
    pub frames: Vec<(u32, Vec<u8>)>,
    /// Stages entered, in order; those of destinations follow each other.
    pub stages: Vec<Stage>,
    /// Counters of the rules that were hit.
    pub rules: Vec<u32>,
    /// What was learnt, or seen again.
    pub learnt: Vec<(FdbKey, u32)>,
}

impl Run {
    /// The run in the form that every engine's is compared in.
    pub fn observed(&self) -> Observed {
        let mut drops = BTreeMap::new();
        for drop in &self.drops {
            *drops.entry(*drop).or_default() += 1;
        }
        Observed {
            frames: self.frames.clone(),
            drops,
            rules: Some(self.rules.clone()),
            learnt: Some(self.learnt.last().copied()),
        }
    }
}

/// What happened while one frame passed; a part of the tables' state of its own.
#[derive(Debug, Default)]
struct Log {
    drops: Vec<(u32, DropReason)>,
    stages: Vec<Stage>,
    rules: Vec<u32>,
    learnt: Vec<(FdbKey, u32)>,
    /// Slots of the cache that were lent, in order.
    lent: Vec<u32>,
}

impl Simulator {
    /// Tables that hold `image`, with full buckets and nothing learnt.
    pub fn new(image: Image) -> Self {
        let (mut groups, mut tuples, mut rules) = (HashMap::new(), HashMap::new(), HashMap::new());
        for (&id, group) in &image.groups {
            let counts = [0, 1].map(|direction: usize| group.tuples[direction].len() as u32);
            groups.insert(id, AclGroup { version: 1, generation: 1, tuple_count: counts });
            for (direction, list) in (0..).zip(&group.tuples) {
                for (chunk, part) in (0..).zip(list.chunks(TUPLE_CHUNK)) {
                    let mut value = TupleChunk { tuples: [Tuple::zeroed(); TUPLE_CHUNK] };
                    value.tuples[..part.len()].copy_from_slice(part);
                    tuples.insert(TupleKey { group: id, generation: 1, direction, chunk }, value);
                }
            }
            rules.extend(group.rules.iter().map(|(key, rule)| {
                let slot = RuleSlot {
                    from: 1,
                    until: u32::MAX,
                    rank: rule.rank,
                    counter: rule.counter,
                    action: rule.action,
                };
                (*key, RuleEntry { slots: [slot, RuleSlot::EMPTY] })
            }));
        }
        let cache = Some(Cache::new());
        let state = State { epoch: 1, now: 1_000_000_000_000, ..State::default() };
        Simulator { image, groups, tuples, rules, cache, state }
    }

    /// Runs without a verdict cache from now on.
    #[must_use]
    pub fn without_cache(mut self) -> Self {
        self.cache = None;
        self
    }

    /// The image that the tables hold.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The state, to be set up. The clock may only go forward.
    pub fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }

    /// Empties a bucket: nothing passes until the clock goes on.
    pub fn empty_bucket(&mut self, port: u32, direction: Direction) {
        if let Some(port_image) = self.image.ports.get(&port) {
            let burst = port_image.config.rate[direction as usize].burst_ns;
            self.state.buckets.insert((port, direction), self.state.now + burst);
        }
    }

    /// Takes over the state that the oracle is asked with: learnt addresses and empty buckets. (Whether a port is
    /// attached is in the image.)
    pub fn adopt(&mut self, ids: &Ids, state: &oracle::State) {
        let now = (self.state.now / 1_000_000_000) as u32;
        self.state.fdb = state
            .fdb
            .iter()
            .map(|(station, sighting)| {
                let seen = now.wrapping_sub(sighting.age_seconds);
                let port = conformance::port_id(ids, &sighting.port);
                (conformance::fdb_key(ids, station), FdbEntry { port, seen })
            })
            .collect();
        self.state.buckets.clear();
        for (port, direction) in &state.empty_buckets {
            self.empty_bucket(conformance::port_id(ids, port), *direction);
        }
    }

    /// Takes a frame from port `ingress`, with all of its tags in `bytes`, through everything.
    ///
    /// `place` says whether the pipeline sees the outermost tag in the bytes or beside them; the answer is the same.
    pub fn run(&mut self, ingress: u32, bytes: &[u8], place: TagPlace) -> Run {
        self.pass::<true>(ingress, bytes, place)
    }

    /// As [`run`](Self::run), as the XDP programs see it: what they cannot serve is [`Verdict::Defer`].
    pub fn run_partial(&mut self, ingress: u32, bytes: &[u8]) -> Run {
        self.pass::<false>(ingress, bytes, TagPlace::Inline)
    }

    /// Lends the tables themselves, as [`decide`] sees them; for callers that trace.
    pub fn with_view<R>(&mut self, look: impl FnOnce(&View<'_, true>) -> R) -> R {
        let Simulator { image, groups, tuples, rules, state, .. } = self;
        look(&View::new(image, groups, tuples, rules, None, state))
    }

    fn pass<const COMPLETE: bool>(&mut self, ingress: u32, bytes: &[u8], place: TagPlace) -> Run {
        let taken = match place {
            TagPlace::Inline => None,
            TagPlace::Beside => take_tag_out(bytes),
        };
        let frame = match &taken {
            Some((rest, tag)) => SliceFrame::with_tag(rest, *tag),
            None => SliceFrame::new(bytes),
        };
        let Simulator { image, groups, tuples, rules, cache, state } = self;
        let view = View::<COMPLETE>::new(image, groups, tuples, rules, cache.as_mut(), state);
        let mut context = Context::default();
        let verdict = decide(&frame, &view, ingress, bytes.len() as u32, &mut context);
        let mut copies = Copies(Vec::new());
        match &verdict {
            Verdict::Unicast(delivery) => copies.emit(delivery),
            Verdict::Flood => {
                // The reason, if there is no destination, is in the log as every drop is.
                let _ = flood(&view, &mut context, &mut copies);
            }
            Verdict::Drop { .. } | Verdict::Defer => {}
        }
        let log = view.finish();
        if let Some(cache) = cache {
            cache.take_back(&log.lent);
        }
        let frames: Vec<(u32, Vec<u8>)> = copies
            .0
            .iter()
            .map(|delivery| (delivery.port, rewrite(bytes, context.strip, delivery.tag)))
            .collect();
        for (port, out) in &frames {
            let stats = self.state.ports.entry(*port).or_default();
            stats.tx_packets += 1;
            stats.tx_bytes += out.len() as u64;
        }
        Run { verdict, drops: log.drops, frames, stages: log.stages, rules: log.rules, learnt: log.learnt }
    }
}

/// Keeps deliveries for later.
struct Copies(Vec<Delivery>);

impl Sink for Copies {
    fn emit(&mut self, delivery: &Delivery) {
        self.0.push(*delivery);
    }
}

#[cfg(test)]
mod tests;
