//! How far two CPUs are from each other: what it takes until one sees what the other has written.
//!
//! Between rings, everything that the switch reads has been written on the guest's core, so this decides the rate as much as any
//! switch does: a few tens of nanoseconds within a chip, 250 between two. In a virtual machine it changes while one measures, since
//! the host moves its CPUs about; a figure without it says little.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::measure::pin_to;

/// There and back again so many times.
const TURNS: u32 = 20_000;

/// A line of cache that two cores take from each other.
#[repr(align(128))]
struct Ball(AtomicU32);

/// Nanoseconds from one CPU to the other; the CPUs must have nothing else to do.
pub(crate) fn between(one: usize, other: usize) -> Result<f64> {
    let ball = Ball(AtomicU32::new(0));
    let wait_for = |turn| {
        while ball.0.load(Ordering::Acquire) != turn {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        let there = scope.spawn(|| -> Result<f64> {
            let result = pin_to(one);
            // Whether it is pinned or not: the other one waits.
            let begun = Instant::now();
            for turn in 0..TURNS {
                wait_for(2 * turn);
                ball.0.store(2 * turn + 1, Ordering::Release);
            }
            result.map(|()| begun.elapsed().as_nanos() as f64 / f64::from(2 * TURNS))
        });
        let back = scope.spawn(|| -> Result<()> {
            let result = pin_to(other);
            for turn in 0..TURNS {
                wait_for(2 * turn + 1);
                ball.0.store(2 * turn + 2, Ordering::Release);
            }
            result
        });
        back.join().ok().context("a thread panicked")??;
        there.join().ok().context("a thread panicked")?
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_cpus_are_some_way_apart() {
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        if cpus > 1 {
            assert!(super::between(0, cpus - 1).expect("two CPUs") > 1.0);
        }
    }
}
