//! The real `sluiced` and `sluice`, with the real engine, between two network namespaces that stand for VMs.
//!
//! Needs root and the eBPF object (`cargo xtask build-ebpf`); without root the tests say so and pass, except where `CI` is
//! set.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(40);
const BASE: &str = r#"
switches: [{name: blue, uplink: {netdev: up0}}]
aclGroups: [{name: web, rules: [{priority: 100, direction: TO_VM, match: {ipProto: tcp, dstPorts: ["80"]}, action: DENY}]}]
vnics:
- {name: vm1, switch: blue, attach: {veth: p1}, mac: "02:00:00:00:00:01", policy: {vlan: {access: 10}, ipGuard: [10.77.0.1]}}
- {name: vm2, switch: blue, attach: {veth: p2}, mac: "02:00:00:00:00:02", policy: {vlan: {access: 10}, acl: {groups: [web]}}}
"#;

/// Runs a command that must succeed.
#[track_caller]
fn run(line: &str) {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output().expect("started");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Namespaces, directories and a daemon; all removed with it.
struct Lab {
    dir: tempfile::TempDir,
    tag: String,
    daemon: Option<Child>,
}

impl Lab {
    #[allow(clippy::print_stderr)] // a skip says so
    fn new(name: &str) -> Option<Lab> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run these tests as root");
            eprintln!("skipped: network namespaces need root");
            return None;
        }
        let tag = format!("slc{}{name}", std::process::id());
        let lab = Lab { dir: tempfile::tempdir().expect("a directory"), tag, daemon: None };
        let (host, pins) = (lab.netns("h"), lab.pins());
        let settings = format!("pinDir: {}\nruntimeDir: {}\n", pins.display(), lab.path("run").display());
        std::fs::write(lab.path("settings.yaml"), settings).expect("written");
        run(&format!("ip netns add {host}"));
        run(&format!("ip -n {host} link add up0 type veth peer name up1"));
        run(&format!("ip -n {host} link set up0 up"));
        for vm in 1..3 {
            run(&format!("ip netns add {}", lab.netns(&vm.to_string())));
            lab.plug(vm);
        }
        Some(lab)
    }

    fn netns(&self, name: &str) -> String {
        format!("{}{name}", self.tag)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.tag)
    }

    /// Gives a VM its interface.
    fn plug(&self, vm: u32) {
        let (host, guest) = (self.netns("h"), self.netns(&vm.to_string()));
        run(&format!(
            "ip -n {host} link add p{vm} type veth peer name eth0 address 02:00:00:00:00:0{vm} netns {guest}"
        ));
        run(&format!("ip -n {guest} addr add 10.77.0.{vm}/24 dev eth0"));
        run(&format!("ip -n {guest} link set eth0 up"));
        run(&format!("ip -n {host} link set p{vm} up"));
    }

    fn daemon_command(&self) -> Command {
        // Not `ip netns exec`, which hides /sys/fs/bpf.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns("h"))).arg(env!("CARGO_BIN_EXE_sluiced"));
        command.arg("--state-dir").arg(self.path("state")).arg("--socket").arg(self.path("socket"));
        command.arg("--config").arg(self.path("settings.yaml"));
        command
    }

    fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let child = self.daemon_command().stderr(log).spawn().expect("started");
        let pid = u64::from(child.id());
        self.daemon = Some(child);
        self.wait("the daemon answers", |lab| lab.json(&["version"])["daemon"]["pid"].as_u64() == Some(pid));
    }

    fn signal(&mut self, signal: nix::sys::signal::Signal) {
        let mut child = self.daemon.take().expect("a daemon runs");
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("signalled");
        child.wait().expect("ended");
    }

    #[track_caller]
    fn wait(&self, what: &str, condition: impl Fn(&Lab) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "not in time: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn sluice(&self, words: &[&str], input: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.arg("--socket").arg(self.path("socket")).args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("started");
        // A command that refuses its words does not read.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        child.wait_with_output().expect("ended")
    }

    /// Exit code, standard output and standard error.
    fn cli(&self, words: &[&str], input: &str) -> (i32, String, String) {
        let output = self.sluice(words, input);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().expect("an exit code"), text(&output.stdout), text(&output.stderr))
    }

    #[track_caller]
    fn well(&self, words: &[&str], input: &str) -> String {
        let (code, out, err) = self.cli(words, input);
        assert_eq!(code, 0, "{words:?}: {err}\n{}", self.log());
        out
    }

    fn json(&self, words: &[&str]) -> Value {
        let (_, out, _) = self.cli(&[&["-o", "json"], words].concat(), "");
        serde_json::from_str(&out).unwrap_or(Value::Null)
    }

    fn state(&self, vnic: &str) -> String {
        self.json(&["get", "vnic", vnic])["status"]["state"].as_str().unwrap_or_default().to_owned()
    }

    fn ping(&self) -> bool {
        let netns = format!("--net=/run/netns/{}", self.netns("1"));
        let ping = ["ping", "-c", "1", "-W", "1", "10.77.0.2"];
        Command::new("nsenter").arg(netns).args(ping).output().expect("started").status.success()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        // The pins go even if a test failed half-way; namespaces take their interfaces along.
        let _ = self.daemon_command().arg("--purge").output();
        let _ = std::fs::remove_dir_all(self.pins());
        for name in ["h", "1", "2"] {
            let _ = Command::new("ip").args(["netns", "del", &self.netns(name)]).output();
        }
    }
}

#[test]
fn the_command_line_keeps_its_contract() {
    let Some(mut lab) = Lab::new("c") else {
        return;
    };
    let (code, out, _) = lab.cli(&["doctor"], "");
    assert_eq!(code, 1);
    assert!(out.contains("no daemon answers"), "{out}");
    lab.start();

    assert!(lab.well(&["plan", "-f", "-"], BASE).contains("+ attach vnic/vm1: to p1"));
    assert!(lab.well(&["apply", "-f", "-"], BASE).contains("vnics/vm1 created, ready"));
    assert_eq!(lab.well(&["plan", "-f", "-"], BASE), "nothing to do\n");
    lab.wait("ping", Lab::ping);
    let exported = lab.well(&["get", "all", "--spec"], "");
    assert_eq!(lab.well(&["plan", "-f", "-"], &exported), "nothing to do\n", "{exported}");

    let (code, _, err) = lab.cli(&["apply", "-f", "-"], &BASE.replace("ipGuard", "ipgaurd"));
    assert_eq!(code, 1);
    assert!(
        err.contains("vnics/vm1: policy: unknown field `ipgaurd` in Policy; did you mean `ipGuard`?"),
        "{err}"
    );
    let (code, _, err) = lab.cli(&["apply", "-f", "-"], &BASE.replace("00:02\"", "00:01\""));
    assert_eq!(code, 1);
    assert!(err.contains("vnics/vm2: mac: "), "{err}");
    let (code, _, err) = lab.cli(&["delete", "switch", "blue"], "");
    assert_eq!(code, 1);
    assert!(err.contains("vnics/vm1, vnics/vm2"), "{err}");
    assert_eq!(lab.cli(&["delete", "router", "blue"], "").0, 2);
    assert_eq!(lab.cli(&["frobnicate"], "").0, 2);
    assert_eq!(lab.cli(&["trace", "--vnic", "vm1"], "").0, 2);

    let out = lab
        .well(&["trace", "--vnic", "vm1", "dstMac=02:00:00:00:00:02", "dstIp=10.77.0.2", "dstPort=80"], "");
    assert!(out.contains("live tables: drop on vnic/vm2 (acl-to-vm)"), "{out}");
    let out = lab.well(&["trace", "--vnic", "vm1", "dstMac=02:00:00:00:00:02", "dstIp=10.77.0.2"], "");
    assert!(out.contains("live tables: out vnic/vm2"), "{out}");
    let spoofed = "020000000002 020000000099 0800 4500001c00000000400100000a4d00010a4d0002 0800f7ff00000000";
    let out = lab.well(&["trace", "--vnic", "vm1", "--hex", spoofed], "");
    assert!(out.contains("drop on vnic/vm1 (mac-guard)"), "{out}");

    let stats = lab.json(&["stats", "vnic", "vm1"]);
    assert_eq!(stats["ports"][0]["port"], "vnic/vm1");
    assert!(stats["ports"][0]["rxPackets"].as_u64().is_some_and(|packets| packets > 0), "{stats}");
    assert!(lab.well(&["fdb", "--switch", "blue"], "").contains("02:00:00:00:00:02"));
    assert!(lab.well(&["doctor"], "").contains("ports: 3 of 3 attached"));

    let said = "vm1 is on its software path: it does not ask for a VF";
    assert!(lab.well(&["explain", "vnic", "vm1"], "").starts_with(said));
    assert!(lab.well(&["revoke", "vnic/vm1"], "").starts_with(said));
    let (code, _, err) = lab.cli(&["acknowledge", "vnic", "vm1", "--ticket", "1", "--done"], "");
    assert_eq!((code, err.as_str()), (1, ""));
    let (code, _, err) = lab.cli(&["probe", "uplink", "up0"], "");
    assert_eq!(code, 1);
    assert!(err.contains("nobody looks after the NIC of switch blue"), "{err}");

    lab.well(&["delete", "vnic/vm2"], "");
    let (code, _, err) = lab.cli(&["get", "vnic", "vm1", "vm2"], "");
    assert_eq!(code, 1);
    assert_eq!(err, "sluice: vnics/vm2: there is no such vnic; see `sluice get vnic`\n");
    let (_, _, err) = lab.cli(&["delete", "vnic", "vm1", "vm2"], "");
    assert!(err.starts_with("sluice: refused, nothing was changed; 1 thing is wrong:"), "{err}");
}

#[test]
fn the_switch_outlives_its_daemon() {
    let Some(mut lab) = Lab::new("o") else {
        return;
    };
    lab.start();
    lab.well(&["apply", "-f", "-"], BASE);
    lab.wait("ping", Lab::ping);

    let second = lab.daemon_command().output().expect("ended");
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    let pid = lab.daemon.as_ref().expect("a daemon runs").id();
    assert!(!second.status.success() && error.contains(&format!("pid {pid}")), "{error}");

    lab.signal(nix::sys::signal::Signal::SIGKILL);
    assert!(lab.ping(), "killed");
    lab.start();
    assert_eq!(lab.well(&["plan", "-f", "-"], BASE), "nothing to do\n");
    assert!(lab.well(&["doctor"], "").contains("tables: adopted the pinned ones"));
    lab.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(lab.ping(), "stopped");

    std::fs::remove_dir_all(lab.path("state")).expect("removed");
    lab.start();
    assert!(lab.well(&["doctor"], "").contains("recovered 4 resources at revision 1"));
    assert_eq!(lab.well(&["plan", "-f", "-"], BASE), "nothing to do\n");
    assert!(lab.ping(), "recovered");

    lab.signal(nix::sys::signal::Signal::SIGKILL);
    std::fs::remove_dir_all(lab.path("state")).expect("removed");
    std::fs::remove_dir_all(lab.path("run")).expect("removed");
    lab.start();
    assert!(lab.well(&["doctor"], "").contains("tables of an unknown past"));
    assert!(lab.ping(), "left alone");
    lab.well(&["apply", "-f", "-"], BASE);
    lab.wait("ping after the first apply", Lab::ping);

    run(&format!("ip -n {} link del p2", lab.netns("h")));
    lab.wait("vm2 is pending", |lab| lab.state("vm2") == "PENDING");
    lab.plug(2);
    lab.wait("vm2 is ready again", |lab| lab.state("vm2") == "READY");
    lab.wait("ping after the interface came back", Lab::ping);

    lab.signal(nix::sys::signal::Signal::SIGTERM);
    let purged = lab.daemon_command().arg("--purge").output().expect("ended");
    assert!(purged.status.success(), "{}", String::from_utf8_lossy(&purged.stderr));
    assert!(!lab.ping() && !lab.pins().exists());
}
