//! QEMU as the front-end, the network boot firmware in it as the guest: the least machine that is a real one.
//!
//! The firmware's driver asks for an address by DHCP; what it sends arrives, and a machine that is killed and started again finds the
//! port as it was. Needs `qemu-system-x86_64` and its firmware, as the lab does.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::port::{Batch, Receive};
use sluice_user::vhost::{FromGuest, Mode, Port, PortConfig, QueueState};

const PATIENCE: Duration = Duration::from_secs(60);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x0a];

struct Qemu(Child);

impl Qemu {
    fn start(socket: &Path, options: &str) -> Qemu {
        let child = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35,accel=tcg,memory-backend=mem", "-nodefaults", "-display", "none"])
            .args(["-m", "128", "-object", "memory-backend-memfd,id=mem,size=128M,share=on", "-boot", "n"])
            .args(["-chardev", &format!("socket,id=c0,path={}{options}", socket.display())])
            .args(["-netdev", "vhost-user,id=n0,chardev=c0"])
            .args(["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:0a"])
            .stdin(Stdio::null())
            .spawn();
        Qemu(child.expect("QEMU starts; Debian has it in qemu-system-x86"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the guest's request for an address.
fn assert_asks(port: &Port, end: &mut FromGuest, pool: &mut Pool) {
    let deadline = Instant::now() + PATIENCE;
    let mut batch = Batch::new();
    loop {
        assert!(Instant::now() < deadline, "no request: {:?}", port.status());
        end.receive(pool, &mut batch);
        let asks = batch.frames().iter().any(|frame| {
            let bytes = frame.bytes();
            // A broadcast from its own address, IPv4, UDP, from the client's port to the server's.
            bytes[..6] == [0xff; 6]
                && bytes[6..12] == MAC
                && bytes[12..14] == [0x08, 0]
                && bytes[23] == 17
                && bytes[34..38] == [0, 68, 0, 67]
        });
        let is_idle = batch.is_empty();
        batch.give(pool);
        if asks {
            return;
        }
        if is_idle {
            std::thread::yield_now();
        }
    }
}

fn open(path: &Path, mode: Mode) -> (Port, FromGuest) {
    let config =
        PortConfig { path: path.to_owned(), mode, queue_pairs: 1, mtu: 1500, offloads: true, standby: true };
    let port = Port::open(config, Box::new(|_| {})).expect("the port opens");
    let (end, _) = port.queues().remove(0);
    (port, end)
}

fn pool() -> Pool {
    Pool::new(&Region::new(RegionLayout { small: 64, large: 2 }).expect("memory"))
}

fn boots_again_and_again(mode: Mode, options: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let (port, mut end) = open(&path, mode);
    let mut pool = pool();
    for boot in 1..=2 {
        let qemu = Qemu::start(&path, options);
        assert_asks(&port, &mut end, &mut pool);
        let status = port.status();
        assert_eq!((status.connections, status.refused_requests), (boot, 0), "{status:?}");
        assert!(status.queues.iter().all(|queue| queue.state == QueueState::Running), "{status:?}");
        drop(qemu);
        let deadline = Instant::now() + PATIENCE;
        while port.status().is_connected {
            assert!(Instant::now() < deadline, "the port does not see that QEMU is gone");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_machine_that_connects_boots_again_and_again() {
    boots_again_and_again(Mode::Server, "");
}

#[test]
fn a_machine_that_listens_boots_again_and_again() {
    boots_again_and_again(Mode::Client, ",server=on");
}

#[test]
fn a_machine_outlives_the_switch() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let mut pool = pool();
    let _qemu = Qemu::start(&path, ",server=on");
    for _ in 0..2 {
        // Opened anew, as by a switch that was restarted; the machine has not noticed, and asks again.
        let (port, mut end) = open(&path, Mode::Client);
        assert_asks(&port, &mut end, &mut pool);
        assert_eq!(port.status().refused_requests, 0);
    }
}
