//! What can be said of the host alone.

use std::fs;
use std::path::Path;

use caps::{CapSet, Capability};
use nix::sys::statfs::{FsType, statfs};
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;

use super::finding;

/// First kernel with TCX links.
const KERNEL_MIN: (u32, u32) = (6, 6);
/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// Examines the host; with a pin directory, also the file system below it.
pub fn host(pin_dir: Option<&Path>) -> Vec<Finding> {
    let mut findings = vec![kernel(), btf(), bpffs(pin_dir.unwrap_or(Path::new("/sys/fs/bpf")))];
    findings.push(capabilities());
    findings
}

fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    match parse_release(release) {
        Some(version) if version >= KERNEL_MIN => finding(Level::Ok, "kernel", release, ""),
        Some(_) => finding(
            Level::Problem,
            "kernel",
            format!("{release} is older than {}.{}", KERNEL_MIN.0, KERNEL_MIN.1),
            "boot a kernel of version 6.6 or later: programs are attached by TCX links",
        ),
        None => finding(Level::Warning, "kernel", format!("version `{release}` cannot be read"), ""),
    }
}

/// Major and minor number of a kernel release.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn btf() -> Finding {
    const PATH: &str = "/sys/kernel/btf/vmlinux";
    if Path::new(PATH).exists() {
        finding(Level::Ok, "BTF", PATH, "")
    } else {
        finding(
            Level::Problem,
            "BTF",
            format!("{PATH} is missing"),
            "use a kernel built with CONFIG_DEBUG_INFO_BTF: without it the kernel engine does not load",
        )
    }
}

fn bpffs(path: &Path) -> Finding {
    // The pin directory may not be there yet: then its nearest ancestor counts.
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    match statfs(existing) {
        Ok(stat) if stat.filesystem_type() == FsType(BPF_FS_MAGIC.into()) => {
            finding(Level::Ok, "bpffs", existing.display().to_string(), "")
        }
        Ok(_) => finding(
            Level::Problem,
            "bpffs",
            format!("{} is not on a BPF file system", existing.display()),
            "mount -t bpf bpf /sys/fs/bpf (sluiced does it at start if it may)",
        ),
        Err(errno) => finding(Level::Problem, "bpffs", format!("{}: {errno}", existing.display()), ""),
    }
}

fn capabilities() -> Finding {
    let needed = [Capability::CAP_NET_ADMIN, Capability::CAP_BPF, Capability::CAP_PERFMON];
    match caps::read(None, CapSet::Effective) {
        Ok(held) => {
            let missing: Vec<String> =
                needed.iter().filter(|cap| !held.contains(cap)).map(ToString::to_string).collect();
            let mut names: Vec<String> = held.iter().map(ToString::to_string).collect();
            names.sort();
            if missing.is_empty() {
                let all = if held.len() > 10 { format!("{} of them", held.len()) } else { names.join(", ") };
                finding(Level::Ok, "capabilities", all, "")
            } else {
                finding(
                    Level::Problem,
                    "capabilities",
                    format!("missing: {}", missing.join(", ")),
                    "run as root, or grant them (AmbientCapabilities= in a systemd unit)",
                )
            }
        }
        Err(error) => finding(Level::Warning, "capabilities", error.to_string(), ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release("6.6-rc1"), Some((6, 6)));
        assert_eq!(parse_release("none"), None);
        assert!(parse_release("10.0") > Some(KERNEL_MIN));
    }
}
