//! Does the NIC limit what a VF sends? What arrives is measured without a limit, then with one.

use std::io;
use std::time::{Duration, Instant};

use super::exchange::{FRAME_MAX, Nonce, Note, drain, send};
use super::packet::Packets;
use super::{Finding, Verdict};
use sluice_policy::config::Attestable;

/// More is not offered, so that the PF has time for others.
const OFFERED_MAX_MBPS: u64 = 400;
/// How long the rate is measured without a limit.
pub(super) const FREE: Duration = Duration::from_millis(400);
/// What a limit may let through at its beginning.
const BURST: Duration = Duration::from_millis(400);
/// How long it is measured then.
pub(super) const LIMITED: Duration = Duration::from_millis(800);
/// Frames between two looks.
const BATCH: u32 = 16;
/// How many times the limit the free rate must be, to be told from it.
const CLEAR: u64 = 8;

/// What arrives in a time, in kbit/s, and how it was measured.
pub(super) fn measure(
    from: &Packets,
    to: &Packets,
    nonce: Nonce,
    note: &Note,
    skipped: Duration,
    measured: Duration,
) -> io::Result<u64> {
    let start = Instant::now();
    let end = start + skipped + measured;
    let (mut sent, mut bytes) = (0_u32, 0_u64);
    while Instant::now() < end {
        let elapsed = start.elapsed();
        let may_be_sent = OFFERED_MAX_MBPS as u128 * elapsed.as_micros() / (FRAME_MAX as u128 * 8);
        if u128::from(sent) <= may_be_sent {
            for _ in 0..BATCH {
                let patience = (Instant::now() + Duration::from_millis(20)).min(end);
                if !send(from, &note.bytes(nonce, sent, FRAME_MAX), patience)? {
                    break;
                }
                sent = sent.wrapping_add(1);
            }
        } else {
            std::thread::yield_now();
        }
        let is_counted = start.elapsed() >= skipped;
        drain(to, nonce, |heard, length| {
            if heard.kind == note.kind && is_counted {
                bytes += length as u64;
            }
        })?;
    }
    let millis = u64::try_from((start.elapsed().saturating_sub(skipped)).as_millis()).unwrap_or(u64::MAX);
    Ok(bytes * 8 / millis.max(1))
}

/// Measures with a limit: what a bucket holds in the beginning is let pass.
pub(super) fn measure_limited(from: &Packets, to: &Packets, nonce: Nonce, note: &Note) -> io::Result<u64> {
    measure(from, to, nonce, note, BURST, LIMITED)
}

/// The limit to try where so much passes without one, in Mbit/s; `None` if that is too little to tell.
pub(super) const fn limit(free_kbps: u64) -> Option<u32> {
    let limit = free_kbps / 1000 / CLEAR;
    if limit == 0 { None } else { Some(limit as u32) }
}

/// What the two rates say. NICs round rates, some to 50 Mbit/s.
pub(super) fn judge(free_kbps: u64, limit_mbps: u32, limited_kbps: u64) -> Finding {
    let limit_kbps = u64::from(limit_mbps) * 1000;
    let verdict = if limited_kbps == 0 {
        Verdict::Inconclusive
    } else if limited_kbps <= limit_kbps * 5 / 2 {
        Verdict::Enforced
    } else if limited_kbps >= free_kbps / 2 {
        Verdict::Refuted
    } else {
        Verdict::Inconclusive
    };
    let mbps = |kbps: u64| format!("{}.{} Mbit/s", kbps / 1000, kbps % 1000 / 100);
    let text = format!(
        "of a VF limited to {limit_mbps} Mbit/s {} arrived, and {} without the limit",
        mbps(limited_kbps),
        mbps(free_kbps)
    );
    Finding { ability: Attestable::RateFromVm, verdict, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_and_rates_between_prove_nothing() {
        let verdict = |limited| judge(80_000, 10, limited).verdict;
        assert_eq!(verdict(0), Verdict::Inconclusive);
        assert_eq!(verdict(9_000), Verdict::Enforced);
        assert_eq!(verdict(25_000), Verdict::Enforced);
        assert_eq!(verdict(30_000), Verdict::Inconclusive);
        assert_eq!(verdict(40_000), Verdict::Refuted);
        assert_eq!(verdict(90_000), Verdict::Refuted);
    }

    #[test]
    fn a_limit_is_far_below_what_passes() {
        assert_eq!((limit(0), limit(7_999), limit(8_000), limit(400_000)), (None, None, Some(1), Some(50)));
    }
}
