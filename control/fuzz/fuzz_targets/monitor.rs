#![no_main]
//! QEMU's monitor: the input is what it says, at once, whatever it is asked.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use sluice_control::vf::plug::qmp::Qmp;
use sluice_control::vf::plug::{Candidate, Plug};
use sluice_policy::net::MacAddr;

/// What every monitor says first, and its answer to the first command.
const BEGINNING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n{\"return\": {}, \"id\": 1}\n";
/// Calls that are made of one plug.
const CALLS: usize = 8;

struct Vm {
    socket: PathBuf,
    listener: UnixListener,
    _folder: tempfile::TempDir,
}

impl Vm {
    fn new() -> Vm {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("monitor");
        let listener = UnixListener::bind(&socket).expect("a socket");
        listener.set_nonblocking(true).expect("a socket that does not wait");
        Vm { socket, listener, _folder: folder }
    }
}

thread_local!(static VM: Vm = Vm::new());

fuzz_target!(|bytes: &[u8]| {
    let [how, said @ ..] = bytes else { return };
    VM.with(|vm| {
        let socket = vm.socket.to_string_lossy();
        let mut plug = Qmp::new(&socket, "vf", Some("root"), (how & 1 != 0).then_some("net0"));
        // No machine has this function.
        let vf = Candidate {
            pf: "none".to_owned(),
            index: 0,
            pci: Some("ffff:ff:1f.7".to_owned()),
            netdev: None,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
        };
        let mut monitor = None;
        for call in 0..CALLS {
            let _ = match (usize::from(how >> 4) + call) % 4 {
                0 => plug.check().map(drop),
                1 => plug.is_active(&vf).map(drop),
                2 => plug.unplug(&vf, false).map(drop),
                _ => plug.unplug(&vf, true).map(drop),
            };
            if let (None, Ok((mut stream, _))) = (&monitor, vm.listener.accept()) {
                stream.set_nonblocking(true).expect("a socket that does not wait");
                if how & 2 != 0 {
                    let _ = stream.write_all(BEGINNING.as_bytes());
                }
                // What does not fit is not said.
                let _ = stream.write(said);
                if how & 4 != 0 {
                    let _ = stream.shutdown(Shutdown::Write);
                }
                monitor = Some(stream);
            }
        }
        drop((plug, monitor));
        // Connections that were given up.
        while vm.listener.accept().is_ok() {}
    });
});
