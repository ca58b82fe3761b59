//! A lab for end-to-end tests: network namespaces as VMs, hosts and the outside world, with the real daemon and the
//! real CLI between them.
//!
//! A [`Lab`] has one *host* namespace, in which `sluiced` runs and the switch's ports lie, and any number of
//! namespaces wired to it ([`Lab::vm`], [`Lab::outside`]). Everything is named after the test's process, removed on
//! drop, and swept up by the next lab should a test die. Helpers wait for conditions with a deadline; none sleeps and
//! hopes.
//!
//! Needs root, and the programs that `cargo xtask test` installs.

#![deny(unsafe_code)]

pub mod api;
pub mod daemon;
pub mod flow;
pub mod lab;
pub mod lab_guest;
pub mod netns;
pub mod packet;
pub mod screen;
mod sys;
pub mod tcp;
pub mod tools;
pub mod vf_lab;
pub mod vm;
pub mod wait;
pub mod wire;

pub use api::{Counters, Sluice};
pub use daemon::Daemon;
pub use flow::Flow;
pub use lab::{Lab, PATIENCE, Vm, scenario};
pub use netns::Netns;
pub use packet::{PacketSocket, Tap, VnetTap};
pub use tcp::Connection;
pub use wait::wait_until;
