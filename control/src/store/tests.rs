//! What survives: reopening, kills at any point, deleted files, a second daemon.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;

use sluice_policy::lower;
use tempfile::TempDir;

use super::small_disk::SmallDisk;
use super::*;
use crate::json;

/// Set for the child that commits until it is killed.
const CHILD: &str = "SLUICE_STORE_TEST_DIR";

fn state(revision: u64, vnics: u64) -> State {
    let vnics: Vec<String> = (0..vnics)
        .map(|n| {
            format!(
                "{{name: vm{n}, switch: s, attach: {{tap: t{n}}}, mac: '02:00:00:00:{:02x}:{:02x}'}}",
                n >> 8,
                n & 255
            )
        })
        .collect();
    let yaml =
        format!("switches: [{{name: s, ageingSeconds: {}}}]\nvnics: [{}]", revision + 1, vnics.join(","));
    let specs = convert::config(&json::read_config(&yaml).expect("good YAML")).expect("good configuration");
    let entry = |spec: convert::Spec| (spec.key(), Entry { revision, spec: Arc::new(spec) });
    let mut state = State { revision, resources: specs.into_iter().map(entry).collect(), ..State::default() };
    lower::assign_ids(&state.config(), &mut state.ids).expect("it fits");
    // Every third has nobody's wishes.
    let number = u32::try_from(revision % 3).expect("below three");
    for queue in 0..number {
        state.workers.cores.insert(10 * number + queue);
        state.workers.pins.insert(Pin { port: format!("vnic/vm{queue}"), queue }, 10 * number + queue);
    }
    state
}

/// The state of each revision, so that a mixture of two is recognized.
fn state_of(revision: u64) -> State {
    state(revision, 5 + revision % 7)
}

fn audit(revision: u64) -> v1::AuditEntry {
    v1::AuditEntry { revision, actor: "test".to_owned(), ..v1::AuditEntry::default() }
}

fn open(dir: &Path) -> Result<(Store, State, Origin), StoreError> {
    Store::open(&dir.join("state"), &dir.join("run"))
}

fn fresh() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

#[test]
fn commits_are_read_back_with_numbers_and_audit() {
    let dir = fresh();
    let (mut store, mut now, origin) = open(dir.path()).expect("opens");
    assert_eq!((&now, origin), (&State::default(), Origin::Nowhere));
    for revision in 1..20 {
        let next = state_of(revision);
        assert!(store.commit(&now, &next, &audit(revision)).expect("committed").is_none());
        now = next;
    }
    drop(store);
    let (store, read, origin) = open(dir.path()).expect("opens");
    assert_eq!((&read, origin), (&now, Origin::StateDir));
    let revisions: Vec<u64> = store.audit(3).expect("readable").iter().map(|entry| entry.revision).collect();
    assert_eq!(revisions, [17, 18, 19]);
}

#[test]
fn a_second_daemon_is_refused_and_told_who_has_it() {
    let dir = fresh();
    let (first, ..) = open(dir.path()).expect("opens");
    let error = open(dir.path()).expect_err("locked").to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    std::fs::remove_dir_all(dir.path().join("state")).expect("removed");
    let error = open(dir.path()).expect_err("still locked, by the runtime directory").to_string();
    assert!(error.contains("in use by another sluiced"), "{error}");
    drop(first);
    open(dir.path()).expect("free again");
}

#[test]
fn the_copy_stands_in_for_a_deleted_state_directory() {
    let dir = fresh();
    let (mut store, now, _) = open(dir.path()).expect("opens");
    store.commit(&now, &state_of(1), &audit(1)).expect("committed");
    drop(store);
    std::fs::remove_dir_all(dir.path().join("state")).expect("removed");
    let (store, read, origin) = open(dir.path()).expect("opens");
    assert_eq!((read, origin), (state_of(1), Origin::RuntimeCopy));
    drop(store);
    std::fs::remove_dir_all(dir.path().join("run")).expect("removed");
    let (_store, read, origin) = open(dir.path()).expect("opens");
    assert_eq!((read, origin), (state_of(1), Origin::StateDir));
    assert!(dir.path().join("run/state.pb").exists(), "the copy is made again");
}

#[test]
fn a_first_start_leaves_no_state_behind() {
    let dir = fresh();
    for _ in 0..2 {
        let (mut store, state, origin) = open(dir.path()).expect("opens");
        assert_eq!(origin, Origin::Nowhere);
        assert!(!store.ensure_copy(&state).expect("nothing to do"));
        std::fs::remove_file(dir.path().join("state").join(FILE)).expect("removed");
        assert_eq!(store.ensure_file(&state).expect("made again"), Repair::Remade);
    }
}

#[test]
fn a_file_of_a_newer_version_is_refused() {
    let dir = fresh();
    let (store, ..) = open(dir.path()).expect("opens");
    let transaction = store.database().expect("open").begin_write().expect("writable");
    transaction.open_table(META).expect("a table").insert("schema", SCHEMA + 1).expect("inserted");
    transaction.open_table(RESOURCES).expect("a table");
    transaction.open_table(IDS).expect("a table");
    transaction.commit().expect("committed");
    drop(store);
    assert!(matches!(open(dir.path()), Err(StoreError::NewerSchema { .. })));
}

#[test]
fn a_full_disk_fails_a_commit_and_nothing_after_it() {
    SmallDisk::with(|disk| {
        let (mut store, start, _) = open(disk.dir()).expect("opens");
        let (first, big, next) = (state(1, 3), state(2, 1000), state(2, 2));
        store.commit(&start, &first, &audit(1)).expect("committed");
        disk.fill();
        for _ in 0..3 {
            let error = store.commit(&first, &big, &audit(2)).expect_err("it does not fit").to_string();
            assert!(error.contains("No space left"), "the cause, not that there was one: {error}");
            assert_eq!(store.failure(), Some(error.as_str()));
        }
        disk.free();
        assert!(store.commit(&first, &next, &audit(2)).expect("it fits again").is_none());
        assert_eq!(store.failure(), None);
        drop(store);
        let (store, read, origin) = open(disk.dir()).expect("opens");
        assert_eq!((read, origin), (next, Origin::StateDir));
        let log: Vec<u64> = store.audit(9).expect("readable").iter().map(|entry| entry.revision).collect();
        assert_eq!(log, [1, 2], "failed commits left nothing");
    });
}

#[test]
fn a_failed_commit_that_reached_the_disk_is_taken_back() {
    let dir = fresh();
    let (mut store, start, _) = open(dir.path()).expect("opens");
    let (first, failed, next) = (state(1, 3), state(2, 9), state(2, 2));
    store.commit(&start, &first, &audit(1)).expect("committed");
    let doubt = |store: &Store| {
        store.write(Base::Known(&first), &failed, None).expect("written");
        store.in_doubt.set(true);
    };
    doubt(&store);
    assert_eq!(store.ensure_file(&first).expect("repaired"), Repair::Reopened);
    assert_eq!(store.read().expect("readable").as_ref(), Some(&first));
    assert_eq!(store.ensure_file(&first).expect("nothing to do"), Repair::None);
    doubt(&store);
    store.commit(&first, &next, &audit(2)).expect("committed");
    assert_eq!(store.read().expect("readable"), Some(next));
}

#[test]
fn a_first_commit_that_reached_the_disk_is_taken_back_to_nothing() {
    let dir = fresh();
    let (mut store, start, _) = open(dir.path()).expect("opens");
    store.write(Base::Known(&start), &state(1, 3), None).expect("written");
    store.in_doubt.set(true);
    store.ensure_file(&start).expect("repaired");
    drop(store);
    assert_eq!(open(dir.path()).expect("opens").2, Origin::Nowhere);
}

#[test]
fn a_deleted_file_is_made_again_with_the_whole_state() {
    let dir = fresh();
    let file = dir.path().join("state").join(FILE);
    let (mut store, start, _) = open(dir.path()).expect("opens");
    let (first, next) = (state(1, 9), state(2, 10));
    store.commit(&start, &first, &audit(1)).expect("committed");
    for replacement in [None, Some("something else")] {
        std::fs::remove_file(&file).expect("removed");
        if let Some(text) = replacement {
            std::fs::write(&file, text).expect("written");
        }
        assert_eq!(store.ensure_file(&first).expect("made again"), Repair::Remade);
        assert_eq!(store.read().expect("readable").as_ref(), Some(&first));
    }
    // A commit notices by itself, and must not write a difference into an empty file.
    std::fs::remove_file(&file).expect("removed");
    store.commit(&first, &next, &audit(2)).expect("committed");
    drop(store);
    std::fs::remove_file(dir.path().join("run/state.pb")).expect("removed");
    assert_eq!(open(dir.path()).expect("opens").1, next);
}

#[test]
fn a_file_that_cannot_be_made_again_is_tried_again() {
    SmallDisk::with(|disk| {
        let file = disk.dir().join("state").join(FILE);
        let (mut store, start, _) = open(disk.dir()).expect("opens");
        let first = state(1, 1000);
        store.commit(&start, &first, &audit(1)).expect("committed");
        std::fs::remove_file(&file).expect("removed");
        disk.fill();
        for _ in 0..3 {
            store.ensure_file(&first).expect_err("it does not fit");
            store.commit(&first, &state(2, 1), &audit(2)).expect_err("nor does this");
            assert!(!file.exists(), "no half of a file");
        }
        disk.free();
        assert_eq!(store.ensure_file(&first).expect("it fits again"), Repair::Remade);
        drop(store);
        assert_eq!(open(disk.dir()).expect("opens").1, first);
    });
}

#[test]
fn only_the_owner_may_read_what_is_made() {
    let dir = fresh();
    let mode = |path: &str| {
        let metadata = std::fs::metadata(dir.path().join(path)).expect("it was made");
        metadata.permissions().mode() & 0o777
    };
    let (mut store, start, _) = open(dir.path()).expect("opens");
    store.commit(&start, &state(1, 1), &audit(1)).expect("committed");
    for made_again in [false, true] {
        if made_again {
            std::fs::remove_dir_all(dir.path().join("state")).expect("removed");
            std::fs::remove_dir_all(dir.path().join("run")).expect("removed");
            store.ensure_file(&state(1, 1)).expect("made again");
            store.ensure_copy(&state(1, 1)).expect("made again");
        }
        for (path, expected) in [
            ("state", 0o700),
            ("run", 0o700),
            ("state/sluice.redb", 0o600),
            ("run/state.pb", 0o600),
            ("state/lock", 0o600),
        ] {
            assert_eq!(mode(path), expected, "{path} is {:o}", mode(path));
        }
    }
}

/// Not a test: the child of the one below.
#[test]
fn commit_until_killed() {
    let Some(dir) = std::env::var_os(CHILD) else {
        return;
    };
    let (mut store, mut now, _) = open(Path::new(&dir)).expect("opens");
    loop {
        let next = state_of(now.revision + 1);
        store.commit(&now, &next, &audit(next.revision)).expect("committed");
        now = next;
        acknowledge(now.revision);
    }
}

/// Writes past the test harness, which would keep it.
fn acknowledge(revision: u64) {
    use std::io::Write;
    writeln!(std::io::stderr().lock(), "committed {revision}").expect("the parent reads");
}

#[test]
fn no_acknowledged_commit_is_lost_and_none_is_torn_by_kill_9() {
    let dir = fresh();
    let mut last = 0;
    for round in 0..12 {
        let program = std::env::current_exe().expect("this test");
        let mut child = Command::new(program)
            .args(["--exact", "store::tests::commit_until_killed", "--nocapture"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        // Each round is killed after another number of commits, at whatever point it then is.
        for _ in 0..=round * 3 {
            let line = lines.next().expect("it commits until it is killed").expect("text");
            last = line.strip_prefix("committed ").expect("an acknowledgement").parse().expect("a number");
        }
        child.kill().expect("killed");
        child.wait().expect("ended");
        for line in lines {
            let line = line.expect("text");
            if let Some(revision) = line.strip_prefix("committed ").and_then(|revision| revision.parse().ok())
            {
                last = revision;
            }
        }
        let (store, read, _) = open(dir.path()).expect("opens after a kill");
        assert!(
            read.revision == last || read.revision == last + 1,
            "{} after {last} was acknowledged",
            read.revision
        );
        assert_eq!(read, state_of(read.revision), "round {round}");
        let log = store.audit(1).expect("readable");
        assert_eq!(log[0].revision, read.revision, "the audit log is of the same transaction");
        last = read.revision;
    }
    assert!(last > 100, "only {last} commits");
}
