//! DPDK's testpmd: the guest that generates frames and counts what comes back, and a switch that decides nothing.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sluice_tests::Netns;
use sluice_tests::wire::udp4;

use super::process::{Program, command};
use super::{ADDRESSES, GENERATOR_CPU, MACS, mac_text, sockets, switch_cpu};
use crate::measure::FRAME;
use crate::programs::FIRST_SOURCE_PORT;

/// What all DPDK processes of the bench have: nothing is shared with others, and no device is touched.
pub(crate) const DPDK: [&str; 4] = ["--no-pci", "--in-memory", "--iova-mode=va", "--no-telemetry"];
/// What a port's figures end with.
const LAST_FIGURE: &str = "Tx-bps:";
/// Ports of a guest: each card, and what its frames come from.
const PORTS: usize = 4;
/// How often it shows figures while it starts, and caches fill.
const WARM_UP: usize = 3;

/// A guest with two virtio-net cards, driven by one thread, which sends on both as fast as it can.
///
/// testpmd's own generators have one MAC address for all cards, or one flow, or do not receive. So frames come from files, one
/// for each card, over and over; and what a card receives is counted and dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    program: Program,
}

impl Guest {
    /// Starts it, and waits until a switch serves both cards. `folder` holds the sockets, on which the guest listens.
    pub(crate) fn start(netns: &Netns, folder: &Path, flows: u16) -> Result<Guest> {
        let mut command = command(netns, "stdbuf");
        command.args(["-oL", "dpdk-testpmd", &format!("--lcores=0@{GENERATOR_CPU},1@{GENERATOR_CPU}")]);
        command.args(DPDK).args(["-m", "256", "--single-file-segments"]);
        for (number, (socket, mac)) in sockets(folder).iter().zip(MACS).enumerate() {
            // What an earlier guest has left would be taken for somebody else's.
            let _ = std::fs::remove_file(socket);
            let file = folder.join(format!("{number}.pcap"));
            std::fs::write(&file, pcap(number, flows)).context("writing frames")?;
            let (path, mac, file) = (socket.display(), mac_text(mac), file.display());
            command.arg(format!("--vdev=net_virtio_user{number},path={path},server=1,mac={mac}"));
            command.arg(format!("--vdev=net_pcap{number},rx_pcap={file},infinite_rx=1"));
        }
        // With a prompt, the thread that reads it would poll, and take half of the CPU.
        command.args(["--", "--auto-start", "--stats-period=1", "--no-mlockall", "--forward-mode=io"]);
        command.args(["--total-num-mbufs=32768", "--rxd=256", "--txd=256"]);
        let mut program = Program::start("guest", folder, command)?;
        program.wait(folder, LAST_FIGURE, PORTS * WARM_UP)?;
        Ok(Guest { program })
    }

    /// Millions of frames per second that arrived, over so many seconds, both cards taken together.
    pub(crate) fn rate(&mut self, folder: &Path, seconds: usize) -> Result<f64> {
        let from = self.program.count(LAST_FIGURE).next_multiple_of(PORTS);
        let text = self.program.wait(folder, LAST_FIGURE, from + PORTS * seconds)?;
        // Rates are since they were last shown.
        let rates: Vec<f64> = text
            .lines()
            .filter_map(|line| line.split("Rx-pps:").nth(1)?.split_whitespace().next()?.parse().ok())
            .collect();
        let rates = rates.get(from..from + PORTS * seconds).context("testpmd shows rates")?;
        let cards: Vec<f64> = rates.iter().step_by(2).copied().collect();
        ensure!(cards.iter().all(|rate| *rate > 0.0), "frames do not pass both ways: {cards:?}");
        Ok(cards.iter().sum::<f64>() / seconds as f64 / 1e6)
    }
}

/// A file of minimal frames from one card to the other, one for each flow.
fn pcap(card: usize, flows: u16) -> Vec<u8> {
    /// Magic number of microseconds, version 2.4, no time zone, no accuracy, whole frames, Ethernet.
    const HEADER: [u32; 6] = [0xa1b2_c3d4, 2 | 4 << 16, 0, 0, 65535, 1];
    let (to, from) = (1 - card, card);
    let mut bytes: Vec<u8> = HEADER.iter().flat_map(|word| word.to_ne_bytes()).collect();
    for flow in 0..flows {
        let ports = (FIRST_SOURCE_PORT + flow, 9000);
        let frame = udp4(MACS[to], MACS[from], (ADDRESSES[from], ADDRESSES[to]), ports, &[0; FRAME - 42]);
        let length = frame.len() as u32;
        bytes.extend([0, 0, length, length].iter().flat_map(|word| word.to_ne_bytes()));
        bytes.extend(frame);
    }
    bytes
}

/// testpmd between two ports, each of which sends what the other receives.
#[derive(Debug)]
pub(crate) struct Wire {
    _program: Program,
}

impl Wire {
    /// Starts it on ports that DPDK's drivers make of `devices`.
    pub(crate) fn start(netns: &Netns, folder: &Path, devices: [String; 2]) -> Result<Wire> {
        let mut command = command(netns, "stdbuf");
        let lcores = format!("--lcores=0@{GENERATOR_CPU},1@{}", switch_cpu()?);
        command.args(["-oL", "dpdk-testpmd", &lcores]).args(DPDK).args(["-m", "512"]);
        command.args(devices.map(|device| format!("--vdev={device}")));
        command.args(["--", "--auto-start", "--no-mlockall", "--forward-mode=io"]);
        let mut program = Program::start("wire", folder, command)?;
        program.wait(folder, "Press enter to exit", 1)?;
        Ok(Wire { _program: program })
    }

    /// Between guests' rings.
    pub(crate) fn between_rings(netns: &Netns, folder: &Path) -> Result<Wire> {
        let mut number = 0..;
        let device = |socket: std::path::PathBuf| {
            format!("net_vhost{},iface={},client=1", number.next().unwrap_or(0), socket.display())
        };
        Wire::start(netns, folder, sockets(folder).map(device))
    }

    /// Between AF_XDP sockets.
    pub(crate) fn between_sockets(netns: &Netns, folder: &Path, interfaces: [&str; 2]) -> Result<Wire> {
        let mut number = 0..;
        let device = |interface| format!("net_af_xdp{},iface={interface}", number.next().unwrap_or(0));
        Wire::start(netns, folder, interfaces.map(device))
    }
}
