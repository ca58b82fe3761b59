//! Where a packed ring stands, for a process that did not serve it before.
//!
//! The driver's place can be read off the ring: each slot says in which round the driver wrote it last. Before that place are the
//! slots that wait, and before those what was given back. So the device is at the beginning of that run, unless the run begins
//! with the rest of a chain of several slots, of which only the first is marked as given back. Two others say where it is: the
//! front-end, by the ring's base, and the device's area, where every batch leaves its place. But the front-end of a process that
//! was killed knows an old base, and another kind of back-end leaves something else in the area: a place is believed if all
//! that is between it and the beginning of the run can be the rest of the chain that was given back last.
//!
//! A batch's first slot is marked last. A process that was killed in between left a run with marked slots in it: what is not
//! marked yet is marked then, since all of it was done.
//!
//! With an in-flight area none of this is needed.

use super::ring::{PackedRing, Spot};

/// Where the driver is, and how many slots before that are the driver's.
fn driver(ring: &PackedRing) -> (Spot, u16) {
    let size = ring.size();
    let wrap = ring.slot(0).wrap();
    let other = (1..size).find(|index| ring.slot(*index).wrap() != wrap);
    let driver = other.map_or(Spot::new(0, !wrap), |index| Spot::new(index, wrap));
    let is_drivers = |count: &u16| ring.slot(driver.before(count + 1, size).index()).is_drivers();
    (driver, (0..size).take_while(is_drivers).count() as u16)
}

/// Where the device is. `base` is where the front-end says it is.
pub(in crate::vhost) fn recover(ring: &PackedRing, base: Spot) -> Spot {
    let size = ring.size();
    let (driver, run) = driver(ring);
    let behind = |spot: Spot| driver.ahead_of(spot, size);
    let start = driver.before(run, size);
    let told = Some(ring.device_wish().1).filter(|told| told.index() < size);
    let is_before_run = |told: &Spot| behind(*told) > run.into() && behind(*told) <= size.into();
    if let Some(told) = told.filter(is_before_run)
        && ring.slot(told.index()).is_drivers()
    {
        finish(ring, told);
        return start;
    }
    // The last slot of a chain has the identifier that the first got when it was given back, where that is still to be seen.
    let id_before = |spot: Spot| ring.slot(spot.before(1, size).index()).id;
    let may_be = |spot: &Spot| {
        behind(*spot) <= run.into()
            && is_rest(ring, start, *spot)
            && (run == size || id_before(*spot) == id_before(start))
    };
    [told, Some(base)].into_iter().flatten().find(may_be).unwrap_or(start)
}

/// Whether the slots from one place to another, if there are any, end one chain.
fn is_rest(ring: &PackedRing, from: Spot, to: Spot) -> bool {
    let size = ring.size();
    let count = to.ahead_of(from, size) as u16;
    (0..count).all(|slot| ring.slot(from.after(slot, size).index()).has_next() == (slot + 1 < count))
}

/// Marks what a batch that began at `from` left unmarked.
fn finish(ring: &PackedRing, from: Spot) {
    let size = ring.size();
    let mut chains = Vec::new();
    let (mut at, mut seen) = (from, 0_u32);
    while seen < size.into() {
        let first = ring.slot(at.index());
        if !first.is_drivers() {
            break;
        }
        let (mut last, mut slots) = (first, 1);
        while last.has_next() && slots < size {
            last = ring.slot(at.after(slots, size).index());
            slots += 1;
        }
        chains.push((at, last.id, first));
        at = at.after(slots, size);
        seen += u32::from(slots);
    }
    for (at, id, first) in chains.into_iter().rev() {
        // How much was written is not known any more: no more than fits.
        ring.set_used(at, id, first.len, first.is_written());
    }
}
