#![no_main]
//! The protocol: the input is what a front-end writes to the socket, before it goes away. With each request it sends the files that
//! are due, or others: memory, eventfds, or one file too many. What it sets up by that is served meanwhile.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::port::{Batch, Receive, Transmit};
use sluice_user::vhost::driver::GuestRam;
use sluice_user::vhost::{FromGuest, Mode, Port, PortConfig, ToGuest};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Of a message: the request, flags, and how many bytes follow.
const HEADER: usize = 12;
const SET_MEM_TABLE: u8 = 5;
const SET_LOG_BASE: u8 = 6;
const SET_INFLIGHT_FD: u8 = 32;
const ADD_MEM_REG: u8 = 37;
/// Requests that come with an eventfd: a log's, a kick, a call, an error.
const WITH_EVENT: [u8; 4] = [7, 12, 13, 14];

struct Served {
    path: PathBuf,
    ends: Vec<(FromGuest, ToGuest)>,
    pool: Pool,
    memory: GuestRam,
    event: EventFd,
    _port: Port,
    _folder: tempfile::TempDir,
}

impl Served {
    fn new() -> Served {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let config = PortConfig {
            path: path.clone(),
            mode: Mode::Server,
            queue_pairs: 2,
            mtu: 1500,
            offloads: true,
            standby: true,
        };
        let port = Port::open(config, Box::new(|_| {})).expect("a port");
        Served {
            path,
            ends: port.queues(),
            pool: Pool::new(&Region::new(RegionLayout { small: 256, large: 8 }).expect("memory")),
            memory: GuestRam::new(1 << 16).expect("memory"),
            event: EventFd::new(0).expect("an eventfd"),
            _port: port,
            _folder: folder,
        }
    }

    /// The files that go with a request; by a bit that the protocol does not use, one more.
    fn files(&self, header: &[u8]) -> Vec<RawFd> {
        let memory = self.memory.as_fd().as_raw_fd();
        let mut files = match header[0] {
            SET_MEM_TABLE => vec![memory; usize::from(header.get(HEADER).copied().unwrap_or(0)).min(16)],
            SET_LOG_BASE | SET_INFLIGHT_FD | ADD_MEM_REG => vec![memory],
            request if WITH_EVENT.contains(&request) => vec![self.event.as_raw_fd()],
            _ => Vec::new(),
        };
        if header[7] & 0x80 != 0 {
            files.push(memory);
        }
        files
    }

    /// Serves the rings as they are, once.
    fn serve(&mut self) {
        let mut batch = Batch::new();
        for (from, to) in &mut self.ends {
            from.receive(&mut self.pool, &mut batch);
            batch.give(&mut self.pool);
            batch.push(self.pool.copy(&[2; 100]).expect("there are chunks"));
            to.transmit(&mut self.pool, &mut batch);
            to.flush();
        }
        batch.give(&mut self.pool);
        assert_eq!(self.pool.region().outstanding(), 0);
    }
}

thread_local!(static SERVED: std::cell::RefCell<Served> = std::cell::RefCell::new(Served::new()));

fuzz_target!(|bytes: &[u8]| {
    SERVED.with_borrow_mut(|served| {
        let mut socket = UnixStream::connect(&served.path).expect("the port listens");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = match rest.get(8..HEADER) {
                Some(size) => HEADER + usize::from(u16::from_le_bytes([size[0], size[1]])),
                None => rest.len(),
            };
            let (message, more) = rest.split_at(length.min(rest.len()));
            rest = more;
            let files = if message.len() < HEADER { Vec::new() } else { served.files(message) };
            // The port may hang up before all is written.
            if socket.send_with_fds(&[message], &files).is_err() {
                break;
            }
        }
        served.serve();
        let _ = socket.shutdown(Shutdown::Write);
        let mut answers = Vec::new();
        if let Err(error) = socket.read_to_end(&mut answers) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the port went silent");
        }
        served.serve();
    });
});
