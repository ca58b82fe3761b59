//! Whether a sender's offload leaves alone what was decided on: see [`sluice_pipeline::offload`].

use sluice_pipeline::Headers;
use sluice_pipeline::offload::{self, Cut};

use crate::frame::{Checksum, GsoKind, Offload};

/// Whether `offload` writes nothing that `headers` hold, which are those of the frame as it came in.
#[inline]
pub(super) fn is_honest(offload: Offload, headers: &Headers) -> bool {
    match offload.checksum {
        Checksum::Unverified | Checksum::Valid => true,
        Checksum::Partial { start, offset } => {
            let (start, at) = (u32::from(start), u32::from(start) + u32::from(offset));
            let cut = match offload.gso.map(|gso| gso.kind) {
                None => Cut::Not,
                Some(GsoKind::TcpV4 | GsoKind::TcpV6) => Cut::Tcp,
                Some(GsoKind::Udp) => Cut::Udp,
            };
            offload::is_honest(start, at, cut, headers)
        }
    }
}
