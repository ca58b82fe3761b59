use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use sluice_policy::ids::Ids;
use sluice_policy::image::Bindings;
use sluice_policy::lower;
use sluice_user::frame::Pool;
use sluice_user::port::Batch;
use sluice_user::vhost::{QueueError, QueueStatus};
use sluice_user::workers::{WorkerId, WorkerStatus};
use tempfile::TempDir;

use super::*;
use crate::json;

const PATIENCE: Duration = Duration::from_secs(20);

/// The userspace engine's part of a host with a guest's rings at this path.
fn image(path: &str, queues: u32) -> Image {
    image_with(&format!("{{path: {path}, queues: {queues}}}"))
}

fn image_with(rings: &str) -> Image {
    let yaml = format!(
        "switches: [{{name: blue}}]\nvnics:\n- {{name: vm1, switch: blue, mac: \"02:00:00:00:00:01\", \
         attach: {{vhostUser: {rings}}}}}"
    );
    let specs = crate::convert::config(&json::read_config(&yaml).expect("good YAML")).expect("good values");
    let config = crate::convert::collect(&specs);
    let mut ids = Ids::default();
    lower::assign_ids(&config, &mut ids).expect("numbers");
    lower::split(&lower::lower(&config, &ids, &Bindings::new()).expect("an image")).user
}

fn socket(folder: &TempDir) -> String {
    folder.path().join("vm1.sock").display().to_string()
}

#[test]
fn a_port_opens_with_its_policy_and_closes_without() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = socket(&folder);
    let mut engine = UserEngine::default();
    assert!(engine.running.is_none(), "nothing runs for nobody");
    assert_eq!(engine.frames(), None);
    let report = engine.sync(&image(&path, 2));
    assert_eq!(report.changes, [format!("opened vnic/vm1 on {path}")]);
    let PortState::Pending { reason } = &report.ports["vnic/vm1"].state else { panic!("{report:?}") };
    assert!(reason.contains(&path), "{reason}");
    assert!(engine.is_open("vnic/vm1"));
    let mode = std::fs::metadata(&path).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let queues = |engine: &UserEngine| {
        engine
            .running
            .iter()
            .flat_map(|running| running.workers.status())
            .map(|worker| worker.queues.len())
            .sum::<usize>()
    };
    assert_eq!(queues(&engine), 2);
    let frames = engine.frames().expect("there is memory now");
    assert_eq!((frames.total, frames.in_use), (u64::from(LAYOUT.small + LAYOUT.large), 0));
    assert_eq!(engine.sync(&image(&path, 2)).changes, [""; 0], "a second pass does nothing");
    assert_eq!(engine.sync(&image(&path, 3)).changes.len(), 2, "with more queues it is another port");
    assert_eq!(queues(&engine), 3);
    assert_eq!(engine.sync(&Image::default()).changes, ["closed vnic/vm1"]);
    assert_eq!(queues(&engine), 0);
    assert!(!folder.path().join("vm1.sock").exists());
}

#[test]
fn a_guest_that_comes_wakes_the_daemon() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = socket(&folder);
    let mut engine = UserEngine::default();
    let (sender, woken) = channel();
    engine.watch(Arc::new(move || {
        // A test that has ended hears no more.
        let _ = sender.send(());
    }));
    engine.sync(&image(&path, 1));
    let front = UnixStream::connect(&path).expect("it listens");
    woken.recv_timeout(PATIENCE).expect("it tells of the guest");
    let report = engine.sync(&image(&path, 1));
    let PortState::Pending { reason } = &report.ports["vnic/vm1"].state else { panic!("{report:?}") };
    assert!(reason.contains("waiting for its guest's driver"), "{reason}");
    drop(front);
    woken.recv_timeout(PATIENCE).expect("and of its end");
}

#[test]
fn a_socket_of_others_fails_one_port_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = socket(&folder);
    let other = UnixListener::bind(&path).expect("a socket");
    let mut engine = UserEngine::default();
    let report = engine.sync(&image(&path, 1));
    let PortState::Failed { error } = &report.ports["vnic/vm1"].state else { panic!("{report:?}") };
    assert!(error.contains("in use"), "{error}");
    assert!(!engine.is_open("vnic/vm1"));
    drop(other);
    assert_eq!(engine.sync(&image(&path, 1)).changes.len(), 1, "what a dead process left is replaced");
}

#[test]
fn a_client_goes_to_its_vmm() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = socket(&folder);
    let image = image_with(&format!("{{path: {path}, mode: CLIENT}}"));
    let mut engine = UserEngine::default();
    let report = engine.sync(&image);
    let PortState::Pending { reason } = &report.ports["vnic/vm1"].state else { panic!("{report:?}") };
    assert!(reason.contains("to listen on"), "{reason}");
    // It tries until somebody listens.
    let vmm = UnixListener::bind(&path).expect("a socket");
    vmm.accept().expect("it comes");
    engine.sync(&Image::default());
    assert!(folder.path().join("vm1.sock").exists(), "the socket is the VMM's");
}

#[test]
fn what_is_refused_at_the_rings_is_in_the_notes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = socket(&folder);
    let mut engine = UserEngine::default();
    let notes = |engine: &mut UserEngine| engine.sync(&image(&path, 1)).ports["vnic/vm1"].notes.clone();
    assert_eq!(notes(&mut engine), [""; 0]);
    // There is no guest to take them.
    let region = Region::new(RegionLayout { small: 4, large: 4 }).expect("memory");
    let mut pool = Pool::new(&region);
    let mut batch = Batch::new();
    for _ in 0..3 {
        batch.push(pool.copy(&[0; 60]).expect("memory"));
    }
    let (_, mut to) = engine.open["vnic/vm1"].port.queues().remove(0);
    assert_eq!(to.transmit(&mut pool, &mut batch), 0);
    assert_eq!(notes(&mut engine), ["frames refused at the rings: 3: the guest's ring is not running"]);
}

#[test]
fn stops_and_refused_requests_are_in_the_notes_of_a_port_that_runs() {
    let rings = VhostUser { path: "/run/vm1".to_owned(), mode: VhostMode::Server, queues: 1 };
    let mut queues = [QueueStatus::default(), QueueStatus::default()];
    queues[0].state = QueueState::Running;
    queues[1].state = QueueState::Stopped(QueueError::WrongDirection);
    queues[1].counters.stops = 2;
    let status =
        Status { is_connected: true, refused_requests: 5, queues: queues.to_vec(), ..Status::default() };
    let (state, notes) = state(&rings, &status);
    assert_eq!(state, PortState::Attached);
    let has = |what: &str| notes.iter().any(|note| note.contains(what));
    assert!(has("driver did: 2") && has("VMM refused: 5") && has("queue 1 is stopped"), "{notes:?}");
    assert!(has("1 queues run"), "{notes:?}");
}

#[test]
fn workers_run_where_they_are_wanted_and_serve_what_is_pinned_to_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = image(&socket(&folder), 3);
    let (&id, _) = image.ports.iter().find(|(_, port)| port.name == "vnic/vm1").expect("it has a number");
    let mut engine = UserEngine::default();
    let allowed = engine.workers().allowed;
    let [one, two] = allowed[..2] else { panic!("two cores") };
    let pin = |queue, core| (QueueId { port: id, queue }, WorkerId(core));
    let plan = |cores: &[usize], pins: &[(QueueId, WorkerId)]| WorkersPlan {
        cores: cores.iter().copied().collect(),
        pins: pins.iter().copied().collect(),
    };
    let places = |engine: &UserEngine| -> Vec<(usize, Vec<u16>)> {
        let workers = engine.workers().workers;
        let queues = |worker: &WorkerStatus| worker.queues.iter().map(|status| status.queue.queue).collect();
        workers.iter().map(|worker| (worker.worker.0, queues(worker))).collect()
    };
    // Before there is anything to serve, a wish.
    engine.set_workers(&plan(&[one, two], &[pin(1, two), pin(2, two)])).expect("it is but noted");
    assert_eq!(places(&engine), []);
    engine.sync(&image);
    assert_eq!(places(&engine), [(one, vec![0]), (two, vec![1, 2])]);
    engine.set_workers(&plan(&[one, two], &[pin(0, two), pin(1, one)])).expect("they move");
    assert_eq!(places(&engine), [(one, vec![1]), (two, vec![0, 2])]);
    engine.set_workers(&plan(&[two], &[])).expect("they move");
    assert_eq!(places(&engine), [(two, vec![0, 1, 2])]);
    engine.set_workers(&plan(&[one, two, 4000], &[])).expect("what there is of them");
    assert_eq!(places(&engine).len(), 2);
    let trouble = engine.workers().trouble.expect("and what not");
    assert!(trouble.contains("core 4000"), "{trouble}");
    engine.set_workers(&WorkersPlan::default()).expect("our choice");
    assert_eq!(places(&engine).len(), (allowed.len() / 4).clamp(1, 3));
    assert_eq!(engine.workers().trouble, None);
    assert_eq!(engine.balance_workers().expect("nothing to be done"), []);
}
