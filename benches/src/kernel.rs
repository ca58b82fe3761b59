//! The kernel engine and a Linux bridge between the same two guests.
//!
//! Each set-up has namespaces of its own for the host and for two guests, wired by veth pairs ([`world`](crate::world)); they differ in
//! what forwards between the host's ends ([`switch`](crate::switch)).
//!
//! **What is measured** ([`measure`](crate::measure)). *Small frames*: the kernel runs a program on live frames in the first guest, as
//! fast as it can; every frame that reaches the second guest is counted and dropped there. *TCP*: iperf3, one stream.
//! *Round trip*: one byte there and back over TCP. All of it happens on one CPU each time, so every figure is what one
//! CPU achieves, with what the two ends cost included (the rows `bare` show how much that is of small frames), and does
//! not hang on where the scheduler puts things.
//!
//! **What is kept equal.** All set-ups of a comparison have the same generator and the same sink. Frames that are
//! redirected from XDP to XDP never become socket buffers, so XDP has an XDP sink, and is compared with a bridge that
//! has one; everything else has a sink on TCX. The bridge is spared netfilter, which would halve it. Sluice's vNICs
//! have the guards that a real one has: MAC, IP, DHCP and RA guard.

use anyhow::{Context, Result};

use crate::report::{Report, Row};
use crate::switch::{Bed, Setup};
use crate::{Arguments, measure};

/// TCP streams of a set-up in one round.
const STREAMS: usize = 3;

/// Measures these set-ups.
pub(crate) fn measure(arguments: &Arguments, setups: &[&'static Setup]) -> Result<Report> {
    let mut beds = Vec::with_capacity(setups.len());
    for setup in setups {
        beds.push(Bed::new(setup)?);
    }
    let mut report = Report::new(beds.iter().map(|bed| bed.setup), arguments.flows)?;
    for round in 1..=arguments.rounds {
        eprintln!("round {round} of {}", arguments.rounds);
        for bed in &beds {
            small_frames(arguments, bed, report.row(bed.setup.name))?;
        }
        for bed in beds.iter().filter(|bed| bed.setup.has_tcp).cycle().take(streams(&beds)) {
            tcp(arguments, bed, report.row(bed.setup.name))?;
        }
    }
    for bed in beds {
        bed.take_down()?;
    }
    report.finish()?;
    Ok(report)
}

/// How many streams a round has: they vary more than the rest.
fn streams(beds: &[Bed]) -> usize {
    STREAMS * beds.iter().filter(|bed| bed.setup.has_tcp).count()
}

fn small_frames(arguments: &Arguments, bed: &Bed, row: &mut Row) -> Result<()> {
    let Setup { name, sink, .. } = bed.setup;
    let measure = |flows| {
        measure::rate(&bed.world, *sink, flows, arguments.seconds, measure::last_cpu()?)
            .with_context(|| format!("measuring {name}"))
    };
    row.one_flow.add(measure(1)?);
    if bed.setup.is_sluice() {
        row.many_flows.add(measure(arguments.flows)?);
    }
    Ok(())
}

fn tcp(arguments: &Arguments, bed: &Bed, row: &mut Row) -> Result<()> {
    if arguments.tcp_seconds == 0 {
        return Ok(());
    }
    let mut measure = || -> Result<()> {
        row.tcp.add(measure::tcp(&bed.world, arguments.tcp_seconds)?);
        row.round_trip_us.push(measure::round_trip(&bed.world)?);
        Ok(())
    };
    measure().with_context(|| format!("measuring TCP of {}", bed.setup.name))
}
