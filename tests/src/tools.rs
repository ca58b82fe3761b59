//! The tools that people use to try a network: ping, iperf3, a DHCP server and client.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::lab::INTERFACE;
use crate::netns::Netns;
use crate::wait::wait_until;

/// A child process that is killed on drop.
#[derive(Debug)]
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many of `count` pings are answered; each waits for a second.
///
/// # Errors
/// When ping cannot run.
pub fn pings_answered(from: &Netns, target: &str, count: u32) -> Result<u32> {
    let count_text = count.to_string();
    // Once it has an answer, ping waits for the last one no longer than an interval: time enough for a busy machine.
    let output = from.attempt(&["ping", "-n", "-c", &count_text, "-i", "0.2", "-W", "1", target])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let summary = text.lines().find(|line| line.contains("packets transmitted"));
    let received = summary.and_then(|line| line.split(", ").nth(1)?.split(' ').next()?.parse().ok());
    received.with_context(|| format!("ping said: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// Waits until `target` answers, then wants three more answers out of three.
///
/// # Errors
/// When it does not.
pub fn ping(from: &Netns, target: &str) -> Result<()> {
    wait_until(&format!("{target} answers {}", from.name()), Duration::from_secs(10), || {
        Ok((pings_answered(from, target, 1)? == 1).then_some(()))
    })?;
    let answered = pings_answered(from, target, 3)?;
    ensure!(answered == 3, "{target} answers {answered} of 3 pings from {}", from.name());
    Ok(())
}

/// Wants no answer to three pings.
///
/// # Errors
/// When one is answered.
pub fn no_ping(from: &Netns, target: &str) -> Result<()> {
    let answered = pings_answered(from, target, 3)?;
    ensure!(answered == 0, "{target} answers {answered} of 3 pings from {}, but must not", from.name());
    Ok(())
}

/// Runs iperf3 from `client` to `server`, which has `address`, with further arguments; returns the `end` of its report.
///
/// # Errors
/// When it fails.
pub fn iperf3(client: &Netns, server: &Netns, address: &str, arguments: &[&str]) -> Result<Value> {
    let _server = iperf3_server(server)?;
    let output = client
        .command("iperf3")
        .args(["-J", "--connect-timeout", "5000", "-c", address])
        .args(arguments)
        .output()
        .context("running iperf3")?;
    let report: Value = serde_json::from_slice(&output.stdout).context("reading iperf3's report")?;
    if let Some(error) = report.get("error") {
        bail!("iperf3 to {address} {arguments:?}: {error}");
    }
    Ok(report["end"].clone())
}

/// Starts an iperf3 server and waits until it listens.
///
/// # Errors
/// When it does not.
pub fn iperf3_server(netns: &Netns) -> Result<Running> {
    let server = netns.command("iperf3").arg("-s").stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let server = Running(server);
    wait_listening(server.0.id(), 5201)?;
    Ok(server)
}

/// Gbit/s that arrived, of an iperf3 report's `end`.
pub fn gbits_received(end: &Value) -> f64 {
    let sum = if end["sum_received"].is_object() { &end["sum_received"] } else { &end["sum"] };
    sum["bits_per_second"].as_f64().unwrap_or(0.0) / 1e9
}

/// Waits until somebody listens on a TCP port in the namespace of a process.
///
/// # Errors
/// When nobody does in time.
pub fn wait_listening(pid: u32, port: u16) -> Result<()> {
    wait_until(&format!("somebody listens on TCP port {port}"), Duration::from_secs(10), || {
        let read = |table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}"));
        let tables = read("tcp")? + &read("tcp6")?;
        // Local address and port in hexadecimal; state 0A is LISTEN.
        let listens = |line: &str| {
            let mut words = line.split_whitespace().skip(1);
            let local = words.next().unwrap_or_default();
            local.ends_with(&format!(":{port:04X}")) && words.nth(1) == Some("0A")
        };
        Ok(tables.lines().any(listens).then_some(()))
    })
}

/// A DHCP server.
#[derive(Debug)]
pub struct DhcpServer {
    _process: Running,
    _folder: TempDir,
}

impl DhcpServer {
    /// Starts dnsmasq in a VM that has `address`; it hands out addresses from `first` to `last`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(netns: &Netns, first: Ipv4Addr, last: Ipv4Addr) -> Result<DhcpServer> {
        let folder = tempfile::tempdir()?;
        // dnsmasq gives up root and then writes its leases.
        let leases = folder.path().join("leases");
        let child = netns
            .command("dnsmasq")
            .args([
                "--no-daemon",
                "--conf-file=/dev/null",
                "--port=0",
                "--user=root",
                "--no-ping",
                "--bind-interfaces",
            ])
            .args(["--dhcp-authoritative", "--pid-file="])
            .arg(format!("--interface={INTERFACE}"))
            .arg(format!("--dhcp-range={first},{last},1h"))
            .arg(format!("--dhcp-leasefile={}", leases.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting dnsmasq")?;
        let process = Running(child);
        let pid = process.0.id();
        wait_until("dnsmasq listens on UDP port 67", Duration::from_secs(10), || {
            let table = std::fs::read_to_string(format!("/proc/{pid}/net/udp"))?;
            Ok(table.lines().any(|line| line.contains(":0043 ")).then_some(()))
        })?;
        Ok(DhcpServer { _process: process, _folder: folder })
    }
}

/// Asks for an address by DHCP, a few times; returns it, or `None` when nobody gives one.
///
/// # Errors
/// When the client cannot run.
pub fn dhcp_lease(netns: &Netns) -> Result<Option<Ipv4Addr>> {
    let folder = tempfile::tempdir()?;
    let script = folder.path().join("script");
    let lease = folder.path().join("lease");
    std::fs::write(
        &script,
        format!("#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip\" > {}\nexit 0\n", lease.display()),
    )?;
    make_executable(&script)?;
    let output = netns
        .command("udhcpc")
        .args(["-f", "-n", "-q", "-t", "3", "-T", "1", "-i", INTERFACE, "-s"])
        .arg(&script)
        .output()
        .context("running udhcpc")?;
    match std::fs::read_to_string(&lease) {
        Ok(text) => Ok(Some(text.trim().parse().with_context(|| format!("a lease of {text}"))?)),
        Err(_) if !output.status.success() => Ok(None),
        Err(_) => bail!("udhcpc: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn make_executable(file: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755))?)
}
