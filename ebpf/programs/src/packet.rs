//! Reading packet bytes: one bounds check, then wide loads.

use core::arch::asm;

use sluice_pipeline::{Frame, HEADER_WINDOW, Tag};

/// A frame's linear bytes, as two packet pointers that the verifier knows.
pub struct Linear {
    /// `data` of the context.
    pub data: usize,
    /// `data_end` of the context.
    pub data_end: usize,
    /// Whole length, linear or not.
    pub length: u32,
    /// The tag beside the bytes.
    pub tag: Tag,
}

impl Frame for Linear {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.length
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset > HEADER_WINDOW - N as u32 {
            return None;
        }
        let end = end_of::<1, N>(self.data + offset as usize);
        if end > self.data_end {
            return None;
        }
        // SAFETY: the two checks above bound the access, and the verifier insists on them.
        Some(unsafe { copy((end - N) as *const u8) })
    }

    #[inline(always)]
    fn load_words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        if offset > HEADER_WINDOW - 4 * N as u32 {
            return None;
        }
        let end = end_of::<4, N>(self.data + offset as usize);
        if end > self.data_end {
            return None;
        }
        // SAFETY: as in `load`; see `copy` for the alignment.
        Some(unsafe { ((end - 4 * N) as *const [u32; N]).read() })
    }

    #[inline(always)]
    fn tag(&self) -> Tag {
        self.tag
    }
}

/// Where an access of `N` units of `SIZE` bytes at `start` ends, in a register that both the check and the access use.
///
/// Verifiers since 7.x keep the constant part of a packet pointer together with its variable part, and what they know of
/// the sum of both is rounded by its alignment: of a start and an end that are computed apart, the start may look too
/// large for what was checked of the end. From the end backwards, what is checked is what is accessed. Older verifiers
/// want the length added to the pointer as a constant, so that is the one thing done here.
#[inline(always)]
fn end_of<const SIZE: usize, const N: usize>(start: usize) -> usize {
    let end;
    // SAFETY: one addition. The compiler does not know that it is one, so it keeps what it is told to compute.
    unsafe {
        asm!("{0} += {1}", inout(reg) start => end, const SIZE * N, options(pure, nomem, nostack, preserves_flags));
    }
    end
}

/// Copies `N` bytes by loads as wide as they come.
///
/// # Safety
/// `N` bytes are readable at `from`. Alignment does not matter: Sluice runs where the kernel allows unaligned access
/// to packets (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`), and a BPF load is one instruction at any address.
#[inline(always)]
unsafe fn copy<const N: usize>(from: *const u8) -> [u8; N] {
    let mut out = core::mem::MaybeUninit::<[u8; N]>::uninit();
    let to = out.as_mut_ptr().cast::<u8>();
    let mut at = 0;
    // SAFETY: every access lies within N bytes of both pointers.
    unsafe {
        while at + 8 <= N {
            let word = from.add(at).cast::<u64>().read();
            to.add(at).cast::<u64>().write_unaligned(word);
            at += 8;
        }
        if at + 4 <= N {
            let word = from.add(at).cast::<u32>().read();
            to.add(at).cast::<u32>().write_unaligned(word);
            at += 4;
        }
        if at + 2 <= N {
            let word = from.add(at).cast::<u16>().read();
            to.add(at).cast::<u16>().write_unaligned(word);
            at += 2;
        }
        if at < N {
            to.add(at).write(from.add(at).read());
        }
        out.assume_init()
    }
}

/// Makes a value all zeros, by stores that the compiler leaves alone: it would make of them a call of a byte loop.
///
/// # Safety
/// All zeros are a valid `T`, and its size and alignment are multiples of eight.
#[inline(always)]
pub unsafe fn clear<T>(value: &mut T) {
    const { assert!(size_of::<T>() % 8 == 0 && align_of::<T>() == 8) };
    let words = core::ptr::from_mut(value).cast::<u64>();
    let mut at = 0;
    while at < size_of::<T>() / 8 {
        // SAFETY: within the value.
        unsafe { words.add(at).write_volatile(0) };
        at += 1;
    }
}
