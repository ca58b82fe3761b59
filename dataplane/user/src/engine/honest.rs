//! Whether a sender's offload leaves alone what was decided on.
//!
//! A partial checksum is filled in behind the decision, and a super-frame is cut there: either writes where the sender
//! says. Were that an address, a port or a tag, a guest could have one frame decided on and another sent. So what is
//! written is the checksum of the transport header that the pipeline has seen, or lies behind it, as in a tunnel.

use sluice_pipeline::tables::fact;
use sluice_pipeline::{Headers, ip_proto};

use crate::frame::{Checksum, GsoKind, Offload};

/// Whether `offload` writes nothing that `headers` hold, which are those of the frame as it came in.
#[inline]
pub(super) fn is_honest(offload: Offload, headers: &Headers) -> bool {
    match offload.checksum {
        Checksum::Unverified | Checksum::Valid => true,
        Checksum::Partial { start, offset } => {
            let (start, at) = (u32::from(start), u32::from(start) + u32::from(offset));
            is_behind(at, headers) && offload.gso.is_none_or(|gso| is_cut_at(gso.kind, start, headers))
        }
    }
}

/// Whether a checksum at byte `at` is the transport header's, or behind that header.
fn is_behind(at: u32, headers: &Headers) -> bool {
    // Without a transport header, as in later fragments, nothing says what the bytes are.
    if headers.key.facts & fact::IP == 0 || headers.l4 == 0 {
        return false;
    }
    let Some(into) = at.checked_sub(headers.l4) else { return false };
    match headers.key.proto {
        ip_proto::TCP => into == 16 || into >= 20,
        ip_proto::UDP => into == 6 || into >= 8,
        // Guards look at what is in their messages.
        ip_proto::ICMP | ip_proto::ICMPV6 => false,
        _ => into >= 8,
    }
}

/// Whether a super-frame of `kind` with its transport header at `start` has the headers that the pipeline has seen: cutting it
/// writes into them.
fn is_cut_at(kind: GsoKind, start: u32, headers: &Headers) -> bool {
    let proto = match kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => ip_proto::TCP,
        GsoKind::Udp => ip_proto::UDP,
    };
    start == headers.l4 && headers.key.proto == proto
}
