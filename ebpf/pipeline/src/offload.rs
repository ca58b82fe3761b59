//! Whether a sender's offload leaves alone what was decided on.
//!
//! A partial checksum is filled in behind the decision, and a super-frame is cut there: either writes where the sender
//! says. Were that an address, a port or a tag, a guest could have one frame decided on and another sent. So what is
//! written is the checksum of the transport header that the pipeline has seen, or lies behind it, as in a tunnel.

use crate::parse::{Headers, ip_proto};
use crate::tables::fact;

/// How a super-frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// It is none.
    Not,
    /// Into segments of TCP.
    Tcp,
    /// Into datagrams or fragments of UDP.
    Udp,
    /// Into packets of SCTP.
    Sctp,
    /// Whatever is in a tunnel.
    Tunnel,
    /// In a way that nobody here knows.
    Unknown,
}

/// Whether the sum of what follows byte `start`, written to byte `at`, and a cut change nothing that `headers` hold, which are
/// those of the frame as it came in; a tag beside the bytes does not count.
#[inline(always)]
pub fn is_honest(start: u32, at: u32, cut: Cut, headers: &Headers) -> bool {
    is_behind(at, headers) && is_cut_behind(cut, start, headers)
}

/// Whether a checksum at byte `at` is the transport header's, or behind that header.
#[inline(always)]
fn is_behind(at: u32, headers: &Headers) -> bool {
    // Without a transport header, as in later fragments, nothing says what the bytes are.
    if headers.key.facts & fact::IP == 0 || headers.l4 == 0 || at < headers.l4 {
        return false;
    }
    let into = at - headers.l4;
    match headers.key.proto {
        ip_proto::TCP => into == 16 || into >= 20,
        ip_proto::UDP => into == 6 || into >= 8,
        // Guards look at what is in their messages.
        ip_proto::ICMP | ip_proto::ICMPV6 => false,
        _ => into >= 8,
    }
}

/// Whether a cut of a super-frame with its transport header at `start` writes into no other headers than those that the
/// pipeline has seen.
#[inline(always)]
fn is_cut_behind(cut: Cut, start: u32, headers: &Headers) -> bool {
    let proto = match cut {
        Cut::Not => return true,
        Cut::Tcp => ip_proto::TCP,
        Cut::Udp => ip_proto::UDP,
        Cut::Sctp => ip_proto::SCTP,
        Cut::Tunnel => return start >= headers.l4 + 8,
        Cut::Unknown => return false,
    };
    start == headers.l4 && headers.key.proto == proto
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(proto: u8) -> Headers {
        let mut headers = Headers { l3: 14, l4: 34, ..Headers::default() };
        headers.key.facts = fact::IP | fact::L4;
        headers.key.proto = proto;
        headers
    }

    #[test]
    fn a_super_frame_is_cut_as_what_it_is() {
        const GRE: u8 = 47;
        for (proto, at, cut, start, may) in [
            (ip_proto::TCP, 50, Cut::Tcp, 34, true),
            (ip_proto::TCP, 50, Cut::Tcp, 30, false),
            (ip_proto::TCP, 50, Cut::Udp, 34, false),
            (ip_proto::UDP, 40, Cut::Udp, 34, true),
            (ip_proto::UDP, 50, Cut::Tcp, 34, false),
            (ip_proto::SCTP, 42, Cut::Sctp, 34, true),
            (ip_proto::UDP, 108, Cut::Tunnel, 92, true),
            (GRE, 88, Cut::Tunnel, 72, true),
            (ip_proto::UDP, 57, Cut::Tunnel, 41, false),
            (ip_proto::TCP, 50, Cut::Unknown, 34, false),
        ] {
            assert_eq!(is_honest(start, at, cut, &headers(proto)), may, "{proto} {at} {cut:?} {start}");
        }
    }

    #[test]
    fn nothing_before_the_transport_header_is_written() {
        for proto in 0..=255 {
            for at in 0..34 {
                assert!(!is_honest(34, at, Cut::Not, &headers(proto)), "{proto} {at}");
            }
        }
        // Nor anything where there is none: not IP, or a later fragment.
        for broken in [Headers { l4: 0, ..headers(ip_proto::UDP) }, Headers { l4: 34, ..Headers::default() }]
        {
            assert!((0..200).all(|at| !is_honest(34, at, Cut::Not, &broken)));
        }
    }
}
