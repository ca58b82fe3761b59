//! Guests attached by vhost-user: the daemon serves their rings, beside vNICs and an uplink that the kernel serves, as one switch.

#![forbid(unsafe_code)]

mod lies;
mod uplinks;
mod vmm;
mod workers;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{carries, mac, mac_text, note};
use sluice_tests::{Lab, Netns, PATIENCE, PacketSocket, Vm, VnetTap, scenario, tools, wait_until};
use sluice_user::vhost::features::bit;
use vmm::Vmm;

/// What a guest of today takes.
const OFFLOADS: u64 =
    bit::CSUM | bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::GUEST_TSO6 | bit::HOST_TSO4 | bit::HOST_TSO6;
const TAP_OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// A guest with rings: its namespace, and its VMM.
struct Guest {
    vm: Vm,
    socket: PathBuf,
}

impl Guest {
    fn new(lab: &Lab, number: u16) -> Result<Guest> {
        let name = format!("vm{number}");
        let socket = lab.places().socket.with_file_name(format!("{name}.sock"));
        let vm = Vm { netns: lab.netns(&name)?, name, port: String::new(), number };
        Ok(Guest { vm, socket })
    }

    fn vnic(&self, rest: &str) -> String {
        let (name, mac, path) = (&self.vm.name, mac_text(self.vm.mac()), self.socket.display());
        format!(
            "- {{name: {name}, switch: blue, attach: {{vhostUser: {{path: {path}}}}}, mac: \"{mac}\", {rest}}}\n"
        )
    }

    /// Boots it, with or without offloads, and waits until the switch serves it.
    fn boot(&self, lab: &Lab, with_offloads: bool) -> Result<Vmm> {
        let (features, tap_offloads) = if with_offloads { (OFFLOADS, TAP_OFFLOADS) } else { (0, 0) };
        let netns: &Netns = &self.vm.netns;
        let tap = VnetTap::open(netns, INTERFACE, tap_offloads)?;
        // A tap that is down takes nothing.
        netns.run(&["ip", "link", "set", INTERFACE, "address", &mac_text(self.vm.mac()), "up"])?;
        self.vm.default_addresses()?;
        let vmm = Vmm::start(&self.socket, tap, features)?;
        lab.sluice().wait_ready("vnic", &self.vm.name, PATIENCE)?;
        Ok(vmm)
    }
}

#[test]
fn guests_with_rings_others_and_the_outside_are_one_switch() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, lab.outside(200)?);
        let (vm2, vm3) = (Guest::new(lab, 2)?, Guest::new(lab, 3)?);
        lab.sluice().apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}{}{}",
            vm1.vnic(""),
            vm2.vnic(""),
            vm3.vnic("")
        ))?;
        let (state, why) = lab.sluice().state("vnic", "vm2")?;
        ensure!(state == "PENDING" && why.contains("vm2.sock"), "nobody is there yet: {state}, {why}");
        let (first, second) = (vm2.boot(lab, true)?, vm3.boot(lab, true)?);
        // What the first sent before the second was there could not be delivered.
        let before = lab.sluice().drops()?;
        for (one, other) in [(&vm1, &vm2.vm), (&vm2.vm, &vm3.vm), (&vm2.vm, &out)] {
            one.ping(other)?;
            other.ping(one)?;
            tools::ping(&one.netns, &other.ip6().to_string())?;
        }
        // The trace passes from one engine to the other as frames do.
        for (port, to, from) in
            [("vnic/vm1", &vm2.vm, &vm1), ("vnic/vm2", &vm1, &vm2.vm), ("vnic/vm3", &vm2.vm, &vm3.vm)]
        {
            let frame: String =
                note(to.mac(), from.mac(), &[], "traced").iter().map(|byte| format!("{byte:02x}")).collect();
            let trace = lab.sluice().json(&["trace", "--port", port, "--hex", &frame])?;
            let wanted = format!("out vnic/{}", to.name);
            ensure!(
                trace["agree"] == true && trace["liveVerdict"] == wanted.as_str(),
                "from {port}: {trace}"
            );
        }
        let trunk = lab.sluice().attempt(&["trace", "--port", "user/blue", "--hex", &"00".repeat(60)])?;
        ensure!(!trunk.status.success(), "nobody sends on a trunk");
        let plan = lab.sluice().plan("{}")?;
        ensure!(plan["changes"].as_array().is_none_or(Vec::is_empty), "nothing is to be done: {plan}");
        let drops = lab.sluice().drops()?;
        ensure!(drops == before, "dropped {drops:?}, {before:?} of them before");
        first.end()?;
        second.end()
    })
}

#[test]
fn policy_holds_on_rings_as_elsewhere() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, lab.outside(200)?);
        let vm2 = Guest::new(lab, 2)?;
        let rule = "{priority: 9, direction: TO_VM, match: {ipProto: icmp}, action: DENY}";
        lab.sluice().apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}{}",
            vm1.vnic("policy: {vlan: {access: 7}}"),
            vm2.vnic("policy: {vlan: {access: 7}}")
        ))?;
        let guest = vm2.boot(lab, true)?;
        vm1.ping(&vm2.vm)?;
        // The wire has the tag, the guest does not.
        let wire = PacketSocket::open(&out.netns, INTERFACE)?;
        let card = PacketSocket::open(&vm2.vm.netns, INTERFACE)?;
        card.send(&note([0xff; 6], vm2.vm.mac(), &[], "to the wire"))?;
        let frame = wire.expect("the note", PATIENCE, |frame| carries(frame, "to the wire"))?;
        ensure!(frame == note([0xff; 6], vm2.vm.mac(), &[(0x8100, 7)], "to the wire"), "{frame:02x?}");
        wire.send(&note(vm2.vm.mac(), out.mac(), &[(0x8100, 8)], "of another VLAN"))?;
        wire.send(&note(vm2.vm.mac(), out.mac(), &[(0x8100, 7)], "to the guest"))?;
        let mut strayed = 0;
        card.expect("the note", PATIENCE, |frame| {
            strayed += u32::from(carries(frame, "of another VLAN"));
            carries(frame, "to the guest")
        })?;
        ensure!(strayed == 0, "a frame of another VLAN got through");
        // It may not lie about its address.
        card.send(&note(vm1.mac(), mac(66), &[], "spoofed"))?;
        wait_until("the lie is counted", PATIENCE, || {
            Ok((lab.sluice().dropped("vnic/vm2", "mac-guard")? == 1).then_some(()))
        })?;
        // An ACL changes while it runs.
        lab.apply(&format!(
            "vnics:\n{}",
            vm2.vnic(&format!("policy: {{vlan: {{access: 7}}, acl: {{rules: [{rule}]}}}}"))
        ))?;
        vm1.no_ping(&vm2.vm)?;
        ensure!(lab.sluice().rule_packets("vnic/vm2", 9)? >= 3, "the rule counts");
        ensure!(lab.sluice().dropped("vnic/vm2", "acl-to-vm")? >= 3, "and the drops");
        guest.end()
    })
}

#[test]
fn super_frames_reach_those_that_take_them_and_are_cut_for_others() -> Result<()> {
    scenario(|lab| {
        let vm1 = lab.vm(1)?;
        let (vm2, vm3) = (Guest::new(lab, 2)?, Guest::new(lab, 3)?);
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}{}{}",
            vm1.vnic("policy: {vlan: {access: 7}}"),
            vm2.vnic("policy: {vlan: {access: 7}}"),
            vm3.vnic("policy: {vlan: {access: 7}}")
        ))?;
        let (with, without) = (vm2.boot(lab, true)?, vm3.boot(lab, false)?);
        for (guest, server) in [(&with, &vm2), (&without, &vm3)] {
            vm1.ping(&server.vm)?;
            for address in [server.vm.ip4().to_string(), server.vm.ip6().to_string()] {
                let end = tools::iperf3(&vm1.netns, &server.vm.netns, &address, &["-n", "20M"])?;
                ensure!(tools::gbits_received(&end) > 0.005, "TCP to {address}: {end}");
            }
            let longest = guest.longest_received();
            let is_whole = longest > 9_000;
            ensure!(
                is_whole == std::ptr::eq(guest, &with),
                "the longest frame of {} has {longest} bytes",
                server.vm.name
            );
            ensure!(is_whole || longest <= 1_518, "a frame of {longest} bytes was not cut");
        }
        // And from a guest, cut by nobody before it leaves the switch.
        for (client, server) in [(&vm2.vm, &vm1), (&vm2.vm, &vm3.vm), (&vm3.vm, &vm1)] {
            let address = server.ip4().to_string();
            let end = tools::iperf3(&client.netns, &server.netns, &address, &["-n", "20M"])?;
            ensure!(tools::gbits_received(&end) > 0.005, "TCP from {} to {address}: {end}", client.name);
        }
        with.end()?;
        without.end()
    })
}

#[test]
fn a_guest_goes_on_when_the_daemon_is_back() -> Result<()> {
    scenario(|lab| {
        let vm1 = lab.vm(1)?;
        let vm2 = Guest::new(lab, 2)?;
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}{}",
            vm1.vnic(""),
            vm2.vnic("")
        ))?;
        let guest = vm2.boot(lab, true)?;
        vm1.ping(&vm2.vm)?;
        for is_sudden in [true, false] {
            if is_sudden {
                lab.kill()?
            } else {
                lab.stop()?
            }
            vm1.no_ping(&vm2.vm)?;
            lab.start()?;
            lab.sluice().wait_ready("vnic", "vm2", PATIENCE)?;
            vm1.ping(&vm2.vm)?;
            vm2.vm.ping(&vm1)?;
        }
        // Whoever removes the trunk has it made again.
        let trunk = lab.host().run(&["ip", "-brief", "link"])?;
        let trunk = trunk.split_whitespace().find(|word| word.starts_with("slu-")).context("no trunk")?;
        lab.host().run(&["ip", "link", "del", trunk])?;
        vm1.ping(&vm2.vm)?;
        let left = lab.host().run(&["ip", "-brief", "link"])?;
        ensure!(left.matches("slu-").count() == 1, "one trunk, and no more: {left}");
        lab.apply(&format!("vnics:\n{}", vm1.vnic("")))?;
        lab.sluice().run(&["delete", "vnic", "vm2"])?;
        ensure!(!vm2.socket.exists(), "the socket goes with the vNIC");
        let left = lab.host().run(&["ip", "-brief", "link"])?;
        ensure!(!left.contains("slu-"), "the trunk goes with the last of its vNICs: {left}");
        guest.end().context("a guest that is alone waits").or_else(|_| Ok(()))
    })
}

/// DPDK's driver and front-end are somebody else's work. It answers ARP and pings by itself.
#[test]
fn dpdk_answers_pings_through_the_daemon() -> Result<()> {
    scenario(|lab| {
        let vm1 = lab.vm(1)?;
        let vm2 = Guest::new(lab, 2)?;
        let policy = format!("policy: {{vlan: {{access: 7}}, ipGuard: [\"{}\"]}}", vm2.vm.ip4());
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}{}",
            vm1.vnic("policy: {vlan: {access: 7}}"),
            vm2.vnic(&policy)
        ))?;
        let device =
            format!("--vdev=net_virtio_user0,path={},mac={}", vm2.socket.display(), mac_text(vm2.vm.mac()));
        // One core besides the main one; it polls, and is ended with the test.
        let testpmd = Command::new("dpdk-testpmd")
            .args(["-l", "0,1", "--no-pci", "--no-huge", "-m", "256", "--single-file-segments"])
            .args(["--no-telemetry", &device, "--", "--auto-start", "--no-mlockall"])
            .args(["--total-num-mbufs=4096", "--forward-mode=icmpecho"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("dpdk-testpmd, which `cargo xtask test` installs")?;
        let _testpmd = tools::Running(testpmd);
        lab.sluice().wait_ready("vnic", "vm2", 3 * PATIENCE)?;
        vm1.ping(&vm2.vm)
    })
}

#[test]
fn a_socket_that_is_served_is_refused_and_a_dead_one_replaced() -> Result<()> {
    scenario(|lab| {
        let vm2 = Guest::new(lab, 2)?;
        let other = std::os::unix::net::UnixListener::bind(&vm2.socket)?;
        let applied = lab.sluice().apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}", vm2.vnic("")));
        ensure!(applied.is_err(), "it is stored, and said to have failed");
        let (state, why) = lab.sluice().state("vnic", "vm2")?;
        ensure!(state == "FAILED" && why.contains("in use"), "somebody else listens: {state}, {why}");
        drop(other);
        // Its file is still there, and nobody listens: the next look finds that out.
        lab.sluice().wait_state("vnic", "vm2", "PENDING", PATIENCE + Duration::from_secs(10))?;
        let guest = vm2.boot(lab, true)?;
        guest.end()
    })
}
