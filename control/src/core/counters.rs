//! What is read from the live tables: counters, addresses, drops, and traces.

use std::collections::BTreeMap;

use sluice_pipeline::tables::port_flag;
use sluice_policy::config::AclRule;
use sluice_policy::image::Behind;
use sluice_policy::lower;
use sluice_proto::v1;

use super::Core;
use crate::convert::{self, Spec};
use crate::error::Error;
use crate::resource::{Key, Kind};
use crate::trace::{self, Surroundings};

impl Core {
    /// Counters of ports and rules.
    ///
    /// # Errors
    /// If the vNIC does not exist, or the tables cannot be read.
    pub fn stats(&self, request: &v1::GetStatsRequest) -> Result<v1::GetStatsResponse, Error> {
        let only = if request.vnic.is_empty() { None } else { Some(self.vnic(&request.vnic)?) };
        let port = only.map(|vnic| lower::vnic_port(&vnic.name));
        let mut answer = v1::GetStatsResponse::default();
        for (name, id) in &self.state.ids.ports.by_name {
            let is_absent_vf = name.starts_with("vf/") && !self.image.ports.contains_key(id);
            if is_absent_vf || port.as_ref().is_some_and(|port| port != name) {
                continue;
            }
            let stats = self.engine.port_stats(*id)?;
            let dropped = self.engine.drops(*id)?.into_iter().map(|(_, packets)| packets).sum();
            answer.ports.push(v1::PortCounters {
                port: name.clone(),
                rx_packets: stats.rx_packets,
                rx_bytes: stats.rx_bytes,
                tx_packets: stats.tx_packets,
                tx_bytes: stats.tx_bytes,
                flooded: stats.flooded,
                learn_limited: stats.learn_limited,
                fdb_full: stats.fdb_full,
                cache_misses: stats.cache_misses,
                dropped,
            });
        }
        let wanted = |group: &str| {
            only.is_none_or(|vnic| {
                group == lower::own_group(&vnic.name)
                    || vnic.policy.acl.groups.iter().any(|name| group == lower::shared_group(name))
            })
        };
        let mut rules: Vec<(String, &AclRule, u32)> = Vec::new();
        for (group, list) in self.rules() {
            if wanted(&group) {
                rules.extend(list.iter().filter_map(|rule| {
                    let id = self.state.ids.rules.get(&lower::rule_name(&group, rule))?;
                    Some((group.clone(), rule, id))
                }));
            }
        }
        let counters: Vec<u32> = rules.iter().map(|(_, _, id)| *id).collect();
        let stats = self.engine.rule_stats(&counters)?;
        for ((group, rule, _), stats) in rules.into_iter().zip(stats) {
            if only.is_some() || stats.packets > 0 {
                let rule = Some(convert::rule(rule));
                answer.rules.push(v1::RuleCounters {
                    group,
                    rule,
                    packets: stats.packets,
                    bytes: stats.bytes,
                });
            }
        }
        let wanted = |counters: &&v1::VfCounters| only.is_none_or(|vnic| vnic.name == counters.vnic);
        let frames = self.engine.frames().filter(|_| only.is_none());
        answer.frames = frames.map(|frames| v1::FrameCounters { total: frames.total, in_use: frames.in_use });
        answer.vfs = self.vfs.counters().filter(wanted).cloned().collect();
        Ok(answer)
    }

    /// Every group's key and rules, vNICs' own rules included.
    fn rules(&self) -> impl Iterator<Item = (String, &[AclRule])> {
        self.state.resources.values().filter_map(|entry| match entry.spec.as_ref() {
            Spec::AclGroup(group) => Some((lower::shared_group(&group.name), group.rules.as_slice())),
            Spec::Vnic(vnic) => Some((lower::own_group(&vnic.name), vnic.policy.acl.rules.as_slice())),
            Spec::Switch(_) => None,
        })
    }

    fn vnic(&self, name: &str) -> Result<&sluice_policy::config::Vnic, Error> {
        let key = Key::new(Kind::Vnic, name);
        match self.state.resources.get(&key).map(|entry| entry.spec.as_ref()) {
            Some(Spec::Vnic(vnic)) => Ok(vnic),
            _ => Err(Error::no_such(&key)),
        }
    }

    /// Static and learnt addresses.
    ///
    /// # Errors
    /// If the switch does not exist, or the table cannot be read.
    pub fn fdb(&self, request: &v1::GetFdbRequest) -> Result<v1::GetFdbResponse, Error> {
        let key = Key::new(Kind::Switch, &request.switch);
        if !request.switch.is_empty() && !self.state.resources.contains_key(&key) {
            return Err(Error::no_such(&key));
        }
        let names = |space: &BTreeMap<String, u32>| -> BTreeMap<u32, String> {
            space.iter().map(|(name, id)| (*id, name.clone())).collect()
        };
        let (switches, ports) =
            (names(&self.state.ids.switches.by_name), names(&self.state.ids.ports.by_name));
        let name = |names: &BTreeMap<u32, String>, id: u32| {
            names.get(&id).cloned().unwrap_or_else(|| format!("unknown ({id})"))
        };
        let mut entries: Vec<v1::FdbEntry> = self
            .image
            .macs
            .iter()
            .map(|(key, port)| v1::FdbEntry {
                switch: name(&switches, key.switch.into()),
                mac: sluice_policy::net::MacAddr(key.mac).to_string(),
                port: name(&ports, *port),
                permanent: true,
                ..v1::FdbEntry::default()
            })
            .collect();
        entries.extend(self.engine.fdb()?.into_iter().map(|row| v1::FdbEntry {
            switch: name(&switches, row.switch),
            vlan: row.vlan.vid().into(),
            service_vlan: row.vlan.is_service(),
            mac: row.mac.to_string(),
            port: name(&ports, row.port),
            permanent: false,
            age_seconds: row.age_seconds,
        }));
        entries.retain(|entry| request.switch.is_empty() || entry.switch == request.switch);
        entries.sort_by(|a, b| (&a.switch, a.vlan, &a.mac).cmp(&(&b.switch, b.vlan, &b.mac)));
        Ok(v1::GetFdbResponse { entries })
    }

    /// Drop counters that are not zero.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub fn drops(&self) -> Result<v1::GetDropsResponse, Error> {
        let ports = self.state.ids.ports.by_name.iter().map(|(name, id)| (name.as_str(), *id));
        let mut drops = Vec::new();
        for (port, id) in ports.chain([("unknown", 0)]) {
            for (reason, packets) in self.engine.drops(id)? {
                drops.push(v1::DropCounter {
                    port: port.to_owned(),
                    reason: reason.name().to_owned(),
                    description: reason.describe().to_owned(),
                    packets,
                });
            }
        }
        Ok(v1::GetDropsResponse { drops })
    }

    /// Takes a frame through the oracle and the live tables, without sending it.
    ///
    /// # Errors
    /// If the port does not exist, or has not been programmed.
    pub fn trace(&self, request: &v1::TraceRequest) -> Result<v1::TraceResponse, Error> {
        // Nobody sends on a trunk: a trace from a vNIC passes over it.
        let is_trunk = |id: &u32| self.image.ports.get(id).is_some_and(|port| port.behind == Behind::UserTap);
        let Some(id) = self.state.ids.ports.get(&request.port).filter(|id| !is_trunk(id)) else {
            return Err(Error::NotFound(vec![v1::Violation {
                resource: request.port.clone(),
                field: String::new(),
                message: "there is no such port; ports are vnic/NAME, uplink/SWITCH and internal/SWITCH"
                    .to_owned(),
                code: v1::violation::Code::NotFound.into(),
            }]));
        };
        let live = self.engine.trace(id, &request.frame);
        let unattached =
            self.image.ports.values().filter(|port| port.config.flags & port_flag::ATTACHED == 0);
        let around = Surroundings {
            config: &self.config,
            ids: &self.state.ids,
            fdb: self.engine.fdb()?,
            unattached: unattached.map(|port| port.name.clone()).collect(),
            backings: self.backings.clone(),
        };
        Ok(trace::compare(&around, &request.port, &request.frame, &live))
    }
}
