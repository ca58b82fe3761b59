//! A manager over the model, with a guest that does as it is told and a software path that writes down what it hears.

use std::sync::Arc;

use parking_lot::Mutex;
use sluice_eswitch::nic::{Change, SoftNic};
use sluice_eswitch::soft::{Flaws, Soft};
use sluice_policy::placement::Evidence;
use tempfile::TempDir;

use super::super::plug::Candidate;
use super::*;
use crate::convert;
use crate::json;

/// What a guest does with a VF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Temper {
    #[default]
    Willing,
    Refuses,
    Sleeps,
    Clings,
}

#[derive(Clone, Default)]
struct Guest {
    temper: Arc<Mutex<Temper>>,
    plugged: Arc<Mutex<BTreeSet<u16>>>,
}

impl Plug for Guest {
    fn check(&mut self) -> Result<(), PlugError> {
        match *self.temper.lock() {
            Temper::Refuses => Err(PlugError::Refused("the guest will have none".into())),
            _ => Ok(()),
        }
    }

    fn plug(&mut self, vf: &Candidate) -> Result<Progress, PlugError> {
        self.plugged.lock().insert(vf.index);
        Ok(Progress::Done)
    }

    fn is_active(&mut self, vf: &Candidate) -> Result<bool, PlugError> {
        Ok(*self.temper.lock() != Temper::Sleeps && self.plugged.lock().contains(&vf.index))
    }

    fn unplug(&mut self, vf: &Candidate, by_force: bool) -> Result<Progress, PlugError> {
        if *self.temper.lock() == Temper::Clings && !by_force {
            return Ok(Progress::Pending);
        }
        self.plugged.lock().remove(&vf.index);
        Ok(Progress::Done)
    }
}

#[derive(Clone, Default)]
struct Software {
    set: Arc<Mutex<Vec<Backings>>>,
    reports: Arc<Mutex<Vec<Report>>>,
    is_broken: Arc<Mutex<bool>>,
}

impl SoftwarePath for Software {
    fn set(&mut self, _switch: &str, backings: Backings) -> Result<BTreeSet<String>, String> {
        if *self.is_broken.lock() {
            return Err("the engine will not".into());
        }
        self.set.lock().push(backings);
        Ok(BTreeSet::new())
    }

    fn report(&mut self, report: Report) {
        self.reports.lock().push(report);
    }
}

struct Bench {
    dir: TempDir,
    nic: SoftNic,
    guest: Guest,
    software: Software,
    manager: Manager,
    now: u64,
}

const TIMING: Timing =
    Timing { attach: 1_000, drain: 500, retry: 10, attempts: 3, backoff: 1_000, backoff_max: 8_000 };

fn config(yaml: &str) -> Arc<Config> {
    let config = json::read_config(yaml).expect("good YAML");
    Arc::new(convert::collect(convert::config(&config).expect("a good configuration").iter()))
}

fn vnic(number: u8, rest: &str) -> String {
    format!(
        "- {{name: vm{number}, switch: blue, attach: {{veth: p{number}}}, mac: \"02:00:00:00:00:0{number}\", {rest}}}\n"
    )
}

const CLAIM: &str = "policy: {vlan: {access: 10}}, sriov: {attach: {external: {}}}";

impl Bench {
    fn new(vfs: u16) -> Bench {
        let capabilities = Capabilities {
            max_vfs: vfs,
            mac_guard: Evidence::ReadBack,
            access_vlan: Evidence::ReadBack,
            trust: Evidence::ReadBack,
            ..Capabilities::default()
        };
        let soft = Soft::new(capabilities, vfs, Flaws::default());
        let nic = SoftNic::new("a-model", soft, Mode::Legacy);
        let dir = tempfile::tempdir().expect("a folder");
        let (guest, software) = (Guest::default(), Software::default());
        let manager = Bench::manager(&dir, &nic, &guest, &software);
        Bench { dir, nic, guest, software, manager, now: 0 }
    }

    fn manager(dir: &TempDir, nic: &SoftNic, guest: &Guest, software: &Software) -> Manager {
        let guest = guest.clone();
        Manager::new(Parts {
            switch: "blue".into(),
            nic: Box::new(nic.clone()),
            software: Box::new(software.clone()),
            plugs: Box::new(move |_, _| Box::new(guest.clone())),
            findings: Findings::open(dir.path()),
            record: RecordFile::new(dir.path(), "blue"),
            timing: TIMING,
            epoch: 0,
        })
    }

    /// The daemon is killed and started again.
    fn restart(&mut self) {
        self.manager = Bench::manager(&self.dir, &self.nic, &self.guest, &self.software);
    }

    fn apply(&mut self, vnics: &[String]) {
        let config = config(&format!(
            "switches: [{{name: blue, uplink: {{netdev: a-model}}}}]\nvnics:\n{}",
            vnics.concat()
        ));
        self.manager.set_world(self.now, World { revision: 1, config, ..World::default() });
    }

    /// Steps through so many milliseconds, with a look every 100.
    fn run(&mut self, time: u64) {
        for _ in 0..time / 20 {
            self.now += 20;
            self.manager.step(self.now, self.now.is_multiple_of(100));
        }
    }

    #[track_caller]
    fn path(&self, name: &str) -> v1::PathStatus {
        self.manager.status(self.now, name).expect("it has a claim")
    }

    fn is_open(&self, vf: u16) -> bool {
        self.nic.with(|soft| soft.truth(VfIndex(vf)).is_some_and(|truth| truth.enabled))
    }

    fn backing(&self, name: &str) -> Option<Backing> {
        self.software.set.lock().last().and_then(|set| set.vnics.get(name).cloned())
    }

    fn events(&self) -> String {
        let reports = self.software.reports.lock();
        reports.iter().flat_map(|report| &report.events).map(|(_, text)| format!("{text}\n")).collect()
    }

    fn filter(&self) -> BTreeSet<MacAddr> {
        self.nic.unicast_filter()
    }
}

fn mac(number: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, number])
}

use v1::path_status::{Path as At, Reason};

#[test]
fn a_covered_policy_gets_a_vf_and_an_uncovered_one_says_why() {
    let mut bench = Bench::new(2);
    let trunk = "policy: {vlan: {trunk: {allowed: [\"10-20\"]}}}, sriov: {attach: {external: {}}}";
    bench.apply(&[vnic(1, CLAIM), vnic(2, trunk), vnic(3, "policy: {vlan: {access: 10}}")]);
    bench.run(200);
    let first = bench.path("vm1");
    assert_eq!((first.path(), first.reason()), (At::Hardware, Reason::Unspecified));
    assert_eq!(first.vf.as_ref().map(|vf| vf.index), Some(0));
    assert!(bench.is_open(0) && bench.backing("vm1").is_some_and(|backing| backing.in_use));
    assert_eq!(bench.filter(), [mac(2), mac(3)].into(), "what is in software is for the PF");
    assert!(bench.software.set.lock().last().expect("it was set").filtered_uplinks.contains("blue"));
    let second = bench.path("vm2");
    assert_eq!((second.path(), second.reason()), (At::Software, Reason::Uncovered));
    assert_eq!(second.uncovered[0].feature, "vlan-trunk");
    assert!(second.uncovered[0].remedy.contains("switchdev"));
    assert!(bench.manager.status(0, "vm3").is_none(), "it asks for none");
    let writes = bench.nic.writes();
    bench.run(3_000);
    assert_eq!(bench.nic.writes(), writes, "an unchanged world is not written to");
}

#[test]
fn the_software_path_is_ready_before_the_vf_is_closed() {
    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    assert_eq!(bench.path("vm1").path(), At::Hardware);
    *bench.software.is_broken.lock() = true;
    assert!(bench.manager.hold("vm1", "a migration", Some(bench.now + 5_000)));
    bench.run(100);
    assert!(bench.is_open(0), "nobody would serve it otherwise");
    *bench.software.is_broken.lock() = false;
    bench.run(300);
    let path = bench.path("vm1");
    assert_eq!((path.path(), path.reason()), (At::Software, Reason::Held));
    assert!(path.message.contains("a migration") && path.vf.is_none());
    assert!(bench.nic.with(|soft| soft.truth(VfIndex(0)).is_some_and(|truth| !truth.enabled)));
    assert_eq!(bench.filter(), [mac(1)].into());
    bench.run(5_000);
    assert_eq!(bench.path("vm1").path(), At::Hardware, "the hold has ended");
    bench.manager.hold("vm1", "again", None);
    bench.run(60_000);
    assert_eq!(bench.path("vm1").reason(), Reason::Held);
    bench.manager.release(bench.now, "vm1");
    bench.run(200);
    assert_eq!(bench.path("vm1").path(), At::Hardware);
}

#[test]
fn drift_is_put_right_or_the_vf_is_taken() {
    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    bench.nic.with(|soft| soft.tamper(VfIndex(0), |settings| settings.spoofchk = false));
    bench.run(200);
    assert_eq!(bench.path("vm1").path(), At::Hardware);
    assert!(bench.events().contains("drift, put right at once: checking the VF"), "{}", bench.events());
    assert!(bench.events().contains("spoofchk is off and should be on"));
    bench.nic.with(|soft| soft.reset(VfIndex(0)));
    bench.run(60);
    assert!(!bench.is_open(0) || bench.path("vm1").path() != At::Hardware);
    bench.run(500);
    assert_eq!(bench.path("vm1").path(), At::Hardware, "it is granted again: {}", bench.events());
    for _ in 0..4 {
        bench.nic.with(|soft| soft.tamper(VfIndex(0), |settings| settings.spoofchk = false));
        bench.run(200);
    }
    let path = bench.path("vm1");
    assert_eq!((path.path(), path.reason()), (At::Software, Reason::Drifted), "{}", path.message);
    bench.run(61_000);
    assert_eq!(bench.path("vm1").path(), At::Hardware, "a minute later it is tried again");
}

#[test]
fn a_guest_may_leave_its_vf_for_a_moment_but_not_for_good() {
    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    for _ in 0..3 {
        *bench.guest.temper.lock() = Temper::Sleeps;
        bench.run(1_900);
        assert_eq!(bench.path("vm1").path(), At::Hardware, "{}", bench.events());
        *bench.guest.temper.lock() = Temper::Willing;
        bench.run(200);
    }
    *bench.guest.temper.lock() = Temper::Sleeps;
    bench.run(2_300);
    assert_ne!(bench.path("vm1").path(), At::Hardware);
    assert!(bench.events().contains("the guest no longer uses it"), "{}", bench.events());
}

#[test]
fn a_policy_that_outgrows_the_nic_goes_back_to_software() {
    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    let guarded = "policy: {vlan: {access: 10}, dhcpGuard: true}, sriov: {attach: {external: {}}}";
    bench.apply(&[vnic(1, guarded)]);
    bench.manager.step(bench.now, false);
    assert!(!bench.is_open(0), "at once, since the NIC does not guard");
    bench.run(200);
    let path = bench.path("vm1");
    assert_eq!((path.path(), path.reason()), (At::Software, Reason::Uncovered));
    assert!(path.cause.contains("dhcp-guard"), "{}", path.cause);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    assert_eq!(bench.path("vm1").path(), At::Hardware);
    bench.apply(&[vnic(1, "policy: {vlan: {access: 10}}")]);
    bench.run(1_000);
    assert!(bench.manager.is_idle() && !bench.is_open(0));
    bench.manager.finish();
    assert!(bench.filter().is_empty() && bench.software.set.lock().last() == Some(&Backings::default()));
}

#[test]
fn weights_decide_and_a_guest_that_clings_is_cut_off() {
    let mut bench = Bench::new(1);
    let weighing = |weight: u8| {
        format!("policy: {{vlan: {{access: 10}}}}, sriov: {{weight: {weight}, attach: {{external: {{}}}}}}")
    };
    bench.apply(&[vnic(1, &weighing(20)), vnic(2, &weighing(20))]);
    bench.run(200);
    assert_eq!(bench.path("vm1").path(), At::Hardware);
    assert_eq!(bench.path("vm2").reason(), Reason::NoFreeVf);
    *bench.guest.temper.lock() = Temper::Clings;
    bench.apply(&[vnic(1, &weighing(20)), vnic(2, &weighing(90))]);
    bench.run(32_000);
    assert_eq!(bench.path("vm2").path(), At::Hardware, "after the hold: {}", bench.events());
    let yielded = bench.path("vm1");
    assert_eq!((yielded.path(), yielded.counters.expect("counters").forced), (At::Software, 1));
}

#[test]
fn a_guest_that_does_not_come_is_not_waited_for() {
    for (temper, words) in [(Temper::Refuses, "the guest will have none"), (Temper::Sleeps, "in time")] {
        let mut bench = Bench::new(1);
        *bench.guest.temper.lock() = temper;
        bench.apply(&[vnic(1, CLAIM)]);
        bench.run(1_500);
        let path = bench.path("vm1");
        assert_eq!((path.path(), path.reason()), (At::Software, Reason::BackingOff), "{temper:?}");
        assert!(path.message.contains(words), "{}", path.message);
        assert!(!bench.is_open(0));
        *bench.guest.temper.lock() = Temper::Willing;
        bench.run(8_000);
        assert_eq!(bench.path("vm1").path(), At::Hardware, "{temper:?}");
        *bench.guest.temper.lock() = Temper::Sleeps;
        bench.run(2_500);
        assert_eq!(bench.path("vm1").path(), At::Attaching, "it was taken back and is offered anew");
    }
}

#[test]
fn a_killed_daemon_adopts_without_a_write() {
    let mut bench = Bench::new(2);
    bench.apply(&[vnic(1, CLAIM), vnic(2, CLAIM)]);
    bench.run(300);
    let (writes, sets) = (bench.nic.writes(), bench.software.set.lock().len());
    bench.restart();
    bench.apply(&[vnic(1, CLAIM), vnic(2, CLAIM)]);
    bench.run(1_000);
    assert_eq!(bench.nic.writes(), writes);
    for name in ["vm1", "vm2"] {
        assert_eq!(bench.path(name).path(), At::Hardware);
    }
    let sets = bench.software.set.lock()[sets..].to_vec();
    assert!(
        sets.iter().all(|set| set.vnics.len() == 2 && set.vnics.values().all(|backing| backing.in_use)),
        "the switch must not blink: {sets:?}"
    );
    // While nobody looked, one lost its policy, and the other its guest.
    bench.restart();
    bench.nic.with(|soft| soft.tamper(VfIndex(0), |settings| settings.vlan = None));
    bench.guest.plugged.lock().remove(&1);
    bench.apply(&[vnic(1, CLAIM), vnic(2, CLAIM)]);
    bench.run(40);
    assert!(bench.events().contains("vlan is none and should be 10"), "{}", bench.events());
    bench.run(3_000);
    for name in ["vm1", "vm2"] {
        assert_eq!(bench.path(name).path(), At::Hardware);
    }
}

#[test]
fn a_nic_that_goes_leaves_everybody_in_software() {
    let mut bench = Bench::new(2);
    bench.apply(&[vnic(1, CLAIM), vnic(2, CLAIM)]);
    bench.run(300);
    bench.nic.happen(Change::Gone);
    bench.run(300);
    for name in ["vm1", "vm2"] {
        let path = bench.path(name);
        assert_eq!((path.path(), path.reason()), (At::Software, Reason::NicUnavailable), "{}", path.message);
    }
    assert!(bench.software.set.lock().last().expect("it was told").vnics.is_empty());
    bench.nic.happen(Change::Back);
    bench.run(500);
    for name in ["vm1", "vm2"] {
        assert_eq!(bench.path(name).path(), At::Hardware);
    }
}

#[test]
fn a_refuted_ability_is_not_counted_on_unless_attested() {
    let mut bench = Bench::new(1);
    let kind = bench.manager.kind();
    let refuted = [("macGuard".to_owned(), knowledge::Finding::Refuted)].into();
    Findings::open(bench.dir.path()).keep(&kind, &refuted).expect("a tmpfs");
    bench.restart();
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(300);
    let path = bench.path("vm1");
    assert_eq!((path.path(), path.uncovered[0].feature.as_str()), (At::Software, "mac-guard"));
    let config = config(&format!(
        "switches: [{{name: blue, uplink: {{netdev: a-model, attest: [macGuard]}}}}]\nvnics:\n{}",
        vnic(1, CLAIM)
    ));
    bench.manager.set_world(bench.now, World { revision: 2, config, ..World::default() });
    bench.run(300);
    let path = bench.path("vm1");
    assert_eq!((path.path(), path.attested), (At::Hardware, vec!["macGuard".to_owned()]));
}

#[test]
fn what_the_nic_refuses_in_spite_of_its_promise_is_named() {
    let mut bench = Bench::new(1);
    // It says that it can, and cannot.
    bench.nic.with(|soft| soft.refuse(Some(sluice_policy::placement::Feature::AccessVlan)));
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(300);
    let path = bench.path("vm1");
    assert_eq!((path.path(), path.reason()), (At::Software, Reason::Uncovered), "{}", path.message);
    assert_eq!(path.uncovered[0].feature, "vlan-access");
    assert!(!bench.is_open(0));
    bench.nic.with(|soft| soft.refuse(None));
    bench.manager.release(bench.now, "vm1");
    bench.run(300);
    assert_eq!(bench.path("vm1").path(), At::Hardware);
}

#[test]
fn neighbours_in_switchdev_mode_are_led_past_a_vf_that_is_to_be_closed() {
    use sluice_eswitch::switchdev::{Representor, Representors};
    use sluice_policy::placement::{FlowerActions, FlowerKeys, FlowerSupport};
    let mut bench = Bench::new(2);
    let capabilities = Capabilities {
        mode: Mode::Switchdev,
        max_vfs: 2,
        link_state: Evidence::ReadBack,
        flower: FlowerSupport {
            offload: Evidence::ReadBack,
            rules_max: 1_000,
            keys: FlowerKeys::ALL,
            actions: FlowerActions::ALL,
        },
        ..Capabilities::default()
    };
    bench.nic = SoftNic::new("a-model", Soft::new(capabilities, 2, Flaws::default()), Mode::Switchdev);
    let port = |netdev: &str| Representor { ifindex: 7, netdev: netdev.to_owned() };
    bench.nic.set_representors(Some(Representors {
        switch_id: "1".into(),
        uplink: port("p0"),
        vfs: [(VfIndex(0), port("pf0vf0")), (VfIndex(1), port("pf0vf1"))].into(),
    }));
    bench.restart();
    bench.apply(&[vnic(1, CLAIM), vnic(2, CLAIM)]);
    bench.run(300);
    let first = bench.backing("vm1").expect("it has a VF");
    assert_eq!((first.representor.as_deref(), first.in_use), (Some("pf0vf0"), true), "{}", bench.events());
    let rules = |bench: &Bench| {
        let truth = bench.nic.with(|soft| soft.truth(VfIndex(0))).expect("it exists");
        match truth.enforced {
            sluice_eswitch::contract::Enforced::Switchdev { program, .. } => format!("{program:?}"),
            other => panic!("{other:?}"),
        }
    };
    let with_neighbour = rules(&bench);
    let writes = bench.nic.writes();
    bench.run(3_000);
    assert_eq!(bench.nic.writes(), writes, "an unchanged world is not written to: {}", bench.events());
    bench.manager.hold("vm2", "a migration", None);
    bench.run(300);
    assert_eq!(bench.path("vm2").path(), At::Software);
    assert_eq!(bench.path("vm1").path(), At::Hardware, "it never had to leave: {}", bench.events());
    let alone = rules(&bench);
    assert_ne!(alone, with_neighbour, "it led to its neighbour, and does no longer");
    bench.manager.release(bench.now, "vm2");
    bench.run(300);
    assert_eq!(rules(&bench), with_neighbour);
    assert_eq!(
        bench.path("vm1").counters.expect("counters").transitions.len(),
        3,
        "granted, verified, active"
    );
}

#[test]
fn a_vf_whose_vnic_lost_its_claim_while_nobody_looked_is_taken_back() {
    let mut bench = Bench::new(2);
    bench.apply(&[vnic(1, CLAIM), vnic(2, CLAIM)]);
    bench.run(300);
    bench.restart();
    bench.apply(&[vnic(1, "policy: {vlan: {access: 20}}"), vnic(2, CLAIM)]);
    bench.run(100);
    assert!(!bench.is_open(0), "its policy is gone: {}", bench.events());
    assert!(bench.nic.with(|soft| soft.is_pristine(VfIndex(0))));
    assert_eq!(bench.path("vm2").path(), At::Hardware);
    let record = RecordFile::new(bench.dir.path(), "blue").read();
    assert_eq!(record.held.keys().collect::<Vec<_>>(), ["vm2"]);
}

#[test]
fn a_vf_on_its_way_back_is_closed_when_the_policy_changes() {
    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    *bench.guest.temper.lock() = Temper::Clings;
    bench.manager.hold("vm1", "a migration", None);
    bench.run(40);
    assert!(bench.is_open(0), "the guest is asked first");
    bench.apply(&[vnic(1, "policy: {vlan: {access: 20}}, sriov: {attach: {external: {}}}")]);
    bench.manager.step(bench.now, false);
    assert!(!bench.is_open(0), "it would send into the old VLAN");

    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    *bench.guest.temper.lock() = Temper::Clings;
    bench.apply(&[vnic(1, "policy: {vlan: {access: 20}}")]);
    bench.manager.step(bench.now, false);
    assert!(!bench.is_open(0), "without a claim, and under another policy");
}

#[test]
fn a_software_path_that_did_not_answer_is_told_again() {
    let mut bench = Bench::new(1);
    bench.apply(&[vnic(1, CLAIM)]);
    bench.run(200);
    // It takes the new state, and its answer is lost.
    *bench.software.is_broken.lock() = true;
    bench.manager.hold("vm1", "a migration", None);
    bench.run(60);
    *bench.software.is_broken.lock() = false;
    let told = bench.software.set.lock().len();
    bench.run(200);
    assert!(bench.software.set.lock().len() > told, "nobody knows what it does");
    assert_eq!(bench.path("vm1").path(), At::Software);
    assert_eq!(bench.backing("vm1"), None);
}
