//! Embeds the eBPF object that `cargo xtask build-ebpf` made, so that `sluiced` is one file.
//!
//! A missing object is no build failure: everything that needs no kernel still builds and is tested, and
//! `Engine::open` says what to run.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("sluice.o");
    let object = match env::var_os("SLUICE_BPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"))
            .join("../../target/bpf/sluice.o"),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_else(|error| {
        println!(
            "cargo::warning=no eBPF object at {} ({error}); the kernel engine will not start: \
             run `cargo xtask build-ebpf`, then build again",
            object.display()
        );
        Vec::new()
    });
    fs::write(&out, bytes).expect("OUT_DIR can be written");
}
