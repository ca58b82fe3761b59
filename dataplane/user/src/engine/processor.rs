//! What one worker has: batches through the pipeline, in three passes.
//!
//! Headers are brought near, each frame is decided on, by its flow if that is known, and rewritten, and what leaves is sent
//! port by port.

use std::cell::RefCell;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};
use sluice_pipeline::{Context, Delivery, DropReason, Sink, Tag, Verdict, decide, flood};

use super::bulk::BulkSenders;
use super::counters::Counters;
use super::egress::Egress;
use super::fdb::FdbCopies;
use super::flows::{Flow, Flows, Tally};
use super::honest::is_honest;
use super::outgoing::Outgoing;
use super::tables::Tables;
use super::verdicts::Verdicts;
use super::view::{Header, Own, View};
use super::{Engine, Shared};
use crate::frame::{Frame, Pool, Region};
use crate::port::Batch;

/// A worker's half of the engine. For one thread.
#[derive(Debug)]
pub struct Processor {
    shared: Arc<Shared>,
    /// Absent while it rests.
    tables: Option<Cache<Arc<ArcSwap<Tables>>, Arc<Tables>>>,
    counters: Arc<Counters>,
    own: Own,
    flows: Flows,
    pool: Pool,
    outgoing: Outgoing,
    copies: Copies,
}

impl Processor {
    /// A processor that takes frames from `region`.
    pub fn new(engine: &Engine, region: &Arc<Region>) -> Processor {
        let shared = Arc::clone(&engine.shared);
        let counters = Arc::new(Counters::new());
        shared.counters.lock().working.push(Arc::clone(&counters));
        Processor {
            tables: None,
            shared,
            counters,
            own: Own {
                verdicts: RefCell::new(Verdicts::new()),
                copies: RefCell::new(FdbCopies::new()),
                bulk: RefCell::new(BulkSenders::new()),
            },
            flows: Flows::new(),
            pool: Pool::new(region),
            outgoing: Outgoing::new(),
            copies: Copies::default(),
        }
    }

    /// Its frames, for ports to receive into.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Without frames for a moment: lets go of tables that are outdated, and with them of ports that are detached.
    #[inline]
    pub fn idle(&mut self) {
        if let Some(tables) = &mut self.tables {
            tables.load();
        }
    }

    /// Without frames for longer: lets go of all tables, since nobody says when they become outdated.
    pub fn rest(&mut self) {
        self.tables = None;
    }

    /// Takes frames that came from the first queue of port `ingress` through everything, and notifies who gets them: see
    /// [`process_queue`](Self::process_queue).
    pub fn process(&mut self, ingress: u32, batch: &mut Batch, now: u64) {
        self.process_queue(ingress, 0, batch, now);
        self.flush();
    }

    /// Gives back the frames that it keeps for what comes next: to be called when nothing does.
    pub fn release(&mut self) {
        self.outgoing.release(&mut self.pool);
    }

    /// Notifies the other ends of all ports that frames were sent to since the last time.
    pub fn flush(&mut self) {
        self.outgoing.flush();
    }

    /// Takes frames that came from a queue of port `ingress` through everything, and leaves the batch empty. `now` is
    /// nanoseconds of the monotonic clock, the same for all processors of the engine. Who gets them is notified by
    /// [`flush`](Self::flush), which the caller owes them soon.
    ///
    /// They leave by the same transmit queue of a port whichever processor sends them, so none is overtaken when their queue
    /// changes workers: by that of the same number, as guests expect of answers; or, if the port they came from has but one
    /// way out itself, by as many further as its number says, so that not all such ports use the same.
    pub fn process_queue(&mut self, ingress: u32, queue: u16, batch: &mut Batch, now: u64) {
        let Processor { shared, tables, counters, own, flows, pool, outgoing, copies } = self;
        let tables: &Tables = tables.get_or_insert_with(|| Cache::new(Arc::clone(&shared.published))).load();
        let seconds = (now / 1_000_000_000) as u32;
        let view = View { tables, fdb: &shared.fdb, buckets: &shared.buckets, counters, own, now, seconds };
        let mut bulk = own.bulk.borrow_mut();
        for frame in batch.frames() {
            frame.prefetch();
            bulk.note(ingress, frame.offload(), seconds);
        }
        drop(bulk);
        let tally = Tally::new(ingress);
        if flows.are_kept_of(tables, ingress) {
            flows.ask(batch.frames(), ingress, tables.epoch);
        } else {
            flows.ask_nothing();
        }
        let mut pass = Pass { view, flows, copies, tally, ingress };
        // Mostly, all frames of a batch leave by the same port: then it does so as a whole.
        let (mut decided, mut same, mut odd) = (0, None, None);
        for (at, frame) in batch.frames_mut().iter_mut().enumerate() {
            match pass.decide(at, frame) {
                Fate::Leaves(port) if *same.get_or_insert(port) == port => decided += 1,
                fate => {
                    odd = Some(fate);
                    break;
                }
            }
        }
        match same {
            Some(port) if odd.is_none() => outgoing.push_all(port, batch),
            _ => {
                for (at, mut frame) in batch.drain().enumerate() {
                    let fate = match same {
                        Some(port) if at < decided => Fate::Leaves(port),
                        _ => odd.take().unwrap_or_else(|| pass.decide(at, &mut frame)),
                    };
                    match fate {
                        Fate::Leaves(port) => outgoing.push(port, frame),
                        Fate::Floods { strip } => pass.copies.send(frame, strip, pool, outgoing, counters),
                        Fate::Ends => pool.give(frame),
                    }
                }
            }
        }
        pass.tally.count(counters);
        let has_more = |egress: &Arc<Egress>| egress.count() > 1;
        let is_one_of_many = tables.port(ingress).and_then(|port| port.egress.as_ref()).is_some_and(has_more);
        let first = if is_one_of_many { 0 } else { ingress as usize };
        let lane = first + usize::from(queue);
        outgoing.send(lane, tables, pool, counters);
    }
}

/// What becomes of a frame.
enum Fate {
    /// It leaves by a port, as it is now.
    Leaves(u32),
    /// Copies of it do, which are listed; without its outermost tag if `strip`.
    Floods { strip: bool },
    /// It goes nowhere. The reason has been counted.
    Ends,
}

/// One batch, being decided on.
struct Pass<'a> {
    view: View<'a>,
    flows: &'a mut Flows,
    copies: &'a mut Copies,
    tally: Tally,
    ingress: u32,
}

impl Pass<'_> {
    /// Decides on the frame at a place of the batch, and rewrites it.
    #[inline(always)]
    fn decide(&mut self, at: usize, frame: &mut Frame) -> Fate {
        let Some(flow) = self.flows.answer(at) else { return self.decide_anew(at, frame) };
        let Flow { port, tag, .. } = *flow;
        self.tally.add(flow, frame.len(), self.view.counters);
        self.leave(frame, port, false, tag)
    }

    /// Has the pipeline decide.
    fn decide_anew(&mut self, at: usize, frame: &mut Frame) -> Fate {
        let Pass { view, flows, copies, ingress, .. } = self;
        let mut context = Context::default();
        let length = frame.len() as u32;
        let verdict = decide(&Header::of(frame.bytes()), view, *ingress, length, &mut context);
        match verdict {
            // Decided on as it came in; what is to be written must not undo that.
            Verdict::Unicast(_) | Verdict::Flood if !is_honest(frame.offload(), &context.headers) => {
                view.counters.count_drops(*ingress, DropReason::MalformedLength, 1);
                Fate::Ends
            }
            Verdict::Unicast(delivery) => {
                if let Some(flow) = Flow::of(view.tables, &context, &delivery) {
                    flows.put(at, flow);
                }
                self.leave(frame, delivery.port, context.strip, delivery.tag)
            }
            Verdict::Flood => {
                // The reason, if there is no destination, has been counted.
                let _ = flood(view, &mut context, *copies);
                Fate::Floods { strip: context.strip }
            }
            Verdict::Drop { .. } | Verdict::Defer => Fate::Ends,
        }
    }

    #[inline(always)]
    fn leave(&self, frame: &mut Frame, port: u32, strip: bool, tag: Tag) -> Fate {
        if rewrite(frame, strip, tag) {
            return Fate::Leaves(port);
        }
        self.view.counters.count_drops(port, DropReason::EgressFailed, 1);
        Fate::Ends
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let mut all = self.shared.counters.lock();
        all.working.retain(|counters| !Arc::ptr_eq(counters, &self.counters));
        all.retired.absorb(&self.counters);
    }
}

/// Takes the outermost tag off if `strip`, then puts `tag` on unless that is [`Tag::NONE`]. `false` without headroom.
#[inline]
fn rewrite(frame: &mut Frame, strip: bool, tag: Tag) -> bool {
    match (strip, tag.is_some()) {
        (false, false) => true,
        (true, false) => frame.remove::<4>(12),
        (false, true) => frame.insert(12, bytes_of(tag)),
        (true, true) => {
            let Some(place) = frame.bytes_mut().get_mut(12..16) else { return false };
            place.copy_from_slice(&bytes_of(tag));
            true
        }
    }
}

fn bytes_of(tag: Tag) -> [u8; 4] {
    let ([a, b], [c, d]) = (tag.tpid.to_be_bytes(), tag.tci.to_be_bytes());
    [a, b, c, d]
}

/// Where a flooded frame goes.
#[derive(Debug, Default)]
struct Copies(Vec<Delivery>);

impl Sink for Copies {
    fn emit(&mut self, delivery: &Delivery) {
        self.0.push(*delivery);
    }
}

impl Copies {
    /// Sends a copy to each; the last gets the frame itself.
    fn send(
        &mut self,
        frame: Frame,
        strip: bool,
        pool: &mut Pool,
        outgoing: &mut Outgoing,
        counters: &Counters,
    ) {
        let last = self.0.pop();
        let send = |copy: Option<Frame>, delivery: Delivery, pool: &mut Pool, outgoing: &mut Outgoing| {
            // Without a copy there was no memory for it.
            if let Some(mut copy) = copy {
                if rewrite(&mut copy, strip, delivery.tag) {
                    return outgoing.push(delivery.port, copy);
                }
                pool.give(copy);
            }
            counters.count_drops(delivery.port, DropReason::EgressFailed, 1);
        };
        for delivery in self.0.drain(..) {
            let copy = pool.duplicate(&frame);
            send(copy, delivery, pool, outgoing);
        }
        match last {
            Some(delivery) => send(Some(frame), delivery, pool, outgoing),
            None => pool.give(frame),
        }
    }
}
