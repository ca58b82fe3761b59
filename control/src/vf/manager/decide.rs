//! Deciding: whose policy the NIC covers, and who gets a VF.

use super::*;

impl Manager {
    /// Fits every policy anew, and tells the lifecycles what changed.
    pub(super) fn place(&mut self, now: u64) {
        let names: Vec<String> = self.claims.keys().cloned().collect();
        let before = self.neighbours.clone();
        self.meet_neighbours(None);
        for name in names {
            let Some(claim) = self.claims.get_mut(&name) else { continue };
            if let Some(Hold { until: Some(until), .. }) = &claim.hold
                && *until <= now
            {
                claim.hold = None;
            }
            let config = &Arc::clone(&self.world.config);
            claim.placed = if claim.is_wanted {
                place(config, &claim.vnic, &self.capabilities, &self.neighbours)
            } else {
                Err(Vec::new())
            };
            // What is on its way back is open for a while yet, and must not be open under another policy than the present.
            let is_leaving = !claim.is_wanted || claim.lifecycle.path() == Path::Draining;
            let Some(current) = claim.program.clone() else { continue };
            let present = if claim.is_wanted {
                Some(&claim.vnic)
            } else {
                config.vnics.iter().find(|vnic| vnic.name == name && vnic.switch == self.parts.switch)
            };
            let wanted = match present {
                Some(vnic) => place(config, vnic, &self.capabilities, &self.neighbours),
                None => Err(Vec::new()),
            };
            let holds = |wanted: &Result<Program, _>| wanted.as_ref() == Ok(&current);
            let only_neighbours = || {
                matches!(wanted, Ok(Program::Switchdev(_)))
                    && present.is_some_and(|vnic| holds(&place(config, vnic, &self.capabilities, &before)))
            };
            let event = match &wanted {
                _ if holds(&wanted) || is_leaving && only_neighbours() => {
                    if claim.is_wanted || claim.lifecycle.path() == Path::Draining {
                        continue;
                    }
                    Event::Revoke("it no longer asks for a VF".to_owned())
                }
                Ok(program) if only_neighbours() => Event::Replaced(program.clone()),
                Ok(_) => Event::PolicyChanged("its policy has changed".to_owned()),
                Err(uncovered) if uncovered.is_empty() => {
                    Event::PolicyChanged("it is no longer on this switch".to_owned())
                }
                Err(uncovered) => {
                    let features: Vec<&str> = uncovered.iter().map(|one| one.feature.code()).collect();
                    Event::PolicyChanged(format!(
                        "the NIC cannot enforce its policy: {}",
                        features.join(", ")
                    ))
                }
            };
            if let Event::Replaced(program) = &event
                && let Some(claim) = self.claims.get_mut(&name)
            {
                claim.program = Some(program.clone());
            }
            self.send(now, &name, event);
        }
    }

    /// What a vNIC's VF holds or is being given; `None` if it has none, or is losing it.
    pub(super) fn program_of(&self, name: &str) -> Option<Program> {
        let claim = self.claims.get(name)?;
        match claim.lifecycle.path() {
            Path::Software | Path::Draining => None,
            Path::Programming | Path::Attaching | Path::Hardware => claim.lifecycle.granted().cloned(),
        }
    }

    /// What programs may lead to, in switchdev mode: VFs in use, but not that of `leaving`.
    pub(super) fn meet_neighbours(&mut self, leaving: Option<&str>) {
        if self.parts.nic.mode() != Mode::Switchdev {
            self.neighbours = Neighbours::default();
            return;
        }
        self.neighbours.on_vfs = self
            .claims
            .iter()
            .filter(|(name, claim)| {
                claim.lifecycle.path() == Path::Hardware && Some(name.as_str()) != leaving
            })
            .filter_map(|(name, claim)| Some((name.clone(), claim.lifecycle.vf()?)))
            .collect();
        // Those that are led to already stay, so that a long list does not make programs change for ever.
        let nobody = BTreeSet::new();
        let known = self.world.behind_uplink.get(&self.parts.switch).unwrap_or(&nobody);
        self.neighbours.behind_uplink.retain(|station| known.contains(station));
        for station in known {
            if self.neighbours.behind_uplink.len() >= STATIONS_MAX {
                break;
            }
            self.neighbours.behind_uplink.insert(*station);
        }
    }

    pub(super) fn allocate(&mut self, now: u64) {
        let nic_is_well = self.trouble.is_none();
        let candidates: Vec<allocate::Candidate> = self
            .claims
            .values()
            .map(|claim| allocate::Candidate {
                name: claim.vnic.name.clone(),
                weight: if claim.is_wanted { claim.sriov.weight } else { 0 },
                is_eligible: claim.is_eligible(now, nic_is_well),
                path: claim.lifecycle.path(),
                since: claim.lifecycle.since(),
            })
            .collect();
        let held: BTreeSet<VfIndex> = self
            .claims
            .values()
            .filter_map(|claim| claim.lifecycle.vf())
            .chain(self.orphans.values().map(|held| VfIndex(held.vf)))
            .collect();
        let mut free: Vec<Vf> = self
            .vfs
            .iter()
            .filter(|vf| !held.contains(&vf.index))
            .filter(|vf| self.clean.contains(&vf.index) || usage::occupant(vf).is_none())
            .cloned()
            .collect();
        let decision =
            allocate(&candidates, free.len() + held.len() - self.orphans.len(), Hysteresis::default(), now);
        for name in decision.revokes {
            let reason = match self.claims.get(&name) {
                Some(Claim { hold: Some(hold), .. }) => hold.reason.clone(),
                Some(claim) if claim.is_wanted && claim.placed.is_ok() => {
                    "another vNIC weighs more".to_owned()
                }
                _ => "it may not have one".to_owned(),
            };
            self.send(now, &name, Event::Revoke(reason));
        }
        for name in decision.grants {
            // A VF that cannot be cleaned is somebody's who knows more; the next one may do.
            while let Some(vf) = (!free.is_empty()).then(|| free.remove(0)) {
                match self.ensure_clean(vf.index) {
                    Ok(()) => {
                        self.grant(now, &name, vf);
                        break;
                    }
                    Err(error) => {
                        self.note(Severity::Warning, format!("{} is not granted: {error}", vf.index))
                    }
                }
            }
        }
    }

    pub(super) fn ensure_clean(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        if !self.clean.contains(&vf) {
            execute(self.parts.nic.eswitch(), &Action::Clean(vf)).unwrap_or(Ok(()))?;
            self.clean.insert(vf);
        }
        Ok(())
    }

    pub(super) fn grant(&mut self, now: u64, name: &str, vf: Vf) {
        let representors = match self.parts.nic.representors() {
            Ok(representors) => representors,
            Err(error) => return self.note(Severity::Warning, format!("vnic/{name}: {error}")),
        };
        let representor =
            representors.and_then(|found| found.vfs.get(&vf.index).map(|port| port.netdev.clone()));
        let index = vf.index;
        let Some(claim) = self.claims.get_mut(name) else { return };
        let Ok(program) = claim.placed.clone() else { return };
        if let Some(sriov) = wanted_sriov(&self.world.config, name)
            && sriov.attach != claim.sriov.attach
        {
            claim.sriov = sriov.clone();
            claim.plug = (self.parts.plugs)(name, &claim.sriov.attach);
        }
        self.parts.nic.use_vf_driver(index, claim.sriov.attach.driver());
        claim.vf = Some(vf);
        claim.dark_since = None;
        claim.backing = Some(Backing { representor, in_use: false });
        claim.program = Some(program.clone());
        self.clean.remove(&index);
        self.keep_books();
        self.send(now, name, Event::Grant { vf: index, program });
    }
}
