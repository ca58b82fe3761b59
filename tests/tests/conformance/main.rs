//! Conformance: the same policy gives the same verdict everywhere, on inputs nobody picked.
//!
//! A seed makes configurations, and for each a state and frames. Each case goes through
//! - the oracle, which says what must happen;
//! - native `decide`, with the outermost tag in the bytes and beside them, and as XDP sees it;
//! - the userspace engine, between ports in memory;
//! - `sluice_tc` under `BPF_PROG_TEST_RUN` (floods really leave, through taps);
//! - `sluice_xdp` under `BPF_PROG_TEST_RUN`;
//! - the wire: the frame is written to a tap, as a VM would send it, and whatever comes out of all taps is read. On half
//!   of the configurations the taps have XDP in front of TCX.
//!
//! Compared are the verdict, the drop reasons and where they were counted, the ports, every byte of every frame that
//! left, and what was learnt. The kernel engine goes from configuration to configuration by its own differences, so
//! that is tested along the way.
//!
//! `SLUICE_SEED` replays a seed, `SLUICE_CASES` sets the number of cases.

#![forbid(unsafe_code)]
// The seed and what was covered are what one wants to read.
#![allow(clippy::print_stderr)]

mod case;
mod datapath;
mod lanes;

use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use sluice_tests::{Netns, lab_guest};

use crate::case::Cases;
use crate::lanes::Lanes;

/// Cases per run, unless told.
const CASES: u64 = 24_000;
/// In the lab, where everything is emulated, there is time for few cases: these are known to cover enough.
const IN_THE_LAB: [(&str, &str); 2] = [("SLUICE_SEED", "7"), ("SLUICE_CASES", "600")];
/// Frames per configuration.
const FRAMES: u64 = 100;

fn number(variable: &str, default: impl FnOnce() -> u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is not a number: {text}")),
        Err(_) => Ok(default()),
    }
}

#[test]
fn every_engine_agrees_with_the_oracle() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "needs root: run `cargo xtask test` as root");
    let seed = number("SLUICE_SEED", || {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(1, |elapsed| elapsed.as_nanos() as u64);
        now ^ u64::from(std::process::id()) << 40
    })?;
    let wanted = number("SLUICE_CASES", || CASES)?;
    eprintln!("SLUICE_SEED={seed} SLUICE_CASES={wanted}");
    let netns = Netns::create(&format!("sl-{}-conformance", std::process::id()))?;
    netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    let begin = Instant::now();
    let report = netns.enter(|| {
        let mut lanes = Lanes::open()?;
        let mut cases = Cases::new(seed);
        while lanes.report.cases < wanted {
            let setting = cases.next_setting();
            lanes
                .configure(&setting)
                .with_context(|| format!("SLUICE_SEED={seed}, setting {}", setting.number))?;
            for _ in 0..FRAMES {
                let case = cases.next_case(&setting);
                lanes.check(&setting, &case).map_err(|error| {
                    let number = setting.number;
                    anyhow!(
                        "SLUICE_SEED={seed}: setting {number}, {case}\n{error:#}\n{:#?}",
                        setting.scenario
                    )
                })?;
            }
            lanes
                .settle(&setting)
                .with_context(|| format!("SLUICE_SEED={seed}, setting {}", setting.number))?;
        }
        lanes.close()
    })?;
    eprintln!("{report}\n{} cases, no disagreement, {:.1?}", report.cases, begin.elapsed());
    report.must_have_seen_enough()
}

/// Another kernel, whose verifier and drivers are its own.
#[test]
fn every_engine_agrees_in_the_lab() -> Result<()> {
    lab_guest::run_in_lab(&["--exact", "every_engine_agrees_with_the_oracle", "--nocapture"], &IN_THE_LAB)
}
