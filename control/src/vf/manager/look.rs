//! Looking: is the NIC there, what can it do, which VFs are there, and do they hold what was programmed.

use super::*;

impl Manager {
    /// Reads the NIC: is it there, what can it do, which VFs are there, does it hold what was programmed.
    pub(super) fn look(&mut self, now: u64) {
        let before = self.trouble.take();
        self.adopt_abilities();
        self.trouble = self.read_nic(now).err();
        // A NIC that could not be read now says nothing about the VFs that are in use.
        let is_known = self.trouble.is_none() || self.is_idle_nic();
        if is_known && let Some(former) = self.former.take() {
            self.adopt(now, &former);
        }
        self.clean_orphans();
        if self.trouble.is_none() {
            // Also looks whether somebody has taken addresses out.
            self.filter = None;
            if self.looks.is_multiple_of(FOREIGN_LOOKS) {
                self.vlans = None;
            }
            self.trouble = self.keep_filter().err();
        }
        if let Some(trouble) = self.trouble.clone()
            && before.as_ref() != Some(&trouble)
        {
            self.note(Severity::Warning, trouble);
        } else if self.trouble.is_none() && before.is_some() {
            let text = format!("{}: {} VFs, ready", self.pf(), self.vfs.len());
            self.note(Severity::Info, text);
        }
        self.check_all(now);
        self.counters = self.vf_counters();
        if self.looks.is_multiple_of(FOREIGN_LOOKS) {
            self.foreign = self.foreign_rules();
        }
        self.looks += 1;
    }

    /// Rules on representors of ours that are not ours.
    pub(super) fn foreign_rules(&mut self) -> Vec<String> {
        if self.parts.nic.mode() != Mode::Switchdev {
            return Vec::new();
        }
        let held: Vec<VfIndex> = self.claims.values().filter_map(|claim| claim.lifecycle.vf()).collect();
        let found = held.into_iter().filter_map(|vf| self.parts.nic.eswitch().read_back(vf).ok());
        let all: BTreeSet<String> = found.flat_map(|found| found.foreign).collect();
        all.into_iter().collect()
    }

    /// Why no VF can be granted, if so.
    pub(super) fn read_nic(&mut self, now: u64) -> Result<(), String> {
        let refresh = self.parts.nic.refresh().map_err(|error| error.to_string())?;
        if !refresh.is_unchanged() {
            let text = format!("{}: {refresh}", self.pf());
            self.note(Severity::Warning, text.clone());
            if refresh.loses_programs() {
                self.clean.clear();
                self.filter = None;
                self.vlans = None;
                self.disturb(now, &text);
            }
        }
        let pf = self.pf();
        if !self.parts.nic.is_present() {
            self.vfs.clear();
            return Err(format!("the NIC of {pf} is gone; it is used again when it is back"));
        }
        self.vfs = self.parts.nic.eswitch().vfs().map_err(|error| error.to_string())?;
        // Whoever sets the interface of a clean VF up is about to use it.
        let vfs = &self.vfs;
        self.clean.retain(|index| {
            let netdev = vfs.iter().find(|vf| vf.index == *index).and_then(|vf| vf.netdev.as_deref());
            netdev.is_none_or(|netdev| usage::is_up(netdev) != Some(true))
        });
        if usage::is_up(&pf) == Some(false) {
            self.disturb(now, &format!("{pf} is down"));
            return Err(format!("{pf} is down, and so are its VFs: ip link set {pf} up"));
        }
        self.told_by_nic = self.parts.nic.eswitch().capabilities().map_err(|error| error.to_string())?;
        self.conclude();
        Ok(())
    }

    /// All VFs may have lost their programs.
    pub(super) fn disturb(&mut self, now: u64, text: &str) {
        let names: Vec<String> = self
            .claims
            .iter()
            .filter(|(_, claim)| claim.lifecycle.vf().is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            self.send(now, &name, Event::Drifted(text.to_owned()));
        }
    }

    /// Has the NIC not be tried out anew at the first look: that turns knobs, if only on VFs that nobody uses.
    fn adopt_abilities(&mut self) {
        let Some(former) = &self.former else { return };
        let identity = self.parts.nic.identity();
        let is_same = former.device == format!("{}/{}", identity.bus, identity.address)
            && former.kind == identity.key();
        if is_same && let Some(abilities) = knowledge::from_record(&former.abilities, former.vfs) {
            self.parts.nic.adopt_capabilities(&abilities);
        }
    }

    /// Takes VFs over that vNICs held when the last daemon ended.
    pub(super) fn adopt(&mut self, now: u64, former: &Record) {
        let identity = self.parts.nic.identity();
        let device = format!("{}/{}", identity.bus, identity.address);
        if former.device != device {
            return;
        }
        self.parts.nic.adopt_unicast_filter(&former.filter());
        for (name, held) in &former.held {
            let index = VfIndex(held.vf);
            let vf = self.vfs.iter().find(|vf| vf.index == index).cloned();
            let Some(claim) = self.claims.get_mut(name) else {
                self.orphans.insert(name.clone(), held.clone());
                continue;
            };
            let gone = || Vf { index, pci: held.pci.clone(), netdev: None, driver: None };
            claim.vf = Some(vf.unwrap_or_else(gone));
            claim.backing = Some(Backing { representor: held.representor.clone(), in_use: held.in_use });
        }
        // Neighbours first: programs lead to them.
        self.neighbours.on_vfs = former
            .held
            .iter()
            .filter(|(name, held)| held.in_use && self.claims.contains_key(*name))
            .map(|(name, held)| (name.clone(), VfIndex(held.vf)))
            .collect();
        for (name, held) in &former.held {
            let Some(claim) = self.claims.get_mut(name) else { continue };
            let placed = place(&self.world.config, &claim.vnic, &self.capabilities, &self.neighbours);
            let candidate = claim.candidate(self.parts.nic.netdev());
            let is_active = held.in_use
                && self.vfs.iter().any(|vf| vf.index == VfIndex(held.vf))
                && matches!(claim.plug.is_active(&candidate), Ok(true));
            match placed {
                Ok(program) if is_active => {
                    claim.lifecycle =
                        Lifecycle::adopted(self.parts.timing, now, VfIndex(held.vf), program.clone());
                    claim.program = Some(program.clone());
                    claim.placed = Ok(program);
                    claim.told = (Path::Hardware, String::new());
                    let text =
                        format!("vnic/{name}: adopted on VF {} of {}", held.vf, self.parts.nic.netdev());
                    self.note(Severity::Info, text);
                }
                // On its way when the daemon ended, or no longer covered: taken back as any VF, from its guest too.
                _ => {
                    let program = Program::Legacy(Default::default());
                    claim.lifecycle = Lifecycle::adopted(self.parts.timing, now, VfIndex(held.vf), program);
                    let text = "the daemon was restarted while it was on its way".to_owned();
                    self.send(now, name, Event::Drifted(text));
                }
            }
        }
    }

    /// Whether the NIC carries nothing at all now.
    fn is_idle_nic(&self) -> bool {
        !self.parts.nic.is_present() || usage::is_up(self.parts.nic.netdev()) == Some(false)
    }

    /// Closes and cleans VFs that nobody has a claim to any more. Their guests are not asked: their policy is gone.
    fn clean_orphans(&mut self) {
        let orphans: Vec<(String, VfIndex)> =
            self.orphans.iter().map(|(name, held)| (name.clone(), VfIndex(held.vf))).collect();
        for (name, vf) in orphans {
            let cleaned = [Action::Close(vf), Action::Clean(vf)]
                .iter()
                .try_for_each(|action| execute(self.parts.nic.eswitch(), action).unwrap_or(Ok(())));
            match cleaned {
                Ok(()) => {
                    self.orphans.remove(&name);
                    self.note(
                        Severity::Warning,
                        format!("vnic/{name}: {vf} was left to it by the last daemon, and is taken back"),
                    );
                }
                Err(error) if error.class() == ErrorClass::Gone && !self.parts.nic.is_present() => {
                    self.orphans.remove(&name);
                }
                Err(error) => {
                    self.note(Severity::Warning, format!("vnic/{name}: {vf} cannot be taken back: {error}"));
                }
            }
        }
    }

    /// Looks at every VF that may be open.
    pub(super) fn check_all(&mut self, now: u64) {
        let names: Vec<String> = self.claims.keys().cloned().collect();
        for name in names {
            let Some(claim) = self.claims.get(&name) else { continue };
            if let (Some(vf), Some(program)) = (claim.lifecycle.vf(), claim.lifecycle.program().cloned()) {
                self.check_one(now, &name, vf, &program);
            }
            self.check_guest(now, &name);
        }
    }

    pub(super) fn check_one(&mut self, now: u64, name: &str, vf: VfIndex, program: &Program) {
        let Err(error) = check(self.parts.nic.eswitch(), vf, program) else { return };
        if error.class() == ErrorClass::Passing {
            return;
        }
        let text = error.to_string();
        if let Some(claim) = self.claims.get_mut(name) {
            claim.drifted(now);
        }
        // A setting is put back at once: that is quicker than closing the VF.
        if let EswitchError::Broken { .. } = error
            && let Some(Ok(())) = execute(
                self.parts.nic.eswitch(),
                &Action::Program { vf, program: program.clone(), is_open: true },
            )
            && check(self.parts.nic.eswitch(), vf, program).is_ok()
        {
            self.note(Severity::Warning, format!("vnic/{name}: drift, put right at once: {text}"));
            let unsteady = self.claims.get(name).is_some_and(|claim| claim.is_unsteady(now));
            if !unsteady {
                return;
            }
        } else {
            self.note(Severity::Warning, format!("vnic/{name}: drift: {text}"));
        }
        self.send(now, name, Event::Drifted(text));
    }

    /// Takes the VF back from a guest that has stopped using it.
    pub(super) fn check_guest(&mut self, now: u64, name: &str) {
        let pf = self.pf();
        let Some(claim) = self.claims.get_mut(name) else { return };
        if claim.lifecycle.path() != Path::Hardware {
            claim.idle_since = None;
            return;
        }
        let candidate = claim.candidate(&pf);
        claim.idle_since = match claim.plug.is_active(&candidate) {
            Ok(true) => None,
            Ok(false) | Err(_) => claim.idle_since.or(Some(now)),
        };
        if claim.idle_since.is_some_and(|since| now.saturating_sub(since) >= IDLE_MAX) {
            claim.drifted(now);
            self.send(now, name, Event::Revoke("the guest no longer uses it".to_owned()));
        }
    }
}
