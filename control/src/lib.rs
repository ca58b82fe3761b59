//! The control plane of Sluice: the daemon `sluiced` and the command line `sluice`.
//!
//! A request comes in through [`server`], runs in the one thread of [`reconcile`] on the [`core`] there, which
//! converts it ([`convert`]), validates it, stores it ([`store`]) and lets a pass bring the [`engine`] in line. The
//! command line ([`cli`]) speaks the same API and reads configurations by its JSON mapping ([`json`]).

#![forbid(unsafe_code)]

pub mod cli;
pub mod convert;
pub mod core;
pub mod daemon;
pub mod doctor;
pub mod engine;
pub mod error;
pub mod events;
pub mod explain;
pub mod json;
pub mod planner;
pub mod reconcile;
pub mod resource;
pub mod server;
pub mod store;
pub mod trace;
pub mod vf;
