//! An engine between memory ports, asked about one frame at a time: what would happen to it?
//!
//! For conformance tests. It is the engine itself that answers, through attached ports, not a model of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{Direction, FdbEntry, FdbKey};
use sluice_policy::conformance::{self, NO_PORT, Observed};
use sluice_policy::ids::Ids;
use sluice_policy::image::Image;
use sluice_policy::oracle;

use super::{MemoryPort, link};
use crate::engine::{Engine, Processor};
use crate::frame::{Region, RegionError, RegionLayout};
use crate::port::{Accepts, Batch, Receive};

/// Frames that wait at a port; more than any flood makes of one.
const CAPACITY: usize = 16;
const NANOSECONDS: u64 = 1_000_000_000;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No memory for frames.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// No port could be made.
    #[error("making a memory port: {0}; the process may have too many open files")]
    Port(#[from] nix::Error),
    /// All frames are in use.
    #[error("there is no chunk left for a frame of {0} bytes")]
    Memory(usize),
}

/// An engine that can be asked.
#[derive(Debug)]
pub struct Probe {
    engine: Engine,
    processor: Processor,
    region: Arc<Region>,
    image: Image,
    /// The far ends of the ports.
    ends: BTreeMap<u32, MemoryPort>,
    /// Counters of the rules that the image has.
    rules: BTreeSet<u32>,
    /// Nanoseconds; stands still.
    now: u64,
}

impl Probe {
    /// An engine without configuration.
    ///
    /// # Errors
    /// Without memory.
    pub fn new() -> Result<Probe, ProbeError> {
        let region = Region::new(RegionLayout { small: 1024, large: 64 })?;
        let engine = Engine::new();
        let processor = Processor::new(&engine, &region);
        Ok(Probe {
            engine,
            processor,
            region,
            image: Image::default(),
            ends: BTreeMap::new(),
            rules: BTreeSet::new(),
            now: 1_000 * NANOSECONDS,
        })
    }

    /// Brings the running engine to this configuration, with these ports attached; `accepts` is what their other ends take.
    ///
    /// # Errors
    /// Without file descriptors.
    pub fn configure(
        &mut self,
        image: &Image,
        attached: &BTreeSet<u32>,
        accepts: Accepts,
    ) -> Result<(), ProbeError> {
        self.engine.apply(image.clone());
        let gone: Vec<u32> = self.ends.keys().filter(|port| !attached.contains(port)).copied().collect();
        for port in gone {
            self.engine.detach(port);
            self.ends.remove(&port);
        }
        for &port in attached {
            if !self.ends.contains_key(&port) {
                let (near, far) = link(CAPACITY, [Accepts::ALL, accepts])?;
                self.engine.attach(port, vec![Box::new(near.transmit)]);
                self.ends.insert(port, far);
            }
        }
        self.rules =
            image.groups.values().flat_map(|group| group.rules.values().map(|rule| rule.counter)).collect();
        self.image = image.clone();
        Ok(())
    }

    /// Takes over the state that the oracle is asked with: learnt addresses and empty buckets.
    pub fn adopt(&mut self, ids: &Ids, state: &oracle::State) {
        let seconds = (self.now / NANOSECONDS) as u32;
        self.engine.restore_fdb(state.fdb.iter().map(|(station, sighting)| {
            let entry = FdbEntry {
                port: conformance::port_id(ids, &sighting.port),
                seen: seconds.wrapping_sub(sighting.age_seconds),
            };
            (conformance::fdb_key(ids, station), entry)
        }));
        for (&id, port) in &self.image.ports {
            for direction in [Direction::FromVm, Direction::ToVm] {
                let is_empty = state.empty_buckets.contains(&(port.name.clone(), direction));
                let due = self.now + port.config.rate[direction as usize].burst_ns;
                self.engine.set_bucket(id, direction, if is_empty { due } else { 0 });
            }
        }
    }

    /// Lets a frame come from a port, and says what became of it.
    ///
    /// # Errors
    /// Without chunks.
    pub fn run(&mut self, ingress: u32, bytes: &[u8]) -> Result<Observed, ProbeError> {
        let before = (self.drops(), self.rule_hits(), self.stations());
        let pool = self.processor.pool();
        let mut batch = Batch::new();
        batch.push(pool.copy(bytes).ok_or(ProbeError::Memory(bytes.len()))?);
        self.processor.process(ingress, &mut batch, self.now);
        let mut frames = Vec::new();
        for (&port, end) in &mut self.ends {
            end.receive.receive(self.processor.pool(), &mut batch);
            for frame in batch.drain() {
                frames.push((port, frame.bytes().to_vec()));
                self.processor.pool().give(frame);
            }
        }
        let mut drops = self.drops();
        for (drop, count) in &before.0 {
            *drops.entry(*drop).or_default() -= count;
        }
        drops.retain(|_, count| *count > 0);
        let hits = self.rule_hits().into_iter().zip(before.1);
        let rules =
            hits.flat_map(|((rule, after), (_, before))| (before..after).map(move |_| rule)).collect();
        let mut learnt = self.stations();
        learnt.retain(|key, entry| before.2.get(key) != Some(entry));
        let learnt = learnt.into_iter().next().map(|(key, entry)| (key, entry.port));
        Ok(Observed { frames, drops, rules: Some(rules), learnt: Some(learnt) })
    }

    /// Frames in use: none, between runs.
    pub fn outstanding(&self) -> usize {
        self.region.outstanding()
    }

    fn drops(&self) -> BTreeMap<(u32, DropReason), u64> {
        let ports = self.image.ports.keys().copied().chain([NO_PORT]);
        let all = ports.flat_map(|port| DropReason::ALL.iter().map(move |reason| (port, *reason)));
        all.map(|(port, reason)| ((port, reason), self.engine.drops(port, reason)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    fn rule_hits(&self) -> Vec<(u32, u64)> {
        self.rules.iter().map(|&rule| (rule, self.engine.rule_stats(rule).packets)).collect()
    }

    fn stations(&self) -> BTreeMap<FdbKey, FdbEntry> {
        self.engine.fdb().into_iter().collect()
    }
}
