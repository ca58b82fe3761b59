//! The userspace engine: serves ports that the kernel cannot, vhost-user above all, with the pipeline that the kernel
//! engine runs as BPF.
//!
//! A frame is received by a port, decided on by a worker, and sent by another port. Configuration comes as the same
//! [`Image`](sluice_policy::image::Image) that the kernel engine takes.

#![deny(unsafe_code)]

pub mod engine;
pub mod frame;
mod hint;
pub mod memory;
pub mod offload;
pub mod port;
pub mod tap;
pub mod vhost;
pub mod workers;
pub mod xdp;
