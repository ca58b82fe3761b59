use std::time::Instant;

use nix::sched::sched_getaffinity;
use nix::unistd::Pid;
use sluice_policy::generate::Rng;

use super::*;
use crate::engine::tests::{image, mac, plain, super_frame};
use crate::frame::{Pool, RegionLayout};
use crate::memory::{MemoryPort, link};
use crate::port::{Accepts, Batch, Transmit as _};

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn cores() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("an affinity");
    let mut cores: Vec<usize> =
        (0..64).filter(|core| allowed.is_set(*core).is_ok_and(|is_set| is_set)).take(2).collect();
    cores.resize(2, cores[0]);
    cores
}

/// Two vNICs, served by two workers; and the far ends.
struct Setting {
    engine: Engine,
    region: Arc<Region>,
    workers: Workers,
    ports: Vec<u32>,
    ends: Vec<MemoryPort>,
}

impl Setting {
    fn new() -> Setting {
        let region = Region::new(RegionLayout { small: 4096, large: 4 }).expect("memory");
        let engine = Engine::new();
        let (image, ports) = image(vec![Default::default(); 2]);
        engine.apply(image);
        let workers = Workers::start(&engine, &region, &cores(), Patience::default()).expect("workers");
        let ends = ports.iter().map(|&port| {
            let (near, far) = link(512, [Accepts::ALL; 2]).expect("a link");
            engine.attach(port, vec![Box::new(near.transmit)]);
            workers.place_anywhere(QueueId { port, queue: 0 }, Box::new(near.receive)).expect("a place");
            far
        });
        let ends = ends.collect();
        Setting { engine, region, workers, ports, ends }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::yield_now();
    }
}

#[test]
fn queues_move_under_load_and_no_frame_is_lost_or_overtaken() {
    let Setting { engine, region, workers, ports, mut ends } = Setting::new();
    let mut pool = Pool::new(&region);
    let (mut sent, mut received) = (0u64, 0u64);
    let mut batch = Batch::new();
    let mut rng = Rng::new(1);
    let queue = QueueId { port: ports[0], queue: 0 };
    let begin = Instant::now();
    let mut moves = 0;
    while moves < 200 {
        assert!(begin.elapsed() < PATIENCE, "{sent} sent, {received} received");
        while sent - received < 256 && batch.room() > 0 {
            let mut bytes = plain(mac(2), mac(1));
            bytes[20..28].copy_from_slice(&sent.to_be_bytes());
            batch.push(pool.copy(&bytes).expect("memory"));
            sent += 1;
        }
        ends[0].transmit.transmit(&mut pool, &mut batch);
        ends[0].transmit.flush();
        ends[1].receive.receive(&mut pool, &mut batch);
        for frame in batch.drain() {
            assert_eq!(frame.bytes()[20..28], received.to_be_bytes(), "the next frame is another");
            received += 1;
            pool.give(frame);
        }
        if rng.chance(5) {
            workers.move_to(queue, WorkerId(rng.below(2))).expect("it moves");
            moves += 1;
        }
    }
    until("the last frame", || {
        ends[1].receive.receive(&mut pool, &mut batch);
        received += batch.len() as u64;
        batch.give(&mut pool);
        received == sent
    });
    let stats = engine.port_stats(ports[1]);
    assert_eq!(stats.tx_packets, sent);
    let busy: Vec<_> = workers.status().iter().map(|worker| worker.busy).collect();
    assert!(busy.iter().all(|busy| !busy.is_zero()), "both have worked: {busy:?}");
    drop((workers, engine, ends));
    assert_eq!(region.outstanding(), 0);
}

#[test]
fn idle_workers_sleep_and_wake_for_a_frame() {
    let Setting { region, workers, mut ends, .. } = Setting::new();
    let mut pool = Pool::new(&region);
    let asleep = || workers.status().iter().all(|worker| worker.sleeps > 0);
    until("sleep", asleep);
    let sleeps = |workers: &Workers| workers.status().iter().map(|worker| worker.sleeps).sum::<u64>();
    for _ in 0..100 {
        let mut batch = Batch::new();
        batch.push(pool.copy(&plain(mac(1), mac(2))).expect("memory"));
        let before = sleeps(&workers);
        ends[1].transmit.transmit(&mut pool, &mut batch);
        ends[1].transmit.flush();
        until("delivery", || {
            ends[0].receive.receive(&mut pool, &mut batch);
            !batch.is_empty()
        });
        batch.give(&mut pool);
        until("sleep again", || sleeps(&workers) > before);
    }
    let before = sleeps(&workers);
    // With nothing to do they are woken by nothing.
    let begin = Instant::now();
    until("a while", || begin.elapsed() > Duration::from_millis(100));
    assert!(sleeps(&workers) <= before + 1);
}

#[test]
fn a_sleeping_worker_holds_on_to_no_detached_port() {
    let Setting { engine, region, workers, ports, mut ends } = Setting::new();
    until("sleep", || workers.status().iter().all(|worker| worker.sleeps > 0));
    let sleeps = || workers.status().iter().map(|worker| worker.sleeps).sum::<u64>();
    let before = sleeps();
    // Awake once, so that it has looked at the tables.
    let (mut pool, mut batch) = (Pool::new(&region), Batch::new());
    batch.push(pool.copy(&plain(mac(2), mac(1))).expect("memory"));
    ends[0].transmit.transmit(&mut pool, &mut batch);
    ends[0].transmit.flush();
    until("delivery", || {
        ends[1].receive.receive(&mut pool, &mut batch);
        !batch.is_empty()
    });
    until("sleep again", || sleeps() > before);
    engine.detach(ports[1]);
    until("letting go", || ends[1].receive.is_abandoned());
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
                workers.move_to(queue(number), WorkerId(rng.below(2))).expect("it moves");
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
    let Setting { engine, region, workers, ports, .. } = Setting::new();
    let queue = QueueId { port: ports[0], queue: 0 };
    let other = QueueId { port: ports[0], queue: 1 };
    let (near, _far) = link(8, [Accepts::ALL; 2]).expect("a link");
    let receive = workers.place(queue, Box::new(near.receive), WorkerId(0));
    assert!(matches!(receive, Err(WorkersError::Placed(found)) if found == queue));
    assert!(matches!(workers.move_to(other, WorkerId(0)), Err(WorkersError::NotPlaced(_))));
    assert!(matches!(workers.move_to(queue, WorkerId(2)), Err(WorkersError::NoWorker { workers: 2, .. })));
    workers.remove(queue).expect("it is there");
    assert!(matches!(workers.remove(queue), Err(WorkersError::NotPlaced(_))));
    let patience = Patience::default();
    assert!(matches!(Workers::start(&engine, &region, &[], patience), Err(WorkersError::NoCores)));
    let refused = Workers::start(&engine, &region, &[cores()[0], 1000], patience);
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
    workers.place(QueueId { port: 1, queue: 0 }, Box::new(Trap(trap)), WorkerId(0)).expect("it is there");
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let place = |queue| {
            let (end, other) = channel();
            let placed = workers.place(QueueId { port: 2, queue }, Box::new(Trap(other)), WorkerId(0));
            (matches!(placed, Err(WorkersError::Died(WorkerId(0)))), end)
        };
        let (is_stuck, end) = place(0);
        // Nobody is there to go on with the queue that comes late.
        go_on.send(()).expect("it listens");
        until("its end", || end.send(()).is_err());
        drop(go_on);
        until("the worker's end", || workers.threads[0].handle.as_ref().is_some_and(JoinHandle::is_finished));
        let (is_dead, _) = place(1);
        // A test that has failed hears no more.
        let _ = tell.send([is_stuck, is_dead]);
    });
    assert_eq!(told.recv_timeout(PATIENCE), Ok([true, true]));
}

#[test]
fn load_is_spread_and_small_differences_stay() {
    let load = |queue, worker, milliseconds| Load {
        queue: QueueId { port: 1, queue },
        worker: WorkerId(worker),
        busy: Duration::from_millis(milliseconds),
    };
    let plan = |loads: &[Load]| -> Vec<(u16, usize)> {
        balance::plan(loads, 2).iter().map(|step| (step.queue.queue, step.to.0)).collect()
    };
    assert_eq!(plan(&[]), []);
    assert_eq!(plan(&[load(0, 0, 50), load(1, 0, 50)]), [(0, 1)]);
    assert_eq!(plan(&[load(0, 0, 90), load(1, 0, 10)]), [(1, 1)]);
    assert_eq!(plan(&[load(0, 0, 50), load(1, 0, 4), load(2, 1, 48)]), [], "they are alike");
    assert_eq!(plan(&[load(0, 0, 60), load(1, 0, 40), load(2, 1, 10)]), [(1, 1)]);
    assert_eq!(plan(&[load(0, 0, 50), load(1, 1, 45), load(2, 1, 5)]), []);
    assert_eq!(plan(&[load(0, 0, 0), load(1, 0, 0)]), []);
    assert_eq!(plan(&[load(0, 0, 100)]), [], "one queue cannot be split");
    let many: Vec<Load> = (0..10).map(|queue| load(queue, 0, 10)).collect();
    assert_eq!(plan(&many).len(), 5);
}
