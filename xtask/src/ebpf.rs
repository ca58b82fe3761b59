//! `build-ebpf`: compile `ebpf/programs` for the BPF target with whichever toolchain the machine has.
//!
//! The target's standard library (`core`) is not shipped by rustup, so there are two ways to get it: build it from
//! rust-src on the pinned rustup toolchain, or use Debian's packaged compiler, which comes with it prebuilt. Both use
//! the released compiler with the nightly-only target unlocked. The linker is bpf-linker in either case.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::packages::{self, Need};
use crate::process::{clean, find, is_root, output, run, say};
use crate::workspace;

/// The rustup toolchain that is known to work; the newest whose LLVM bpf-linker 0.13 reads.
const RUST_VERSION: &str = "1.95.0";
const TARGET: &str = "bpfel-unknown-none";
const BPF_LINKER_VERSION: &str = "0.13.0";
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
/// BTF for maps and programs; v3 because atomic operations that return the old value need it.
const RUSTFLAGS: &str = "-C debuginfo=2 -C link-arg=--btf -C target-cpu=v3";

const DEBIAN_RUST: [Need; 3] = [
    Need::file("/usr/bin/rustc", "rustc-web"),
    Need::file("/usr/bin/cargo", "cargo-web"),
    Need::file("/usr/lib/rustlib/bpfel-unknown-none/lib", "libstd-rust-web-dev-bpf"),
];

const BPF_LINKER_LIBRARIES: [Need; 6] = [
    Need::file("/usr/lib/llvm-22/bin/llvm-config", "llvm-22-dev"),
    Need::file("/usr/include/zstd.h", "libzstd-dev"),
    Need::file("/usr/include/zlib.h", "zlib1g-dev"),
    Need::program("pkg-config", "pkg-config"),
    Need::program("gcc", "gcc"),
    Need::program("g++", "g++"),
];

/// A compiler that can target BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Toolchain {
    /// The pinned rustup toolchain with rust-src; `core` is built.
    Rustup,
    /// Debian's packaged compiler; `core` comes prebuilt.
    Debian,
}

/// A toolchain that is there, and how to call it.
enum Compiler {
    /// Name of the rustup toolchain.
    Rustup(String),
    /// `/usr/bin/rustc` and `/usr/bin/cargo`.
    Debian,
}

/// Where the object goes.
pub(crate) fn object() -> PathBuf {
    workspace::target().join("bpf/sluice.o")
}

/// Build the object unless it is there and nothing has changed; returns its path.
pub(crate) fn build(wanted: Option<Toolchain>, force: bool) -> Result<PathBuf> {
    let programs = workspace::root().join("ebpf/programs");
    if !programs.join("Cargo.toml").exists() {
        bail!("{} is not there; is this a complete checkout?", programs.join("Cargo.toml").display());
    }
    let compiler = ensure_compiler(wanted)?;
    let linker = ensure_linker()?;

    let object = object();
    let stamp_file = object.with_extension("stamp");
    let stamp = stamp(&compiler, &linker)?;
    let unchanged = std::fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp);
    if unchanged && object.exists() && !force {
        say("eBPF object is up to date");
        return Ok(object);
    }

    let build_dir = workspace::target().join("bpf").join(match compiler {
        Compiler::Rustup(_) => "rustup",
        Compiler::Debian => "debian",
    });
    say(&format!("building the eBPF programs with {}", compiler.describe()));
    run(compiler
        .cargo()
        .args(["build", "--release", "--quiet", "--target", TARGET, "--bin", "sluice"])
        .current_dir(&programs)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", RUSTFLAGS)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker)
        .env("CARGO_TARGET_DIR", &build_dir))?;

    // The stamp goes first and comes last, so that an interrupted build is never taken for a finished one; the
    // object is renamed into place, so that a build script never reads half of it.
    if stamp_file.exists() {
        std::fs::remove_file(&stamp_file).context("removing the old stamp")?;
    }
    let built = build_dir.join(TARGET).join("release/sluice");
    let partial = object.with_extension("o.partial");
    std::fs::copy(&built, &partial).with_context(|| format!("copying {}", built.display()))?;
    std::fs::rename(&partial, &object).with_context(|| format!("writing {}", object.display()))?;
    std::fs::write(&stamp_file, stamp).context("writing the stamp")?;
    say(&format!("built {}", object.display()));
    Ok(object)
}

impl Compiler {
    fn cargo(&self) -> Command {
        match self {
            Compiler::Rustup(toolchain) => {
                let mut command = clean(Command::new("rustup"));
                command.args(["run", toolchain, "cargo", "-Zbuild-std=core"]);
                command
            }
            Compiler::Debian => {
                let mut command = clean(Command::new("/usr/bin/cargo"));
                command.env("RUSTC", "/usr/bin/rustc");
                command
            }
        }
    }

    fn version(&self) -> Option<String> {
        match self {
            Compiler::Rustup(toolchain) => rustup(&["run", toolchain, "rustc", "--version"]),
            Compiler::Debian => output(clean(Command::new("/usr/bin/rustc")).arg("--version")),
        }
    }

    fn describe(&self) -> String {
        let version = self.version().unwrap_or_default();
        match self {
            Compiler::Rustup(toolchain) => format!("rustup's {toolchain} ({})", version.trim()),
            Compiler::Debian => format!("Debian's {}", version.trim()),
        }
    }
}

/// What the object depends on: every file under `ebpf/`, the compiler, the linker and the flags.
fn stamp(compiler: &Compiler, linker: &Path) -> Result<String> {
    let folder = workspace::root().join("ebpf");
    let sources = workspace::files(&folder, &|path| !path.ends_with("target"))?;
    // Guards against needless builds, not against adversaries: the standard library's hash will do.
    let mut hasher = DefaultHasher::new();
    for file in &sources {
        file.strip_prefix(&folder).expect("found under the folder").hash(&mut hasher);
        std::fs::read(file).with_context(|| format!("reading {}", file.display()))?.hash(&mut hasher);
    }
    let linker_version = output(Command::new(linker).arg("--version")).unwrap_or_default();
    Ok(format!("{:016x}\n{}\n{linker_version}\n{RUSTFLAGS}\n", hasher.finish(), compiler.describe()))
}

/// Find a compiler, or install one, or say how.
fn ensure_compiler(wanted: Option<Toolchain>) -> Result<Compiler> {
    let try_rustup = wanted != Some(Toolchain::Debian);
    let try_debian = wanted != Some(Toolchain::Rustup);
    if try_rustup && let Some(toolchain) = rustup_toolchain() {
        return Ok(Compiler::Rustup(toolchain));
    }
    if try_debian && packages::present(&DEBIAN_RUST) {
        return Ok(Compiler::Debian);
    }
    if !is_root() {
        bail!("{}", how_to_get_compiler(try_rustup, try_debian));
    }
    if try_debian {
        match packages::ensure("compiling for the BPF target", &DEBIAN_RUST) {
            Ok(()) => return Ok(Compiler::Debian),
            Err(error) if !try_rustup => return Err(error),
            Err(error) => say(&format!("Debian's compiler cannot be had ({error}); trying rustup")),
        }
    }
    if find("rustup").is_none() {
        bail!("{}", how_to_get_compiler(try_rustup, try_debian));
    }
    say(&format!("installing rustup's toolchain {RUST_VERSION} with rust-src"));
    run(clean(Command::new("rustup")).args([
        "toolchain",
        "install",
        RUST_VERSION,
        "--profile",
        "minimal",
        "--component",
        "rust-src",
        "--no-self-update",
    ]))?;
    rustup_toolchain().map(Compiler::Rustup).context("the rustup toolchain is installed but cannot be used")
}

fn how_to_get_compiler(rustup: bool, debian: bool) -> String {
    let mut ways = Vec::new();
    if rustup {
        ways.push(format!(
            "  rustup toolchain install {RUST_VERSION} --profile minimal --component rust-src"
        ));
    }
    if debian {
        let names: Vec<&str> = DEBIAN_RUST.iter().map(|need| need.package).collect();
        ways.push(format!("  apt-get update && apt-get install -y {}   # as root", names.join(" ")));
    }
    format!("no compiler for the BPF target. Run one of these:\n{}", ways.join("\n"))
}

/// A rustup toolchain of the pinned version that has rust-src: the one of that name, or the default `stable`.
fn rustup_toolchain() -> Option<String> {
    let listed = rustup(&["toolchain", "list"])?;
    let mut names: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    names.retain(|name| name.starts_with(RUST_VERSION) || name.starts_with("stable-"));
    names.sort();
    names.into_iter().map(str::to_owned).find(|name| {
        let version = rustup(&["run", name, "rustc", "--version"]).unwrap_or_default();
        let sysroot = rustup(&["run", name, "rustc", "--print", "sysroot"]).unwrap_or_default();
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        version.split_whitespace().nth(1) == Some(RUST_VERSION) && core.exists()
    })
}

fn rustup(arguments: &[&str]) -> Option<String> {
    output(clean(Command::new("rustup")).args(arguments))
}

/// bpf-linker of the right version: from PATH, from `target/tools`, or built into `target/tools`.
fn ensure_linker() -> Result<PathBuf> {
    let own = workspace::tools().join("bin/bpf-linker");
    for candidate in [find("bpf-linker"), Some(own.clone())].into_iter().flatten() {
        let version = output(Command::new(&candidate).arg("--version")).unwrap_or_default();
        if version.split_whitespace().nth(1) == Some(BPF_LINKER_VERSION) {
            return Ok(candidate);
        }
    }
    packages::ensure("building bpf-linker", &BPF_LINKER_LIBRARIES)?;
    say(&format!("building bpf-linker {BPF_LINKER_VERSION} into {} (a minute or two)", own.display()));
    let mut install = match find("cargo") {
        Some(_) => clean(Command::new("cargo")),
        None => bail!("cargo is not in PATH"),
    };
    run(install
        .args(["install", "--locked", "--quiet", "--no-default-features", "--features", "llvm-22"])
        .arg(format!("bpf-linker@{BPF_LINKER_VERSION}"))
        .arg("--root")
        .arg(workspace::tools())
        .env("LLVM_PREFIX", LLVM_PREFIX)
        .env_remove("CARGO_TARGET_DIR"))?;
    Ok(own)
}
