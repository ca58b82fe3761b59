//! Two engines joined by a tap do together what the oracle says of one switch: the pipeline over the kernel engine's part of an
//! image and over the userspace engine's, on generated cases in which some vNICs are attached by vhost-user. In half of
//! them the userspace engine sends to uplinks itself.

use std::collections::{BTreeMap, BTreeSet};

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::{FdbEntry, port_flag};
use sluice_policy::config::{Attachment, Hook, VhostMode, VhostUser, VlanMode};
use sluice_policy::conformance::{Observed, compare, fdb_key, port_id};
use sluice_policy::generate::{Rng, Scenario, frame, scenario};
use sluice_policy::ids::Ids;
use sluice_policy::image::Behind;
use sluice_policy::lower::{self, assign_ids, lower_with, split};
use sluice_policy::net::MacAddr;
use sluice_policy::oracle::{Domain, Outcome, Sighting, State, Station, evaluate};
use sluice_policy::sim::{Run, Simulator, TagPlace};

const SCENARIOS: usize = 600;
const FRAMES: usize = 25;
/// An address that is known behind uplinks.
const OUTSIDE: [u8; 6] = [0x02, 0x99, 0, 0, 0, 1];

/// Both engines, and how they are joined.
struct Joined {
    kernel: Simulator,
    user: Simulator,
    served: BTreeSet<u32>,
    taps: BTreeMap<u32, u32>,
    /// Uplinks that the userspace engine sends to.
    uplinks: BTreeSet<u32>,
}

impl Joined {
    fn new(scenario: &Scenario, ids: &Ids, is_direct: bool) -> Joined {
        let whole = lower_with(&scenario.config, ids, &scenario.bindings(), &scenario.state.backings)
            .expect("a generated configuration is valid");
        let of = |wanted: fn(&Behind) -> bool| {
            whole.ports.iter().filter(move |(_, port)| wanted(&port.behind)).map(|(id, port)| (*id, port))
        };
        let served = of(|behind| matches!(behind, Behind::VhostUser(_))).map(|(id, _)| id).collect();
        let taps =
            of(|behind| *behind == Behind::UserTap).map(|(id, port)| (port.config.switch, id)).collect();
        let mut parts = split(&whole);
        let mut uplinks = BTreeSet::new();
        for (id, port) in &mut parts.user.ports {
            if port.behind == Behind::Uplink && port.config.flags & port_flag::ATTACHED != 0 {
                if is_direct {
                    uplinks.insert(*id);
                } else {
                    // It has no socket there.
                    port.config.flags &= !port_flag::ATTACHED;
                }
            }
        }
        let (kernel, user) = (Simulator::new(parts.kernel), Simulator::new(parts.user));
        Joined { kernel, user, served, taps, uplinks }
    }

    /// Each engine has learnt what it can have.
    fn adopt(&mut self, ids: &Ids, state: &State) {
        self.kernel.adopt(ids, state);
        self.user.adopt(ids, state);
        let now = (self.user.state().now / 1_000_000_000) as u32;
        let fdb = &mut self.user.state_mut().fdb;
        fdb.clear();
        for (station, sighting) in &state.fdb {
            let (key, port) = (fdb_key(ids, station), port_id(ids, &sighting.port));
            let seen = now.wrapping_sub(sighting.age_seconds);
            if let Some(tap) = self.taps.get(&key.switch) {
                let port = if self.served.contains(&port) { port } else { *tap };
                fdb.insert(key, FdbEntry { port, seen });
            }
        }
    }

    /// A frame through the engine that serves its port, and what comes out by a tap through the other. Says whether it
    /// crossed, and whether it took a short cut.
    fn run(&mut self, ingress: u32, bytes: &[u8]) -> (Observed, bool, bool) {
        let taps: BTreeSet<u32> = self.taps.values().copied().collect();
        let (first, second) = if self.served.contains(&ingress) {
            (&mut self.user, &mut self.kernel)
        } else {
            (&mut self.kernel, &mut self.user)
        };
        let mut runs: Vec<Run> = vec![first.run(ingress, bytes, TagPlace::Inline)];
        let is_short = self.served.contains(&ingress)
            && runs[0].frames.iter().any(|(port, _)| self.uplinks.contains(port));
        let crossing: Vec<_> =
            runs[0].frames.iter().filter(|(port, _)| taps.contains(port)).cloned().collect();
        runs.extend(crossing.iter().map(|(tap, bytes)| second.run(*tap, bytes, TagPlace::Beside)));
        let mut all = Observed { rules: Some(Vec::new()), ..Observed::default() };
        for run in runs {
            let observed = run.observed();
            all.frames.extend(observed.frames.into_iter().filter(|(port, _)| !taps.contains(port)));
            for ((port, reason), count) in observed.drops {
                // What crosses may turn out to be wanted by nobody there.
                if !taps.contains(&port) {
                    *all.drops.entry((port, reason)).or_default() += count;
                }
            }
            all.rules.get_or_insert_default().extend(observed.rules.unwrap_or_default());
        }
        (all, !crossing.is_empty(), is_short)
    }
}

/// Attaches about half of the vNICs by vhost-user.
fn attach(rng: &mut Rng, scenario: &mut Scenario) {
    let with_vf: BTreeSet<&String> = scenario.state.backings.vnics.keys().collect();
    for vnic in &mut scenario.config.vnics {
        if vnic.sriov.is_none() && !with_vf.contains(&vnic.name) && rng.chance(50) {
            let path = format!("/run/{}", vnic.name);
            vnic.attach = Attachment::VhostUser(VhostUser { path, mode: VhostMode::Server, queues: 1 });
            vnic.hook = Hook::Auto;
        }
    }
    // The kernel does not learn what is behind the tap: addresses there are as unknown, and flooded.
    let served: BTreeSet<String> = scenario
        .config
        .vnics
        .iter()
        .filter(|vnic| matches!(vnic.attach, Attachment::VhostUser(_)))
        .map(|vnic| format!("vnic/{}", vnic.name))
        .collect();
    // And what is behind a port that is gone is dropped on the tap, if the other engine finds it.
    let is_known = |port: &str| lower::ports(&scenario.config).iter().any(|spec| spec.name == port);
    scenario.state.fdb.retain(|_, sighting| !served.contains(&sighting.port) && is_known(&sighting.port));
}

/// Has others send as themselves only, so that all that can be learnt is behind uplinks.
fn guard_others(scenario: &mut Scenario) {
    for vnic in &mut scenario.config.vnics {
        if !matches!(vnic.attach, Attachment::VhostUser(_)) {
            vnic.policy.allow_spoofing = false;
            vnic.policy.learn_limit = None;
        }
    }
}

/// Nothing was learnt behind ports that do not learn, and something is known behind every uplink that guests are sent to by.
fn learn_behind_uplinks(scenario: &mut Scenario, ids: &Ids, joined: &Joined) {
    let is_direct = |switch: &str| {
        let image = joined.user.image();
        let id = ids.switches.get(switch);
        image.ports.values().any(|port| port.behind == Behind::Uplink && Some(port.config.switch) == id)
    };
    let learns = |port: &str| {
        let image = ids.ports.get(port).and_then(|id| joined.kernel.image().ports.get(&id));
        image.is_some_and(|port| port.config.flags & port_flag::LEARN != 0)
    };
    for (station, sighting) in &mut scenario.state.fdb {
        if is_direct(&station.switch) && !learns(&sighting.port) {
            sighting.port = lower::uplink_port(&station.switch);
        }
    }
    for vnic in &scenario.config.vnics {
        let domains = match &vnic.policy.vlan {
            VlanMode::Untagged => vec![Domain::Untagged],
            VlanMode::Access(vid) => vec![Domain::Customer(*vid)],
            VlanMode::Trunk { allowed, native } => {
                allowed.iter().map(|range| range.first()).chain(*native).map(Domain::Customer).collect()
            }
            VlanMode::Tunnel(vid) => vec![Domain::Service(*vid)],
        };
        // A vNIC that others may be behind, or else the uplink.
        let uplink = lower::uplink_port(&vnic.switch);
        let neighbours = scenario.config.vnics.iter().filter(|other| other.switch == vnic.switch);
        let port = neighbours
            .map(|other| lower::vnic_port(&other.name))
            .find(|port| learns(port))
            .or_else(|| is_direct(&vnic.switch).then_some(uplink));
        if let Some(port) = port {
            for domain in domains {
                let station = Station { switch: vnic.switch.clone(), domain, mac: MacAddr(OUTSIDE) };
                scenario.state.fdb.insert(station, Sighting { port: port.clone(), age_seconds: 1 });
            }
        }
    }
}

#[test]
fn two_engines_do_what_the_oracle_says_of_one_switch() {
    let mut rng = Rng::new(5);
    let (mut crossed, mut arrived, mut short) = (0, 0, 0);
    for number in 0..SCENARIOS {
        let mut scenario = scenario(&mut rng);
        attach(&mut rng, &mut scenario);
        if number % 4 < 2 {
            guard_others(&mut scenario);
        }
        let mut ids = Ids::default();
        assign_ids(&scenario.config, &mut ids).expect("a generated configuration fits");
        let mut joined = Joined::new(&scenario, &ids, number % 2 == 0);
        learn_behind_uplinks(&mut scenario, &ids, &joined);
        for index in 0..FRAMES {
            let (ingress, mut bytes) = frame(&mut rng, &scenario);
            if bytes.len() > 6 && rng.chance(30) {
                bytes[..6].copy_from_slice(&OUTSIDE);
            }
            let outcome = evaluate(&scenario.config, &scenario.state, &ingress, &bytes);
            joined.adopt(&ids, &scenario.state);
            let (observed, has_crossed, is_short) = joined.run(port_id(&ids, &ingress), &bytes);
            let outcome = without_lonely_floods(outcome, has_crossed);
            if let Err(text) = compare(&scenario.config, &ids, &ingress, &outcome, &observed) {
                panic!(
                    "{number}.{index} from {ingress}: {text}\n{bytes:02x?}\n{:?}\n{outcome:?}\n{:?}\n{:?}",
                    ids.ports.by_name, scenario.config.switches, scenario.config.vnics
                );
            }
            crossed += usize::from(has_crossed);
            short += usize::from(is_short);
            arrived += usize::from(has_crossed && !observed.frames.is_empty());
        }
    }
    let cases = SCENARIOS * FRAMES;
    assert!(crossed > cases / 10, "only {crossed} of {cases} frames crossed");
    assert!(arrived > cases / 20, "only {arrived} of {crossed} frames that crossed arrived");
    assert!(short > cases / 200, "only {short} of {cases} frames were sent to an uplink");
}

/// An engine that hands a flooded frame to the other cannot know that nobody is there.
fn without_lonely_floods(mut outcome: Outcome, has_crossed: bool) -> Outcome {
    if has_crossed && outcome.dropped == Some(DropReason::NoDestination) {
        outcome.dropped = None;
    }
    outcome
}
