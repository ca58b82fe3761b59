//! The configuration as workers read it: made from an [`Image`] whenever that changes, published as a whole, never changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytemuck::Zeroable;
use foldhash::fast::FixedState;
use hashbrown::{HashMap, HashSet};
use sluice_pipeline::tables::{
    AclGroup, FloodChunk, FloodKey, IpGuardKey, MacKey, PortConfig, RuleEntry, RuleKey, RuleSlot,
    SwitchConfig, TUPLE_CHUNK, TrunkBitmap, Tuple, TupleChunk, port_flag,
};
use sluice_policy::image::{Behind, GroupImage, Image};

use super::egress::Egress;

type Map<K, V> = HashMap<K, V, FixedState>;

/// A port.
#[derive(Debug)]
pub(super) struct PortEntry {
    pub(super) config: PortConfig,
    pub(super) trunk: TrunkBitmap,
    /// The way out; `None` where nothing is attached.
    pub(super) egress: Option<Arc<Egress>>,
    /// Of a trunk: the attached port that is the shorter way to whatever was learnt behind it.
    pub(super) short_cut: Option<u32>,
}

/// A group of rules.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) entry: AclGroup,
    /// By direction.
    pub(super) tuples: [Vec<TupleChunk>; 2],
    pub(super) rules: Map<RuleKey, RuleEntry>,
}

/// All tables that only configuration changes.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Differs between any two that are published.
    pub(super) epoch: u64,
    /// By id.
    pub(super) ports: Vec<Option<PortEntry>>,
    /// By id.
    pub(super) switches: Vec<Option<SwitchConfig>>,
    /// By [`MacKey`], taken as a word: hashed in one step.
    pub(super) macs: Map<u64, u32>,
    pub(super) ip_guard: HashSet<IpGuardKey, FixedState>,
    pub(super) flood: Map<FloodKey, FloodChunk>,
    pub(super) groups: Map<u32, Arc<Group>>,
}

/// A list in which `items` are found by their numbers.
fn dense<T>(items: impl Iterator<Item = (u32, T)>) -> Vec<Option<T>> {
    let mut list = Vec::new();
    for (number, item) in items {
        let number = number as usize;
        if list.len() <= number {
            list.resize_with(number + 1, || None);
        }
        list[number] = Some(item);
    }
    list
}

impl Tables {
    /// Tables that hold `image`, with ports attached as `attached` says. Groups that are as they were in `before` are
    /// taken over from there.
    pub(super) fn new(
        image: &Image,
        attached: &BTreeMap<u32, Arc<Egress>>,
        before: (&Image, &Tables),
        epoch: u64,
    ) -> Tables {
        let uplinks: BTreeMap<u32, u32> = image
            .ports
            .iter()
            .filter(|(id, port)| port.behind == Behind::Uplink && attached.contains_key(id))
            .map(|(id, port)| (port.config.switch, *id))
            .collect();
        let ports = image.ports.iter().map(|(&id, port)| {
            let is_trunk = port.behind == Behind::UserTap;
            let short_cut = uplinks.get(&port.config.switch).copied().filter(|_| is_trunk);
            let egress = attached.get(&id).cloned();
            let mut config = port.config;
            config.flags &= !port_flag::ATTACHED;
            if egress.is_some() {
                config.flags |= port_flag::ATTACHED;
            }
            (id, PortEntry { config, trunk: port.trunk, egress, short_cut })
        });
        let group = |(&id, group): (&u32, &GroupImage)| {
            let known = before.1.groups.get(&id).filter(|_| before.0.groups.get(&id) == Some(group));
            (id, known.cloned().unwrap_or_else(|| Arc::new(Group::new(group))))
        };
        Tables {
            epoch,
            ports: dense(ports),
            switches: dense(image.switches.iter().map(|(&id, switch)| (id, *switch))),
            macs: image.macs.iter().map(|(&key, &port)| (bytemuck::cast::<MacKey, u64>(key), port)).collect(),
            ip_guard: image.ip_guard.iter().copied().collect(),
            flood: image.flood.iter().map(|(&key, &chunk)| (key, chunk)).collect(),
            groups: image.groups.iter().map(group).collect(),
        }
    }

    /// The port that has a static address.
    #[inline(always)]
    pub(super) fn owner(&self, key: &MacKey) -> Option<u32> {
        self.macs.get(&bytemuck::cast::<MacKey, u64>(*key)).copied()
    }

    #[inline(always)]
    pub(super) fn port(&self, id: u32) -> Option<&PortEntry> {
        self.ports.get(id as usize)?.as_ref()
    }
}

impl Group {
    /// Published as a whole, a group needs but one version.
    const VERSION: u32 = 1;

    fn new(image: &GroupImage) -> Group {
        let chunk = |part: &[Tuple]| {
            let mut chunk = TupleChunk { tuples: [Tuple::zeroed(); TUPLE_CHUNK] };
            chunk.tuples[..part.len()].copy_from_slice(part);
            chunk
        };
        let tuples = [0, 1].map(|direction: usize| &image.tuples[direction]);
        let rules = image.rules.iter().map(|(key, rule)| {
            let slot = RuleSlot {
                from: Self::VERSION,
                until: u32::MAX,
                rank: rule.rank,
                counter: rule.counter,
                action: rule.action,
            };
            (*key, RuleEntry { slots: [slot, RuleSlot::EMPTY] })
        });
        Group {
            entry: AclGroup {
                version: Self::VERSION,
                generation: 1,
                tuple_count: tuples.map(|list| list.len() as u32),
            },
            tuples: tuples.map(|list| list.chunks(TUPLE_CHUNK).map(chunk).collect()),
            rules: rules.collect(),
        }
    }
}
