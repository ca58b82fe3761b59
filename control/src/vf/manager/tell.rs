//! Telling: statuses, events, and what planning needs to know.

use super::*;

impl Manager {
    pub(super) fn surroundings(&self, now: u64) -> Surroundings<'_> {
        Surroundings {
            pf: self.parts.nic.netdev(),
            trouble: self.trouble.as_deref(),
            capabilities: &self.capabilities,
            timing: self.parts.timing,
            now,
            epoch: self.parts.epoch,
        }
    }

    /// Notes that a vNIC has changed its path.
    pub(super) fn tell_path(&mut self, name: &str) {
        let Some(claim) = self.claims.get_mut(name) else { return };
        let now_told = (claim.lifecycle.path(), claim.lifecycle.reason().to_owned());
        if now_told.0 == claim.told.0 {
            return;
        }
        let text =
            format!("vnic/{name}: {} -> {}: {}", path_name(claim.told.0), path_name(now_told.0), now_told.1);
        let severity = match (claim.told.0, now_told.0) {
            (Path::Hardware, Path::Draining) if claim.hold.is_none() && claim.is_wanted => Severity::Warning,
            _ => Severity::Info,
        };
        claim.told = now_told;
        self.has_moved = true;
        self.note(severity, text);
    }

    pub(super) fn tell(&mut self, now: u64) {
        let around = self.surroundings(now);
        let paths: BTreeMap<String, v1::PathStatus> =
            self.claims.iter().map(|(name, claim)| (name.clone(), claim.status(&around))).collect();
        let nic = self.nic_status();
        let told = Told { paths, nic, revision: self.world.revision, counters: self.counters.clone() };
        if self.events.is_empty() && self.told.as_ref() == Some(&told) {
            return;
        }
        let Told { paths, nic, revision, counters } = told.clone();
        self.told = Some(told);
        let outlook = Outlook {
            capabilities: self.trouble.is_none().then(|| self.found()),
            neighbours: self.neighbours.clone(),
            programs: self
                .claims
                .keys()
                .filter_map(|name| Some((name.clone(), self.program_of(name)?)))
                .collect(),
        };
        let events = std::mem::take(&mut self.events);
        let switch = self.parts.switch.clone();
        self.parts.software.report(Report { switch, revision, paths, nic, counters, outlook, events });
    }

    pub(super) fn nic_status(&self) -> v1::NicStatus {
        let nic = &self.parts.nic;
        let identity = nic.identity();
        v1::NicStatus {
            pf: nic.netdev().to_owned(),
            driver: identity.driver.clone(),
            firmware: identity.firmware.clone(),
            mode: match nic.mode() {
                Mode::Legacy => "legacy".to_owned(),
                Mode::Switchdev => "switchdev".to_owned(),
            },
            vfs: u32::try_from(self.vfs.len()).unwrap_or(u32::MAX),
            vfs_used: u32::try_from(
                self.claims.values().filter(|claim| claim.lifecycle.vf().is_some()).count(),
            )
            .unwrap_or(u32::MAX),
            capabilities: if self.trouble.is_none() {
                knowledge::to_proto(&self.capabilities)
            } else {
                Vec::new()
            },
            foreign: self.foreign.clone(),
            message: self.trouble.clone().unwrap_or_default(),
            writes: nic.writes(),
        }
    }

    /// What the VFs in use have carried.
    pub(super) fn vf_counters(&mut self) -> Vec<v1::VfCounters> {
        let held: Vec<(String, VfIndex)> = self
            .claims
            .iter()
            .filter(|(_, claim)| is_in_use(claim))
            .filter_map(|(name, claim)| Some((name.clone(), claim.lifecycle.vf()?)))
            .collect();
        held.into_iter()
            .filter_map(|(vnic, vf)| {
                let stats = self.parts.nic.eswitch().stats(vf).ok()?;
                Some(v1::VfCounters {
                    vnic,
                    rx_packets: stats.from_vm_frames,
                    rx_bytes: stats.from_vm_bytes,
                    tx_packets: stats.to_vm_frames,
                    tx_bytes: stats.to_vm_bytes,
                    rx_dropped: stats.from_vm_dropped,
                    tx_dropped: stats.to_vm_dropped,
                })
            })
            .collect()
    }
}
