//! The kernel engine's two entry points and the maps behind them. Everything that decides is in `sluice-pipeline`.
//!
//! - [`sluice_tc`] runs on TCX ingress of every port and is complete: it floods, and keeps GSO super-frames whole.
//! - [`sluice_xdp`] runs before it where a port has XDP; it serves known unicast between XDP-capable ports, drops
//!   early, and leaves the rest, uncounted, to `sluice_tc`.

#![no_std]
#![no_main]
// Atomics that the BPF target is declared not to have; see `atomic`.
#![feature(core_intrinsics, adt_const_params, asm_experimental_arch)]
#![allow(internal_features)]

mod atomic;
mod maps;
mod offload;
mod packet;
mod tables;
mod tc;
mod xdp;

use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};

/// TCX ingress.
#[classifier]
pub fn sluice_tc(ctx: TcContext) -> i32 {
    tc::ingress(&ctx)
}

/// XDP, with support for frames in several buffers.
#[xdp(frags)]
pub fn sluice_xdp(ctx: XdpContext) -> u32 {
    xdp::ingress(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Several helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
