//! `lint`: the rules of the house that neither rustc nor clippy checks.
//!
//! Each rule collects what breaks it, so that one run names everything.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::{clean, find, output, run, say, say_error};
use crate::workspace;

/// Which crates of ours each crate may depend on: arrows point down only. Dev-dependencies count.
/// A crate that is not listed may not exist; `*` stands for all of them.
const ARROWS: [(&str, &[&str]); 11] = [
    ("sluice-pipeline", &[]),
    ("sluice-programs", &["sluice-pipeline"]),
    ("sluice-policy", &["sluice-pipeline"]),
    ("sluice-kernel", &["sluice-pipeline", "sluice-policy"]),
    ("sluice-eswitch", &["sluice-pipeline", "sluice-policy"]),
    ("sluice-user", &["sluice-pipeline", "sluice-policy"]),
    ("sluice-proto", &[]),
    (
        "sluice-control",
        &[
            "sluice-pipeline",
            "sluice-policy",
            "sluice-kernel",
            "sluice-eswitch",
            "sluice-user",
            "sluice-proto",
        ],
    ),
    ("sluice-benches", &["*"]),
    ("sluice-tests", &["*"]),
    ("xtask", &[]),
];

/// The modules that may hold `unsafe` code; their crates deny it elsewhere, every other crate forbids it.
const UNSAFE_MODULES: [&str; 16] = [
    "benches/src/bpf.rs",
    "dataplane/eswitch/src/nic/firmware.rs",
    "dataplane/eswitch/src/probe/packet.rs",
    "dataplane/kernel/src/ethtool.rs",
    "dataplane/kernel/src/syscall.rs",
    "dataplane/user/src/frame/buffer.rs",
    "dataplane/user/src/hint.rs",
    "dataplane/user/src/tap/sys.rs",
    "dataplane/user/src/vhost/memory.rs",
    "dataplane/user/src/vhost/notify/bell.rs",
    "dataplane/user/src/vhost/packed/ring.rs",
    "dataplane/user/src/vhost/ring.rs",
    "dataplane/user/src/vhost/sigbus.rs",
    "dataplane/user/src/xdp/ring.rs",
    "dataplane/user/src/xdp/sys.rs",
    "tests/src/sys.rs",
];

/// Crates that are unsafe by nature: every BPF helper call is.
const UNSAFE_CRATES: [&str; 1] = ["sluice-programs"];

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What broke a rule, and where.
type Complaints = Vec<String>;

/// Check every rule.
pub(crate) fn lint() -> Result<()> {
    let packages = packages()?;
    let files = tracked_files()?;
    let mut complaints = Complaints::new();
    arrows(&packages, &mut complaints);
    unsafe_code(&packages, &mut complaints)?;
    module_docs(&files, &mut complaints)?;
    portable_text(&files, &mut complaints)?;
    for complaint in &complaints {
        say_error(complaint);
    }
    if !complaints.is_empty() {
        bail!("{} broken rules", complaints.len());
    }
    say("crate arrows, unsafe code, module docs and portable text: fine");
    deny()
}

/// A crate of ours, as `cargo metadata` describes it.
struct Package {
    name: String,
    folder: PathBuf,
    dependencies: Vec<String>,
    /// The files that are crate roots of libraries and programs (not of tests and examples).
    roots: Vec<PathBuf>,
}

fn packages() -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    for manifest in ["Cargo.toml", "ebpf/programs/Cargo.toml"] {
        let text = output(
            clean(Command::new("cargo"))
                .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
                .arg(workspace::root().join(manifest)),
        )
        .with_context(|| format!("`cargo metadata` fails on {manifest}"))?;
        let metadata: Value = serde_json::from_str(&text).context("reading cargo's metadata")?;
        packages.extend(list(&metadata["packages"]).iter().map(package));
    }
    Ok(packages)
}

fn package(value: &Value) -> Package {
    let manifest = PathBuf::from(text(&value["manifest_path"]));
    let is_root = |target: &&Value| {
        list(&target["kind"]).iter().any(|kind| matches!(text(kind), "lib" | "bin" | "proc-macro"))
    };
    Package {
        name: text(&value["name"]).to_owned(),
        folder: manifest.parent().map(Path::to_owned).unwrap_or_default(),
        dependencies: list(&value["dependencies"]).iter().map(|d| text(&d["name"]).to_owned()).collect(),
        roots: list(&value["targets"])
            .iter()
            .filter(is_root)
            .map(|target| PathBuf::from(text(&target["src_path"])))
            .collect(),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn arrows(packages: &[Package], complaints: &mut Complaints) {
    for package in packages {
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
            complaints
                .push(format!("crate {} has no place in the layout; give it one in lint.rs", package.name));
            continue;
        };
        for dependency in &package.dependencies {
            let ours = packages.iter().any(|other| other.name == *dependency);
            if ours && !allowed.contains(&"*") && !allowed.contains(&dependency.as_str()) {
                complaints
                    .push(format!("{} may not depend on {dependency}: arrows point down", package.name));
            }
        }
    }
}

fn unsafe_code(packages: &[Package], complaints: &mut Complaints) -> Result<()> {
    for package in packages.iter().filter(|package| !UNSAFE_CRATES.contains(&package.name.as_str())) {
        let mut named = UNSAFE_MODULES.iter().map(|module| workspace::root().join(module));
        let may_deny = named.any(|module| module.starts_with(&package.folder));
        for root in &package.roots {
            let text = read(root)?;
            let says = |level| text.lines().any(|line| line.trim() == format!("#![{level}(unsafe_code)]"));
            let is_said = says("forbid") || (may_deny && says("deny"));
            if !is_said {
                let level = if may_deny { "deny" } else { "forbid" };
                complaints.push(format!("{} does not say #![{level}(unsafe_code)]", shown(root)));
            }
        }
    }
    Ok(())
}

fn module_docs(files: &[PathBuf], complaints: &mut Complaints) -> Result<()> {
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs")) {
        let text = read(file)?;
        let lines = text.lines().map(str::trim);
        let first = lines.clone().find(|line| !line.is_empty() && !line.starts_with("#!"));
        // A file of unit tests says nothing that its parent does not.
        if !file.ends_with("tests.rs") && !first.is_some_and(|line| line.starts_with("//!")) {
            complaints.push(format!("{} does not open with `//!` saying what it is", shown(file)));
        }
        let allows_unsafe = lines.into_iter().any(|line| line.contains("allow(unsafe_code)"));
        let is_named =
            UNSAFE_MODULES.iter().any(|module| file.ends_with(module)) || shown(file) == "xtask/src/lint.rs";
        if allows_unsafe && !is_named {
            complaints.push(format!("{} allows unsafe code but is not a named module", shown(file)));
        }
    }
    Ok(())
}

/// Nothing in the repository may know of the machine that it was written on.
fn portable_text(files: &[PathBuf], complaints: &mut Complaints) -> Result<()> {
    let root = workspace::root();
    let mut forbidden = vec![(root.display().to_string(), "the path of this checkout")];
    if let Some(home) = std::env::var("HOME").ok().filter(|home| home.len() > 1) {
        forbidden.push((format!("{home}/"), "this user's home folder"));
    }
    if let Some(host) = output(&mut Command::new("hostname")).map(|host| host.trim().to_owned())
        && host.len() > 4
        && !host.starts_with("debian")
        && !host.starts_with("localhost")
    {
        forbidden.push((host, "this machine's name"));
    }
    for file in files {
        // Binary files hold no text to check.
        let Ok(text) = std::fs::read_to_string(file) else { continue };
        for (needle, what) in &forbidden {
            if let Some((number, _)) =
                text.lines().enumerate().find(|(_, line)| line.contains(needle.as_str()))
            {
                complaints.push(format!("{}:{} contains {what} ({needle})", shown(file), number + 1));
            }
        }
        if file.ends_with("Cargo.lock") {
            let foreign = |line: &&str| line.starts_with("source = ") && !line.contains(CRATES_IO);
            for line in text.lines().filter(foreign) {
                complaints.push(format!("{}: {line}: only crates.io is a source", shown(file)));
            }
        }
    }
    Ok(())
}

/// Files that git knows or would add, that exist.
fn tracked_files() -> Result<Vec<PathBuf>> {
    let root = workspace::root();
    let listed = output(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(&root),
    )
    .context("`git ls-files` fails; lint runs in a git checkout")?;
    Ok(listed.lines().map(|name| root.join(name)).filter(|file| file.is_file()).collect())
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))
}

fn shown(file: &Path) -> String {
    file.strip_prefix(workspace::root()).unwrap_or(file).display().to_string()
}

/// Licences, bans and sources of the crates that we depend on.
fn deny() -> Result<()> {
    let own = workspace::tools().join("bin/cargo-deny");
    let program = match find("cargo-deny") {
        Some(program) => program,
        None => {
            if !own.exists() {
                say(&format!("building cargo-deny into {} (a minute or two, once)", own.display()));
                run(clean(Command::new("cargo"))
                    .args(["install", "--locked", "--quiet", "--debug", "cargo-deny@0.20.2", "--root"])
                    .arg(workspace::tools())
                    .env_remove("CARGO_TARGET_DIR"))?;
            }
            own
        }
    };
    for manifest in ["Cargo.toml", "ebpf/programs/Cargo.toml"] {
        run(clean(Command::new(&program))
            .args(["--log-level", "error", "--manifest-path"])
            .arg(workspace::root().join(manifest))
            .arg("--config")
            .arg(workspace::root().join("deny.toml"))
            .arg("check")
            .args(["bans", "licenses", "sources"]))?;
    }
    Ok(())
}
