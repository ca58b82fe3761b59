//! The path of one vNIC: between its software attachment, which it always has, and a VF, which comes and goes.
//!
//! ```text
//! Software ──grant──▶ Programming ──verified──▶ Attaching ──guest active──▶ Hardware
//!    ▲                    │ uncovered, failed       │ refused, timeout          │ revoked, drift, policy
//!    └────────────────────┴─────────────────────────┴──────── Draining ◀────────┘
//! ```
//!
//! [`Lifecycle`] is pure: it takes an [`Event`] and the time and returns [`Command`]s; whoever carries a command out
//! answers by its ticket. Commands to the NIC are carried out by [`execute`](mod@execute), those to guests and the
//! software path by the daemon. [`allocate`](mod@allocate) decides who is granted a VF.
//!
//! What holds at every moment: a VF is opened only after it was seen closed, then programmed, then read back; it is
//! unprogrammed only after it was seen closed; it is given away only after it was seen unprogrammed. The vNIC uses its
//! software path until the guest is active on the VF, and again before the VF is closed. A guest that clings to its VF
//! is cut off after a deadline; where the policy no longer holds in the NIC, at once.

pub mod allocate;
mod counters;
pub mod execute;

use sluice_policy::placement::{Program, VfIndex};

use crate::contract::{ErrorClass, EswitchError};

pub use counters::{Cause, Counters, Losses};

/// Where a vNIC's traffic is, or is going.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// On the software attachment; it has no VF.
    Software,
    /// A VF is being programmed. Traffic is in software.
    Programming,
    /// The VF is on its way into the guest. Traffic is in software.
    Attaching,
    /// On the VF.
    Hardware,
    /// The VF is being taken away. Traffic is in software, or about to be.
    Draining,
}

/// How long to wait, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For the guest to become active.
    pub attach: u64,
    /// For the guest to let go.
    pub drain: u64,
    /// Before something that failed is tried again.
    pub retry: u64,
    /// How often programming is tried.
    pub attempts: u32,
    /// Before the vNIC should be granted a VF again after a grant that came to nothing; doubled each time.
    pub backoff: u64,
    /// Longest such wait.
    pub backoff_max: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Timing { attach: 10_000, drain: 5_000, retry: 100, attempts: 5, backoff: 1_000, backoff_max: 60_000 }
    }
}

/// Something to be done; to be answered with [`Event::Done`] or [`Event::Failed`] and the ticket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Names this command. One that is no longer [awaited](Lifecycle::awaits) must not be begun, and its answer is
    /// ignored.
    pub ticket: u64,
    /// What.
    pub action: Action,
}

/// What is to be done. Every action may be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Close the VF, and see that it is closed.
    Close(VfIndex),
    /// Program the VF, and see that it is programmed; and closed, unless it `is_open`.
    Program {
        /// The VF.
        vf: VfIndex,
        /// What to program.
        program: Program,
        /// It is in use: only the way to neighbours changes.
        is_open: bool,
    },
    /// Give the VF to the guest.
    Plug(VfIndex),
    /// Open the VF, and see that it is open and still programmed.
    Open {
        /// The VF.
        vf: VfIndex,
        /// What it must hold.
        program: Program,
    },
    /// The guest is active on the VF: stop using the software path. In legacy mode the PF's unicast filter loses the
    /// vNIC's addresses, and the software switch finds them behind its uplink.
    UseHardware(VfIndex),
    /// Use the software path; in legacy mode, with the vNIC's addresses in the PF's unicast filter.
    UseSoftware,
    /// Take the VF from the guest: done when the guest has let go.
    Unplug {
        /// The VF.
        vf: VfIndex,
        /// Without asking.
        by_force: bool,
    },
    /// Take everything from the VF, and see that it has nothing.
    Clean(VfIndex),
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The vNIC may have this VF, whose eSwitch covers its policy by this program.
    Grant {
        /// The VF: free and clean, as far as anybody knows.
        vf: VfIndex,
        /// What [`place`](sluice_policy::placement::place) returned.
        program: Program,
    },
    /// The command was carried out.
    Done(u64),
    /// It was not, or not for certain.
    Failed {
        /// The command.
        ticket: u64,
        /// What the failure means.
        class: ErrorClass,
        /// Why.
        text: String,
    },
    /// The guest sends on the VF, or says that it can.
    GuestActive(VfIndex),
    /// The guest will not have the VF, or cannot be given it, though it is open.
    Refused(String),
    /// Take the VF away, when the guest lets go or the deadline passes.
    Revoke(String),
    /// The NIC does not hold what was programmed.
    Drifted(String),
    /// The policy has changed to one that the VF does not enforce.
    PolicyChanged(String),
    /// The policy is the same, and the program leads to other neighbours. Switchdev only.
    Replaced(Program),
    /// Time passes.
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Software,
    Programming { vf: VfIndex, program: Program, is_closed: bool, attempts: u32 },
    Attaching { vf: VfIndex, program: Program, step: Attach, deadline: u64, guest_active: bool },
    Hardware { vf: VfIndex, program: Program, next: Option<Program> },
    Draining(Draining),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attach {
    Plug,
    Open,
    Guest,
    Switch,
}

/// What is left to do until the VF is free; the next step follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Draining {
    vf: VfIndex,
    step: Drain,
    deadline: u64,
    /// The VF is closed before the guest is asked.
    is_urgent: bool,
    software_tried: bool,
    software_ready: bool,
    is_plugged: bool,
    is_closed: bool,
    is_clean: bool,
}

impl Draining {
    /// The next step; `None` when all is done.
    const fn next(&self) -> Option<Drain> {
        // A policy that does not hold must not wait for a software path that does not come.
        let must_close = self.is_urgent && self.software_tried && !self.is_closed;
        if !self.software_ready && !must_close {
            Some(Drain::UseSoftware)
        } else if !self.is_closed {
            let asks = self.is_plugged && !self.is_urgent;
            Some(if asks { Drain::Unplug } else { Drain::Close })
        } else if self.is_plugged {
            Some(Drain::UnplugByForce)
        } else if !self.is_clean {
            Some(Drain::Clean)
        } else {
            None
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    UseSoftware,
    Unplug,
    Close,
    UnplugByForce,
    Clean,
}

/// The state machine of one vNIC.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    state: State,
    timing: Timing,
    tickets: u64,
    /// The command whose answer is awaited.
    awaited: Option<u64>,
    /// When to repeat the command of the present step.
    retry_at: Option<u64>,
    since: u64,
    /// Grants in a row that came to nothing.
    strikes: u32,
    not_before: u64,
    reason: String,
    counters: Counters,
}

impl Lifecycle {
    /// A vNIC on its software path.
    pub fn new(timing: Timing, now: u64) -> Self {
        Lifecycle {
            state: State::Software,
            timing,
            tickets: 0,
            awaited: None,
            retry_at: None,
            since: now,
            strikes: 0,
            not_before: now,
            reason: "it was never granted a VF".into(),
            counters: Counters::default(),
        }
    }

    /// A vNIC that was on a VF in a former life of the daemon, and still is: its guest is active on it. What the VF
    /// holds is then looked at as ever, and drift revokes it.
    pub fn adopted(timing: Timing, now: u64, vf: VfIndex, program: Program) -> Self {
        Lifecycle {
            state: State::Hardware { vf, program, next: None },
            reason: format!("it was on {vf} when the daemon started"),
            ..Lifecycle::new(timing, now)
        }
    }

    /// Forgets grants that came to nothing: it may be granted a VF at once.
    pub const fn forgive(&mut self, now: u64) {
        self.strikes = 0;
        self.not_before = now;
    }

    /// Its path.
    pub const fn path(&self) -> Path {
        match self.state {
            State::Software => Path::Software,
            State::Programming { .. } => Path::Programming,
            State::Attaching { .. } => Path::Attaching,
            State::Hardware { .. } => Path::Hardware,
            State::Draining(_) => Path::Draining,
        }
    }

    /// The VF that it holds. Until this is `None`, nobody else may have it.
    pub const fn vf(&self) -> Option<VfIndex> {
        match self.state {
            State::Software => None,
            State::Programming { vf, .. }
            | State::Attaching { vf, .. }
            | State::Hardware { vf, .. }
            | State::Draining(Draining { vf, .. }) => Some(vf),
        }
    }

    /// Whether a command is still wanted.
    pub fn awaits(&self, ticket: u64) -> bool {
        self.awaited == Some(ticket)
    }

    /// What the VF must hold while it may be open, for drift to be looked for.
    pub const fn program(&self) -> Option<&Program> {
        match &self.state {
            State::Attaching { program, step: Attach::Guest | Attach::Switch, .. }
            | State::Hardware { program, next: None, .. } => Some(program),
            _ => None,
        }
    }

    /// What it was granted its VF with; `None` if it has none, or is losing it.
    pub const fn granted(&self) -> Option<&Program> {
        match &self.state {
            State::Programming { program, .. } | State::Attaching { program, .. } => Some(program),
            State::Hardware { next: Some(program), .. } | State::Hardware { program, .. } => Some(program),
            State::Software | State::Draining(_) => None,
        }
    }

    /// Since when it is on this path, milliseconds.
    pub const fn since(&self) -> u64 {
        self.since
    }

    /// Before this it should not be granted a VF, as the last grants came to nothing.
    pub const fn not_before(&self) -> u64 {
        self.not_before
    }

    /// Why it is on this path.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What happened so far.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Adds what was seen of a transition's cost.
    pub fn record(&mut self, losses: Losses) {
        self.counters.losses.add(losses);
    }

    /// Takes an event at a time, in milliseconds of any clock that does not go back.
    pub fn handle(&mut self, now: u64, event: Event) -> Vec<Command> {
        match event {
            Event::Grant { vf, program } => self.grant(now, vf, program),
            Event::Done(ticket) if self.awaits(ticket) => {
                self.awaited = None;
                self.done(now)
            }
            Event::Failed { ticket, class, text } if self.awaits(ticket) => {
                self.awaited = None;
                self.failed(now, class, text)
            }
            Event::Done(_) | Event::Failed { .. } => Vec::new(),
            Event::GuestActive(vf) => self.guest_active(vf),
            Event::Refused(text) => self.leave(now, Cause::Refused, text, true),
            Event::Revoke(text) => self.leave(now, Cause::Revoked, text, false),
            Event::Drifted(text) => self.leave(now, Cause::Drift, text, true),
            Event::PolicyChanged(text) => self.leave(now, Cause::Policy, text, true),
            Event::Replaced(program) => self.replace(now, program),
            Event::Tick => self.tick(now),
        }
    }

    fn enter(&mut self, now: u64, state: State, cause: Cause, reason: String) {
        let from = self.path();
        match (from, cause) {
            (_, Cause::GuestActive) => self.strikes = 0,
            (
                Path::Programming | Path::Attaching,
                Cause::Uncovered | Cause::Failed | Cause::Refused | Cause::Timeout | Cause::Drift,
            ) => {
                let wait = self.timing.backoff.saturating_mul(1 << self.strikes.min(16));
                self.strikes += 1;
                self.not_before = now + wait.min(self.timing.backoff_max);
            }
            _ => {}
        }
        self.state = state;
        self.awaited = None;
        self.retry_at = None;
        self.since = now;
        self.reason = reason;
        self.counters.transition(from, self.path(), cause);
    }

    /// The command of the present step.
    fn command(&mut self) -> Vec<Command> {
        let action = match &self.state {
            State::Software => return Vec::new(),
            State::Programming { vf, is_closed: false, .. } => Action::Close(*vf),
            State::Programming { vf, program, .. } => {
                Action::Program { vf: *vf, program: program.clone(), is_open: false }
            }
            State::Attaching { vf, program, step, .. } => match step {
                Attach::Plug => Action::Plug(*vf),
                Attach::Open => Action::Open { vf: *vf, program: program.clone() },
                Attach::Guest => return Vec::new(),
                Attach::Switch => Action::UseHardware(*vf),
            },
            State::Hardware { next: None, .. } => return Vec::new(),
            State::Hardware { vf, next: Some(program), .. } => {
                Action::Program { vf: *vf, program: program.clone(), is_open: true }
            }
            State::Draining(Draining { vf, step, .. }) => match step {
                Drain::UseSoftware => Action::UseSoftware,
                Drain::Unplug => Action::Unplug { vf: *vf, by_force: false },
                Drain::Close => Action::Close(*vf),
                Drain::UnplugByForce => Action::Unplug { vf: *vf, by_force: true },
                Drain::Clean => Action::Clean(*vf),
            },
        };
        self.tickets += 1;
        self.awaited = Some(self.tickets);
        self.retry_at = None;
        vec![Command { ticket: self.tickets, action }]
    }

    fn grant(&mut self, now: u64, vf: VfIndex, program: Program) -> Vec<Command> {
        if self.state != State::Software {
            return Vec::new();
        }
        let state = State::Programming { vf, program, is_closed: false, attempts: 1 };
        self.enter(now, state, Cause::Granted, format!("it was granted {vf}"));
        self.command()
    }

    fn done(&mut self, now: u64) -> Vec<Command> {
        match &mut self.state {
            State::Software => {}
            State::Programming { is_closed: is_closed @ false, .. } => *is_closed = true,
            State::Programming { vf, program, .. } => {
                let (vf, program) = (*vf, program.clone());
                let deadline = now + self.timing.attach;
                let step = Attach::Plug;
                let state = State::Attaching { vf, program, step, deadline, guest_active: false };
                self.enter(
                    now,
                    state,
                    Cause::Verified,
                    format!("{vf} is programmed, and waits for the guest"),
                );
            }
            State::Attaching { step: step @ Attach::Plug, .. } => *step = Attach::Open,
            State::Attaching { step: step @ Attach::Open, guest_active, .. } => {
                *step = if *guest_active { Attach::Switch } else { Attach::Guest };
            }
            State::Attaching { step: Attach::Guest, .. } => {}
            State::Attaching { vf, program, step: Attach::Switch, .. } => {
                let (vf, program) = (*vf, program.clone());
                let state = State::Hardware { vf, program, next: None };
                self.enter(now, state, Cause::GuestActive, format!("the guest is active on {vf}"));
            }
            State::Hardware { program, next, .. } => {
                if let Some(next) = next.take() {
                    *program = next;
                }
            }
            State::Draining(_) => return self.drained(now),
        }
        self.command()
    }

    /// A step of draining is done: on to the next.
    fn drained(&mut self, now: u64) -> Vec<Command> {
        let State::Draining(draining) = &mut self.state else {
            return Vec::new();
        };
        match draining.step {
            Drain::UseSoftware => draining.software_ready = true,
            Drain::Unplug | Drain::UnplugByForce => draining.is_plugged = false,
            Drain::Close => draining.is_closed = true,
            Drain::Clean => draining.is_clean = true,
        }
        match draining.next() {
            Some(step) => draining.step = step,
            None => {
                let reason = format!("{} was taken from it: {}", draining.vf, self.reason);
                self.enter(now, State::Software, Cause::Drained, reason);
            }
        }
        self.command()
    }

    fn failed(&mut self, now: u64, class: ErrorClass, text: String) -> Vec<Command> {
        self.counters.failures += 1;
        let may_pass = matches!(class, ErrorClass::Passing | ErrorClass::Broken);
        let attempts_max = self.timing.attempts;
        let cause = match class {
            ErrorClass::Uncovered => Cause::Uncovered,
            _ => Cause::Failed,
        };
        match &mut self.state {
            State::Programming { attempts, .. } if may_pass && *attempts < attempts_max => {
                *attempts += 1;
                self.retry_at = Some(now + self.timing.retry);
                Vec::new()
            }
            State::Attaching { step: Attach::Plug, .. } => self.leave(now, Cause::Refused, text, true),
            State::Programming { .. } | State::Attaching { .. } | State::Hardware { .. } => {
                self.leave(now, cause, text, true)
            }
            State::Draining(draining) => {
                draining.software_tried |= draining.step == Drain::UseSoftware;
                match draining.next() {
                    Some(step) if step != draining.step => {
                        draining.step = step;
                        self.command()
                    }
                    _ => {
                        self.retry_at = Some(now + self.timing.retry);
                        Vec::new()
                    }
                }
            }
            State::Software => Vec::new(),
        }
    }

    fn guest_active(&mut self, active: VfIndex) -> Vec<Command> {
        match &mut self.state {
            State::Attaching { vf, step: step @ Attach::Guest, .. } if *vf == active => {
                *step = Attach::Switch;
                self.command()
            }
            State::Attaching { vf, guest_active, .. } if *vf == active => {
                *guest_active = true;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// Away from the VF; `is_urgent`: it is closed before the guest is asked.
    fn leave(&mut self, now: u64, cause: Cause, text: String, is_urgent: bool) -> Vec<Command> {
        let (vf, is_plugged) = match &mut self.state {
            State::Software => return Vec::new(),
            State::Draining(Draining { is_urgent: false, .. }) if is_urgent => return self.hurry(text),
            State::Draining(_) => return Vec::new(),
            State::Programming { vf, .. } => (*vf, false),
            State::Attaching { vf, .. } | State::Hardware { vf, .. } => (*vf, true),
        };
        let deadline = now + self.timing.drain;
        let draining = Draining {
            vf,
            step: Drain::UseSoftware,
            deadline,
            is_urgent,
            software_tried: false,
            software_ready: false,
            is_plugged,
            is_closed: false,
            is_clean: false,
        };
        self.enter(now, State::Draining(draining), cause, text);
        self.command()
    }

    /// Stops asking the guest: the VF is closed under it.
    fn hurry(&mut self, text: String) -> Vec<Command> {
        let State::Draining(draining) = &mut self.state else {
            return Vec::new();
        };
        draining.is_urgent = true;
        self.counters.forced += u64::from(draining.is_plugged && !draining.is_closed);
        self.reason = text;
        match draining.next() {
            Some(step) if step != draining.step => {
                draining.step = step;
                self.command()
            }
            _ => Vec::new(),
        }
    }

    fn replace(&mut self, now: u64, new: Program) -> Vec<Command> {
        match (&mut self.state, &new) {
            (State::Hardware { program, next, .. }, Program::Switchdev(_)) => {
                if next.as_ref().unwrap_or(program) == &new {
                    return Vec::new();
                }
                *next = Some(new);
                self.command()
            }
            (State::Software | State::Draining(_), _) => Vec::new(),
            // A VF in legacy mode has no neighbours; and one that is not in use yet starts again.
            _ => self.leave(now, Cause::Policy, "its program has changed".into(), true),
        }
    }

    fn tick(&mut self, now: u64) -> Vec<Command> {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.counters.retries += 1;
            return self.command();
        }
        match &self.state {
            State::Attaching { deadline, vf, .. } if *deadline <= now => {
                let text = format!("the guest did not become active on {vf} in time");
                self.leave(now, Cause::Timeout, text, true)
            }
            State::Draining(Draining { deadline, is_urgent: false, vf, .. }) if *deadline <= now => {
                let text = format!("the guest did not let go of {vf} in time");
                self.hurry(text)
            }
            _ => Vec::new(),
        }
    }
}

/// The answer to a command.
pub fn answer(ticket: u64, result: Result<(), EswitchError>) -> Event {
    match result {
        Ok(()) => Event::Done(ticket),
        Err(error) => Event::Failed { ticket, class: error.class(), text: error.to_string() },
    }
}

#[cfg(test)]
mod tests;
