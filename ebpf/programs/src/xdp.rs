//! XDP: the short way for known unicast, and early drops.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_get_buff_len};
use aya_ebpf::programs::XdpContext;
use sluice_pipeline::tables::{port_flag, socket_index};
use sluice_pipeline::{
    Context, Delivery, DropReason, HEADER_WINDOW, Headers, Packet, Tables, Tag, Verdict, decide, ip_guard,
    parse,
};

use crate::maps;
use crate::packet::{Linear, clear};
use crate::tables::{Maps, count_tx, port_of};

const TABLES: Maps<false> = Maps;

/// Frames that this program cannot serve go on to TCX on the same interface, uncounted.
#[inline(always)]
pub fn ingress(ctx: &XdpContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let (ifindex, length) = unsafe { ((*ctx.ctx).ingress_ifindex, bpf_xdp_get_buff_len(ctx.ctx) as u32) };
    let port = port_of(ifindex);
    let Some(context) = maps::SCRATCH.get_ptr_mut(0) else {
        return XDP_DROP;
    };
    // SAFETY: per-CPU element, and programs on one CPU do not nest; zeros are the default.
    let context = unsafe {
        clear(&mut *context);
        &mut *context
    };

    let window = if length < HEADER_WINDOW { length } else { HEADER_WINDOW };
    let (data, data_end) = (ctx.data(), ctx.data_end());
    if data + window as usize > data_end {
        return XDP_PASS; // headers spread over several buffers: TCX can pull them together
    }
    match decide(&Buffer { ctx: ctx.ctx, length }, &TABLES, port, length, context) {
        Verdict::Unicast(delivery) => {
            if rewrite(ctx, context, &delivery).is_err() {
                TABLES.count_drop(delivery.port, DropReason::EgressFailed);
                return XDP_DROP;
            }
            count_tx(delivery.port, length);
            if delivery.flags & port_flag::STEERED != 0
                && let Some(action) = steer(ctx, port)
            {
                return action;
            }
            maps::DEVMAP.redirect(delivery.port, 0).unwrap_or(XDP_DROP)
        }
        Verdict::Drop { .. } => XDP_DROP,
        Verdict::Flood | Verdict::Defer => XDP_PASS,
    }
}

/// Sends a frame to the userspace engine by the socket of the queue that it came by, if there is one.
#[inline(always)]
fn steer(ctx: &XdpContext, port: u32) -> Option<u32> {
    // SAFETY: the context is valid while the program runs.
    let queue = unsafe { (*ctx.ctx).rx_queue_index };
    let index = socket_index(port, queue)?;
    maps::SOCKETS.get(index)?;
    Some(maps::SOCKETS.redirect(index, XDP_DROP.into()).unwrap_or(XDP_DROP))
}

/// A frame as XDP has it; see `tc::Skb`.
struct Buffer {
    ctx: *mut xdp_md,
    length: u32,
}

impl Packet for Buffer {
    #[inline(always)]
    fn parse(&self, headers: &mut Headers) -> Result<(), DropReason> {
        // SAFETY: both pointers are valid while the program runs.
        DropReason::from_code(unsafe { sluice_xdp_parse(self.ctx, headers, self.length) })
    }

    #[inline(always)]
    fn ip_guard<T: Tables>(&self, _: &T, port: u32, headers: &Headers) -> Result<(), DropReason> {
        // SAFETY: both pointers are valid while the program runs.
        DropReason::from_code(unsafe { sluice_xdp_ip_guard(self.ctx, headers, port, self.length) })
    }
}

/// # Safety
/// `ctx` is the running program's context.
#[inline(always)]
unsafe fn linear(ctx: *mut xdp_md, length: u32) -> Linear {
    // SAFETY: the caller's.
    unsafe {
        Linear { data: (*ctx).data as usize, data_end: (*ctx).data_end as usize, length, tag: Tag::NONE }
    }
}

/// Sub-program: parse. Returns [`DropReason::code`].
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn sluice_xdp_parse(ctx: *mut xdp_md, headers: *mut Headers, length: u32) -> u32 {
    if headers.is_null() {
        return DropReason::TableInconsistent as u32;
    }
    // SAFETY: the program's context, and memory that the verifier knows to be a `Headers`.
    DropReason::code(unsafe { parse(&linear(ctx, length), &mut *headers) })
}

/// Sub-program: IP guard. Returns [`DropReason::code`].
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn sluice_xdp_ip_guard(
    ctx: *mut xdp_md,
    headers: *const Headers,
    port: u32,
    length: u32,
) -> u32 {
    if headers.is_null() {
        return DropReason::TableInconsistent as u32;
    }
    // The guard asks bytes and not how many there are; but an argument that looks unused is not passed, and the verifier
    // wants to see it.
    let length = core::hint::black_box(length);
    // SAFETY: as above.
    DropReason::code(unsafe { ip_guard(&linear(ctx, length), &TABLES, port, &*headers) })
}

/// Takes the tag off, puts one on, or changes it.
#[inline(always)]
fn rewrite(ctx: &XdpContext, context: &Context, delivery: &Delivery) -> Result<(), ()> {
    let tag = delivery.tag;
    if context.strip && tag.is_some() {
        if tag != context.headers.outer {
            let at = bytes::<16>(ctx)?;
            // SAFETY: checked by `bytes`.
            unsafe { write_tag(at, tag) };
        }
        return Ok(());
    }
    if context.strip {
        let at = bytes::<16>(ctx)?;
        // SAFETY: checked by `bytes`; read before written.
        unsafe {
            let [a, b, c] = at.cast::<[u32; 3]>().read();
            at.add(4).cast::<u32>().write(a);
            at.add(8).cast::<u32>().write(b);
            at.add(12).cast::<u32>().write(c);
        }
        return adjust_head(ctx, 4);
    }
    if tag.is_some() {
        adjust_head(ctx, -4)?;
        let at = bytes::<16>(ctx)?;
        // SAFETY: checked by `bytes`; read before written.
        unsafe {
            let [a, b, c] = at.add(4).cast::<[u32; 3]>().read();
            at.cast::<u32>().write(a);
            at.add(4).cast::<u32>().write(b);
            at.add(8).cast::<u32>().write(c);
            write_tag(at, tag);
        }
    }
    Ok(())
}

#[inline(always)]
fn adjust_head(ctx: &XdpContext, delta: i32) -> Result<(), ()> {
    // SAFETY: the context is valid while the program runs.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, delta) } == 0 { Ok(()) } else { Err(()) }
}

/// The first `N` bytes, for writing.
#[inline(always)]
fn bytes<const N: usize>(ctx: &XdpContext) -> Result<*mut u8, ()> {
    let data = ctx.data();
    if data + N > ctx.data_end() { Err(()) } else { Ok(data as *mut u8) }
}

/// # Safety
/// 16 bytes are writable at `frame`.
#[inline(always)]
unsafe fn write_tag(frame: *mut u8, tag: Tag) {
    // SAFETY: bytes 12 to 15.
    unsafe {
        frame.add(12).cast::<u16>().write(tag.tpid.to_be());
        frame.add(14).cast::<u16>().write(tag.tci.to_be());
    }
}
