//! ACLs on live traffic: what they block stays blocked, what they count is true, and an edit reaches everybody.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use sluice_tests::tools::{gbits_received, iperf3, pings_answered};
use sluice_tests::{PATIENCE, scenario, wait_until};

const NO_PING: &str = "aclGroups:
- name: quiet
  rules:
  - {priority: 100, direction: TO_VM, match: {ipProto: icmp, icmpType: 8}, action: DENY}
";

#[test]
fn a_rule_blocks_and_its_counter_rises() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        vm1.ping(&vm2)?;
        lab.apply(&format!("{NO_PING}vnics:\n{}", vm2.vnic("policy: {acl: {groups: [quiet]}}")))?;
        vm1.no_ping(&vm2)?;
        // Three pings, three hits; the other way nothing is denied.
        let hits = lab.sluice().rule_packets("group/quiet", 100)?;
        ensure!(hits == 3, "the rule has {hits} hits");
        let drops = lab.sluice().dropped("vnic/vm2", "acl-to-vm")?;
        ensure!(drops == 3, "{drops} frames were counted as dropped");
        vm2.ping(&vm1)
    })
}

#[test]
fn a_default_of_deny_lets_only_the_rules_through() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        let policy = "policy: {acl: {default: {fromVm: ALLOW, toVm: DENY}, rules: [
            {priority: 10, direction: TO_VM, match: {ethertype: arp}, action: ALLOW},
            {priority: 10, direction: TO_VM, match: {ipProto: tcp, dstPorts: [\"5201\"]}, action: ALLOW}]}}";
        lab.apply(&format!("vnics:\n{}", vm2.vnic(&policy.replace('\n', " "))))?;
        vm1.no_ping(&vm2)?;
        let end = iperf3(&vm1.netns, &vm2.netns, &vm2.ip4().to_string(), &["-t", "1"])?;
        ensure!(gbits_received(&end) > 0.5, "TCP to the open port: {end}");
        Ok(())
    })
}

#[test]
fn an_edit_of_a_group_reaches_all_its_vnics_at_once() -> Result<()> {
    scenario(|lab| {
        let vms = (1..=4).map(|number| lab.vm(number)).collect::<Result<Vec<_>>>()?;
        let vnics: String = vms.iter().map(|vm| vm.vnic("policy: {acl: {groups: [quiet]}}")).collect();
        lab.apply(&format!("switches: [{{name: blue}}]\n{NO_PING}vnics:\n{vnics}"))?;
        for pair in vms.windows(2) {
            pair[0].no_ping(&pair[1])?;
        }
        lab.apply(&NO_PING.replace("DENY", "ALLOW"))?;
        for pair in vms.windows(2) {
            pair[0].ping(&pair[1])?;
        }
        lab.apply(NO_PING)?;
        for pair in vms.windows(2) {
            wait_until("the edit is in force", PATIENCE, || {
                Ok((pings_answered(&pair[0].netns, &pair[1].ip4().to_string(), 1)? == 0).then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_rate_limit_limits() -> Result<()> {
    scenario(|lab| {
        let (vm1, vm2) = lab.pair()?;
        lab.apply(&format!(
            "vnics:\n{}",
            vm1.vnic("policy: {rate: {fromVm: {bps: 50000000, burstBytes: 131072}}}")
        ))?;
        let target = vm2.ip4().to_string();
        let end = iperf3(&vm1.netns, &vm2.netns, &target, &["-u", "-b", "200M", "-l", "1200", "-t", "3"])?;
        let rate = gbits_received(&end);
        ensure!((0.03..0.06).contains(&rate), "50 Mbit/s were allowed, {rate} Gbit/s arrived: {end}");
        ensure!(lab.sluice().dropped("vnic/vm1", "rate-from-vm")? > 0, "nothing was counted");
        Ok(())
    })
}
