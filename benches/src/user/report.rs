//! Results of the userspace engine and its peers: samples, the table on screen, and the goals.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use serde::Serialize;

use super::distance::{self, Sample};
use super::{
    OVS, OVS_RULES, SLUICE, SLUICE_RULES, Setup, TCP_OFFLOADS, TCP_PLAIN, XDP_OVS, XDP_SLUICE, XDP_WIRE,
};
use crate::report::{Goal, Machine, cell, middle};

/// What a set-up is measured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Guests' rings.
    Vhost,
    /// AF_XDP on veth.
    Xdp,
    /// Guests' rings, with IP stacks behind them.
    Tcp,
}

/// Samples of one set-up: millions of frames per second, and Gbit/s.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Row {
    one_flow: Vec<Sample>,
    many_flows: Vec<Sample>,
    tcp: Vec<f64>,
}

/// Samples between cores near each other, or between distant ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cores {
    Near,
    Far,
}

impl Cores {
    const BOTH: [Cores; 2] = [Cores::Near, Cores::Far];

    /// Those of the samples that were taken between such cores.
    fn of(self, samples: &[Sample]) -> Vec<f64> {
        let is_one = |sample: &&Sample| distance::is_near(sample.distance) == (self == Cores::Near);
        samples.iter().filter(is_one).map(|sample| sample.mpps).collect()
    }
}

impl Row {
    /// How far the two cores were from each other: the nearest and the farthest, in nanoseconds.
    fn distances(&self) -> String {
        let samples = self.one_flow.iter().chain(&self.many_flows).map(|sample| sample.distance);
        let ends = samples.fold(None, |ends: Option<(f64, f64)>, at| {
            Some(ends.map_or((at, at), |(low, high)| (low.min(at), high.max(at))))
        });
        ends.map_or("-".to_owned(), |(low, high)| format!("{low:.0}-{high:.0}"))
    }

    /// One flow, and many.
    pub(crate) fn add(&mut self, [one, many]: [Vec<Sample>; 2]) {
        self.one_flow.extend(one);
        self.many_flows.extend(many);
    }

    /// One stream of TCP.
    pub(crate) fn add_stream(&mut self, gbits: f64) {
        self.tcp.push(gbits);
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    flows: u16,
    setups: BTreeMap<&'static str, Row>,
    goals: Vec<Goal>,
    #[serde(skip)]
    order: Vec<&'static Setup>,
}

impl Report {
    pub(crate) fn new(setups: &[&'static Setup], flows: u16) -> Result<Report> {
        Ok(Report {
            machine: Machine::now()?,
            flows,
            setups: setups.iter().map(|setup| (setup.name, Row::default())).collect(),
            goals: Vec::new(),
            order: setups.to_vec(),
        })
    }

    /// The row of a set-up.
    pub(crate) fn row(&mut self, name: &'static str) -> &mut Row {
        self.setups.entry(name).or_default()
    }

    /// To be called after the last sample.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.machine.finish()?;
        let one = |row: &Row| row.one_flow.clone();
        // The promise is about a thousand.
        let counts = self.flows == 1000;
        let many = |row: &Row| if counts { row.many_flows.clone() } else { Vec::new() };
        let goals = [
            ("vhost-user: 64 B rate, times OVS-DPDK's", 1.1, self.best_known(SLUICE, OVS, one)),
            (
                "vhost-user, 10 rules, 1 000 flows: rate, times OVS-DPDK's",
                1.5,
                self.best_known(SLUICE_RULES, OVS_RULES, many),
            ),
            ("AF_XDP: 64 B rate, times OVS's", 1.2, self.best_known(XDP_SLUICE, XDP_OVS, one)),
            (
                "AF_XDP: 64 B rate, part of testpmd's io-forward",
                0.95,
                self.best_known(XDP_SLUICE, XDP_WIRE, one),
            ),
            (
                "TCP between guests: with offloads, times without",
                2.0,
                self.ratio(TCP_OFFLOADS, TCP_PLAIN, |row| row.tcp.clone()),
            ),
        ];
        self.goals = Goal::measured(goals);
        Ok(())
    }

    /// The ratio between the medians of two set-ups, where both were measured. (Of pairs of the same round, many would compare two
    /// places to which the host has moved a CPU.)
    fn ratio(&self, above: &str, below: &str, samples: impl Fn(&Row) -> Vec<f64>) -> Option<f64> {
        let (above, below) = (samples(self.setups.get(above)?), samples(self.setups.get(below)?));
        Some(middle(&above)? / middle(&below)?)
    }

    /// The ratio between near cores; between distant ones, if not both set-ups were measured between near ones; or of
    /// all samples, if they have no such cores in common.
    fn best_known(&self, above: &str, below: &str, samples: impl Fn(&Row) -> Vec<Sample>) -> Option<f64> {
        let ratios = Cores::BOTH.map(|cores| self.ratio(above, below, |row| cores.of(&samples(row))));
        let all = || self.ratio(above, below, |row| samples(row).iter().map(|sample| sample.mpps).collect());
        ratios.into_iter().flatten().next().or_else(all)
    }

    /// Whether every goal that was measured is met.
    pub(crate) fn meets_goals(&self) -> bool {
        self.goals.iter().all(Goal::is_met)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}", self.machine)?;
        let many = |cores: &str| format!("{} fl., {cores}", self.flows);
        writeln!(
            f,
            "{:<15}|{:^14}|{:^14}|{:^14}|{:^14}|{:>7} |{:>8}",
            "",
            "64 B, near",
            "64 B, far",
            many("near"),
            many("far"),
            "TCP",
            "core to"
        )?;
        let columns = "  Mpps   × OVS";
        writeln!(
            f,
            "{:<15}|{columns}|{columns}|{columns}|{columns}|{:>7} |{:>8}",
            "medians", "Gbit/s", "core, ns"
        )?;
        for setup in &self.order {
            let Some(row) = self.setups.get(setup.name) else { continue };
            let peer = match setup.name {
                OVS_RULES | SLUICE_RULES => OVS_RULES,
                _ if setup.lane == Lane::Xdp => XDP_OVS,
                _ => OVS,
            };
            write!(f, "{:<15}|", setup.name)?;
            let flows: [fn(&Row) -> &[Sample]; 2] = [|row| &row.one_flow, |row| &row.many_flows];
            for samples in flows {
                for cores in Cores::BOTH {
                    let rates = |row: &Row| cores.of(samples(row));
                    let (rate, ratio) = (middle(&rates(row)), self.ratio(setup.name, peer, rates));
                    write!(f, "{:>6} {:>7}|", cell(rate, 2), cell(ratio, 2))?;
                }
            }
            writeln!(f, "{:>7} |{:>8}", cell(middle(&row.tcp), 2), row.distances())?;
        }
        writeln!(f)?;
        self.goals.iter().try_for_each(|goal| writeln!(f, "{goal}"))
    }
}
