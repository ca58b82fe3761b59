//! What a guest leaves for others to do to its frames: checksums to be filled in, super-frames to be cut. Both are done behind
//! the switch's decision, where the guest says; neither may undo it.

#![forbid(unsafe_code)]

use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{
    BROADCAST, Mac, arp, carries, echo_request, ethernet, is_sum_right, mac, mac_text, note, tcp4, udp4,
};
use sluice_tests::{Lab, PATIENCE, PacketSocket, Tap, Vm, VnetTap, scenario, tools, wait_until};

/// What a guest of today takes.
const OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
/// Bytes of a virtio-net header.
const HEADER: usize = 12;
/// `VIRTIO_NET_HDR_GSO_…`
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;

/// A virtio-net header that leaves the checksum at `start + offset` undone, and cutting into `size` bytes each.
fn header(start: u16, offset: u16, gso: u8, size: u16) -> Vec<u8> {
    let mut bytes = vec![1, gso, 0, 0];
    for field in [size, start, offset, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

/// A way out of the switch, and what comes out of it.
enum Way {
    Tap(Tap),
    /// With headers, which say what is left undone.
    VnetTap(VnetTap),
    Veth(PacketSocket),
}

/// A frame that came out, with its virtio-net header where it has one.
struct Out {
    header: Option<Vec<u8>>,
    frame: Vec<u8>,
}

impl Way {
    fn next(&self) -> Result<Option<Out>> {
        let plain = |frame| Some(Out { header: None, frame });
        Ok(match self {
            Way::Tap(tap) => plain(tap.expect("a frame", PATIENCE, |_| true)?),
            Way::Veth(socket) => socket.receive(PATIENCE)?.and_then(plain),
            Way::VnetTap(tap) => {
                let mut buffer = vec![0; 70_000];
                let length = wait_until("a frame", PATIENCE, || tap.read(&mut buffer))?;
                Some(Out { header: Some(buffer[..HEADER].to_vec()), frame: buffer[HEADER..length].to_vec() })
            }
        })
    }

    /// What comes before the frame that carries `last`.
    fn before(&self, last: &str) -> Result<Vec<Out>> {
        let mut frames = Vec::new();
        loop {
            let out = self.next()?.with_context(|| format!("nothing carries {last:?}"))?;
            if carries(&out.frame, last) {
                return Ok(frames);
            }
            frames.push(out);
        }
    }
}

const GUEST: (Mac, Ipv4Addr) = (mac(1), Ipv4Addr::new(10, 77, 0, 1));
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// A guest behind a tap, guarded, and ways out of every kind.
struct Bench<'a> {
    lab: &'a Lab,
    guest: VnetTap,
    /// By name and by the address that leads there.
    ways: Vec<(&'static str, Mac, Way)>,
    _namespaces: Vec<sluice_tests::Vm>,
}

impl<'a> Bench<'a> {
    fn new(lab: &'a Lab) -> Result<Bench<'a>> {
        let host = lab.host();
        let guest = VnetTap::open(host, "t1", OFFLOADS)?;
        let (plain, vnet) = (Tap::open(host, "t2")?, VnetTap::open(host, "t3", OFFLOADS)?);
        let (veth, out) = (lab.bare_vm(4)?, lab.outside(200)?);
        host.ip_batch("link set t1 up\nlink set t2 up\nlink set t3 up\n")?;
        // So that the kernel has to fill checksums in before frames leave here.
        for port in ["p4", "up200"] {
            host.run(&["ethtool", "-K", port, "tx", "off"])?;
        }
        let tap = |number: u8, policy: &str| {
            format!(
                "- {{name: vm{number}, switch: blue, attach: {{tap: t{number}}}, mac: \"{}\", {policy}}}\n",
                mac_text(mac(number))
            )
        };
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}{}{}{}",
            tap(1, "policy: {ipGuard: [\"10.77.0.1\", \"fd77::1\"]}"),
            tap(2, ""),
            tap(3, ""),
            veth.vnic("")
        ))?;
        let ways = vec![
            ("a tap without offloads", mac(2), Way::Tap(plain)),
            ("a tap with offloads", mac(3), Way::VnetTap(vnet)),
            ("a veth", mac(4), Way::Veth(PacketSocket::open(&veth.netns, INTERFACE)?)),
            ("the uplink", mac(200), Way::Veth(PacketSocket::open(&out.netns, INTERFACE)?)),
        ];
        Ok(Bench { lab, guest, ways, _namespaces: vec![veth, out] })
    }

    fn send(&self, header: &[u8], frame: &[u8]) -> Result<()> {
        self.guest.write(&[header, frame].concat())
    }

    /// Sends a frame and then a note; what comes out at a way before the note, and carries `text`.
    fn passes(&self, way: &(&str, Mac, Way), header: &[u8], frame: &[u8], text: &str) -> Result<Vec<Out>> {
        self.send(header, frame)?;
        self.send(&[0; HEADER], &note(way.1, GUEST.0, &[], "that is all"))?;
        let mut out = way.2.before("that is all")?;
        out.retain(|out| carries(&out.frame, text));
        Ok(out)
    }

    fn refused(&self, port: &str) -> Result<u64> {
        self.lab.sluice().dropped(port, "malformed-length")
    }
}

/// The frame with the sum of its pseudo header in place, as a guest leaves it that lets others do the rest.
fn with_pseudo_sum(frame: &[u8], offset: usize) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let length = frame.len() - 34;
    let words = frame[26..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.sum::<u32>() + u32::from(frame[23]) + length as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[34 + offset..36 + offset].copy_from_slice(&(sum as u16).to_be_bytes());
    frame
}

/// Frames whose checksum goes where it must not, by what it would change; each carries `text`.
fn lies(to: Mac, text: &str) -> Vec<(&'static str, Vec<u8>, u16, u16)> {
    let (from, ip) = GUEST;
    let payload = [text.as_bytes(), &[7; 40]].concat();
    let udp = udp4(to, from, (ip, OTHER), (1, 2), &payload);
    let tcp = tcp4(to, from, (ip, OTHER), (1, 2), &payload);
    let echo = [echo_request(to, from, (ip, OTHER), 1), payload.clone()].concat();
    let asked = [arp(to, 1, (from, ip), ([0; 6], OTHER)), payload.clone()].concat();
    let unknown = ethernet(to, from, &[], 0x88b5, &payload);
    vec![
        ("the protocol", udp.clone(), 20, 3),
        ("the source address", udp.clone(), 20, 6),
        ("half of the source address", udp.clone(), 22, 6),
        ("the destination address", udp.clone(), 20, 10),
        ("the ports of UDP", udp.clone(), 34, 0),
        ("the length of UDP", udp.clone(), 34, 4),
        ("the ports of TCP", tcp.clone(), 34, 2),
        ("the flags of TCP", tcp.clone(), 34, 13),
        ("half of the checksum of TCP", tcp, 34, 17),
        ("a message of ICMP", echo, 34, 2),
        ("the sender's address of ARP", asked, 20, 8),
        ("what nobody knows", unknown, 20, 6),
    ]
}

#[test]
fn a_checksum_does_not_change_what_was_decided_on() -> Result<()> {
    scenario(|lab| {
        let bench = Bench::new(lab)?;
        let mut told = 0;
        let mut wrong = Vec::new();
        for (round, (name, address, way)) in bench.ways.iter().enumerate() {
            for to in [*address, BROADCAST] {
                let text = format!("lie {round}");
                for (what, frame, start, offset) in lies(to, &text) {
                    bench.send(&header(start, offset, GSO_NONE, 0), &frame)?;
                    told += 1;
                    let honest = format!("honest {told}");
                    bench.send(&[0; HEADER], &note(to, GUEST.0, &[], &honest))?;
                    for strayed in way.before(&honest)?.iter().filter(|out| carries(&out.frame, &text)) {
                        let out = strayed.frame.iter().zip(&frame).enumerate();
                        let at: Vec<usize> = out.filter(|(_, (a, b))| a != b).map(|(at, _)| at).collect();
                        wrong.push(format!("by {name}: {what}, bytes {at:?} differ"));
                    }
                }
            }
        }
        ensure!(wrong.is_empty(), "{} of {told} got through:\n{}", wrong.len(), wrong.join("\n"));
        let dropped = bench.refused("vnic/vm1")?;
        ensure!(dropped == told, "{told} were sent and {dropped} are counted");
        Ok(())
    })
}

#[test]
fn what_an_honest_guest_leaves_undone_is_done_or_passed_on() -> Result<()> {
    scenario(|lab| {
        let bench = Bench::new(lab)?;
        let (from, ip) = GUEST;
        for way in &bench.ways {
            let (name, to, _) = way;
            let udp = udp4(*to, from, (ip, OTHER), (1, 2), b"undone: a datagram");
            let tcp = tcp4(*to, from, (ip, OTHER), (1, 2), b"undone: a segment");
            for (frame, offset) in [(with_pseudo_sum(&udp, 6), 6), (with_pseudo_sum(&tcp, 16), 16)] {
                let out = bench.passes(way, &header(34, offset, GSO_NONE, 0), &frame, "undone: ")?;
                let [out] = &out[..] else { anyhow::bail!("by {name}, {} of 1 come out", out.len()) };
                match &out.header {
                    Some(said) => ensure!(
                        said[..10] == header(34, offset, GSO_NONE, 0)[..10] && out.frame == frame,
                        "by {name}: {said:02x?} {:02x?}",
                        out.frame
                    ),
                    // Handed over to the other end of the veth, which knows that it is undone.
                    None if *name == "a veth" => ensure!(out.frame == frame, "by {name}: {:02x?}", out.frame),
                    None => ensure!(is_sum_right(&out.frame), "by {name}: {:02x?}", out.frame),
                }
            }
        }
        ensure!(bench.refused("vnic/vm1")? == 0, "honest frames are refused");
        Ok(())
    })
}

#[test]
fn super_frames_are_cut_only_at_headers_that_were_decided_on() -> Result<()> {
    scenario(|lab| {
        let bench = Bench::new(lab)?;
        let (from, ip) = GUEST;
        let payload = b"in pieces ".repeat(500);
        let mut refused = 0;
        for way in &bench.ways {
            let (name, to, _) = way;
            let tcp = with_pseudo_sum(&tcp4(*to, from, (ip, OTHER), (1, 2), &payload), 16);
            let udp = with_pseudo_sum(&udp4(*to, from, (ip, OTHER), (1, 2), &payload), 6);
            for (what, frame, start, offset, gso) in [
                ("elsewhere", &tcp, 60, 16, GSO_TCPV4),
                ("before its header", &tcp, 26, 16, GSO_TCPV4),
                ("as UDP", &tcp, 34, 6, GSO_UDP_L4),
                ("as TCP", &udp, 34, 16, GSO_TCPV4),
                ("as TCP, in what is no tunnel", &udp, 62, 16, GSO_TCPV4),
            ] {
                let out = bench.passes(way, &header(start, offset, gso, 1000), frame, "pieces")?;
                refused += 1;
                let count = bench.refused("vnic/vm1")?;
                ensure!(out.is_empty() && count == refused, "by {name}, cut {what}: {} come out", out.len());
            }
            for (frame, offset, gso) in [(&tcp, 16, GSO_TCPV4), (&udp, 6, GSO_UDP_L4)] {
                let out = bench.passes(way, &header(34, offset, gso, 1000), frame, "pieces")?;
                let headers = frame.len() - payload.len();
                let bytes: usize = out.iter().map(|out| out.frame.len() - headers).sum();
                let whole = out.len() == 1;
                ensure!(
                    out.iter()
                        .all(|out| out.frame[..16] == frame[..16] && out.frame[26..38] == frame[26..38]),
                    "by {name}: addresses or ports have changed"
                );
                match *name {
                    // TCP stays whole where it can. (The others' offloads are off, or are not for UDP.)
                    "a tap with offloads" if gso == GSO_TCPV4 => {
                        let said = out[0].header.as_deref().unwrap_or_default();
                        ensure!(whole && said[1] == GSO_TCPV4 && said[4..6] == [0xe8, 3], "{said:02x?}");
                    }
                    "a veth" => ensure!(whole, "by {name}, {} pieces", out.len()),
                    _ => ensure!(
                        out.len() == 5 && bytes == payload.len(),
                        "by {name}, {} pieces of 5",
                        out.len()
                    ),
                }
                if out.len() == 5 && out[0].header.is_none() {
                    ensure!(out.iter().all(|out| is_sum_right(&out.frame)), "by {name}: a checksum is wrong");
                }
            }
        }
        ensure!(bench.refused("vnic/vm1")? == refused, "honest super-frames are refused");
        Ok(())
    })
}

#[test]
fn packet_sockets_behind_a_veth_may_not_lie_either() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        lab.apply(&format!("vnics:\n{}", vm1.vnic("policy: {ipGuard: [\"10.77.0.1\"]}")))?;
        let from = PacketSocket::open_vnet(&vm1.netns, INTERFACE)?;
        let to = PacketSocket::open(&vm2.netns, INTERFACE)?;
        let mut told = 0;
        for (what, frame, start, offset) in lies(vm2.mac(), "a lie") {
            from.send(&[&header(start, offset, GSO_NONE, 0)[..10], &frame].concat())?;
            told += 1;
            let honest = format!("honest {told}");
            let frame = udp4(vm2.mac(), vm1.mac(), (vm1.ip4(), vm2.ip4()), (1, 2), honest.as_bytes());
            from.send(&[&header(34, 6, GSO_NONE, 0)[..10], &with_pseudo_sum(&frame, 6)].concat())?;
            let mut strayed = 0;
            to.expect(&honest, PATIENCE, |frame| {
                strayed += u32::from(carries(frame, "a lie"));
                carries(frame, &honest)
            })?;
            ensure!(strayed == 0, "{what} got through");
        }
        let dropped = lab.sluice().dropped("vnic/vm1", "malformed-length")?;
        ensure!(dropped == told, "{told} were sent and {dropped} are counted");
        Ok(())
    })
}

#[test]
fn xdp_does_not_carry_lies_on() -> Result<()> {
    scenario(|lab| {
        let host = lab.host();
        let (guest, other) = (VnetTap::open(host, "t1", OFFLOADS)?, Way::Tap(Tap::open(host, "t2")?));
        host.ip_batch("link set t1 up\nlink set t2 up\n")?;
        let vnic = |number: u8| {
            let mac = mac_text(mac(number));
            let hook = "hook: XDP, fullChecksums: true";
            format!(
                "- {{name: vm{number}, switch: blue, attach: {{tap: t{number}}}, mac: \"{mac}\", {hook}}}\n"
            )
        };
        lab.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}{}", vnic(1), vnic(2)))?;
        let (from, ip) = GUEST;
        let frame = tcp4(mac(2), from, (ip, OTHER), (1, 2), &b"in pieces ".repeat(50));
        // A tap's driver shows XDP super-frames, also short ones, when it has made them the kernel's own.
        for start in [20, 22] {
            guest.write(&[header(start, 16, GSO_TCPV4, 100), frame.clone()].concat())?;
        }
        guest.write(&[&[0; HEADER][..], &note(mac(2), from, &[], "that is all")].concat())?;
        let strayed = other.before("that is all")?.iter().filter(|out| carries(&out.frame, "pieces")).count();
        let dropped = lab.sluice().dropped("vnic/vm1", "malformed-length")?;
        ensure!((strayed, dropped) == (0, 2), "{strayed} got through, {dropped} of 2 are counted");
        // Where there is nothing to lie with, XDP serves.
        for (name, hooks) in [("vm1", "TCX"), ("vm2", "XDP")] {
            let status = lab.sluice().json(&["get", "vnic", name])?["status"]["ports"][0].clone();
            ensure!(status["hooks"].to_string().contains(hooks), "{name} should have {hooks}: {status}");
            let says_why = status["notes"].to_string().contains("vnet_hdr=off");
            ensure!(says_why == (name == "vm1"), "{name} notes {}", status["notes"]);
        }
        Ok(())
    })
}

#[test]
fn tunnels_between_guests_keep_their_super_frames() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        for (vm, other) in [(&vm1, &vm2), (&vm2, &vm1)] {
            let (local, remote) = (vm.ip4(), other.ip4());
            vm.netns.ip_batch(&format!(
                "link add vx type vxlan id 7 local {local} remote {remote} dstport 4789\n\
                 address add 10.88.0.{}/24 dev vx\nlink set vx up\n",
                vm.number
            ))?;
        }
        tools::ping(&vm1.netns, "10.88.0.2")?;
        let end = tools::iperf3(&vm1.netns, &vm2.netns, "10.88.0.2", &["-t", "1"])?;
        ensure!(tools::gbits_received(&end) > 0.5, "TCP in the tunnel: {end}");
        let drops = lab.sluice().dropped("vnic/vm1", "malformed-length")?;
        ensure!(drops == 0, "{drops} frames of tunnels are refused");
        Ok(())
    })
}

/// Carries frames between a guest's card, a tap in its namespace, and the switch's tap, as a VMM does.
struct Relay {
    stop: Arc<AtomicBool>,
    longest: Arc<AtomicUsize>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Relay {
    fn start(card: VnetTap, port: VnetTap) -> Relay {
        let (stop, longest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&longest));
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 70_000];
            while !stopped.load(Ordering::Relaxed) {
                let mut files = [&card, &port].map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN));
                poll(&mut files, PollTimeout::from(20u8))?;
                for (from, to) in [(&card, &port), (&port, &card)] {
                    // Not for ever: the other direction waits.
                    for _ in 0..64 {
                        let Some(length) = from.read(&mut buffer)? else { break };
                        seen.fetch_max(length, Ordering::Relaxed);
                        to.write(&buffer[..length])?;
                    }
                }
            }
            Ok(())
        });
        Relay { stop, longest, thread: Some(thread) }
    }

    /// Ends it; says how long the longest frame was.
    fn end(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.map(|()| self.longest.load(Ordering::Relaxed)),
            _ => anyhow::bail!("the relay panicked"),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A test that fails has said why.
            let _ = thread.join();
        }
    }
}

#[test]
fn tcp_flows_through_taps_in_super_frames() -> Result<()> {
    scenario(|lab| {
        let (veth, mut guests, mut relays, mut vnics) = (lab.vm(4)?, Vec::new(), Vec::new(), String::new());
        for number in [1u16, 2] {
            let name = format!("vm{number}");
            let netns = lab.netns(&name)?;
            let card = VnetTap::open(&netns, INTERFACE, OFFLOADS)?;
            let port = VnetTap::open(lab.host(), &format!("t{number}"), OFFLOADS)?;
            let vm = Vm { name, netns, port: format!("t{number}"), number };
            vm.netns.run(&["ip", "link", "set", INTERFACE, "address", &mac_text(vm.mac()), "up"])?;
            lab.host().run(&["ip", "link", "set", &vm.port, "up"])?;
            vm.default_addresses()?;
            let guard = format!("policy: {{ipGuard: [\"{}\", \"{}\"]}}", vm.ip4(), vm.ip6());
            vnics += &vm.vnic(&guard).replace("veth:", "tap:");
            relays.push(Relay::start(card, port));
            guests.push(vm);
        }
        lab.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{vnics}{}", veth.vnic("")))?;
        for (one, other) in [(&guests[0], &guests[1]), (&guests[0], &veth), (&veth, &guests[1])] {
            one.ping(other)?;
            for address in [other.ip4().to_string(), other.ip6().to_string()] {
                let end = tools::iperf3(&one.netns, &other.netns, &address, &["-t", "1"])?;
                let reached = tools::gbits_received(&end);
                ensure!(reached > 0.5, "TCP from {} to {address}: {reached} Gbit/s: {end}", one.name);
            }
        }
        for relay in relays {
            let longest = relay.end()?;
            ensure!(longest > 30_000, "the longest frame had {longest} bytes");
        }
        for port in ["vnic/vm1", "vnic/vm2", "vnic/vm4"] {
            let drops = lab.sluice().dropped(port, "malformed-length")?;
            ensure!(drops == 0, "{drops} frames of {port} are refused");
        }
        Ok(())
    })
}
