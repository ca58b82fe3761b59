//! tc's messages (`struct tcmsg` of linux/rtnetlink.h): the clsact qdisc and the filters on its ingress side.

use sluice_policy::placement::{FlowerRule, RulePort};

use crate::netlink::attr::{Attributes, Read, u32_at};
use crate::netlink::{Connection, Raw, Refusal};

use super::actions::{self, Scope};
use super::cookie::Cookie;
use super::keys;

const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
/// `TCA_FLOWER_ACT`.
pub(super) const ACTIONS: u16 = 3;
/// `TCA_FLOWER_FLAGS`.
pub(super) const FILTER_FLAGS: u16 = 22;
/// `TCA_FLOWER_IN_HW_COUNT`.
pub(super) const IN_HW_COUNT: u16 = 86;

/// `TC_H_CLSACT`, and its ingress side.
const CLSACT: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_fff2;
/// The handle of clsact and ingress.
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Length of `struct tcmsg`.
const TCMSG: usize = 20;

/// `TCA_CLS_FLAGS_*`.
const SKIP_SW: u32 = 1 << 1;
const IN_HW: u32 = 1 << 2;
/// Without it the kernel keeps to itself what the driver says.
const VERBOSE: u32 = 1 << 4;

/// Whether a rule must be in hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// Only there (`skip_sw`): else the driver refuses it and says why.
    Hardware,
    /// In the kernel, and in hardware too if it can. For interfaces without any.
    Anywhere,
}

/// A filter that the kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    ifindex: u32,
    handle: u32,
    protocol: u16,
    kind: String,
    /// In the kernel.
    pub(super) chain: u32,
    /// In the kernel.
    pub(super) priority: u16,
    /// Whether the driver has taken it.
    pub(super) in_hw: bool,
    /// Its tag, if it is ours.
    pub(super) cookie: Option<Cookie>,
    options: Vec<u8>,
}

impl Filter {
    fn read(message: &Raw) -> Option<Filter> {
        let (header, attributes) = message.payload.split_at_checked(TCMSG)?;
        let attributes = Read::new(attributes);
        let (handle, info) = (u32_at(header, 8)?, u32_at(header, 16)?);
        let options = attributes.get(TCA_OPTIONS).unwrap_or_default();
        let flower = Read::new(options);
        let kind = attributes.text(TCA_KIND)?;
        let is_flower = kind == "flower";
        // Each chain and priority has a line without a handle, which is no filter.
        (message.kind == RTM_NEWTFILTER && handle != 0).then(|| Filter {
            ifindex: u32_at(header, 4).unwrap_or(0),
            handle,
            protocol: u16::from_be(info as u16),
            chain: attributes.u32(TCA_CHAIN).unwrap_or(0),
            priority: (info >> 16) as u16,
            in_hw: is_flower && flower.u32(FILTER_FLAGS).is_some_and(|flags| flags & IN_HW != 0),
            cookie: is_flower.then(|| actions::cookie(&flower.nested(ACTIONS))).flatten(),
            kind,
            options: options.to_vec(),
        })
    }

    /// The rule, if it is just as we write them.
    pub(super) fn rule(&self, port: RulePort, scope: &Scope) -> Option<FlowerRule> {
        let chain = scope.layout.chain(self.chain)?;
        Some(FlowerRule {
            port,
            chain,
            priority: scope.layout.priority(chain, self.priority)?,
            matches: keys::decode(self.protocol, &self.options)?,
            actions: actions::decode(&Read::new(&self.options).nested(ACTIONS), scope)?,
        })
    }

    /// See [`actions::frames`].
    pub(super) fn frames(&self) -> (u64, u64) {
        actions::frames(&Read::new(&self.options).nested(ACTIONS))
    }

    /// What to call it: what `tc filter show` prints.
    pub(super) fn name(&self) -> String {
        let Filter { kind, chain, priority, protocol, handle, .. } = self;
        format!("{kind} chain {chain} pref {priority} protocol {protocol:#06x} handle {handle:#x}")
    }
}

/// `struct tcmsg`.
fn header(ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, ifindex, handle, parent, info].into_iter().flat_map(u32::to_ne_bytes).collect()
}

const fn info(priority: u16, protocol: u16) -> u32 {
    (priority as u32) << 16 | protocol.to_be() as u32
}

/// The message that adds a rule; or why it cannot be one.
pub(super) fn encode(
    rule: &FlowerRule,
    ifindex: u32,
    scope: &Scope,
    place: Where,
) -> Result<Vec<u8>, &'static str> {
    let chain = scope.layout.real_chain(rule.chain).ok_or("no such chain")?;
    let priority = scope.layout.real_priority(rule.chain, rule.priority).ok_or("no such priority")?;
    let keys = keys::encode(&rule.matches)?;
    let actions = actions::encode(&rule.actions, scope).ok_or("a VF or chain that does not exist")?;
    let flags = match place {
        Where::Hardware => SKIP_SW | VERBOSE,
        Where::Anywhere => VERBOSE,
    };
    let options = keys.nest(ACTIONS, &actions).put(FILTER_FLAGS, &flags.to_ne_bytes());
    let header = header(ifindex, 0, INGRESS, info(priority, keys::protocol(&rule.matches)));
    Ok(Attributes::after(&header)
        .text(TCA_KIND, "flower")
        .put(TCA_CHAIN, &chain.to_ne_bytes())
        .nest(TCA_OPTIONS, &options)
        .into_bytes())
}

/// Adds a rule.
pub(super) fn add(route: &mut Connection, message: &[u8]) -> Result<(), Refusal> {
    let flags = netlink_packet_core::NLM_F_CREATE | netlink_packet_core::NLM_F_EXCL;
    route.request(RTM_NEWTFILTER, message, flags).map(drop)
}

/// Removes a filter.
pub(super) fn remove(route: &mut Connection, filter: &Filter) -> Result<(), Refusal> {
    let header = header(filter.ifindex, filter.handle, INGRESS, info(filter.priority, filter.protocol));
    let message = Attributes::after(&header)
        .text(TCA_KIND, &filter.kind)
        .put(TCA_CHAIN, &filter.chain.to_ne_bytes())
        .into_bytes();
    route.request(RTM_DELTFILTER, &message, 0).map(drop)
}

/// All filters of an interface's ingress side.
pub(super) fn list(route: &mut Connection, ifindex: u32) -> Result<Vec<Filter>, Refusal> {
    let messages = route.dump(RTM_GETTFILTER, &header(ifindex, 0, INGRESS, 0))?;
    Ok(messages.iter().filter_map(Filter::read).filter(|filter| filter.ifindex == ifindex).collect())
}

/// Whether an interface has the qdisc that filters need: clsact, or its elder brother ingress.
pub(super) fn has_clsact(route: &mut Connection, ifindex: u32) -> Result<bool, Refusal> {
    let messages = route.dump(RTM_GETQDISC, &header(ifindex, 0, 0, 0))?;
    let has_it = |message: &Raw| {
        u32_at(&message.payload, 4) == Some(ifindex) && u32_at(&message.payload, 8) == Some(CLSACT_HANDLE)
    };
    Ok(messages.iter().any(has_it))
}

/// Gives an interface that qdisc.
pub(super) fn add_clsact(route: &mut Connection, ifindex: u32) -> Result<(), Refusal> {
    let header = header(ifindex, CLSACT_HANDLE, CLSACT, 0);
    let message = Attributes::after(&header).text(TCA_KIND, "clsact").into_bytes();
    let flags = netlink_packet_core::NLM_F_CREATE | netlink_packet_core::NLM_F_EXCL;
    route.request(RTM_NEWQDISC, &message, flags).map(drop)
}
