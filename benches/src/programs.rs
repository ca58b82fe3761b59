//! The harness's own BPF programs, assembled by hand: the generator and the sink.

use std::os::fd::OwnedFd;

use anyhow::Result;

use crate::bpf::{self, Kind, Word};

/// First UDP source port of generated flows.
pub(crate) const FIRST_SOURCE_PORT: u16 = 20_000;
/// Most flows that a generator can make: one per source port.
pub(crate) const FLOWS_MAX: u16 = u16::MAX - FIRST_SOURCE_PORT;
/// Offset of the UDP source port in the generated frame: Ethernet, IPv4 without options.
const SOURCE_PORT_OFFSET: i16 = 34;

const REDIRECT: i32 = 23;
const REDIRECT_PEER: i32 = 155;
const TC_ACT_SHOT: i32 = 2;
const XDP_DROP: i32 = 1;
const XDP_TX: i32 = 3;

/// One instruction: `struct bpf_insn`.
const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | ((dst | src << 4) as u64) << 8
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

const fn mov_imm(dst: u8, value: i32) -> u64 {
    insn(0xb7, dst, 0, 0, value)
}
const fn mov(dst: u8, src: u8) -> u64 {
    insn(0xbf, dst, src, 0, 0)
}
const fn add_imm(dst: u8, value: i32) -> u64 {
    insn(0x07, dst, 0, 0, value)
}
const fn call(helper: i32) -> u64 {
    insn(0x85, 0, 0, 0, helper)
}
const EXIT: u64 = insn(0x95, 0, 0, 0, 0);

/// An XDP program that sends the frame back out of where it seems to have come from; of more than one flow, it writes a
/// random source port into it first.
pub(crate) fn generator(flows: u16, random: &Word) -> Result<OwnedFd> {
    const SEND: [u64; 2] = [mov_imm(0, XDP_TX), EXIT];
    if flows == 1 {
        return bpf::load(Kind::Xdp, &SEND);
    }
    let vary = [
        insn(0x61, 2, 1, 0, 0), // r2 = data
        insn(0x61, 3, 1, 4, 0), // r3 = data_end
        mov(4, 2),
        add_imm(4, i32::from(SOURCE_PORT_OFFSET) + 2),
        insn(0x2d, 4, 3, 11, 0),          // if r4 > r3 skip all this
        insn(0x18, 5, 2, 0, random.fd()), // r5 = address of the random word
        0,
        insn(0x79, 0, 5, 0, 0),
        insn(0x27, 0, 0, 0, 0x5851_f42d), // r0 = r0 * a + c, a linear congruential generator
        add_imm(0, 0x1405_7b7f),
        insn(0x7b, 5, 0, 0, 0),
        insn(0x77, 0, 0, 0, 32),               // r0 >>= 32
        insn(0x94, 0, 0, 0, i32::from(flows)), // w0 %= flows
        add_imm(0, i32::from(FIRST_SOURCE_PORT)),
        insn(0xdc, 0, 0, 0, 16), // r0 = be16 r0
        insn(0x6b, 2, 0, SOURCE_PORT_OFFSET, 0),
    ];
    bpf::load(Kind::Xdp, &[&vary[..], &SEND].concat())
}

/// A program that sends every frame to one interface: what a switch costs that decides nothing.
pub(crate) fn redirect(kind: Kind, ifindex: u32) -> Result<OwnedFd> {
    let helper = match kind {
        Kind::Xdp => REDIRECT,
        Kind::Tcx => REDIRECT_PEER,
    };
    bpf::load(kind, &[mov_imm(1, ifindex as i32), mov_imm(2, 0), call(helper), EXIT])
}

/// A program that counts and drops every frame. The count is not atomic: all frames of a measurement arrive on one CPU,
/// and others, had there been any, could only make it too low.
pub(crate) fn sink(kind: Kind, counter: &Word) -> Result<OwnedFd> {
    let verdict = match kind {
        Kind::Xdp => XDP_DROP,
        Kind::Tcx => TC_ACT_SHOT,
    };
    bpf::load(
        kind,
        &[
            insn(0x18, 1, 2, 0, counter.fd()), // r1 = address of the counter
            0,
            insn(0x79, 2, 1, 0, 0),
            add_imm(2, 1),
            insn(0x7b, 1, 2, 0, 0),
            mov_imm(0, verdict),
            EXIT,
        ],
    )
}
