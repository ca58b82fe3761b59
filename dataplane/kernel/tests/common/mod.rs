//! A network namespace and a pin directory of a test's own, both gone afterwards.

#![allow(dead_code)] // each test file uses its part

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use sluice_kernel::{AdoptReport, Engine, EngineOptions, SyncReport};
use sluice_policy::config::{
    Acl, AclAction, AclGroup, AclMatch, AclRule, Attachment, Config, Direction, Hook, Policy, Switch, Vnic,
};
use sluice_policy::ids::Ids;
use sluice_policy::image::Image;
use sluice_policy::lower;
use sluice_policy::net::{MacAddr, PortRange};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// What a test works in.
pub(crate) struct Lab {
    pub(crate) options: EngineOptions,
    /// Ids live as long as a daemon's store would.
    pub(crate) ids: Ids,
    prefix: String,
    guests: Vec<String>,
}

/// Runs a test in a thread that is in a new network namespace.
pub(crate) fn in_lab(test: impl FnOnce(&mut Lab) + Send + 'static) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces and loads eBPF: run it as root"
    );
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace can be made");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("slk{}-{number}", std::process::id());
        let mut lab = Lab {
            options: EngineOptions { pin_dir: PathBuf::from(format!("/sys/fs/bpf/{prefix}")) },
            ids: Ids::default(),
            prefix,
            guests: Vec::new(),
        };
        test(&mut lab);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for guest in &self.guests {
            let _ = Command::new("ip").args(["netns", "del", guest]).status();
        }
        let _ = std::fs::remove_dir_all(&self.options.pin_dir);
    }
}

/// Runs `ip` with these words.
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("`ip` is installed");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Lab {
    pub(crate) fn open(&self) -> (Engine, AdoptReport) {
        Engine::open(&self.options).expect("the engine opens")
    }

    /// One pass as the daemon makes it.
    pub(crate) fn sync(&mut self, engine: &mut Engine, config: &Config) -> SyncReport {
        let image = self.image(engine, config);
        engine.sync(&image).expect("the image can be synced")
    }

    pub(crate) fn image(&mut self, engine: &Engine, config: &Config) -> Image {
        let observation = engine.observe(&lower::ports(config)).expect("interfaces can be observed");
        lower::assign_ids(config, &mut self.ids).expect("there are numbers enough");
        lower::lower(config, &self.ids, &observation.bindings).expect("the configuration can be lowered")
    }

    /// A named namespace with the other end of a new veth, which has address 10.0.0.`host`.
    pub(crate) fn guest(&mut self, netdev: &str, host: u8) -> String {
        let name = format!("{}-{host}", self.prefix);
        ip(&format!("netns add {name}"));
        self.guests.push(name.clone());
        self.plug(netdev, host);
        name
    }

    /// Makes the veth of a guest (again).
    pub(crate) fn plug(&self, netdev: &str, host: u8) {
        let name = format!("{}-{host}", self.prefix);
        let mac = mac(u32::from(host));
        ip(&format!("link add {netdev} type veth peer name eth0 address {mac} netns {name}"));
        ip(&format!("link set {netdev} up"));
        ip(&format!("-n {name} addr add 10.0.0.{host}/24 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
    }
}

pub(crate) fn ping(guest: &str, arguments: &str) -> String {
    let output = Command::new("ip")
        .args(["netns", "exec", guest, "ping"])
        .args(arguments.split_whitespace())
        .output()
        .expect("`ping` is installed");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn reaches(guest: &str, host: u8) -> bool {
    ping(guest, &format!("-n -c 1 -W 1 10.0.0.{host}")).contains(" 0% packet loss")
}

pub(crate) fn mac(number: u32) -> MacAddr {
    let [_, a, b, c] = number.to_be_bytes();
    MacAddr([2, 0, 0, a, b, c])
}

pub(crate) fn switch(name: &str) -> Switch {
    Switch { name: name.into(), uplink: None, internal: None, ageing_seconds: 300 }
}

pub(crate) fn vnic(number: u32, netdev: &str) -> Vnic {
    Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach: Attachment::Veth(netdev.into()),
        hook: Hook::Auto,
        full_checksums: false,
        mac: mac(number),
        extra_macs: vec![],
        up: true,
        policy: Policy::default(),
        sriov: None,
    }
}

pub(crate) fn config(vnics: Vec<Vnic>) -> Config {
    Config { switches: vec![switch("blue")], acl_groups: vec![], vnics }
}

/// A group that denies TCP ports `1..=count` to the VM, one rule each.
pub(crate) fn deny_ports(name: &str, count: u16) -> AclGroup {
    let rules = (1..=count).map(|port| rule(u32::from(port), port, AclAction::Deny)).collect();
    AclGroup { name: name.into(), rules }
}

pub(crate) fn rule(priority: u32, port: u16, action: AclAction) -> AclRule {
    AclRule {
        priority,
        direction: Direction::ToVm,
        matches: AclMatch {
            ip_proto: Some(6),
            dst_ports: vec![PortRange::new(port, port).expect("one port is a range")],
            ..AclMatch::default()
        },
        action,
    }
}

pub(crate) fn with_group(mut vnic: Vnic, group: &str) -> Vnic {
    vnic.policy.acl = Acl { groups: vec![group.into()], ..Acl::default() };
    vnic
}
