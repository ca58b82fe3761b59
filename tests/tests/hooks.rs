//! XDP on virtual ports: where the guest computes full checksums it works, elsewhere it is refused, not broken.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use serde_json::Value;
use sluice_tests::lab::INTERFACE;
use sluice_tests::{Lab, PATIENCE, Vm, scenario, tools};

fn port_status(lab: &Lab, vm: &Vm) -> Result<Value> {
    Ok(lab.sluice().json(&["get", "vnic", &vm.name])?["status"]["ports"][0].clone())
}

fn uses_xdp(status: &Value) -> bool {
    status["hooks"].as_array().is_some_and(|hooks| hooks.iter().any(|hook| hook == "XDP"))
}

#[test]
fn tcp_flows_through_xdp_when_the_guest_computes_checksums() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = (lab.vm(1)?, lab.vm(2)?);
        for vm in [&vm1, &vm2] {
            vm.netns.run(&["ethtool", "-K", INTERFACE, "tx", "off"])?;
        }
        let policy = "hook: XDP, fullChecksums: true";
        lab.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}{}", vm1.vnic(policy), vm2.vnic(policy)))?;
        for vm in [&vm1, &vm2] {
            let status = port_status(lab, vm)?;
            ensure!(uses_xdp(&status), "no XDP: {status}");
        }
        vm1.ping(&vm2)?;
        tools::ping(&vm2.netns, &vm1.ip6().to_string())?;
        for address in [vm2.ip4().to_string(), vm2.ip6().to_string()] {
            let end = tools::iperf3(&vm1.netns, &vm2.netns, &address, &["-t", "2"])?;
            ensure!(tools::gbits_received(&end) > 0.3, "TCP through XDP to {address}: {end}");
        }
        Ok(())
    })
}

#[test]
fn a_mixed_switch_carries_both_ways() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = (lab.vm(1)?, lab.vm(2)?);
        vm1.netns.run(&["ethtool", "-K", INTERFACE, "tx", "off"])?;
        let policy = "hook: XDP, fullChecksums: true";
        lab.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}{}", vm1.vnic(policy), vm2.vnic("")))?;
        vm1.ping(&vm2)?;
        for direction in [&["-t", "2"][..], &["-t", "2", "-R"]] {
            let end = tools::iperf3(&vm1.netns, &vm2.netns, &vm2.ip4().to_string(), direction)?;
            ensure!(tools::gbits_received(&end) > 0.3, "TCP between XDP and TCX {direction:?}: {end}");
        }
        Ok(())
    })
}

#[test]
fn xdp_is_refused_where_tcp_would_die() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        // Nobody has said that full checksums come.
        let said = match lab.sluice().apply(&format!("vnics:\n{}", vm1.vnic("hook: XDP"))) {
            Err(error) => format!("{error:#}"),
            Ok(_) => {
                lab.sluice().wait_ready("vnic", "vm1", PATIENCE)?;
                let status = port_status(lab, &vm1)?;
                ensure!(!uses_xdp(&status), "XDP was not refused: {status}");
                status["notes"].to_string()
            }
        };
        ensure!(said.contains("hecksum"), "it does not say why: {said}");
        vm1.ping(&vm2)?;
        let end = tools::iperf3(&vm1.netns, &vm2.netns, &vm2.ip4().to_string(), &["-t", "1"])?;
        ensure!(tools::gbits_received(&end) > 1.0, "TCP: {end}");
        Ok(())
    })
}
