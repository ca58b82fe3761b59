//! How far two CPUs are from each other: what it takes until one sees what the other has written.
//!
//! Between rings, everything that the switch reads has been written on the guest's core, so this decides the rate as much as any
//! switch does: a few tens of nanoseconds within a chip, 250 between two. In a virtual machine it changes while one measures, since
//! the host moves its CPUs about; a figure without it says little. So it is measured before and after each sample, another is taken
//! after one between distant cores, and set-ups are compared by samples between near cores and, apart from these, between distant ones.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::measure::pin_to;

/// There and back again so many times, in so many rallies. The quickest rally counts: in others, a CPU was given to somebody else.
const TURNS: u32 = 100;
const RALLIES: u32 = 300;
/// How much farther apart than ever before two cores may be to be near each other.
const NEAR: f64 = 2.5;
/// How many samples are taken at most.
const ATTEMPTS: usize = 3;

/// A line of cache that two cores take from each other.
#[repr(align(128))]
struct Ball(AtomicU32);

/// A rate, and how far the two cores were from each other meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Sample {
    /// Millions of frames per second.
    pub(crate) mpps: f64,
    /// Nanoseconds: before or after, whichever was more.
    pub(crate) distance: f64,
}

/// The shortest way that was seen so far, as whole nanoseconds.
static SHORTEST: AtomicU32 = AtomicU32::new(u32::MAX);

/// Whether so many nanoseconds are about as few as ever.
pub(crate) fn is_near(distance: f64) -> bool {
    distance <= NEAR * f64::from(SHORTEST.load(Ordering::Relaxed))
}

/// Takes a sample, and others until one was taken between near cores, but only a few.
pub(crate) fn sample(
    [one, other]: [usize; 2],
    mut measure: impl FnMut() -> Result<f64>,
) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    while samples.len() < ATTEMPTS {
        let before = between(one, other)?;
        let mpps = measure()?;
        let distance = before.max(between(one, other)?);
        samples.push(Sample { mpps, distance });
        if is_near(distance) {
            break;
        }
    }
    Ok(samples)
}

/// Nanoseconds from one CPU to the other.
fn between(one: usize, other: usize) -> Result<f64> {
    let ball = Ball(AtomicU32::new(0));
    let wait_for = |turn| {
        while ball.0.load(Ordering::Acquire) != turn {
            std::hint::spin_loop();
        }
    };
    let distance = std::thread::scope(|scope| {
        let there = scope.spawn(|| -> Result<f64> {
            // Whether it is pinned or not: the other one waits.
            let result = pin_to(one);
            let mut quickest = f64::MAX;
            for rally in 0..RALLIES {
                let begun = Instant::now();
                for turn in rally * TURNS..(rally + 1) * TURNS {
                    wait_for(2 * turn);
                    ball.0.store(2 * turn + 1, Ordering::Release);
                }
                quickest = quickest.min(begun.elapsed().as_nanos() as f64 / f64::from(2 * TURNS));
            }
            result.map(|()| quickest)
        });
        let back = scope.spawn(|| -> Result<()> {
            let result = pin_to(other);
            for turn in 0..RALLIES * TURNS {
                wait_for(2 * turn + 1);
                ball.0.store(2 * turn + 2, Ordering::Release);
            }
            result
        });
        back.join().ok().context("a thread panicked")??;
        there.join().ok().context("a thread panicked")?
    })?;
    SHORTEST.fetch_min(distance.ceil() as u32, Ordering::Relaxed);
    Ok(distance)
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_cpus_are_some_way_apart() {
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        if cpus > 1 {
            let distance = super::between(0, cpus - 1).expect("two CPUs");
            assert!(distance > 1.0 && super::is_near(distance), "{distance} ns");
        }
    }
}
