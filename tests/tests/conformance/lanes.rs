//! The views of a case, and the comparison.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use sluice_kernel::{Engine, EngineOptions, PortState};
use sluice_pipeline::tables::{Direction, FdbKey};
use sluice_pipeline::{DropReason, Verdict};
use sluice_policy::config::Hook;
use sluice_policy::conformance;
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings, Image};
use sluice_policy::lower;
use sluice_policy::oracle::{self, Outcome, State};
use sluice_policy::sim::{Simulator, TagPlace};
use sluice_tests::Tap;
use sluice_user::memory::Probe;
use sluice_user::port::Accepts;

use crate::case::{Case, Setting};
use crate::datapath::Datapath;

/// Taps to bind ports to.
const TAPS: usize = 24;
/// Return codes of the programs (linux/pkt_cls.h, linux/bpf.h).
const TC_REDIRECT: u32 = 7;
const TC_DROP: u32 = 2;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
/// How long a frame that must leave may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nanoseconds by which an empty bucket is ahead: longer than any test.
const HOUR: u64 = 3_600_000_000_000;

/// What must happen, or did, in a form in which all views can be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Effect {
    /// Drops, with the port on which each is counted.
    drops: BTreeSet<(u32, DropReason)>,
    /// Frames that leave, by port.
    frames: BTreeMap<u32, Vec<u8>>,
    /// What is learnt, and behind which port.
    learnt: Option<(FdbKey, u32)>,
}

/// How much was compared.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) cases: u64,
    user: u64,
    tc: u64,
    xdp: u64,
    xdp_deferred: u64,
    xdp_redirected: u64,
    wire: u64,
    wire_frames: u64,
    wire_with_xdp: u64,
    tagged_out: u64,
    reasons: BTreeMap<&'static str, u64>,
}

/// Everything that is compared, in the calling thread's network namespace.
pub(crate) struct Lanes {
    pins: PathBuf,
    engine: Option<Engine>,
    datapath: Datapath,
    /// The userspace engine.
    user: Probe,
    taps: Vec<Tap>,
    ids: Ids,
    image: Image,
    /// Port ids by name, and taps by port id.
    ports: BTreeMap<String, u32>,
    tap_of: BTreeMap<u32, usize>,
    /// Ageing times by switch.
    ageing: BTreeMap<String, u32>,
    with_xdp: bool,
    /// Drops of the current configuration's ports before its first case, and those expected since.
    drops_before: BTreeMap<u32, u64>,
    drops_expected: BTreeMap<u32, u64>,
    pub(crate) report: Report,
}

impl Lanes {
    pub(crate) fn open() -> Result<Lanes> {
        let pins = PathBuf::from(format!("/sys/fs/bpf/sl-{}-conformance", std::process::id()));
        let options = EngineOptions { pin_dir: pins.clone() };
        let (mut engine, _) = Engine::open(&options).context("opening the engine")?;
        engine.sync(&Image::default())?; // pins the programs
        let datapath = Datapath::open(&pins)?;
        let taps = (0..TAPS).map(|n| Tap::open_here(&format!("cf{n}"))).collect::<Result<Vec<_>>>()?;
        for tap in 0..TAPS {
            let up = Command::new("ip")
                .args(["link", "set", &format!("cf{tap}"), "mtu", "9500", "up"])
                .status()?;
            ensure!(up.success(), "a tap could not be brought up");
        }
        Ok(Lanes {
            pins,
            engine: Some(engine),
            datapath,
            user: Probe::new()?,
            taps,
            ids: Ids::default(),
            image: Image::default(),
            ports: BTreeMap::new(),
            tap_of: BTreeMap::new(),
            ageing: BTreeMap::new(),
            with_xdp: false,
            drops_before: BTreeMap::new(),
            drops_expected: BTreeMap::new(),
            report: Report::default(),
        })
    }

    /// Removes what the engine has pinned.
    pub(crate) fn close(mut self) -> Result<Report> {
        if let Some(engine) = self.engine.take() {
            engine.detach_all()?;
        }
        ensure!(!self.pins.exists(), "pins were left behind");
        Ok(std::mem::take(&mut self.report))
    }

    /// Brings the kernel engine from the last configuration to this one.
    pub(crate) fn configure(&mut self, setting: &Setting) -> Result<()> {
        let mut config = setting.scenario.config.clone();
        self.with_xdp = setting.number % 2 == 1;
        for vnic in &mut config.vnics {
            vnic.hook = if self.with_xdp { Hook::Xdp } else { Hook::Tcx };
            vnic.full_checksums = true;
        }
        for uplink in config.switches.iter_mut().filter_map(|switch| switch.uplink.as_mut()) {
            uplink.hook = if self.with_xdp { Hook::Xdp } else { Hook::Tcx };
            uplink.full_checksums = true;
        }
        lower::assign_ids(&config, &mut self.ids)?;
        let specs = lower::ports(&config);
        ensure!(specs.len() <= TAPS, "{} ports, {TAPS} taps", specs.len());
        let mut bindings = Bindings::new();
        self.ports.clear();
        self.tap_of.clear();
        self.ageing = config.switches.iter().map(|at| (at.name.clone(), at.ageing_seconds)).collect();
        for (tap, spec) in specs.iter().enumerate() {
            let id = self.ids.ports.get(&spec.name).context("a port without id")?;
            self.ports.insert(spec.name.clone(), id);
            if setting.scenario.state.unattached.contains(&spec.name) {
                continue;
            }
            self.tap_of.insert(id, tap);
            // Some ports take no redirected XDP frames, so that XDP has to leave frames to TCX.
            let binding =
                Binding { ifindex: self.taps[tap].ifindex(), peer_redirect: false, xdp_target: tap % 3 != 2 };
            bindings.insert(spec.name.clone(), binding);
        }
        self.image = lower::lower_with(&config, &self.ids, &bindings, &setting.scenario.state.backings)?;
        let engine = self.engine.as_mut().context("the engine is closed")?;
        let report = engine.sync(&self.image)?;
        for (name, status) in &report.ports {
            if let PortState::Failed { error } = &status.state {
                bail!("port {name} could not be attached: {error}");
            }
        }
        let again = engine.sync(&self.image)?;
        ensure!(again.writes.total() == 0, "a second sync wrote: {:?}", again.writes);
        let attached = self.tap_of.keys().copied().collect();
        self.user.configure(&self.image, &attached, Accepts::default())?;
        self.drops_before.clear();
        self.drops_expected.clear();
        for &id in self.ports.values() {
            self.drops_before.insert(id, self.datapath.all_drops(id)?);
        }
        for tap in &self.taps {
            tap.drain()?;
        }
        Ok(())
    }

    /// No drop was counted that was not expected.
    pub(crate) fn settle(&mut self, _setting: &Setting) -> Result<()> {
        for (&id, before) in &self.drops_before {
            let counted = self.datapath.all_drops(id)? - before;
            let expected = self.drops_expected.get(&id).copied().unwrap_or(0);
            ensure!(counted == expected, "port {id} counted {counted} drops instead of {expected}");
        }
        Ok(())
    }

    /// Puts one case through every view.
    pub(crate) fn check(&mut self, setting: &Setting, case: &Case) -> Result<()> {
        let ingress = conformance::port_id(&self.ids, &case.ingress);
        let outcome =
            oracle::evaluate(&setting.scenario.config, &setting.scenario.state, &case.ingress, &case.frame);
        let expected = self.expectation(ingress, &outcome);
        self.report.cases += 1;
        for (_, reason) in &expected.drops {
            *self.report.reasons.entry(reason.name()).or_default() += 1;
        }
        self.report.tagged_out += expected.frames.values().filter(|frame| is_tagged(frame)).count() as u64;

        for place in [TagPlace::Inline, TagPlace::Beside] {
            let run = self.simulator(&setting.scenario.state).run(ingress, &case.frame, place);
            conformance::compare(
                &setting.scenario.config,
                &self.ids,
                &case.ingress,
                &outcome,
                &run.observed(),
            )
            .map_err(|difference| {
                anyhow!("native decide ({place:?}) disagrees with the oracle: {difference}")
            })?;
        }

        self.user(setting, case, ingress, &outcome)?;

        let Some(&tap) = self.tap_of.get(&ingress) else {
            return Ok(()); // no interface, so no frame can come from it
        };
        if case.frame.len() < 14 {
            return Ok(()); // the kernel does not take frames without an Ethernet header
        }
        self.tc(setting, case, ingress, tap, &outcome, &expected)?;
        self.xdp(setting, case, ingress, tap, &outcome, &expected)?;
        self.wire(setting, case, ingress, tap, &outcome, &expected)
    }

    /// The userspace engine, through ports in memory. Like the kernel engine, it goes from configuration to configuration.
    fn user(&mut self, setting: &Setting, case: &Case, ingress: u32, outcome: &Outcome) -> Result<()> {
        self.user.adopt(&self.ids, &setting.scenario.state);
        let observed = self.user.run(ingress, &case.frame)?;
        conformance::compare(&setting.scenario.config, &self.ids, &case.ingress, outcome, &observed)
            .map_err(|difference| anyhow!("the userspace engine disagrees with the oracle: {difference}"))?;
        ensure!(self.user.outstanding() == 0, "the userspace engine has lost a frame");
        self.report.user += 1;
        Ok(())
    }

    fn tc(
        &mut self,
        setting: &Setting,
        case: &Case,
        ingress: u32,
        tap: usize,
        outcome: &Outcome,
        expected: &Effect,
    ) -> Result<()> {
        let before = self.prepare(&setting.scenario.state, ingress, expected)?;
        let answer = match self.datapath.run_tc(self.taps[tap].ifindex(), &case.frame) {
            Ok(answer) => answer,
            // BPF_PROG_TEST_RUN takes neither more than a page nor frames cut off in their IP header; the wire does.
            Err(_) if !(54..3500).contains(&case.frame.len()) => {
                for (port, _) in &expected.drops {
                    *self.drops_expected.entry(*port).or_default() -= 1;
                }
                return self.unprepare(&setting.scenario.state);
            }
            Err(error) => return Err(error.context("BPF_PROG_TEST_RUN of sluice_tc")),
        };
        self.report.tc += 1;
        let unicast = outcome.dropped.is_none() && case.is_unicast() && expected.frames.len() == 1;
        let redirected = answer.code == TC_REDIRECT;
        ensure!(redirected || answer.code == TC_DROP, "sluice_tc returned {}", answer.code);
        let mut effect = self.effect(&setting.scenario.state, &before, expected, !redirected)?;
        if redirected {
            let (port, bytes) = expected.frames.first_key_value().context(disagreement(
                "sluice_tc (redirected)",
                outcome,
                expected,
                &effect,
            ))?;
            // A tag that the program pushed travels beside the bytes; the wire's view has it.
            let same = answer.bytes == *bytes
                || (is_tagged(bytes)
                    && answer.bytes[..12] == bytes[..12]
                    && answer.bytes[12..] == bytes[16..]);
            ensure!(same, "sluice_tc left other bytes\nwanted {bytes:02x?}\nfound  {:02x?}", answer.bytes);
            effect.frames.insert(*port, bytes.clone());
        }
        ensure!(
            effect == *expected && (redirected || !unicast || !effect.frames.is_empty()),
            disagreement("sluice_tc", outcome, expected, &effect)
        );
        self.restore(&setting.scenario.state, expected)
    }

    fn xdp(
        &mut self,
        setting: &Setting,
        case: &Case,
        ingress: u32,
        tap: usize,
        outcome: &Outcome,
        expected: &Effect,
    ) -> Result<()> {
        let partial = self.simulator(&setting.scenario.state).run_partial(ingress, &case.frame);
        let deferred = partial.verdict == Verdict::Defer;
        let nothing = Effect::default();
        let expected = if deferred { &nothing } else { expected };
        let before = self.prepare(&setting.scenario.state, ingress, expected)?;
        let answer = self.datapath.run_xdp(self.taps[tap].ifindex(), &case.frame).context("sluice_xdp")?;
        self.report.xdp += 1;
        let mut effect = self.effect(&setting.scenario.state, &before, expected, false)?;
        match answer.code {
            XDP_PASS => {
                ensure!(deferred, disagreement("sluice_xdp (passed)", outcome, expected, &effect));
                let (received, _) = self.datapath.frames(ingress)?;
                ensure!(received == before.received, "sluice_xdp counted a frame that it passed on");
                ensure!(answer.bytes == case.frame, "sluice_xdp changed a frame that it passed on");
                self.report.xdp_deferred += 1;
            }
            XDP_DROP => ensure!(!deferred, "sluice_xdp dropped what it should leave to TCX"),
            XDP_REDIRECT => {
                let (port, bytes) = expected.frames.first_key_value().context(disagreement(
                    "sluice_xdp (redirected)",
                    outcome,
                    expected,
                    &effect,
                ))?;
                ensure!(
                    answer.bytes == *bytes,
                    "sluice_xdp left other bytes\nwanted {bytes:02x?}\nfound  {:02x?}",
                    answer.bytes
                );
                effect.frames.insert(*port, bytes.clone());
                self.report.xdp_redirected += 1;
            }
            code => bail!("sluice_xdp returned {code}"),
        }
        ensure!(effect == *expected, disagreement("sluice_xdp", outcome, expected, &effect));
        self.restore(&setting.scenario.state, expected)
    }

    fn wire(
        &mut self,
        setting: &Setting,
        case: &Case,
        ingress: u32,
        tap: usize,
        outcome: &Outcome,
        expected: &Effect,
    ) -> Result<()> {
        // Receiving, the kernel takes the outermost tag out, and drops by itself what is too short for that.
        if announces_tag(&case.frame) && case.frame.len() < 20 {
            return Ok(());
        }
        let before = self.prepare(&setting.scenario.state, ingress, expected)?;
        self.taps[tap].send(&case.frame)?;
        self.report.wire += 1;
        self.report.wire_with_xdp += u64::from(self.with_xdp);
        let effect = self.effect(&setting.scenario.state, &before, expected, true)?;
        self.report.wire_frames += effect.frames.len() as u64;
        ensure!(effect == *expected, disagreement("the wire", outcome, expected, &effect));
        self.restore(&setting.scenario.state, expected)
    }

    /// What the oracle's outcome means in terms of port ids.
    fn expectation(&self, ingress: u32, outcome: &Outcome) -> Effect {
        let mut effect = Effect::default();
        effect.drops.extend(outcome.dropped.map(|reason| (ingress, reason)));
        for (name, delivery) in &outcome.deliveries {
            let id = self.ports[name];
            match delivery {
                Ok(bytes) => {
                    effect.frames.insert(id, bytes.clone());
                }
                Err(reason) => {
                    effect.drops.insert((id, *reason));
                }
            }
        }
        effect.learnt =
            outcome.learnt.as_ref().map(|station| (conformance::fdb_key(&self.ids, station), ingress));
        effect
    }

    /// A simulator in the case's state.
    fn simulator(&self, state: &State) -> Simulator {
        let mut simulator = Simulator::new(self.image.clone());
        simulator.adopt(&self.ids, state);
        simulator
    }

    /// Puts the kernel's tables into the case's state and reads the counters.
    fn prepare(&mut self, state: &State, ingress: u32, expected: &Effect) -> Result<Before> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?;
        let mut counts = BTreeMap::<u32, u32>::new();
        for (station, sighting) in &state.fdb {
            // The clock (the coarse one, as in the programs) goes on meanwhile, so an entry is fresh or old beyond doubt; native decide has the exact limit.
            let ageing = self.ageing.get(&station.switch).copied().unwrap_or_default();
            let age = if sighting.age_seconds <= ageing { 0 } else { sighting.age_seconds.max(ageing + 60) };
            let seen = (now.tv_sec() as u32).wrapping_sub(age);
            let port = conformance::port_id(&self.ids, &sighting.port);
            self.datapath.learn(&conformance::fdb_key(&self.ids, station), port, seen)?;
            *counts.entry(port).or_default() += 1;
        }
        for &id in self.ports.values() {
            self.datapath.set_learnt_count(id, counts.get(&id).copied().unwrap_or(0))?;
        }
        let far = now.tv_sec() as u64 * 1_000_000_000 + HOUR;
        for (name, _) in &state.empty_buckets {
            let empty = |direction| state.empty_buckets.contains(&(name.clone(), direction));
            let arrivals = [Direction::FromVm, Direction::ToVm].map(|at| if empty(at) { far } else { 0 });
            self.datapath.set_buckets(self.ports[name], arrivals)?;
        }
        let mut drops = BTreeMap::new();
        for &(port, reason) in &expected.drops {
            drops.insert((port, reason), self.datapath.drops(port, reason)?);
            *self.drops_expected.entry(port).or_default() += 1;
        }
        Ok(Before { drops, received: self.datapath.frames(ingress)?.0 })
    }

    /// What has happened since [`prepare`](Self::prepare), as far as it shows outside the program. `leaving`: frames really
    /// leave, which a queue of the kernel's may delay a little, so that the expected ones are waited for. Of drops, the expected
    /// ones are looked for here and unexpected ones when the configuration is done.
    fn effect(&mut self, state: &State, before: &Before, expected: &Effect, leaving: bool) -> Result<Effect> {
        let mut effect = Effect::default();
        for (&(port, reason), count) in &before.drops {
            if self.datapath.drops(port, reason)? == count + 1 {
                effect.drops.insert((port, reason));
            }
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            for (&port, &tap) in &self.tap_of {
                for bytes in self.taps[tap].drain()? {
                    ensure!(effect.frames.insert(port, bytes).is_none(), "two frames left by port {port}");
                }
            }
            let missing = leaving && expected.frames.keys().any(|port| !effect.frames.contains_key(port));
            if !missing || Instant::now() > deadline {
                break;
            }
            std::thread::yield_now();
        }
        let mut fdb: BTreeMap<FdbKey, u32> = BTreeMap::new();
        for (station, sighting) in &state.fdb {
            let port = conformance::port_id(&self.ids, &sighting.port);
            fdb.insert(conformance::fdb_key(&self.ids, station), port);
        }
        fdb.extend(expected.learnt);
        let found = self.datapath.fdb()?;
        ensure!(found == fdb, "the FDB should be {fdb:?} and is {found:?}");
        effect.learnt = expected.learnt;
        Ok(effect)
    }

    /// Undoes the case's state and what was learnt.
    fn restore(&mut self, state: &State, expected: &Effect) -> Result<()> {
        if let Some((key, _)) = expected.learnt {
            self.datapath.forget(&key);
        }
        self.unprepare(state)
    }

    fn unprepare(&mut self, state: &State) -> Result<()> {
        for station in state.fdb.keys() {
            let key = conformance::fdb_key(&self.ids, station);
            self.datapath.forget(&key);
        }
        for &id in self.ports.values() {
            self.datapath.set_buckets(id, [0, 0])?;
        }
        Ok(())
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            let _ = engine.detach_all(); // a test that fails leaves no pins either
        }
    }
}

/// Counters before a frame.
struct Before {
    drops: BTreeMap<(u32, DropReason), u64>,
    received: u64,
}

fn announces_tag(frame: &[u8]) -> bool {
    matches!(frame.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8]))
}

fn is_tagged(frame: &[u8]) -> bool {
    frame.len() >= 16 && announces_tag(frame)
}

fn disagreement(who: &str, outcome: &Outcome, expected: &Effect, found: &Effect) -> String {
    let mut text =
        format!("{who} disagrees with the oracle\nwanted {expected:02x?}\nfound  {found:02x?}\noracle:\n");
    for step in &outcome.steps {
        text += &format!("  {} at {}: {}\n", step.stage.name(), step.port, step.text);
    }
    text
}

impl Report {
    /// A run that compared too little proves too little.
    pub(crate) fn must_have_seen_enough(&self) -> Result<()> {
        let share = |part: u64, percent: u64| part * 100 >= self.cases * percent;
        ensure!(share(self.user, 100), "only {} of {} cases went through user space", self.user, self.cases);
        ensure!(share(self.tc, 60), "only {} of {} cases went through sluice_tc", self.tc, self.cases);
        ensure!(share(self.xdp, 60), "only {} of {} cases went through sluice_xdp", self.xdp, self.cases);
        ensure!(share(self.wire, 60), "only {} of {} cases went over the wire", self.wire, self.cases);
        ensure!(share(self.xdp_redirected, 2), "only {} frames were redirected by XDP", self.xdp_redirected);
        ensure!(share(self.wire_frames, 10), "only {} frames came out of taps", self.wire_frames);
        ensure!(share(self.wire_with_xdp, 20), "only {} frames met XDP on the wire", self.wire_with_xdp);
        ensure!(share(self.tagged_out, 2), "only {} frames left tagged", self.tagged_out);
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "user space {}; sluice_tc {}; sluice_xdp {} ({} left to TCX, {} redirected); wire {} ({} with XDP, {} frames out); {} tagged out",
            self.user,
            self.tc,
            self.xdp,
            self.xdp_deferred,
            self.xdp_redirected,
            self.wire,
            self.wire_with_xdp,
            self.wire_frames,
            self.tagged_out
        )?;
        write!(f, "drops expected and counted:")?;
        for (name, count) in &self.reasons {
            write!(f, " {name} {count}")?;
        }
        Ok(())
    }
}
