//! Attaching and detaching: the first and the last step of a pass.

use std::collections::BTreeMap;
use std::io;

use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use sluice_pipeline::tables::port_kind;
use sluice_policy::image::PortImage;

use super::Pass;
use super::expedite::Expedited;
use crate::attach::Attached;
use crate::hook::{self, Choice};
use crate::links::{Link, Links};
use crate::loader;
use crate::promisc::Reception;
use crate::syscall::LinkKind;
use crate::{EngineError, HooksInUse, PortState, PortStatus, SyncReport, promisc, vlan_offload};

impl Pass<'_> {
    /// Gives links to ports that took an interface over, and detaches those of ports that are gone or pending.
    pub(super) fn release_links(&mut self, report: &mut SyncReport) -> Result<(), EngineError> {
        let image = self.image;
        let wanted: BTreeMap<&str, u32> = image
            .ports
            .values()
            .filter(|port| port.config.ifindex != 0)
            .map(|port| (port.name.as_str(), port.config.ifindex))
            .collect();
        self.attachments.hand_over(&wanted, self.pins)?;
        let mut unwanted = self.attachments.ports();
        unwanted.retain(|port| !wanted.contains_key(port.as_str()));
        let _expedited = Expedited::for_changes(unwanted.len());
        for port in unwanted {
            for kind in [LinkKind::Xdp, LinkKind::Tcx] {
                if self.attachments.detach(&port, kind, self.pins)? {
                    report.link_changes.push(format!("detached {kind} of {port}"));
                    report.observe_again |= kind == LinkKind::Xdp;
                }
            }
        }
        Ok(())
    }

    /// Attaches every bound port, and says how every port is.
    pub(super) fn attach(
        &mut self,
        links: &Links,
        refused: &BTreeMap<u32, String>,
        report: &mut SyncReport,
    ) -> Result<(), EngineError> {
        let is_new = |port: &&PortImage| {
            let ifindex = port.config.ifindex;
            ifindex != 0 && !self.attachments.is_attached(&port.name, LinkKind::Tcx, ifindex)
        };
        let _expedited = Expedited::for_changes(self.image.ports.values().filter(is_new).count());
        for (id, port) in &self.image.ports {
            let status = match links.by_ifindex(port.config.ifindex) {
                Some(link) => {
                    let mut status = self.attach_port(port, link, report)?;
                    if let Some(error) = refused.get(id) {
                        status.notes.push(format!("XDP cannot redirect to it: {error}"));
                        report.observe_again = true;
                    }
                    status
                }
                None => PortStatus {
                    ifindex: None,
                    state: PortState::Pending { reason: pending_reason(port) },
                    hooks: HooksInUse::Tcx,
                    notes: Vec::new(),
                },
            };
            report.ports.insert(port.name.clone(), status);
        }
        Ok(())
    }

    /// Lets uplinks that are wires receive what is for the VMs.
    pub(super) fn make_promiscuous(
        &mut self,
        links: &Links,
        report: &mut SyncReport,
    ) -> Result<(), EngineError> {
        let wires = || {
            self.image
                .ports
                .values()
                .filter(|port| port.config.kind == port_kind::UPLINK)
                .filter(|port| links.by_ifindex(port.config.ifindex).is_some_and(promisc::is_needed))
        };
        let receiving = |filtered: bool| {
            wires().filter(|port| port.is_filtered == filtered).map(|port| port.config.ifindex).collect()
        };
        // In this order an uplink whose NIC is told what to receive hears groups all the while.
        for (reception, wanted) in [(Reception::Groups, receiving(true)), (Reception::All, receiving(false))]
        {
            let done = promisc::reconcile(reception, &wanted, links, self.pins)?;
            report.link_changes.extend(done);
        }
        Ok(())
    }

    /// Lets interfaces without XDP take tags out of the bytes again.
    pub(super) fn restore_vlan_offload(
        &mut self,
        links: &Links,
        report: &mut SyncReport,
    ) -> Result<(), EngineError> {
        let kept = self
            .image
            .ports
            .values()
            .filter(|port| self.attachments.is_attached(&port.name, LinkKind::Xdp, port.config.ifindex))
            .map(|port| port.config.ifindex)
            .collect();
        report.link_changes.extend(vlan_offload::restore(&kept, links, self.pins)?);
        Ok(())
    }

    fn attach_port(
        &mut self,
        port: &PortImage,
        link: &Link,
        report: &mut SyncReport,
    ) -> Result<PortStatus, EngineError> {
        let mut status = PortStatus {
            ifindex: Some(link.view.ifindex),
            state: PortState::Attached,
            hooks: HooksInUse::Tcx,
            notes: Vec::new(),
        };
        // XDP passes on to TCX what it does not serve, so TCX comes first and goes last.
        if let Err(error) = self.attach_hook(port, link, LinkKind::Tcx, report) {
            status.state = match error.raw_os_error() {
                Some(libc::ENODEV) => {
                    PortState::Pending { reason: format!("{} has just gone", link.view.name) }
                }
                _ => PortState::Failed { error: format!("attaching TCX to {}: {error}", link.view.name) },
            };
            return Ok(status);
        }
        let Choice { mut xdp, notes } = hook::choose(port, link);
        status.notes = notes;
        if !link.view.up {
            let name = &link.view.name;
            status.notes.push(format!("{name} is down: nothing reaches it; `ip link set {name} up`"));
        }
        // Only physical devices have no kind. Virtual ones keep tags where their peers put them.
        if xdp && link.view.kind.is_empty() {
            match vlan_offload::switch_off(link, self.pins) {
                Ok(false) => {}
                Ok(true) => report.link_changes.push(format!(
                    "switched the receive VLAN offload of {} off, which hides tags from XDP",
                    link.view.name
                )),
                Err(error) => {
                    xdp = false;
                    status.notes.push(format!(
                        "XDP refused, TCX serves: {} would hide VLAN tags from it ({error})",
                        link.view.name
                    ));
                }
            }
        }
        if xdp {
            match self.attach_hook(port, link, LinkKind::Xdp, report) {
                Ok(()) => status.hooks = HooksInUse::XdpAndTcx,
                Err(error) => status.notes.push(format!(
                    "XDP refused by {} ({error}){}; TCX serves",
                    link.view.name,
                    match error.raw_os_error() {
                        Some(libc::EBUSY) => ", where another XDP program is attached: remove that",
                        _ => "",
                    }
                )),
            }
        } else if self.attachments.detach(&port.name, LinkKind::Xdp, self.pins)? {
            report.link_changes.push(format!("detached XDP of {}", port.name));
            report.observe_again = true;
        }
        Ok(status)
    }

    fn attach_hook(
        &mut self,
        port: &PortImage,
        link: &Link,
        kind: LinkKind,
        report: &mut SyncReport,
    ) -> io::Result<()> {
        if kind == LinkKind::Tcx
            && !self.attachments.is_attached(&port.name, kind, link.view.ifindex)
            && let Some(id) = foreign_program(&link.view.name)
        {
            return Err(io::Error::other(format!(
                "another Sluice serves this interface (program id {id}); take it out of that one's configuration first"
            )));
        }
        let program = match kind {
            LinkKind::Tcx => &self.loaded.tc,
            LinkKind::Xdp => &self.loaded.xdp,
        };
        let change = match self.attachments.attach(&port.name, link.view.ifindex, kind, program, self.pins)? {
            Attached::Already => return Ok(()),
            Attached::Replaced => format!("replaced the {kind} program of {}", port.name),
            Attached::New => {
                report.observe_again |= kind == LinkKind::Xdp;
                format!("attached {kind} of {} to {}", port.name, link.view.name)
            }
        };
        report.link_changes.push(change);
        Ok(())
    }
}

/// The id of a program like ours on an interface on which we have none: two daemons with different state directories
/// would otherwise take it from each other, and the loser's policy would silently be out of force.
fn foreign_program(netdev: &str) -> Option<u32> {
    let (_, programs) = SchedClassifier::query_tcx(netdev, TcAttachType::Ingress).ok()?;
    programs.iter().find(|program| program.name() == loader::TC.as_bytes()).map(ProgramInfo::id)
}

fn pending_reason(port: &PortImage) -> String {
    if port.config.ifindex == 0 {
        format!("there is no usable interface {}; it is attached as soon as it appears", port.netdev)
    } else {
        format!("{} has just gone; it is attached as soon as it is back", port.netdev)
    }
}
