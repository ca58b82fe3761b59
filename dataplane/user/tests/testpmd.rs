//! DPDK's testpmd as a guest: its virtio-user driver is a front-end and a driver that somebody else wrote.
//!
//! The engine's side is this test alone: it counts what comes from the guest, and sends frames where the mode wants some. Both
//! sides' counters are compared at the end. Needs `dpdk-testpmd`, which `cargo xtask test` installs.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::port::{Batch, Receive, Transmit};
use sluice_user::vhost::features::{Features, bit};
use sluice_user::vhost::{FromGuest, Mode, Port, PortConfig, QueueState, Status, ToGuest};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// Frames that each run passes at least, where `SLUICE_CASES` does not say.
const ENOUGH: u64 = 20_000;

/// Which virtio device testpmd makes.
#[derive(Clone, Copy)]
struct Device {
    queues: u16,
    mergeable: bool,
    packed: bool,
    in_order: bool,
}

/// The one that it makes if it is told nothing.
const PLAIN: Device = Device { queues: 1, mergeable: true, packed: false, in_order: true };

/// What testpmd is to do.
struct Run {
    /// `--forward-mode`
    mode: &'static str,
    device: Device,
    /// Further parameters of testpmd.
    more: &'static [&'static str],
    listens: Mode,
}

struct Testpmd {
    child: Child,
}

impl Testpmd {
    fn start(folder: &Path, run: &Run) -> Testpmd {
        let server = if run.listens == Mode::Client { ",server=1" } else { "" };
        let Device { queues, mergeable, packed, in_order } = run.device;
        let device = format!(
            "--vdev=net_virtio_user0,path={}/socket,queues={queues},mrg_rxbuf={},packed_vq={},in_order={}{server}",
            folder.display(),
            u8::from(mergeable),
            u8::from(packed),
            u8::from(in_order)
        );
        let queues = [format!("--rxq={queues}"), format!("--txq={queues}")];
        let child = Command::new("dpdk-testpmd")
            .args([
                "-l",
                "0,1",
                "--no-pci",
                "--no-huge",
                "-m",
                "256",
                "--single-file-segments",
                "--no-telemetry",
                // Nothing is shared with another testpmd, not even a lock.
                "--no-shconf",
            ])
            .args([&device, "--", "--auto-start", "--no-mlockall", "--total-num-mbufs=4096"])
            .arg(format!("--forward-mode={}", run.mode))
            .args(queues)
            .args(run.more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Testpmd { child: child.expect("dpdk-testpmd starts; Debian has it in dpdk-dev") }
    }

    /// Ends it as an operator does, and reads what it counted.
    fn end(mut self, mut meanwhile: impl FnMut()) -> Counted {
        if let Some(stdin) = &mut self.child.stdin {
            stdin.write_all(b"\n").expect("testpmd listens");
        }
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("it is our child").is_none() {
            assert!(Instant::now() < deadline, "testpmd does not end");
            meanwhile();
        }
        let mut text = String::new();
        self.child.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
        let total = |name: &str| {
            let last = text.lines().rfind(|line| line.trim_start().starts_with(name)).unwrap_or_default();
            let number = last.split_whitespace().skip_while(|word| !word.ends_with(':')).nth(1);
            number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
        };
        Counted { received: total("RX-packets"), sent: total("TX-packets") }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What testpmd says that it did.
#[derive(Debug)]
struct Counted {
    received: u64,
    sent: u64,
}

/// The switch's side of a run.
struct Served {
    port: Port,
    ends: Vec<(FromGuest, ToGuest)>,
    pool: Pool,
    received: u64,
    sent: u64,
    /// Where the socket is.
    _folder: TempDir,
}

impl Served {
    /// Takes what came, and sends frames of its own to `flood`.
    fn round(&mut self, flood: bool) {
        let mut batch = Batch::new();
        for (from, to) in &mut self.ends {
            from.receive(&mut self.pool, &mut batch);
            for frame in batch.frames() {
                assert!(frame.len() >= 60, "testpmd sends whole frames");
            }
            self.received += batch.len() as u64;
            batch.give(&mut self.pool);
            while flood && batch.room() > 0 {
                batch.push(self.pool.copy(&[0x02; 64]).expect("there are chunks"));
            }
            if !batch.is_empty() {
                self.sent += to.transmit(&mut self.pool, &mut batch) as u64;
                to.flush();
            }
        }
    }
}

/// Runs testpmd until enough frames have passed; answers what both sides counted.
fn run(run: &Run, flood: bool) -> (Status, Counted, u64, u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = PortConfig {
        path: folder.path().join("socket"),
        mode: run.listens,
        queue_pairs: run.device.queues,
        mtu: 1500,
        offloads: true,
        standby: false,
    };
    let port = Port::open(config, Box::new(|_| {})).expect("the port opens");
    let testpmd = Testpmd::start(folder.path(), run);
    let region = Region::new(RegionLayout { small: 1024, large: 4 }).expect("memory");
    let ends = port.queues();
    let mut served = Served { port, ends, pool: Pool::new(&region), received: 0, sent: 0, _folder: folder };
    let deadline = Instant::now() + PATIENCE;
    let enough = std::env::var("SLUICE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(ENOUGH);
    let lacks = |served: &Served| match run.mode {
        "txonly" => served.received < enough,
        "rxonly" => served.sent < enough,
        _ => served.received.min(served.sent) < enough,
    };
    while lacks(&served) {
        assert!(Instant::now() < deadline, "too few frames: {:?}", served.port.status());
        served.round(flood);
    }
    let status = served.port.status();
    let counted = testpmd.end(|| served.round(flood));
    // What was still on its way.
    served.round(false);
    assert_eq!(region.outstanding(), 0, "no frame is lost");
    let all = served.port.status();
    let from: u64 = all.queues.iter().skip(1).step_by(2).map(|queue| queue.counters.frames).sum();
    let to: u64 = all.queues.iter().step_by(2).map(|queue| queue.counters.frames).sum();
    assert_eq!((from, to), (served.received, served.sent), "the port counts right");
    (status, counted, served.received, served.sent)
}

fn assert_runs(status: &Status, device: Device) {
    let features = Features(status.features);
    assert_eq!(features.has(bit::RING_PACKED), device.packed, "{features:x?}");
    assert_eq!(features.has(bit::MRG_RXBUF), device.mergeable, "{features:x?}");
    assert_eq!(features.has(bit::IN_ORDER), device.in_order, "{features:x?}");
    for (index, queue) in status.queues.iter().enumerate() {
        assert_eq!(queue.state, QueueState::Running, "queue {index}");
        assert_eq!(queue.counters.stops, 0, "queue {index}");
    }
}

/// testpmd sends, we count.
fn txonly(device: Device, more: &'static [&'static str], listens: Mode) {
    let txonly = Run { mode: "txonly", device, more, listens };
    let (status, counted, received, _) = run(&txonly, false);
    assert_runs(&status, device);
    for pair in 0..usize::from(device.queues) {
        assert!(status.queues[2 * pair + 1].counters.frames > 0, "pair {pair} carries frames");
    }
    // It counts what it put into the ring; what it takes back when it stops may not have been fetched.
    assert!(received <= counted.sent, "{received} received of {}", counted.sent);
    assert!(counted.sent - received <= 256 * u64::from(device.queues), "{received} of {}", counted.sent);
}

/// We send, testpmd counts, and with `mac` sends back.
fn receives(mode: &'static str, device: Device) {
    let rxonly = Run { mode, device, more: &[], listens: Mode::Server };
    let (status, counted, received, sent) = run(&rxonly, true);
    assert_runs(&status, device);
    let queues = u64::from(device.queues);
    assert!(counted.received <= sent, "{} received of {sent}", counted.received);
    assert!(sent - counted.received <= 1024 * queues, "{} of {sent}", counted.received);
    assert!(received <= counted.sent, "{received} received of {}", counted.sent);
    assert!(counted.sent - received <= 256 * queues, "{received} of {}", counted.sent);
}

/// All modes with one device. With several queues it is one that takes its buffers back in any order.
macro_rules! with {
    ($name:ident, $queues:literal, $mergeable:literal, $packed:literal) => {
        mod $name {
            use super::{Device, Mode, receives, txonly};

            const DEVICE: Device =
                Device { queues: $queues, mergeable: $mergeable, packed: $packed, in_order: $queues == 1 };

            #[test]
            fn testpmd_sends() {
                txonly(DEVICE, &[], Mode::Server);
            }

            #[test]
            fn testpmd_receives() {
                receives("rxonly", DEVICE);
            }

            #[test]
            fn testpmd_sends_back() {
                receives("mac", DEVICE);
            }
        }
    };
}

with!(split, 1, false, false);
with!(split_mergeable, 1, true, false);
with!(split_by_four_queues, 4, false, false);
with!(split_mergeable_by_four_queues, 4, true, false);
with!(packed, 1, false, true);
with!(packed_mergeable, 1, true, true);
with!(packed_by_four_queues, 4, false, true);
with!(packed_mergeable_by_four_queues, 4, true, true);

#[test]
fn testpmd_sends_frames_in_pieces() {
    for packed in [false, true] {
        txonly(Device { packed, ..PLAIN }, &["--txpkts=20,50,400"], Mode::Server);
    }
}

#[test]
fn testpmd_listens() {
    for packed in [false, true] {
        txonly(Device { packed, ..PLAIN }, &[], Mode::Client);
    }
}
