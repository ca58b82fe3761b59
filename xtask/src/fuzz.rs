//! `fuzz`: the fuzz targets, built with the stock stable toolchain and run for a while each, as many at once as there are cores.
//!
//! cargo-fuzz and nightly are not needed: the targets are ordinary programs with libFuzzer inside, and stable rustc has the
//! instrumentation and the address sanitizer, behind `RUSTC_BOOTSTRAP`. New inputs are kept under `target/fuzz`; what crashes a target
//! is kept too, and named.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

use crate::packages::{self, Need};
use crate::process::{clean, output, run, say, say_error};
use crate::workspace;

/// How long each target runs unless told.
pub(crate) const SECONDS: u64 = 10;
/// Workspaces of targets, with whether they run with the tests: building the others takes longer than there is.
const WORKSPACES: [(&str, bool); 2] = [("dataplane/user/fuzz", true), ("control/fuzz", false)];
/// What cargo-fuzz gives rustc: edges counted, their table, and operands of comparisons.
const INSTRUMENTATION: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
];
const SANITIZER: &str = "-Zsanitizer=address";
/// libFuzzer is C++.
const COMPILER: [Need; 1] = [Need::program("c++", "g++")];

/// Which targets to run.
pub(crate) enum Which<'a> {
    /// Those that run with the tests.
    Quick,
    /// Those of these names; without any, all.
    Named(&'a [String]),
}

/// A target that is built.
struct Target {
    name: String,
    program: PathBuf,
    /// Its corpus in the tree.
    seeds: PathBuf,
}

/// Build targets and run each for so many seconds.
pub(crate) fn fuzz(which: &Which<'_>, seconds: u64) -> Result<()> {
    packages::ensure("fuzzing", &COMPILER)?;
    let mut targets = Vec::new();
    for (folder, is_quick) in WORKSPACES {
        let folder = workspace::root().join(folder);
        let names = names(&folder)?;
        let wanted = names.iter().filter(|name| match which {
            Which::Quick => is_quick,
            Which::Named(wanted) => wanted.is_empty() || wanted.contains(name),
        });
        let wanted: Vec<&str> = wanted.map(String::as_str).collect();
        if !wanted.is_empty() {
            targets.extend(build(&folder, &wanted)?);
        }
    }
    if let Which::Named(wanted) = which {
        let unknown = wanted.iter().find(|name| targets.iter().all(|target| target.name != **name));
        if let Some(name) = unknown {
            bail!(
                "there is no fuzz target `{name}`; see fuzz_targets in {}",
                WORKSPACES.map(|(folder, _)| folder).join(" and ")
            );
        }
    }
    say(&format!("fuzzing {} targets for {seconds} s each", targets.len()));
    let broken = Mutex::new(Vec::new());
    let waiting = Mutex::new(VecDeque::from(targets));
    let next = || waiting.lock().expect("nobody panics with it").pop_front();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(target) = next() {
                    if let Err(error) = attack(&target, seconds) {
                        say_error(&format!("{error:#}"));
                        broken.lock().expect("nobody panics with it").push(target.name);
                    }
                }
            });
        }
    });
    let broken = broken.into_inner().expect("nobody panics with it");
    if !broken.is_empty() {
        bail!("fuzz targets that failed: {}", broken.join(", "));
    }
    Ok(())
}

/// The targets of a workspace: its programs.
fn names(folder: &Path) -> Result<Vec<String>> {
    let files = workspace::files(&folder.join("fuzz_targets"), &|_| true)?;
    let mut names = Vec::new();
    for file in files {
        // Others are modules that targets share.
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        if let Some(name) = file.file_stem().filter(|_| text.contains("fuzz_target!(")) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// The triple that rustc compiles for here, and whether it has the address sanitizer's runtime for it.
fn compiler() -> Result<(String, bool)> {
    let ask = |arguments: &[&str]| {
        output(clean(Command::new("rustc")).args(arguments)).context("rustc does not answer")
    };
    let version = ask(&["-vV"])?;
    let triple =
        version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let library =
        Path::new(ask(&["--print", "sysroot"])?.trim()).join("lib/rustlib").join(triple).join("lib");
    let entries = std::fs::read_dir(&library).with_context(|| format!("reading {}", library.display()))?;
    let has_sanitizer =
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with("_rt.asan.a"));
    Ok((triple.to_owned(), has_sanitizer))
}

fn build(folder: &Path, wanted: &[&str]) -> Result<Vec<Target>> {
    let (triple, has_sanitizer) = compiler()?;
    let mut flags = INSTRUMENTATION.to_vec();
    if has_sanitizer {
        flags.push(SANITIZER);
    } else {
        say("this rustc comes without the address sanitizer (rustup's has it): fuzzing without");
    }
    say(&format!("building fuzz targets: {}", wanted.join(", ")));
    let place = workspace::target().join("fuzz");
    // For a target, so that build scripts and macros are not instrumented.
    let mut command = clean(Command::new("cargo"));
    command.args(["build", "--quiet", "--locked", "--release", "--target", &triple]).current_dir(folder);
    command.args(wanted.iter().flat_map(|name| ["--bin", name]));
    command.env("CARGO_TARGET_DIR", &place).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    run(command.env("RUSTC_BOOTSTRAP", "1")).context("the fuzz targets do not build")?;
    let programs = place.join(triple).join("release");
    let target = |name: &&str| Target {
        name: (*name).to_owned(),
        program: programs.join(name),
        seeds: folder.join("corpus").join(name),
    };
    Ok(wanted.iter().map(target).collect())
}

/// Runs a target. What it found new is kept for the next time; the corpus in the tree is only read.
fn attack(target: &Target, seconds: u64) -> Result<()> {
    let Target { name, program, seeds } = target;
    let place = workspace::target().join("fuzz");
    let (found, crashes) = (place.join("corpus").join(name), place.join("crashes"));
    for folder in [&found, &crashes] {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let output = Command::new(program)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/{name}-", crashes.display()))
        // Leaked frames are counted by the targets themselves; looking for leaked memory needs rights that containers lack.
        .args([
            "-timeout=20",
            "-rss_limit_mb=2048",
            "-max_len=8192",
            "-detect_leaks=0",
            "-print_final_stats=1",
        ])
        .args([&found, seeds])
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let lines: Vec<&str> = text.lines().collect();
        bail!("{name}: {}\n{}", output.status, lines[lines.len().saturating_sub(60)..].join("\n"));
    }
    let executed = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let executed = executed.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0);
    if executed == 0 {
        bail!("{name} has run nothing:\n{text}");
    }
    say(&format!("{name}: {executed} inputs"));
    Ok(())
}
