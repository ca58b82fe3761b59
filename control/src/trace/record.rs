//! Running the pipeline over any tables, read-only, and noting what it does.

use std::cell::{Cell, RefCell};

use sluice_pipeline::tables::{
    AclGroup, CacheSlot, Direction, FdbEntry, FdbKey, FloodChunk, FloodKey, IpGuardKey, MacKey, PortConfig,
    RateConfig, RuleEntry, RuleKey, SwitchConfig, TupleChunk, TupleKey,
};
use sluice_pipeline::{Context, Delivery, DropReason, LoopBody, Sink, Stage, Tables, Verdict, decide, flood};
use sluice_policy::conformance::Observed;
use sluice_policy::sim::{SliceFrame, rewrite};

/// Something that happened on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A stage of this port was entered.
    Enter(Stage, u32),
    /// The frame, or the copy under way, was dropped and would have been counted on this port.
    Drop(u32, DropReason),
    /// A rule with this counter decided.
    Rule(u32),
    /// The source address would have been learnt.
    Learn,
    /// It would have left by this port.
    Out(u32),
    /// A bucket of this port had no room for the frame.
    OverRate(u32, Direction),
}

impl Step {
    /// The port that it is about, where it is about one.
    pub const fn port(&self) -> Option<u32> {
        match self {
            Step::Enter(_, port) | Step::Drop(port, _) | Step::Out(port) | Step::OverRate(port, _) => {
                Some(*port)
            }
            Step::Rule(_) | Step::Learn => None,
        }
    }
}

/// What the pipeline did with a frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveTrace {
    /// What happened, in order.
    pub steps: Vec<Step>,
    /// Frames that would have left: port and bytes.
    pub frames: Vec<(u32, Vec<u8>)>,
}

impl LiveTrace {
    /// What can be compared with the oracle. Learning is left out: an address that was seen in this very second is not
    /// noted again.
    pub fn observed(&self) -> Observed {
        let mut observed = Observed { frames: self.frames.clone(), ..Observed::default() };
        let mut rules = Vec::new();
        for step in &self.steps {
            match step {
                Step::Drop(port, reason) => *observed.drops.entry((*port, *reason)).or_default() += 1,
                Step::Rule(counter) => rules.push(*counter),
                Step::Enter(..) | Step::Learn | Step::Out(_) | Step::OverRate(..) => {}
            }
        }
        observed.rules = Some(rules);
        observed
    }
}

/// Takes a frame from port `ingress` through the pipeline over `tables`, without any side effect on them: `tables` is
/// only asked, except for [`Tables::take`], which a caller's read-only tables must answer without taking.
pub fn live<T: Tables>(tables: &T, ingress: u32, frame: &[u8]) -> LiveTrace {
    let recorder = Recorder { tables, ingress, asked: Cell::new(ingress), steps: RefCell::default() };
    let mut context = Context::default();
    let mut copies = Copies { recorder: &recorder, deliveries: Vec::new() };
    let bytes = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    match decide(&SliceFrame::new(frame), &recorder, ingress, bytes, &mut context) {
        Verdict::Unicast(delivery) => copies.emit(&delivery),
        Verdict::Flood => {
            // Its error is counted, and thereby in the steps already.
            let _ = flood(&recorder, &mut context, &mut copies);
        }
        Verdict::Drop { .. } | Verdict::Defer => {}
    }
    let frames = copies
        .deliveries
        .iter()
        .map(|delivery| (delivery.port, rewrite(frame, context.strip, delivery.tag)))
        .collect();
    LiveTrace { steps: recorder.steps.into_inner(), frames }
}

struct Copies<'a, T> {
    recorder: &'a Recorder<'a, T>,
    deliveries: Vec<Delivery>,
}

impl<T> Sink for Copies<'_, T> {
    fn emit(&mut self, delivery: &Delivery) {
        self.recorder.note(Step::Out(delivery.port));
        self.deliveries.push(*delivery);
    }
}

/// Tables that pass look-ups on and keep side effects to themselves.
struct Recorder<'a, T> {
    tables: &'a T,
    ingress: u32,
    /// The port that was looked up last: the destination, once there is one.
    asked: Cell<u32>,
    steps: RefCell<Vec<Step>>,
}

impl<T> Recorder<'_, T> {
    fn note(&self, step: Step) {
        self.steps.borrow_mut().push(step);
    }
}

impl<T: Tables> Tables for Recorder<'_, T> {
    const COMPLETE: bool = true;

    fn port(&self, port: u32) -> Option<(&PortConfig, u32)> {
        // The ingress port may be asked for again on the way, and is never a destination.
        if port != self.ingress {
            self.asked.set(port);
        }
        self.tables.port(port)
    }
    fn trunk_allows(&self, slot: u32, vid: u16) -> bool {
        self.tables.trunk_allows(slot, vid)
    }
    fn switch(&self, switch: u32) -> Option<&SwitchConfig> {
        self.tables.switch(switch)
    }
    fn vnic_mac(&self, key: &MacKey) -> Option<u32> {
        self.tables.vnic_mac(key)
    }
    fn fdb(&self, key: &FdbKey) -> Option<FdbEntry> {
        self.tables.fdb(key)
    }
    fn ip_allowed(&self, key: &IpGuardKey) -> bool {
        self.tables.ip_allowed(key)
    }
    fn flood(&self, key: &FloodKey) -> Option<&FloodChunk> {
        self.tables.flood(key)
    }
    fn acl_group(&self, group: u32) -> Option<&AclGroup> {
        self.tables.acl_group(group)
    }
    fn acl_tuples(&self, key: &TupleKey) -> Option<&TupleChunk> {
        self.tables.acl_tuples(key)
    }
    fn acl_rule(&self, key: &RuleKey) -> Option<&RuleEntry> {
        self.tables.acl_rule(key)
    }
    fn epoch(&self) -> u64 {
        self.tables.epoch()
    }
    fn cache(&self, _slot: u32) -> Option<&mut CacheSlot> {
        None
    }
    fn now(&self) -> u64 {
        self.tables.now()
    }
    fn now_seconds(&self) -> u32 {
        self.tables.now_seconds()
    }
    fn take(&self, port: u32, direction: Direction, rate: &RateConfig, bytes: u32) -> bool {
        let taken = self.tables.take(port, direction, rate, bytes);
        if !taken {
            self.note(Step::OverRate(port, direction));
        }
        taken
    }
    fn learn(&self, _key: &FdbKey, _port: u32, _limit: u32) {
        self.note(Step::Learn);
    }
    fn count_rx(&self, _port: u32, _bytes: u32) {}
    fn count_flood(&self, _port: u32) {}
    fn count_cache_miss(&self, _port: u32) {}
    fn count_rule(&self, counter: u32, _bytes: u32) {
        self.note(Step::Rule(counter));
    }
    fn count_drop(&self, port: u32, reason: DropReason) {
        self.note(Step::Drop(port, reason));
    }
    fn repeat<B: LoopBody>(&self, rounds: u32, body: &mut B) {
        self.tables.repeat(rounds, body);
    }
    fn stage(&self, stage: Stage) {
        let port = match stage {
            Stage::Egress | Stage::AclToVm | Stage::RateToVm => self.asked.get(),
            _ => self.ingress,
        };
        self.note(Step::Enter(stage, port));
    }
}
