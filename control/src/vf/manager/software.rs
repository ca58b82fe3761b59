//! The software path: what the kernel engine and the PF's filter are told, and the record of it.

use super::*;

impl Manager {
    pub(super) fn backings(&self) -> Backings {
        let mut backings = Backings::default();
        if self.parts.nic.mode() == Mode::Legacy && self.filter.is_some() {
            backings.filtered_uplinks.insert(self.parts.switch.clone());
        }
        for (name, claim) in &self.claims {
            if let Some(backing) = &claim.backing {
                backings.vnics.insert(name.clone(), backing.clone());
            }
        }
        backings
    }

    pub(super) fn set_software(&mut self) -> Result<(), String> {
        let backings = self.backings();
        if self.set.as_ref() != Some(&backings) {
            // Until it has answered, nobody knows what it does.
            self.set = None;
            self.unattached = self.parts.software.set(&self.parts.switch, backings.clone())?;
            self.is_filtered = !backings.filtered_uplinks.is_empty();
            self.set = Some(backings);
            self.keep_books();
        }
        Ok(())
    }

    /// The same for a vNIC whose VF is about to be used: in switchdev mode its representor must be served.
    pub(super) fn serve(&mut self, name: &str) -> Result<(), String> {
        if self.unattached.contains(name) {
            self.set = None;
        }
        self.set_software()?;
        match self.unattached.contains(name) {
            true => Err(format!("the representor of {name}'s VF is not attached (yet)")),
            false => Ok(()),
        }
    }

    /// Has the PF receive what is for vNICs in software: theirs, and the host's own address on the switch. If it cannot be
    /// told, it is to be promiscuous: better that than deaf.
    pub(super) fn keep_filter(&mut self) -> Result<(), String> {
        let kept = self.try_filter();
        if kept.is_err() {
            self.filter = None;
        }
        kept
    }

    fn try_filter(&mut self) -> Result<(), String> {
        if self.parts.nic.mode() != Mode::Legacy || self.claims.is_empty() && self.filter.is_none() {
            self.filter = None;
            return Ok(());
        }
        let Some(switch) = switch_of(&self.world.config, &self.parts.switch) else { return Ok(()) };
        let in_use = |vnic: &&Vnic| {
            let backing = self.claims.get(&vnic.name).and_then(|claim| claim.backing.as_ref());
            backing.is_some_and(|backing| backing.in_use)
        };
        let mut macs: BTreeSet<MacAddr> = self
            .world
            .config
            .vnics
            .iter()
            .filter(|vnic| vnic.switch == switch.name)
            .filter(|vnic| !in_use(vnic))
            .flat_map(Vnic::macs)
            .collect();
        macs.extend(switch.internal.iter().map(|internal| lower::internal_mac(switch, internal)));
        let vlans = vlans_of(&self.world.config, switch);
        if self.vlans.as_ref() != Some(&vlans) {
            let told = self.parts.nic.eswitch().sync_vlans(&vlans);
            told.map_err(|error| format!("{} cannot be told its VLANs: {error}", self.parts.nic.netdev()))?;
            self.vlans = Some(vlans);
        }
        if self.filter.as_ref() == Some(&macs) {
            return Ok(());
        }
        match self.parts.nic.eswitch().sync_unicast_filter(&macs) {
            Ok(()) => {
                self.filter = Some(macs);
                Ok(())
            }
            Err(error) => Err(format!("{} cannot be told what to receive: {error}", self.parts.nic.netdev())),
        }
    }

    /// Writes down who holds what, if that has changed.
    pub(super) fn keep_books(&mut self) {
        let identity = self.parts.nic.identity();
        let held: BTreeMap<String, Held> = self
            .claims
            .iter()
            .filter_map(|(name, claim)| {
                let vf = claim.vf.as_ref()?.index.0;
                let pci = claim.vf.as_ref()?.pci.clone();
                let backing = claim.backing.clone().unwrap_or_default();
                let held = Held { vf, pci, in_use: backing.in_use, representor: backing.representor };
                Some((name.clone(), held))
            })
            .chain(self.orphans.iter().map(|(name, held)| (name.clone(), held.clone())))
            .collect();
        let filter: BTreeSet<String> =
            self.parts.nic.unicast_filter().iter().map(ToString::to_string).collect();
        self.record = Record {
            device: format!("{}/{}", identity.bus, identity.address),
            kind: identity.key(),
            abilities: knowledge::to_record(&self.told_by_nic),
            vfs: self.told_by_nic.max_vfs,
            netdev: self.parts.nic.netdev().to_owned(),
            is_filtered: self.is_filtered,
            filter,
            held,
        };
        if self.record.held.is_empty() && self.record.filter.is_empty() && !self.record.is_filtered {
            self.record = Record::default();
        }
        if self.record != self.written {
            match self.parts.record.write(&self.record) {
                Ok(()) => self.written = self.record.clone(),
                Err(error) => {
                    self.note(
                        Severity::Error,
                        format!("the record of VFs in use cannot be written: {error}"),
                    );
                }
            }
        }
    }
}

/// VLANs in which vNICs of a switch, or the host, may be in software. Service VLANs of tunnels are not filtered by number
/// in any NIC that is known, since their tags are others.
fn vlans_of(config: &Config, switch: &Switch) -> BTreeSet<VlanId> {
    let of_vnics =
        config.vnics.iter().filter(|vnic| vnic.switch == switch.name).map(|vnic| &vnic.policy.vlan);
    let mut vlans = BTreeSet::new();
    for mode in of_vnics.chain(switch.internal.iter().map(|internal| &internal.vlan)) {
        match mode {
            VlanMode::Untagged | VlanMode::Tunnel(_) => {}
            VlanMode::Access(vid) => {
                vlans.insert(*vid);
            }
            VlanMode::Trunk { allowed, native } => {
                vlans.extend(native);
                let numbers = allowed.iter().flat_map(|range| range.first().get()..=range.last().get());
                vlans.extend(numbers.filter_map(|vid| VlanId::new(vid.into()).ok()));
            }
        }
    }
    vlans
}
