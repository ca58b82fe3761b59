//! Atomic operations on map values.
//!
//! The BPF target is declared without compare-and-swap, although the instruction set has it since version 3 (kernel
//! 5.12), so `core::sync::atomic` lacks what we need and the intrinsics below stand in.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

/// Replaces `current` by `new`; `false` if the word holds something else.
///
/// # Safety
/// `word` is an aligned word of a map value, never borrowed as a plain reference.
#[inline(always)]
pub unsafe fn swap_if(word: *mut u64, current: u64, new: u64) -> bool {
    // SAFETY: the caller's.
    unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, current, new).1
    }
}

/// Adds, wrapping.
///
/// # Safety
/// As for [`swap_if`].
#[inline(always)]
pub unsafe fn add(word: *mut u32, amount: u32) {
    // SAFETY: the caller's.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(word, amount) };
}

/// Reads in one load.
///
/// # Safety
/// As for [`swap_if`].
#[inline(always)]
pub unsafe fn load<T: Copy>(word: *const T) -> T {
    // SAFETY: the caller's.
    unsafe { word.read_volatile() }
}

/// Writes in one store.
///
/// # Safety
/// As for [`swap_if`].
#[inline(always)]
pub unsafe fn store(word: *mut u64, value: u64) {
    // SAFETY: the caller's.
    unsafe { word.write_volatile(value) }
}
