//! The guest's kernel: Debian's packages, unpacked and never installed, and the `netdevsim` module, which Debian does
//! not ship, built from Debian's source of the same version.
//!
//! Kept as `target/lab/kernels/VERSION`; the newest that is there is used, unless a series is asked for. What is there
//! does not change by itself: delete the folder to get what Debian has by then.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::debian::Archive;
use crate::packages::{self, Need};
use crate::process::{output, run, say};
use crate::workspace;

const TOOLS: [Need; 5] = [
    Need::program("gcc", "gcc"),
    Need::program("make", "make"),
    Need::program("xz", "xz-utils"),
    Need::program("modprobe", "kmod"),
    Need::file("/usr/bin/dpkg-deb", "dpkg"),
];

/// Where kernels may come from, with the release whose C library their tools are built against.
const SUITES: [&str; 3] = ["trixie-backports", "bookworm-backports", "trixie"];

/// A kernel that is ready to boot.
pub(super) struct Kernel {
    /// `vmlinuz`, `busybox` and `lib/modules/RELEASE` are in there.
    pub(super) folder: PathBuf,
    /// As `uname -r` says.
    pub(super) release: String,
}

/// Finds the kernel, or makes it ready: a minute, once.
pub(super) fn ensure(series: Option<&str>) -> Result<Kernel> {
    packages::ensure("the lab", &TOOLS)?;
    let kernels = workspace::target().join("lab/kernels");
    fs::create_dir_all(&kernels).with_context(|| format!("making {}", kernels.display()))?;
    if let Some(kernel) = prepared(&kernels, series)? {
        return Ok(kernel);
    }
    // One prepares, others wait for it and then find what it has made.
    let lock = File::create(kernels.join(".lock")).context("making the lab's lock")?;
    lock.lock().context("waiting for another preparation of the lab")?;
    match prepared(&kernels, series)? {
        Some(kernel) => Ok(kernel),
        None => prepare(&kernels, series),
    }
}

/// The newest kernel of a series that is there already.
fn prepared(kernels: &Path, series: Option<&str>) -> Result<Option<Kernel>> {
    let mut newest: Option<PathBuf> = None;
    for entry in fs::read_dir(kernels).context("reading the lab's kernels")? {
        let path = entry.context("reading the lab's kernels")?.path();
        let name = name_of(&path);
        if name.starts_with('.') || series.is_some_and(|series| self::series(&name) != series) {
            continue;
        }
        if newest.as_ref().is_none_or(|other| numbers(&name) > numbers(&name_of(other))) {
            newest = Some(path);
        }
    }
    newest.map(open).transpose()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The numbers in a version, which compare as versions of kernels do.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

fn open(folder: PathBuf) -> Result<Kernel> {
    let modules = folder.join("lib/modules");
    let release = fs::read_dir(&modules)
        .ok()
        .and_then(|mut entries| entries.next()?.ok())
        .with_context(|| format!("{} holds no kernel; delete it", folder.display()))?;
    Ok(Kernel { release: release.file_name().to_string_lossy().into_owned(), folder })
}

/// `7.2` of `7.2.12-1~bpo13+1`.
fn series(version: &str) -> String {
    version.split(['.', '-']).take(2).collect::<Vec<_>>().join(".")
}

/// A kernel as Debian's packages name it.
struct Packaged {
    /// Of the packages, such as `7.2.12-1~bpo13+1`.
    version: String,
    /// As `uname -r` says, such as `7.2.12+deb13-amd64`.
    release: String,
}

impl Packaged {
    fn find(archive: &Archive, wanted: Option<&str>) -> Result<Packaged> {
        let images = archive.versions("linux-image-amd64");
        let image = images
            .iter()
            .find(|image| match wanted {
                Some(wanted) => series(&image.version) == wanted,
                None => image.suite == SUITES[0],
            })
            .with_context(|| {
                let known: Vec<String> = images.iter().map(|image| series(&image.version)).collect();
                format!("Debian has no kernel {}; it has {}", wanted.unwrap_or_default(), known.join(", "))
            })?;
        let depends = archive.depends("linux-image-amd64", &image.version).unwrap_or_default();
        let release = depends
            .split([' ', ','])
            .find_map(|word| word.strip_prefix("linux-image-"))
            .with_context(|| format!("linux-image-amd64 {} names no kernel: {depends}", image.version))?;
        Ok(Packaged { version: image.version.clone(), release: release.to_owned() })
    }

    /// Without the flavour, as packages that all flavours share are named.
    fn base(&self) -> &str {
        self.release.strip_suffix("-amd64").unwrap_or(&self.release)
    }

    /// The packages to fetch. Newer kernels are split into more of them.
    fn packages(&self, archive: &Archive) -> Vec<String> {
        let (release, base) = (&self.release, self.base());
        let names = [
            format!("linux-image-{release}"),
            format!("linux-binary-{release}"),
            format!("linux-modules-{release}"),
            format!("linux-base-{release}"),
            format!("linux-headers-{release}"),
            format!("linux-headers-{base}-common"),
            format!("linux-kbuild-{base}"),
            format!("linux-source-{}", series(&self.version)),
        ];
        names
            .into_iter()
            .filter(|name| archive.depends(name, &self.version).is_some())
            .map(|name| format!("{name}={}", self.version))
            .chain(["libc6/trixie".to_owned(), "busybox-static/trixie".to_owned()])
            .collect()
    }
}

fn prepare(kernels: &Path, series: Option<&str>) -> Result<Kernel> {
    let start = Instant::now();
    let archive = Archive::open(&workspace::target().join("lab/apt"), &SUITES)?;
    let packaged = Packaged::find(&archive, series)?;
    // Beside the result, so that it can be moved there in one step; whatever a dead preparation left goes first.
    let work = kernels.join(".work");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    say(&format!("fetching Debian's kernel {} (350 MB, once)", packaged.version));
    let mut source = None;
    let unpacked = work.join("root");
    for package in archive.download(&packaged.packages(&archive), &work.join("packages"))? {
        let name = name_of(&package);
        if name.starts_with("linux-source-") {
            source = Some(package);
            continue;
        }
        // Its C library is for building only, and must not get in the way of anything else.
        let place = if name.starts_with("libc6_") { work.join("libc") } else { unpacked.clone() };
        run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&place))?;
    }
    let source = source.with_context(|| format!("Debian has no source of kernel {}", packaged.version))?;

    let ready = work.join("ready");
    collect(&unpacked, &ready, &packaged.release)?;
    say("building its module netdevsim");
    let module = build_netdevsim(&work, &unpacked, &source, &packaged)?;
    let extra = ready.join("lib/modules").join(&packaged.release).join("extra");
    fs::create_dir_all(&extra).context("making a folder for the module")?;
    run(Command::new("strip").arg("--strip-debug").arg("-o").arg(extra.join("netdevsim.ko")).arg(module))?;
    run(Command::new(crate::process::find("depmod").context("package kmod brings no depmod")?)
        .arg("-b")
        .arg(&ready)
        .arg(&packaged.release))?;

    let folder = kernels.join(&packaged.version);
    fs::rename(&ready, &folder).with_context(|| format!("moving the kernel to {}", folder.display()))?;
    // The packages are not needed again.
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    say(&format!("the lab is ready, after {} s", start.elapsed().as_secs()));
    open(folder)
}

/// Puts together what the guest needs of the unpacked packages.
fn collect(unpacked: &Path, ready: &Path, release: &str) -> Result<()> {
    let first = |candidates: &[String]| {
        candidates
            .iter()
            .map(|candidate| unpacked.join(candidate))
            .find(|path| path.exists())
            .with_context(|| format!("Debian's packages bring none of {}", candidates.join(", ")))
    };
    let keep = |from: PathBuf, to: &str| {
        let to = ready.join(to);
        fs::rename(&from, &to).with_context(|| format!("moving {} to {}", from.display(), to.display()))
    };
    fs::create_dir_all(ready.join("lib/modules")).with_context(|| format!("making {}", ready.display()))?;
    keep(
        first(&[format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")])?,
        "vmlinuz",
    )?;
    keep(first(&["usr/bin/busybox".to_owned(), "bin/busybox".to_owned()])?, "busybox")?;
    keep(
        first(&[format!("usr/lib/modules/{release}"), format!("lib/modules/{release}")])?,
        &format!("lib/modules/{release}"),
    )
}

/// Builds the module against the kernel's headers, as stock as it is but for [its limit of VFs](raise_vf_limit).
fn build_netdevsim(work: &Path, unpacked: &Path, source: &Path, packaged: &Packaged) -> Result<PathBuf> {
    let base = packaged.base();
    let module = extract_netdevsim(work, source)?;
    raise_vf_limit(&module)?;
    let headers = unpacked.join("usr/src").join(format!("linux-headers-{}", packaged.release));
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).with_context(|| format!("reading {}", makefile.display()))?;
    fs::write(&makefile, text.replace("/usr/src/", &format!("{}/", unpacked.join("usr/src").display())))
        .context("making the headers find each other")?;
    run_with_own_libc(
        &unpacked.join("usr/lib").join(format!("linux-kbuild-{base}")),
        &work.join("libc/usr"),
    )?;
    let log = work.join("netdevsim.log");
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(&headers)
        .arg(format!("M={}", module.display()))
        // Debian names the compiler that it used; any that is not too old can build a module for it.
        .args(["CC=gcc", "HOSTCC=gcc", "CONFIG_NETDEVSIM=m", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"])
        .arg(format!("-j{}", std::thread::available_parallelism().map_or(1, usize::from)))
        .stdout(File::create(&log).context("writing the build's log")?)
        .stderr(File::options().append(true).open(&log).context("writing the build's log")?);
    if output(
        Command::new("gcc")
            .args(["-fmin-function-alignment=16", "-E", "-x", "c", "/dev/null"])
            .stderr(Stdio::null()),
    )
    .is_none()
    {
        // An option of GCC 14, for live patching; older ones do without.
        make.arg("CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=");
    }
    let built = module.join("netdevsim.ko");
    let status = make.status().context("running make")?;
    if !status.success() || !built.exists() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(20).collect();
        bail!(
            "the module netdevsim of kernel {} does not build:\n{}",
            packaged.version,
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    Ok(built)
}

/// Takes the module's source out of the kernel's, which is large: nothing else is written to disk.
fn extract_netdevsim(work: &Path, package: &Path) -> Result<PathBuf> {
    const FOLDER: &str = "drivers/net/netdevsim";
    let mut unpack = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("running dpkg-deb")?;
    let outer = unpack.stdout.take().context("dpkg-deb has no output")?;
    let mut pick = Command::new("tar")
        .args(["--extract", "--to-stdout", "--wildcards", "*.tar.xz"])
        .stdin(outer)
        .stdout(Stdio::piped())
        .spawn()
        .context("running tar")?;
    let packed = pick.stdout.take().context("tar has no output")?;
    let mut decompress = Command::new("xz")
        .args(["--decompress", "--stdout", "--threads=0"])
        .stdin(packed)
        .stdout(Stdio::piped())
        .spawn()
        .context("running xz")?;
    let inner = decompress.stdout.take().context("xz has no output")?;
    run(Command::new("tar")
        .arg("--extract")
        .arg("--directory")
        .arg(work)
        .args(["--strip-components=1", "--wildcards", &format!("*/{FOLDER}/*")])
        .stdin(inner))?;
    for mut process in [unpack, pick, decompress] {
        let status = process.wait().context("unpacking the kernel's source")?;
        if !status.success() {
            bail!("unpacking the kernel's source failed: {status}");
        }
    }
    Ok(work.join(FOLDER))
}

/// Lets a simulated NIC have as many VFs as large NICs do. Until Linux 7.2 the tests ask for that when they run; since 7.3 the
/// number is compiled in.
fn raise_vf_limit(module: &Path) -> Result<()> {
    const STOCK: &str = "#define NSIM_BUS_DEV_MAX_VFS 4\n";
    let at = |name: &str| module.join(name);
    let read =
        |name: &str| fs::read_to_string(at(name)).with_context(|| format!("reading {name} of netdevsim"));
    let is_settable = read("dev.c")?.contains("\"max_vfs\"") || read("bus.c")?.contains("\"max_vfs\"");
    if !is_settable {
        let header = read("netdevsim.h")?.replace(STOCK, "#define NSIM_BUS_DEV_MAX_VFS 256\n");
        fs::write(at("netdevsim.h"), header).context("raising netdevsim's limit of VFs")?;
    }
    Ok(())
}

/// Lets the programs that build modules run with the C library of the release that they were built for, where this
/// machine's is older.
fn run_with_own_libc(kbuild: &Path, libc: &Path) -> Result<()> {
    for (tool, real) in [
        ("tools/objtool/objtool", "tools/objtool/objtool.real-x86"),
        ("scripts/mod/modpost", "scripts/mod/modpost.real-lsb-64"),
        ("scripts/basic/fixdep", "scripts/basic/fixdep.real"),
    ] {
        let (tool, real) = (kbuild.join(tool), kbuild.join(real));
        if !real.exists() {
            fs::rename(&tool, &real)
                .with_context(|| format!("the kernel's packages bring no {}", tool.display()))?;
        }
        let script = format!(
            "#!/bin/sh\nexec '{}' --library-path '{}' '{}' \"$@\"\n",
            libc.join("lib64/ld-linux-x86-64.so.2").display(),
            libc.join("lib/x86_64-linux-gnu").display(),
            real.display()
        );
        fs::write(&tool, script).with_context(|| format!("writing {}", tool.display()))?;
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("making {} executable", tool.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{numbers, series};

    #[test]
    fn a_version_names_its_series() {
        assert_eq!(series("7.2.12-1~bpo13+1"), "7.2");
        assert_eq!(series("6.12.95-1~bpo12+1"), "6.12");
        assert_eq!(series("8.0-1"), "8.0");
    }
    #[test]
    fn versions_are_in_order() {
        assert!(numbers("7.2.12-1~bpo13+1") > numbers("6.12.107-1"));
        assert!(numbers("7.2.12-1~bpo13+1") > numbers("7.2.9-1~bpo13+1"));
        assert!(numbers("7.10.1-1") > numbers("7.9.8-1"));
    }
}
