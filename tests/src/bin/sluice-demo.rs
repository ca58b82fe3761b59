//! The demo that `cargo xtask demo` runs.

#![forbid(unsafe_code)]

fn main() {}
