//! What is still to be done to a frame when TCX has it, in the kernel's own words: BPF's context does not tell.

use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use sluice_pipeline::offload::{Cut, is_honest};
use sluice_pipeline::{Headers, placeholder};

/// `CHECKSUM_PARTIAL` (linux/skbuff.h).
const PARTIAL: u8 = 3;

/// Bits of `gso_type` (linux/skbuff.h): the same since Linux 4.18.
mod gso {
    pub const TCP: u32 = 1 << 0 | 1 << 4;
    pub const UDP: u32 = 1 << 16 | 1 << 17;
    pub const SCTP: u32 = 1 << 14;
    /// GRE, IP in IP, UDP tunnels.
    pub const TUNNEL: u32 = 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13;
}

/// A number of the running kernel's; see [`placeholder`].
#[inline(always)]
fn number<const PLACEHOLDER: i32>() -> usize {
    let number;
    // SAFETY: puts a constant into a register. The compiler must not know it, since it will be another.
    unsafe {
        asm!("{0} = {1}", lateout(reg) number, const PLACEHOLDER, options(pure, nomem, nostack, preserves_flags));
    }
    number
}

/// Whether nothing is left undone that would change what was decided on; see [`sluice_pipeline::offload`].
///
/// # Safety
/// `ctx` is the running program's context.
#[inline(always)]
pub unsafe fn leaves_alone(ctx: *mut __sk_buff, headers: &Headers) -> bool {
    // SAFETY: the caller's; the verifier knows the result for a `struct sk_buff`, and that these fields are in it.
    unsafe {
        let skb = kernel_context(ctx);
        let summed = field::<u8>(skb, number::<{ placeholder::IP_SUMMED_BYTE }>())
            >> number::<{ placeholder::IP_SUMMED_BIT }>();
        if summed & 3 != PARTIAL {
            return true;
        }
        let mac = field::<u16>(skb, number::<{ placeholder::MAC_HEADER }>()) as u32;
        let start = (field::<u16>(skb, number::<{ placeholder::CSUM_START }>()) as u32).saturating_sub(mac);
        let at = start + field::<u16>(skb, number::<{ placeholder::CSUM_OFFSET }>()) as u32;
        let cut = if (*ctx).gso_size == 0 { Cut::Not } else { cut(skb) };
        is_honest(start, at, cut, headers)
    }
}

/// # Safety
/// `skb` is what [`kernel_context`] gave.
#[inline(always)]
unsafe fn cut(skb: usize) -> Cut {
    // SAFETY: as in `leaves_alone`.
    let kind = unsafe {
        let end = field::<usize>(skb, number::<{ placeholder::HEAD }>())
            + field::<u32>(skb, number::<{ placeholder::END }>()) as usize;
        field::<u32>(shared_info(end), number::<{ placeholder::GSO_TYPE }>())
    };
    if kind & gso::TUNNEL != 0 {
        Cut::Tunnel
    } else if kind & gso::TCP != 0 {
        Cut::Tcp
    } else if kind & gso::UDP != 0 {
        Cut::Udp
    } else if kind & gso::SCTP != 0 {
        Cut::Sctp
    } else {
        Cut::Unknown
    }
}

/// # Safety
/// The verifier knows what is at `offset` from `structure`, and that it is a `T`.
#[inline(always)]
unsafe fn field<T: Copy>(structure: usize, offset: usize) -> T {
    // SAFETY: the caller's.
    unsafe { ((structure + offset) as *const T).read() }
}

/// The context as the kernel has it: a `struct sk_buff`.
///
/// # Safety
/// `ctx` is the running program's context.
#[inline(always)]
unsafe fn kernel_context(ctx: *mut __sk_buff) -> usize {
    let skb;
    // SAFETY: one call of a kernel function, which the verifier replaces by a move. As of a call, the registers of arguments
    // are gone.
    unsafe {
        asm!(
            ".byte 0x85, 0x20, 0, 0",
            ".long {0}",
            const placeholder::CAST_TO_KERN_CTX,
            inlateout("r1") ctx => _,
            lateout("r0") skb,
            lateout("r2") _,
            lateout("r3") _,
            lateout("r4") _,
            lateout("r5") _,
            options(nomem, nostack)
        );
    }
    skb
}

/// The `struct skb_shared_info` at `address`.
///
/// # Safety
/// There is one. (Were there none, reads would give zeros, or garbage.)
#[inline(always)]
unsafe fn shared_info(address: usize) -> usize {
    let info;
    // SAFETY: as in `kernel_context`.
    unsafe {
        asm!(
            "r2 = {1}",
            ".byte 0x85, 0x20, 0, 0",
            ".long {0}",
            const placeholder::RDONLY_CAST,
            const placeholder::SHARED_INFO,
            inlateout("r1") address => _,
            lateout("r0") info,
            out("r2") _,
            lateout("r3") _,
            lateout("r4") _,
            lateout("r5") _,
            options(nomem, nostack)
        );
    }
    info
}
