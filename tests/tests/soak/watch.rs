//! What the daemon holds: memory, threads, open files; and what the kernel counts as dropped on its own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use sluice_tests::api::number;
use sluice_tests::{Lab, Netns};

/// What a process holds. Not counted is what comes and goes with requests: see [`Holdings::of`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Open files, by kind: `socket`, `anon_inode:[eventfd]`, a path.
    pub(crate) files: BTreeMap<String, usize>,
    /// Threads, by name, those of the API's pool apart, which idle for a while before they end.
    pub(crate) threads: BTreeMap<String, usize>,
    /// Mappings of shared memory: what guests share, and what the kernel does.
    pub(crate) mappings: usize,
    /// Files in the directory of pins.
    pub(crate) pins: usize,
    /// Interfaces of the host.
    pub(crate) links: usize,
}

impl Holdings {
    /// What the daemon holds now.
    pub(crate) fn of(lab: &Lab) -> Result<Holdings> {
        let process = Path::new("/proc").join(lab.daemon_pid().to_string());
        let mut files = BTreeMap::new();
        for file in std::fs::read_dir(process.join("fd")).context("the daemon's open files")?.flatten() {
            // It may have been closed since.
            let Ok(target) = std::fs::read_link(file.path()) else { continue };
            let text = target.to_string_lossy();
            let kind = text
                .split_once(":[")
                .filter(|(kind, _)| *kind != "anon_inode")
                .map_or(&*text, |(kind, _)| kind);
            *files.entry(kind.to_owned()).or_default() += 1;
        }
        let mut threads = BTreeMap::new();
        for thread in std::fs::read_dir(process.join("task")).context("the daemon's threads")?.flatten() {
            let Ok(name) = std::fs::read_to_string(thread.path().join("comm")) else { continue };
            if name.trim() != "api" {
                *threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        let maps = std::fs::read_to_string(process.join("maps")).context("the daemon's mappings")?;
        let is_shared = |line: &&str| line.split(' ').nth(1).is_some_and(|access| access.ends_with('s'));
        Ok(Holdings {
            files,
            threads,
            mappings: maps.lines().filter(is_shared).count(),
            pins: count_files(&lab.places().pins),
            links: lab.host().run(&["ip", "-brief", "link"])?.lines().count(),
        })
    }
}

fn count_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count_files(&entry.path()) } else { 1 }).sum()
}

/// Memory of the daemon's own in KiB: pages of no file, and shared with nobody.
pub(crate) fn memory(lab: &Lab) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", lab.daemon_pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    line.trim().trim_end_matches(" kB").parse().context("RssAnon is not a number")
}

/// Frames of the userspace engine that are in use.
pub(crate) fn frames_in_use(lab: &Lab) -> Result<u64> {
    let answer = lab.sluice().json(&["stats"])?;
    let frames = answer.get("frames").context("the userspace engine does not run")?;
    Ok(number(&frames["inUse"]))
}

/// Frames that the kernel has dropped for want of room.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped {
    /// At the tap between the engines.
    pub(crate) trunk: u64,
    /// In this machine's backlogs, which everything on it shares.
    pub(crate) backlogs: u64,
}

/// What the kernel has dropped so far.
pub(crate) fn dropped_by_kernel(host: &Netns) -> Result<Dropped> {
    let text = host.run(&["ip", "-json", "-stats", "link"])?;
    let links: serde_json::Value = serde_json::from_str(&text).context("reading the links")?;
    let trunk =
        |link: &&serde_json::Value| link["ifname"].as_str().is_some_and(|name| name.starts_with("slu-"));
    let dropped = |link: &serde_json::Value| {
        number(&link["stats64"]["tx"]["dropped"]) + number(&link["stats64"]["rx"]["dropped"])
    };
    let trunk = links.as_array().into_iter().flatten().filter(trunk).map(dropped).sum();
    let backlogs = std::fs::read_to_string("/proc/net/softnet_stat").context("the kernel's backlogs")?;
    let column = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
    Ok(Dropped { trunk, backlogs: backlogs.lines().filter_map(column).sum() })
}

/// The middle values of the first and of the last half of what was measured.
pub(crate) fn halves(samples: &[u64]) -> (u64, u64) {
    let middle = |part: &[u64]| {
        let mut sorted = part.to_vec();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(0)
    };
    let (first, second) = samples.split_at(samples.len() / 2);
    (middle(first), middle(second))
}
