//! Does the NIC limit what a VF sends? What arrives is measured without a limit, with one, and without again.

use std::io;
use std::time::{Duration, Instant};

use super::exchange::{FRAME_MAX, Nonce, Note, drain, send};
use super::packet::Packets;
use super::{Finding, Verdict};
use sluice_policy::config::Attestable;

/// More is not offered, so that the PF has time for others.
const OFFERED_MAX_MBPS: u64 = 400;
/// How long the rate is measured without a limit, before and after.
pub(super) const FREE: Duration = Duration::from_millis(300);
/// What a limit may let through at its beginning.
pub(super) const BURST: Duration = Duration::from_millis(400);
/// How long it is measured then.
pub(super) const LIMITED: Duration = Duration::from_millis(700);
/// Frames between two looks.
const BATCH: u32 = 16;
/// How many times the limit the free rate must be, to be told from it.
const CLEAR: u64 = 16;

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

/// The limit to try where so much passes without one, in Mbit/s; `None` if that is too little to tell.
pub(super) const fn limit(free_kbps: u64) -> Option<u32> {
    let limit = free_kbps / 1000 / CLEAR;
    if limit == 0 { None } else { Some(limit as u32) }
}

/// What the rates say: before the limit, with it, and after it. NICs round rates, some to 50 Mbit/s.
pub(super) fn judge(before_kbps: u64, limit_mbps: u32, limited_kbps: u64, after_kbps: u64) -> Finding {
    let limit_kbps = u64::from(limit_mbps) * 1000;
    // What slowed the host down while the limit was there would have slowed it down before or after, too.
    let free_kbps = before_kbps.min(after_kbps);
    let verdict = if limited_kbps == 0 {
        Verdict::Inconclusive
    } else if limited_kbps >= limit_kbps * 5 {
        Verdict::Refuted
    } else if limited_kbps <= limit_kbps * 5 / 2 && free_kbps >= limit_kbps * 8 {
        Verdict::Enforced
    } else {
        Verdict::Inconclusive
    };
    let mbps = |kbps: u64| format!("{}.{}", kbps / 1000, kbps % 1000 / 100);
    let text = format!(
        "limited to {limit_mbps} Mbit/s {} arrived, and {} and {} without the limit, before and after",
        mbps(limited_kbps),
        mbps(before_kbps),
        mbps(after_kbps)
    );
    Finding { ability: Attestable::RateFromVm, verdict, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_and_rates_between_prove_nothing() {
        let verdict = |limited| judge(160_000, 10, limited, 150_000).verdict;
        assert_eq!(verdict(0), Verdict::Inconclusive);
        assert_eq!(verdict(9_000), Verdict::Enforced);
        assert_eq!(verdict(25_000), Verdict::Enforced);
        assert_eq!(verdict(30_000), Verdict::Inconclusive);
        assert_eq!(verdict(50_000), Verdict::Refuted);
        assert_eq!(verdict(160_000), Verdict::Refuted);
        assert_eq!(judge(160_000, 10, 9_000, 60_000).verdict, Verdict::Inconclusive, "the host was slow");
    }

    #[test]
    fn a_limit_is_far_below_what_passes() {
        assert_eq!((limit(0), limit(15_999), limit(16_000), limit(400_000)), (None, None, Some(1), Some(25)));
    }
}
