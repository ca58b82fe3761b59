//! Two guests on a switch, and the outside at the end of a wire.
//!
//! ```text
//! vm1 ═ vhost-user ═╗                                       ╔═ veth ═ out200 (VLAN 7)
//!                   blue ── w0 ══ the wire ══ w1 ── rack ══╣
//! vm2 ═══ tap ══════╝        tags are seen here             ╚═ veth ═ out201 (VLAN 8)
//! ```
//!
//! The outside is behind a switch of its own, as kernels without 802.1Q devices have no other end for a tag. What is on the wire is
//! looked at with a packet socket.

use anyhow::{Result, anyhow};
use sluice_tests::lab::Vm;
use sluice_tests::vm::{Card, Guest};
use sluice_tests::wire::mac_text;
use sluice_tests::{Lab, PATIENCE};

/// The guests' VLAN, and another.
pub(crate) const VLAN: u16 = 7;
pub(crate) const OTHER_VLAN: u16 = 8;
/// The rack's end of the wire.
pub(crate) const WIRE: &str = "w1";
/// Where a guest may be made to serve something more.
pub(crate) const RELAY: u16 = 7001;
/// A port that guests may not reach.
pub(crate) const FORBIDDEN: u16 = 9;

/// What guests may do: pings, and TCP to their services and those of the outside; nothing else comes in, and one port they may not go
/// out to. Rules know no connections, so answers pass by their source port, and only where they do not open one.
const RULES: &str = "aclGroups:
- name: guests
  rules:
  - {priority: 50, direction: TO_VM, match: {ethertype: arp}, action: ALLOW}
  - {priority: 50, direction: TO_VM, match: {ipProto: icmp}, action: ALLOW}
  - {priority: 50, direction: TO_VM, match: {ipProto: icmpv6}, action: ALLOW}
  - {priority: 50, direction: TO_VM, match: {ipProto: tcp, dstPorts: [\"7\", \"5201\", \"7001\"]}, action: ALLOW}
  - {priority: 40, direction: TO_VM, match: {ipProto: tcp, srcPorts: [\"7\", \"5201\"], tcpFlags: ack}, action: ALLOW}
  - {priority: 60, direction: FROM_VM, match: {ipProto: tcp, dstPorts: [\"9\"]}, action: DENY}
";

/// Two guests that have booted, the outside, and who is outside in another VLAN.
pub(crate) struct Setting<'a> {
    pub(crate) lab: &'a Lab,
    /// Attached by vhost-user.
    pub(crate) vm1: Guest<'a>,
    /// Attached by a tap.
    pub(crate) vm2: Guest<'a>,
    pub(crate) out: Vm,
    pub(crate) stranger: Vm,
}

/// The policy of a guest, with further fields.
pub(crate) fn policy(guest: &Guest<'_>, rest: &str) -> String {
    format!(
        "vlan: {{access: {VLAN}}}, ipGuard: [\"{}\", \"{}\"], acl: {{groups: [guests], default: {{toVm: DENY}}{rest}}}",
        guest.ip4(),
        guest.ip6()
    )
}

/// Makes the setting, with the first guest attached as is said, and plays in it. What goes wrong comes with the guests' consoles and
/// the daemon's log.
pub(crate) fn with_guests(card: Card, play: impl FnOnce(&Setting<'_>) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    lab.start()?;
    let setting = Setting::new(&lab, card)?;
    // While the guests are there: afterwards there would be nothing to diagnose.
    setting.boot().and_then(|()| play(&setting)).map_err(|error| {
        anyhow!("{error:#}\n{}\n{}\n{}", setting.vm1.tail(), setting.vm2.tail(), lab.diagnosis())
    })
}

impl<'a> Setting<'a> {
    fn new(lab: &'a Lab, card: Card) -> Result<Setting<'a>> {
        lab.host().run(&["ip", "link", "add", "w0", "type", "veth", "peer", "name", WIRE])?;
        lab.host().run(&["ip", "link", "set", "w0", "up"])?;
        lab.host().run(&["ip", "link", "set", WIRE, "up"])?;
        Ok(Setting {
            lab,
            vm1: Guest::new(lab, 1, card)?,
            vm2: Guest::new(lab, 2, Card::Tap)?,
            out: lab.outside(200)?,
            stranger: lab.outside(201)?,
        })
    }

    fn boot(&self) -> Result<()> {
        let outside = |vm: &Vm, vlan: u16| {
            let (name, port, mac) = (&vm.name, &vm.port, mac_text(vm.mac()));
            format!(
                "- {{name: {name}, switch: rack, attach: {{veth: {port}}}, mac: \"{mac}\", \
                 policy: {{vlan: {{access: {vlan}}}}}}}\n"
            )
        };
        self.lab.sluice().apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: w0}}}}, {{name: rack, uplink: {{netdev: {WIRE}}}}}]\n\
             {RULES}vnics:\n{}{}{}{}",
            self.vm1.vnic(&policy(&self.vm1, "")),
            self.vm2.vnic(&policy(&self.vm2, "")),
            outside(&self.out, VLAN),
            outside(&self.stranger, OTHER_VLAN),
        ))?;
        for guest in [&self.vm1, &self.vm2] {
            guest.switch_on()?;
        }
        for guest in [&self.vm1, &self.vm2] {
            guest.wait_booted()?;
            self.wait_ready(guest)?;
        }
        Ok(())
    }

    /// Waits until the switch serves a guest.
    pub(crate) fn wait_ready(&self, guest: &Guest<'_>) -> Result<()> {
        self.lab.sluice().wait_ready("vnic", &guest.name, PATIENCE)
    }

    /// Wants both guests and the outside to reach each other, each way.
    pub(crate) fn all_reach_each_other(&self) -> Result<()> {
        self.vm1.ping(self.vm2.ip4())?;
        self.vm2.ping(self.vm1.ip4())?;
        self.vm1.ping(self.vm2.ip6())?;
        for guest in [&self.vm1, &self.vm2] {
            guest.ping(self.out.ip4())?;
            sluice_tests::tools::ping(&self.out.netns, &guest.ip4().to_string())?;
        }
        Ok(())
    }
}
