//! The measurements: small-frame rate, TCP throughput, TCP round trips.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use sluice_tests::tools;

use crate::bpf::{self, Kind, Word};
use crate::programs;
use crate::world::{INTERFACE, World};

/// Frames per batch of the generator.
const BATCH: u32 = 64;
/// Frames of the trial run, which also warms caches up.
const TRIAL: u32 = 500_000;
/// Bytes of a generated frame: 64 with the frame check sequence that a wire would add.
pub(crate) const FRAME: usize = 60;

/// Round trips of one measurement.
const ROUND_TRIPS: usize = 10_000;

/// Small-frame forwarding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Frames that reached the receiver, in millions per second.
    pub(crate) mpps: f64,
    /// CPU seconds of the generating CPU, which does all the work, per million frames.
    pub(crate) cpu_s_per_mpkt: f64,
    /// Part of the generated frames that reached the receiver.
    pub(crate) delivered: f64,
}

/// Sends minimal frames of `flows` flows from the first guest to the second for about `seconds`, from one CPU.
pub(crate) fn rate(world: &World, kind: Kind, flows: u16, seconds: f64, cpu: usize) -> Result<Rate> {
    let sink = world.sink(kind)?;
    world.accept_generated(true)?;
    let frame = frame(world);
    let outcome = world.guests[0].netns.enter(|| {
        pin_to(cpu)?;
        let clock = CpuClock::new(cpu);
        let ifindex = nix::net::if_::if_nametoindex(INTERFACE).context("the guest's interface")?;
        let random = Word::new(1)?;
        let generator = programs::generator(flows, &random)?;
        let run = |repeat: u32| -> Result<(f64, f64, u64)> {
            let (before, cpu_before, start) = (sink.counter.read()?, clock.read()?, Instant::now());
            bpf::run_live(generator.as_fd(), ifindex, &frame, repeat, BATCH)?;
            let (wall, busy) = (start.elapsed().as_secs_f64(), clock.read()? - cpu_before);
            Ok((wall, busy, sink.counter.read()? - before))
        };
        let (wall, _, delivered) = run(TRIAL)?;
        ensure!(delivered > 0, "no generated frame reached the receiver");
        let repeat = (f64::from(TRIAL) * seconds / wall).clamp(1e5, 1e9) as u32;
        let (wall, busy, delivered) = run(repeat)?;
        let mpkt = delivered as f64 / 1e6;
        Ok(Rate {
            mpps: mpkt / wall,
            cpu_s_per_mpkt: busy / mpkt,
            delivered: delivered as f64 / f64::from(repeat),
        })
    });
    drop(sink);
    world.accept_generated(false)?;
    outcome
}

/// A minimal UDP datagram between the guests; without a UDP checksum, as IPv4 allows.
fn frame(world: &World) -> Vec<u8> {
    let [a, b] = &world.guests;
    let payload = [0; FRAME - 42];
    sluice_tests::wire::udp4(b.mac, a.mac, (a.ip, b.ip), (programs::FIRST_SOURCE_PORT, 9000), &payload)
}

/// The CPU on which everything is measured that is measured on one.
pub(crate) fn last_cpu() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get() - 1)
}

/// Keeps this thread, and the packets that it sends all the way to where they end or change hands, on one CPU.
pub(crate) fn pin_to(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("pinning a thread")
}

/// CPU time of this thread and of the softirq thread of its CPU.
struct CpuClock {
    files: Vec<PathBuf>,
}

impl CpuClock {
    fn new(cpu: usize) -> CpuClock {
        let name = format!("ksoftirqd/{cpu}\n");
        let is_softirq =
            |folder: &PathBuf| std::fs::read_to_string(folder.join("comm")).is_ok_and(|comm| comm == name);
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        // In a container it is out of sight, and its time is missed; it works only when there is more than enough to do.
        let softirq = processes.map(|entry| entry.path()).find(is_softirq);
        let folders = [Some(PathBuf::from("/proc/thread-self")), softirq];
        CpuClock { files: folders.into_iter().flatten().map(|folder| folder.join("schedstat")).collect() }
    }

    /// Seconds so far.
    fn read(&self) -> Result<f64> {
        let seconds = |file: &PathBuf| {
            run_time(file).with_context(|| format!("reading CPU time from {}", file.display()))
        };
        self.files.iter().map(seconds).sum()
    }
}

/// Seconds on a CPU: the first number of a `schedstat` file.
fn run_time(file: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(file).ok()?;
    Some(text.split(' ').next()?.parse::<u64>().ok()? as f64 / 1e9)
}

/// TCP throughput.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream {
    /// Gbit/s received.
    pub(crate) gbps: f64,
    /// CPU seconds of sender and receiver, in whose time the switch works, per gigabyte.
    pub(crate) cpu_s_per_gb: f64,
}

/// One TCP stream from the first guest to the second, with both ends on one CPU. With two, the queue between them
/// overflows now and then, and how often makes more of a difference than any switch.
pub(crate) fn tcp(world: &World, seconds: u32) -> Result<Stream> {
    let [a, b] = &world.guests;
    let cpu = last_cpu()?;
    let affinity = format!("{cpu},{cpu}");
    let arguments = ["-t", &seconds.to_string(), "-A", &affinity];
    let end = tools::iperf3(&a.netns, &b.netns, &b.ip.to_string(), &arguments)?;
    let number = |group: &str, name: &str| {
        end[group][name].as_f64().with_context(|| format!("iperf3 reports no {group}.{name}"))
    };
    let received = "sum_received";
    let percent =
        number("cpu_utilization_percent", "host_total")? + number("cpu_utilization_percent", "remote_total")?;
    let gigabytes = number(received, "bytes")? / 1e9;
    Ok(Stream {
        gbps: number(received, "bits_per_second")? / 1e9,
        cpu_s_per_gb: percent / 100.0 * number(received, "seconds")? / gigabytes,
    })
}

/// Median round trip of one byte there and one back over TCP, in microseconds, with both ends on one CPU: between CPUs
/// it would be the time that an idle one takes to wake up.
pub(crate) fn round_trip(world: &World) -> Result<f64> {
    let [a, b] = &world.guests;
    let listener = b.netns.enter(|| Ok(TcpListener::bind((b.ip, 0))?))?;
    let address: SocketAddr = listener.local_addr()?;
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || -> Result<()> {
            pin_to(last_cpu()?)?;
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut byte = [0];
            while stream.read(&mut byte)? == 1 {
                stream.write_all(&byte)?;
            }
            Ok(())
        });
        let mut times = a.netns.enter(|| {
            pin_to(last_cpu()?)?;
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
            stream.set_nodelay(true)?;
            let mut times = Vec::with_capacity(ROUND_TRIPS);
            for _ in 0..ROUND_TRIPS {
                let start = Instant::now();
                stream.write_all(&[1])?;
                stream.read_exact(&mut [0])?;
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
            Ok(times)
        })?;
        echo.join().map_err(|_| anyhow::anyhow!("the echoing thread panicked"))??;
        Ok(median(&mut times))
    })
}

/// The middle value; of an even number, the mean of the two.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }
}
