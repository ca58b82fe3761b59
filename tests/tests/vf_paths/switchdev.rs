//! An eSwitch in switchdev mode under the daemon: netdevsim, which takes rules into hardware that it does not have. Its
//! VFs have no interfaces, so an orchestrator gives them to guests, and this is it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use sluice_tests::api::{list, number, text};
use sluice_tests::lab::Vm;
use sluice_tests::netns::check;
use sluice_tests::vf_lab::{PATIENCE, ip};
use sluice_tests::{Lab, wait_until};

const NUMBER: u32 = 97;
const VFS: u16 = 3;
const FOLDER: &str = "/sys/bus/netdevsim";
/// What the kernel says of a bucket that somebody else has made, without hardware.
const WORDS: &str = "Mismatch between action and filter offload flags";
/// The daemon looks at the NIC every second.
const WATCHED: Duration = Duration::from_secs(4);

/// A simulated NIC in switchdev mode; removed when dropped.
struct Simulated {
    uplink: String,
}

impl Simulated {
    fn new() -> Result<Simulated> {
        fs::write(Path::new(FOLDER).join("new_device"), format!("{NUMBER} 1")).context("a netdevsim")?;
        let device = Path::new(FOLDER).join(format!("devices/netdevsim{NUMBER}"));
        let uplink = wait_until("the simulated NIC has a port", PATIENCE, || {
            let entry = fs::read_dir(device.join("net"))?.next().transpose()?;
            Ok(entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        })?;
        let simulated = Simulated { uplink };
        let name = format!("netdevsim/netdevsim{NUMBER}");
        check(Command::new("devlink").args(["dev", "eswitch", "set", &name, "mode", "switchdev"]))?;
        fs::write(device.join("sriov_numvfs"), VFS.to_string()).context("making VFs")?;
        ip(&["link", "set", &simulated.uplink, "up"])?;
        Ok(simulated)
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = fs::write(Path::new(FOLDER).join("del_device"), NUMBER.to_string());
    }
}

/// One of everything that rules can enforce.
const POLICY: &str = "vlan: {access: 100}, ipGuard: [10.77.0.1], dhcpGuard: true, raGuard: true, \
    rate: {fromVm: {bps: 100000000, burstBytes: 150000}}, \
    acl: {default: {fromVm: DENY}, rules: [\
    {priority: 90, direction: FROM_VM, match: {dstIp: 192.0.2.0/24}, action: DENY}, \
    {priority: 80, direction: FROM_VM, match: {ipProto: tcp, dstPorts: [\"1000-2047\"]}, action: ALLOW}, \
    {priority: 60, direction: FROM_VM, match: {ipProto: udp, srcPorts: [\"53\"]}, action: ALLOW}]}";

fn vnic(vm: &Vm) -> String {
    vm.vnic(&format!("policy: {{{POLICY}}}, sriov: {{attach: {{external: {{}}}}}}"))
}

fn path(lab: &Lab, vm: &Vm) -> Result<Value> {
    Ok(lab.sluice().json(&["get", "vnic", &vm.name])?["status"]["path"].clone())
}

fn nic(lab: &Lab) -> Result<Value> {
    Ok(lab.sluice().json(&["get", "switch", "blue"])?["status"]["nic"].clone())
}

/// Does whatever is asked until a vNIC is as wanted, as an orchestrator; returns its path.
fn orchestrate(lab: &Lab, vm: &Vm, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = 0;
    wait_until(&format!("{} is {what}", vm.name), PATIENCE, || {
        let path = path(lab, vm)?;
        if is_it(&path) {
            return Ok(Some(path));
        }
        let ticket = number(&path["request"]["ticket"]);
        if ticket > last {
            last = ticket;
            let ticket = ticket.to_string();
            lab.sluice().run(&["acknowledge", "vnic", &vm.name, "--ticket", &ticket, "--done"])?;
        }
        bail!("{path}")
    })
}

fn is_on(wanted: &'static str) -> impl Fn(&Value) -> bool {
    move |path| text(&path["path"]) == wanted
}

/// The rules on a representor, and how many of them are in hardware.
fn rules(netdev: &str) -> Result<(usize, usize)> {
    let shown = check(Command::new("tc").args(["-j", "filter", "show", "dev", netdev, "ingress"]))?;
    let shown: Value = serde_json::from_str(&shown).with_context(|| format!("tc printed {shown}"))?;
    let rules: Vec<&Value> = list(&shown).iter().filter(|one| one["options"]["actions"].is_array()).collect();
    let in_hardware = rules.iter().filter(|one| one["options"]["in_hw"] == true).count();
    Ok((rules.len(), in_hardware))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn rules_are_in_hardware_adopted_without_a_write_and_refused_in_the_kernels_words() -> Result<()> {
    let lab = Lab::in_guest()?;
    let simulated = Simulated::new()?;
    lab.start()?;
    let (vm1, vm2) = (lab.vm(1)?, lab.vm(2)?);
    play(&lab, &simulated, &vm1, &vm2).map_err(|error| anyhow!("{error:#}\n{}", lab.diagnosis()))
}

fn play(lab: &Lab, simulated: &Simulated, vm1: &Vm, vm2: &Vm) -> Result<()> {
    lab.apply(&format!(
        "switches: [{{name: blue, uplink: {{netdev: {}}}}}]\nvnics:\n{}{}",
        simulated.uplink,
        vnic(vm1),
        vm2.vnic("policy: {vlan: {access: 100}}")
    ))?;
    let granted = orchestrate(lab, vm1, "on its VF", is_on("HARDWARE"))?;
    let seen = nic(lab)?;
    ensure!(text(&seen["mode"]) == "switchdev" && number(&seen["vfs"]) == 3, "{seen}");
    let port = representor(lab, vm1)?;
    let (all, in_hardware) = rules(&port)?;
    ensure!(all >= 8 && in_hardware == all, "{in_hardware} of {all} rules of {port} are in hardware");
    println!("VF {}: {all} rules on {port}, all in_hw; mode {}", granted["vf"]["index"], text(&seen["mode"]));
    // The vNIC's own stays served in software.
    lab.sluice().wait_ready("vnic", &vm1.name, PATIENCE)?;

    // Read back at every look, and as it should be: nothing is written.
    let before = number(&nic(lab)?["writes"]);
    watch(lab, vm1)?;
    let after = number(&nic(lab)?["writes"]);
    ensure!(before == after, "{} writes to an unchanged NIC", after - before);

    lab.kill()?;
    ensure!(rules(&port)? == (all, all), "rules went with the daemon");
    lab.start()?;
    watch(lab, vm1)?;
    let writes = number(&nic(lab)?["writes"]);
    ensure!(writes == 0, "the restarted daemon wrote {writes} times");
    ensure!(rules(&port)? == (all, all), "adopted, and {:?} rules are there", rules(&port));
    println!("a restart adopts with 0 writes, in hardware at every look");
    refused(lab, vm1)
}

/// Looks at the path for a while: always in hardware.
fn watch(lab: &Lab, vm: &Vm) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < WATCHED {
        let path = path(lab, vm)?;
        ensure!(text(&path["path"]) == "HARDWARE", "it left its VF: {path}");
    }
    Ok(())
}

/// The interface that the port `vf/NAME` is on.
fn representor(lab: &Lab, vm: &Vm) -> Result<String> {
    let status = lab.sluice().json(&["get", "vnic", &vm.name])?["status"].clone();
    let wanted = format!("vf/{}", vm.name);
    let port = list(&status["ports"])
        .iter()
        .find(|port| text(&port["name"]) == wanted || text(&port["port"]) == wanted);
    let port = port.with_context(|| format!("no port {wanted} in {status}"))?;
    ensure!(text(&port["state"]) == "ATTACHED", "{port}");
    Ok(text(&port["netdev"]).to_owned())
}

/// Somebody has the bucket that the policy needs, without hardware: the kernel refuses, and its words reach the operator.
fn refused(lab: &Lab, vm: &Vm) -> Result<()> {
    let shown = check(Command::new("tc").args(["-j", "actions", "list", "action", "police"]))?;
    let shown: Value = serde_json::from_str(&shown).with_context(|| format!("tc printed {shown}"))?;
    let index = list(&shown).iter().find_map(|all| all["actions"][0]["index"].as_u64());
    let index = index.with_context(|| format!("tc shows no bucket: {shown}"))?.to_string();
    let (sluice, name) = (lab.sluice().clone(), vm.name.clone());
    // It returns when the VF is given back, and that waits for the orchestrator.
    let revoking = std::thread::spawn(move || sluice.run(&["revoke", "vnic", &name, "--hold", "0"]));
    orchestrate(lab, vm, "held", is_on("SOFTWARE"))?;
    revoking.join().map_err(|_| anyhow!("revoking panicked"))??;
    wait_until("the bucket is free", PATIENCE, || {
        let theirs = ["actions", "add", "action", "police", "rate", "1mbit", "burst", "10k", "index", &index];
        Ok(check(Command::new("tc").args(theirs)).ok())
    })?;
    lab.sluice().run(&["release", "vnic", &vm.name])?;
    let path = orchestrate(lab, vm, "refused a VF", |path| {
        text(&path["path"]) == "SOFTWARE" && path.to_string().contains(WORDS)
    })?;
    println!("{}: {}; {}", text(&path["reason"]), text(&path["message"]), path["uncovered"]);
    let said = lab.sluice().run(&["explain", "vnic", &vm.name])?;
    ensure!(said.contains(WORDS), "explain does not say it: {said}");
    check(Command::new("tc").args(["actions", "del", "action", "police", "index", &index]))?;
    lab.sluice().run(&["release", "vnic", &vm.name])?;
    orchestrate(lab, vm, "on its VF again", is_on("HARDWARE")).map(drop)
}
