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

/// Samples of one set-up, one per round: millions of frames per second, and Gbit/s.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Row {
    one_flow: Vec<Sample>,
    many_flows: Vec<Sample>,
    tcp: Vec<f64>,
}

/// Rates between cores that were near each other; all of them, if there are none.
fn rates(samples: &[Sample]) -> Vec<f64> {
    let near = samples.iter().filter(|sample| distance::is_near(sample.distance));
    let near: Vec<f64> = near.map(|sample| sample.mpps).collect();
    if near.is_empty() { samples.iter().map(|sample| sample.mpps).collect() } else { near }
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
    pub(crate) fn add(&mut self, [one, many]: [Sample; 2]) {
        self.one_flow.push(one);
        self.many_flows.push(many);
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
        let one = |row: &Row| rates(&row.one_flow);
        // The promise is about a thousand.
        let counts = self.flows == 1000;
        let many = |row: &Row| if counts { rates(&row.many_flows) } else { Vec::new() };
        let goals = [
            ("vhost-user: 64 B rate, times OVS-DPDK's", 1.1, self.ratio(SLUICE, OVS, one)),
            (
                "vhost-user, 10 rules, 1 000 flows: rate, times OVS-DPDK's",
                1.5,
                self.ratio(SLUICE_RULES, OVS_RULES, many),
            ),
            ("AF_XDP: 64 B rate, times OVS's", 1.2, self.ratio(XDP_SLUICE, XDP_OVS, one)),
            ("AF_XDP: 64 B rate, part of testpmd's io-forward", 0.95, self.ratio(XDP_SLUICE, XDP_WIRE, one)),
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

    /// Whether every goal that was measured is met.
    pub(crate) fn meets_goals(&self) -> bool {
        self.goals.iter().all(Goal::is_met)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}", self.machine)?;
        let many = format!("{} fl.", self.flows);
        writeln!(
            f,
            "{:<16}|{:>8} {:>8} |{:>8} {:>8} |{:>8} |{:>10}",
            "", "64 B", "times", many, "times", "TCP", "core to"
        )?;
        writeln!(
            f,
            "{:<16}|{:>8} {:>8} |{:>8} {:>8} |{:>8} |{:>10}",
            "medians", "Mpps", "OVS", "Mpps", "OVS", "Gbit/s", "core, ns"
        )?;
        for setup in &self.order {
            let Some(row) = self.setups.get(setup.name) else { continue };
            let peer = match setup.name {
                OVS_RULES | SLUICE_RULES => OVS_RULES,
                _ if setup.lane == Lane::Xdp => XDP_OVS,
                _ => OVS,
            };
            let ratio = |samples: fn(&Row) -> Vec<f64>| cell(self.ratio(setup.name, peer, samples), 2);
            writeln!(
                f,
                "{:<16}|{:>8} {:>8} |{:>8} {:>8} |{:>8} |{:>10}",
                setup.name,
                cell(middle(&rates(&row.one_flow)), 2),
                ratio(|row| rates(&row.one_flow)),
                cell(middle(&rates(&row.many_flows)), 2),
                ratio(|row| rates(&row.many_flows)),
                cell(middle(&row.tcp), 2),
                row.distances(),
            )?;
        }
        writeln!(f)?;
        self.goals.iter().try_for_each(|goal| writeln!(f, "{goal}"))
    }
}
