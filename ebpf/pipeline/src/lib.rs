//! The packet pipeline, written once: it compiles to BPF for the kernel engine and to native code for every other.
//!
//! [`parse`] reads a frame's headers and rejects what is malformed; [`decide`] takes a frame from a port through the
//! stages and says where it goes; [`flood`] serves every destination of a frame that goes to many. All three are
//! generic over how bytes are read ([`Frame`]) and how tables are looked up ([`Tables`]), and allocate nothing.
//!
//! The stages are those of the design's section 4. Conformance tests compare this crate, in every engine, with the
//! oracle in `sluice-policy`, which shares the drop reasons and nothing else.
//!
//! Code here is shaped by the BPF verifier: functions are inlined, loops have constant bounds or go through
//! [`Tables::repeat`], and bytes are read by copies of constant length.

#![no_std]
#![forbid(unsafe_code)]

mod acl;
mod decide;
mod guard;
pub mod offload;
mod parse;
pub mod placeholder;
mod rate;
mod reason;
pub mod tables;
mod vlan;

pub use acl::{acl_verdicts, classify, mask_id};
pub use decide::{Context, Delivery, Packet, Sink, Stage, Verdict, decide, flood};
pub use guard::ip_guard;
pub use parse::{Frame, HEADER_WINDOW, Headers, L3_WINDOW, Tag, ethertype, ip_proto, parse};
pub use rate::conform;
pub use reason::{DropReason, REASONS_MAX};
pub use tables::{LoopBody, Tables, Vlan};
