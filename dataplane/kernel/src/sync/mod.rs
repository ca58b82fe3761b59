//! Makes the maps and links equal to an image, writing differences only, in an order in which every moment is sound.
//!
//! What is there is known from a [`Mirror`]: read from the maps once, then kept up with every write. If a pass fails,
//! the mirror is thrown away and read again.
//!
//! The order: ports that go or move (their links, then what leads to them, then themselves) → new rules → tuple lists →
//! groups, each by one write → switches, IP guard, ports (into their idle slot, then one word) → addresses, flood lists →
//! device map → interfaces → epoch → links → what is no longer needed. Whatever a running program may still be looking
//! at is reused or deleted only after a grace period.

mod acl;
mod diff;
mod expedite;
mod links;
mod mirror;
mod ports;

use std::collections::BTreeSet;

use sluice_policy::image::Image;

use crate::attach::Attachments;
use crate::links::Links;
use crate::loader::Loaded;
use crate::pins::Pins;
use crate::{EngineError, MapWrites, SyncReport, syscall};

pub(crate) use expedite::Expedited;
pub(crate) use mirror::Mirror;

/// One pass.
pub(crate) struct Pass<'a> {
    pub(crate) loaded: &'a mut Loaded,
    pub(crate) attachments: &'a mut Attachments,
    pub(crate) pins: &'a Pins,
    pub(crate) mirror: &'a mut Mirror,
    pub(crate) image: &'a Image,
    pub(crate) writes: MapWrites,
}

impl Pass<'_> {
    /// Runs the pass.
    pub(crate) fn run(mut self) -> Result<SyncReport, EngineError> {
        let links = Links::read()?;
        let mut report = SyncReport::default();
        self.attachments.refresh()?;
        self.wait_if_needed();

        let ports_retired = self.retire(&mut report)?;
        let groups = acl::plan(self.mirror, self.image);
        let acl_changed = self.write_groups(&groups)?;
        self.write_switches()?;
        self.add_ip_guard()?;
        let ports_changed = self.write_ports()?;
        let addresses_changed = self.write_addresses()?;
        self.write_flood()?;
        let refused = self.write_devmap()?;
        self.write_port_of()?;
        // Attaching many takes seconds (a grace period each), and what is attached already need not wait for it.
        if acl_changed || ports_retired || ports_changed || addresses_changed {
            self.raise_epoch()?;
        }
        self.remove_ip_guard()?;
        self.attach(&links, &refused, &mut report)?;
        self.make_promiscuous(&links, &mut report)?;
        self.restore_vlan_offload(&links, &mut report)?;
        self.remove_groups(groups)?;
        self.loaded.settle(self.pins)?;

        self.mirror.names = self.image.ports.iter().map(|(id, port)| (*id, port.name.clone())).collect();
        self.mirror.fresh = false;
        report.writes = self.writes;
        Ok(report)
    }

    /// Waits until nobody can see what earlier writes have put out of reach.
    fn wait_if_needed(&mut self) {
        if self.mirror.unsettled {
            syscall::grace_period();
            self.mirror.unsettled = false;
        }
    }

    /// Makes every cached verdict outdated.
    fn raise_epoch(&mut self) -> Result<(), EngineError> {
        let mut globals = self.mirror.globals;
        globals.epoch += 1;
        self.loaded.maps.globals.set(&0, &globals)?;
        self.mirror.globals = globals;
        self.writes.updated(self.loaded.maps.globals.name, 1);
        Ok(())
    }

    /// Writes new rules and tuple lists, then the groups. Says whether any verdict may have changed.
    fn write_groups(&mut self, plans: &[acl::GroupPlan]) -> Result<bool, EngineError> {
        let maps = &self.loaded.maps;
        if !self.mirror.fresh {
            let counters: BTreeSet<u32> =
                plans.iter().flat_map(|plan| plan.new_counters.iter().copied()).collect();
            let counters: Vec<u32> = counters.into_iter().collect();
            maps.rule_stats.reset(&counters)?;
            self.writes.updated(maps.rule_stats.name, counters.len());
        }
        let residue: Vec<_> = plans.iter().flat_map(|plan| plan.residue.iter().copied()).collect();
        maps.acl_rules.remove_all(&residue)?;
        self.writes.deleted(maps.acl_rules.name, residue.len());
        let rules: Vec<_> = plans.iter().flat_map(|plan| plan.rules.iter().copied()).collect();
        maps.acl_rules.set_all(&rules)?;
        self.writes.updated(maps.acl_rules.name, rules.len());
        let tuples: Vec<_> = plans.iter().flat_map(|plan| plan.tuples.iter().copied()).collect();
        maps.acl_tuples.set_all(&tuples)?;
        self.writes.updated(maps.acl_tuples.name, tuples.len());
        let flips: Vec<_> = plans.iter().filter_map(|plan| plan.flip.map(|group| (plan.id, group))).collect();
        maps.acl_groups.set_all(&flips)?;
        self.writes.updated(maps.acl_groups.name, flips.len());
        for plan in plans {
            acl::apply_writes(self.mirror, plan);
        }
        let flipped = !flips.is_empty();
        self.mirror.unsettled |= flipped;
        Ok(flipped || plans.iter().any(|plan| plan.remove_group))
    }

    /// Removes groups that no port refers to any more, and what the groups have outlived.
    fn remove_groups(&mut self, plans: Vec<acl::GroupPlan>) -> Result<(), EngineError> {
        let maps = &self.loaded.maps;
        let groups: Vec<u32> = plans.iter().filter(|plan| plan.remove_group).map(|plan| plan.id).collect();
        maps.acl_groups.remove_all(&groups)?;
        self.writes.deleted(maps.acl_groups.name, groups.len());
        let rules: Vec<_> = plans.iter().flat_map(|plan| plan.outlived_rules.iter().copied()).collect();
        let tuples: Vec<_> = plans.iter().flat_map(|plan| plan.outlived_tuples.iter().copied()).collect();
        if !rules.is_empty() || !tuples.is_empty() || !groups.is_empty() {
            syscall::grace_period();
            self.mirror.unsettled = false;
        }
        let maps = &self.loaded.maps;
        maps.acl_rules.remove_all(&rules)?;
        self.writes.deleted(maps.acl_rules.name, rules.len());
        maps.acl_tuples.remove_all(&tuples)?;
        self.writes.deleted(maps.acl_tuples.name, tuples.len());
        for plan in &plans {
            acl::apply_removals(self.mirror, plan);
        }
        Ok(())
    }
}
