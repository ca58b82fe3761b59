//! Carrying out what lifecycles command: at the NIC at once, at guests by asking their plugs again and again.

use super::*;

impl Manager {
    /// Gives a lifecycle an event, and carries out what follows, as far as that needs no waiting.
    pub(super) fn send(&mut self, now: u64, name: &str, event: Event) {
        let mut next = Some(event);
        for _ in 0..COMMANDS_MAX {
            let Some(event) = next.take() else { return };
            let Some(claim) = self.claims.get_mut(name) else { return };
            let commands = claim.lifecycle.handle(now, event);
            self.tell_path(name);
            for command in commands {
                next = self.carry_out(now, name, command);
            }
        }
    }

    /// The answer, unless it has to be waited for.
    pub(super) fn carry_out(&mut self, now: u64, name: &str, command: Command) -> Option<Event> {
        let Command { ticket, action } = command;
        let claim = self.claims.get_mut(name)?;
        if !claim.lifecycle.awaits(ticket) {
            return None;
        }
        claim.waiting = None;
        match &action {
            Action::Plug(vf) => {
                let checked = claim.plug.check();
                let binds = self.parts.nic.opens_by_binding(*vf);
                let claim = self.claims.get_mut(name)?;
                match (checked, binds) {
                    (Err(error), _) => Some(refused(ticket, &error)),
                    (Ok(()), Err(error)) => Some(answer(ticket, Err(error))),
                    // There is nothing to give before it is open.
                    (Ok(()), Ok(true)) => Some(Event::Done(ticket)),
                    (Ok(()), Ok(false)) => {
                        claim.waiting = Some(Waiting::Plug(ticket));
                        None
                    }
                }
            }
            Action::Unplug { by_force, .. } => {
                claim.waiting = Some(Waiting::Unplug { ticket, by_force: *by_force });
                None
            }
            Action::UseHardware(_) => Some(self.use_hardware(name, ticket)),
            Action::UseSoftware => Some(self.use_software(now, name, ticket)),
            Action::Open { vf, .. } => {
                let vf = *vf;
                let result = self.open(name, &action, vf);
                let opened = result.is_ok();
                let claim = self.claims.get_mut(name)?;
                if opened {
                    claim.waiting = Some(Waiting::PlugOpen);
                    // It may have its interface only now.
                    if let Some(found) = self.vfs.iter().find(|one| one.index == vf) {
                        claim.vf = Some(found.clone());
                    }
                }
                Some(answer(ticket, result))
            }
            Action::Close(vf) | Action::Clean(vf) | Action::Program { vf, .. } => {
                let vf = *vf;
                let result = match execute(self.parts.nic.eswitch(), &action).unwrap_or(Ok(())) {
                    // With the NIC its VFs are gone; whatever comes back is cleaned before it is granted.
                    Err(error) if error.class() == ErrorClass::Gone && !self.parts.nic.is_present() => {
                        match action {
                            Action::Program { .. } => Err(error),
                            _ => Ok(()),
                        }
                    }
                    result => result,
                };
                let claim = self.claims.get_mut(name)?;
                let is_draining = claim.lifecycle.path() == Path::Draining;
                if let Action::Program { .. } = action {
                    claim.learn(&result);
                }
                match &action {
                    Action::Close(_) if is_draining && result.is_ok() && is_in_use(claim) => {
                        claim.dark_since.get_or_insert(now);
                    }
                    Action::Clean(_) if result.is_ok() && self.parts.nic.is_present() => {
                        self.clean.insert(vf);
                    }
                    _ => {}
                }
                Some(answer(ticket, result))
            }
        }
    }

    pub(super) fn open(&mut self, name: &str, action: &Action, vf: VfIndex) -> Result<(), EswitchError> {
        // In switchdev mode what the rules do not decide comes to the representor: it must be served.
        self.serve(name).map_err(|detail| EswitchError::Busy { detail })?;
        execute(self.parts.nic.eswitch(), action).unwrap_or(Ok(()))?;
        if let Ok(vfs) = self.parts.nic.eswitch().vfs()
            && vfs.iter().any(|one| one.index == vf)
        {
            self.vfs = vfs;
        }
        Ok(())
    }

    pub(super) fn use_hardware(&mut self, name: &str, ticket: u64) -> Event {
        self.set_in_use(name, true);
        if let Err(text) = self.serve(name) {
            self.set_in_use(name, false);
            return Event::Failed { ticket, class: ErrorClass::Passing, text };
        }
        // Until here the PF received its frames too; now only the VF does.
        self.filter = None;
        if let Err(text) = self.keep_filter() {
            return Event::Failed { ticket, class: ErrorClass::Passing, text };
        }
        Event::Done(ticket)
    }

    pub(super) fn use_software(&mut self, now: u64, name: &str, ticket: u64) -> Event {
        // Neighbours must not send into a VF that is about to be closed.
        self.leave_neighbours(now, name);
        self.set_in_use(name, false);
        self.filter = None;
        // A NIC that is gone filters nothing; the vNICs on this host need their path all the same.
        let filtered = self.keep_filter();
        if let Err(text) = self.set_software() {
            return Event::Failed { ticket, class: ErrorClass::Passing, text };
        }
        if let Some(claim) = self.claims.get_mut(name)
            && let Some(dark_since) = claim.dark_since.take()
        {
            let blackout = now.saturating_sub(dark_since);
            claim.lifecycle.record(Losses { blackout, ..Losses::default() });
        }
        match filtered {
            Err(text) if self.parts.nic.is_present() && self.trouble.is_none() => {
                Event::Failed { ticket, class: ErrorClass::Passing, text }
            }
            _ => Event::Done(ticket),
        }
    }

    pub(super) fn set_in_use(&mut self, name: &str, in_use: bool) {
        if let Some(backing) = self.claims.get_mut(name).and_then(|claim| claim.backing.as_mut()) {
            backing.in_use = in_use;
        }
    }

    /// Has the programs of all other VFs in use lead past one that is about to be closed.
    pub(super) fn leave_neighbours(&mut self, now: u64, leaving: &str) {
        if self.parts.nic.mode() != Mode::Switchdev {
            return;
        }
        self.meet_neighbours(Some(leaving));
        let others: Vec<String> = self.neighbours.on_vfs.keys().cloned().collect();
        for other in others {
            let Some(claim) = self.claims.get_mut(&other) else { continue };
            if let Ok(program) = place(&self.world.config, &claim.vnic, &self.capabilities, &self.neighbours)
            {
                claim.placed = Ok(program.clone());
                claim.program = Some(program.clone());
                self.send(now, &other, Event::Replaced(program));
            }
        }
    }

    /// Asks plugs how far they are, and lets time pass.
    pub(super) fn poll(&mut self, now: u64) {
        let names: Vec<String> = self.claims.keys().cloned().collect();
        let pf = self.pf();
        for name in names {
            for _ in 0..COMMANDS_MAX {
                let Some(event) = self.ask(&name, &pf) else { break };
                self.send(now, &name, event);
            }
            self.send(now, &name, Event::Tick);
        }
    }

    /// What a plug has to say, if it has.
    pub(super) fn ask(&mut self, name: &str, pf: &str) -> Option<Event> {
        let claim = self.claims.get_mut(name)?;
        let candidate = claim.candidate(pf);
        let vf = claim.lifecycle.vf()?;
        match claim.waiting? {
            Waiting::Plug(ticket) => match claim.plug.plug(&candidate) {
                Ok(Progress::Pending) => None,
                Ok(Progress::Done) => {
                    claim.waiting = None;
                    Some(Event::Done(ticket))
                }
                Err(error) => {
                    claim.waiting = None;
                    Some(refused(ticket, &error))
                }
            },
            Waiting::PlugOpen => match claim.plug.plug(&candidate) {
                Ok(Progress::Pending) => None,
                Ok(Progress::Done) => {
                    claim.waiting = Some(Waiting::Guest);
                    self.ask(name, pf)
                }
                Err(error) => {
                    claim.waiting = None;
                    Some(Event::Refused(error.to_string()))
                }
            },
            Waiting::Guest => match claim.plug.is_active(&candidate) {
                Ok(true) => {
                    claim.waiting = None;
                    Some(Event::GuestActive(vf))
                }
                Ok(false) => None,
                Err(error) => {
                    claim.waiting = None;
                    Some(Event::Refused(error.to_string()))
                }
            },
            Waiting::Unplug { ticket, by_force } => match claim.plug.unplug(&candidate, by_force) {
                Ok(Progress::Pending) => None,
                Ok(Progress::Done) => {
                    claim.waiting = None;
                    let losses = claim.plug.losses();
                    claim.lifecycle.record(losses);
                    Some(Event::Done(ticket))
                }
                Err(error) => {
                    claim.waiting = None;
                    Some(refused(ticket, &error))
                }
            },
        }
    }

    /// Lets go of what has no VF any more, and forgets claims that nobody makes.
    pub(super) fn retire(&mut self, _now: u64) {
        for claim in self.claims.values_mut().filter(|claim| claim.lifecycle.vf().is_none()) {
            claim.backing = None;
            claim.program = None;
            claim.vf = None;
            claim.waiting = None;
        }
        self.claims.retain(|_, claim| claim.is_wanted || claim.lifecycle.vf().is_some());
        // What fails is tried again by the next step.
        let _ = self.set_software();
    }
}
