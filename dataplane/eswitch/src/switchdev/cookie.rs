//! The tag on our rules (`TCA_ACT_COOKIE`): whose they are, and of which program.

use sluice_policy::config::Rate;
use sluice_policy::placement::VfIndex;

/// The kernel takes 16 bytes (`TC_COOKIE_MAX_SIZE`).
pub(super) const LENGTH: usize = 16;
const MAGIC: [u8; 6] = *b"sluice";

/// The tag on one rule. All actions of the rule but `police` have it, and each rule ends with one that has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cookie {
    /// Whose policy it enforces; [`Cookie::PROBE`] of nobody's.
    pub(super) vf: VfIndex,
    /// The hash of the program that it belongs to.
    pub(super) hash: u64,
}

impl Cookie {
    /// Stands for no VF.
    pub(super) const PROBE: VfIndex = VfIndex(u16::MAX);

    /// As the kernel keeps it.
    pub(super) fn encode(self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..6].copy_from_slice(&MAGIC);
        bytes[6..8].copy_from_slice(&self.vf.0.to_be_bytes());
        bytes[8..].copy_from_slice(&self.hash.to_be_bytes());
        bytes
    }

    /// `None` if it is not ours.
    pub(super) fn decode(bytes: &[u8]) -> Option<Cookie> {
        let bytes: [u8; LENGTH] = bytes.try_into().ok()?;
        let [a, b, c, d, e, f, vf_high, vf_low, hash @ ..] = bytes;
        ([a, b, c, d, e, f] == MAGIC).then(|| Cookie {
            vf: VfIndex(u16::from_be_bytes([vf_high, vf_low])),
            hash: u64::from_be_bytes(hash),
        })
    }
}

/// The tag on a police action: the rate that was asked for. The kernel keeps it rounded, so this is believed where it
/// rounds to what the kernel has.
pub(super) fn encode_rate(rate: Rate) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    bytes[..8].copy_from_slice(&rate.bits_per_second.to_be_bytes());
    bytes[8..].copy_from_slice(&rate.burst_bytes.to_be_bytes());
    bytes
}

/// The rate that was asked for.
pub(super) fn decode_rate(bytes: &[u8]) -> Option<Rate> {
    let (bits, burst) = bytes.split_at_checked(8)?;
    Some(Rate {
        bits_per_second: u64::from_be_bytes(bits.try_into().ok()?),
        burst_bytes: u64::from_be_bytes(burst.try_into().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_cookies_are_ours() {
        let cookie = Cookie { vf: VfIndex(0x0102), hash: 0x1122_3344_5566_7788 };
        let bytes = cookie.encode();
        assert_eq!(bytes, *b"sluice\x01\x02\x11\x22\x33\x44\x55\x66\x77\x88");
        assert_eq!(Cookie::decode(&bytes), Some(cookie));
        for foreign in [&b""[..], &bytes[..15], b"sluicE\x01\x02\x11\x22\x33\x44\x55\x66\x77\x88"] {
            assert_eq!(Cookie::decode(foreign), None, "{foreign:?}");
        }
        let rate = Rate { bits_per_second: 10_000_001, burst_bytes: 1501 };
        assert_eq!(decode_rate(&encode_rate(rate)), Some(rate));
        assert_eq!(decode_rate(&[1; 15]), None);
    }
}
