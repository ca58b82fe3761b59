//! From the interfaces that are there to what lowering wants to know of them.

use sluice_policy::image::Binding;
use sluice_policy::lower::{PortSpec, PortSpecKind};

use crate::links::{Link, Links};
use crate::{Observation, internal};

/// Finds every port's interface.
pub(crate) fn observe(ports: &[PortSpec], links: &Links) -> Observation {
    let mut observation = Observation::default();
    for port in ports {
        match find(port, links) {
            Ok(link) => {
                let binding = Binding {
                    ifindex: link.view.ifindex,
                    peer_redirect: link.view.peer_elsewhere,
                    xdp_target: link.view.xdp_target,
                };
                observation.bindings.insert(port.name.clone(), binding);
                observation.links.insert(port.name.clone(), link.view.clone());
            }
            Err(reason) => drop(observation.absent.insert(port.name.clone(), reason)),
        }
    }
    observation
}

/// The port's interface, or why there is none.
fn find<'a>(port: &PortSpec, links: &'a Links) -> Result<&'a Link, String> {
    if let PortSpecKind::Internal { .. } = port.kind
        && let Some(objection) = internal::objection(links, port)
    {
        return Err(objection);
    }
    if port.kind == PortSpecKind::VhostUser {
        return Err("it is no interface: the userspace engine serves it".to_owned());
    }
    let link = links.by_name(&port.netdev).ok_or_else(|| {
        format!("there is no interface {}; it is attached as soon as it appears", port.netdev)
    })?;
    let (fits, wanted) = match port.kind {
        PortSpecKind::Veth => (link.view.kind == "veth", "a veth"),
        PortSpecKind::Tap | PortSpecKind::UserTap => (link.view.kind == "tun", "a tap"),
        PortSpecKind::Uplink
        | PortSpecKind::Representor
        | PortSpecKind::Internal { .. }
        | PortSpecKind::VhostUser => (true, "anything"),
    };
    if !fits {
        let kind = if link.view.kind.is_empty() { "a physical device" } else { &link.view.kind };
        return Err(format!("{} is not {wanted} but {kind}; name another interface", port.netdev));
    }
    // A TUN device without Ethernet headers has no address.
    if link.view.mac.is_none() {
        return Err(format!(
            "{} has no Ethernet address, so it carries no Ethernet frames; make it a tap, not a tun",
            port.netdev
        ));
    }
    Ok(link)
}
