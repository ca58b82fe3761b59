//! Reading counters, and keeping the FDB young.

use std::collections::BTreeMap;

use sluice_pipeline::tables::{PORTS_MAX, PortStats, RuleStats};
use sluice_pipeline::{DropReason, REASONS_MAX};
use sluice_policy::net::MacAddr;

use crate::maps::Maps;
use crate::sync::Mirror;
use crate::{EngineError, FdbRow, FdbSweep, syscall};

/// The clock of FDB entries.
fn now_seconds() -> u32 {
    (syscall::monotonic_nanoseconds() / 1_000_000_000) as u32
}

pub(crate) fn fdb(maps: &Maps) -> Result<Vec<FdbRow>, EngineError> {
    let entries = maps.fdb.dump()?;
    let now = now_seconds();
    let mut rows: Vec<FdbRow> = entries
        .into_iter()
        .map(|(key, entry)| FdbRow {
            switch: key.switch,
            vlan: key.vlan,
            mac: MacAddr(key.mac),
            port: entry.port,
            // An entry refreshed since the clock was read is not 136 years old.
            age_seconds: now.saturating_sub(entry.seen),
        })
        .collect();
    rows.sort_by_key(|row| (row.switch, row.vlan, row.mac));
    Ok(rows)
}

pub(crate) fn age_fdb(maps: &Maps, mirror: &Mirror) -> Result<FdbSweep, EngineError> {
    let counts = maps.learnt.dump()?;
    let entries = maps.fdb.dump()?;
    let now = now_seconds();
    let mut sweep = FdbSweep::default();
    let mut old = Vec::new();
    for (key, entry) in entries {
        let ageing = mirror.switches.get(&key.switch).map_or(0, |switch| switch.ageing_seconds);
        if now.saturating_sub(entry.seen) > ageing || !mirror.ports.contains_key(&entry.port) {
            old.push(key);
        } else {
            sweep.live += 1;
            *sweep.by_port.entry(entry.port).or_default() += 1;
        }
    }
    sweep.removed = old.len();
    maps.fdb.remove_all(&old)?;
    // Programs count what they learn, and user space cannot subtract from a number that they are adding to: a port
    // that is learning right now is corrected by a later sweep. One at its limit learns nothing.
    let mut corrections = Vec::new();
    for ((port, before), (_, after)) in counts.into_iter().zip(maps.learnt.dump()?) {
        let counted = sweep.by_port.get(&port).copied().unwrap_or(0);
        if before == after && after != counted {
            corrections.push((port, counted));
        }
    }
    maps.learnt.set_all(&corrections)?;
    Ok(sweep)
}

pub(crate) fn all_port_stats(
    maps: &Maps,
    ports: impl ExactSizeIterator<Item = u32>,
) -> Result<BTreeMap<u32, PortStats>, EngineError> {
    // One by one costs less than the whole array as long as there are few ports.
    if ports.len() < PORTS_MAX as usize / 8 {
        return ports.map(|port| Ok((port, maps.port_stats.get(port)?))).collect();
    }
    let all = maps.port_stats.dump()?;
    Ok(ports.filter_map(|port| Some((port, *all.get(port as usize)?))).collect())
}

pub(crate) fn drops(maps: &Maps, port: u32) -> Result<Vec<(DropReason, u64)>, EngineError> {
    let mut drops = Vec::new();
    for reason in DropReason::ALL {
        let count = maps.drops.get(port * REASONS_MAX + *reason as u32)?;
        if count > 0 {
            drops.push((*reason, count));
        }
    }
    Ok(drops)
}

pub(crate) fn all_drops(maps: &Maps) -> Result<BTreeMap<u32, Vec<(DropReason, u64)>>, EngineError> {
    let mut drops: BTreeMap<u32, Vec<(DropReason, u64)>> = BTreeMap::new();
    for (index, count) in maps.drops.dump()?.into_iter().enumerate() {
        let (port, reason) = (index as u32 / REASONS_MAX, index as u32 % REASONS_MAX);
        if let (1.., Some(reason)) = (count, DropReason::from_number(reason as u8)) {
            drops.entry(port).or_default().push((reason, count));
        }
    }
    Ok(drops)
}

pub(crate) fn rule_stats(maps: &Maps, counters: &[u32]) -> Result<Vec<RuleStats>, EngineError> {
    /// From so many on, one batched read of all is cheaper.
    const MANY: usize = 4096;
    if counters.len() < MANY {
        return counters.iter().map(|counter| maps.rule_stats.get(*counter)).collect();
    }
    let all = maps.rule_stats.dump()?;
    Ok(counters.iter().map(|counter| all.get(*counter as usize).copied().unwrap_or_default()).collect())
}
