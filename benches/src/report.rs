//! Results: samples, the table on screen, the goals, and JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::bpf::Kind;
use crate::measure::{Rate, Stream, median};
use crate::switch::{self, Setup};

/// Samples of small-frame forwarding, one per round.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Rates {
    /// Million frames per second.
    mpps: Vec<f64>,
    /// CPU seconds per million frames.
    cpu_s_per_mpkt: Vec<f64>,
    /// Part of the frames that arrived.
    delivered: Vec<f64>,
}

impl Rates {
    pub(crate) fn add(&mut self, rate: Rate) {
        self.mpps.push(rate.mpps);
        self.cpu_s_per_mpkt.push(rate.cpu_s_per_mpkt);
        self.delivered.push(rate.delivered);
    }
}

/// Samples of TCP streams, one per round.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Streams {
    /// Gbit/s.
    gbps: Vec<f64>,
    /// CPU seconds per gigabyte.
    cpu_s_per_gb: Vec<f64>,
}

impl Streams {
    pub(crate) fn add(&mut self, stream: Stream) {
        self.gbps.push(stream.gbps);
        self.cpu_s_per_gb.push(stream.cpu_s_per_gb);
    }
}

/// Samples of one set-up.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Row {
    /// Small frames of one flow.
    pub(crate) one_flow: Rates,
    /// Small frames of many.
    pub(crate) many_flows: Rates,
    /// One TCP stream.
    pub(crate) tcp: Streams,
    /// Median round trip, microseconds.
    pub(crate) round_trip_us: Vec<f64>,
}

/// A promise and what became of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Goal {
    what: &'static str,
    at_least: f64,
    measured: f64,
}

impl Goal {
    /// Goals of those promises whose figure was measured.
    pub(crate) fn measured<const N: usize>(promises: [(&'static str, f64, Option<f64>); N]) -> Vec<Goal> {
        let goal = |(what, at_least, measured): (_, _, Option<f64>)| {
            Some(Goal { what, at_least, measured: measured? })
        };
        promises.into_iter().filter_map(goal).collect()
    }

    /// Whether it is kept.
    pub(crate) fn is_met(&self) -> bool {
        self.measured >= self.at_least
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_met() { "met   " } else { "MISSED" };
        write!(f, "{verdict} {:5.2} (goal ≥ {:.2})  {}", self.measured, self.at_least, self.what)
    }
}

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    /// `/proc/loadavg` before and after: others on the machine disturb the rates, less so the CPU times.
    load: [String; 2],
}

impl Machine {
    /// To be called before the first sample.
    pub(crate) fn now() -> Result<Machine> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("reading the CPU's name")?;
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Machine {
            kernel: line("/proc/sys/kernel/osrelease")?,
            cpu: cpu.map_or_else(String::new, |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism()?.get(),
            load: [line("/proc/loadavg")?, String::new()],
        })
    }

    /// To be called after the last sample.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.load[1] = line("/proc/loadavg")?;
        Ok(())
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} × {}, Linux {}", self.cpus, self.cpu, self.kernel)?;
        writeln!(f, "load average before: {}; after: {}", self.load[0], self.load[1])
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    machine: Machine,
    /// How many flows are many.
    flows: u16,
    setups: BTreeMap<&'static str, Row>,
    goals: Vec<Goal>,
    #[serde(skip)]
    order: Vec<&'static Setup>,
}

impl Report {
    pub(crate) fn new(setups: impl Iterator<Item = &'static Setup>, flows: u16) -> Result<Report> {
        let order: Vec<&'static Setup> = setups.collect();
        Ok(Report {
            machine: Machine::now()?,
            flows,
            setups: order.iter().map(|setup| (setup.name, Row::default())).collect(),
            goals: Vec::new(),
            order,
        })
    }

    /// The row of a set-up.
    pub(crate) fn row(&mut self, name: &'static str) -> &mut Row {
        self.setups.entry(name).or_default()
    }

    /// To be called after the last sample.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.machine.finish()?;
        let small = |row: &Row| row.one_flow.cpu_s_per_mpkt.clone();
        // The promise is about a thousand.
        let counts = self.flows <= 1000;
        let many = |row: &Row| if counts { row.many_flows.cpu_s_per_mpkt.clone() } else { Vec::new() };
        let tcp = |row: &Row| row.tcp.gbps.clone();
        use switch::{BRIDGE, BRIDGE_XDP_SINK, TCX, TCX_RULES, XDP, XDP_RULES};
        // CPU time is a cost: less of it is more speed, so the peer's stands above the line.
        let goals = [
            ("TCX: 64 B rate, times the bridge's", 1.3, self.ratio(BRIDGE, TCX, small)),
            ("TCX: TCP throughput, times the bridge's", 0.95, self.ratio(TCX, BRIDGE, tcp)),
            ("XDP: 64 B rate, times the bridge's", 3.0, self.ratio(BRIDGE_XDP_SINK, XDP, small)),
            (
                "TCX with 1 000 rules, 1 flow: part of the rate without",
                0.8,
                self.ratio(TCX, TCX_RULES, small),
            ),
            ("TCX with 1 000 rules, 1 000 flows: likewise", 0.8, self.ratio(TCX, TCX_RULES, many)),
            ("XDP with 1 000 rules, 1 flow: likewise", 0.8, self.ratio(XDP, XDP_RULES, small)),
            ("XDP with 1 000 rules, 1 000 flows: likewise", 0.8, self.ratio(XDP, XDP_RULES, many)),
        ];
        self.goals = Goal::measured(goals);
        Ok(())
    }

    /// Median ratio of the samples of two set-ups, where both were measured. Those of the same round are compared, since
    /// they were taken seconds apart and had the same disturbances to bear.
    fn ratio(&self, above: &str, below: &str, samples: impl Fn(&Row) -> Vec<f64>) -> Option<f64> {
        let (above, below) = (samples(self.setups.get(above)?), samples(self.setups.get(below)?));
        let ratios: Vec<f64> = above.iter().zip(&below).map(|(above, below)| above / below).collect();
        middle(&ratios)
    }

    /// Whether every goal that was measured is met.
    pub(crate) fn meets_goals(&self) -> bool {
        self.goals.iter().all(Goal::is_met)
    }

    /// The bridge that has the same sink.
    fn peer(setup: &Setup) -> &'static str {
        match setup.sink {
            Kind::Xdp => switch::BRIDGE_XDP_SINK,
            Kind::Tcx => switch::BRIDGE,
        }
    }
}

/// Writes a report as JSON, once under its date and once as the latest of its kind, and returns where.
pub(crate) fn save(report: &impl Serialize, kind: &str, folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let text = serde_json::to_string_pretty(report)?;
    let latest = folder.join(format!("{kind}.json"));
    for file in [folder.join(format!("{kind}-{seconds}.json")), latest.clone()] {
        std::fs::write(&file, &text).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(latest.canonicalize().unwrap_or(latest))
}

fn line(file: &str) -> Result<String> {
    Ok(std::fs::read_to_string(file).with_context(|| format!("reading {file}"))?.trim().to_owned())
}

/// A number in a column, or a dash.
pub(crate) fn cell(value: Option<f64>, places: usize) -> String {
    match value {
        Some(value) if value.is_finite() => format!("{value:.places$}"),
        _ => "-".to_owned(),
    }
}

pub(crate) fn middle(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| median(&mut values.to_vec()))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}", self.machine)?;
        writeln!(
            f,
            "{:<16}|{:>8} {:>8} {:>8} |{:>8} {:>8} |{:>8} {:>8} {:>8} |{:>8}",
            "",
            "64 B",
            "CPU s",
            "times",
            format!("{} fl.", self.flows),
            "CPU s",
            "TCP",
            "CPU s",
            "times",
            "RTT p50"
        )?;
        writeln!(
            f,
            "{:<16}|{:>8} {:>8} {:>8} |{:>8} {:>8} |{:>8} {:>8} {:>8} |{:>8}",
            "medians", "Mpps", "/Mpkt", "bridge", "Mpps", "/Mpkt", "Gbit/s", "/GB", "bridge", "µs"
        )?;
        for setup in &self.order {
            let Some(row) = self.setups.get(setup.name) else { continue };
            let small = self.ratio(Self::peer(setup), setup.name, |row| row.one_flow.cpu_s_per_mpkt.clone());
            let tcp = self.ratio(setup.name, switch::BRIDGE, |row| row.tcp.gbps.clone());
            writeln!(
                f,
                "{:<16}|{:>8} {:>8} {:>8} |{:>8} {:>8} |{:>8} {:>8} {:>8} |{:>8}",
                setup.name,
                cell(middle(&row.one_flow.mpps), 2),
                cell(middle(&row.one_flow.cpu_s_per_mpkt), 3),
                cell(small, 2),
                cell(middle(&row.many_flows.mpps), 2),
                cell(middle(&row.many_flows.cpu_s_per_mpkt), 3),
                cell(middle(&row.tcp.gbps), 2),
                cell(middle(&row.tcp.cpu_s_per_gb), 2),
                cell(tcp, 2),
                cell(middle(&row.round_trip_us), 1),
            )?;
        }
        writeln!(
            f,
            "\n\"times bridge\" of small frames is by CPU time, which the rest of the machine disturbs less than rates."
        )?;
        self.goals.iter().try_for_each(|goal| writeln!(f, "{goal}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::SETUPS;

    fn report(bridge_cost: f64, sluice_cost: f64) -> Report {
        let mut report = Report::new(SETUPS.iter(), 1000).expect("a readable /proc");
        for (name, cost) in [(switch::BRIDGE_XDP_SINK, bridge_cost), (switch::XDP, sluice_cost)] {
            report.row(name).one_flow.add(Rate { mpps: 1.0 / cost, cpu_s_per_mpkt: cost, delivered: 1.0 });
        }
        report.finish().expect("a readable /proc");
        report
    }

    #[test]
    fn less_cpu_time_is_more_speed() {
        let fast = report(0.9, 0.29);
        assert_eq!(fast.goals.len(), 1, "what was not measured is no goal");
        assert!(fast.meets_goals());
        assert!(fast.to_string().contains("met     3.10"), "{fast}");
        let slow = report(0.9, 0.31);
        assert!(!slow.meets_goals());
        assert!(slow.to_string().contains("MISSED  2.90"), "{slow}");
    }
}
