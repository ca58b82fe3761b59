//! VFs of vNICs: who gets one, how it reaches the VM, and how it is taken back.
//!
//! ```text
//! Core ──World──▶ fleet ──▶ uplink (a thread per NIC) ──▶ manager ──▶ lifecycles ──▶ eSwitch, plugs
//!   ▲                                                        │
//!   └──────────── backings (waits), reports ◀────────────────┘
//! ```
//!
//! The [`fleet`] keeps one thread for each uplink whose vNICs ask for VFs: a NIC that hangs in a write holds up nobody
//! else. In it a [`manager`] places policies ([`knowledge`] says what the NIC can do), decides, programs, plugs
//! ([`plug`]) and watches. The reconciler is told where each vNIC's frames go ([`Backings`](sluice_policy::image::Backings))
//! and brings the kernel engine along; a [`record`] lets a restarted daemon adopt what is in use.

mod claim;
pub mod fleet;
pub mod knowledge;
pub mod manager;
pub mod plug;
pub mod record;
mod uplink;

pub use claim::uncovered_to_proto;
