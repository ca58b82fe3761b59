//! What survives: reopening, kills at any point, deleted files, a second daemon.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;

use sluice_policy::lower;
use tempfile::TempDir;

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
        assert!(store.ensure_file(&state).expect("made again"));
    }
}

#[test]
fn a_file_of_a_newer_version_is_refused() {
    let dir = fresh();
    let (store, ..) = open(dir.path()).expect("opens");
    let transaction = store.database.begin_write().expect("writable");
    transaction.open_table(META).expect("a table").insert("schema", SCHEMA + 1).expect("inserted");
    transaction.open_table(RESOURCES).expect("a table");
    transaction.open_table(IDS).expect("a table");
    transaction.commit().expect("committed");
    drop(store);
    assert!(matches!(open(dir.path()), Err(StoreError::NewerSchema { .. })));
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
