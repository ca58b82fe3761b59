//! A front-end that does nonsense in a loop does not fill the log: lines are few, and those that were not written are counted.
//!
//! A program of its own, since it listens to the log of the whole process.

use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use sluice_user::vhost::{Mode, Port, PortConfig};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Each line that was written: how many it says were suppressed before it, if it says that.
static LINES: Mutex<Vec<Option<u64>>> = Mutex::new(Vec::new());

struct Listener;

#[derive(Default)]
struct Line(Option<u64>);

impl Visit for Line {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "suppressed" {
            self.0 = Some(value);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

impl Subscriber for Listener {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        LINES.lock().expect("no listener panics").push(line.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn nonsense_in_a_loop_costs_few_lines_and_each_is_counted() {
    const TIMES: u64 = 200;
    tracing::subscriber::set_global_default(Listener).expect("the first");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let config = PortConfig {
        path: path.clone(),
        mode: Mode::Server,
        queue_pairs: 1,
        mtu: 1500,
        offloads: true,
        standby: false,
    };
    let port = Port::open(config, Box::new(|_| {})).expect("the port opens");
    for _ in 0..TIMES {
        let mut socket = UnixStream::connect(&path).expect("it listens");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        // The size of a ring, which cannot be 3: refused, and the connection ends.
        let message = [8_u32, 1, 8, 0, 3].map(u32::to_ne_bytes).concat();
        socket.write_all(&message).expect("it reads");
        assert_eq!(socket.read(&mut [0; 8]).expect("it hangs up"), 0);
    }
    let status = port.status();
    assert_eq!((status.connections, status.refused_requests), (TIMES, TIMES), "all are counted");
    drop(port);
    let lines = LINES.lock().expect("no listener panics");
    let said: u64 = lines.iter().flatten().sum();
    let written = lines.iter().filter(|line| line.is_none()).count() as u64;
    assert!(lines.len() <= 30, "{} lines", lines.len());
    // That a request is refused, and that a connection ends.
    assert_eq!(written + said, 2 * TIMES, "{written} written, {said} suppressed");
}
