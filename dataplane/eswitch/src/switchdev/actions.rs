//! What a flower rule does, as netlink attributes and back: linux/tc_act/tc_{gact,vlan,mirred}.h and `struct tc_police`
//! of linux/pkt_cls.h.

use std::collections::BTreeMap;

use sluice_policy::config::Rate;
use sluice_policy::net::VlanId;
use sluice_policy::placement::{FlowerAction, RulePort, Target, VfIndex, VlanProtocol};

use crate::netlink::attr::{Attributes, Read, u32_at};

use super::cookie::{self, Cookie};
use super::layout::Layout;

const ACT_KIND: u16 = 1;
const ACT_OPTIONS: u16 = 2;
const ACT_STATS: u16 = 4;
const ACT_COOKIE: u16 = 6;
/// linux/gen_stats.h: bytes and packets; the queue's counters; packets beyond 32 bits.
const STATS_BASIC: u16 = 1;
const STATS_QUEUE: u16 = 3;
const STATS_PACKETS: u16 = 8;
/// The parameters of gact, vlan and mirred.
const PARMS: u16 = 2;
const VLAN_PUSH_ID: u16 = 3;
const VLAN_PUSH_PROTOCOL: u16 = 4;
const VLAN_PUSH_PRIORITY: u16 = 6;
const POLICE_TBF: u16 = 1;
const POLICE_RATE: u16 = 2;
const POLICE_RESULT: u16 = 5;
const POLICE_RATE64: u16 = 8;

const TC_ACT_SHOT: u32 = 2;
const TC_ACT_PIPE: u32 = 3;
const TC_ACT_STOLEN: u32 = 4;
const TC_ACT_TRAP: u32 = 8;
const TC_ACT_GOTO_CHAIN: u32 = 0x2000_0000;
const TC_ACT_CHAIN_MASK: u32 = 0x0fff_ffff;
const VLAN_POP: u32 = 1;
const VLAN_PUSH: u32 = 2;
const MIRRED_REDIRECT: u32 = 1;

/// Length of `struct tc_police`.
const POLICE: usize = 56;
/// Length of the rate table, which the kernel wants and does not use.
const RATE_TABLE: usize = 1024;
/// Makes the table's cells, and with them the longest frame, large enough for any super-frame; 0 is refused.
const CELL_LOG: u8 = 16;
/// `TC_LINKLAYER_ETHERNET`.
const ETHERNET: u8 = 1;
/// The kernel's clock for bursts ticks every 64 ns (`PSCHED_SHIFT`).
const TICK_NS: u128 = 64;

/// What the names in a rule stand for.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    /// Interface of the uplink's representor.
    pub(super) uplink: u32,
    /// Interfaces of the VFs' representors.
    pub(super) vfs: BTreeMap<VfIndex, u32>,
    /// The tag.
    pub(super) cookie: Cookie,
    /// Interface of the VF's own representor; 0 if it is gone.
    pub(super) own: u32,
    /// Which of the program's representors the rule is on.
    pub(super) port: RulePort,
    /// Where its chains are.
    pub(super) layout: Layout,
}

impl Scope {
    /// The number of the bucket that police actions of a rate share. The kernel numbers buckets of all interfaces
    /// together and removes them some time after their rules: one of another rate must not be met by its number, so
    /// the number is drawn from all of this. What the kernel numbers itself has small numbers.
    pub(super) fn bucket(&self, rate: Rate) -> u32 {
        let port = match self.port {
            RulePort::Own => 0,
            RulePort::Uplink => 1,
        };
        let words = [u64::from(self.own), port, rate.bits_per_second, rate.burst_bytes];
        // FNV-1a.
        let hash = words
            .into_iter()
            .flat_map(u64::to_be_bytes)
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        hash | 1 << 31
    }

    fn ifindex(&self, target: Target) -> Option<u32> {
        match target {
            Target::Uplink => Some(self.uplink),
            Target::Vf(vf) => self.vfs.get(&vf).copied(),
        }
    }

    fn target(&self, ifindex: u32) -> Option<Target> {
        if ifindex == self.uplink {
            return Some(Target::Uplink);
        }
        self.vfs.iter().find(|(_, other)| **other == ifindex).map(|(vf, _)| Target::Vf(*vf))
    }
}

/// The actions, numbered from 1; `None` if one of them leads to a VF or a chain that does not exist.
pub(super) fn encode(actions: &[FlowerAction], scope: &Scope) -> Option<Attributes> {
    let mut list = Attributes::default();
    for (number, action) in (1..).zip(actions) {
        let (kind, options) = encode_one(action, scope)?;
        let cookie = match action {
            FlowerAction::Police(rate) => cookie::encode_rate(*rate),
            _ => scope.cookie.encode(),
        };
        let action =
            Attributes::default().text(ACT_KIND, kind).nest(ACT_OPTIONS, &options).put(ACT_COOKIE, &cookie);
        list = list.nest(number, &action);
    }
    Some(list)
}

fn encode_one(action: &FlowerAction, scope: &Scope) -> Option<(&'static str, Attributes)> {
    let gact = |control: u32| ("gact", Attributes::default().put(PARMS, &generic(control, &[])));
    let vlan = |operation: u32| Attributes::default().put(PARMS, &generic(TC_ACT_PIPE, &[operation]));
    Some(match action {
        FlowerAction::Drop => gact(TC_ACT_SHOT),
        FlowerAction::Trap => gact(TC_ACT_TRAP),
        FlowerAction::Goto(chain) => gact(TC_ACT_GOTO_CHAIN | scope.layout.real_chain(*chain)?),
        FlowerAction::Redirect(target) => {
            let parms = generic(TC_ACT_STOLEN, &[MIRRED_REDIRECT, scope.ifindex(*target)?]);
            ("mirred", Attributes::default().put(PARMS, &parms))
        }
        FlowerAction::VlanPop => ("vlan", vlan(VLAN_POP)),
        FlowerAction::VlanPush { protocol, vid, priority } => (
            "vlan",
            vlan(VLAN_PUSH)
                .put(VLAN_PUSH_ID, &vid.get().to_ne_bytes())
                .put(VLAN_PUSH_PROTOCOL, &protocol.tpid().to_be_bytes())
                .put(VLAN_PUSH_PRIORITY, &[*priority]),
        ),
        FlowerAction::Police(rate) => ("police", encode_police(*rate, scope.bucket(*rate))),
    })
}

/// `tc_gen`, which begins the parameters of most actions, and what follows it.
fn generic(control: u32, rest: &[u32]) -> Vec<u8> {
    [&[0, 0, control, 0, 0], rest].concat().into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// Drops what is over the rate and lets the rest go on: the one form that NICs take.
fn encode_police(rate: Rate, bucket: u32) -> Attributes {
    let (bytes_per_second, burst) = rounded(rate);
    let mut parms = Vec::with_capacity(POLICE);
    for word in [bucket, TC_ACT_SHOT, 0, burst, 0] {
        parms.extend(word.to_ne_bytes());
    }
    // struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate.
    parms.extend([CELL_LOG, ETHERNET, 0, 0, 0, 0, 0, 0]);
    let narrow = u32::try_from(bytes_per_second).unwrap_or(u32::MAX);
    parms.extend(narrow.to_ne_bytes());
    parms.resize(POLICE, 0);
    let mut options = Attributes::default().put(POLICE_TBF, &parms).put(POLICE_RATE, &[0; RATE_TABLE]);
    if bytes_per_second > u64::from(narrow) {
        options = options.put(POLICE_RATE64, &bytes_per_second.to_ne_bytes());
    }
    options.put(POLICE_RESULT, &TC_ACT_PIPE.to_ne_bytes())
}

/// Bytes per second, and the burst in the kernel's ticks.
fn rounded(rate: Rate) -> (u64, u32) {
    let bytes_per_second = (rate.bits_per_second / 8).max(1);
    let ticks = u128::from(rate.burst_bytes) * 1_000_000_000 / u128::from(bytes_per_second) / TICK_NS;
    (bytes_per_second, u32::try_from(ticks).unwrap_or(u32::MAX))
}

/// How many frames came to the last action; and how many a bucket dropped, which its other rules' actions say too.
pub(super) fn frames(list: &Read<'_>) -> (u64, u64) {
    fn stats(action: &[u8]) -> Read<'_> {
        Read::new(action).nested(ACT_STATS)
    }
    let last = list.values().last().map_or(0, |action| {
        let stats = stats(action);
        let narrow = stats.get(STATS_BASIC).and_then(|basic| u32_at(basic, 8)).map(u64::from);
        stats.u64(STATS_PACKETS).or(narrow).unwrap_or(0)
    });
    let is_police = |action: &&[u8]| Read::new(action).text(ACT_KIND).as_deref() == Some("police");
    let dropped = list.values().filter(is_police).filter_map(|action| {
        stats(action).get(STATS_QUEUE).and_then(|queue| u32_at(queue, 8)).map(u64::from)
    });
    (last, dropped.max().unwrap_or(0))
}

/// Our tag, if any of the actions bears it.
pub(super) fn cookie(list: &Read<'_>) -> Option<Cookie> {
    list.values().find_map(|action| Cookie::decode(Read::new(action).get(ACT_COOKIE)?))
}

/// The actions that the kernel holds, if we could have written them.
pub(super) fn decode(list: &Read<'_>, scope: &Scope) -> Option<Vec<FlowerAction>> {
    list.values().map(|action| decode_one(&Read::new(action), scope)).collect()
}

fn decode_one(action: &Read<'_>, scope: &Scope) -> Option<FlowerAction> {
    let options = action.nested(ACT_OPTIONS);
    let parms = options.get(PARMS).unwrap_or_default();
    // The words after `tc_gen`, of which the third is what happens then.
    let (control, first, second) = (u32_at(parms, 8), u32_at(parms, 20), u32_at(parms, 24));
    match (action.text(ACT_KIND)?.as_str(), control) {
        ("gact", Some(TC_ACT_SHOT)) => Some(FlowerAction::Drop),
        ("gact", Some(TC_ACT_TRAP)) => Some(FlowerAction::Trap),
        ("gact", Some(control)) if control & !TC_ACT_CHAIN_MASK == TC_ACT_GOTO_CHAIN => {
            scope.layout.chain(control & TC_ACT_CHAIN_MASK).map(FlowerAction::Goto)
        }
        ("mirred", Some(TC_ACT_STOLEN)) if first == Some(MIRRED_REDIRECT) => {
            scope.target(second?).map(FlowerAction::Redirect)
        }
        ("vlan", Some(TC_ACT_PIPE)) if first == Some(VLAN_POP) => Some(FlowerAction::VlanPop),
        ("vlan", Some(TC_ACT_PIPE)) if first == Some(VLAN_PUSH) => Some(FlowerAction::VlanPush {
            protocol: match options.be16(VLAN_PUSH_PROTOCOL)? {
                0x8100 => VlanProtocol::Dot1q,
                0x88a8 => VlanProtocol::Dot1ad,
                _ => return None,
            },
            vid: VlanId::new(options.u16(VLAN_PUSH_ID)?.into()).ok()?,
            priority: options.u8(VLAN_PUSH_PRIORITY).unwrap_or(0),
        }),
        ("police", _) => decode_police(action, &options, scope).map(FlowerAction::Police),
        _ => None,
    }
}

fn decode_police(action: &Read<'_>, options: &Read<'_>, scope: &Scope) -> Option<Rate> {
    let parms = options.get(POLICE_TBF)?;
    let rate = cookie::decode_rate(action.get(ACT_COOKIE)?)?;
    let (bytes_per_second, burst) = rounded(rate);
    let found = options.u64(POLICE_RATE64).or_else(|| u32_at(parms, 28).map(u64::from));
    let is_ours = u32_at(parms, 0) == Some(scope.bucket(rate))
        && u32_at(parms, 4) == Some(TC_ACT_SHOT)
        && u32_at(parms, 12) == Some(burst)
        && found == Some(bytes_per_second)
        && options.u32(POLICE_RESULT) == Some(TC_ACT_PIPE);
    is_ours.then_some(rate)
}
