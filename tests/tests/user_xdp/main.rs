//! The userspace engine on AF_XDP: two vNICs on the near ends of veth pairs, packet sockets at the far ends.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sluice_pipeline::DropReason;
use sluice_pipeline::tables::Direction;
use sluice_policy::config::{
    AclAction, AclMatch, AclRule, Attachment, Config, Hook, Policy, Switch, VlanMode, Vnic,
};
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings};
use sluice_policy::lower::{assign_ids, lower, ports};
use sluice_policy::net::{MacAddr, VlanId, VlanRange};
use sluice_tests::api::{list, text};
use sluice_tests::netns;
use sluice_tests::{Netns, PacketSocket, lab_guest, wait_until};
use sluice_user::engine::Engine;
use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::port::{Batch, Transmit as _};
use sluice_user::workers::{Patience, QueueId, Workers};
use sluice_user::xdp::{self, SocketStatistics, Steering, XdpError, XdpMode, XdpMonitor, XdpOptions};

const PATIENCE: Duration = Duration::from_secs(20);
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
/// An ethertype that nobody else sends.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Near ends `near0` and `near1` are the engine's, far ends `far0` and `far1` the VMs'.
fn wires(name: &str, mtu: u32) -> Result<Netns> {
    let netns = Netns::create(&format!("sl-{}-{name}", std::process::id()))?;
    netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    for number in 0..2 {
        wire(&netns, number, mtu)?;
    }
    Ok(netns)
}

fn wire(netns: &Netns, number: usize, mtu: u32) -> Result<()> {
    netns.ip_batch(&format!(
        "link add near{number} mtu {mtu} type veth peer name far{number} mtu {mtu}\n\
             link set near{number} up\nlink set far{number} up"
    ))
}

/// The engine, with its workers, on both near ends.
struct Setting {
    engine: Engine,
    region: Arc<Region>,
    workers: Workers,
    ports: [u32; 2],
    modes: Vec<XdpMode>,
    monitors: Vec<XdpMonitor>,
    steerings: Vec<Steering>,
}

fn start(netns: &Netns, policies: [Policy; 2], longest: usize) -> Result<Setting> {
    start_with(netns, policies, &XdpOptions { longest, ..XdpOptions::default() })
}

fn start_with(netns: &Netns, policies: [Policy; 2], options: &XdpOptions) -> Result<Setting> {
    let region = Region::new(RegionLayout { small: 3 * 4096, large: 64 })?;
    let engine = Engine::new();
    let vnics = MACS.iter().zip(policies).enumerate().map(|(number, (mac, policy))| Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach: Attachment::Veth(format!("near{number}")),
        hook: Hook::Auto,
        full_checksums: true,
        mac: MacAddr(*mac),
        extra_macs: Vec::new(),
        sriov: None,
        up: true,
        policy,
    });
    let config = Config {
        switches: vec![Switch { name: "blue".into(), uplink: None, internal: None, ageing_seconds: 300 }],
        acl_groups: Vec::new(),
        vnics: vnics.collect(),
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids)?;
    let bindings: Bindings = (1..)
        .zip(ports(&config))
        .map(|(ifindex, spec)| (spec.name, Binding { ifindex, peer_redirect: false, xdp_target: false }))
        .collect();
    engine.apply(lower(&config, &ids, &bindings)?);
    let id = |number: u32| ids.ports.get(&format!("vnic/vm{number}")).context("a port without number");
    let ports = [id(0)?, id(1)?];
    let cores = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    let core = (0..64).find(|core| cores.is_set(*core).unwrap_or(false)).context("no core")?;
    let workers = Workers::start(&engine, &region, &[core], Patience::default())?;
    let mut setting = Setting {
        engine,
        region,
        workers,
        ports,
        modes: Vec::new(),
        monitors: Vec::new(),
        steerings: Vec::new(),
    };
    for number in 0..2 {
        setting.open(netns, number, options)?;
    }
    Ok(setting)
}

impl Setting {
    /// Attaches a port to its near end.
    fn open(&mut self, netns: &Netns, number: usize, options: &XdpOptions) -> Result<()> {
        let ifindex = netns.ifindex(&format!("near{number}"))?.context("no such interface")?;
        let (queue, steering) = netns.enter(|| {
            let queue = xdp::open(ifindex, 0, &self.region, options)?;
            let steering = Steering::attach(ifindex, 1, true)?;
            steering.set(0, queue.receive.socket())?;
            Ok((queue, steering))
        })?;
        ensure!(steering.is_in_driver(), "a veth has XDP in its driver");
        self.modes.push(queue.mode());
        self.monitors.push(queue.monitor());
        self.steerings.push(steering);
        let port = self.ports[number];
        self.engine.attach(port, vec![Box::new(queue.transmit)]);
        self.workers.place_anywhere(QueueId { port, queue: 0 }, Box::new(queue.receive))?;
        Ok(())
    }

    /// Takes a port off its near end.
    fn close(&self, number: usize) -> Result<()> {
        let port = self.ports[number];
        drop(self.workers.remove(QueueId { port, queue: 0 })?);
        self.engine.detach(port);
        Ok(())
    }
}

/// A numbered frame from one far end to the other.
fn frame(from: usize, number: u32, length: usize) -> Vec<u8> {
    let mut frame = [&MACS[1 - from][..], &MACS[from], &ETHERTYPE, &number.to_be_bytes()].concat();
    frame.extend((frame.len()..length).map(|at| (at as u32 * 7 + number) as u8));
    frame
}

fn is_ours(frame: &[u8]) -> bool {
    frame.windows(2).skip(12).step_by(4).take(2).any(|two| two == ETHERTYPE)
}

/// Sends so many frames, a few at a time, and expects each, unchanged and in order.
fn cross(far: &[PacketSocket; 2], from: usize, count: u32, length: impl Fn(u32) -> usize) -> Result<()> {
    const WINDOW: u32 = 64;
    for first in (0..count).step_by(WINDOW as usize) {
        let numbers = first..count.min(first + WINDOW);
        for number in numbers.clone() {
            far[from].send(&frame(from, number, length(number)))?;
        }
        for number in numbers {
            let found = far[1 - from].expect(&format!("frame {number} from {from}"), PATIENCE, is_ours)?;
            ensure!(found == frame(from, number, length(number)), "frame {number} from {from} was changed");
        }
    }
    Ok(())
}

fn far_ends(netns: &Netns) -> Result<[PacketSocket; 2]> {
    Ok([PacketSocket::open(netns, "far0")?, PacketSocket::open(netns, "far1")?])
}

#[test]
fn frames_cross_both_ways_under_policy() -> Result<()> {
    let netns = wires("uxdp", 1500)?;
    let mut deny = Policy::default();
    deny.acl.rules = vec![AclRule {
        priority: 1,
        direction: Direction::FromVm,
        matches: AclMatch { ethertype: Some(0x88b6), ..AclMatch::default() },
        action: AclAction::Deny,
    }];
    let setting = start(&netns, [deny, Policy::default()], 1522)?;
    ensure!(setting.modes.iter().all(|mode| !mode.zero_copy), "a veth copies");
    let far = far_ends(&netns)?;
    for from in 0..2 {
        cross(&far, from, 3000, |number| 60 + number as usize % 1455)?;
    }
    let mut denied = frame(0, 1, 60);
    denied[13] = 0xb6;
    let mut spoofed = frame(0, 1, 60);
    spoofed[11] = 9;
    for bad in [&denied, &spoofed] {
        far[0].send(bad)?;
    }
    cross(&far, 0, 100, |_| 60)?;
    let [one, two] = setting.ports;
    for reason in [DropReason::AclFromVm, DropReason::MacGuard] {
        ensure!(setting.engine.drops(one, reason) == 1, "{} was not counted", reason.name());
    }
    let (one, two) = (setting.engine.port_stats(one), setting.engine.port_stats(two));
    ensure!((one.tx_packets, one.rx_packets) == (3000, 3102), "{one:?}");
    ensure!((two.tx_packets, two.rx_packets) == (3100, 3000), "{two:?}");
    for monitor in &setting.monitors {
        let lost = monitor.statistics()?.context("the queue is open")?;
        ensure!(
            lost == SocketStatistics { tx_ring_empty_descs: lost.tx_ring_empty_descs, ..Default::default() },
            "{lost:?}"
        );
    }
    let Setting { region, workers, engine, monitors, .. } = setting;
    drop((workers, engine));
    ensure!(region.outstanding() == 0, "{} chunks are missing", region.outstanding());
    ensure!(monitors[0].statistics()?.is_none(), "the queue is closed");
    Ok(())
}

#[test]
fn tags_are_pushed_and_popped() -> Result<()> {
    let netns = wires("uxdp-vlan", 1500)?;
    let vlan = VlanId::new(5).context("a VLAN")?;
    let allowed = vec![VlanRange::new(vlan, vlan).context("a range")?];
    let access = Policy { vlan: VlanMode::Access(vlan), ..Policy::default() };
    let trunk = Policy { vlan: VlanMode::Trunk { allowed, native: None }, ..Policy::default() };
    let _setting = start(&netns, [access, trunk], 1522)?;
    let far = far_ends(&netns)?;
    let tagged = |plain: &[u8]| [&plain[..12], &[0x81, 0, 0, 5], &plain[12..]].concat();
    for number in 0..100 {
        let plain = frame(0, number, 100);
        far[0].send(&plain)?;
        ensure!(
            far[1].expect("a tagged frame", PATIENCE, is_ours)? == tagged(&plain),
            "not as it should be tagged"
        );
        let plain = frame(1, number, 100);
        far[1].send(&tagged(&plain))?;
        ensure!(
            far[0].expect("an untagged frame", PATIENCE, is_ours)? == plain,
            "not as it should be untagged"
        );
    }
    Ok(())
}

#[test]
fn frames_longer_than_a_chunk_cross_in_parts() -> Result<()> {
    let netns = wires("uxdp-jumbo", 9000)?;
    let setting = start(&netns, [Policy::default(), Policy::default()], 9022)?;
    if !setting.modes.iter().all(|mode| mode.multi_buffer) {
        return Ok(()); // before Linux 6.6
    }
    let far = far_ends(&netns)?;
    for from in 0..2 {
        cross(&far, from, 1000, |number| 60 + number as usize * 8954 / 999)?;
    }
    let Setting { region, workers, engine, .. } = setting;
    drop((workers, engine));
    ensure!(region.outstanding() == 0, "{} chunks are missing", region.outstanding());
    Ok(())
}

/// Frames that came from the taps that frames are redirected from, by name.
fn redirected(netns: &Netns) -> Result<BTreeMap<String, u64>> {
    let links: serde_json::Value = serde_json::from_str(&netns.run(&["ip", "-s", "-j", "link"])?)?;
    let taps = list(&links).iter().filter(|link| text(&link["ifname"]).starts_with("sluice"));
    let count = |tap: &serde_json::Value| tap["stats64"]["rx"]["packets"].as_u64().unwrap_or_default();
    Ok(taps.map(|tap| (text(&tap["ifname"]).to_owned(), count(tap))).collect())
}

#[test]
fn frames_are_redirected_to_a_device_that_takes_them() -> Result<()> {
    const COUNT: u32 = 2000;
    // Longer frames than fit the engine's idea of the MTU pass.
    let netns = wires("uxdp-redirect", 1600)?;
    for far in ["far0", "far1"] {
        netns.run(&["ethtool", "-K", far, "gro", "on"])?;
    }
    let options = XdpOptions { redirect: true, ..XdpOptions::default() };
    let setting = start_with(&netns, [Policy::default(), Policy::default()], &options)?;
    ensure!(setting.modes.iter().all(|mode| mode.redirect), "{:?}", setting.modes);
    let far = far_ends(&netns)?;
    let length = |number: u32| 60 + number as usize % (options.longest - 59);
    for from in 0..2 {
        cross(&far, from, COUNT, length)?;
    }
    // Those with room for a second tag only go by the socket.
    let by_tap = (0..COUNT).filter(|number| length(*number) <= options.longest - 4).count() as u64;
    let taps = redirected(&netns)?;
    ensure!(by_tap < u64::from(COUNT), "no frame was too long");
    // A batch goes one way or the other as a whole.
    let counts: Vec<u64> = taps.values().copied().collect();
    ensure!(
        counts.len() == 2 && counts.iter().all(|count| (by_tap * 9 / 10..=by_tap).contains(count)),
        "{by_tap} of {COUNT} were to be redirected: {taps:?}"
    );
    // Whoever removes a tap leaves the way by the socket.
    for tap in taps.keys() {
        netns.run(&["ip", "link", "del", tap])?;
    }
    far[0].send(&frame(0, 0, 60))?; // may be lost: it finds that out
    far[1].send(&frame(1, 0, 60))?;
    wait_until("both ends have found out", PATIENCE, || {
        let failed = |port| setting.engine.drops(port, DropReason::EgressFailed);
        Ok(setting.ports.iter().all(|port| failed(*port) > 0).then_some(()))
    })?;
    for from in 0..2 {
        cross(&far, from, 200, |_| 60)?;
    }
    for mode in setting.monitors.iter().map(XdpMonitor::mode) {
        ensure!(mode.is_some_and(|mode| !mode.redirect), "{mode:?} is said of a queue without its tap");
    }
    let Setting { region, workers, engine, .. } = setting;
    drop((workers, engine));
    ensure!(region.outstanding() == 0, "{} chunks are missing", region.outstanding());
    Ok(())
}

#[test]
fn a_redirected_frame_overtakes_none_that_goes_by_the_socket() -> Result<()> {
    let netns = wires("uxdp-order", 1600)?;
    netns.run(&["ethtool", "-K", "far0", "gro", "on"])?;
    let region = Region::new(RegionLayout { small: 4096, large: 1 })?;
    let ifindex = netns.ifindex("near0")?.context("no such interface")?;
    let options = XdpOptions { redirect: true, ..XdpOptions::default() };
    let mut queue = netns.enter(|| Ok(xdp::open(ifindex, 0, &region, &options)?))?;
    ensure!(queue.mode().redirect, "{:?}", queue.mode());
    let far = PacketSocket::open(&netns, "far0")?;
    let mut pool = Pool::new(&region);
    for number in (0..200).step_by(2) {
        // The long one waits in the ring until the port is flushed.
        for (number, length) in [(number, options.longest), (number + 1, 60)] {
            let mut batch = Batch::new();
            batch.push(pool.copy(&frame(1, number, length)).context("memory")?);
            ensure!(queue.transmit.transmit(&mut pool, &mut batch) == 1, "frame {number} was not sent");
            batch.give(&mut pool);
        }
        queue.transmit.flush();
        for (number, length) in [(number, options.longest), (number + 1, 60)] {
            let found = far.expect(&format!("frame {number}"), PATIENCE, is_ours)?;
            ensure!(found == frame(1, number, length), "another frame came before frame {number}");
        }
    }
    Ok(())
}

#[test]
fn a_tap_goes_with_the_queue_that_it_is_for() -> Result<()> {
    let netns = wires("uxdp-tap", 1500)?;
    let options = XdpOptions { redirect: true, ..XdpOptions::default() };
    let setting = start_with(&netns, [Policy::default(), Policy::default()], &options)?;
    ensure!(redirected(&netns)?.len() == 2, "each queue has one: {:?}", redirected(&netns)?);
    setting.close(0)?;
    ensure!(redirected(&netns)?.len() == 1, "{:?}", redirected(&netns)?);
    drop(setting);
    ensure!(redirected(&netns)?.is_empty(), "{:?}", redirected(&netns)?);
    Ok(())
}

#[test]
fn ports_come_and_go_under_load_and_no_chunk_is_lost() -> Result<()> {
    let netns = wires("uxdp-come", 1500)?;
    let mut setting = start(&netns, [Policy::default(), Policy::default()], 1522)?;
    let far = far_ends(&netns)?;
    for round in 0..20 {
        // Not waited for: they are in rings, and some of them sent, when the port goes.
        for number in 0..500 {
            far[round % 2].send(&frame(round % 2, number, 1000))?;
        }
        for number in 0..2 {
            setting.close(number)?;
        }
        setting.steerings.clear();
        for number in 0..2 {
            setting.open(&netns, number, &XdpOptions::default())?;
        }
        far[0].drain(|_| false)?;
        far[1].drain(|_| false)?;
        cross(&far, 0, 64, |_| 60)?;
    }
    let Setting { region, workers, engine, .. } = setting;
    drop((workers, engine));
    ensure!(region.outstanding() == 0, "{} chunks are missing", region.outstanding());
    Ok(())
}

#[test]
fn an_idle_worker_costs_next_to_nothing() -> Result<()> {
    let netns = wires("uxdp-idle", 1500)?;
    let setting = start(&netns, [Policy::default(), Policy::default()], 1522)?;
    let far = far_ends(&netns)?;
    cross(&far, 0, 100, |_| 60)?;
    let asleep = || setting.workers.status().iter().map(|worker| worker.asleep).sum::<Duration>();
    // Time asleep is counted when it ends: a frame at each end of the measured second.
    cross(&far, 0, 1, |_| 60)?;
    let (begin, before) = (Instant::now(), asleep());
    ensure!(far[1].receive(Duration::from_secs(1))?.is_none(), "nothing was sent");
    cross(&far, 0, 1, |_| 60)?;
    let (awake, whole) = (begin.elapsed().saturating_sub(asleep() - before), begin.elapsed());
    ensure!(awake * 100 < whole, "awake {awake:?} of {whole:?}");
    Ok(())
}

/// igb moves frames without copying them, from Linux 6.14 on.
#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_driver_moves_frames_without_copying_them() -> Result<()> {
    lab_guest::require()?;
    let netns = Netns::create(&format!("sl-{}-uxdp-zc", std::process::id()))?;
    netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    for (nic, name) in [("pf0", "near0"), ("pf1", "far0")] {
        netns::check(Command::new("ip").args(["link", "set", nic, "netns", netns.name()]))?;
        netns.ip_batch(&format!("link set {nic} name {name}\nlink set {name} up promisc on"))?;
    }
    netns.run(&["ethtool", "-L", "near0", "combined", "1"])?;
    wire(&netns, 1, 1500)?;
    let mut setting = start(&netns, [Policy::default(), Policy::default()], 1514)?;
    ensure!(setting.modes[0].zero_copy && !setting.modes[1].zero_copy, "{:?}", setting.modes);
    let far = far_ends(&netns)?;
    for round in 0..3 {
        wait_until(&format!("the wire, round {round}"), PATIENCE, || {
            far[1].send(&frame(1, 0, 60))?;
            Ok(far[0].receive(Duration::from_millis(100))?.is_some_and(|frame| is_ours(&frame)).then_some(()))
        })?;
        far[0].drain(|_| false)?;
        for from in 0..2 {
            cross(&far, from, 500, |number| 60 + number as usize % 1455)?;
        }
        if round < 2 {
            setting.close(0)?;
            setting.steerings.remove(if round == 0 { 0 } else { 1 });
            setting.open(&netns, 0, &XdpOptions { longest: 1514, ..XdpOptions::default() })?;
        }
    }
    let Setting { region, workers, engine, .. } = setting;
    drop((workers, engine));
    ensure!(region.outstanding() == 0, "{} chunks are missing", region.outstanding());
    Ok(())
}

#[test]
fn drivers_serve_it_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

#[test]
fn mistakes_are_told() -> Result<()> {
    let netns = wires("uxdp-bad", 1500)?;
    let region = Region::new(RegionLayout { small: 4096, large: 0 })?;
    let ifindex = netns.ifindex("near0")?.context("no such interface")?;
    let try_open = |ifindex, queue, entries| {
        netns.enter(|| {
            Ok(xdp::open(ifindex, queue, &region, &XdpOptions { entries, ..XdpOptions::default() }))
        })
    };
    let errno = |result: Result<xdp::XdpQueue, XdpError>| match result {
        Err(XdpError::Kernel { source, .. }) => source.raw_os_error(),
        _ => None,
    };
    ensure!(matches!(try_open(ifindex, 0, 100)?, Err(XdpError::Entries(100))));
    ensure!(errno(try_open(ifindex, 7, 64)?) == Some(libc::EINVAL), "there is but one queue");
    ensure!(errno(try_open(1_000_000, 0, 64)?) == Some(libc::ENODEV), "there is no such interface");
    let held = try_open(ifindex, 0, 64)??;
    ensure!(errno(try_open(ifindex, 0, 64)?) == Some(libc::EBUSY), "the queue is held");
    drop(held);
    try_open(ifindex, 0, 64)??;
    ensure!(region.outstanding() == 0, "{} chunks are missing", region.outstanding());
    Ok(())
}
