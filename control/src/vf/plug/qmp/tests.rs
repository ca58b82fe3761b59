use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use sluice_policy::net::MacAddr;

use super::*;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": []}}"#;
const EVENT: &str =
    r#"{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "RTC_CHANGE", "data": {"offset": 1}}"#;
/// How long tests wait for anything.
const DEADLINE: Duration = Duration::from_secs(20);

/// The other end of a monitor, as a test's script sees it.
struct Script {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Script {
    /// The next command and its number, or `None` when the client hangs up.
    fn hear(&mut self) -> Option<(String, Value, Value)> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).unwrap_or_default();
        let message: Value = serde_json::from_str(&line).ok().filter(|_| length > 0)?;
        let command = message["execute"].as_str().unwrap_or_default().to_owned();
        Some((command, message["arguments"].clone(), message["id"].clone()))
    }

    /// Says something; a client that has hung up does not hear it.
    fn say(&mut self, text: &str) {
        let _ = self.writer.write_all(text.as_bytes());
    }

    fn line(&mut self, text: &str) {
        self.say(&format!("{text}\n"));
    }

    fn answer(&mut self, id: &Value, value: &Value) {
        self.line(&json!({"return": value, "id": id}).to_string());
    }

    fn refuse(&mut self, id: &Value, class: &str, words: &str) {
        self.line(&json!({"error": {"class": class, "desc": words}, "id": id}).to_string());
    }

    /// Greets, and takes the first command.
    fn begin(&mut self) {
        self.line(GREETING);
        if let Some((command, _, id)) = self.hear() {
            assert_eq!(command, "qmp_capabilities");
            self.answer(&id, &json!({}));
        }
    }

    /// Takes a command that must be this one.
    fn expect(&mut self, wanted: &str) -> (Value, Value) {
        let (command, arguments, id) = self.hear().unwrap_or_else(|| panic!("{wanted} does not come"));
        assert_eq!(command, wanted);
        (arguments, id)
    }

    /// Answers to a list of devices.
    fn list(&mut self, devices: &[&str]) {
        let (_, id) = self.expect("qom-list");
        let devices: Vec<Value> =
            devices.iter().map(|name| json!({"name": name, "type": "child<vfio-pci>"})).collect();
        self.answer(&id, &json!(devices));
    }
}

/// A monitor that plays scripts, one for each connection.
struct Fake {
    folder: tempfile::TempDir,
    thread: JoinHandle<()>,
}

type Scene = Box<dyn FnOnce(&mut Script) + Send>;

impl Fake {
    fn new(scenes: Vec<Scene>) -> Fake {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("qmp")).expect("a socket");
        let thread = thread::spawn(move || {
            for scene in scenes {
                let (stream, _) = listener.accept().expect("somebody connects");
                stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
                let reader = BufReader::new(stream.try_clone().expect("a second handle"));
                scene(&mut Script { reader, writer: stream });
            }
        });
        Fake { folder, thread }
    }

    fn once(scene: impl FnOnce(&mut Script) + Send + 'static) -> Fake {
        Fake::new(vec![Box::new(scene)])
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// A plug of an emulated device, which needs no VF.
    fn plug(&self, failover_pair: Option<&str>) -> Qmp {
        emulated(&self.socket(), failover_pair)
    }

    /// The script was played to its end.
    fn end(self, plug: Qmp) {
        drop(plug);
        self.thread.join().expect("the script ends well");
    }
}

fn emulated(socket: &Path, failover_pair: Option<&str>) -> Qmp {
    let mut plug = Qmp::new(socket.to_str().expect("a path"), "web-vf", Some("rp0"), failover_pair);
    plug.driver = "e1000e";
    plug.patience = Duration::from_millis(300);
    plug
}

fn vf() -> Candidate {
    let pci = Some("0000:01:10.0".to_owned());
    Candidate { pf: "pf0".into(), index: 0, pci, netdev: None, mac: MacAddr([2, 0, 0, 0, 0, 1]) }
}

/// Asks until there is an answer other than "not yet".
#[track_caller]
fn outcome(mut ask: impl FnMut() -> Result<Progress, PlugError>) -> Result<(), PlugError> {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        let before = Instant::now();
        let answer = ask();
        assert!(before.elapsed() < Duration::from_secs(1), "a call waited {:?}", before.elapsed());
        match answer {
            Ok(Progress::Pending) => thread::yield_now(),
            Ok(Progress::Done) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    panic!("nothing within {DEADLINE:?}");
}

#[track_caller]
fn failure(ask: impl FnMut() -> Result<Progress, PlugError>, words: &str) {
    let error = outcome(ask).expect_err("it must fail");
    assert!(matches!(error, PlugError::Failed { .. }), "{error:?}");
    assert!(error.to_string().contains(words), "`{words}` is not in: {error}");
}

#[track_caller]
fn refusal(ask: impl FnMut() -> Result<Progress, PlugError>, words: &str) {
    let error = outcome(ask).expect_err("it must be refused");
    assert!(matches!(error, PlugError::Refused(_)), "{error:?}");
    assert!(error.to_string().contains(words), "`{words}` is not in: {error}");
}

#[test]
fn a_device_is_added_once_and_deleted_when_the_guest_lets_go() {
    let fake = Fake::new(vec![
        Box::new(|script| {
            script.begin();
            script.list(&["net0", "type"]);
            let (arguments, id) = script.expect("device_add");
            assert_eq!(arguments, json!({"driver": "e1000e", "id": "web-vf", "bus": "rp0"}));
            // Events come at any time, and answers in pieces.
            script.line(EVENT);
            let answer = json!({"return": {}, "id": id}).to_string();
            let (one, other) = answer.split_at(9);
            script.say(one);
            script.say(&format!("{other}\r\n\r\n{EVENT}\n"));
            script.list(&["net0", "web-vf"]);
            assert!(script.hear().is_none(), "it hangs up when the guest is active");
        }),
        Box::new(|script| {
            script.begin();
            script.list(&["web-vf"]);
            let (arguments, id) = script.expect("device_del");
            assert_eq!(arguments, json!({"id": "web-vf"}));
            script.answer(&id, &json!({}));
            for _ in 0..3 {
                script.list(&["web-vf"]);
            }
            script.line(r#"{"event": "DEVICE_DELETED", "data": {"device": "web-vf", "path": "/machine/peripheral/web-vf"}}"#);
            script.list(&[]);
            assert!(script.hear().is_none(), "it hangs up when it is done");
        }),
    ]);
    let mut plug = fake.plug(None);
    plug.check().expect("the socket is there");
    for _ in 0..2 {
        outcome(|| plug.plug(&vf())).expect("it plugs");
    }
    outcome(|| Ok(if plug.is_active(&vf())? { Progress::Done } else { Progress::Pending }))
        .expect("it is active");
    outcome(|| plug.unplug(&vf(), false)).expect("it unplugs");
    fake.end(plug);
}

#[test]
fn a_restarted_daemon_finds_its_device() {
    let fake = Fake::once(|script| {
        script.begin();
        script.list(&["web-vf"]);
        let (arguments, id) = script.expect("qom-get");
        assert_eq!(arguments, json!({"path": "/machine/peripheral/web-vf", "property": "host"}));
        script.answer(&id, &json!("0000:01:10.0"));
    });
    let mut plug = fake.plug(None);
    outcome(|| plug.plug(&vf())).expect("it is plugged");
    fake.end(plug);
}

#[test]
fn another_vf_under_the_same_name_is_refused() {
    let fake = Fake::once(|script| {
        script.begin();
        script.list(&["web-vf"]);
        let (_, id) = script.expect("qom-get");
        script.answer(&id, &json!("0000:01:10.6"));
    });
    let mut plug = fake.plug(None);
    refusal(|| plug.plug(&vf()), "0000:01:10.6");
    fake.end(plug);
}

#[test]
fn a_primary_waits_for_the_guests_driver() {
    let fake = Fake::once(|script| {
        script.begin();
        for features in [json!([]), json!(["VIRTIO_NET_F_MRG_RXBUF: …", "VIRTIO_NET_F_STANDBY: …"])] {
            script.list(&["net0"]);
            let (arguments, id) = script.expect("x-query-virtio-status");
            assert_eq!(arguments, json!({"path": "/machine/peripheral/net0/virtio-backend"}));
            script.answer(&id, &json!({"guest-features": {"dev-features": features}}));
        }
        let (arguments, id) = script.expect("device_add");
        assert_eq!(arguments["failover_pair_id"], json!("net0"));
        script.answer(&id, &json!({}));
    });
    let mut plug = fake.plug(Some("net0"));
    outcome(|| plug.plug(&vf())).expect("it plugs when the guest is ready");
    fake.end(plug);
}

#[test]
fn a_pair_that_there_is_not_is_refused_and_an_old_qemu_is_believed() {
    let fake = Fake::new(vec![
        Box::new(|script| {
            script.begin();
            script.list(&[]);
            let (_, id) = script.expect("x-query-virtio-status");
            script.refuse(
                &id,
                "GenericError",
                "Path '/machine/peripheral/net0/virtio-backend' is not a VirtIODevice",
            );
        }),
        Box::new(|script| {
            script.begin();
            script.list(&[]);
            let (_, id) = script.expect("x-query-virtio-status");
            script.refuse(&id, "CommandNotFound", "The command x-query-virtio-status has not been found");
            let (_, id) = script.expect("device_add");
            script.answer(&id, &json!({}));
        }),
    ]);
    let mut plug = fake.plug(Some("net0"));
    refusal(|| plug.plug(&vf()), "no virtio-net device net0");
    outcome(|| plug.plug(&vf())).expect("it plugs");
    fake.end(plug);
}

#[test]
fn qemus_own_words_are_in_a_refusal() {
    let fake = Fake::once(|script| {
        script.begin();
        script.list(&[]);
        let (_, id) = script.expect("device_add");
        script.refuse(&id, "GenericError", "Bus 'rp0' not found");
    });
    let mut plug = fake.plug(None);
    refusal(|| plug.plug(&vf()), "Bus 'rp0' not found");
    fake.end(plug);
}

#[test]
fn a_guest_that_clings_is_named() {
    let fake = Fake::new(vec![
        Box::new(|script| {
            script.begin();
            script.list(&["web-vf"]);
            let (_, id) = script.expect("device_del");
            script.answer(&id, &json!({}));
            // Of another device, and of this one.
            for device in ["disk0", "web-vf"] {
                let path = format!("/machine/peripheral/{device}");
                let data = json!({"device": device, "path": path});
                script.line(&json!({"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": data}).to_string());
                script.list(&["web-vf"]);
            }
        }),
        Box::new(|script| {
            script.begin();
            script.list(&["web-vf"]);
            let (_, id) = script.expect("device_del");
            script.refuse(&id, "GenericError", "Device web-vf is already in the process of unplug");
            // Until its patience is over.
            while let Some((command, _, id)) = script.hear() {
                assert_eq!(command, "qom-list");
                script.answer(&id, &json!([{"name": "web-vf"}]));
            }
        }),
    ]);
    let mut plug = fake.plug(None);
    for by_force in [false, true] {
        refusal(|| plug.unplug(&vf(), by_force), "does not let go of web-vf");
    }
    fake.end(plug);
}

#[test]
fn a_question_that_was_given_up_is_answered_before_the_next() {
    let (go_on, may_go_on) = mpsc::channel();
    let fake = Fake::once(move |script| {
        script.begin();
        script.list(&[]);
        let (_, add) = script.expect("device_add");
        may_go_on.recv_timeout(DEADLINE).expect("the plug has asked");
        // Nothing else was asked meanwhile; the guest is asked to let go once the device is there.
        script.answer(&add, &json!({}));
        script.list(&["web-vf"]);
        let (_, id) = script.expect("device_del");
        script.answer(&id, &json!({}));
        script.list(&[]);
    });
    let mut plug = fake.plug(None);
    let start = Instant::now();
    while plug.asked != Some(Question::Add) {
        assert!(start.elapsed() < DEADLINE, "it never asks");
        assert_eq!(plug.plug(&vf()).expect("no error"), Progress::Pending);
    }
    go_on.send(()).expect("the script waits");
    outcome(|| plug.unplug(&vf(), false)).expect("it unplugs");
    fake.end(plug);
}

#[test]
fn without_a_monitor_there_is_no_guest() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("qmp");
    let mut plug = emulated(&socket, None);
    for present in [false, true] {
        if present {
            // A socket that nobody listens on any more.
            drop(UnixListener::bind(&socket).expect("a socket"));
        } else {
            assert!(matches!(plug.check(), Err(PlugError::Absent { .. })));
        }
        assert!(matches!(plug.plug(&vf()), Err(PlugError::Absent { .. })));
        assert!(matches!(plug.is_active(&vf()), Err(PlugError::Absent { .. })));
        assert_eq!(plug.unplug(&vf(), false).expect("the VM has ended"), Progress::Done);
    }
}

#[test]
fn a_vf_without_a_pci_address_is_refused_and_one_without_a_driver_was_let_go() {
    let fake = Fake::once(|_| {});
    let mut plug = Qmp::new(fake.socket().to_str().expect("a path"), "web-vf", None, None);
    refusal(|| plug.plug(&Candidate { pci: None, ..vf() }), "no PCI function");
    let nowhere = Candidate { pci: Some("ffff:ff:1f.7".into()), ..vf() };
    failure(|| plug.plug(&nowhere), "vfio-pci");
    assert!(!plug.is_active(&nowhere).expect("it can be told"));
    assert_eq!(plug.unplug(&nowhere, false).expect("it is gone"), Progress::Done);
    drop(UnixStream::connect(fake.socket()).expect("the script waits for somebody"));
    fake.end(plug);
}

/// A monitor that misbehaves in each of these ways, and what is said of it.
#[test]
fn a_monitor_that_misbehaves_is_left() {
    let cases: Vec<(&str, Scene)> = vec![
        ("does not greet within", Box::new(|script| drop(script.hear()))),
        ("does not speak QMP", Box::new(|script| script.line("SSH-2.0-OpenSSH_9.2"))),
        ("does not speak QMP", Box::new(|script| script.line("{\"neither\": 1}"))),
        ("before the greeting", Box::new(|script| script.line("{\"return\": {}, \"id\": 1}"))),
        ("closed the connection", Box::new(|script| script.say("{\"QMP\": {\"ver"))),
        ("recursion", Box::new(|script| script.line(&"[".repeat(10_000)))),
        (
            "a line of more than",
            Box::new(|script| {
                let piece = "x".repeat(64 * 1024);
                // It takes no more than it must.
                (0..64).for_each(|_| script.say(&piece));
            }),
        ),
        ("a line of", Box::new(|script| script.line(&" ".repeat(300 * 1024)))),
        (
            "does not answer within",
            Box::new(|script| {
                script.line(GREETING);
                while script.hear().is_some() {}
            }),
        ),
        (
            "already complete",
            Box::new(|script| {
                script.line(GREETING);
                let (_, id) = script.expect("qmp_capabilities");
                script.refuse(&id, "CommandNotFound", "Capabilities negotiation is already complete");
            }),
        ),
        (
            "closed the connection",
            Box::new(|script| {
                script.begin();
                script.expect("qom-list");
                script.say("{\"return\": [{\"name\": \"we");
            }),
        ),
        (
            "does not answer within",
            Box::new(|script| {
                script.begin();
                let (_, id) = script.expect("qom-list");
                // Answers to what was never asked, and events without an end.
                script.refuse(&json!(77), "GenericError", "this is for somebody else");
                script.line(r#"{"return": []}"#);
                let _ = id;
                let start = Instant::now();
                while script.writer.write_all(format!("{EVENT}\n").as_bytes()).is_ok() {
                    assert!(start.elapsed() < DEADLINE, "it listens for ever");
                }
            }),
        ),
        (
            "does not list web-vf: bad input",
            Box::new(|script| {
                script.begin();
                script.expect("qom-list");
                script.line(r#"{"error": {"class": "GenericError", "desc": "bad input"}}"#);
            }),
        ),
    ];
    for (words, scene) in cases {
        let fake = Fake::new(vec![scene]);
        let mut plug = fake.plug(None);
        let error = outcome(|| plug.plug(&vf())).expect_err(words);
        assert!(error.to_string().contains(words), "`{words}` is not in: {error}");
        assert!(plug.monitor.is_none(), "{words}: it is still connected");
        fake.end(plug);
    }
}

#[test]
fn a_device_list_that_is_none_has_no_device() {
    let fake = Fake::once(|script| {
        script.begin();
        let (_, id) = script.expect("qom-list");
        script.answer(&id, &json!({"name": "web-vf"}));
        let (_, id) = script.expect("device_add");
        script.answer(&id, &json!([]));
    });
    let mut plug = fake.plug(None);
    outcome(|| plug.plug(&vf())).expect("it was added");
    fake.end(plug);
}

#[test]
fn a_second_client_waits_no_longer_than_its_patience() {
    // It listens and never accepts: then connecting itself would wait, once the queue is full.
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("qmp");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    let mut held = Vec::new();
    let mut plug = emulated(&socket, None);
    failure(|| plug.plug(&vf()), "does not greet within");
    let full = loop {
        match Monitor::connect(&socket, DEADLINE) {
            Ok(monitor) => held.push(monitor),
            Err(error) => break error,
        }
        assert!(held.len() < 10_000, "the queue has no end");
    };
    assert!(matches!(full, MonitorError::Crowded), "{full:?}");
    failure(|| plug.plug(&vf()), "too many wait");
}

/// A QEMU without a system, which has a root port; ended on drop.
struct Qemu {
    process: Child,
    folder: tempfile::TempDir,
}

impl Qemu {
    /// `None`, with a word about it, where there is no QEMU.
    fn start() -> Option<Qemu> {
        let folder = tempfile::tempdir().expect("a folder");
        let monitor = format!("unix:{},server=on,wait=off", folder.path().join("qmp").display());
        let spawned = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-m", "64"])
            .args(["-device", "pcie-root-port,id=rp0,chassis=1", "-qmp", &monitor])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let process = match spawned {
            Ok(process) => process,
            Err(error) => {
                tracing::warn!(%error, "skipped: there is no QEMU");
                return None;
            }
        };
        let qemu = Qemu { process, folder };
        let start = Instant::now();
        while UnixStream::connect(qemu.socket()).is_err() {
            assert!(start.elapsed() < DEADLINE, "QEMU does not listen");
            thread::yield_now();
        }
        Some(qemu)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    fn plug(&self, bus: &str) -> Qmp {
        let mut plug = Qmp::new(self.socket().to_str().expect("a path"), "web-vf", Some(bus), None);
        plug.driver = "e1000e";
        plug
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_real_qemu_takes_a_device_and_tells_when_it_is_there() {
    let Some(qemu) = Qemu::start() else { return };
    let mut plug = qemu.plug("nosuchbus");
    refusal(|| plug.plug(&vf()), "nosuchbus");
    let mut plug = qemu.plug("rp0");
    let active = |plug: &mut Qmp| {
        outcome(|| Ok(if plug.is_active(&vf())? { Progress::Done } else { Progress::Pending }))
    };
    outcome(|| plug.plug(&vf())).expect("it plugs");
    active(&mut plug).expect("it is there");
    // The next daemon finds it, and the monitor is free for it.
    let mut plug = qemu.plug("rp0");
    outcome(|| plug.plug(&vf())).expect("it is there already");
    active(&mut plug).expect("it is there");
    drop(plug);

    // A machine that stands still does not let go; an ended one has.
    let mut plug = qemu.plug("rp0");
    assert_eq!(plug.unplug(&vf(), false).expect("it is asked"), Progress::Pending);
    refusal(|| plug.unplug(&vf(), true), "does not let go");
    drop(qemu);
    assert_eq!(plug.unplug(&vf(), true).expect("the VM has ended"), Progress::Done);
}
