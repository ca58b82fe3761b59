//! Ordinary traffic of ordinary VMs: it has to get through, at every size, over both families.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::{scenario, tools};

#[test]
fn ping_over_both_families() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        vm1.ping(&vm2)?;
        vm2.ping(&vm1)?;
        tools::ping(&vm1.netns, &vm2.ip6().to_string())?;
        tools::ping(&vm2.netns, &vm1.ip6().to_string())
    })
}

#[test]
fn iperf3_tcp_over_both_families() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        for address in [vm2.ip4().to_string(), vm2.ip6().to_string()] {
            for direction in [&["-t", "2"][..], &["-t", "2", "-R"]] {
                let end = tools::iperf3(&vm1.netns, &vm2.netns, &address, direction)?;
                // Without segmentation offload across the switch this would be far below.
                ensure!(tools::gbits_received(&end) > 1.0, "TCP to {address} {direction:?}: {end}");
            }
        }
        Ok(())
    })
}

#[test]
fn iperf3_udp_over_both_families() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        for address in [vm2.ip4().to_string(), vm2.ip6().to_string()] {
            let end = tools::iperf3(
                &vm1.netns,
                &vm2.netns,
                &address,
                &["-u", "-b", "100M", "-l", "1200", "-t", "2"],
            )?;
            // A little is lost where iperf3 is not scheduled in time to read its socket; none by the switch.
            let lost = end["sum"]["lost_percent"].as_f64().unwrap_or(100.0);
            ensure!(lost < 10.0 && tools::gbits_received(&end) > 0.085, "UDP to {address}: {end}");
            let drops = lab.sluice().drops()?;
            ensure!(drops.is_empty(), "the switch dropped {drops:?}");
        }
        Ok(())
    })
}

#[test]
fn the_outside_is_reached_through_the_uplink() -> Result<()> {
    scenario(|lab| {
        let (vm1, out) = (lab.vm(1)?, lab.outside(200)?);
        lab.apply(&format!(
            "switches: [{{name: blue, uplink: {{netdev: up200}}}}]\nvnics:\n{}",
            vm1.vnic("")
        ))?;
        vm1.ping(&out)?;
        out.ping(&vm1)?;
        let learnt = lab.sluice().fdb()?;
        let row = ("uplink/blue".to_owned(), sluice_tests::wire::mac_text(out.mac()));
        ensure!(learnt.contains(&row), "the outside's address was not learnt: {learnt:?}");
        let end = tools::iperf3(&vm1.netns, &out.netns, &out.ip4().to_string(), &["-t", "2"])?;
        ensure!(tools::gbits_received(&end) > 0.5, "TCP through the uplink: {end}");
        Ok(())
    })
}

#[test]
fn the_host_is_reached_through_its_internal_port() -> Result<()> {
    scenario(|lab| {
        let vm1 = lab.vm(1)?;
        lab.apply(&format!(
            "switches: [{{name: blue, internal: {{netdev: blue-host}}}}]\nvnics:\n{}",
            vm1.vnic("")
        ))?;
        lab.host().address("blue-host", "10.77.9.9/16")?;
        lab.host().run(&["ip", "link", "set", "blue-host", "up"])?;
        tools::ping(&vm1.netns, "10.77.9.9")?;
        tools::ping(lab.host(), &vm1.ip4().to_string())?;
        let end = tools::iperf3(&vm1.netns, lab.host(), "10.77.9.9", &["-t", "1"])?;
        ensure!(tools::gbits_received(&end) > 0.5, "TCP to the host: {end}");
        // Taken away, it is removed; the switch goes on.
        lab.apply("switches: [{name: blue}]")?;
        ensure!(lab.host().ifindex("blue-host")?.is_none(), "the internal port outlives its wish");
        Ok(())
    })
}

#[test]
fn giant_frames_pass_whole() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        for vm in [&vm1, &vm2] {
            lab.host().run(&["ip", "link", "set", &vm.port, "mtu", "9000"])?;
            vm.netns.run(&["ip", "link", "set", INTERFACE, "mtu", "9000"])?;
        }
        vm1.ping(&vm2)?;
        // 8 972 + 8 + 20 = 9 000 bytes, not to be fragmented.
        let target = vm2.ip4().to_string();
        vm1.netns
            .run(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "-M", "do", "-s", "8972", &target])?;
        // And fragmented: 20 000 bytes in three fragments.
        vm1.netns.run(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "-s", "20000", &target])?;
        let end = tools::iperf3(&vm1.netns, &vm2.netns, &target, &["-t", "1"])?;
        ensure!(tools::gbits_received(&end) > 1.0, "TCP with giant frames: {end}");
        Ok(())
    })
}
