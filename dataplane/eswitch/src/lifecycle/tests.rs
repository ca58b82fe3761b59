//! The state machine by hand: each arrow of the diagram, and what must not happen. Faults by the thousand are in
//! `tests/chaos.rs`.

use sluice_policy::placement::{FlowerProgram, VfSettings};

use super::*;

const VF: VfIndex = VfIndex(3);

fn program() -> Program {
    Program::Legacy(VfSettings { max_rate_mbps: 7, ..VfSettings::default() })
}

/// A machine with the command that it waits for.
struct Rig {
    machine: Lifecycle,
    now: u64,
    pending: Option<Command>,
}

impl Rig {
    fn new() -> Self {
        Rig { machine: Lifecycle::new(Timing::default(), 0), now: 0, pending: None }
    }

    fn send(&mut self, event: Event) {
        let mut commands = self.machine.handle(self.now, event);
        assert!(commands.len() <= 1);
        if let Some(command) = commands.pop() {
            self.pending = Some(command);
        }
    }

    /// Answers the command that must be this one.
    #[track_caller]
    fn expect(&mut self, action: &Action) {
        let command = self.pending.take().unwrap_or_else(|| panic!("{action:?} is awaited, nothing came"));
        assert_eq!(command.action, *action);
        self.send(Event::Done(command.ticket));
    }

    fn fail(&mut self, class: ErrorClass) {
        let ticket = self.pending.take().expect("a command").ticket;
        self.send(Event::Failed { ticket, class, text: "no".into() });
    }

    fn wait(&mut self, milliseconds: u64) {
        self.now += milliseconds;
        self.send(Event::Tick);
    }

    fn in_hardware() -> Self {
        let mut rig = Rig::new();
        rig.send(Event::Grant { vf: VF, program: program() });
        rig.expect(&Action::Close(VF));
        rig.expect(&Action::Program { vf: VF, program: program(), is_open: false });
        assert_eq!(rig.machine.path(), Path::Attaching);
        rig.expect(&Action::Plug(VF));
        rig.expect(&Action::Open { vf: VF, program: program() });
        assert_eq!(rig.pending, None, "the guest has its turn");
        rig.send(Event::GuestActive(VF));
        rig.expect(&Action::UseHardware(VF));
        assert_eq!((rig.machine.path(), &rig.pending), (Path::Hardware, &None));
        rig
    }

    fn count(&self, from: Path, to: Path, cause: Cause) -> u64 {
        self.machine.counters().transitions.get(&(from, to, cause)).copied().unwrap_or(0)
    }
}

#[test]
fn a_grant_leads_to_hardware_and_a_revocation_back() {
    let mut rig = Rig::in_hardware();
    rig.send(Event::Revoke("migration".into()));
    assert_eq!(rig.machine.path(), Path::Draining);
    rig.expect(&Action::UseSoftware);
    rig.expect(&Action::Unplug { vf: VF, by_force: false });
    rig.expect(&Action::Close(VF));
    assert_eq!(rig.machine.vf(), Some(VF), "nobody else may have it yet");
    rig.expect(&Action::Clean(VF));
    assert_eq!((rig.machine.path(), rig.machine.vf(), &rig.pending), (Path::Software, None, &None));
    assert!(rig.machine.reason().contains("migration"), "{}", rig.machine.reason());
    for (from, to, cause) in [
        (Path::Software, Path::Programming, Cause::Granted),
        (Path::Programming, Path::Attaching, Cause::Verified),
        (Path::Attaching, Path::Hardware, Cause::GuestActive),
        (Path::Hardware, Path::Draining, Cause::Revoked),
        (Path::Draining, Path::Software, Cause::Drained),
    ] {
        assert_eq!(rig.count(from, to, cause), 1, "{from:?} to {to:?}");
    }
    assert_eq!(rig.machine.counters().transitions.len(), 5);
}

#[test]
fn what_the_nic_does_not_cover_goes_back_at_once_and_waits() {
    let mut rig = Rig::new();
    rig.send(Event::Grant { vf: VF, program: program() });
    rig.expect(&Action::Close(VF));
    rig.fail(ErrorClass::Uncovered);
    assert_eq!(rig.count(Path::Programming, Path::Draining, Cause::Uncovered), 1);
    rig.expect(&Action::UseSoftware);
    rig.expect(&Action::Close(VF));
    rig.expect(&Action::Clean(VF));
    assert_eq!(rig.machine.path(), Path::Software);
    assert_eq!(rig.machine.not_before(), Timing::default().backoff);
}

#[test]
fn what_may_pass_is_tried_again_and_not_for_ever() {
    let mut rig = Rig::new();
    rig.send(Event::Grant { vf: VF, program: program() });
    for _ in 1..Timing::default().attempts {
        rig.fail(ErrorClass::Passing);
        assert_eq!((rig.machine.path(), &rig.pending), (Path::Programming, &None));
        rig.wait(Timing::default().retry - 1);
        assert_eq!(rig.pending, None, "too soon");
        rig.wait(1);
    }
    rig.fail(ErrorClass::Passing);
    assert_eq!(rig.machine.path(), Path::Draining);
}

#[test]
fn a_guest_that_refuses_or_sleeps_stays_in_software() {
    let mut refused = Rig::new();
    refused.send(Event::Grant { vf: VF, program: program() });
    refused.expect(&Action::Close(VF));
    refused.expect(&Action::Program { vf: VF, program: program(), is_open: false });
    refused.fail(ErrorClass::Broken);
    assert_eq!(refused.count(Path::Attaching, Path::Draining, Cause::Refused), 1);

    let mut asleep = Rig::new();
    asleep.send(Event::Grant { vf: VF, program: program() });
    asleep.expect(&Action::Close(VF));
    asleep.expect(&Action::Program { vf: VF, program: program(), is_open: false });
    asleep.expect(&Action::Plug(VF));
    asleep.expect(&Action::Open { vf: VF, program: program() });
    asleep.wait(Timing::default().attach);
    assert_eq!(asleep.count(Path::Attaching, Path::Draining, Cause::Timeout), 1);
    asleep.expect(&Action::UseSoftware);
    asleep.expect(&Action::Close(VF));
    asleep.expect(&Action::Unplug { vf: VF, by_force: true });
    asleep.expect(&Action::Clean(VF));
    assert_eq!(asleep.machine.path(), Path::Software);
}

#[test]
fn a_guest_that_is_active_before_it_is_asked_is_not_forgotten() {
    let mut rig = Rig::new();
    rig.send(Event::Grant { vf: VF, program: program() });
    rig.expect(&Action::Close(VF));
    rig.expect(&Action::Program { vf: VF, program: program(), is_open: false });
    rig.expect(&Action::Plug(VF));
    rig.send(Event::GuestActive(VF));
    rig.expect(&Action::Open { vf: VF, program: program() });
    rig.expect(&Action::UseHardware(VF));
    assert_eq!(rig.machine.path(), Path::Hardware);
}

#[test]
fn a_guest_that_clings_is_cut_off_after_the_deadline() {
    let mut rig = Rig::in_hardware();
    rig.send(Event::Revoke("migration".into()));
    rig.expect(&Action::UseSoftware);
    let asked = rig.pending.take().expect("the guest is asked");
    assert_eq!(asked.action, Action::Unplug { vf: VF, by_force: false });
    rig.wait(Timing::default().drain - 1);
    assert_eq!(rig.pending, None);
    rig.wait(1);
    rig.expect(&Action::Close(VF));
    rig.send(Event::Done(asked.ticket));
    rig.expect(&Action::Unplug { vf: VF, by_force: true });
    rig.expect(&Action::Clean(VF));
    assert_eq!((rig.machine.path(), rig.machine.counters().forced), (Path::Software, 1));
}

#[test]
fn a_policy_that_does_not_hold_waits_for_nobody() {
    for (event, cause) in [
        (Event::Drifted("spoofchk is off".into()), Cause::Drift),
        (Event::PolicyChanged("an ACL".into()), Cause::Policy),
    ] {
        let mut rig = Rig::in_hardware();
        rig.send(event.clone());
        assert_eq!(rig.count(Path::Hardware, Path::Draining, cause), 1);
        // Not even for its own software path.
        rig.fail(ErrorClass::Broken);
        rig.expect(&Action::Close(VF));
        rig.expect(&Action::UseSoftware);
        rig.expect(&Action::Unplug { vf: VF, by_force: true });
        rig.expect(&Action::Clean(VF));
        assert_eq!(rig.machine.path(), Path::Software);

        let mut rig = Rig::in_hardware();
        rig.send(Event::Revoke("weight".into()));
        rig.expect(&Action::UseSoftware);
        rig.send(event);
        rig.expect(&Action::Close(VF));
    }
}

#[test]
fn an_orderly_way_back_waits_for_the_software_path() {
    let mut rig = Rig::in_hardware();
    rig.send(Event::Revoke("migration".into()));
    for _ in 0..3 {
        rig.fail(ErrorClass::Passing);
        assert_eq!(rig.pending, None, "the VF is all the network that it has");
        rig.wait(Timing::default().retry);
    }
    rig.expect(&Action::UseSoftware);
    rig.expect(&Action::Unplug { vf: VF, by_force: false });
}

#[test]
fn a_vf_that_cannot_be_closed_is_never_given_away() {
    let mut rig = Rig::in_hardware();
    rig.send(Event::Drifted("spoofchk is off".into()));
    rig.expect(&Action::UseSoftware);
    for _ in 0..100 {
        rig.fail(ErrorClass::Gone);
        assert_eq!(rig.machine.vf(), Some(VF));
        rig.wait(Timing::default().retry);
    }
    rig.expect(&Action::Close(VF));
}

#[test]
fn new_neighbours_are_programmed_in_place() {
    let first = Program::Switchdev(FlowerProgram::default());
    let rule = sluice_policy::placement::FlowerRule {
        port: sluice_policy::placement::RulePort::Own,
        chain: 0,
        priority: 1,
        matches: sluice_policy::placement::FlowerMatch::default(),
        actions: vec![sluice_policy::placement::FlowerAction::Trap],
    };
    let second = Program::Switchdev(FlowerProgram::new(vec![rule]));
    let mut rig = Rig::new();
    rig.send(Event::Grant { vf: VF, program: first.clone() });
    rig.expect(&Action::Close(VF));
    rig.expect(&Action::Program { vf: VF, program: first.clone(), is_open: false });
    rig.expect(&Action::Plug(VF));
    rig.expect(&Action::Open { vf: VF, program: first.clone() });
    rig.send(Event::GuestActive(VF));
    rig.expect(&Action::UseHardware(VF));
    rig.send(Event::Replaced(first));
    assert_eq!(rig.pending, None, "nothing is new");
    rig.send(Event::Replaced(second.clone()));
    rig.expect(&Action::Program { vf: VF, program: second.clone(), is_open: true });
    assert_eq!((rig.machine.path(), rig.machine.program()), (Path::Hardware, Some(&second)));

    let mut legacy = Rig::in_hardware();
    legacy.send(Event::Replaced(Program::Legacy(VfSettings::default())));
    assert_eq!(legacy.machine.path(), Path::Draining, "settings are policy");
}

#[test]
fn answers_to_old_commands_are_ignored() {
    let mut rig = Rig::new();
    rig.send(Event::Grant { vf: VF, program: program() });
    let old = rig.pending.take().expect("a command");
    rig.send(Event::Revoke("never mind".into()));
    assert!(!rig.machine.awaits(old.ticket), "nobody should begin it now");
    let path = rig.machine.path();
    let waiting = rig.pending.clone();
    rig.send(Event::Done(old.ticket));
    rig.send(Event::Failed { ticket: old.ticket, class: ErrorClass::Broken, text: String::new() });
    assert_eq!((rig.machine.path(), &rig.pending), (path, &waiting));
    rig.send(Event::Grant { vf: VfIndex(9), program: program() });
    assert_eq!(rig.machine.vf(), Some(VF), "it has a VF still");
}

#[test]
fn a_vf_of_a_former_life_is_given_back_as_any_other() {
    let program = Program::Legacy(Default::default());
    let mut lifecycle = Lifecycle::adopted(Timing::default(), 5, VfIndex(2), program.clone());
    assert_eq!((lifecycle.path(), lifecycle.vf()), (Path::Hardware, Some(VfIndex(2))));
    assert_eq!(lifecycle.program(), Some(&program));
    let commands = lifecycle.handle(6, Event::Drifted("spoofchk is off".into()));
    assert_eq!(commands.iter().map(|command| &command.action).collect::<Vec<_>>(), [&Action::UseSoftware]);
    assert_eq!(lifecycle.path(), Path::Draining);
}
