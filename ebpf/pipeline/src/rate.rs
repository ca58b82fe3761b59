//! Stage 8: policing, as a virtual scheduler whose whole state is one word.

use crate::tables::{RATE_SHIFT, RateConfig};

/// Whether a frame of `bytes` conforms, given the theoretical arrival time `arrival` of the next frame; if so, the
/// new arrival time. Times are nanoseconds of the monotonic clock.
///
/// A frame that costs more than the whole burst conforms when the bucket is full, and puts it into debt: otherwise a
/// burst below the size of a GSO super-frame would stop TCP dead. The long-term rate holds all the same.
#[inline(always)]
pub fn conform(rate: &RateConfig, arrival: u64, now: u64, bytes: u32) -> Option<u64> {
    let cost = (rate.ns_per_byte * bytes as u64) >> RATE_SHIFT;
    let start = if arrival > now { arrival } else { now };
    let charged = if cost < rate.burst_ns { cost } else { rate.burst_ns };
    if start - now + charged > rate.burst_ns {
        return None;
    }
    Some(start + cost)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8 Mbit/s: one byte a microsecond; room for 1 000 bytes.
    const RATE: RateConfig = RateConfig { ns_per_byte: 1000 << RATE_SHIFT, burst_ns: 1_000_000 };

    #[test]
    fn long_term_rate_holds_at_any_frame_size() {
        for bytes in [64u32, 999, 1000, 1001, 9000, 65_536] {
            let (mut arrival, mut passed) = (0, 0u64);
            for now in (0..1_000_000_000u64).step_by(10_000) {
                if let Some(next) = conform(&RATE, arrival, now, bytes) {
                    arrival = next;
                    passed += u64::from(bytes);
                }
            }
            let limit = 1_000_000 + 1_000 + u64::from(bytes);
            assert!(passed <= limit, "{bytes}: {passed} bytes passed in a second");
            assert!(passed >= 900_000, "{bytes}: only {passed} bytes passed in a second");
        }
    }

    #[test]
    fn burst_passes_and_no_more() {
        let mut arrival = 5;
        for _ in 0..10 {
            arrival = conform(&RATE, arrival, 5, 100).expect("within the burst");
        }
        assert_eq!(conform(&RATE, arrival, 5, 100), None);
        assert!(conform(&RATE, arrival, 5 + 100_000, 100).is_some());
    }
}
