//! What Sluice is asked to do, without any way to do it: policy types, their validation, the oracle that says what
//! must happen to a packet, and lowering to the tables that make it happen.
//!
//! Everything here is pure: no clock, no file, no socket. Data flows one way:
//! [`config`] → [`validate`](mod@validate) → [`lower`](mod@lower) → [`image`]; and, apart from it, [`config`] → [`oracle`].
//!
//! The two meet only in tests and in `sluice trace`: [`generate`] makes cases, [`sim`] runs an image through the real
//! pipeline, and [`conformance`] says whether an engine did what the oracle wants.

#![forbid(unsafe_code)]

pub mod config;
pub mod conformance;
pub mod generate;
pub mod ids;
pub mod image;
pub mod lower;
pub mod net;
pub mod oracle;
pub mod placement;
pub mod sim;
pub mod validate;
