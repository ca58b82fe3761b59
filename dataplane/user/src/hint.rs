//! Hints to the processor: memory that will be wanted is brought near meanwhile.

#![allow(unsafe_code)]

/// What memory is brought near for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    /// Other cores lose their copies at once, not when it is written.
    Write,
}

/// Bytes that come together.
pub(crate) const CACHE_LINE: usize = 64;

/// A hint; it never faults.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T, access: Access) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect that a program could see, whatever the address. Processors that have no such instruction
    // for writing take it for none at all.
    unsafe {
        match access {
            Access::Read => std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()),
            Access::Write => {
                std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, access);
}
