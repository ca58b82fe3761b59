//! Which hooks serve a port: TCX always, XDP in front of it where it wins and does no harm.

use sluice_pipeline::tables::port_kind;
use sluice_policy::config::Hook;
use sluice_policy::image::PortImage;

use crate::links::Link;
use crate::peer::{self, Offloads};

/// What was decided, and what the operator should know about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) xdp: bool,
    pub(crate) notes: Vec<String>,
}

const LOST_CHECKSUMS: &str = "redirected XDP frames lose partial checksums: TCP would stall";

const HIDDEN_TAGS: &str = "XDP takes frames of VLAN devices there for untagged ones";

/// Chooses for a port on this link.
pub(crate) fn choose(port: &PortImage, link: &Link) -> Choice {
    let view = &link.view;
    let is_virtual = matches!(view.kind.as_str(), "veth" | "tun");
    // A bond, a VLAN device and the like: the frames are those of the devices below.
    let is_stacked = !is_virtual && !view.kind.is_empty();
    let refused = |note: String| Choice { xdp: false, notes: vec![note] };
    match port.hook {
        Hook::Tcx => Choice::default(),
        Hook::Auto => {
            let wire = port.config.kind == port_kind::UPLINK && !is_virtual && !is_stacked;
            Choice { xdp: wire && view.native_xdp, notes: Vec::new() }
        }
        Hook::Xdp if !view.native_xdp => {
            refused(format!("XDP refused, TCX serves: the driver of {} has no native XDP", view.name))
        }
        Hook::Xdp if is_stacked => refused(format!(
            "XDP refused, TCX serves: {} is a {}, and the devices below it may take VLAN tags out of frames, which XDP \
             would not see",
            view.name, view.kind
        )),
        Hook::Xdp if !is_virtual => Choice { xdp: true, notes: Vec::new() },
        // Nor will anybody's word do: long frames and super-frames of a tap meet XDP with their headers' claims, which the
        // program cannot see, and a redirect carries them on.
        Hook::Xdp if link.vnet_headers => refused(format!(
            "XDP refused, TCX serves: frames on {} have virtio-net headers, and XDP cannot see what they leave undone; \
             open the tap without them (QEMU: vnet_hdr=off)",
            view.name
        )),
        Hook::Xdp if port.full_checksums => {
            let mut choice = accepted(&view.kind);
            if view.kind == "veth" && peer::offloads(link).is_ok_and(|offloads| offloads.tags) {
                choice.notes.push(format!(
                    "the peer of {} has transmit VLAN offload on: {HIDDEN_TAGS}; run `ethtool -K eth0 txvlan off` in the \
                     guest",
                    view.name
                ));
            }
            choice
        }
        Hook::Xdp if view.kind == "veth" => match peer::offloads(link) {
            Ok(Offloads { checksums: false, tags: false }) => accepted(&view.kind),
            Ok(Offloads { checksums: true, .. }) => refused(format!(
                "XDP refused, TCX serves: the peer of {} has transmit checksum offload on, and {LOST_CHECKSUMS}; \
                 run `ethtool -K eth0 tx off txvlan off` in the guest and set fullChecksums: true",
                view.name
            )),
            Ok(Offloads { tags: true, .. }) => refused(format!(
                "XDP refused, TCX serves: the peer of {} has transmit VLAN offload on, and {HIDDEN_TAGS}; \
                 run `ethtool -K eth0 txvlan off` in the guest",
                view.name
            )),
            Err(reason) => refused(format!(
                "XDP refused, TCX serves: whether {} sends full checksums is unknown ({reason}), and \
                 {LOST_CHECKSUMS} if it does not; run `ethtool -K eth0 tx off txvlan off` in the guest and set \
                 fullChecksums: true",
                view.name
            )),
        },
        Hook::Xdp => refused(format!(
            "XDP refused, TCX serves: nobody attests that the guest on {} sends full checksums, and {LOST_CHECKSUMS} \
             if it does not; run `ethtool -K eth0 tx off` in the guest and set fullChecksums: true",
            view.name
        )),
    }
}

/// XDP on a virtual port, with its price.
fn accepted(kind: &str) -> Choice {
    let notes = match kind {
        "veth" => {
            vec!["XDP turns the guest's TSO off: many small frames cost less, bulk TCP costs more".to_owned()]
        }
        _ => Vec::new(),
    };
    Choice { xdp: true, notes }
}
