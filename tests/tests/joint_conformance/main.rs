//! Conformance of both engines together, on real frames: generated configurations in the real daemon, with two vNICs on rings, the
//! others and the uplinks on taps, and generated frames from all of them. Each frame must come out where the oracle says, byte for
//! byte, and nowhere else; and after each configuration's frames every drop must have been counted where, and why, the oracle says.
//!
//! Nothing is learnt and nothing limited, since both depend on what was before: the suites `conformance` and `two_engines` have that.
//!
//! `SLUICE_SEED` replays a seed, `SLUICE_CASES` sets the number of frames; without it there are as many as some time allows.

#![forbid(unsafe_code)]
// The seed and what was covered are what one wants to read.
#![allow(clippy::print_stderr)]

// Guests here keep to the rules.
#[allow(dead_code)]
#[path = "../soak/guest.rs"]
mod guest;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use sluice_control::convert::{Spec, resource};
use sluice_control::json::to_json;
use sluice_policy::config::{Attachment, Config, Hook, VhostMode, VhostUser};
use sluice_policy::generate::{Rng, Scenario, frame, scenario};
use sluice_policy::oracle::{State, evaluate};
use sluice_tests::api::Counters;
use sluice_tests::{Lab, PATIENCE, Tap, scenario as lab_scenario, wait_until};

use crate::guest::{Guest, Meeting};

/// How long frames are sent, unless their number is given.
const LASTS: Duration = Duration::from_secs(20);
/// Frames per configuration.
const FRAMES: usize = 100;
/// vNICs that have rings; the others have taps.
const RINGS: [&str; 2] = ["vm1", "vm2"];
const VNICS: usize = 8;
const UPLINKS: usize = 3;
/// Longest frame that is sent.
const LONGEST: usize = 1_500;
/// How long a frame may take.
const ARRIVAL: Duration = Duration::from_secs(5);
/// The reason of which fewer drops may be counted than the oracle says: that nobody is there may be found out only when the frame has
/// crossed, and is counted on the tap between the engines then.
const UNSURE: &str = "no-destination";

/// The far end of a port.
enum End<'a> {
    Rings(&'a mut Guest),
    Tap(&'a Tap),
}

impl End<'_> {
    fn send(&mut self, frame: &[u8]) -> Result<()> {
        match self {
            End::Rings(guest) => {
                ensure!(guest.send(0, [0; 12], frame), "a ring is full");
                guest.flush();
                Ok(())
            }
            End::Tap(tap) => tap.send(frame),
        }
    }

    fn drain(&mut self) -> Result<Vec<Vec<u8>>> {
        match self {
            End::Rings(guest) => {
                let frames = std::iter::from_fn(|| guest.receive(0)).collect();
                guest.flush();
                Ok(frames)
            }
            End::Tap(tap) => tap.drain(),
        }
    }
}

/// What was compared.
#[derive(Debug, Default)]
struct Report {
    settings: usize,
    cases: u64,
    /// Frames that came out, by who sent and who received: rings or a tap.
    arrived: BTreeMap<(&'static str, &'static str), u64>,
    dropped: BTreeMap<String, u64>,
}

struct Joint<'a> {
    lab: &'a Lab,
    /// By the port's name.
    taps: BTreeMap<String, Tap>,
    guests: BTreeMap<String, Guest>,
    /// Resources of the last configuration.
    held: BTreeSet<String>,
    report: Report,
}

/// A generated configuration, with rings for some vNICs and without what depends on time or on what was before.
fn configuration(rng: &mut Rng, lab: &Lab) -> Scenario {
    let mut scenario = scenario(rng);
    for switch in &mut scenario.config.switches {
        switch.internal = None;
        if let Some(uplink) = &mut switch.uplink {
            uplink.learn_limit = 0;
            uplink.hook = Hook::Tcx;
        }
    }
    for vnic in &mut scenario.config.vnics {
        vnic.sriov = None;
        vnic.hook = Hook::Auto;
        vnic.policy.learn_limit = Some(0);
        vnic.policy.rate_from_vm = None;
        vnic.policy.rate_to_vm = None;
        if RINGS.contains(&vnic.name.as_str()) {
            let path = lab.places().socket.with_file_name(format!("{}.sock", vnic.name));
            let path = path.display().to_string();
            vnic.attach = Attachment::VhostUser(VhostUser { path, mode: VhostMode::Server, queues: 1 });
            // What is behind the tap the userspace engine does learn, so it finds fewer addresses unknown.
            vnic.policy.unknown_unicast = false;
        } else if let Attachment::Veth(netdev) = &vnic.attach {
            vnic.attach = Attachment::Tap(netdev.clone());
        }
    }
    scenario.state = State::default();
    scenario
}

/// The configuration as the command line reads it, and the names of its resources.
fn text(config: &Config) -> (Value, BTreeSet<String>) {
    let (mut lists, mut names) = (BTreeMap::<&str, Vec<Value>>::new(), BTreeSet::new());
    let switches = config.switches.iter().cloned().map(Spec::Switch);
    let groups = config.acl_groups.iter().cloned().map(Spec::AclGroup);
    let vnics = config.vnics.iter().cloned().map(Spec::Vnic);
    for spec in switches.chain(groups).chain(vnics) {
        let message = to_json(&resource(&spec, 0), "sluice.v1.Resource");
        for (list, kind) in [("switches", "switch"), ("aclGroups", "aclGroup"), ("vnics", "vnic")] {
            if let Some(spec) = message.get(kind) {
                names.insert(format!("{kind}/{}", spec["name"].as_str().unwrap_or_default()));
                lists.entry(list).or_default().push(spec.clone());
            }
        }
    }
    (json!(lists), names)
}

impl<'a> Joint<'a> {
    fn new(lab: &'a Lab) -> Result<Joint<'a>> {
        let mut taps = BTreeMap::new();
        let vnics = (1..=VNICS).map(|number| (format!("vnic/vm{number}"), format!("p{number}")));
        let uplinks = (0..UPLINKS).map(|number| (format!("uplink/s{number}"), format!("up{number}")));
        for (port, netdev) in vnics.chain(uplinks) {
            taps.insert(port, Tap::open(lab.host(), &netdev)?);
            lab.host().run(&["ip", "link", "set", &netdev, "mtu", "9500", "up"])?;
        }
        Ok(Joint { lab, taps, guests: BTreeMap::new(), held: BTreeSet::new(), report: Report::default() })
    }

    fn end(&mut self, port: &str) -> Result<End<'_>> {
        if let Some(guest) = self.guests.get_mut(port) {
            return Ok(End::Rings(guest));
        }
        self.taps.get(port).map(End::Tap).with_context(|| format!("no end of {port}"))
    }

    /// Whether frames can come from a port: one of the configuration, that has an end.
    fn is_there(&self, config: &Config, port: &str) -> bool {
        let is_known = sluice_policy::lower::ports(config).iter().any(|spec| spec.name == port);
        is_known && (self.guests.contains_key(port) || self.taps.contains_key(port))
    }

    /// Brings the daemon to this configuration, with everything that was attached to its ports.
    fn configure(&mut self, config: &Config) -> Result<()> {
        let (text, names) = text(config);
        let sluice = self.lab.sluice();
        let over: Vec<&str> = self.held.difference(&names).map(String::as_str).collect();
        sluice.apply(&text.to_string())?;
        if !over.is_empty() {
            sluice.run(&[&["delete"], over.as_slice()].concat())?;
        }
        let wanted: BTreeSet<String> =
            config.vnics.iter().map(|vnic| format!("vnic/{}", vnic.name)).collect();
        self.guests.retain(|port, guest| wanted.contains(port) && !guest.is_alone());
        for name in RINGS {
            let port = format!("vnic/{name}");
            if wanted.contains(&port) && !self.guests.contains_key(&port) {
                let path = self.lab.places().socket.with_file_name(format!("{name}.sock"));
                let meeting = Meeting::Connect(path);
                let guest =
                    wait_until("a guest connects", PATIENCE, || Guest::meet(&meeting, 1, guest::ENTRIES))?;
                self.guests.insert(port, guest);
            }
        }
        wait_until("all are ready", PATIENCE, || {
            let answer = sluice.json(&["get", "all"])?;
            let text = answer.to_string();
            ensure!(!text.contains("\"PENDING\"") && !text.contains("\"FAILED\""), "{text}");
            Ok(Some(()))
        })?;
        self.held = names;
        self.report.settings += 1;
        Ok(())
    }

    /// Sends one frame, and waits for it wherever it is to come out.
    fn check(&mut self, ingress: &str, bytes: &[u8], deliveries: &BTreeMap<String, Vec<u8>>) -> Result<()> {
        self.end(ingress)?.send(bytes)?;
        let mut missing = deliveries.clone();
        let start = Instant::now();
        loop {
            let ports: Vec<String> = self.guests.keys().chain(self.taps.keys()).cloned().collect();
            for port in ports {
                for found in self.end(&port)?.drain()? {
                    match missing.remove(&port) {
                        Some(wanted) if wanted == found => {}
                        Some(wanted) => bail!("by {port}: wanted {wanted:02x?}, found {found:02x?}"),
                        None => bail!("by {port} came {found:02x?}, of this frame or of one before"),
                    }
                    let kind = |port: &str| if self.guests.contains_key(port) { "rings" } else { "tap" };
                    *self.report.arrived.entry((kind(ingress), kind(&port))).or_default() += 1;
                }
            }
            if missing.is_empty() {
                self.report.cases += 1;
                return Ok(());
            }
            ensure!(
                start.elapsed() < ARRIVAL,
                "within {ARRIVAL:?} there came nothing by {:?}",
                missing.keys()
            );
        }
    }

    /// Drops so far, those at taps between the engines apart.
    fn drops(&self) -> Result<Counters> {
        let mut drops = self.lab.sluice().drops()?;
        drops.retain(|(port, _), _| !port.starts_with("user/"));
        Ok(drops)
    }

    /// Waits until all drops have been counted that are due since `before`, and no others; then nothing more has come out.
    fn settle(&mut self, before: &Counters, due: &Counters) -> Result<()> {
        wait_until("the drops are those of the oracle", ARRIVAL, || {
            let mut found = self.drops()?;
            for (key, count) in before {
                // Ports that are gone have taken their counters along.
                let now = found.entry(key.clone()).or_default();
                *now = now.saturating_sub(*count);
            }
            found.retain(|_, count| *count > 0);
            let exactly = |counters: &Counters| -> Counters {
                counters
                    .iter()
                    .filter(|((_, reason), _)| reason != UNSURE)
                    .map(|(key, count)| (key.clone(), *count))
                    .collect()
            };
            ensure!(exactly(&found) == exactly(due), "wanted {due:?}, found {found:?}");
            for (key, count) in found.iter().filter(|((_, reason), _)| reason == UNSURE) {
                let most = due.get(key).copied().unwrap_or(0);
                ensure!(*count <= most, "{key:?}: wanted {most} at most, found {count}");
            }
            Ok(Some(()))
        })?;
        for (port, tap) in &self.taps {
            ensure!(tap.drain()?.is_empty(), "by {port} came a frame that nobody expected");
        }
        for (port, guest) in &mut self.guests {
            ensure!(guest.receive(0).is_none(), "by {port} came a frame that nobody expected");
        }
        Ok(())
    }
}

/// Whether the kernel lets a frame get as far as the engine: it takes the outermost tag out before, and drops by itself what is too
/// short for that. Between the engines a frame may have one more.
fn is_carried(frame: &[u8]) -> bool {
    let has_tag = matches!(frame.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8]));
    (if has_tag { 20 } else { 16 }..=LONGEST).contains(&frame.len())
}

fn number(variable: &str) -> Result<Option<u64>> {
    let given = std::env::var(variable).ok();
    given.map(|text| text.parse().with_context(|| format!("{variable} is not a number: {text}"))).transpose()
}

#[test]
fn both_engines_together_do_what_the_oracle_says() -> Result<()> {
    let fresh = || std::time::UNIX_EPOCH.elapsed().map_or(1, |elapsed| elapsed.as_nanos() as u64);
    let seed = number("SLUICE_SEED")?.unwrap_or_else(fresh);
    let cases = number("SLUICE_CASES")?;
    eprintln!("SLUICE_SEED={seed}");
    lab_scenario(|lab| compare(lab, seed, cases).with_context(|| format!("SLUICE_SEED={seed}")))
}

fn compare(lab: &Lab, seed: u64, cases: Option<u64>) -> Result<()> {
    let mut rng = Rng::new(seed);
    let mut joint = Joint::new(lab)?;
    let begin = Instant::now();
    while cases.map_or(begin.elapsed() < LASTS, |cases| joint.report.cases < cases) {
        let scenario = configuration(&mut rng, lab);
        joint.configure(&scenario.config)?;
        let before = joint.drops()?;
        let mut due = Counters::new();
        for _ in 0..FRAMES {
            let (ingress, bytes) = frame(&mut rng, &scenario);
            if !is_carried(&bytes) || !joint.is_there(&scenario.config, &ingress) {
                continue;
            }
            let outcome = evaluate(&scenario.config, &scenario.state, &ingress, &bytes);
            if let Some(reason) = outcome.dropped {
                *due.entry((ingress.clone(), reason.name().to_owned())).or_default() += 1;
            }
            let mut deliveries = BTreeMap::new();
            for (port, result) in &outcome.deliveries {
                match result {
                    Ok(bytes) => drop(deliveries.insert(port.clone(), bytes.clone())),
                    Err(reason) => {
                        *due.entry((port.clone(), reason.name().to_owned())).or_default() += 1;
                    }
                }
            }
            joint.check(&ingress, &bytes, &deliveries).map_err(|error| {
                anyhow!("from {ingress}: {error:#}\n{bytes:02x?}\n{outcome:#?}\n{:#?}", scenario.config)
            })?;
        }
        joint.settle(&before, &due).with_context(|| format!("{:#?}", scenario.config))?;
        for ((_, reason), count) in due {
            *joint.report.dropped.entry(reason).or_default() += count;
        }
    }
    let report = &joint.report;
    eprintln!("{report:?}");
    for way in [("rings", "rings"), ("rings", "tap"), ("tap", "rings"), ("tap", "tap")] {
        let arrived = report.arrived.get(&way).copied().unwrap_or(0);
        ensure!(arrived * 200 >= report.cases, "only {arrived} of {} frames went {way:?}", report.cases);
    }
    ensure!(report.dropped.len() >= 8, "only these drops occurred: {:?}", report.dropped.keys());
    Ok(())
}
