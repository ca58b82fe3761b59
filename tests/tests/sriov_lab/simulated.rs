//! netdevsim: an eSwitch without a datapath, which accepts and refuses as one does.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_tests::lab_guest::{self, PATIENCE};
use sluice_tests::wait_until;

const DEVICE: &str = "netdevsim/netdevsim79";
const FOLDER: &str = "/sys/bus/netdevsim";

/// A simulated NIC with three VFs in switchdev mode; removed when dropped.
struct Simulated;

impl Simulated {
    fn new() -> Result<Simulated> {
        lab_guest::require()?;
        fs::write(Path::new(FOLDER).join("new_device"), "79 1").context("making a netdevsim")?;
        let simulated = Simulated;
        run(&["devlink", "dev", "eswitch", "set", DEVICE, "mode", "switchdev"])?;
        fs::write(Path::new(FOLDER).join("devices/netdevsim79/sriov_numvfs"), "3").context("making VFs")?;
        Ok(simulated)
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = fs::write(Path::new(FOLDER).join("del_device"), "79");
    }
}

fn run(words: &[&str]) -> Result<String> {
    let output = Command::new(words[0]).args(&words[1..]).output().with_context(|| format!("{words:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The interface of a representor, by the port's name that the kernel gives; and the switch that it is of.
fn representor(port: &str) -> Result<(String, String)> {
    wait_until(&format!("there is a representor {port}"), PATIENCE, || {
        for entry in fs::read_dir("/sys/class/net")? {
            let folder = entry?.path();
            // Interfaces without an eSwitch have no such file, or one that cannot be read.
            let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
            if read("phys_port_name").trim() == port {
                let netdev = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Ok(Some((netdev, read("phys_switch_id").trim().to_owned())));
            }
        }
        Ok(None)
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn representors_of_one_switch_take_flower_rules_into_hardware() -> Result<()> {
    let _simulated = Simulated::new()?;
    let mut netdevs = Vec::new();
    let mut switches = Vec::new();
    for number in 0..3 {
        let (netdev, switch) = representor(&format!("pf0vf{number}"))?;
        netdevs.push(netdev);
        switches.push(switch);
    }
    ensure!(!switches[0].is_empty(), "no switch id");
    switches.dedup();
    ensure!(switches.len() == 1, "representors of different switches: {switches:?}");

    for netdev in &netdevs {
        run(&["tc", "qdisc", "add", "dev", netdev, "clsact"])?;
    }
    let rule = ["tc", "filter", "add", "dev", &netdevs[0], "ingress", "protocol", "ip", "pref"];
    let drop = ["10", "flower", "skip_sw", "src_mac", "02:00:00:00:00:01", "action", "drop"];
    let redirect = [
        "20",
        "flower",
        "skip_sw",
        "dst_ip",
        "10.0.0.0/8",
        "action",
        "mirred",
        "egress",
        "redirect",
        "dev",
        &netdevs[1],
    ];
    run(&[&rule[..], &drop].concat())?;
    run(&[&rule[..], &redirect].concat())?;
    let text = run(&["tc", "-j", "filter", "show", "dev", &netdevs[0], "ingress"])?;
    let rules: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("tc printed {text}"))?;
    let in_hardware = rules.iter().filter(|rule| rule["options"]["in_hw"] == true).count();
    ensure!(in_hardware == 2, "{in_hardware} of 2 rules are in hardware: {text}");

    // What it cannot do it refuses, and is not silently done elsewhere.
    let mirror = ["30", "matchall", "skip_sw", "action", "drop"];
    let refusal = run(&[&rule[..], &mirror].concat());
    ensure!(refusal.is_err(), "matchall was not refused");
    let text = run(&["tc", "-j", "filter", "show", "dev", &netdevs[0], "ingress"])?;
    ensure!(!text.contains("matchall"), "a refused rule is there: {text}");
    Ok(())
}
