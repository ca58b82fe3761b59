use sluice_user::workers::{Move, Pace};
use tempfile::TempDir;
use tonic::{Code as Grpc, Status};

use super::*;
use crate::engine::WorkersView;
use crate::engine::fake::FakeEngine;
use crate::error::violations_of;
use crate::json;
use crate::store::Store;

const YAML: &str = r#"
switches: [{name: blue}]
vnics:
- {name: vm1, switch: blue, attach: {vhostUser: {path: /run/vm1.sock, queues: 2}}, mac: "02:00:00:00:00:01"}
- {name: vm2, switch: blue, attach: {veth: p2}, mac: "02:00:00:00:00:02"}
"#;

struct Bench {
    dir: TempDir,
    engine: FakeEngine,
}

impl Bench {
    fn new() -> Bench {
        let bench = Bench { dir: tempfile::tempdir().expect("a directory"), engine: FakeEngine::default() };
        bench.engine.world().workers.allowed = vec![0, 1, 2];
        bench
    }

    fn open(&self) -> Core {
        let (store, state, origin) =
            Store::open(&self.dir.path().join("state"), &self.dir.path().join("run")).expect("a store");
        let mut core = Core::new(store, state, origin, Box::new(self.engine.clone()));
        core.full_pass();
        core
    }

    /// Workers on cores 1 and 2; the first serves both queues of vm1.
    fn with_workers(&self, core: &Core) {
        let port = core.state.ids.ports.get("vnic/vm1").expect("it has a number");
        let queue = |queue| QueueStatus {
            queue: QueueId { port, queue },
            pin: (queue == 1).then_some(WorkerId(1)),
            lately: Pace { load: 0.25, frames_per_second: 500.0 },
            batches: 7,
            frames: 70,
            busy: Duration::from_micros(3),
        };
        let worker = |core, queues| WorkerStatus {
            worker: WorkerId(core),
            is_asleep: core == 2,
            lately: Pace { load: 0.5, frames_per_second: 1000.0 },
            frames: 140,
            polls: 9,
            wakeups: 2,
            busy: Duration::from_micros(6),
            asleep: Duration::from_secs(1),
            queues,
        };
        let workers = vec![worker(1, vec![queue(1), queue(0)]), worker(2, Vec::new())];
        self.engine.world().workers = WorkersView { workers, allowed: vec![0, 1, 2], trouble: None };
    }

    fn plan(&self) -> WorkersPlan {
        self.engine.world().plan.clone()
    }
}

fn apply(core: &mut Core, yaml: &str) {
    let config = Some(json::read_config(yaml).expect("good YAML"));
    core.apply(&v1::ApplyRequest { config, ..v1::ApplyRequest::default() }, "test").expect("valid");
}

fn set(core: &mut Core, cores: &[u32]) -> Result<v1::WorkersStatus, Error> {
    core.set_workers(&v1::SetWorkersRequest { cores: cores.to_vec() }, "test")
}

fn place(
    core: &mut Core,
    port: &str,
    queue: Option<u32>,
    to: Option<u32>,
) -> Result<v1::WorkersStatus, Error> {
    core.place_queue(&v1::PlaceQueueRequest { port: port.to_owned(), queue, core: to }, "test")
}

#[test]
fn what_is_wanted_is_done_kept_and_written_down() {
    let bench = Bench::new();
    let mut core = bench.open();
    apply(&mut core, YAML);
    bench.with_workers(&core);
    let port = core.state.ids.ports.get("vnic/vm1").expect("it has a number");
    let pin = |queue, core| (QueueId { port, queue }, WorkerId(core));

    let answer = set(&mut core, &[2, 1, 2]).expect("they may be used");
    assert_eq!((answer.cores, answer.allowed_cores), (vec![1, 2], vec![0, 1, 2]));
    assert_eq!(bench.plan().cores, [1, 2].into());
    place(&mut core, "vnic/vm1", None, Some(1)).expect("it is served");
    assert_eq!(bench.plan().pins, [pin(0, 1), pin(1, 1)].into());
    place(&mut core, "vnic/vm1", Some(1), Some(2)).expect("it is served");
    assert_eq!(bench.plan().pins, [pin(0, 1), pin(1, 2)].into());
    place(&mut core, "vnic/vm1", Some(0), None).expect("it is served");
    let wanted = bench.plan();
    assert_eq!(wanted.pins, [pin(1, 2)].into());
    // What is so already is no change.
    let revision = core.state.revision;
    set(&mut core, &[1, 2]).expect("they may be used");
    place(&mut core, "vnic/vm1", Some(0), None).expect("it is served");
    assert_eq!(core.state.revision, revision);
    assert_eq!(core.view().borrow().revision, revision);
    let audit = core.store().audit(10).expect("readable");
    let said: Vec<&str> = audit.iter().flat_map(|entry| &entry.changes).map(String::as_str).collect();
    assert_eq!(
        said[said.len() - 4..],
        [
            "workers run on cores 1, 2",
            "queues of vnic/vm1 pinned to core 1: 0, 1",
            "queues of vnic/vm1 pinned to core 2: 1",
            "queues of vnic/vm1 pinned no more: 0",
        ]
    );

    // The next daemon has it too, from the copy as well.
    for lost in [false, true] {
        drop(core);
        if lost {
            std::fs::remove_dir_all(bench.dir.path().join("state")).expect("removed");
        }
        bench.engine.world().plan = WorkersPlan::default();
        core = bench.open();
        assert_eq!(bench.plan(), wanted);
    }
    // With its port a pin goes.
    let vm1 = v1::ResourceRef { kind: "vnic".to_owned(), name: "vm1".to_owned() };
    core.delete(&v1::DeleteRequest { resources: vec![vm1], ..v1::DeleteRequest::default() }, "test")
        .expect("unreferenced");
    assert_eq!(bench.plan().pins, BTreeMap::new());
    apply(&mut core, YAML);
    assert_eq!(bench.plan().pins, BTreeMap::new(), "another of that name is another");
    set(&mut core, &[]).expect("it is the daemon's choice");
    assert_eq!(bench.plan(), WorkersPlan::default());
}

#[test]
fn refusals_say_what_is_wrong_and_change_nothing() {
    let bench = Bench::new();
    let mut core = bench.open();
    let nowhere = place(&mut core, "vnic/vm1", None, None);
    assert_eq!(Status::from(nowhere.expect_err("no port")).code(), Grpc::NotFound);
    apply(&mut core, YAML);
    bench.with_workers(&core);
    let before = core.state.clone();
    let code = |refused: Result<v1::WorkersStatus, Error>, words: &str| {
        let status = Status::from(refused.expect_err("it is to be refused"));
        assert!(status.message().contains(words), "{}", status.message());
        let field = violations_of(&status).first().map(|found| found.field.clone()).unwrap_or_default();
        (status.code(), field)
    };
    let is = |code, field: &str| (code, field.to_owned());
    assert_eq!(code(set(&mut core, &[1, 3]), "choose of 0, 1, 2"), is(Grpc::NotFound, "cores"));
    let moved = place(&mut core, "vnic/vm9", Some(0), Some(1));
    assert_eq!(code(moved, "no such port"), is(Grpc::NotFound, ""));
    let moved = place(&mut core, "vnic/vm1", Some(2), Some(1));
    assert_eq!(code(moved, "choose of 0, 1"), is(Grpc::NotFound, "queue"));
    let moved = place(&mut core, "vnic/vm1", Some(1), Some(0));
    assert_eq!(code(moved, "only on 1, 2"), is(Grpc::NotFound, "core"));
    let moved = place(&mut core, "vnic/vm2", Some(0), Some(1));
    assert_eq!(code(moved, "the kernel engine serves it"), is(Grpc::FailedPrecondition, ""));
    bench.engine.world().is_stubborn = true;
    assert_eq!(code(set(&mut core, &[1]), "has died"), is(Grpc::Internal, ""));
    assert_eq!(core.state, before);
    assert_eq!(bench.plan(), WorkersPlan::default());
}

#[test]
fn wishes_wait_until_tables_of_the_past_are_taken_over() {
    let bench = Bench::new();
    bench.engine.world().found_tables = true;
    let mut core = bench.open();
    let refused = set(&mut core, &[1]).expect_err("a state would be taken for the whole of it");
    assert_eq!(Status::from(refused).code(), Grpc::FailedPrecondition);
    drop(core);
    assert!(bench.open().is_untouched(), "the next daemon knows as little");
}

#[test]
fn workers_are_shown_with_the_names_of_ports() {
    let bench = Bench::new();
    let mut core = bench.open();
    apply(&mut core, YAML);
    bench.with_workers(&core);
    bench.engine.world().workers.trouble = Some("too few files".to_owned());
    let shown = core.workers();
    assert_eq!(shown.trouble, "too few files");
    let [busy, idle] = &shown.workers[..] else { panic!("{shown:?}") };
    assert_eq!((busy.core, busy.state()), (1, v1::worker::State::Spinning));
    assert_eq!((idle.core, idle.state()), (2, v1::worker::State::Asleep));
    assert_eq!((busy.load, busy.frames_per_second, busy.frames), (0.5, 1000.0, 140));
    assert_eq!((busy.polls, busy.wakeups, busy.busy_ns, busy.asleep_ns), (9, 2, 6_000, 1_000_000_000));
    let queues: Vec<_> =
        busy.queues.iter().map(|queue| (queue.port.as_str(), queue.queue, queue.pin)).collect();
    assert_eq!(queues, [("vnic/vm1", 0, None), ("vnic/vm1", 1, Some(1))]);
    assert_eq!((busy.queues[0].batches, busy.queues[0].frames, busy.queues[0].busy_ns), (7, 70, 3_000));

    let port = core.state.ids.ports.get("vnic/vm1").expect("it has a number");
    let step = Move { queue: QueueId { port, queue: 1 }, from: WorkerId(1), to: WorkerId(2) };
    bench.engine.world().moves = vec![step];
    core.balance_workers();
    let last = core.events().newest().next().expect("it is noted").text.clone();
    assert_eq!(last, "queue 1 of vnic/vm1 moved from the worker on core 1 to that on core 2");
}
