#![no_main]
//! The protocol: the input is what a front-end writes to the socket, before it goes away.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sluice_user::vhost::{Mode, Port, PortConfig};

struct Served {
    path: PathBuf,
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
        Served { path, _port: Port::open(config, Box::new(|_| {})).expect("a port"), _folder: folder }
    }
}

thread_local!(static SERVED: Served = Served::new());

fuzz_target!(|bytes: &[u8]| {
    SERVED.with(|served| {
        let mut socket = UnixStream::connect(&served.path).expect("the port listens");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        // It may hang up before all is written.
        let _ = socket.write_all(bytes).and_then(|()| socket.shutdown(Shutdown::Write));
        let mut answers = Vec::new();
        if let Err(error) = socket.read_to_end(&mut answers) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the port went silent");
        }
    });
});
