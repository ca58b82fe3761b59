use std::sync::{Mutex, PoisonError};

use sluice_kernel::{HooksInUse, PortState};
use sluice_pipeline::Vlan;
use sluice_policy::ids::Ids;
use sluice_policy::image::Bindings;
use sluice_policy::net::MacAddr;

use super::*;
use crate::engine::fake::FakeEngine;
use crate::json;

const YAML: &str = r#"
switches: [{name: blue}]
vnics:
- {name: vm1, switch: blue, attach: {tap: tap1}, mac: "02:00:00:00:00:01"}
- {name: vm2, switch: blue, attach: {vhostUser: {path: /run/vm2}}, mac: "02:00:00:00:00:02"}
"#;

/// What the fake saw, and what it is to answer.
#[derive(Default)]
struct World {
    taps: Vec<String>,
    image: Image,
    changes: Vec<String>,
    is_open: bool,
    trouble: Option<String>,
    fdb: Vec<FdbRow>,
    frames: Vec<(u32, Vec<u8>)>,
    traced: Vec<u32>,
    refused: u64,
    /// Trunks that are served.
    served: BTreeMap<String, u32>,
    /// Uplinks that are served.
    wires: Vec<Wire>,
    /// How often the kernel engine had synced when trunks were served.
    syncs: usize,
}

/// A userspace engine that counts 100 of everything.
#[derive(Default)]
struct FakeUser(Mutex<World>, FakeEngine);

impl FakeUser {
    fn with<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl UserPlane for FakeUser {
    fn ensure_taps(&mut self, ports: &[&PortSpec]) -> Vec<String> {
        let names: Vec<String> = ports.iter().map(|port| port.netdev.clone()).collect();
        self.with(|world| world.taps = names);
        vec!["taps".to_owned()]
    }

    fn trouble(&self, _netdev: &str) -> Option<String> {
        self.with(|world| world.trouble.clone())
    }

    fn refused(&self, _netdev: &str) -> u64 {
        self.with(|world| world.refused)
    }

    fn is_open(&self, _port: &str) -> bool {
        self.with(|world| world.is_open)
    }

    fn sync(&mut self, image: &Image) -> UserReport {
        self.with(|world| {
            world.image = image.clone();
            let state = PortState::Pending { reason: "no guest".to_owned() };
            let status = PortStatus { ifindex: None, state, hooks: HooksInUse::Userspace, notes: Vec::new() };
            let is_rings = |behind: &Behind| matches!(behind, Behind::VhostUser(_));
            let names = image.ports.values().filter(|port| is_rings(&port.behind)).map(|port| &port.name);
            let ports = names.map(|name| (name.clone(), status.clone())).collect();
            UserReport { changes: std::mem::take(&mut world.changes), ports }
        })
    }

    fn serve_trunks(&mut self, attached: &BTreeMap<&str, u32>) -> Vec<String> {
        let syncs = self.1.world().syncs;
        self.with(|world| {
            world.syncs = syncs;
            world.served = attached.iter().map(|(netdev, id)| ((*netdev).to_owned(), *id)).collect();
        });
        Vec::new()
    }

    fn serve_wires(&mut self, wires: &[Wire], steer: &mut Steer<'_>) -> WireReport {
        let nowhere = std::fs::File::open("/dev/null").expect("it is there");
        for wire in wires {
            steer(wire.uplink, 0, std::os::fd::AsFd::as_fd(&nowhere)).expect("fakes do not fail");
        }
        self.with(|world| world.wires = wires.to_vec());
        let notes = wires.iter().map(|wire| (wire.uplink, vec!["served".to_owned()])).collect();
        WireReport { changes: Vec::new(), notes }
    }

    fn age_fdb(&mut self) {}

    fn fdb(&self) -> Vec<FdbRow> {
        self.with(|world| world.fdb.clone())
    }

    fn port_stats(&self, _port: u32) -> PortStats {
        PortStats { rx_packets: 100, tx_packets: 200, tx_bytes: 300, ..PortStats::default() }
    }

    fn drops(&self, _port: u32) -> Vec<(DropReason, u64)> {
        vec![(DropReason::MacGuard, 100)]
    }

    fn rule_stats(&self, counter: u32) -> RuleStats {
        RuleStats { packets: 100 + u64::from(counter), bytes: 1 }
    }

    fn trace(&self, ingress: u32, _frame: &[u8]) -> LiveTrace {
        self.with(|world| {
            world.traced.push(ingress);
            LiveTrace { steps: vec![Step::Learn, Step::Out(ingress)], frames: world.frames.clone() }
        })
    }

    fn watch(&mut self, _wake: Wake) {}
}

struct Bench {
    engine: JointEngine<FakeEngine, FakeUser>,
    kernel: FakeEngine,
    ids: Ids,
    ports: Vec<PortSpec>,
    config: sluice_policy::config::Config,
}

impl Bench {
    fn new() -> Bench {
        let specs =
            crate::convert::config(&json::read_config(YAML).expect("good YAML")).expect("good values");
        let config = crate::convert::collect(&specs);
        let mut ids = Ids::default();
        lower::assign_ids(&config, &mut ids).expect("numbers");
        let ports = lower::ports(&config);
        let kernel = FakeEngine::with_netdevs(&["tap1", &lower::user_tap_netdev("blue")]);
        let engine = JointEngine::new(kernel.clone(), FakeUser(Mutex::default(), kernel.clone()));
        Bench { engine, kernel, ids, ports, config }
    }

    fn id(&self, port: &str) -> u32 {
        self.ids.ports.get(port).expect("it has a number")
    }

    fn sync(&mut self, bindings: &Bindings) -> SyncReport {
        let image = lower::lower(&self.config, &self.ids, bindings).expect("an image");
        self.engine.sync(&image).expect("fakes do not fail")
    }
}

#[test]
fn each_engine_has_its_own_part() {
    let mut bench = Bench::new();
    bench.engine.user.with(|world| world.changes = vec!["opened".to_owned()]);
    let observation = bench.engine.observe(&bench.ports).expect("fakes do not fail");
    let report = bench.sync(&observation.bindings);
    let (vm1, vm2, trunk) = (bench.id("vnic/vm1"), bench.id("vnic/vm2"), bench.id("user/blue"));
    let kernel: Vec<u32> = bench.kernel.world().image.ports.keys().copied().collect();
    assert!(kernel.contains(&vm1) && kernel.contains(&trunk) && !kernel.contains(&vm2), "{kernel:?}");
    let user: Vec<u32> = bench.engine.user.with(|world| world.image.ports.keys().copied().collect());
    assert!(!user.contains(&vm1) && user.contains(&trunk) && user.contains(&vm2), "{user:?}");
    assert_eq!(report.ports.len(), 3, "{:?}", report.ports);
    assert_eq!(report.ports["vnic/vm2"].hooks, HooksInUse::Userspace);
    assert!(report.observe_again, "what was opened is to be observed");
    assert!(report.link_changes.contains(&"opened".to_owned()));
    assert!(!bench.sync(&observation.bindings).observe_again, "nothing more was opened");
}

#[test]
fn rings_are_no_interface_and_trunks_are_made() {
    let mut bench = Bench::new();
    let done = bench.engine.ensure_internal(&bench.ports.clone()).expect("fakes do not fail");
    assert_eq!(done, ["taps"]);
    assert_eq!(bench.engine.user.with(|world| world.taps.clone()), [lower::user_tap_netdev("blue")]);
    let look = |bench: &Bench| bench.engine.observe(&bench.ports).expect("fakes do not fail");
    let closed = look(&bench);
    assert!(!closed.bindings.contains_key("vnic/vm2") && !closed.absent.contains_key("vnic/vm2"));
    bench.engine.user.with(|world| world.is_open = true);
    assert!(look(&bench).bindings.contains_key("vnic/vm2"));
    bench.engine.user.with(|world| world.trouble = Some("no module".to_owned()));
    assert_eq!(look(&bench).absent["user/blue"], "no module");
}

#[test]
fn a_trunk_is_served_while_the_kernel_has_its_program_on_it() {
    let mut bench = Bench::new();
    let served = |bench: &Bench| bench.engine.user.with(|world| (world.served.clone(), world.syncs));
    // There is no interface yet.
    bench.sync(&Bindings::new());
    assert_eq!(served(&bench), (BTreeMap::new(), 1));
    let bindings = bench.engine.observe(&bench.ports).expect("fakes do not fail").bindings;
    bench.sync(&bindings);
    let trunk = BTreeMap::from([(lower::user_tap_netdev("blue"), bench.id("user/blue"))]);
    assert_eq!(served(&bench), (trunk.clone(), 2), "when the kernel has synced");
    // A kernel engine that fails says nothing of its programs.
    bench.kernel.world().broken = true;
    let image = lower::lower(&bench.config, &bench.ids, &bindings).expect("an image");
    assert!(bench.engine.sync(&image).is_err());
    assert_eq!(served(&bench), (trunk, 2));
    bench.kernel.world().broken = false;
    bench.sync(&Bindings::new());
    assert_eq!(served(&bench).0, BTreeMap::new(), "the program is gone");
}

#[test]
fn what_a_tap_refuses_is_in_the_notes_of_its_port() {
    let mut bench = Bench::new();
    let notes = |bench: &mut Bench| bench.sync(&Bindings::new()).ports["user/blue"].notes.clone();
    assert_eq!(notes(&mut bench), [""; 0]);
    bench.engine.user.with(|world| world.refused = 7);
    assert_eq!(notes(&mut bench), ["frames from the kernel refused for their offloads: 7"]);
}

#[test]
fn whoever_serves_a_port_answers_for_it() {
    let mut bench = Bench::new();
    bench.sync(&Bindings::new());
    let (vm1, vm2, trunk) = (bench.id("vnic/vm1"), bench.id("vnic/vm2"), bench.id("user/blue"));
    let engine = &bench.engine;
    let received = |port| engine.port_stats(port).expect("fakes do not fail").rx_packets;
    assert_eq!([received(vm1), received(vm2), received(trunk)], [0, 100, 0]);
    let dropped = |port| engine.drops(port).expect("fakes do not fail");
    assert_eq!(dropped(vm1), []);
    assert_eq!(dropped(vm2), [(DropReason::MacGuard, 100)]);
    assert_eq!(dropped(trunk), [(DropReason::MacGuard, 100)], "both engines drop on a trunk");
    let rules = engine.rule_stats(&[3, 4]).expect("fakes do not fail");
    assert_eq!([rules[0].packets, rules[1].packets], [103, 104]);
    let row = |port| FdbRow { switch: 1, vlan: Vlan::UNTAGGED, mac: MacAddr([2; 6]), port, age_seconds: 0 };
    engine.user.with(|world| world.fdb = vec![row(vm2), row(trunk)]);
    assert_eq!(engine.fdb().expect("fakes do not fail"), [row(vm2)]);
}

/// A host whose switch has an uplink, and what both engines count.
fn with_uplink(rest: &str) -> Bench {
    let yaml = YAML.replace("{name: blue}", "{name: blue, uplink: {netdev: up0, hook: XDP}}");
    let specs =
        crate::convert::config(&json::read_config(&(yaml + rest)).expect("good YAML")).expect("good values");
    let mut bench = Bench::new();
    bench.config = crate::convert::collect(&specs);
    lower::assign_ids(&bench.config, &mut bench.ids).expect("numbers");
    bench.ports = lower::ports(&bench.config);
    let netdevs = ["tap1", "tap3", "up0", &lower::user_tap_netdev("blue")];
    let netdevs = (10..).zip(netdevs).map(|(index, name)| (name.to_owned(), index));
    bench.kernel.world().netdevs = netdevs.collect();
    bench
}

fn pass(bench: &mut Bench) -> SyncReport {
    let bindings = bench.engine.observe(&bench.ports).expect("fakes do not fail").bindings;
    bench.sync(&bindings)
}

#[test]
fn an_uplink_is_served_directly_while_xdp_is_on_it() {
    let mut bench = with_uplink("");
    let wires = |bench: &Bench| bench.engine.user.with(|world| world.wires.clone());
    let notes = |report: &SyncReport| report.ports["uplink/blue"].notes.join("; ");
    let report = pass(&mut bench);
    assert_eq!(wires(&bench), []);
    assert!(notes(&report).contains("take the tap: no XDP"), "{}", notes(&report));
    bench.kernel.world().xdp.insert("uplink/blue".to_owned());
    let report = pass(&mut bench);
    let (uplink, trunk) = (bench.id("uplink/blue"), bench.id("user/blue"));
    let wire = Wire { uplink, trunk, ifindex: 12, queues: 2, mtu: 1500, redirect: false };
    assert_eq!(wires(&bench), std::slice::from_ref(&wire));
    assert_eq!(bench.kernel.world().steered, [(uplink, 0)]);
    assert_eq!(notes(&report), "served");
    // While its driver takes redirected frames, it is another wire.
    let mut bindings = bench.engine.observe(&bench.ports).expect("fakes do not fail").bindings;
    bindings.get_mut("uplink/blue").expect("it is there").xdp_target = true;
    bench.sync(&bindings);
    assert_eq!(wires(&bench), [Wire { redirect: true, ..wire }]);
    // Without its trunk it is served by nobody.
    bench.kernel.world().netdevs.remove(&lower::user_tap_netdev("blue"));
    pass(&mut bench);
    assert_eq!(wires(&bench), []);
}

#[test]
fn an_uplink_beside_learners_is_one_way() {
    let learner = "- {name: vm3, switch: blue, attach: {tap: tap3}, mac: \"02:00:00:00:00:03\", \
                   policy: {allowSpoofing: true, learnLimit: 4}}\n";
    let mut bench = with_uplink(learner);
    bench.kernel.world().xdp.insert("uplink/blue".to_owned());
    let report = pass(&mut bench);
    let notes = report.ports["uplink/blue"].notes.join("; ");
    assert!(notes.starts_with("served; ") && notes.contains("takes the tap, since"), "{notes}");
    let uplink = bench.id("uplink/blue");
    assert!(!bench.engine.user.with(|world| world.image.ports.contains_key(&uplink)));
}

#[test]
fn what_both_engines_send_by_an_uplink_is_added_up() {
    let mut bench = with_uplink("");
    pass(&mut bench);
    let uplink = bench.id("uplink/blue");
    let counted = |bench: &Bench| bench.engine.port_stats(uplink).expect("fakes do not fail");
    let both = counted(&bench);
    assert_eq!(
        [both.rx_packets, both.tx_packets, both.tx_bytes],
        [0, 200, 300],
        "what comes in is the kernel's"
    );
    assert_eq!(bench.engine.drops(uplink).expect("fakes do not fail"), [(DropReason::MacGuard, 100)]);
    // What has been counted stays counted when the last guest with rings is gone; but not for another uplink.
    bench.config.vnics.retain(|vnic| vnic.name != "vm2");
    pass(&mut bench);
    assert_eq!(counted(&bench).tx_packets, 200);
    bench.config.switches[0].uplink = None;
    pass(&mut bench);
    assert_eq!(counted(&bench).tx_packets, 0);
}

#[test]
fn a_trace_passes_over_the_trunk() {
    let mut bench = Bench::new();
    bench.sync(&Bindings::new());
    let (vm2, trunk) = (bench.id("vnic/vm2"), bench.id("user/blue"));
    bench.engine.user.with(|world| world.frames = vec![(trunk, vec![1])]);
    // The kernel's fake does nothing with what it gets.
    let trace = bench.engine.trace(vm2, &[1]);
    assert_eq!(trace.frames, []);
    assert_eq!(
        trace.steps,
        [Step::Learn, Step::Out(vm2), Step::Drop(vm2, DropReason::NoDestination)],
        "a frame that nobody takes has no destination"
    );
    assert_eq!(bench.engine.user.with(|world| world.traced.clone()), [vm2]);
    // What is on the trunk is nobody's step.
    bench.engine.user.with(|world| world.frames = vec![(vm2, vec![1])]);
    let trace = bench.engine.trace(vm2, &[1]);
    assert_eq!(trace.frames, [(vm2, vec![1])]);
    assert_eq!(trace.steps, [Step::Learn, Step::Out(vm2)]);
}
