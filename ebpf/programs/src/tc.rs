//! TCX ingress: the complete program.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::helpers::{
    bpf_clone_redirect, bpf_redirect, bpf_redirect_peer, bpf_skb_vlan_pop, bpf_skb_vlan_push,
};
use aya_ebpf::programs::TcContext;
use sluice_pipeline::tables::port_flag;
use sluice_pipeline::{
    Context, Delivery, DropReason, HEADER_WINDOW, Headers, Packet, Sink, Tables, Tag, Verdict, decide, flood,
    ip_guard, parse,
};

use crate::maps;
use crate::offload::leaves_alone;
use crate::packet::{Linear, clear};
use crate::tables::{Maps, count_tx, port_of};

const TABLES: Maps<true> = Maps;

/// Frames either leave by a redirect or are dropped: nothing goes up to the host's stack from here.
#[inline(always)]
pub fn ingress(ctx: &TcContext) -> i32 {
    let skb = Skb { ctx: ctx.skb.skb };
    // SAFETY: the context is valid while the program runs.
    let (ifindex, length) = unsafe { ((*skb.ctx).ifindex, (*skb.ctx).len) };
    let port = port_of(ifindex);
    let Some(context) = maps::SCRATCH.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: per-CPU element, and programs on one CPU do not nest; zeros are the default.
    let context = unsafe {
        clear(&mut *context);
        &mut *context
    };

    let window = if length < HEADER_WINDOW { length } else { HEADER_WINDOW };
    if ctx.data() + window as usize > ctx.data_end() && ctx.pull_data(window).is_err() {
        TABLES.count_drop(port, DropReason::MalformedEthernet);
        return TC_ACT_SHOT;
    }
    // What travels beside the bytes counts: XDP, and the wire, have it among them.
    // SAFETY: the context is valid while the program runs.
    let bytes = if unsafe { (*skb.ctx).vlan_present } == 0 { length } else { length + 4 };
    let verdict = decide(&skb, &TABLES, port, bytes, context);
    // Decided on as it came in; what the kernel will write into it must not undo that.
    // SAFETY: the context is valid while the program runs.
    if matches!(verdict, Verdict::Unicast(_) | Verdict::Flood)
        && !unsafe { leaves_alone(skb.ctx, &context.headers) }
    {
        TABLES.count_drop(port, DropReason::MalformedLength);
        return TC_ACT_SHOT;
    }
    match verdict {
        Verdict::Unicast(delivery) => unicast(ctx, context, &delivery),
        Verdict::Flood => {
            // What was dropped has been counted.
            // SAFETY: both pointers are valid while the program runs.
            unsafe { sluice_tc_flood(skb.ctx, context) };
            TC_ACT_SHOT
        }
        Verdict::Drop { .. } | Verdict::Defer => TC_ACT_SHOT,
    }
}

/// A frame as TCX has it. Its bytes are read in sub-programs, so that the verifier looks at each by itself.
struct Skb {
    ctx: *mut __sk_buff,
}

impl Packet for Skb {
    #[inline(always)]
    fn parse(&self, headers: &mut Headers) -> Result<(), DropReason> {
        // SAFETY: both pointers are valid while the program runs.
        DropReason::from_code(unsafe { sluice_tc_parse(self.ctx, headers) })
    }

    #[inline(always)]
    fn ip_guard<T: Tables>(&self, _: &T, port: u32, headers: &Headers) -> Result<(), DropReason> {
        // SAFETY: both pointers are valid while the program runs.
        DropReason::from_code(unsafe { sluice_tc_ip_guard(self.ctx, headers, port) })
    }
}

/// The linear bytes of a frame, and the tag that the kernel took out of them.
///
/// # Safety
/// `ctx` is the running program's context.
#[inline(always)]
unsafe fn linear(ctx: *mut __sk_buff) -> Linear {
    // SAFETY: the caller's.
    unsafe {
        let tag = if (*ctx).vlan_present == 0 {
            Tag::NONE
        } else {
            Tag { tpid: u16::from_be((*ctx).vlan_proto as u16), tci: (*ctx).vlan_tci as u16 }
        };
        Linear { data: (*ctx).data as usize, data_end: (*ctx).data_end as usize, length: (*ctx).len, tag }
    }
}

/// Sub-program: parse. Returns [`DropReason::code`].
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn sluice_tc_parse(ctx: *mut __sk_buff, headers: *mut Headers) -> u32 {
    if headers.is_null() {
        return DropReason::TableInconsistent as u32;
    }
    // SAFETY: the program's context, and memory that the verifier knows to be a `Headers`.
    DropReason::code(unsafe { parse(&linear(ctx), &mut *headers) })
}

/// Sub-program: IP guard. Returns [`DropReason::code`].
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn sluice_tc_ip_guard(ctx: *mut __sk_buff, headers: *const Headers, port: u32) -> u32 {
    if headers.is_null() {
        return DropReason::TableInconsistent as u32;
    }
    // SAFETY: as above.
    DropReason::code(unsafe { ip_guard(&linear(ctx), &TABLES, port, &*headers) })
}

/// Sub-program: all copies of a flood. Returns [`DropReason::code`].
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn sluice_tc_flood(ctx: *mut __sk_buff, context: *mut Context) -> u32 {
    if context.is_null() {
        return DropReason::TableInconsistent as u32;
    }
    // SAFETY: as above.
    let context = unsafe { &mut *context };
    let ctx = TcContext::new(ctx);
    if context.strip && pop(&ctx).is_err() {
        TABLES.count_drop(context.ingress, DropReason::EgressFailed);
        return DropReason::EgressFailed as u32;
    }
    let mut copies = Copies { ctx: &ctx, bytes: context.bytes };
    DropReason::code(flood(&TABLES, context, &mut copies))
}

#[inline(always)]
fn unicast(ctx: &TcContext, context: &Context, delivery: &Delivery) -> i32 {
    let same = context.strip && delivery.tag == context.headers.outer;
    if !same {
        let popped = if context.strip { pop(ctx) } else { Ok(()) };
        if popped.is_err() || (delivery.tag.is_some() && push(ctx, delivery.tag).is_err()) {
            TABLES.count_drop(delivery.port, DropReason::EgressFailed);
            return TC_ACT_SHOT;
        }
    }
    count_tx(delivery.port, context.bytes);
    // The peer's stack takes such a frame for its own whatever its address, so not where others live behind the port.
    let peer = delivery.flags & (port_flag::PEER_REDIRECT | port_flag::LEARN) == port_flag::PEER_REDIRECT;
    // SAFETY: plain helper calls.
    unsafe {
        if peer {
            bpf_redirect_peer(delivery.ifindex, 0) as i32
        } else {
            bpf_redirect(delivery.ifindex, 0) as i32
        }
    }
}

#[inline(always)]
fn pop(ctx: &TcContext) -> Result<(), ()> {
    // SAFETY: the context is valid while the program runs.
    if unsafe { bpf_skb_vlan_pop(ctx.skb.skb) } == 0 { Ok(()) } else { Err(()) }
}

#[inline(always)]
fn push(ctx: &TcContext, tag: Tag) -> Result<(), ()> {
    // SAFETY: the context is valid while the program runs.
    if unsafe { bpf_skb_vlan_push(ctx.skb.skb, tag.tpid.to_be(), tag.tci) } == 0 { Ok(()) } else { Err(()) }
}

/// Sends the copies of a flood. Between copies, the frame has no tag of its own.
struct Copies<'a> {
    ctx: &'a TcContext,
    bytes: u32,
}

impl Sink for Copies<'_> {
    #[inline(always)]
    fn emit(&mut self, delivery: &Delivery) {
        if delivery.tag.is_some() && push(self.ctx, delivery.tag).is_err() {
            TABLES.count_drop(delivery.port, DropReason::EgressFailed);
            return;
        }
        // SAFETY: the context is valid while the program runs.
        let sent = unsafe { bpf_clone_redirect(self.ctx.skb.skb, delivery.ifindex, 0) };
        if sent == 0 {
            count_tx(delivery.port, self.bytes);
        } else {
            TABLES.count_drop(delivery.port, DropReason::EgressFailed);
        }
        if delivery.tag.is_some() {
            let _ = pop(self.ctx); // it was pushed just now; if this failed, the next push would too
        }
    }
}
