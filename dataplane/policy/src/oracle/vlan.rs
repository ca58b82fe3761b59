//! Stage 5 and tag handling on the way out.

use sluice_pipeline::{DropReason, ethertype};

use super::Domain;
use super::packet::Tag;
use super::ports::{Membership, Port};
use crate::net::{VlanId, VlanRange};

/// Where a frame belongs.
pub(super) struct Classified {
    pub(super) domain: Domain,
    /// Whether the outermost tag has said what it had to say.
    pub(super) strip: bool,
    pub(super) priority: u16,
}

type Refusal = (DropReason, String);

/// The domain of a frame with these tags from this port.
pub(super) fn classify(port: &Port<'_>, tags: &[Tag]) -> Result<Classified, Refusal> {
    let refuse = |reason, text: String| Err((reason, text));
    if let Membership::Tunnel(service) = port.membership {
        if tags.len() > 1 {
            return refuse(DropReason::VlanDepth, "with the service tag there would be three tags".into());
        }
        return Ok(Classified { domain: Domain::Service(service), strip: false, priority: 0 });
    }
    let priority = tags.first().map_or(0, |tag| tag.tci & 0xf000);
    // A tag with VLAN 0 only carries a priority.
    let vid = tags.first().map_or(0, |tag| tag.vid());
    if vid == 0 {
        if tags.len() > 1 {
            let text = "a tag behind a priority tag".to_owned();
            return match port.membership {
                Membership::Access(_) => refuse(DropReason::VlanTagged, text),
                _ => refuse(DropReason::VlanNotAllowed, text),
            };
        }
        let native = match &port.membership {
            Membership::Access(domain) | Membership::All(domain) => Some(*domain),
            Membership::Trunk(_, native) => *native,
            Membership::Tunnel(_) => None,
        };
        return match native {
            Some(domain) => Ok(Classified { domain, strip: !tags.is_empty(), priority }),
            None => refuse(DropReason::VlanUntagged, "untagged, and the trunk has no native VLAN".into()),
        };
    }
    let is_service = tags.first().is_some_and(|tag| tag.tpid == ethertype::STAG);
    let domain = match VlanId::new(u32::from(vid)) {
        Ok(vid) if is_service => Some(Domain::Service(vid)),
        Ok(vid) => Some(Domain::Customer(vid)),
        Err(_) => None,
    };
    match (&port.membership, domain) {
        (Membership::Access(_), _) => refuse(DropReason::VlanTagged, format!("tagged with VLAN {vid}")),
        (Membership::All(_), Some(domain)) => Ok(Classified { domain, strip: true, priority }),
        (Membership::Trunk(allowed, native), Some(domain)) if carries(allowed, *native, domain) => {
            Ok(Classified { domain, strip: true, priority })
        }
        _ => refuse(DropReason::VlanNotAllowed, format!("VLAN {vid} is not carried here")),
    }
}

/// Whether a trunk carries the domain, tagged or not.
fn carries(allowed: &[VlanRange], native: Option<Domain>, domain: Domain) -> bool {
    match domain {
        Domain::Customer(vid) => {
            native == Some(domain) || allowed.iter().any(|range| range.contains(vid.get()))
        }
        Domain::Untagged => native == Some(domain),
        Domain::Service(_) => false,
    }
}

/// The tag that a frame of `domain` gets on its way out, or why it must not leave by this port.
pub(super) fn tag_out(
    port: &Port<'_>,
    domain: Domain,
    priority: u16,
    inner_tags: &[Tag],
) -> Result<Option<Tag>, String> {
    let native = match &port.membership {
        Membership::Access(own) if domain == *own => return Ok(None),
        Membership::Tunnel(own) if domain == Domain::Service(*own) => return Ok(None),
        Membership::All(native) => Some(*native),
        Membership::Trunk(allowed, native) if carries(allowed, *native, domain) => *native,
        _ => return Err(format!("not a member of {domain}")),
    };
    if native == Some(domain) {
        // The next tag would be taken for the frame's VLAN: that is how frames hop from one VLAN to another.
        if !inner_tags.is_empty() {
            return Err(format!("{domain} is untagged here, and the frame has another tag inside"));
        }
        return Ok(None);
    }
    match domain {
        Domain::Customer(vid) => Ok(Some(Tag { tpid: ethertype::CTAG, tci: vid.get() | priority })),
        Domain::Service(vid) => Ok(Some(Tag { tpid: ethertype::STAG, tci: vid.get() | priority })),
        Domain::Untagged => Err("untagged frames are of another VLAN here".into()),
    }
}
