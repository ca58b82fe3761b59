use std::os::fd::AsFd as _;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::eventfd::EventFd;
use nix::unistd::Pid;
use sluice_policy::generate::Rng;

use super::*;
use crate::engine::tests::{image, mac, plain, super_frame};
use crate::frame::{Pool, RegionLayout};
use crate::memory::{MemoryPort, link};
use crate::port::{Accepts, Batch, Transmit};

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two cores, for two workers.
fn cores() -> [usize; 2] {
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("an affinity");
    let mut cores = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).is_ok_and(|is_set| is_set));
    [(); 2].map(|()| cores.next().expect("these tests need two cores"))
}

fn ids() -> [WorkerId; 2] {
    cores().map(WorkerId)
}

/// Two vNICs, served by two workers; and the far ends of their queues.
struct Setting {
    engine: Engine,
    region: Arc<Region>,
    workers: Workers,
    ports: Vec<u32>,
    ends: Vec<Vec<MemoryPort>>,
}

impl Setting {
    /// Ports of so many queues.
    fn new(queues: [u16; 2]) -> Setting {
        let region = Region::new(RegionLayout { small: 4096, large: 4 }).expect("memory");
        let engine = Engine::new();
        let (image, ports) = image(vec![Default::default(); 2]);
        engine.apply(image);
        let workers = Workers::start(&engine, &region, &cores(), Patience::default()).expect("workers");
        let end = |port: u32, queues: u16| -> Vec<MemoryPort> {
            let mut ways_out: Vec<Box<dyn Transmit>> = Vec::new();
            let far = (0..queues).map(|queue| {
                let (near, far) = link(512, [Accepts::ALL; 2]).expect("a link");
                ways_out.push(Box::new(near.transmit));
                workers.place_anywhere(QueueId { port, queue }, Box::new(near.receive)).expect("a place");
                far
            });
            let far = far.collect();
            engine.attach(port, ways_out);
            far
        };
        let ends = ports.iter().zip(queues).map(|(port, queues)| end(*port, queues)).collect();
        Setting { engine, region, workers, ports, ends }
    }
}

/// Where a queue is.
fn place_of(workers: &Workers, queue: QueueId) -> Option<WorkerId> {
    let has_it = |worker: &WorkerStatus| worker.queues.iter().any(|status| status.queue == queue);
    workers.status().into_iter().find(has_it).map(|worker| worker.worker)
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// Flows of numbered frames from each queue of a port to another port.
struct Traffic {
    pool: Pool,
    batch: Batch,
    flows: BTreeMap<(usize, u8), Flow>,
}

#[derive(Default)]
struct Flow {
    sent: u64,
    received: u64,
    /// The queue that the far end gets it by.
    queue: Option<usize>,
}

impl Traffic {
    const FLOWS: u8 = 4;

    fn new(region: &Arc<Region>) -> Traffic {
        Traffic { pool: Pool::new(region), batch: Batch::new(), flows: BTreeMap::new() }
    }

    fn under_way(&self) -> u64 {
        self.flows.values().map(|flow| flow.sent - flow.received).sum()
    }

    fn sent(&self) -> u64 {
        self.flows.values().map(|flow| flow.sent).sum()
    }

    /// Sends some of each flow from each queue.
    fn send(&mut self, from: &mut [MemoryPort]) {
        for (queue, end) in from.iter_mut().enumerate() {
            for number in 0..Self::FLOWS {
                let flow = self.flows.entry((queue, number)).or_default();
                while self.batch.room() > 0 && flow.sent - flow.received < 50 {
                    let mut bytes = plain(mac(2), mac(1));
                    bytes[14] = queue as u8;
                    bytes[15] = number;
                    bytes[20..28].copy_from_slice(&flow.sent.to_be_bytes());
                    self.batch.push(self.pool.copy(&bytes).expect("memory"));
                    flow.sent += 1;
                }
            }
            let wanted = self.batch.len();
            let sent = end.transmit.transmit(&mut self.pool, &mut self.batch);
            assert_eq!(sent, wanted, "there is room for all that is under way");
            end.transmit.flush();
        }
    }

    /// Receives, and holds each flow to its order and to its queue.
    fn receive(&mut self, to: &mut [MemoryPort]) {
        for (queue, end) in to.iter_mut().enumerate() {
            end.receive.receive(&mut self.pool, &mut self.batch);
            for frame in self.batch.drain() {
                let [from, number] = frame.bytes()[14..16] else { panic!("a short frame") };
                let flow = self.flows.get_mut(&(usize::from(from), number)).expect("a flow of ours");
                assert_eq!(frame.bytes()[20..28], flow.received.to_be_bytes(), "the next frame is another");
                assert_eq!(*flow.queue.get_or_insert(queue), queue, "it comes by another queue");
                flow.received += 1;
                self.pool.give(frame);
            }
        }
    }

    /// Lets traffic pass while `change` changes something, so many times; then all frames have arrived.
    fn pass(&mut self, ends: &mut [Vec<MemoryPort>], changes: usize, mut change: impl FnMut(usize)) {
        let begin = Instant::now();
        let mut rng = Rng::new(1);
        let mut done = 0;
        while done < changes {
            assert!(begin.elapsed() < PATIENCE, "{} sent, {} under way", self.sent(), self.under_way());
            self.send(&mut ends[0]);
            self.receive(&mut ends[1]);
            if rng.chance(10) {
                change(done);
                done += 1;
            }
        }
        until("the last frame", || {
            self.receive(&mut ends[1]);
            self.under_way() == 0
        });
    }
}

#[test]
fn queues_move_under_load_and_no_frame_is_lost_or_overtaken() {
    for queues in [[1, 4], [2, 2], [3, 2]] {
        let Setting { engine, region, workers, ports, mut ends } = Setting::new(queues);
        let mut traffic = Traffic::new(&region);
        let mut rng = Rng::new(2);
        traffic.pass(&mut ends, 200, |_| {
            let queue = QueueId { port: ports[0], queue: rng.below(usize::from(queues[0])) as u16 };
            workers.move_to(queue, ids()[rng.below(2)]).expect("it moves");
        });
        let sent = traffic.sent();
        assert_eq!(engine.port_stats(ports[1]).tx_packets, sent);
        let status = workers.status();
        assert!(status.iter().all(|worker| !worker.busy.is_zero()), "both have worked: {status:?}");
        let of_queues = status.iter().flat_map(|worker| &worker.queues).map(|queue| queue.frames);
        assert_eq!(of_queues.sum::<u64>(), sent, "a queue's counts move with it");
        assert_eq!(status.iter().map(|worker| worker.frames).sum::<u64>(), sent);
        drop((workers, engine, ends, traffic));
        assert_eq!(region.outstanding(), 0);
    }
}

#[test]
fn workers_come_and_go_under_load_and_no_frame_is_lost_or_overtaken() {
    let Setting { engine, region, workers, ports, mut ends } = Setting::new([3, 2]);
    let [one, two] = cores();
    let mut traffic = Traffic::new(&region);
    traffic.pass(&mut ends, 60, |step| {
        let cores = [vec![one], vec![one, two], vec![two], vec![two, one, two]][step % 4].clone();
        workers.set_cores(&cores).expect("they start");
        let status = workers.status();
        let numbers: Vec<usize> = status.iter().map(|worker| worker.queues.len()).collect();
        let (most, least) = (numbers.iter().max(), numbers.iter().min());
        assert!(most.zip(least).is_some_and(|(most, least)| *most <= 5 && *least > 0), "{numbers:?}");
        assert_eq!(workers.cores().len(), if step % 2 == 0 { 1 } else { 2 });
    });
    assert_eq!(engine.port_stats(ports[1]).tx_packets, traffic.sent(), "counts outlive workers");
    assert!(matches!(workers.set_cores(&[]), Err(WorkersError::NoCores)));
    assert!(matches!(workers.set_cores(&[one, 1000]), Err(WorkersError::Start { core: 1000, .. })));
    assert_eq!(workers.cores(), cores(), "nothing has changed");
    drop((workers, engine, ends, traffic));
    assert_eq!(region.outstanding(), 0);
}

#[test]
fn pinned_queues_are_where_they_are_pinned_to() {
    let Setting { workers, ports, .. } = Setting::new([2, 1]);
    let [one, two] = ids();
    let queue = |queue| QueueId { port: ports[0], queue };
    let places = || [0, 1].map(|number| place_of(&workers, queue(number)).expect("it is placed"));
    for worker in [one, two, one] {
        workers.set_pins([(queue(0), worker), (queue(1), worker)].into()).expect("they move");
        assert_eq!(places(), [worker; 2]);
        workers.balance().expect("nothing to be done");
        assert_eq!(places(), [worker; 2]);
    }
    // A pin outlives its queue, and the worker that it names.
    let receive = workers.remove(queue(1)).expect("it is placed");
    workers.set_pins([(queue(0), two), (queue(1), two)].into()).expect("it moves");
    assert_eq!(workers.place_anywhere(queue(1), receive).expect("it is placed"), two);
    workers.set_cores(&[one.0]).expect("there is one left");
    assert_eq!(places(), [one; 2]);
    workers.set_cores(&cores()).expect("it starts");
    assert_eq!(places(), [two; 2]);
    let pins = |workers: &Workers| {
        workers
            .status()
            .iter()
            .flat_map(|worker| &worker.queues)
            .filter(|queue| queue.pin == Some(two))
            .count()
    };
    assert_eq!(pins(&workers), 2);
    workers.set_pins(BTreeMap::new()).expect("nothing to be done");
    assert_eq!(pins(&workers), 0);
}

/// A queue that cannot be watched by the threads of one worker.
#[derive(Debug)]
struct Picky {
    refused: String,
    event: EventFd,
    file: std::fs::File,
    served: Sender<String>,
}

impl Receive for Picky {
    fn receive(&mut self, _pool: &mut Pool, _batch: &mut Batch) {
        let name = std::thread::current().name().expect("workers have names").to_owned();
        let _ = self.served.send(name); // the test may have ended
    }

    fn event(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        // Files cannot be waited for.
        let is_refused = std::thread::current().name() == Some(&self.refused);
        Some(if is_refused { self.file.as_fd() } else { self.event.as_fd() })
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}
}

#[test]
fn a_queue_that_cannot_move_stays_where_it_is() {
    let Setting { workers, .. } = Setting::new([1, 1]);
    let [one, two] = ids();
    let queue = QueueId { port: 99, queue: 0 };
    let picky = |served| Picky {
        refused: format!("sluice-worker-{}", two.0),
        event: EventFd::new().expect("an eventfd"),
        file: std::fs::File::open("/proc/self/exe").expect("a file"),
        served,
    };
    let (served, serves) = channel();
    workers.place(queue, Box::new(picky(served)), one).expect("it is taken");
    for _ in 0..3 {
        let moved = workers.move_to(queue, two);
        assert!(
            matches!(moved, Err(WorkersError::Watch { queue: found, .. }) if found == queue),
            "{moved:?}"
        );
        assert_eq!(place_of(&workers, queue), Some(one));
        serves.try_iter().for_each(drop);
        assert_eq!(serves.recv_timeout(PATIENCE), Ok(format!("sluice-worker-{}", one.0)));
    }
    // Nor does a worker go that would leave it behind.
    assert!(matches!(workers.set_cores(&[two.0]), Err(WorkersError::Watch { .. })));
    assert_eq!(place_of(&workers, queue), Some(one));
    let (served, serves) = channel();
    let other = QueueId { port: 99, queue: 1 };
    assert!(matches!(workers.place(other, Box::new(picky(served)), two), Err(WorkersError::Watch { .. })));
    assert!(serves.recv().is_err(), "it is dropped");
}

fn wakeups(workers: &Workers) -> u64 {
    workers.status().iter().map(|worker| worker.wakeups).sum()
}

fn sleep_all(workers: &Workers) -> bool {
    workers.status().iter().all(|worker| worker.is_asleep)
}

#[test]
fn idle_workers_sleep_and_wake_for_a_frame() {
    let Setting { region, workers, mut ends, .. } = Setting::new([1, 1]);
    let mut pool = Pool::new(&region);
    until("sleep", || sleep_all(&workers));
    for _ in 0..100 {
        let mut batch = Batch::new();
        batch.push(pool.copy(&plain(mac(1), mac(2))).expect("memory"));
        let before = wakeups(&workers);
        ends[1][0].transmit.transmit(&mut pool, &mut batch);
        ends[1][0].transmit.flush();
        until("delivery", || {
            ends[0][0].receive.receive(&mut pool, &mut batch);
            !batch.is_empty()
        });
        batch.give(&mut pool);
        until("sleep again", || wakeups(&workers) > before && sleep_all(&workers));
    }
    // With nothing to do they are woken by nothing, and look at nothing.
    let counts = |workers: &Workers| -> Vec<_> {
        workers.status().iter().map(|worker| (worker.wakeups, worker.polls)).collect()
    };
    let before = counts(&workers);
    let slept: Vec<Duration> = workers.status().iter().map(|worker| worker.asleep).collect();
    let begin = Instant::now();
    until("a while", || begin.elapsed() > Duration::from_millis(100));
    assert_eq!(counts(&workers), before);
    for (status, before) in workers.status().iter().zip(slept) {
        assert!(status.asleep >= before + Duration::from_millis(100), "the sleep of now counts: {status:?}");
    }
}

/// A queue that rings for nobody.
#[derive(Debug)]
struct Mute(crate::memory::MemoryReceive);

impl Receive for Mute {
    fn receive(&mut self, pool: &mut Pool, batch: &mut Batch) {
        self.0.receive(pool, batch);
    }

    fn event(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    fn arm(&mut self) -> bool {
        true
    }

    fn disarm(&mut self) {}
}

#[test]
fn a_queue_that_rings_for_nobody_is_looked_at_once_in_a_while() {
    let Setting { region, workers, ports, mut ends, .. } = Setting::new([0, 1]);
    let (near, mut far) = link(8, [Accepts::ALL; 2]).expect("a link");
    let queue = QueueId { port: ports[0], queue: 0 };
    let one = ids()[0];
    workers.place(queue, Box::new(Mute(near.receive)), one).expect("it is taken");
    until("sleep", || workers.status()[0].is_asleep);
    let (mut pool, mut batch) = (Pool::new(&region), Batch::new());
    for _ in 0..10 {
        batch.push(pool.copy(&plain(mac(2), mac(1))).expect("memory"));
        far.transmit.transmit(&mut pool, &mut batch);
        until("delivery", || {
            ends[1][0].receive.receive(&mut pool, &mut batch);
            !batch.is_empty()
        });
        batch.give(&mut pool);
    }
    // Once for each time that it wakes, and not for a while after.
    until("sleep", || workers.status()[0].is_asleep);
    let before = workers.status()[0].clone();
    until("naps", || workers.status()[0].wakeups > before.wakeups + 100);
    let after = &workers.status()[0];
    let (polls, wakeups) = (after.polls - before.polls, after.wakeups - before.wakeups);
    assert!(polls <= 2 * wakeups, "{polls} looks in {wakeups} naps");
}

#[test]
fn a_sleeping_worker_holds_on_to_no_detached_port() {
    let Setting { engine, region, workers, ports, mut ends } = Setting::new([1, 1]);
    until("sleep", || sleep_all(&workers));
    let before = wakeups(&workers);
    // Awake once, so that it has looked at the tables.
    let (mut pool, mut batch) = (Pool::new(&region), Batch::new());
    batch.push(pool.copy(&plain(mac(2), mac(1))).expect("memory"));
    ends[0][0].transmit.transmit(&mut pool, &mut batch);
    ends[0][0].transmit.flush();
    until("delivery", || {
        ends[1][0].receive.receive(&mut pool, &mut batch);
        !batch.is_empty()
    });
    until("sleep again", || wakeups(&workers) > before && sleep_all(&workers));
    engine.detach(ports[1]);
    until("letting go", || ends[1][0].receive.is_abandoned());
}

/// Everything at once, for a while: ports come and go, queues move, policies change, workers balance, frames of all kinds fly.
#[test]
fn no_frame_is_lost_from_the_books_whatever_is_changed_meanwhile() {
    const VMS: u8 = 6;
    let region = Region::new(RegionLayout { small: 8192, large: 64 }).expect("memory");
    let engine = Engine::new();
    let (image, ports) = image(vec![Default::default(); usize::from(VMS)]);
    let (fewer, _) = self::image(vec![Default::default(); usize::from(VMS) - 2]);
    engine.apply(image.clone());
    let workers = Workers::start(&engine, &region, &cores(), Patience::default()).expect("workers");
    let mut pool = Pool::new(&region);
    let mut rng = Rng::new(5);
    let mut ends: BTreeMap<usize, MemoryPort> = BTreeMap::new();
    let (mut batch, mut received) = (Batch::new(), 0);
    let queue = |number: usize| QueueId { port: ports[number], queue: 0 };
    for round in 0..4_000 {
        let number = rng.below(usize::from(VMS));
        match rng.below(12) {
            0 if !ends.contains_key(&number) => {
                let accepts = if rng.chance(50) { Accepts::ALL } else { Accepts::default() };
                let (near, far) = link(64, [Accepts::ALL, accepts]).expect("a link");
                engine.attach(ports[number], vec![Box::new(near.transmit)]);
                workers.place_anywhere(queue(number), Box::new(near.receive)).expect("a place");
                ends.insert(number, far);
            }
            1 if ends.contains_key(&number) && rng.chance(30) => {
                // The far end goes first, last or in between.
                let far = ends.remove(&number).filter(|_| rng.chance(50));
                drop(workers.remove(queue(number)).expect("it is placed"));
                engine.detach(ports[number]);
                drop(far);
            }
            2 if ends.contains_key(&number) => {
                workers.move_to(queue(number), ids()[rng.below(2)]).expect("it moves");
            }
            3 if round % 10 == 0 => engine.apply(if rng.chance(50) { image.clone() } else { fewer.clone() }),
            4 => drop(workers.balance().expect("all are placed")),
            _ => {}
        }
        for (&number, end) in &mut ends {
            let from = number as u8 + 1;
            while batch.room() > 0 && rng.chance(80) {
                let to = if rng.chance(20) { [0xff; 6] } else { mac(1 + rng.below(usize::from(VMS)) as u8) };
                let frame = match rng.chance(10) {
                    true => super_frame(&mut pool, to, mac(from)),
                    false => pool.copy(&plain(to, mac(from))),
                };
                let Some(frame) = frame else { break };
                batch.push(frame);
            }
            end.transmit.transmit(&mut pool, &mut batch);
            end.transmit.flush();
            end.receive.receive(&mut pool, &mut batch);
            received += batch.len();
            batch.give(&mut pool);
        }
    }
    assert!(received > 10_000, "only {received} frames arrived");
    drop((workers, engine, ends));
    assert_eq!(region.outstanding(), 0);
}

#[test]
fn mistakes_are_told() {
    let Setting { engine, region, workers, ports, .. } = Setting::new([1, 1]);
    let [one, two] = ids();
    let nobody = WorkerId(1000);
    let queue = QueueId { port: ports[0], queue: 0 };
    let other = QueueId { port: ports[0], queue: 1 };
    let (near, _far) = link(8, [Accepts::ALL; 2]).expect("a link");
    let receive = workers.place(queue, Box::new(near.receive), one);
    assert!(matches!(receive, Err(WorkersError::Placed(found)) if found == queue));
    assert!(matches!(workers.move_to(other, one), Err(WorkersError::NotPlaced(_))));
    let refused = workers.move_to(queue, nobody).expect_err("nobody is there").to_string();
    assert_eq!(refused, format!("there is no worker on core 1000; they are on {}, {}", one.0, two.0));
    workers.remove(queue).expect("it is there");
    assert!(matches!(workers.remove(queue), Err(WorkersError::NotPlaced(_))));
    let patience = Patience::default();
    assert!(matches!(Workers::start(&engine, &region, &[], patience), Err(WorkersError::NoCores)));
    let refused = Workers::start(&engine, &region, &[one.0, nobody.0], patience);
    assert!(matches!(refused, Err(WorkersError::Start { core: 1000, .. })));
}

/// A queue at which a worker stays until it hears something, or that it dies of when there is nothing more to hear.
#[derive(Debug)]
struct Trap(std::sync::mpsc::Receiver<()>);

impl Receive for Trap {
    fn receive(&mut self, _pool: &mut Pool, _batch: &mut Batch) {
        self.0.recv().expect("a worker is to die");
    }

    fn event(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}
}

#[test]
fn nobody_waits_for_a_worker_that_is_stuck_or_has_died() {
    let region = Region::new(RegionLayout { small: 64, large: 4 }).expect("memory");
    let engine = Engine::new();
    let workers = Workers::start(&engine, &region, &cores()[..1], Patience::default()).expect("a worker");
    let (go_on, trap) = channel();
    workers.place(QueueId { port: 1, queue: 0 }, Box::new(Trap(trap)), ids()[0]).expect("it is there");
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let place = |queue| {
            let (end, other) = channel();
            let placed = workers.place(QueueId { port: 2, queue }, Box::new(Trap(other)), ids()[0]);
            (matches!(placed, Err(WorkersError::Died(worker)) if worker == ids()[0]), end)
        };
        let (is_stuck, end) = place(0);
        // Nobody is there to go on with the queue that comes late.
        go_on.send(()).expect("it listens");
        until("its end", || end.send(()).is_err());
        drop(go_on);
        until("the worker's end", || workers.team.lock().threads[&ids()[0]].has_ended());
        let (is_dead, _) = place(1);
        // A test that has failed hears no more.
        let _ = tell.send([is_stuck, is_dead]);
    });
    assert_eq!(told.recv_timeout(PATIENCE), Ok([true, true]));
}
