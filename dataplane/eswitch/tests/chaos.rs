//! vNICs, a lifecycle each, over a model eSwitch that fails by seed, with guests that do as they please.
//!
//! After every single step the model's own state is looked at: no VF is open with less than the policy of the vNIC
//! that holds it, and no vNIC is without a path by our doing. When the faults stop, all settles. `SLUICE_SEED` replays
//! a run, `SLUICE_CASES` sets the number of sequences, `SLUICE_LOG` tells what
//! happens in them.

use std::collections::{BTreeMap, VecDeque};

use sluice_eswitch::chaos::{Chaos, Faults};
use sluice_eswitch::contract::{Enforced, ErrorClass, Eswitch, Observed, VfIndex};
use sluice_eswitch::lifecycle::allocate::{Candidate, Hysteresis, allocate};
use sluice_eswitch::lifecycle::execute::{check, execute};
use sluice_eswitch::lifecycle::{Action, Cause, Command, Event, Lifecycle, Path, Timing, answer};
use sluice_eswitch::soft::{Flaws, Soft};
use sluice_policy::config::{Attachment, Config, Hook, Policy, Switch, Uplink, VlanMode, Vnic};
use sluice_policy::generate::Rng;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{Capabilities, Evidence, Neighbours, Program, VfSettings, place};

const VFS: u16 = 3;
const VNICS: usize = 5;
const STEPS: usize = 300;
const HYSTERESIS: Hysteresis = Hysteresis { margin: 10, hold: 2_000 };
const TIMING: Timing =
    Timing { attach: 3_000, drain: 2_000, retry: 100, attempts: 4, backoff: 500, backoff_max: 4_000 };

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What a guest does with a VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Temper {
    Willing,
    Refuses,
    Sleeps,
    Clings,
}

struct Machine {
    lifecycle: Lifecycle,
    commands: VecDeque<Command>,
    weight: u8,
    temper: Temper,
    /// The program of its policy, if that is covered.
    placed: Option<Program>,
    /// What the VF that it holds must enforce.
    granted: Option<Program>,
    /// The guest has the VF.
    plugged: Option<VfIndex>,
    uses_software: bool,
    /// The last attempt to use software failed.
    software_failed: bool,
}

struct World {
    nic: Chaos<Soft>,
    config: Config,
    machines: Vec<Machine>,
    rng: Rng,
    now: u64,
    is_calm: bool,
    /// VFs as a former run left them open, until they are closed.
    inherited: BTreeMap<VfIndex, Observed>,
    is_verbose: bool,
}

fn policy(rng: &mut Rng) -> Policy {
    let vid = VlanId::new(*rng.pick(&[10, 20, 30])).expect("in range");
    let ip_guard = if rng.chance(15) { vec![[10, 0, 0, 1].into()] } else { Vec::new() };
    Policy { vlan: VlanMode::Access(vid), ip_guard, ..Policy::default() }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let capabilities = Capabilities {
            max_vfs: VFS,
            mac_guard: Evidence::Probed,
            access_vlan: Evidence::Probed,
            trust: Evidence::ReadBack,
            ..Capabilities::default()
        };
        let faults = Faults::all(*rng.pick(&[1, 2, 5]));
        let nic = Chaos::new(Soft::new(capabilities, VFS, Flaws::default()), rng.next(), faults);
        let uplink = Uplink {
            netdev: "pf0".into(),
            hook: Hook::Auto,
            full_checksums: false,
            trunk: Vec::new(),
            native: None,
            learn_limit: 0,
            up: true,
            attest: Vec::new(),
        };
        let switch =
            Switch { name: "blue".into(), uplink: Some(uplink), internal: None, ageing_seconds: 300 };
        let vnic = |number: usize, rng: &mut Rng| Vnic {
            name: format!("vm{number}"),
            switch: "blue".into(),
            attach: Attachment::Tap(format!("tap{number}")),
            hook: Hook::Auto,
            full_checksums: false,
            mac: MacAddr([2, 0, 0, 0, 0, number as u8]),
            extra_macs: Vec::new(),
            up: true,
            policy: policy(rng),
            sriov: None,
        };
        let vnics = (0..VNICS).map(|number| vnic(number, &mut rng)).collect();
        let machines = (0..VNICS).map(|_| Machine {
            lifecycle: Lifecycle::new(TIMING, 0),
            commands: VecDeque::new(),
            weight: *rng.pick(&[0, 10, 50, 50, 90]),
            temper: *rng.pick(&[
                Temper::Willing,
                Temper::Willing,
                Temper::Refuses,
                Temper::Sleeps,
                Temper::Clings,
            ]),
            placed: None,
            granted: None,
            plugged: None,
            uses_software: true,
            software_failed: false,
        });
        let mut world = World {
            nic,
            machines: machines.collect(),
            config: Config { switches: vec![switch], acl_groups: Vec::new(), vnics },
            rng,
            now: 0,
            is_calm: false,
            inherited: BTreeMap::new(),
            is_verbose: std::env::var_os("SLUICE_LOG").is_some(),
        };
        (0..VNICS).for_each(|number| world.place(number));
        world.inherit();
        world
    }

    /// A former run was killed, and left some VFs open.
    fn inherit(&mut self) {
        for vf in (0..VFS).map(VfIndex) {
            let number = self.rng.below(VNICS);
            if self.rng.chance(20)
                && let Some(program) = self.machines[number].placed.clone()
            {
                let nic = self.nic.inner_mut();
                let left_open = nic.program(vf, &program).and_then(|()| nic.enable(vf));
                left_open.expect("the model has what it takes");
                self.inherited.extend(nic.truth(vf).map(|truth| (vf, truth)));
            }
        }
    }

    #[allow(clippy::print_stderr)] // for whoever replays a sequence
    fn note(&self, text: impl FnOnce() -> String) {
        if self.is_verbose {
            eprintln!("{:6} {}", self.now, text());
        }
    }

    fn place(&mut self, number: usize) {
        let capabilities = self.nic.inner_mut().capabilities().expect("the model says what it can");
        let vnic = &self.config.vnics[number];
        self.machines[number].placed = place(&self.config, vnic, &capabilities, &Neighbours::default()).ok();
    }

    fn send(&mut self, number: usize, event: Event) {
        if !matches!(event, Event::Tick) {
            self.note(|| format!("vm{number} <- {event:?}"));
        }
        let machine = &mut self.machines[number];
        let commands = machine.lifecycle.handle(self.now, event);
        machine.commands.extend(commands);
    }

    /// Carries out the next command of a vNIC.
    fn obey(&mut self, number: usize) {
        let Some(command) = self.machines[number].commands.pop_front() else {
            return;
        };
        if !self.machines[number].lifecycle.awaits(command.ticket) {
            return;
        }
        let hitch = !self.is_calm && self.rng.chance(5);
        let machine = &mut self.machines[number];
        let temper = machine.temper;
        let failed = |text: &str| Event::Failed {
            ticket: command.ticket,
            class: ErrorClass::Passing,
            text: text.to_owned(),
        };
        let event = match (&command.action, execute(&mut self.nic, &command.action)) {
            (action, Some(result)) => {
                let is_closing = matches!(action, Action::Close(_) | Action::Clean(_));
                let may_close = machine.uses_software || machine.software_failed;
                assert!(!is_closing || may_close, "vm{number} is closed before its software path is used");
                if result.is_ok() {
                    believe(&self.nic, action);
                }
                answer(command.ticket, result)
            }
            (_, None) if hitch => {
                machine.software_failed |= command.action == Action::UseSoftware;
                failed("a hitch")
            }
            (Action::Plug(_), None) if temper == Temper::Refuses => failed("the guest refuses"),
            (Action::Plug(vf), None) => {
                machine.plugged = Some(*vf);
                Event::Done(command.ticket)
            }
            (Action::UseHardware(_), None) => {
                machine.uses_software = false;
                Event::Done(command.ticket)
            }
            (Action::UseSoftware, None) => {
                (machine.uses_software, machine.software_failed) = (true, false);
                Event::Done(command.ticket)
            }
            (Action::Unplug { vf, by_force: false }, None) if self.nic.touched(*vf) == Some(true) => {
                panic!("{vf} was seen to be weakened, and its guest is asked to let go")
            }
            (Action::Unplug { by_force: false, .. }, None) if temper == Temper::Clings => return,
            (Action::Unplug { vf, by_force }, None) => {
                let is_open = self.nic.inner().truth(*vf).is_some_and(|truth| truth.enabled);
                assert!(!*by_force || !is_open, "{vf} is open, and pulled from under its guest");
                machine.plugged = None;
                Event::Done(command.ticket)
            }
            (action, None) => panic!("nobody carries out {action:?}"),
        };
        self.note(|| format!("vm{number}: {:?}", command.action));
        self.send(number, event);
        if self.machines[number].lifecycle.vf().is_none() {
            self.machines[number].granted = None;
        }
    }

    fn tick(&mut self, milliseconds: u64) {
        self.now += milliseconds;
        for number in 0..VNICS {
            self.send(number, Event::Tick);
            let lifecycle = &self.machines[number].lifecycle;
            let waited = self.now - lifecycle.since();
            let is_late = lifecycle.path() == Path::Attaching && waited >= TIMING.attach;
            assert!(!is_late, "vm{number} has waited for its guest for {waited} ms");
        }
    }

    /// The periodic reading.
    fn poll(&mut self, number: usize) {
        let lifecycle = &self.machines[number].lifecycle;
        let (Some(vf), Some(program)) = (lifecycle.vf(), lifecycle.program().cloned()) else {
            return;
        };
        match check(&mut self.nic, vf, &program) {
            Err(error) if error.class() != ErrorClass::Passing => {
                self.send(number, Event::Drifted(error.to_string()));
            }
            _ => {}
        }
    }

    fn guest(&mut self, number: usize) {
        let machine = &self.machines[number];
        let is_open = |vf: &VfIndex| self.nic.inner().truth(*vf).is_some_and(|truth| truth.enabled);
        if let Some(vf) = machine.plugged.filter(is_open)
            && machine.temper != Temper::Sleeps
        {
            self.send(number, Event::GuestActive(vf));
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let candidate = |number: usize| {
            let machine = &self.machines[number];
            let lifecycle = &machine.lifecycle;
            Candidate {
                name: format!("{number}"),
                weight: machine.weight,
                is_eligible: machine.placed.is_some()
                    && (lifecycle.path() != Path::Software || lifecycle.not_before() <= self.now),
                path: lifecycle.path(),
                since: lifecycle.since(),
            }
        };
        (0..VNICS).map(candidate).collect()
    }

    /// A round of the allocator; whether it changed anything.
    fn allocate(&mut self) -> bool {
        let candidates = self.candidates();
        let decision = allocate(&candidates, usize::from(VFS), HYSTERESIS, self.now);
        for name in &decision.grants {
            let number: usize = name.parse().expect("a number");
            let held: Vec<VfIndex> = self.machines.iter().filter_map(|one| one.lifecycle.vf()).collect();
            let free = (0..VFS).map(VfIndex).find(|vf| !held.contains(vf));
            let (Some(vf), Some(program)) = (free, self.machines[number].placed.clone()) else {
                panic!("vm{number} is granted a VF that does not exist, or is not placed");
            };
            self.machines[number].granted = Some(program.clone());
            self.send(number, Event::Grant { vf, program });
        }
        for name in &decision.revokes {
            self.send(name.parse().expect("a number"), Event::Revoke("for another".into()));
        }
        decision != Default::default()
    }

    fn change_policy(&mut self, number: usize) {
        self.config.vnics[number].policy = policy(&mut self.rng);
        self.place(number);
        let Machine { granted, placed, .. } = &self.machines[number];
        if granted.is_some() && granted != placed {
            self.send(number, Event::PolicyChanged("the operator changed it".into()));
            assert_eq!(self.machines[number].lifecycle.path(), Path::Draining, "vm{number}");
        }
    }

    /// One thing happens, somewhere.
    fn step(&mut self) {
        let number = self.rng.below(VNICS);
        match self.rng.below(100) {
            0..=59 => self.obey(number),
            60..=69 => {
                let milliseconds = *self.rng.pick(&[10, 150, 500, 2_500]);
                self.tick(milliseconds);
            }
            70..=77 => self.poll(number),
            78..=87 => self.guest(number),
            88..=93 => {
                self.allocate();
            }
            94..=95 => self.change_policy(number),
            96 => self.machines[number].weight = *self.rng.pick(&[0, 10, 50, 90]),
            97 => {
                let tempers = [Temper::Willing, Temper::Refuses, Temper::Sleeps, Temper::Clings];
                self.machines[number].temper = *self.rng.pick(&tempers);
            }
            98 => self.send(number, Event::Revoke("migration".into())),
            _ if self.rng.chance(30) => {
                self.note(|| "somebody writes sriov_numvfs".into());
                for vf in (0..VFS).map(VfIndex) {
                    self.nic.touch(vf, |nic, _| {
                        nic.set_vfs(VFS);
                        Ok(())
                    });
                }
            }
            _ => {}
        }
    }

    /// What must hold after every step, by the model's own state.
    fn verify(&mut self) {
        for vf in (0..VFS).map(VfIndex) {
            let holders: Vec<usize> =
                (0..VNICS).filter(|number| self.machines[*number].lifecycle.vf() == Some(vf)).collect();
            assert!(holders.len() <= 1, "{vf} is held by {holders:?}");
            let Some(truth) = self.nic.inner().truth(vf) else { continue };
            let holder = holders.first().map(|number| &self.machines[*number]);
            let granted = holder.and_then(|machine| machine.granted.as_ref());
            let is_held = granted.is_some_and(|program| truth.differences(program).is_empty());
            if is_held || (holder.is_none() && self.nic.inner().is_pristine(vf)) {
                self.nic.forget_touched(vf);
            }
            if !truth.enabled {
                self.inherited.remove(&vf);
                continue;
            }
            // Nobody has had to do with it yet.
            let is_left_alone = |former: &Observed| *former == truth || self.nic.touched(vf).is_some();
            if self.inherited.get(&vf).is_some_and(is_left_alone) {
                continue;
            }
            let path = holder.map(|machine| machine.lifecycle.path());
            assert!(
                matches!(path, Some(Path::Attaching | Path::Hardware | Path::Draining)),
                "{vf} is open, and its holder is {path:?}"
            );
            if !is_held {
                // Only by somebody else's hand; and once that was seen, it is being closed.
                match self.nic.touched(vf) {
                    None => panic!("{vf} is open with {truth:?}, and must hold {granted:?}"),
                    Some(true) => assert_eq!(path, Some(Path::Draining), "{vf} was seen to be weakened"),
                    Some(false) => {}
                }
            }
        }
        for (number, machine) in self.machines.iter().enumerate() {
            let path = machine.lifecycle.path();
            let must_use_software = matches!(path, Path::Software | Path::Programming);
            assert!(machine.uses_software || !must_use_software, "vm{number} has no network on {path:?}");
        }
    }

    /// The faults stop, and guests are willing: everything settles, and stays.
    fn converge(&mut self) {
        self.is_calm = true;
        self.nic.calm();
        self.machines.iter_mut().for_each(|machine| machine.temper = Temper::Willing);
        // As a daemon does when it starts: what nobody holds is cleaned.
        for vf in (0..VFS).map(VfIndex) {
            if !self.machines.iter().any(|machine| machine.lifecycle.vf() == Some(vf)) {
                let cleaned = execute(&mut self.nic, &Action::Clean(vf));
                assert_eq!(cleaned, Some(Ok(())));
                self.nic.forget_touched(vf);
            }
        }
        // Longer than any wait of theirs, so that what is still now is still for ever.
        let (mut quiet_rounds, mut rounds) = (0, 0);
        while quiet_rounds < 10 {
            quiet_rounds = if self.round() { 0 } else { quiet_rounds + 1 };
            rounds += 1;
            assert!(rounds < 200, "it does not settle");
        }
        assert!(!self.allocate(), "VFs still change hands");
        let eligible = self.candidates().iter().filter(|one| one.is_eligible && one.weight > 0).count();
        let in_hardware =
            self.machines.iter().filter(|machine| machine.lifecycle.path() == Path::Hardware).count();
        assert_eq!(in_hardware, eligible.min(usize::from(VFS)), "not all that could be are in hardware");
        for (number, machine) in self.machines.iter().enumerate() {
            match machine.lifecycle.vf() {
                None => assert!(machine.lifecycle.path() == Path::Software && machine.uses_software),
                Some(vf) => {
                    let truth = self.nic.inner().truth(vf).expect("the VF exists");
                    let granted = machine.granted.as_ref().expect("it was granted");
                    assert_eq!(machine.granted, machine.placed, "vm{number} is under a former policy");
                    assert!(truth.enabled && truth.differences(granted).is_empty(), "vm{number}: {truth:?}");
                    assert!(!machine.uses_software && machine.plugged == Some(vf), "vm{number}");
                }
            }
        }
        let held: Vec<VfIndex> = self.machines.iter().filter_map(|machine| machine.lifecycle.vf()).collect();
        let is_clean = |vf: &VfIndex| held.contains(vf) || self.nic.inner().is_pristine(*vf);
        assert!((0..VFS).map(VfIndex).all(|vf| is_clean(&vf)), "a VF that nobody holds was left programmed");
        let writes = self.nic.writes();
        for _ in 0..10 {
            self.round();
        }
        assert_eq!(self.nic.writes(), writes, "it writes to a world that is as it should be");
    }

    /// Everybody does what there is to do; whether there was anything.
    fn round(&mut self) -> bool {
        let mut is_busy = self.allocate();
        for number in 0..VNICS {
            self.poll(number);
            self.guest(number);
            while !self.machines[number].commands.is_empty() {
                is_busy = true;
                self.obey(number);
                self.guest(number);
                self.verify();
            }
        }
        self.tick(500);
        self.verify();
        is_busy
    }
}

/// What a command says that it has seen, is so.
fn believe(nic: &Chaos<Soft>, action: &Action) {
    let truth = |vf: &VfIndex| nic.inner().truth(*vf).expect("the VF exists");
    match action {
        Action::Close(vf) => assert!(!truth(vf).enabled, "{vf} is said to be closed"),
        Action::Clean(vf) => {
            let truth = truth(vf);
            let is_clean = is_empty(&truth.enforced) || nic.touched(*vf).is_some();
            assert!(is_clean && !truth.enabled, "{vf} is said to be clean, and is {truth:?}");
        }
        Action::Program { vf, program, .. } | Action::Open { vf, program } => {
            let is_held = truth(vf).differences(program).is_empty() || nic.touched(*vf).is_some();
            assert!(is_held, "{vf} is said to be programmed, and is {:?}", truth(vf));
            let is_open = matches!(action, Action::Open { .. });
            assert!(truth(vf).enabled == is_open || nic.touched(*vf).is_some(), "{vf} after {action:?}");
        }
        Action::Plug(_) | Action::UseHardware(_) | Action::UseSoftware | Action::Unplug { .. } => {}
    }
}

/// Nothing is left in it that lets a frame pass: spoof checking only forbids, and an address alone is nothing in a closed
/// VF. New VFs of some drivers have either.
fn is_empty(enforced: &Enforced) -> bool {
    match enforced {
        Enforced::Legacy(settings) => {
            let VfSettings { mac: _, spoofchk: _, vlan, trust, min_rate_mbps, max_rate_mbps, query_rss } =
                *settings;
            vlan.is_none() && !trust && (min_rate_mbps, max_rate_mbps) == (0, 0) && !query_rss
        }
        Enforced::Switchdev { program, .. } => program.rules().is_empty(),
    }
}

/// Runs one sequence; what it went through.
fn sequence(seed: u64) -> World {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
        world.verify();
    }
    world.converge();
    world
}

#[test]
#[allow(clippy::print_stderr)] // the seed and the figures are for whoever reads the run
fn no_vf_is_ever_open_with_less_than_its_policy_and_all_settles() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (seed, cases) = (from_env("SLUICE_SEED", now.as_nanos() as u64), from_env("SLUICE_CASES", 10_000));
    eprintln!("SLUICE_SEED={seed} SLUICE_CASES={cases}");
    let (mut faults, mut in_hardware, mut forced, mut drifts, mut failures) = (0, 0, 0, 0, 0);
    for number in 0..cases {
        let one = seed.wrapping_add(number);
        let result = std::panic::catch_unwind(|| sequence(one));
        let world = result.unwrap_or_else(|_| panic!("replay with SLUICE_SEED={one} SLUICE_CASES=1"));
        faults += world.nic.injected();
        for machine in &world.machines {
            let counters = machine.lifecycle.counters();
            forced += counters.forced;
            failures += counters.failures;
            for ((_, to, cause), count) in &counters.transitions {
                in_hardware += if *to == Path::Hardware { *count } else { 0 };
                drifts += if *cause == Cause::Drift { *count } else { 0 };
            }
        }
    }
    eprintln!(
        "{faults} faults, {failures} failed commands, {in_hardware} times in hardware, {drifts} drifts, {forced} cut off"
    );
    // The faults must have met something; one sequence that is replayed need not.
    assert!(
        cases < 1_000
            || faults > cases * 10
                && failures > cases
                && in_hardware > cases
                && drifts > cases / 10
                && forced > 0
    );
}
